"""The gallery and its pages: nothing is lost, hostile text does nothing, nothing is fetched, other files stay."""

import errno
import json
import os
import re
import shutil
from urllib.parse import unquote

import nbformat
import pytest
import yaml
from nbformat import v4
from toys import Tags, finish, make_data, version

import lvmlib as lvm
from lvmlib.errors import LVMError
from lvmlib.io import disk as files
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
    folder = outputs / "wikipedia" / "v22" / "seed0-amn"
    report = json.loads((folder / "fivecat.json").read_text(encoding="utf-8"))
    _, history, steps = lvm.open_run(folder)
    card = found["seed0-amn"]
    assert report["reading"]["label"] in card and "<b>not judged</b>" not in card
    for profile in ("calibrated", "original"):
        for split, name in (("val", "val"), ("ood", "OOD")):
            row = re.search(rf"<th>{profile}, {name}</th>(.*?)</tr>", card).group(1)
            words = {True: "passed", False: "failed"}
            for gate, outcome in report[profile]["gates"][split].items():
                assert f'title="gate {gate}: {words.get(outcome, outcome)}"' in row
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


def test_pages_run_and_fetch_nothing_and_links_work(outputs, site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) == 5
    for path in pages:
        seen = tags(path)
        policy = next(m["content"] for m in seen.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
        assert "default-src 'none'" in policy and "unsafe-eval" not in policy and "script-src 'sha256-" in policy
        assert len(seen.all("script")) == 1 and not seen.all("script")[0]
        assert len(seen.all("meta")) == 5 and "refresh" not in str(seen.all("meta"))
        for tag, attrs in seen.tags:
            assert tag not in ("iframe", "object", "embed", "form", "input", "base")
            assert not {"srcset", "poster", "action", "formaction", "background", "srcdoc"} & set(attrs)
            assert not [name for name in attrs if name.startswith("on")]
            for link in filter(None, (attrs.get("src"), attrs.get("href"))):
                allowed = tag == "a" and link == "https://example.org/"  # a reader may follow it, in a notebook's prose
                if not allowed and not link.startswith(("data:", "#")):
                    assert re.fullmatch(r"[\w.%-][\w./%-]*", link) and (path.parent / unquote(link)).is_file()
        text = path.read_text(encoding="utf-8")
        assert "position:fixed" not in text and "<style>@import" not in text and "javascript:alert" not in text
        assert str(outputs) not in text and "<svg xmlns" not in text  # SVG is a picture: what is in it does not run
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", p.name) for p in site.rglob("*"))
    assert len(tags(site / "index.html").all("a")) == 4
    assert HOSTILE in "".join(tags(site / "index.html").texts)
    shown = "".join(tags(site / "pages" / "wikipedia-v22-seed0-amn-train.html").texts)
    assert "<script>document.title='taken'</script>" in shown and "\\lambda_1 < 2" in shown
    assert "A widget" in shown and "FloatSlider" not in shown


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
        os.truncate(folder / name, 1 << 40)
    facts = gallery.facts(folder)
    assert "fivecat.json is larger than" in str(facts["warnings"]) and facts["state"] == "finished"
    with pytest.raises(LVMError, match=r"train\.ipynb"):
        page.read(folder / "train.ipynb")
    (folder / "steps.csv").unlink()
    os.mkfifo(folder / "steps.csv")
    with pytest.raises(LVMError, match=r"steps\.csv"):
        runs.open_run(folder)
    os.truncate(folder / "epochs.csv", 1 << 40)
    with pytest.raises(LVMError, match=r"epochs\.csv"):
        runs.open_run(folder)


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


def test_other_folders_are_refused(few, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "link").symlink_to(tmp_path / "shelf")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    for name in ("mine", "link", "file", "file/site"):
        with pytest.raises(LVMError, match=name):
            few(tmp_path / name)
    with files.lock(tmp_path / ".site.gallery.lock", str), pytest.raises(LVMError, match=f"{os.getpid()}.* building"):
        few()
    assert sorted(tmp_path.rglob("*")) == before


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


def test_links_work_wherever_a_build_stops(few, tmp_path, monkeypatch):
    out = tmp_path / "site"
    few()
    replace, a, b = os.replace, tmp_path / "shelf" / "a.ipynb", tmp_path / "shelf" / "b.ipynb"
    stops = [("gallery.json", errno.ENOSPC), ("shelf-b2.html", errno.EIO), ("index.html", errno.ENOSPC)]
    for stop, number in stops:
        a.rename(a := a.with_name("a2.ipynb" if a.name == "a.ipynb" else "a.ipynb"))
        b.rename(b := b.with_name("b2.ipynb"))
        before = links(out)

        def stopping(path, to, stop=stop, number=number):
            if to.name == stop:
                raise OSError(number, os.strerror(number), str(path), 0, str(to))
            return replace(path, to)

        monkeypatch.setattr(os, "replace", stopping)
        with pytest.raises(LVMError, match=f"site.*{stop}"):
            few()
        assert links(out) == before and len(before) == 2 and all((out / link).is_file() for link in before)
        assert not list(tmp_path.rglob("*.partial"))
    monkeypatch.setattr(os, "replace", replace)
    few()
    assert set(tree(out)) == {"index.html", "gallery.json"} | links(out) and len(links(out)) == 2
    monkeypatch.setattr(gallery, "page", lambda *_, **__: 1 / 0)  # the index says so
    monkeypatch.setattr(gallery, "render", lambda *_, **__: 1 / 0)
    before = tree(out)
    with pytest.raises(ZeroDivisionError):
        few()
    assert tree(out) == before and sorted(p.name for p in tmp_path.iterdir()) == ["shelf", "site"]


def test_long_names_get_pages_and_invalid_unicode_damages_one_card_only(few, tmp_path):
    odd = executed(v4.new_markdown_cell("# A \ud800 title"), name="compare")
    (tmp_path / "shelf" / "odd.ipynb").write_text(json.dumps(odd), encoding="utf-8")
    for last in "ab":
        shutil.copy(tmp_path / "shelf" / "a.ipynb", tmp_path / "shelf" / f"{'n' * 240}{last}.ipynb")
    index, counts = few()
    text = index.read_text(encoding="utf-8")
    assert counts["pages"] == len(links(tmp_path / "site")) == 4
    assert text.count(">damaged<") == 1 and "odd.ipynb cannot be shown" in text


def test_datasets_of_any_name_have_cards(outputs, tmp_path):
    for name in gallery.APART:
        shutil.copytree(outputs / "wikipedia" / "v22" / "unjudged", tmp_path / name / "v22" / "seed0-amn")
    shutil.copytree(outputs / "fast", tmp_path / "fast", dirs_exist_ok=True)
    for fast in (False, True):
        index, counts = gallery.build(tmp_path / "site", tmp_path, fast=fast)
        assert counts["runs"] == len(gallery.APART) + fast
        assert index.read_text(encoding="utf-8").count(">fast run<") == fast


def test_an_empty_folder_is_reported(tmp_path):
    with pytest.raises(LVMError, match="train"):
        gallery.build(root=tmp_path)
    assert not (tmp_path / "gallery").exists()


@pytest.mark.parametrize("width, scheme", [(390, "light"), (1280, "dark")])
def test_in_a_browser_from_disk(site, chromium, width, scheme):
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    messages, requests = [], []
    for name in ("index.html", "pages/wikipedia-v22-seed0-amn-train.html"):
        view = context.new_page()
        view.on("console", lambda message: messages.append(message.text))
        view.on("pageerror", lambda error: messages.append(str(error)))
        view.on("request", lambda request: requests.append(request.url))
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
    assert messages == [] and requests and all(url.startswith(("file://", "data:")) for url in requests)
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
