"""Build a store of unit vectors from text, or from ready vectors. An interrupted build resumes with the same call.

    store = build("papers", "outputs/datasets/papers")      # a folder of .txt and .md files; sources.py has the others
    python -m lvmlib build-store papers outputs/datasets/papers --unit sentence

Needs the extra `encode`. Until it is finished, a build works in the folder `<out>.partial`:

    lock                names the process that works there
    build.yaml          the parameters, the state of the source, the encoder's revision
    chunks/             the chunks, or ready vectors in order (stage.py)
    shard-00000.npz …   vectors of `shard` chunks (shards.py)
    store/              the store; at the end it is renamed to `out`

A resumed build gives the same store, bit for bit on the same machine with as many threads.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from ..data import splits
from ..data import store as store_format
from ..data.open import embedded
from ..device import pick_device
from ..errors import LVMError, format_error
from ..io import limits as untrusted
from ..io.disk import lock, set_aside, sync, write_atomic
from ..io.paths import LONGEST, ROOT, outputs
from ..windows import Store
from . import chunking, encoders, sources
from .datasheet import datasheet
from .shards import RESUMABLE, Progress, encode_shards, join_shards
from .stage import Built, read_tables
from .tables import group_rows, vector_rows

RESULT_ONLY = ("name", "ood", "keep_text")  # may change while a build goes on: no chunk and no vector depends on them
SPEED_ONLY = ("device", "batch_size", "shard")  # the same store whatever these are
OF_TEXT = ("unit", "shortest", "longest", "tokens", "overlap", "language", "near_duplicates", "boilerplate")
OF_TEXT += ("encoder", "precision")  # not of ready vectors
FRESH = 'begin anew with fresh=True (in the notebook -p fresh True, with make ARGS="-p fresh True")'


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a store is built. Raises LVMError on a value that cannot be used."""

    unit: str = "paragraph"  # of a chunk; this and the next six are the fields of chunking.Cut
    shortest: int | None = None
    longest: int | None = None
    tokens: int = 128
    overlap: int = 32
    language: str = "en"
    near_duplicates: float = 0.9  # see chunking.write_chunks
    boilerplate: int = 3
    encoder: str = encoders.OFFLINE  # a sentence-transformers model, or the folder of one
    text: str | None = None  # the columns of text and title
    title: str | None = None
    config: str | None = None  # of a hub dataset
    subset: str = "train"
    articles: int | None = None  # the first so many
    vectors: str | None = None  # the column of ready vectors, such as emb; then nothing is encoded
    article: str | None = None  # of ready vectors, the columns of article and position
    position: str | None = None
    ood: str = "topic"  # the split (data/splits.py): topic, random or source:NAME
    keep_text: bool = True  # keep texts.jsonl
    name: str | None = None  # of the store; else the folder's
    device: str = "auto"
    precision: str = "auto"  # float32, bfloat16 or auto
    batch_size: int = 32  # a batch holds as many tokens as this many chunks of 128
    shard: int = 4096  # chunks that are encoded and written at a time; no more are in memory

    def __post_init__(self):
        sources.check_limit(self.batch_size or 0, "batch_size")
        sources.check_limit(self.shard or 0, "shard")
        sources.check_limit(self.articles, "articles")
        splits.rule(self.ood)
        if self.vectors is None and (self.article or self.position):
            raise LVMError("article, position: are columns of ready vectors; name their column too: vectors='emb'")
        self.cut()

    def cut(self) -> chunking.Cut:
        """Return how text is cut, without a tokenizer."""
        return chunking.Cut(self.unit, self.shortest, self.longest, self.tokens, self.overlap, self.language)


def build(source: str, out: str | os.PathLike, *, fresh: bool = False, progress: bool = True, **options) -> Store:
    """Build the store `out` (a new folder; a relative path starts from the checkout) from a source; see sources.py.

    `options`: the fields of Options. A finished store of the same options is opened, an interrupted build resumed;
    `fresh` sets an earlier `out` and its work folder aside first. Raises LVMError, naming what differs, if `out` has
    other options, another encoder, or was built from an earlier state of the source, and on any bad input.
    """
    how = Options(**options)
    out = Path(os.path.normpath(ROOT / os.path.expanduser(os.fspath(out))))
    work = out.with_name(out.name + ".partial")
    kind, _ = sources.locate(source)
    recipe, optional = _recipe(source, kind, how, out, fresh)
    try:
        if fresh:
            _set_aside(out, work)
        if os.path.lexists(out):
            return _reuse(out, work, recipe, optional)
        with _lock(work):
            if os.path.lexists(out):  # another process was first
                return _reuse(out, work, recipe, optional)
            shard = _begin(work, recipe, how.shard)
            built = _make(source, how, work, recipe, shard, Progress(progress))
            _assemble(work, out, recipe, kind, built)
            _clear(work)
    except (OSError, sqlite3.Error) as e:
        reason = getattr(e, "strerror", None) or e
        raise LVMError(f"{out}: cannot be built ({reason}); free some room, or name another; {RESUMABLE}") from e
    return store_format.open_store(out)


def store_folder(
    source: str, unit: str = "paragraph", out: str | int | None = None, ready: bool = False, fast: bool = False
) -> Path:
    """Return where encode.ipynb puts a store: outputs/datasets/NAME, or `out` if it is a path (has a /).

    Without `out` the name is made of source and unit. `ready`: of ready vectors; `fast`: under outputs/fast/. Raises
    LVMError for a name that cannot be used, or that an embedded dataset has.
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
    valid = re.fullmatch(r"[^\W_][\w.-]*", name) and len(name.encode()) <= LONGEST
    if not valid or name in embedded():
        raise LVMError(
            f"out {name[:LONGEST]!r}: use letters, digits, '-', '_' and '.', begin with a letter or digit, and do not "
            f"take the name of an embedded dataset ({', '.join(embedded())}); or give a path, ./mine"
        )
    return outputs() / ("fast" if fast else "") / "datasets" / name


def _recipe(source: str, kind: str, how: Options, out: Path, fresh: bool) -> tuple[dict, set[str]]:
    """Return what identifies a build, and the keys of it that may differ in a store that is finished."""
    recipe, optional, left_out = asdict(how), set(), {*SPEED_ONLY}
    name = source if sources.KINDS[kind].check else Path(os.path.abspath(ROOT / os.path.expanduser(source))).name
    recipe |= {"source": name, "source_fingerprint": sources.fingerprint(source, how.config, how.subset)}
    recipe |= {"name": str(how.name or out.name), "keep_text": bool(how.keep_text)}
    device = pick_device(how.device)
    if how.vectors is not None:
        left_out |= {*OF_TEXT}
    else:
        left_out |= {"vectors", "article", "position"} | ({"tokens", "overlap"} if how.unit != "tokens" else set())
        recipe |= {"text": how.text or "text", "title": how.title or "title", "shortest": how.cut().shortest}
        recipe |= {"near_duplicates": how.near_duplicates or 0, "boilerplate": how.boilerplate or 0}
        try:
            recipe["encoder"], _, recipe["encoder_revision"] = encoders.find(how.encoder)
        except LVMError:
            if fresh or not (out / "datasheet.yaml").exists():
                raise
            recipe["encoder"] = str(how.encoder).partition("@")[0]
            optional.add("encoder_revision")  # a finished store opens without its encoder
        recipe["precision"] = encoders.computed_in(how.precision, device)
        if how.precision == "auto":
            optional.add("precision")
    return {key: value for key, value in recipe.items() if key not in left_out}, optional


def _differences(theirs: dict, ours: dict, optional: Sequence[str] | set[str] = ()) -> str:
    keys = [k for k in {**theirs, **ours} if k not in optional and theirs.get(k) != ours.get(k)]
    words = {key: f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in keys}
    if "source_fingerprint" in words:
        words["source_fingerprint"] = "source_fingerprint: the texts, or their times of change, are not as they were"
    return "; ".join(words.values())


def _reuse(out: Path, work: Path, recipe: dict, optional: set[str]) -> Store:
    if not (out / "datasheet.yaml").is_file():
        raise LVMError(f"{out}: exists and is no store; name a new folder, or move it aside")
    store = store_format.open_store(out)
    theirs = store.datasheet.get("build")
    if not isinstance(theirs, dict):
        raise LVMError(f"{out}: is a store that `build` did not make; name a new folder, or move it aside")
    if differences := _differences(theirs, recipe, optional):
        raise LVMError(f"{out}: was built otherwise ({differences}); name another folder, or {FRESH}")
    if work.exists():  # killed after the last rename
        with contextlib.suppress(LVMError), _lock(work):
            if (work / "build.yaml").exists() and not _differences(_read_begun(work)["recipe"], theirs):
                _clear(work)
    return store


def _clear(work: Path) -> None:
    """Delete a finished work folder; build.yaml, which says what the rest is, after the rest."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("build.yaml", "lock"):
            path.unlink()
    (work / "build.yaml").unlink()
    shutil.rmtree(work, ignore_errors=True)  # another process may have come in, and found it finished


def _set_aside(out: Path, work: Path) -> None:
    """Rename what an earlier build left; nothing is deleted."""
    if (work / "build.yaml").exists():
        with _lock(work):
            set_aside(work)
    if os.path.lexists(out):
        set_aside(out)


@contextlib.contextmanager
def _lock(work: Path) -> Iterator[None]:
    """Hold the work folder for this process alone. Raises LVMError, naming the holder, if there is one."""
    try:
        with lock(work / "lock", lambda holder: f"{work}: {holder} is building there; wait for it, or stop it"):
            yield
    finally:
        with contextlib.suppress(OSError):  # not empty: a build was begun, or another process came
            work.rmdir()


def _read_begun(work: Path) -> dict:
    try:
        begun = untrusted.read_yaml(work / "build.yaml")
        if not isinstance(begun["recipe"], dict) or not isinstance(begun["shard"], int) or begun["shard"] < 1:
            raise ValueError("no recipe")
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise LVMError(f"{work / 'build.yaml'}: cannot be read ({format_error(e)}); {FRESH}") from e
    return begun


def _begin(work: Path, recipe: dict, shard: int) -> int:
    """Begin a build in `work`, or check that it can be resumed; return the size of its shards."""
    path = work / "build.yaml"
    if path.exists():
        begun = _read_begun(work)
        differences = _differences(begun["recipe"], recipe, RESULT_ONLY)
        chunked = (work / "chunks" / "chunked.json").exists()
        if differences and chunked:
            raise LVMError(
                f"{work}: another build was begun there ({differences}); resume it with its options, name another "
                f"folder, or {FRESH}"
            )
        shard = begun["shard"] if chunked else shard
    elif set(os.listdir(work)) - {"lock", "build.yaml.partial"}:
        raise LVMError(f"{work}: is the work folder, but holds something else; move it aside, or name another out")
    content = yaml.safe_dump({"recipe": recipe, "shard": shard}, sort_keys=False, allow_unicode=True)
    write_atomic(path, lambda partial: partial.write_text(content, encoding="utf-8"), RESUMABLE)
    return shard


def _make(source: str, how: Options, work: Path, recipe: dict, shard: int, progress: Progress) -> Built:
    """Cut and encode a source, or order its ready vectors; what an earlier call finished is kept."""
    folder, encode = work / "chunks", how.vectors is None
    model = encoders.encoder(how.encoder, str(pick_device(how.device)), recipe["precision"]) if encode else None
    try:
        built = read_tables(folder)
    except (OSError, ValueError):  # not finished, or damaged
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        _read(source, how, folder, recipe, model, progress)
        built = read_tables(folder)
    try:
        splits.check_articles(np.bincount(built.chunks[:, 0]), recipe["ood"], built.sources)
    except LVMError as e:
        (folder / "chunked.json").unlink()  # so that other options can be tried
        blank = "; a paragraph ends at a blank line: has the text any?" if recipe.get("unit") == "paragraph" else ""
        raise LVMError(f"{e}{blank}") from e
    if encode:
        size = f"{len(built.chunks):,} chunks of {len(built.titles):,} articles"
        progress.log(f"{size}; encoder {model.name} in {model.precision} on {model.device}")
        built.parts, built.tokens = encode_shards(model, built.texts, work, shard, how.batch_size, progress)
        built.limit = model.max_seq_length
        if built.limit is not None and built.tokens.any():
            built.counts["chunks cut off by the encoder"] = int((built.tokens > built.limit).sum())
    return built


def _read(source: str, how: Options, folder: Path, recipe: dict, model, progress: Progress) -> None:
    """Write the chunks of a source, or its ready vectors in order, into `folder`."""
    counts = Counter()
    columns = {key: recipe[key] for key in ("text", "title", "config", "subset")} | {"limit": how.articles}
    if model is None:
        columns |= {key: recipe[key] for key in ("vectors", "article", "position")}
        group_rows(vector_rows(source, **columns, counts=counts), folder, counts, progress.reading)
        return
    documents = sources.documents(source, **columns, counts=counts)
    drops = {"near_duplicates": recipe["near_duplicates"], "boilerplate": recipe["boilerplate"]}
    cut = asdict(how.cut()) | {"tokenizer": model.tokenizer}
    chunking.write_chunks(documents, folder, **drops, **cut, counts=counts, progress=progress.reading)


def _assemble(work: Path, out: Path, recipe: dict, kind: str, built: Built) -> None:
    """Put the store together from chunks and shards; it takes its name when it is whole."""
    folder = work / "store"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if built.parts:
        join_shards(built.parts, len(built.chunks), folder / "vectors.npy")
    else:
        _link(work / "chunks" / "vectors.npy", folder)
    _link(work / "chunks" / "chunks.npy", folder)
    if recipe["keep_text"] and built.texts is not None:
        _link(built.texts.path, folder)
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    split = splits.split_articles(vectors, built.chunks[:, 0], built.titles, recipe["ood"], built.sources)
    articles = pd.DataFrame({"title": built.titles, "split": split, "source": built.sources})
    sheet = datasheet(recipe, kind, built, vectors.shape[1], split)
    store_format.seal(folder, recipe["name"], articles, sheet)
    sync(folder)
    folder.rename(out)
    sync(out.parent, files=False)


def _link(path: Path, folder: Path) -> None:
    """Link a file into another folder; copy it where the file system has no links."""
    try:
        os.link(path, folder / path.name)
    except OSError:
        shutil.copyfile(path, folder / path.name)
