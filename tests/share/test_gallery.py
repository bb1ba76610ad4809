"""The gallery and its pages: nothing lost, nothing let in, nothing fetched; of which code a rendered notebook is."""

import errno
import html.parser
import json
import os
import re
import shutil
import time
import warnings
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
import yaml
from nbformat import v4

import lvmlib as lvm
from lvmlib.errors import LVMError
from lvmlib.io import disk as files
from lvmlib.io import stamp as fingerprint
from lvmlib.io.paths import ROOT
from lvmlib.report import plots
from lvmlib.runs import alarms
from lvmlib.runs import folder as runs
from lvmlib.share import gallery, page

HOSTILE = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="900" height="300"><script>alert(1)</script><circle r="40"/></svg>'
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


class Tags(html.parser.HTMLParser):
    """All start tags of a page with their attributes, and its text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


def executed(*cells, name="train", **parameters):
    """A notebook as papermill leaves it."""
    papermill = {"input_path": f"notebooks/{name}.ipynb", "start_time": "2026-01-02T03:04:05", "parameters": parameters}
    return v4.new_notebook(cells=list(cells), metadata={"papermill": papermill})


def shown(source, *outputs):
    return v4.new_code_cell(source, outputs=list(outputs), execution_count=1)


def display(**data):
    kinds = {"html": "text/html", "markdown": "text/markdown", "svg": "image/svg+xml", "png": "image/png"}
    return v4.new_output("display_data", {kinds[kind]: x for kind, x in data.items()})


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """A judged run of one model, and copies of it that something is the matter with."""
    root = tmp_path_factory.mktemp("outputs")
    own = lvm.version("v22", fast=True, model="amn", precision="float32")
    data = lvm.dataset(own.data, own.horizon, own.context_length, own.fast)
    good = root / "wikipedia" / "v22" / "seed0-amn"
    run = lvm.train(own, data, out=good)
    list(run)
    report = lvm.fivecat(run.best, data, lvm.baselines(data.train))
    verdict, reading = lvm.verdict(own, run.history, report), lvm.reading(report)
    report.to_json(
        good / "fivecat.json", verdict=verdict.to_dict(), reading={"label": reading.label, "text": reading.text}
    )
    shutil.rmtree(good / "last")
    (good / "best.safetensors").unlink()

    def another(name, change=lambda record: None, where="wikipedia/v22", **files):
        folder = root / where / name
        shutil.copytree(good, folder)
        record = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
        change(record)
        (folder / "run.yaml").write_text(yaml.safe_dump(record), encoding="utf-8")
        for file, text in files.items():
            (folder / file.replace("_", ".")).write_text(text, encoding="utf-8")
        return folder

    epochs = (good / "epochs.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    another("interrupted", lambda r: r.pop("finished"), epochs_csv="".join(epochs[:2]))
    another("broken-record", run_yaml="parameters: [")
    another("broken-table", epochs_csv="a,b\n1,2\n")
    another("broken-report", fivecat_json='{"calibrated": []}')
    another("unjudged")
    (root / "wikipedia/v22/unjudged/fivecat.json").unlink()
    another("earlier", lambda r: [r["parameters"].pop(k) for k in ("direction", "select", "rewind")])
    another("seed0-amn.old-1")
    another("seed0-amn", where="fast/wikipedia/v22")
    alarm = {"epoch": 1, "step": 7, "kind": "collapse", "what": f"rank 1.0 {HOSTILE}", "do": "lower the rate"}
    another("alarmed", lambda r: r.update(alarms=[alarm], stopped="the escape guard was due a third time"))
    strange = another("a b&c", lambda r: r["parameters"].update(about=HOSTILE, name=HOSTILE), where='da"ta <i>/v#1')

    figure = plots.table(report.original.rows("val").head(30)[["gate", "measure", "value", "low", "high", "chance"]])
    cells = [
        v4.new_markdown_cell(f"# A title & {HOSTILE}\n*About.*\n\n$\\lambda_1 < 2$, [a page](https://example.org/), "
                             "[x](javascript:alert(1))"),
        shown("value = '<b>' * 200  # " + "long " * 80, display(html=figure.to_html())),
        shown("plot()", display(svg=SVG), display(png=PNG)),
        shown("print('x' * 900)", v4.new_output("stream", name="stdout", text="x" * 900 + "\n"),
              v4.new_output("stream", name="stderr", text=HOSTILE)),
        shown("widget", v4.new_output("display_data", {page.WIDGET: {"model_id": "1"}, "text/plain": "FloatSlider"})),
        shown("titles", display(html=f"<table><tr><td>{HOSTILE}</td></tr></table>"
                                     "<style>@import url(//x.org/a)</style>"),
              display(markdown=HOSTILE + " ![p](https://example.org/p.png)"),
              display(html="<form action=//x.org><input></form><iframe src=//x.org></iframe><base href=//x.org>"
                           "<meta http-equiv=refresh content='0;url=//x.org'>"
                           "<div style='position:fixed;color:red'>d</div>")),
        shown("1 / 0", v4.new_output("error", ename="ZeroDivisionError", evalue=HOSTILE, traceback=["\x1b[31mZero"])),
    ]  # fmt: skip
    for folder in (good, strange):
        nbformat.write(executed(*cells, version="v22", fast=True), folder / "train.ipynb")
    nbformat.write(executed(*cells[:1], name="diagnostics"), good / "diagnostics.ipynb")
    nbformat.write(executed(*cells, name="compare", model=HOSTILE), root / "wikipedia" / "compare-amn.ipynb")
    (root / "damaged.ipynb").write_text("{", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def site(outputs):
    index, counts = gallery.build(root=outputs)
    assert index == outputs / "gallery" / "index.html" and counts == {"runs": 9, "notebooks": 2, "pages": 4}
    return index.parent


def cards(site):
    text = (site / "index.html").read_text(encoding="utf-8").partition("<main>")[2]
    return {re.sub(r"<[^>]*>", "", re.search(r'<p class="soft">(.*?)</p>', c).group(1)).split(",")[0]: c
            for c in text.split('<li class="card"')[1:]}  # fmt: skip


def test_a_card_a_run_says_what_its_files_say(outputs, site):
    found = cards(site)
    assert set(found) == {
        "seed0-amn", "interrupted",
        "wikipedia / v22 / broken-record", "wikipedia / v22 / broken-table",
        "broken-report", "unjudged", "earlier", "alarmed", "a b&amp;c",
        "wikipedia / compare-amn", f"{outputs.name} / damaged",
    }  # fmt: skip
    report = json.loads((outputs / "wikipedia/v22/seed0-amn/fivecat.json").read_text(encoding="utf-8"))
    card = found["seed0-amn"]
    assert report["reading"]["label"] in card and "<b>not judged</b>" not in card
    for profile in ("calibrated", "original"):
        for split, name in (("val", "val"), ("ood", "OOD")):
            row = re.search(rf"<th>{profile}, {name}</th>(.*?)</tr>", card).group(1)
            words = {True: "passed", False: "failed"}
            for gate, outcome in report[profile]["gates"][split].items():
                assert f'title="gate {gate}: {words.get(outcome, outcome)}"' in row
    history = lvm.open_run(outputs / "wikipedia/v22/seed0-amn")[1]
    assert f"<b>{history['margin'].iloc[-1]:+.3f}</b>" in card and f"<b>{history['novel_mrr'].iloc[-1]:.3f}</b>" in card
    (copy,) = (r["value"] for r in report["calibrated"]["table"]
               if (r["split"], r["predictor"], r["measure"]) == ("val", "copy last", "novel MRR"))  # fmt: skip
    assert f"copy last <span>{copy:.3f}</span>" in card
    assert "2026-01-02" in card and "Training</a>" in card and "Diagnostics</a>" in card
    assert "unfinished" in found["interrupted"] and "1 of 2 epochs" in found["interrupted"]
    for name in ("record", "table"):
        card = found[f"wikipedia / v22 / broken-{name}"]
        assert ">damaged<" in card and str(outputs) not in card and "not the folder of a run that can be read" in card
    assert "fivecat.json cannot be read" in found["broken-report"] and "not judged" in found["unjudged"]
    assert "checklist was not applied" not in found["earlier"] and "of the monitoring list broken" in found["earlier"]
    card = found["alarmed"]
    assert "collapse (epoch 1, step 7)" in card and "lower the rate" in card and "escape guard was due" in card
    assert ">damaged<" in found[f"{outputs.name} / damaged"]
    assert "ended with an error" in found["wikipedia / compare-amn"]


def test_fast_runs_are_marked_where_they_are_wanted(outputs, tmp_path):
    index, counts = gallery.build(tmp_path / "site", outputs, fast=True)
    assert counts["runs"] == 10 and index.read_text(encoding="utf-8").count(">fast run<") == 1


def test_nothing_is_fetched_and_every_link_leads_somewhere(outputs, site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) == 5
    for path in pages:
        seen = Tags(path)
        policy = next(m["content"] for m in seen.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
        assert "default-src 'none'" in policy and "unsafe-eval" not in policy and "script-src 'sha256-" in policy
        for tag, attrs in seen.tags:
            assert not {"srcset", "poster", "action", "formaction", "background", "srcdoc"} & set(attrs)
            for name in ("src", "href"):
                link = attrs.get(name) or ""
                if name in attrs and not link.startswith(("data:", "#")):
                    if tag == "a" and link == "https://example.org/":
                        continue  # what a reader may follow, in a notebook's prose
                    assert re.fullmatch(r"[\w./%-]+", link) and not link.startswith("/"), (path, tag, link)
                    assert (path.parent / unquote(link)).is_file()
        assert str(outputs) not in path.read_text(encoding="utf-8")
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", p.name) for p in site.rglob("*"))
    assert len(Tags(site / "index.html").all("a")) == 4


def test_hostile_text_is_shown_and_nothing_of_it_lives(site):
    for path in site.rglob("*.html"):
        seen = Tags(path)
        assert len(seen.all("script")) == 1 and not seen.all("script")[0]
        assert not {"iframe", "object", "embed", "form", "input", "base"} & {tag for tag, _ in seen.tags}
        assert not [a for _, attrs in seen.tags for a in attrs if a.startswith("on")]
        assert len(seen.all("meta")) == 5 and "refresh" not in str(seen.all("meta"))
        text = path.read_text(encoding="utf-8")
        assert "position:fixed" not in text and "<style>@import" not in text and "javascript:alert" not in text
        assert "<svg xmlns" not in text  # SVG is a picture: what is in it does not run
    assert HOSTILE in Tags(site / "index.html").text
    shown = Tags(site / "pages" / "wikipedia-v22-seed0-amn-train.html").text
    assert "<script>document.title='taken'</script>" in shown and "\\lambda_1 < 2" in shown
    assert "A widget" in shown and "FloatSlider" not in shown


@pytest.mark.parametrize(
    "rules, kept",
    [
        (
            "#T_a th, #T_a_row0_col1.col0 {\n  text-align: left;\n color: #0a0; width: 10% }\n#T_a td { color: red }",
            True,
        ),
        (" ", True),
        ("#T_a, .warnings, main{font-size:0}", False),
        ("main #T_a{font-size:0}", False),
        ("#T_a{}main{font-size:0}", False),
        ("#T_a{color:red;position:fixed}", False),
        ("#T_a{color:red}}", False),
        ("#T_a{color:red", False),
        ("#T_a{{color:red}", False),
        ("#T_a{color}", False),
        ("#T_a{background-color:url(//x.org)}", False),
        ("@import url(//x.org/a);", False),
        ("#T_a{" + "color:red;" * page.LONGEST + "}", False),
    ],
)
def test_the_style_of_a_table_reaches_no_further_than_tables(rules, kept):
    assert page.clean(f"<style>{rules}</style>") == (f"<style>{rules}</style>" if kept else "")


def test_no_style_takes_long_to_refuse():
    began = time.process_time()  # 16 repetitions took a matching expression 11 s, and each more half as long again
    assert page.clean("<style>#T_a{" + "color:x  " * 2000 + "!</style>") == ""
    assert time.process_time() - began < 5


ODD = {"version": {"version": 22}, "margin": {"epoch": [1], "margin": "abc"}, "checks": {"checks": 3},
       "copy_last": {"epoch": [1, 2], "margin": [0.1, 0.2], "copy_last": {"margin": "x"}}, "gates": {"gates": [1]},
       "warnings": {"warnings": [{"what": 1}]}, "warning": {"warnings": "x"}, "run": [1],
       "links": {"links": 3}}  # fmt: skip


def test_what_one_notebook_tells_costs_no_other_its_card(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "SHOWCASE", tmp_path)
    for name, run in ODD.items():
        notebook = executed(v4.new_markdown_cell("# A title"))
        whole = {"state": "finished", "version": "v22", "data": "wikipedia"}
        notebook.metadata["lvmlib"] = {"run": whole | run if isinstance(run, dict) else run}
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    index, counts = gallery.build(tmp_path / "site", tmp_path / "none", showcase=True)
    assert counts["runs"] + counts["notebooks"] == counts["pages"] == len(ODD)
    text = index.read_text(encoding="utf-8")
    assert text.count(">damaged<") == text.count("what it tells of its run cannot be shown") == 7


def test_no_file_is_read_without_a_limit(outputs, tmp_path, monkeypatch):
    folder = tmp_path / "wikipedia" / "v22" / "seed0-amn"
    shutil.copytree(outputs / "wikipedia" / "v22" / "seed0-amn", folder)
    for name in ("fivecat.json", "train.ipynb"):
        with open(folder / name, "ab") as file:
            file.truncate(1 << 40)
    card = gallery.run_card(folder)
    assert "fivecat.json is larger than" in str(card["warnings"]) and card["state"] == "finished"
    with pytest.raises(LVMError, match=r"train\.ipynb: not a notebook"):
        page.read(folder / "train.ipynb")
    (folder / "steps.csv").unlink()
    os.mkfifo(folder / "steps.csv")
    with pytest.raises(LVMError, match=r"steps\.csv is no plain file"):
        runs.open_run(folder)
    with open(folder / "epochs.csv", "ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(LVMError, match=r"epochs\.csv is larger than 1024 MiB"):
        runs.open_run(folder)


def test_a_folder_that_is_no_gallery_is_never_touched(outputs, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(LVMError, match="is there and is no gallery"):
        gallery.build(tmp_path / "mine", outputs)
    assert [p.name for p in tmp_path.rglob("*")] == ["mine", "thesis.txt"]
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(LVMError, match="is no gallery"):
        gallery.build(tmp_path / "link", outputs)


def test_the_old_gallery_stands_until_the_new_one_is_whole(outputs, tmp_path, monkeypatch):
    out = tmp_path / "site"
    gallery.build(out, outputs)
    before = {p: p.stat().st_ino for p in out.rglob("*")}
    render = gallery.render
    monkeypatch.setattr(gallery, "render", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gallery.build(out, outputs)
    assert {p: p.stat().st_ino for p in out.rglob("*")} == before
    monkeypatch.setattr(gallery, "render", render)
    (tmp_path / ".site.new" / "pages").mkdir(parents=True)  # as a killed build leaves it
    (tmp_path / ".site.new" / "gallery.json").write_text("{")
    (tmp_path / ".site.new" / "pages" / "half.html").write_text("")
    other = f"process {os.getpid()} on .* since .* is building it"
    with files.hold(tmp_path / ".site.gallery.lock", str), pytest.raises(LVMError, match=other):
        gallery.build(out, outputs)
    done = []
    monkeypatch.setattr(gallery, "sync", lambda folder, files=True: done.append(folder.name))
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, to: (done.append(path.suffix), replace(path, to))[1])
    gallery.build(out, outputs)
    # On the disk before the names change; the index after its pages.
    assert done == ["pages", ".site.new", *[".html"] * 4, "pages", ".html", "site"]
    assert (out / "index.html").stat().st_ino != before[out / "index.html"] and not list(out.rglob("half.html"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["site"]


@pytest.fixture
def few(tmp_path, monkeypatch):
    """Two committed notebooks, of which a gallery is built in no time: `few()` builds it in site/."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for name in ("a", "b"):
        nbformat.write(executed(v4.new_markdown_cell("# A title")), shelf / f"{name}.ipynb")
    monkeypatch.setattr(gallery, "SHOWCASE", shelf)
    return lambda out=tmp_path / "site": gallery.build(out, tmp_path / "none", showcase=True)


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def links(out):
    return {attrs["href"] for attrs in Tags(out / "index.html").all("a")}


def test_what_is_not_the_gallerys_stays_where_it_is(few, tmp_path):
    out = tmp_path / "site"
    few()
    own = set(tree(out))
    mine = {"site/.git/config": "[core]", "site/CNAME": "example.org", "site/pages/about.html": "of me",
            ".site.old/a": "a", ".site.lock": "another's"}  # fmt: skip
    for name, text in mine.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "shelf" / "b.ipynb").unlink()
    few()
    assert all((tmp_path / name).read_text() == text for name, text in mine.items())
    assert len(links(out)) == 1 and set(tree(out)) == own - {"pages/shelf-b.html"} | {
        ".git/config", "CNAME", "pages/about.html"}  # fmt: skip
    (out / "pages" / "shelf-b.html").write_text("of me, too")
    nbformat.write(executed(v4.new_markdown_cell("# Another")), tmp_path / "shelf" / "b.ipynb")
    before = tree(out)
    with pytest.raises(LVMError, match=r"shelf-b\.html: is there and is of no gallery"):
        few()
    assert tree(out) == before


def test_what_is_built_aside_replaces_nothing_of_others(few, tmp_path):
    (tmp_path / ".site.new").mkdir()
    (tmp_path / ".site.new" / "thesis.txt").write_text("years of work")
    with pytest.raises(LVMError, match=r"\.site\.new: is there and is no gallery"):
        few()
    assert (tmp_path / ".site.new" / "thesis.txt").read_text() == "years of work"


def test_only_what_a_gallery_wrote_is_taken_for_its_own(few, tmp_path):
    out = tmp_path / "site"
    few()
    stale = out / "pages" / "gone.html"
    record = json.loads((out / "gallery.json").read_text(encoding="utf-8"))
    stale.write_text("")
    (tmp_path / "thesis.html").write_text("years of work")
    (out / "gallery.json").write_text(json.dumps(record | {"files": ["gone.html", "../../thesis.html"]}))
    for name in ("shelf-a.html", "shelf-b.html"):
        (out / "pages" / name).unlink()
    few()
    assert not stale.exists() and (tmp_path / "thesis.html").exists()
    stale.write_text("")
    (out / "gallery.json").write_text('{"format": 1, "pages": 3}')  # of before it listed them
    few()
    assert not stale.exists() and len(links(out)) == 2
    (out / "gallery.json").write_text("<<<<<<< HEAD")
    with pytest.raises(LVMError, match=r"gallery\.json: cannot be read .*restore it, or move"):
        few()
    shutil.rmtree(out / "pages")
    (out / "pages").symlink_to(tmp_path)
    with pytest.raises(LVMError, match="is no folder of a gallery"):
        few()


@pytest.mark.parametrize("full", ["shelf-a.html", "index.html", "gallery.json"])
def test_a_full_disk_leaves_the_good_gallery(few, tmp_path, monkeypatch, full):
    few()
    before = tree(tmp_path)

    def refused(write):
        def wrapped(path, content, **more):
            if path.name.startswith(full):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(path, content, **more)

        return wrapped

    for name in ("write_text", "write_bytes"):
        monkeypatch.setattr(Path, name, refused(getattr(Path, name)))
    with pytest.raises(LVMError, match="site: cannot be written: the disk is full"):
        few()
    assert tree(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_said_so(few, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LVMError, match="site: cannot be written: a file stands where a folder should"):
        few(tmp_path / "file" / "site")


def test_wherever_it_ends_each_link_leads_somewhere(few, tmp_path, monkeypatch):
    out = tmp_path / "site"
    few()
    replace, (a, b) = Path.replace, (tmp_path / "shelf" / f"{name}.ipynb" for name in "ab")
    for ends in ("shelf-b2.html", "index.html"):
        a.rename(a := a.with_name("a2.ipynb" if a.name == "a.ipynb" else "a.ipynb"))
        b.rename(b := b.with_name("b2.ipynb"))

        def ending(path, to, ends=ends):
            if path.name == ends:
                raise OSError(errno.EIO, "", str(path), 0, str(to))
            return replace(path, to)

        monkeypatch.setattr(Path, "replace", ending)
        with pytest.raises(LVMError, match="site: cannot be written: the disk fails"):
            few()
        assert len(links(out)) == 2 and all((out / link).is_file() for link in links(out))
    monkeypatch.setattr(Path, "replace", replace)
    few()
    assert set(tree(out)) == {"index.html", "gallery.json"} | links(out) and len(links(out)) == 2


def test_a_text_that_is_no_unicode_costs_no_other_its_page(few, tmp_path):
    odd = executed(v4.new_markdown_cell("# A \ud800 title"), name="compare")
    (tmp_path / "shelf" / "odd.ipynb").write_text(json.dumps(odd), encoding="utf-8")
    index, counts = few()
    text = index.read_text(encoding="utf-8")
    assert counts["pages"] == 2 and text.count(">damaged<") == 1 and "odd.ipynb cannot be shown" in text


def test_a_long_name_costs_no_page(few, tmp_path):
    for last in "ab":
        name = "n" * 240 + last
        nbformat.write(executed(v4.new_markdown_cell("# A title")), tmp_path / "shelf" / f"{name}.ipynb")
    few()
    assert len(links(tmp_path / "site")) == 4


@pytest.mark.parametrize("name", gallery.APART)
def test_a_run_of_a_dataset_of_any_name_has_a_card(outputs, tmp_path, name):
    root = tmp_path / "outputs"
    shutil.copytree(outputs / "wikipedia" / "v22" / "unjudged", root / name / "v22" / "seed0-amn")
    shutil.copytree(outputs / "fast", root / "fast", dirs_exist_ok=True)
    for fast, whole in ((False, 1), (True, 2)):
        _, counts = gallery.build(tmp_path / "site", root, fast=fast)
        assert counts["runs"] == whole


def test_an_empty_folder_is_said_so(tmp_path):
    with pytest.raises(LVMError, match="no run and no executed notebook"):
        gallery.build(root=tmp_path)
    assert not (tmp_path / "gallery").exists()


@pytest.mark.parametrize("width, scheme", [(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")])
def test_in_a_browser_from_disk(site, chromium, width, scheme):
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    told, asked = [], []
    for name in ("index.html", "pages/wikipedia-v22-seed0-amn-train.html"):
        view = context.new_page()
        view.on("console", lambda message: told.append(message.text))
        view.on("pageerror", lambda error: told.append(str(error)))
        view.on("request", lambda request: asked.append(request.url))
        view.goto((site / name).as_uri())
        assert view.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        assert "taken" not in view.title() or "<script>" in view.title()
        ground = view.evaluate("getComputedStyle(document.body).backgroundColor")
        light = sum(map(int, re.findall(r"\d+", ground)[:3])) > 3 * 128
        assert light == (scheme == "light")
    folds = view.locator("details.code")
    assert folds.count() == 6 and view.locator("details.code[open]").count() == 0
    assert not view.locator(".code .highlight").first.is_visible()
    folds.first.locator("summary").click()
    assert view.locator(".code .highlight").first.is_visible()
    view.locator("button.fold").click()
    assert view.locator("details.code[open]").count() == 6
    assert view.evaluate("document.documentElement.scrollWidth <= innerWidth")  # with long lines of code, too
    figure = view.locator("img.figure").first
    assert figure.evaluate("i => i.complete && i.naturalWidth") == 900
    table = view.locator(".box table").first.locator("..")
    assert table.evaluate("b => getComputedStyle(b).overflowX") == "auto"
    view.locator("header a").click()
    assert view.url == (site / "index.html").as_uri()
    assert view.locator("#runs > li:visible").count() == 9
    view.locator("select[name=data]").select_option("wikipedia")
    chosen = view.locator("#runs > li:visible")
    assert chosen.count() == 8 + (view.locator("#runs > li[data-data=wikipedia]").count() == 9)
    view.locator("select.sort").select_option("margin")
    margins = [float(m) for m in chosen.evaluate_all("all => all.map(c => c.dataset.margin)") if m]
    assert margins == sorted(margins, reverse=True)
    assert told == [] and all(url.startswith(("file://", "data:")) for url in asked) and asked
    context.close()


def test_without_scripts_every_card_is_there(site, chromium):
    context = chromium.new_context(java_script_enabled=False)
    view = context.new_page()
    view.goto((site / "index.html").as_uri())
    assert view.locator("#runs > li:visible").count() == 9 and not view.locator(".controls").is_visible()
    context.close()


# Of which code


def test_comments_and_docstrings_do_not_count():
    source = 'def f(x):\n    """Twice."""\n    # why\n    return 2 * x  # doubled\n\n\nname = "# no comment"\n'
    told = 'def f(x):\n    """Two\n\n    lines."""\n    return 2 * x\nname = "# no comment"\n'
    assert (
        fingerprint.meaning(source) == fingerprint.meaning(told) == 'def f(x):\n    return 2 * x\nname = "# no comment"'
    )
    assert fingerprint.meaning(source.replace("2 *", "3 *")) != fingerprint.meaning(source)
    assert fingerprint.meaning('def f(): "said"') == 'def f(): "said"' and fingerprint.meaning("%magic (") == "%magic ("


def test_a_notebook_depends_on_what_it_names_and_what_that_imports():
    files = fingerprint.template("train")["sources"]
    assert {"lvmlib/training.py", "lvmlib/controller.py", "lvmlib/retrieval.py", "params/v22.yaml", "params/base.yaml",
            "lvmlib/data/wikipedia/datasheet.yaml"} <= set(files)  # fmt: skip
    assert not {"lvmlib/encode.py", "lvmlib/gallery.py", "lvmlib/sweep.py"} & set(files)
    assert "lvmlib/encode.py" in fingerprint.template("encode")["sources"]


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A copy of what a fingerprint reads, to be changed, and a notebook that was executed and stamped in it."""
    for name in ("lvmlib", "params", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.npy", "*.jsonl"))
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)
    monkeypatch.setattr(fingerprint, "ROOMS", tmp_path / "lvmlib")
    monkeypatch.setattr(fingerprint, "PARAMS", tmp_path / "params")
    fingerprint.training.cache_clear()
    content = json.loads((tmp_path / "notebooks" / "train.ipynb").read_text(encoding="utf-8"))
    content["metadata"]["papermill"] = {"input_path": "notebooks/train.ipynb", "start_time": "2026-01-02T03:04:05"}
    injected = v4.new_code_cell("# Parameters\nseed = 2", metadata={"tags": ["injected-parameters"]})
    content["cells"].insert(2, json.loads(json.dumps(injected)))
    for cell in content["cells"]:
        cell |= {"execution_count": 1} if cell["cell_type"] == "code" else {}
    (tmp_path / "executed.ipynb").write_text(json.dumps(content), encoding="utf-8")
    assert fingerprint.stamp(tmp_path / "executed.ipynb", fingerprint.template("train"))
    yield tmp_path
    fingerprint.training.cache_clear()


def state(house, change=lambda content: None):
    content = json.loads((house / "executed.ipynb").read_text(encoding="utf-8"))
    change(content)
    return fingerprint.state(content)


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_a_stamped_notebook_is_current_until_its_code_changes(house):
    assert state(house).kind == "current"
    edit(house / "lvmlib" / "losses.py", "from __future__", "# a word\nfrom __future__")
    edit(house / "params" / "v22.yaml", "\n", "\n# a word\n")
    edit(house / "lvmlib" / "encode.py", "import", "import abc\nimport")  # no part of train.ipynb
    assert state(house).kind == "current"
    edit(house / "lvmlib" / "losses.py", "def ", "CHANGED = 1\n\n\ndef ")
    assert state(house) == ("stale", "lvmlib/losses.py changed since")
    edit(house / "notebooks" / "train.ipynb", "plots.use_style()", "plots.use_style();")
    assert state(house) == ("stale", "its code cells differ from those of notebooks/train.ipynb")


def test_a_run_of_other_code_makes_its_notebook_stale(house):
    def told(sources):
        return lambda content: content["metadata"]["lvmlib"].update(run={"sources": sources, "commit": "abc"})

    assert state(house, told(fingerprint.training())).kind == "current"
    for sources in ("000000000000", None):
        assert state(house, told(sources)) == ("stale", "its run was trained by other code (commit abc)")


def test_a_stamp_cannot_be_borrowed(house):
    def executed_again(content):
        content["metadata"]["papermill"]["start_time"] = "2026-02-03T00:00:00"

    def other_cells(content):
        content["cells"][-1]["source"] = "print('better')"

    assert state(house, executed_again).kind == state(house, other_cells).kind == "false"
    assert state(house, lambda content: content["metadata"].pop("lvmlib")).kind == "stale"


def test_what_changed_while_it_ran_is_not_stamped(house):
    before = fingerprint.template("train")
    edit(house / "lvmlib" / "losses.py", "def ", "CHANGED = 1\n\n\ndef ")
    assert not fingerprint.stamp(house / "executed.ipynb", before)
    assert state(house) == ("stale", "it does not say by which code it was made")


def test_what_was_not_executed_is_not_stamped(house):
    content = json.loads((house / "executed.ipynb").read_text(encoding="utf-8"))
    [c for c in content["cells"] if c["cell_type"] == "code"][-1]["execution_count"] = None
    fingerprint.write(house / "executed.ipynb", content)
    assert not fingerprint.stamp(house / "executed.ipynb", fingerprint.template("train"))
    assert state(house).kind == "stale"


def test_what_only_tells_of_a_run_makes_none_stale(house):
    """But where alarms stop a run or send it back, it depends on them."""
    before, watched = fingerprint.training(), fingerprint.training(watched=True)
    assert before != watched
    edit(house / "lvmlib" / "alarms.py", "not finite", "no number")
    edit(house / "lvmlib" / "untrusted.py", "import annotations\n", "import annotations\nCHANGED = 1\n")
    fingerprint.training.cache_clear()
    assert fingerprint.training() == before and fingerprint.training(watched=True) not in (before, watched)
    edit(house / "lvmlib" / "parallel.py", "import annotations\n", "import annotations\nCHANGED = 1\n")
    fingerprint.training.cache_clear()
    assert fingerprint.training() != before


def test_a_run_that_alarms_stop_says_so_in_its_fingerprint(tmp_path):
    own = lvm.version("v22", {"trouble": "stop"}, fast=True, model="amn", precision="float32")
    run = lvm.train(own, lvm.dataset(own.data, own.horizon, own.context_length, own.fast), out=tmp_path / "run")
    assert alarms.actions(own) == {"stop"}
    assert run.record["software"]["sources"] == fingerprint.training(watched=True) != fingerprint.training()


def test_a_run_says_by_which_code_it_was_trained(outputs):
    record = yaml.safe_load((outputs / "wikipedia/v22/seed0-amn/run.yaml").read_text(encoding="utf-8"))
    assert record["software"]["sources"] == fingerprint.training()


def test_the_committed_notebooks_are_of_the_present_code_or_said_to_be_stale():
    found = {p.stem: fingerprint.state(json.loads(p.read_text(encoding="utf-8")))
             for p in sorted((ROOT / "outputs" / "showcase").glob("*.ipynb"))}  # fmt: skip
    stale = {name: why for name, (kind, why) in found.items() if kind == "stale"}
    if stale:
        listed = "; ".join(f"{name} ({why})" for name, why in stale.items())
        warnings.warn(f"outputs/showcase: {len(stale)} of {len(found)} stale, make showcase: {listed}", stacklevel=1)
    assert found and {name: s for name, s in found.items() if s.kind == "false"} == {}


def test_a_showcase_card_is_told_from_the_notebook_alone(tmp_path, monkeypatch):
    """The committed notebooks have no run's folder beside them: what the stamp carries, or the log, is told."""
    lines = [
        f"epoch {e:2}/2  loss 0.1  val 0.1  cos +0.1  margin {m:+.3f}  R@5 0.8\n" for e, m in ((1, -0.2), (2, -0.1))
    ]
    log = shown("train()", v4.new_output("stream", name="stdout", text="".join(lines)))
    said = shown('display(Markdown(f"**{verdict.text}**"))', display(markdown="**No success.** Why."))
    nbformat.write(executed(log, said, version="v21", seed=3), tmp_path / "train-v21.ipynb")
    card = gallery.showcase_card(tmp_path / "train-v21.ipynb")
    assert (card["version"], card["seed"], card["margin"], card["verdict"]) == (
        "v21",
        3,
        [-0.2, -0.1],
        "No success. Why.",
    )
    assert (card["code"], card["data"]) == ("stale", "wikipedia")
    monkeypatch.setattr(gallery, "SHOWCASE", tmp_path)
    _, counts = gallery.build(tmp_path / "site", tmp_path / "none", showcase=True)
    assert counts == {"runs": 1, "notebooks": 0, "pages": 1}


def test_notebooks_write_no_formula_that_would_need_a_renderer():
    """Pages show what stands between $ signs as it was typed; a notebook with more than that needs MathML."""
    for path in sorted(Path(ROOT / "notebooks").glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            assert cell.cell_type != "markdown" or "$" not in re.sub(r"`[^`]*`", "", cell.source), (path, cell.source)
