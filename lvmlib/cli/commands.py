"""The command table of `python -m lvmlib`: what the Makefile calls."""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from ..config import Version, data_name, files, version
from ..data import original
from ..errors import LVMError
from ..io import stamp
from ..io.disk import explain_os_errors, set_aside, write_atomic
from ..io.paths import outputs
from ..report import plots, summary
from ..runs import worker
from ..runs.folder import differences, run_folder
from ..share import gallery as gallery_module
from ..share import page
from ..text import build as text_build
from ..text import wikipedia as wikipedia_module
from ..windows import SPLITS
from . import sweep
from .execute import RESUMABLE, execute, find_notebook, move, parameters, short

PASS = {"allow_extra_args": True, "ignore_unknown_options": True}  # all of papermill's options
STOPPED = {128 + signal.SIGINT: "Interrupted", 128 + signal.SIGTERM: "Terminated"}  # by exit code
RUN_KEYS = ("data", "model", "epochs", "direction", "seed", "device", "precision", "trouble", "fast")
app = typer.Typer(
    help="Train latent vector models and judge them by 5CAT. train, encode, data and render pass all of papermill's "
    "options to their notebook, such as: train -p version v22 -p seed 1",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"max_content_width": 100},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command(context_settings=PASS)
def train(ctx: typer.Context) -> None:
    """Train a version and judge it.

    Executes train.ipynb into the run's folder. Options are papermill's, such as -p version v22 -p seed 1.
    """
    begun = time.time()
    with execute("train", ctx.args) as (path, p):
        folder = run_folder(_version(p), p["run_name"])
        content = json.loads(path.read_text(encoding="utf-8"))
        content["metadata"]["lvmlib"]["run"] = gallery_module.facts(folder)  # it may be shown apart from the folder
        with explain_os_errors(path, RESUMABLE):
            stamp.write(path, content)
        earlier = _publish(path, p, folder / "train.ipynb")
    if earlier and (folder / "run.yaml").stat().st_mtime < begun:
        # The run was only opened. The new notebook shows what the earlier one did, and takes over its time: else a
        # sweep would make diagnostics and 5CAT of that run again.
        os.utime(folder / "train.ipynb", ns=(earlier.st_atime_ns, earlier.st_mtime_ns))
    report = json.loads((folder / "fivecat.json").read_text(encoding="utf-8"))
    print(f"verdict   {report['verdict']['text']}\nreading   {report['reading']['text']}")


@app.command(context_settings=PASS)
def encode(ctx: typer.Context) -> None:
    """Turn texts into a dataset of vectors.

    Executes encode.ipynb. Options are papermill's, such as -p source FOLDER -p out NAME.
    """
    begun = time.time()
    with execute("encode", ctx.args) as (path, p):
        store = text_build.store_folder(p["source"], p["unit"], p["out"], p["vectors"] is not None, bool(p["fast"]))
        notebook = outputs() / ("fast" if p["fast"] else "") / store.name / "encode.ipynb"
        if notebook.exists() and (store / "datasheet.yaml").stat().st_mtime < begun:
            # The store was only opened: the notebook that lies there shows how it was made.
            print(f"\nThe store existed already.\nnotebook  {short(notebook)}")
        else:
            _publish(path, p, notebook)
    known = store.name if store.parent == outputs() / "datasets" else store  # such a one is known by its name
    print(f"store     {short(store)}\nnext      make data DATA={known}; make train VERSION=v22 DATA={known}")


@app.command(context_settings=PASS)
def data(ctx: typer.Context) -> None:
    """Show what a dataset can teach.

    Executes data.ipynb, the pre-flight. Options are papermill's, such as -p data NAME.
    """
    with execute("data", ctx.args) as (path, p):
        name = "data.ipynb" if p["horizon"] == 2 else f"data-horizon{p['horizon']}.ipynb"
        verdict = gallery_module.notebook_facts(path)["verdict"]
        _publish(path, p, outputs() / ("fast" if p["fast"] else "") / data_name(files(p["data"])) / name)
    print(f"verdict   {verdict}")


@app.command(context_settings=PASS)
def render(
    ctx: typer.Context,
    notebook: Annotated[str, typer.Argument(help="one of notebooks/, by name or path")],
    out: Annotated[Path, typer.Argument(metavar="OUT.ipynb")],
) -> None:
    """Execute one of notebooks/ into a file.

    The file names its commit. Options are papermill's, such as -p version v22.
    """
    if out.suffix != ".ipynb":
        raise typer.BadParameter(f"{out} does not end in .ipynb")
    with execute(find_notebook(notebook), ctx.args) as (path, _):
        move(path, out)
    print(f"\nnotebook  {short(out)}")


@app.command()
def gallery(
    out: Annotated[Path | None, typer.Option(help="the folder; by default outputs/gallery")] = None,
    showcase: Annotated[bool, typer.Option("--showcase", help="with the notebooks of outputs/showcase")] = False,
    fast: Annotated[bool, typer.Option("--fast", help="with fast runs, marked as such")] = False,
) -> None:
    """Make a static site of the runs under outputs/."""
    index, counts = gallery_module.build(out, showcase=showcase, fast=fast)
    print(f"gallery   {short(index)}\ncards     {counts['runs']} runs, {counts['notebooks']} other notebooks")


@app.command()
def table() -> None:
    """Compare all runs in outputs/showcase/versions.csv and .png."""
    frame = summary.runs()
    folder = outputs() / "showcase"
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "versions.csv", lambda p: frame.to_csv(p, index=False, float_format="%.6g"))
    plots.use_style()
    write_atomic(folder / "versions.png", lambda p: plots.versions(frame).savefig(p, format="png", dpi=110))
    print(summary.markdown(summary.by_version(frame)))


@app.command(context_settings=PASS)
def parallel(ctx: typer.Context) -> None:
    """Train a prepared run as one process of several.

    torchrun … -m lvmlib parallel FOLDER
    """
    raise typer.Exit(worker.main(ctx.args))


File = Annotated[Path | None, typer.Option(metavar="FILE")]


@app.command("import")
def import_original(
    out: Annotated[str, typer.Argument(metavar="OUT", help="the store's folder, which must not exist")],
    articles: File = None,
    train: File = None,
    val: File = None,
    ood: File = None,
    name: Annotated[str | None, typer.Option(help="of the store; by default the file's own")] = None,
    split_ood: Annotated[
        str, typer.Option(metavar="RULE", help="topic, random or source:NAME (article file alone)")
    ] = "topic",
    drop_bad: Annotated[
        bool, typer.Option("--drop-bad", help="leave out zero, NaN and infinite vectors, and gaps")
    ] = False,
) -> None:
    """Make a store of the original's .npz files.

    These are an article file, or sequence files, or both.
    """
    given = {"articles": articles, "train": train, "val": val, "ood": ood}
    paths = {key: os.path.abspath(path) for key, path in given.items() if path}
    store = original.convert(paths, out, name=name, ood=split_ood, drop_bad=drop_bad)
    print(original.summary(store))
    for key, value in store.datasheet["split"].items():
        print(f"{key}: {value['articles']} articles, {value['chunks']} chunks")


def build_store(source: str, out: str, *, fresh: bool = False, progress: bool = True, **options) -> None:
    """Build a store of texts or ready vectors."""
    store = text_build.build(source, out, fresh=fresh, progress=progress, **options)
    counts = ", ".join(f"{len(store.rows(split)):,} {split}" for split in SPLITS)
    print(f"{out}: {len(store.vectors):,} vectors (D = {store.dim}; {counts}), {store.fingerprint[:16]}")


# typer reads a command's options in its signature: here the fields of Options in place of `**options`.
_named = list(inspect.signature(build_store, eval_str=True).parameters.values())[:-1]
_fields = inspect.signature(text_build.Options, eval_str=True).parameters.values()
build_store.__signature__ = inspect.Signature([*_named, *_fields])
app.command("build-store")(build_store)


@app.command()
def wikipedia(folder: Path) -> None:
    """Build the embedded dataset in a new folder."""
    wikipedia_module.build(folder)


@app.command(hidden=True)
def job(notebook: str, output: Path, values: str, gpus: int) -> None:
    """Execute one notebook of a sweep into OUTPUT; VALUES are its parameters as JSON."""
    sweep.job(notebook, output, json.loads(values), gpus)


def main(arguments: list[str]) -> int:
    """Run a command and return its exit code. Raises LVMError."""
    try:
        app(arguments, prog_name="python -m lvmlib")
    except SystemExit as e:
        if e.code in STOPPED:
            print(f"\n{STOPPED[e.code]}: {RESUMABLE}.", file=sys.stderr)
        return e.code
    return 0


def run() -> None:
    """Run the command of the command line, and exit."""
    # Without this papermill and its kernel would train on, with nobody to stop them.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        sys.exit(main(sys.argv[1:]))
    except LVMError as e:
        sys.exit(str(e))


def _publish(executed: Path, p: dict, notebook: Path) -> os.stat_result | None:
    """Move a notebook that was executed with parameters `p` to its place, with an HTML copy, and print where they are.

    A notebook of other parameters that lies there is set aside. Returns the `stat` of one that is replaced.
    """
    earlier = notebook.stat() if notebook.exists() else None
    if earlier and not _is_same(notebook, p):
        print(f"\nset aside  {short(set_aside(notebook, '.html'))}: it was run with other parameters")
        earlier = None
    move(executed, notebook)
    page.write(notebook, notebook.with_suffix(".html"))
    print(f"\nnotebook  {short(notebook)}\nHTML      {short(notebook.with_suffix('.html'))}")
    return earlier


def _is_same(notebook: Path, p: dict) -> bool:
    """Return whether a notebook has the parameters `p`; if both are of train.ipynb, those of its run."""
    try:
        earlier = parameters(json.loads(notebook.read_text(encoding="utf-8")))
        if "version" in earlier:  # None is what the version says, which may be given as well
            return not differences(*({"parameters": _version(each).to_dict()} for each in (earlier, p)))
        return earlier == p
    except Exception:  # whatever a damaged file makes its reader raise
        return False


def _version(p: dict) -> Version:
    """Return the version that train.ipynb trains by these parameters."""
    return version(p["version"], p["overrides"], **{key: p.get(key) for key in RUN_KEYS})
