"""The notebooks in JupyterLab and a real browser: Run All, an interrupt, a restart.

Every wait is for a state of the kernel or of a cell, up to LIMIT.
"""

import json
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import nbformat
import psutil
import pytest
from jupyter_client.kernelspec import KernelSpecManager

from lvmlib.io.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LIMIT = 900_000  # ms
OFF = (  # requests of JupyterLab to other hosts
    "--LabApp.news_url=None",
    "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    "--LabApp.extension_manager=readonly",
)
NOT_OURS = (  # messages of the console that JupyterLab causes
    r"warning: Plugin \S+ .*(took [\d.]+ms|is taking too long) to activate\.?",  # on a busy machine
    r"warning: Connection lost, reconnecting in \d+ seconds\.",  # after a restart of the kernel
)
# Pauses training once, in the second epoch of fast mode, until it is interrupted.
PAUSE = """
import threading
from lvmlib import controller
calls_of_decide, real_decide = [], controller.decide
def pausing_decide(*arguments):
    calls_of_decide.append(1)
    if len(calls_of_decide) == 24:
        print("paused", flush=True)
        threading.Event().wait()
    return real_decide(*arguments)
controller.decide = pausing_decide
"""
# The same run without an interrupt, to compare with.
WHOLE = """
whole = lvm.train(own, dataset, out=f"{run.folder}-whole")
list(whole)
one, two = (r.history.drop(columns="seconds") for r in (run, whole))
print("epochs", run.history["epoch"].tolist(), "as if uninterrupted:", one.equals(two))
"""
# Collects dialogs and notifications, also those that have closed.
WATCH_DIALOGS = """
window.dialogs = [];
new MutationObserver(changes => changes.forEach(change => change.addedNodes.forEach(node => {
    if (node.matches?.('.jp-Dialog, .Toastify__toast')) window.dialogs.push(node.innerText);
}))).observe(document, {childList: true, subtree: true});
"""
CELLS = """() => jupyterapp.shell.currentWidget.content.widgets.map(cell => cell.model).filter(
    model => model.type === 'code').map(model => ({
        source: model.sharedModel.getSource(), count: model.executionCount, outputs: model.outputs.toJSON()}))"""
RUNNING = """() => jupyterapp.shell.currentWidget.content.widgets.some(
    cell => cell.model.type === 'code' && cell.model.executionState === 'running')"""
# Collects each figure and each line of the progress bar that a cell shows while it runs.
WATCH_CELL = """index => {
    const model = jupyterapp.shell.currentWidget.content.widgets[index].model;
    window.figures = new Set(); window.bars = new Set();
    const look = () => {
        if (model.executionState === 'running') for (const output of model.outputs.toJSON()) {
            if (output.data?.['image/png']) window.figures.add(output.data['image/png']);
            if (output.name === 'stderr') window.bars.add([output.text].flat().join(''));
        }
    };
    model.outputs.changed.connect(look);
    model.outputs.stateChanged?.connect(look);
}"""


class Lab(NamedTuple):
    url: str
    token: str
    folder: Path  # with copies of the notebooks
    outputs: Path


@pytest.fixture(scope="module")
def lab(chromium):
    """A JupyterLab on a free port, without the user's settings; ends with all its kernels."""
    place = Path(tempfile.mkdtemp(prefix="lvm-", dir="/tmp" if len(tempfile.gettempdir()) > 40 else None))
    shutil.copytree(ROOT / "notebooks", place / "notebooks", ignore=shutil.ignore_patterns(".*"))
    settings = place / "config" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet), encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "JPY_", "MPLBACKEND"))}
    environment |= {f"JUPYTER_{k.upper()}_DIR": str(place / k) for k in ("config", "data", "runtime")}
    environment |= {"IPYTHONDIR": str(place / "ipython"), "LVM_OUTPUTS": str(place / "outputs"), "LVM_FAST": "1"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    token = secrets.token_hex(16)
    # Sockets in that folder, no TCP ports: another test's kernel might take a port first.
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", *OFF]
    command += ["--KernelManager.transport=ipc", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0"]
    command += [f"--ServerApp.root_dir={place / 'notebooks'}", f"--IdentityProvider.token={token}"]
    command += ["--LabApp.expose_app_in_browser=True"]
    log = place / "server.log"
    with open(log, "w", encoding="utf-8") as lines:
        server = psutil.Popen(command, env=environment, cwd=place, stdout=lines, stderr=lines, start_new_session=True)
    try:
        until = time.monotonic() + LIMIT / 1000
        while not (found := list((place / "runtime").glob("jpserver-*.json"))):
            assert server.poll() is None and time.monotonic() < until, log.read_text(encoding="utf-8")
            time.sleep(0.1)
        port = json.loads(found[0].read_text(encoding="utf-8"))["port"]
        yield Lab(f"http://127.0.0.1:{port}", token, place / "notebooks", place / "outputs")
    finally:
        started = [*server.children(recursive=True), server]  # kernels are sessions of their own
        server.terminate()
        _, left = psutil.wait_procs(started, timeout=20)
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=20)
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def page(lab, chromium):
    yield from open_page(lab, chromium)


def open_page(lab, chromium):
    """A page that, at its end, must have had no message, failed request or dialog."""
    context = chromium.new_context(viewport={"width": 1440, "height": 900})
    page, problems = context.new_page(), []
    page.set_default_timeout(LIMIT)
    page.add_init_script(WATCH_DIALOGS)
    page.on("console", lambda m: problems.append(f"{m.type}: {m.text}") if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: problems.append(f"exception: {e}"))
    page.on("response", lambda r: problems.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    page.on(
        "request", lambda r: None if r.url.startswith((lab.url, "data:", "blob:")) else problems.append(f"to: {r.url}")
    )
    yield page
    problems += [f"dialog: {text}" for text in page.evaluate("() => window.dialogs")]
    context.close()
    assert [line for line in problems if not any(re.fullmatch(pattern, line) for pattern in NOT_OURS)] == []


def open_notebook(page, lab, name):
    """Open it by its address, in a workspace of its own, and wait for its cells and its kernel."""
    page.goto(f"{lab.url}/lab/workspaces/{name.partition('.')[0]}/tree/{name}?token={lab.token}")
    wait_open(page, lab, name)
    wait_kernels(page)


def wait_open(page, lab, name):
    cells = len(nbformat.read(lab.folder / name, as_version=4).cells)
    page.wait_for_function(
        """([name, cells]) => {
            const panel = window.jupyterapp?.shell?.currentWidget;
            return panel?.context?.path === name && panel.content.widgets.length === cells;
        }""",
        arg=[name, cells],
        polling=100,
    )


def wait_kernels(page):
    """Until the kernels of all notebooks that are open in the page have started."""
    page.wait_for_function(
        """() => [...jupyterapp.shell.widgets('main')].filter(panel => panel.sessionContext).every(
            panel => panel.sessionContext.session?.kernel?.status === 'idle')""",
        polling=100,
    )


def menu(page, name, item):
    page.get_by_role("menuitem", name=name, exact=True).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{re.escape(item)}$")).click()


def run_all(page):
    menu(page, "Run", "Run All Cells")
    page.wait_for_function(RUNNING, polling=50)


def index_of(page, text):
    """The index of the cell with this text in its source, among all cells."""
    return page.evaluate(
        "text => jupyterapp.shell.currentWidget.content.widgets.findIndex("
        "cell => cell.model.sharedModel.getSource().includes(text))",
        text,
    )


def choose(page, text):
    """Make the cell with this text in its source the active one, and scroll to it."""
    page.evaluate(
        """async index => {
            const notebook = jupyterapp.shell.currentWidget.content;
            notebook.mode = 'command';
            notebook.deselectAll();
            notebook.activeCellIndex = index;
            await notebook.scrollToItem(index);
            notebook.activate();
        }""",
        index_of(page, text),
    )


def wait_cells(page):
    """Wait until no cell runs or waits to run. Returns the code cells."""
    page.wait_for_function(f"() => !({RUNNING})()", polling=100)
    return page.evaluate(CELLS)


def text_of(cell):
    """The text that a cell shows."""
    shown = [o.get("text") or o.get("data", {}).get("text/markdown") or o.get("evalue", "") for o in cell["outputs"]]
    return "\n".join("".join(s) for s in shown)


def assert_ran(cells):
    """Every cell has run, without an error, and every widget was drawn."""
    assert [c["source"] for c in cells if c["source"].strip() and c["count"] is None] == []
    assert [o["evalue"] for c in cells for o in c["outputs"] if o["output_type"] == "error"] == []
    assert not re.search("could not be displayed|Error displaying|Error rendering", json.dumps(cells))
    assert [text_of(c) for c in cells if "verdict = lvm.verdict(" in c["source"] and "**" not in text_of(c)] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_valid_and_its_kernel_is_there(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    nbformat.validate(notebook)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    identities = [cell["id"] for cell in notebook["cells"]]
    assert len(set(identities)) == len(identities)
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}  # no widgets' states, no tool's leavings
    assert notebook["metadata"]["language_info"]["name"] == notebook["metadata"]["kernelspec"]["language"] == "python"
    assert notebook["metadata"]["kernelspec"]["name"] in KernelSpecManager().find_kernel_specs()
    assert {key for cell in notebook["cells"] for key in cell["metadata"]} <= {"tags"}


@pytest.fixture(scope="module")
def explorer(lab, chromium):
    """explore.ipynb after Run All: it runs while the other tests do, and the last test waits for it."""
    pages = open_page(lab, chromium)
    page = next(pages)
    open_notebook(page, lab, "explore.ipynb")
    run_all(page)
    yield page
    next(pages, None)


def test_every_notebook_opens_without_messages(lab, explorer, page):
    open_notebook(page, lab, NOTEBOOKS[0].name)
    for path in NOTEBOOKS:
        page.locator(".jp-DirListing-itemText", has_text=re.compile(f"^{re.escape(path.name)}$")).dblclick()
        wait_open(page, lab, path.name)
        heading = nbformat.read(path, as_version=4).cells[0].source.splitlines()[0].removeprefix("# ")
        page.locator(".jp-NotebookPanel:visible h1", has_text=heading).wait_for()
    wait_kernels(page)


def test_interrupted_training_resumes_and_the_notebook_restarts(lab, explorer, page):
    notebook = nbformat.read(lab.folder / "train.ipynb", as_version=4)
    at = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    assert "model = None" in notebook.cells[at].source
    notebook.cells[at].source = notebook.cells[at].source.replace("model = None", 'model = "amn"')
    notebook.cells.insert(at + 2, nbformat.v4.new_code_cell(PAUSE))
    notebook.cells.append(nbformat.v4.new_code_cell(WHOLE))
    nbformat.write(notebook, lab.folder / "interrupted.ipynb")

    open_notebook(page, lab, "interrupted.ipynb")
    page.evaluate(WATCH_CELL, index_of(page, "for row in tqdm(run"))
    run_all(page)
    choose(page, "for row in tqdm(run")
    seen = page.locator(".jp-Notebook-cell.jp-mod-active .jp-OutputArea")
    seen.get_by_text("paused").wait_for()
    seen.get_by_text("1/2").wait_for()  # the bar, and the figure of the first epoch, in the page while the cell runs
    seen.locator("img").wait_for()
    assert page.evaluate(RUNNING)
    menu(page, "Kernel", "Interrupt Kernel")
    cells = wait_cells(page)
    (loop,) = [c for c in cells if "for row in tqdm(run" in c["source"]]
    (error,) = [o for c in cells for o in c["outputs"] if o["output_type"] == "error"]
    assert error in loop["outputs"] and "".join(error["traceback"]).count("\n") < 20
    assert error["evalue"].startswith("interrupted after 1 of 2 epochs")
    assert all(c["count"] is None for c in cells[cells.index(loop) + 1 :])  # Run All has ended there

    choose(page, "for row in tqdm(run")
    menu(page, "Run", "Run Selected Cell and All Below")
    page.wait_for_function(RUNNING, polling=50)
    cells = wait_cells(page)
    assert_ran(cells)
    assert text_of(cells[-1]).strip() == "epochs [1, 2] as if uninterrupted: True"
    figures, bars = page.evaluate("() => [window.figures.size, window.bars.size]")
    assert figures >= 2 and bars >= 2  # while the cell ran
    (report,) = lab.outputs.glob("fast/wikipedia/v22/seed0-amn/fivecat.json")
    (verdict,) = [c for c in cells if "verdict = lvm.verdict(" in c["source"]]
    assert json.loads(report.read_text(encoding="utf-8"))["verdict"]["text"] in text_of(verdict)

    choose(page, "plots.recall_curve(")  # a figure's cell alone
    page.keyboard.press("Control+Enter")
    page.wait_for_function(f"({CELLS})().some(cell => cell.count > {cells[-1]['count']})", polling=50)
    assert_ran(wait_cells(page))
    menu(page, "Kernel", "Restart Kernel and Run All Cells…")
    page.locator(".jp-Dialog .jp-mod-accept").click()
    page.wait_for_function(RUNNING, polling=50)
    cells = wait_cells(page)
    assert_ran(cells)
    assert "reused" in "".join(map(text_of, cells))
    (asked,) = page.evaluate("() => window.dialogs.splice(0)")
    assert asked.startswith("Do you want to restart the kernel")


def until(page, reached):
    for _ in range(LIMIT // 50):
        if reached():
            return
        page.wait_for_timeout(50)
    raise AssertionError("not reached")


def checksum(picture):
    """The number of bytes of an image widget, and a checksum."""
    return picture.evaluate(
        "async image => (await fetch(image.src)).arrayBuffer().then("
        "bytes => [bytes.byteLength, new Uint8Array(bytes).reduce((a, b) => (31 * a + b) % 4294967291, 7)])"
    )


def test_sliders_change_figures_and_back(explorer):
    page = explorer
    assert_ran(wait_cells(page))
    output = page.locator(".jp-Notebook-cell.jp-mod-active .jp-OutputArea")
    for source in ("def show_trick", "def show_rule", "def show_window"):
        choose(page, source)
        shown = output.locator("table" if source == "def show_window" else "img.widget-image")
        shown.wait_for()
        look = shown.inner_text if source == "def show_window" else lambda picture=shown: checksum(picture)
        first = look()
        slider = output.locator(".noUi-handle").first
        for _ in range(3):
            slider.press("ArrowRight")
        until(page, lambda: look() != first)  # noqa: B023
        for _ in range(3):
            slider.press("ArrowLeft")
        until(page, lambda: look() == first)  # noqa: B023
