"""Text to a store of unit vectors: a build that goes on where it stopped.

    store = build("papers", "outputs/datasets/papers")      # a folder of .txt and .md files; sources.py has the others
    python -m lvmlib build-store papers outputs/datasets/papers --unit sentence

Needs the extra `encode`. Until it is finished, a build works in the folder `<out>.partial`:

    lock                held while a process works there; says which
    build.yaml          what is built: the parameters, the state of the source, the encoder's revision
    chunks/             the text, cut (chunking.write_chunks), or ready vectors in order (ready.group_rows)
    shard-00000.npz …   vectors (n, D) float16 of `shard` chunks, their lengths, and a mark of the texts they are of
    store/              the store, as it is put together; at the end it is renamed to `out`

Each appears whole or not at all, so a build that was killed goes on with the same call, to the same store: bit for bit
on the same machine with as many threads. Axes: M chunks, A articles, D vector dimension.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
import yaml
from tqdm import tqdm

from .. import windows
from ..config import LONGEST, watched
from ..data import open, splits
from ..data import store as store_format
from ..device import pick_device
from ..errors import LVMError, said
from ..io import limits as untrusted
from ..io.disk import hold, sync, write_whole
from ..io.paths import ROOT, outputs
from ..windows import Store
from . import chunking, encoders, sources
from . import tables as ready

RESULT_ONLY = ("name", "ood", "keep_text")  # may change while a build goes on: no chunk and no vector depends on them
FRESH = 'fresh: in the notebook -p fresh True, with make ARGS="-p fresh True"'
PACKAGES = {
    "text": ("sentence-transformers", "transformers", "tokenizers", "torch", "sentencex", "datasketch", "numpy"),
    "vectors": ("pyarrow", "numpy"),
    "hub": ("datasets", "pyarrow"),
    "nltk": ("nltk",),
    "wikipedia": ("gensim",),
    "parquet": ("pyarrow",),
}
QUARTILES = {"shortest": 0, "quartile": 0.25, "median": 0.5, "third quartile": 0.75, "longest": 1}


# -------------------------------------------------------------------------------------------------------------- build


def build(
    source: str,
    out: str | os.PathLike,
    *,
    unit: str = "paragraph",
    encoder: str = encoders.OFFLINE,
    text: str | None = None,
    title: str | None = None,
    config: str | None = None,
    subset: str = "train",
    articles: int | None = None,
    shortest: int | None = None,
    longest: int | None = None,
    tokens: int = 128,
    overlap: int = 32,
    language: str = "en",
    near_duplicates: float = 0.9,
    boilerplate: int = 3,
    keep_text: bool = True,
    vectors: str | None = None,
    article: str | None = None,
    position: str | None = None,
    ood: str = "topic",
    device: str = "auto",
    precision: str = "auto",
    batch_size: int = 32,
    shard: int = 4096,
    name: str | None = None,
    fresh: bool = False,
    progress: bool = True,
) -> Store:
    """Build the store `out` (a new folder; a relative path starts from the checkout) from a source; see sources.py.

    source, text, title, config, subset, articles   what is read: columns, hub config and subset, the first so many
    unit, shortest, longest, tokens, overlap, language, near_duplicates, boilerplate   how it is cut: see chunking.py
    encoder, precision, device, batch_size   see `encoder`; a batch holds as many tokens as `batch_size` chunks of 128
    vectors, article, position   ready vectors instead: their column (such as emb), and those of article and position
    ood, keep_text, name   the split (splits.py), whether texts.jsonl is kept, the store's name (else the folder's)
    shard   chunks that are encoded and written at a time; no more than these are in memory
    fresh   sets an earlier `out` and work folder aside, as NAME.old-1 and so on

    A finished store of the same parameters is opened and given back; an interrupted build goes on. One of other
    parameters, of another state of the source, or by another encoder is refused: LVMError names what differs, as it
    does whatever is wrong with source, encoder, disk or parameters.
    """
    asked = SimpleNamespace(**locals())
    sources.check_limit(articles, "articles")
    _check_numbers(batch_size=batch_size, shard=shard)
    out = Path(os.path.normpath(ROOT / os.path.expanduser(os.fspath(out))))
    work = out.with_name(out.name + ".partial")
    asked.kind, asked.device = sources.locate(source)[0], pick_device(device or "auto")
    recipe, either = _recipe(asked, out)
    try:
        if fresh:
            _aside(out, work)
        if os.path.lexists(out):
            return _reused(out, work, recipe, either)
        with _locked(work):
            if os.path.lexists(out):  # another process came first
                return _reused(out, work, recipe, either)
            shard = _begin(work, recipe, shard)
            made = (_encoded if vectors is None else _grouped)(asked, work, recipe, shard, _Progress(progress))
            _put_together(work, out, recipe, asked.kind, made)
            _clear(work)
    except OSError as e:
        raise LVMError(
            f"{out}: cannot be built there ({e.strerror or e}); mend that (free some room, or name another folder) and "
            "call again: what is done stays, and is gone on with"
        ) from e
    return store_format.open_store(out)


def store_folder(
    source: str, unit: str = "paragraph", out: str | int | None = None, ready: bool = False, fast: bool = False
) -> Path:
    """Where encode.ipynb puts a store: outputs/datasets/NAME, or a path if `out` is one (it has a /). Without `out` the
    name is made of the source and the unit. `ready`: of ready vectors; `fast`: under outputs/fast/.

    Raises LVMError for a name that is none, or that an embedded dataset has.
    """
    if isinstance(out, str) and "/" in out:
        return ROOT / os.path.expanduser(out)
    if out is None:
        kind, _ = sources.locate(source)
        own = source.partition(":")[2].partition("@")[0]
        name = own if kind in ("hub", "nltk") else os.path.basename(source.rstrip("/"))
        name = re.sub(r"\.(jsonl|ndjson|parquet)(\.gz)?$", "", name, flags=re.IGNORECASE)
        out = re.sub(r"[^\w.-]+", "-", name).strip("._-") + ("-vectors" if ready else f"-{unit}")
    name = str(out)  # papermill makes numbers of digits
    fit = re.fullmatch(r"[^\W_][\w.-]*", name) and len(name.encode()) <= LONGEST
    if not fit or name in open.embedded():
        raise LVMError(
            f"out {name[:LONGEST]!r}: use letters, digits, '-', '_' and '.', begin with a letter or digit, and do "
            f"not take the name of an embedded dataset ({', '.join(open.embedded())}); or give a path, ./mine"
        )
    return outputs() / ("fast" if fast else "") / "datasets" / name


def _recipe(asked: SimpleNamespace, out: Path) -> tuple[dict, set[str]]:
    """What makes one build another than the next, and what of it need not be the same in a store that is finished."""
    splits.rule(asked.ood)  # a slip is told now, not after hours
    ready, either = asked.vectors is not None, set()
    if not ready and (asked.article or asked.position):
        raise LVMError(
            "article and position are columns of ready vectors; name their column too, such as vectors='emb'"
        )
    named = asked.kind in ("hub", "nltk", "wikipedia")  # else a path, and that of this machine is nobody's business
    where = {"config": asked.config, "subset": asked.subset}
    recipe = {
        "source": asked.source if named else Path(os.path.abspath(ROOT / os.path.expanduser(asked.source))).name,
        "source_fingerprint": sources.fingerprint(asked.source, **where),
        "source_files": 0 if named else len(sources.locate(asked.source)[1]),
        "text": asked.text or (None if ready else "text"),
        "title": asked.title or (None if ready else "title"),
        **where,
        "articles": asked.articles,
    }
    if ready:
        recipe |= {"vectors": asked.vectors, "article": asked.article, "position": asked.position}
    else:
        if asked.unit != "tokens":  # these need the encoder's tokenizer, and are checked later
            chunking.cut(asked.unit, shortest=asked.shortest, longest=asked.longest, language=asked.language)
        shortest = chunking.SHORTEST[asked.unit] if asked.shortest is None else asked.shortest
        recipe |= {"unit": asked.unit, "shortest": shortest, "longest": asked.longest}
        recipe |= {"tokens": asked.tokens, "overlap": asked.overlap} if asked.unit == "tokens" else {}
        recipe |= {"language": asked.language, "near_duplicates": asked.near_duplicates or 0}
        recipe |= {"boilerplate": asked.boilerplate or 0}
        try:
            name, _, revision = encoders.find(asked.encoder)
        except LVMError:
            if asked.fresh or not (out / "datasheet.yaml").exists():
                raise
            name, revision = str(asked.encoder).partition("@")[0], ""  # what is finished can be opened without it
            either.add("encoder_revision")
        if asked.precision == "auto":
            either.add("precision")
        recipe |= {"encoder": name, "encoder_revision": revision}
        recipe |= {"precision": encoders.computed_in(asked.precision, asked.device)}
    return recipe | {"keep_text": bool(asked.keep_text), "ood": asked.ood, "name": str(asked.name or out.name)}, either


@dataclass(frozen=True)
class _Made:
    """What the last stage needs: the articles, counts and lengths of the chunks, and what to warn of."""

    counts: dict
    lengths: dict[str, np.ndarray]  # (M,) each: characters, tokens
    titles: list[str]
    sources: list[str]
    parts: list[Path]  # the shards; none where chunks/vectors.npy is whole
    limit: int | None = None


def _check_numbers(**numbers) -> None:
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise LVMError(f"{key}: {value!r} is not a whole number of at least 1; change it")


def _differing(theirs: dict, ours: dict, but: Collection[str] = ()) -> str:
    but = {*but, "source_files"}  # whether it differs, the fingerprint tells
    keys = [k for k in {**theirs, **ours} if k not in but and theirs.get(k) != ours.get(k)]
    said = {k: f"{k}: {theirs.get(k)!r} there, {ours.get(k)!r} here" for k in keys}
    if "source_fingerprint" in said:
        then, now = (f"{recipe.get('source_files') or '?'} files" for recipe in (theirs, ours))
        said["source_fingerprint"] = f"the texts changed since ({then} then, {now} now; a new time of change counts)"
    return "; ".join(said.values())


def _reused(out: Path, work: Path, recipe: dict, either: set[str]) -> Store:
    if not (out / "datasheet.yaml").is_file():
        raise LVMError(f"{out}: is there already, and is no store; name a new folder, or move it aside")
    store = store_format.open_store(out)
    theirs = store.datasheet.get("build")
    if not isinstance(theirs, dict):
        raise LVMError(f"{out}: is a store that no build made; name a new folder, or move it aside")
    differing = _differing(theirs, recipe, either)
    if differing:
        raise LVMError(
            f"{out}: is a store of other making ({differing}); name another folder, or set it aside with {FRESH}"
        )
    if work.exists():  # ended between the rename and the end
        with contextlib.suppress(LVMError), _locked(work):
            if (work / "build.yaml").exists() and not _differing(_begun(work)["recipe"], theirs):
                _clear(work)
    return store


def _clear(work: Path) -> None:
    """Take away a work folder that is done with: build.yaml, which says what the rest is, after the rest."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("build.yaml", "lock"):
            path.unlink()
    (work / "build.yaml").unlink()
    shutil.rmtree(work, ignore_errors=True)  # another process may have come in, and found it finished


def _aside(out: Path, work: Path) -> None:
    """Rename what an earlier build left; nothing is deleted."""
    if (work / "build.yaml").exists():
        with _locked(work):
            _rename(work)
    if os.path.lexists(out):
        _rename(out)


def _rename(path: Path) -> None:
    number = next(i for i in range(1, 10**6) if not os.path.lexists(f"{path}.old-{i}"))
    path.rename(f"{path}.old-{number}")


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    """The work folder, held by this process alone. Raises LVMError, naming the holder, if there is one."""
    try:
        with hold(work / "lock", lambda holder: f"{work}: {holder} is building there; wait for it, or stop it"):
            yield
    finally:
        with contextlib.suppress(OSError):  # not empty: something was begun, or somebody else has come since
            work.rmdir()


def _begun(work: Path) -> dict:
    try:
        begun = untrusted.read_yaml(work / "build.yaml")
        if not isinstance(begun["recipe"], dict) or not isinstance(begun["shard"], int) or begun["shard"] < 1:
            raise ValueError("no recipe")
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise LVMError(f"{work / 'build.yaml'}: cannot be read ({said(e)}); set the folder aside with {FRESH}") from e
    return begun


def _begin(work: Path, recipe: dict, shard: int) -> int:
    """Begin a build in `work`, or take up the one that stands there; gives the size of its shards."""
    path = work / "build.yaml"
    if path.exists():
        begun = _begun(work)
        differing = _differing(begun["recipe"], recipe, RESULT_ONLY)
        done = any((work / "chunks" / name).exists() for name in ("chunked.json", "grouped.json"))
        if differing and not done:  # it failed, or was stopped, before anything was finished
            shutil.rmtree(work / "chunks", ignore_errors=True)
        elif differing:
            raise LVMError(
                f"{work}: a build of other making was begun there ({differing}); go on with its parameters, name "
                f"another folder, or set it aside with {FRESH}"
            )
        shard = begun["shard"] if done else shard
    elif set(os.listdir(work)) - {"lock", "build.yaml.partial"}:
        raise LVMError(f"{work}: is needed to work in, but holds something else; move it aside, or name another out")
    content = yaml.safe_dump({"recipe": recipe, "shard": shard}, sort_keys=False, allow_unicode=True)
    _write(path, lambda p: Path(p).write_text(content, encoding="utf-8"))
    return shard


def _write(path: Path, write: Callable[[Path], object]) -> None:
    write_whole(path, write, "what is done stays, and is gone on with")


class _Progress:
    """A bar where a person watches; else a line after each shard, and whenever 30 seconds have gone by."""

    def __init__(self, wanted: bool):
        self.watched, self.logged = wanted and watched(), wanted and not watched()
        self.told = float("inf")  # nothing yet

    def say(self, text: str) -> None:
        if self.logged:
            print(text, flush=True)
        self.told = time.monotonic()

    def reading(self, done: int, what: str) -> None:
        self.told = min(self.told, time.monotonic())
        if time.monotonic() - self.told > 30:
            self.say(f"{done:,} {what}")

    @contextlib.contextmanager
    def encoding(self, total: int) -> Iterator[None]:
        self.total, self.done, self.new, self.since = total, 0, 0, time.monotonic()
        with tqdm(total=total, unit="chunk", desc="encoding", disable=not self.watched) as self.bar:
            yield

    def kept(self, count: int) -> None:
        self.done += count
        if self.watched:
            self.bar.initial += count  # what was there before says nothing of the speed
            self.bar.update(count)

    def made(self, count: int, tell: bool = False) -> None:
        self.done, self.new = self.done + count, self.new + count
        self.bar.update(count)
        if tell or time.monotonic() - self.told > 30:
            rate = self.new / max(time.monotonic() - self.since, 1e-9)
            left = _duration((self.total - self.done) / max(rate, 1e-9))
            self.say(f"{self.done:,} of {self.total:,} chunks, {rate:.{0 if rate >= 10 else 1}f} a second, {left} left")


def _rows(asked: SimpleNamespace, recipe: dict) -> dict:
    return {key: recipe[key] for key in ("text", "title", "config", "subset")} | {"limit": asked.articles}


def _cut(asked: SimpleNamespace, folder: Path, recipe: dict, model: encoders.Encoder, progress: _Progress) -> None:
    """The chunks of the source in `folder`, unless they are there."""
    with contextlib.suppress(OSError, ValueError, LVMError):
        _chunks(folder)
        return
    counts: dict = {}
    keys = ("unit", "shortest", "longest", "tokens", "overlap", "language", "near_duplicates", "boilerplate")
    chunking.write_chunks(
        sources.documents(asked.source, **_rows(asked, recipe), counts=counts),
        folder,
        **{key: recipe[key] for key in keys if key in recipe},
        tokenizer=model.tokenizer,
        counts=counts,
        progress=progress.reading,
    )


def _chunks(folder: Path) -> tuple[np.ndarray, Sequence[str], pd.DataFrame, dict]:
    """What `write_chunks` wrote, checked to be whole."""
    counts = json.loads((folder / "chunked.json").read_text(encoding="utf-8"))
    chunks = np.load(folder / "chunks.npy")
    documents = pd.read_csv(folder / "documents.csv", keep_default_na=False, dtype=str)
    if not len(chunks) or len(documents) != chunks[-1, 0] + 1:
        raise ValueError("tables that do not agree")
    return chunks, store_format.Texts(folder / "texts.jsonl", len(chunks)), documents, counts


def _encoded(asked: SimpleNamespace, work: Path, recipe: dict, shard: int, progress: _Progress) -> _Made:
    """The source as shards of vectors: what is there and whole is kept, the rest is made."""
    model = encoders.encoder(asked.encoder, str(asked.device), recipe["precision"])
    _cut(asked, work / "chunks", recipe, model, progress)
    chunks, texts, documents, counts = _chunks(work / "chunks")
    titles, origins = documents["title"].tolist(), documents["source"].tolist()
    try:
        splits.check_articles(np.bincount(chunks[:, 0]), recipe["ood"], origins)
    except LVMError as e:
        (work / "chunks" / "chunked.json").unlink()  # so that other parameters can take the place of these
        blank = "; a paragraph ends at a blank line: has the text any?" if recipe["unit"] == "paragraph" else ""
        raise LVMError(f"{e}{blank}") from e
    progress.say(
        f"{len(chunks):,} chunks of {counts['articles']:,} articles; encoder {model.name} in {model.precision} on "
        f"{model.device}"
    )
    parts, lengths = [], {"characters": [], "tokens": []}
    with progress.encoding(len(chunks)):
        for number, first in enumerate(range(0, len(chunks), shard)):
            path, batch = work / f"shard-{number:05d}.npz", texts[first : first + shard]
            arrays = _shard(path, batch)
            if arrays is None:
                vectors, count = _vectors(model, batch, asked.batch_size, progress.made)
                _check(vectors, model, lambda row, f=first: _place(row + f, chunks, titles, texts))
                arrays = {
                    "vectors": vectors.astype(np.float16),
                    "tokens": count,
                    "characters": np.array([len(text) for text in batch], np.int32),
                    "mark": _mark(batch),
                }
                _write(path, lambda p, a=arrays: _save(p, a))
                progress.made(0, tell=True)
            else:
                progress.kept(len(batch))
            parts.append(path)
            for key, values in lengths.items():
                values.append(arrays[key])
    lengths = {key: np.concatenate(values) for key, values in lengths.items()}
    limit = model.max_seq_length
    if limit is not None and lengths["tokens"].any():
        counts["chunks cut off by the encoder"] = int((lengths["tokens"] > limit).sum())
    return _Made(counts, lengths, titles, origins, parts, limit)


def _vectors(
    model: encoders.Encoder, texts: list[str], batch_size: int, tick: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (n, D) of a shard's texts, and the tokens of each (n,), 0 where they are not known."""
    try:
        if model.ahead:
            return encoders.by_tokens(model, texts, batch_size * encoders.PER_CHUNK, tick)
        vectors = encoders.plain(model, texts, batch_size)
        tick(len(texts))
        return vectors, np.zeros(len(texts), np.int32)
    except torch.OutOfMemoryError as e:
        raise LVMError(
            f"device {model.device}: its memory is full ({said(e)}); call again with a batch_size below {batch_size}: "
            "what is done stays, and is gone on with"
        ) from e


def _check(vectors: np.ndarray, model: encoders.Encoder, place: Callable[[int], str]) -> None:
    norms = np.linalg.norm(vectors, axis=1)
    bad = np.flatnonzero(~(np.abs(norms - 1) <= 1e-3))  # negated, so that NaN counts
    if len(bad):
        what = "a zero vector" if norms[bad[0]] == 0 else "NaN or infinite values"
        advice = "take precision float32, or " if model.precision != "float32" else ""
        raise LVMError(
            f"encoder {model.name!r} gives {what} for {place(int(bad[0]))} ({len(bad)} such chunks of {len(vectors)}); "
            f"{advice}name another encoder, or take that text out"
        )


def _place(row: int, chunks: np.ndarray, titles: list[str], texts: Sequence[str]) -> str:
    return f"chunk {chunks[row, 1]} of article {titles[chunks[row, 0]]!r}, which begins {texts[row][:60]!r}"


def _mark(texts: list[str]) -> np.ndarray:
    """16 bytes of a hash of the texts: a shard of other texts is not taken for theirs."""
    return np.frombuffer(hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).digest(), np.uint8)


def _save(path: Path, arrays: dict) -> None:
    with open(path, "wb") as file:  # given a name, numpy would add .npz to it
        np.savez(file, **arrays)


def _shard(path: Path, texts: list[str]) -> dict | None:
    """The arrays of a shard, or None if it is not there, not whole, or of other texts."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("vectors", "tokens", "characters", "mark")}
    except Exception:  # a damaged file comes out of zipfile and numpy in many ways
        return None
    return arrays if np.array_equal(arrays["mark"], _mark(texts)) and len(arrays["vectors"]) == len(texts) else None


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _grouped(asked: SimpleNamespace, work: Path, recipe: dict, _shard: int, progress: _Progress) -> _Made:
    """Ready vectors in the order of articles and positions, in chunks/, unless they are there."""
    folder = work / "chunks"
    done, texts = folder / "grouped.json", folder / "texts.jsonl"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        counts: dict = {}
        columns = {key: recipe[key] for key in ("vectors", "article", "position")}
        blocks = ready.vector_rows(asked.source, **_rows(asked, recipe), **columns, counts=counts)
        titles, origins = ready.group_rows(_told(blocks, progress), folder, counts)
        splits.check_articles(np.bincount(np.load(folder / "chunks.npy")[:, 0]), recipe["ood"], origins)
        sync(folder)
        content = json.dumps({"counts": counts, "titles": titles, "sources": origins})
        _write(done, lambda p: Path(p).write_text(content, encoding="utf-8"))
    kept, lengths = json.loads(done.read_text(encoding="utf-8")), {}
    if texts.exists():
        count = len(np.load(folder / "chunks.npy", mmap_mode="r"))
        lengths["characters"] = np.fromiter(map(len, store_format.Texts(texts, count)), np.int32, count)
    return _Made(kept["counts"], lengths, kept["titles"], kept["sources"], [])


def _told(blocks: Iterator[ready.VectorRows], progress: _Progress) -> Iterator[ready.VectorRows]:
    done = 0
    with tqdm(unit="vector", desc="reading", disable=not progress.watched) as bar:
        for block in blocks:
            yield block
            done += len(block.article)
            bar.update(len(block.article))
            progress.reading(done, "vectors read")


def _put_together(work: Path, out: Path, recipe: dict, kind: str, made: _Made) -> None:
    """The store, from the chunks and shards; it takes its name when all of it stands."""
    folder = work / "store"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if made.parts:
        _join(made.parts, len(made.lengths["characters"]), folder / "vectors.npy")
    else:
        _link(work / "chunks" / "vectors.npy", folder)
    _link(work / "chunks" / "chunks.npy", folder)
    texts = work / "chunks" / "texts.jsonl"
    if recipe["keep_text"] and texts.exists():
        _link(texts, folder)
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    chunks = np.load(folder / "chunks.npy")
    split = splits.split_articles(vectors, chunks[:, 0], made.titles, recipe["ood"], made.sources)
    articles = pd.DataFrame({"title": made.titles, "split": split, "source": made.sources})
    kept = store_format.Texts(texts, len(chunks)) if texts.exists() else None
    sheet = datasheet(recipe, kind, made, vectors.shape[1], chunks[:, 0], split, kept)
    store_format.seal(folder, recipe["name"], articles, sheet)
    sync(folder)
    folder.rename(out)
    sync(out.parent, files=False)


def _join(parts: list[Path], count: int, path: Path) -> None:
    with open(path, "wb") as file:
        for number, part in enumerate(parts):
            with np.load(part, allow_pickle=False) as arrays:
                vectors = arrays["vectors"]
            if number == 0:
                shape = (count, vectors.shape[1])
                header = {"descr": np.lib.format.dtype_to_descr(vectors.dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(vectors.tobytes())


def _link(path: Path, folder: Path) -> None:
    """The same file in another folder of the work folder; a copy where the file system has no links."""
    try:
        os.link(path, folder / path.name)
    except OSError:
        shutil.copyfile(path, folder / path.name)


# ---------------------------------------------------------------------------------------------------------- datasheet


def datasheet(
    recipe: dict, kind: str, made: _Made, dimension: int, article: np.ndarray, split: np.ndarray, texts
) -> dict:
    """All that a reader must know of the dataset, in words and numbers; the same for the same build."""
    size = np.bincount(article, minlength=len(split))
    tally = {"articles": size > 0, "usable_articles": size >= splits.USABLE, "chunks": size}
    longest = [made.titles[a] for a in np.argsort(-size, kind="stable") if split[a] == "ood"]
    ready = "vectors" in recipe
    sheet: dict = {
        "description": f"{'Ready vectors' if ready else _UNITS[recipe['unit']][0]} of {recipe['source']}"
        f"{'' if ready else ' as unit vectors'}, in reading order.",
        "source": recipe["source"] + (f", config {recipe['config']}" if recipe["config"] else ""),
        "source_fingerprint": recipe["source_fingerprint"],
    }
    if texts is not None:
        sheet["text_sha256"] = store_format.sha256_file(texts.path)
    if kind == "wikipedia":
        sheet["source_sha256"] = importlib.import_module(
            "lvmlib.text.wikipedia"
        ).SLICE_SHA256  # which imports this module
        sheet["licence"] = (
            "The text is by the authors of Wikipedia, under CC BY-SA "
            "(https://creativecommons.org/licenses/by-sa/3.0/); the articles are named in articles.csv."
        )
    if ready:
        sheet["encoder"] = "not known: the vectors came with the source; made unit, stored as float16"
    else:
        limit = f" It reads the first {made.limit} tokens of a chunk." if made.limit else ""
        sheet["encoder"] = (
            f"{recipe['encoder']}, frozen; computed in {recipe['precision']}, normalised, stored as float16.{limit}"
        )
        sheet["encoder_revision"] = recipe["encoder_revision"]
    sheet["dimension"] = int(dimension)
    if not ready:
        sheet["chunks"] = _words(recipe)
    sheet["counts"] = made.counts
    if made.lengths:
        sheet["lengths"] = {what: _quartiles(values) for what, values in made.lengths.items() if values.any()}
    warnings = _warnings(recipe, made, article, texts, split)
    if warnings:
        sheet["warnings"] = warnings
    packages = dict.fromkeys((*PACKAGES["vectors" if ready else "text"], *PACKAGES.get(kind, ())))
    return sheet | {
        "split_rule": splits.rule(recipe["ood"]),
        "split": {s: {k: int(v[split == s].sum()) for k, v in tally.items()} for s in windows.SPLITS},
        "ood_articles": f"{len(longest)}; the longest: {', '.join(longest[:12])}",
        "packages": {package: _version(package) for package in packages if _version(package)},
        "build": recipe,
    }


_UNITS = {
    "paragraph": ("Paragraphs", "a paragraph: text between blank lines, its whitespace made single spaces"),
    "sentence": ("Sentences", "a sentence, as sentencex splits a paragraph"),
    "tokens": (
        "Windows of tokens",
        "a window of {tokens} tokens of the encoder, {overlap} of them shared with the next",
    ),
}


def _words(recipe: dict) -> str:
    longest = f", at most {recipe['longest']}" if recipe["longest"] else ""
    dropped = [
        f"chunks that stand in {recipe['boilerplate']} or more articles" if recipe["boilerplate"] else "",
        "repeats"
        + (f" and near-duplicates (Jaccard {recipe['near_duplicates']})" if recipe["near_duplicates"] else ""),
    ]
    return (
        f"A chunk is {_UNITS[recipe['unit']][1].format(**recipe)}; at least {recipe['shortest']} characters{longest}. "
        f"Left out: {', '.join(d for d in dropped if d)}. What is left out leaves no gap: the chunks before and behind "
        "it count as neighbours."
    )


def _quartiles(values: np.ndarray) -> dict:
    return {what: int(np.quantile(values, share, method="nearest")) for what, share in QUARTILES.items()}


def _warnings(recipe: dict, made: _Made, article: np.ndarray, texts, split: np.ndarray) -> list[str]:
    found, rows = [told] if (told := ready.warn_of_order(made.counts)) else [], []
    single = made.counts.get("articles of one chunk", 0)
    if recipe.get("unit") == "paragraph" and single > len(split) / 2:
        found.append(
            f"{single:,} of {len(split):,} articles are one chunk: no blank lines? A paragraph ends at a blank line, "
            "not at the end of a line; put some in, or take the unit sentence"
        )
    val, ood = (float((split[article] == name).mean()) for name in ("val", "ood"))
    if not 0.12 <= val <= 0.15 or (not 0.10 <= ood <= 0.20 and not recipe["ood"].startswith("source")):
        found.append(
            f"val holds {val:.0%} and ood {ood:.0%} of the chunks: too few articles, or too unequal ones, for the "
            "shares of the split rule; the nearest to them were taken, with at least 3 usable articles in each split"
        )
    if texts is not None:  # 10,000 of them will do
        rows = np.unique(np.linspace(0, len(article) - 1, min(10_000, len(article))).round().astype(int))
    titles = [made.titles[article[row]] for row in rows]
    begins = [texts[row].lstrip()[: len(title) + 1] for row, title in zip(rows, titles, strict=True)]
    told = ready.warn_of_titles(recipe["source"], titles, begins)
    if told:
        found.append(told)
    cut_off = made.counts.get("chunks cut off by the encoder", 0) / len(article)
    if cut_off >= 0.1:
        found.append(
            f"{cut_off:.0%} of the chunks are longer than the {made.limit} tokens that the encoder reads; what comes "
            "after is not in their vectors: take a smaller unit, or set longest"
        )
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
