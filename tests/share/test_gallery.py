"""The gallery and its pages: nothing is lost, hostile text does nothing, nothing is fetched, other files stay."""

import errno
import json
import os
import re
import shutil
import time
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
import yaml
from nbformat import v4
from toys import Tags, finish, make_data, version

import lvmlib as lvm
from lvmlib.errors import LVMError
from lvmlib.io import disk as files
from lvmlib.io.paths import ROOT
from lvmlib.report import plots
from lvmlib.runs import folder as runs
from lvmlib.share import gallery, page

HOSTILE = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="900" height="300"><script>alert(1)</script><circle r="40"/></svg>'
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def tags(path):
    return Tags(path.read_text(encoding="utf-8"))


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
    """A judged run, and damaged copies of it."""
    root = tmp_path_factory.mktemp("outputs")
    data, good = make_data(), root / "wikipedia" / "v22" / "seed0-amn"
    run = finish(lvm.train(version(epochs=2), data, out=good))
    report = lvm.fivecat(run.best, data, lvm.baselines(data.train))
    verdict, reading = lvm.verdict(run.version, run.history, report), lvm.reading(report)
    words = {"label": reading.label, "text": reading.text}
    report.to_json(good / "fivecat.json", verdict=verdict.to_dict(), reading=words)
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
    assert index == outputs / "gallery" / "index.html" and counts == {"runs": 8, "notebooks": 2, "pages": 4}
    return index.parent


def cards(site):
    text = (site / "index.html").read_text(encoding="utf-8").partition("<main>")[2]
    return {re.sub(r"<[^>]*>", "", re.search(r'<p class="soft">(.*?)</p>', c).group(1)).split(",")[0]: c
            for c in text.split('<li class="card"')[1:]}  # fmt: skip


def test_cards_show_what_the_files_hold(outputs, site):
    found = cards(site)
    assert set(found) == {
        "seed0-amn", "interrupted", "broken-report", "unjudged", "alarmed", "a b&amp;c",
        "wikipedia / v22 / broken-record", "wikipedia / v22 / broken-table",
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
    _, history, steps = lvm.open_run(outputs / "wikipedia/v22/seed0-amn")
    assert f"<b>{history['margin'].iloc[-1]:+.3f}</b>" in card and f"<b>{history['novel_mrr'].iloc[-1]:.3f}</b>" in card
    (copy,) = (r["value"] for r in report["calibrated"]["table"]
               if (r["split"], r["predictor"], r["measure"]) == ("val", "copy last", "novel MRR"))  # fmt: skip
    assert f"copy last <span>{copy:.3f}</span>" in card
    broken = [c for c in lvm.checklist(version(epochs=2), history, steps) if c.passed is False]
    assert broken and all(f"<b>{c.check}</b>: {c.measured}" in card for c in broken)
    assert "2026-01-02" in card and "Training</a>" in card and "Diagnostics</a>" in card
    assert "unfinished" in found["interrupted"] and "1 of 2 epochs" in found["interrupted"]
    for name in ("record", "table"):
        card = found[f"wikipedia / v22 / broken-{name}"]
        assert ">damaged<" in card and str(outputs) not in card and "cannot be read" in card
    assert "fivecat.json cannot be read" in found["broken-report"] and "not judged" in found["unjudged"]
    card = found["alarmed"]
    assert "collapse (epoch 1, step 7)" in card and "lower the rate" in card and "escape guard was due" in card
    assert ">damaged<" in found[f"{outputs.name} / damaged"]
    assert "ended with an error" in found["wikipedia / compare-amn"]


def test_fast_runs_are_marked(outputs, tmp_path):
    index, counts = gallery.build(tmp_path / "site", outputs, fast=True)
    assert counts["runs"] == 9 and index.read_text(encoding="utf-8").count(">fast run<") == 1


def test_pages_fetch_nothing_and_links_work(outputs, site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) == 5
    for path in pages:
        seen = tags(path)
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
    assert len(tags(site / "index.html").all("a")) == 4


def test_hostile_text_is_shown_and_does_nothing(site):
    for path in site.rglob("*.html"):
        seen = tags(path)
        assert len(seen.all("script")) == 1 and not seen.all("script")[0]
        assert not {"iframe", "object", "embed", "form", "input", "base"} & {tag for tag, _ in seen.tags}
        assert not [a for _, attrs in seen.tags for a in attrs if a.startswith("on")]
        assert len(seen.all("meta")) == 5 and "refresh" not in str(seen.all("meta"))
        text = path.read_text(encoding="utf-8")
        assert "position:fixed" not in text and "<style>@import" not in text and "javascript:alert" not in text
        assert "<svg xmlns" not in text  # SVG is a picture: what is in it does not run
    assert HOSTILE in "".join(tags(site / "index.html").texts)
    shown = "".join(tags(site / "pages" / "wikipedia-v22-seed0-amn-train.html").texts)
    assert "<script>document.title='taken'</script>" in shown and "\\lambda_1 < 2" in shown
    assert "A widget" in shown and "FloatSlider" not in shown


@pytest.mark.parametrize("rules, kept", [
    ("#T_a th, #T_a_row0_col1.col0 {\n  text-align: left;\n color: #0a0; width: 10% }\n#T_a td { color: red }", True),
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
])  # fmt: skip
def test_style_rules_reach_only_tables(rules, kept):
    assert page.clean(f"<style>{rules}</style>") == (f"<style>{rules}</style>" if kept else "")


@pytest.mark.parametrize("text, cleaned", [
    ("<b>a &lt; b</b>", "<b>a &lt; b</b>"),
    ("<script>bad()</script><style>x{}</style>", ""),
    ("<svg onload=bad()><script>bad()</script><a xlink:href=javascript:bad()>x</a></svg>", ""),
    ("<math><mtext><table><mglyph><style><img src=x onerror=bad()>", ""),
    ("<noscript><p title='</noscript><img src=x onerror=bad()>'>", '&lt;p title=\'<img>\'&gt;'),
    ("<div style='color:red;position:fixed;background-color:url(//x)'>d</div>", '<div style="color:red">d</div>'),
    ("<div style='width:expression(bad())'>d</div>", "<div>d</div>"),
    ("<img src='data:image/png;base64,aa'>", '<img src="data:image/png;base64,aa">'),
    ("<img src='data:image/svg+xml;base64,aa'><img src=//x><img src=x onerror=bad() srcset=//x>", "<img><img><img>"),
    ("<a href='#f'>f</a><a href='https://x.org/'>x</a>", '<a href="#f">f</a><a href="https://x.org/">x</a>'),
    ("<a href='javascript:bad()'>f</a><a href=' java\nscript:bad()'>x</a>", "<a>f</a><a>x</a>"),
    ("<a href='data:text/html,x' ping=//x>f</a><a href=//x>x</a>", "<a>f</a><a>x</a>"),
    ("<iframe srcdoc='<script>bad()</script>'></iframe><object data=//x></object><embed src=//x>", ""),
    ("<base href=//x><meta http-equiv=refresh content='0;url=//x'><link rel=stylesheet href=//x>", ""),
    ("<form action=//x><input onfocus=bad() autofocus><button formaction='javascript:bad()'>b</button></form>", "b"),
    ("<!-- a --><template><img src=x onerror=bad()></template>", ""),
])  # fmt: skip
def test_clean_removes_what_runs_or_fetches(text, cleaned):
    assert page.clean(text).replace(' rel="noopener noreferrer"', "") == cleaned


def test_markdown_with_a_formula_is_cleaned():
    source = "$\\href{javascript:bad}{z}$ $<img src=x onerror=bad()>$ <script>bad()</script>"
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell(source)])
    main = page.page(notebook).partition("<main>")[2].partition("</main>")[0]
    assert "$\\href{javascript:bad}{z}$" in main and "onerror" not in re.sub(r"&lt;.*?&gt;", "", main)
    assert "<script" not in main


def test_long_style_is_refused_quickly():
    began = time.process_time()  # 16 repetitions took a backtracking expression 11 s
    assert page.clean("<style>#T_a{" + "color:x  " * 2000 + "!</style>") == ""
    assert time.process_time() - began < 5


ODD = {"version": {"version": 22}, "margin": {"epoch": [1], "margin": "abc"}, "checks": {"checks": 3},
       "copy_last": {"epoch": [1, 2], "margin": [0.1, 0.2], "copy_last": {"margin": "x"}}, "gates": {"gates": [1]},
       "warnings": {"warnings": [{"what": 1}]}, "warning": {"warnings": "x"}, "run": [1],
       "links": {"links": 3}}  # fmt: skip


def test_odd_facts_damage_one_card_only(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "SHOWCASE", tmp_path)
    for name, run in ODD.items():
        notebook = executed(v4.new_markdown_cell("# A title"))
        whole = {"state": "finished", "version": "v22", "data": "wikipedia"}
        notebook.metadata["lvmlib"] = {"run": whole | run if isinstance(run, dict) else run}
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    index, counts = gallery.build(tmp_path / "site", tmp_path / "none", showcase=True)
    assert counts["runs"] + counts["notebooks"] == counts["pages"] == len(ODD)
    text = index.read_text(encoding="utf-8")
    assert text.count(">damaged<") == text.count("<b>cannot be read</b>") == 8


def test_no_file_is_read_without_a_limit(outputs, tmp_path, monkeypatch):
    folder = tmp_path / "wikipedia" / "v22" / "seed0-amn"
    shutil.copytree(outputs / "wikipedia" / "v22" / "seed0-amn", folder)
    for name in ("fivecat.json", "train.ipynb"):
        with open(folder / name, "ab") as file:
            file.truncate(1 << 40)
    facts = gallery.facts(folder)
    assert "fivecat.json is larger than" in str(facts["warnings"]) and facts["state"] == "finished"
    with pytest.raises(LVMError, match=r"train\.ipynb"):
        page.read(folder / "train.ipynb")
    (folder / "steps.csv").unlink()
    os.mkfifo(folder / "steps.csv")
    with pytest.raises(LVMError, match=r"steps\.csv"):
        runs.open_run(folder)
    with open(folder / "epochs.csv", "ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(LVMError, match=r"epochs\.csv"):
        runs.open_run(folder)


def test_other_folders_are_refused(outputs, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(LVMError, match="mine"):
        gallery.build(tmp_path / "mine", outputs)
    assert [p.name for p in tmp_path.rglob("*")] == ["mine", "thesis.txt"]
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(LVMError, match="link"):
        gallery.build(tmp_path / "link", outputs)


def test_the_old_gallery_stays_until_the_new_one_is_whole(outputs, tmp_path, monkeypatch):
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
    with files.lock(tmp_path / ".site.gallery.lock", str), pytest.raises(LVMError, match=f"{os.getpid()}.* building"):
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
    return {attrs["href"] for attrs in tags(out / "index.html").all("a")}


def test_other_files_stay(few, tmp_path):
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
    with pytest.raises(LVMError, match=r"shelf-b\.html"):
        few()
    assert tree(out) == before


def test_building_deletes_no_other_files(few, tmp_path):
    (tmp_path / ".site.new").mkdir()
    (tmp_path / ".site.new" / "thesis.txt").write_text("years of work")
    with pytest.raises(LVMError, match=r"\.site\.new"):
        few()
    assert (tmp_path / ".site.new" / "thesis.txt").read_text() == "years of work"


def test_only_pages_of_a_gallery_are_deleted(few, tmp_path):
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
    (out / "gallery.json").write_text("<<<<<<< HEAD")
    with pytest.raises(LVMError, match=r"gallery\.json"):
        few()
    shutil.rmtree(out / "pages")
    (out / "pages").symlink_to(tmp_path)
    with pytest.raises(LVMError, match="pages"):
        few()


@pytest.mark.parametrize("full", ["shelf-a.html", "index.html", "gallery.json"])
def test_a_full_disk_leaves_the_old_gallery(few, tmp_path, monkeypatch, full):
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
    with pytest.raises(LVMError, match=r"site.*disk is full"):
        few()
    assert tree(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_reported(few, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LVMError, match="site"):
        few(tmp_path / "file" / "site")


def test_links_work_wherever_a_build_stops(few, tmp_path, monkeypatch):
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
        with pytest.raises(LVMError, match="site"):
            few()
        assert len(links(out)) == 2 and all((out / link).is_file() for link in links(out))
    monkeypatch.setattr(Path, "replace", replace)
    few()
    assert set(tree(out)) == {"index.html", "gallery.json"} | links(out) and len(links(out)) == 2


def test_invalid_unicode_damages_one_card_only(few, tmp_path):
    odd = executed(v4.new_markdown_cell("# A \ud800 title"), name="compare")
    (tmp_path / "shelf" / "odd.ipynb").write_text(json.dumps(odd), encoding="utf-8")
    index, counts = few()
    text = index.read_text(encoding="utf-8")
    assert counts["pages"] == 2 and text.count(">damaged<") == 1 and "odd.ipynb cannot be shown" in text


def test_long_names_get_pages(few, tmp_path):
    for last in "ab":
        name = "n" * 240 + last
        nbformat.write(executed(v4.new_markdown_cell("# A title")), tmp_path / "shelf" / f"{name}.ipynb")
    few()
    assert len(links(tmp_path / "site")) == 4


@pytest.mark.parametrize("name", gallery.APART)
def test_datasets_of_any_name_have_cards(outputs, tmp_path, name):
    root = tmp_path / "outputs"
    shutil.copytree(outputs / "wikipedia" / "v22" / "unjudged", root / name / "v22" / "seed0-amn")
    shutil.copytree(outputs / "fast", root / "fast", dirs_exist_ok=True)
    for fast, whole in ((False, 1), (True, 2)):
        _, counts = gallery.build(tmp_path / "site", root, fast=fast)
        assert counts["runs"] == whole


def test_an_empty_folder_is_reported(tmp_path):
    with pytest.raises(LVMError, match="train"):
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
    assert view.locator("#runs > li:visible").count() == 8
    view.locator("select[name=data]").select_option("wikipedia")
    chosen = view.locator("#runs > li:visible")
    assert chosen.count() == 7 + (view.locator("#runs > li[data-data=wikipedia]").count() == 8)
    view.locator("select.sort").select_option("margin")
    margins = [float(m) for m in chosen.evaluate_all("all => all.map(c => c.dataset.margin)") if m]
    assert margins == sorted(margins, reverse=True)
    assert told == [] and all(url.startswith(("file://", "data:")) for url in asked) and asked
    context.close()


def test_without_scripts_every_card_is_there(site, chromium):
    context = chromium.new_context(java_script_enabled=False)
    view = context.new_page()
    view.goto((site / "index.html").as_uri())
    assert view.locator("#runs > li:visible").count() == 8 and not view.locator(".controls").is_visible()
    context.close()


def test_a_showcase_card_holds_the_facts_of_its_run(outputs, tmp_path, monkeypatch):
    """Committed notebooks have no run's folder beside them: the facts are in their metadata."""
    notebook = executed(v4.new_markdown_cell("# A title"), seed=3)
    facts = gallery.facts(outputs / "wikipedia" / "v22" / "seed0-amn")
    notebook.metadata["lvmlib"] = {"run": json.loads(json.dumps(facts))}
    nbformat.write(notebook, tmp_path / "train-v22.ipynb")
    monkeypatch.setattr(gallery, "SHOWCASE", tmp_path)
    monkeypatch.setattr(gallery.stamp, "state", lambda content: ("stale", "losses.py changed"))
    index, counts = gallery.build(tmp_path / "site", tmp_path / "none", showcase=True)
    assert counts == {"runs": 1, "notebooks": 0, "pages": 1}
    (card,) = cards(index.parent).values()
    assert "wikipedia, amn, seed 0" in card and facts["reading"]["label"] in card and "losses.py changed" in card


def test_notebooks_use_no_formulas():
    """Pages show what stands between $ signs as typed; a notebook with formulas would need MathML."""
    for path in sorted(Path(ROOT / "notebooks").glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            assert cell.cell_type != "markdown" or "$" not in re.sub(r"`[^`]*`", "", cell.source), (path, cell.source)
