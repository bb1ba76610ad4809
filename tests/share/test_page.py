"""What a page keeps of the HTML and Markdown that a notebook displays."""

import re

import nbformat
import pytest
from nbformat import v4

from lvmlib.io.paths import ROOT
from lvmlib.share import page


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
    ("#T_a{" + "color:red;" * 2000 + "}", False),
    ("#T_a{" + "color:x  " * 2000 + "!", False),  # 16 repetitions took a backtracking expression 11 s
])  # fmt: skip
def test_style_rules_reach_only_tables(rules, kept, monkeypatch):
    monkeypatch.setattr(page, "LONGEST", 20_000)
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


def test_notebooks_use_no_formulas():
    """Pages show what stands between $ signs as typed; a notebook with formulas would need MathML."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            assert cell.cell_type != "markdown" or "$" not in re.sub(r"`[^`]*`", "", cell.source), (path, cell.source)
