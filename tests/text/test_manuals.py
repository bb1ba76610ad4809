"""workflow/manuals.py on small pages."""

import runpy
import subprocess
import sys

import pytest

from lvmlib.io.paths import ROOT

SCRIPT = ROOT / "workflow" / "manuals.py"
SENTENCE = "A vector is read, and what follows it is told from those before it"


@pytest.fixture(scope="module")
def manuals():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def unpacked(manuals, tmp_path):
    """One page of each package, and what is not to be read beside it."""
    body = "".join(f"<p>{SENTENCE} {i} .</p>" for i in range(12))
    beside = "<nav><p>Home</p></nav><table><tr><td><p>Cell</p></td></tr></table>"
    page = f"<html>{beside}{body}<p>The\n  <b>end</b> .</p></html>"
    for name, (folder, _) in manuals["PACKAGES"].items():
        base = tmp_path / "from" / name / folder
        path = {
            "debian-reference-en": "ch01.en.html",
            "gnucash-docs": "gnucash-help-en/start.html",
            "lilypond-doc-html": "notation/pitch.html",
            "maxima-doc": "maxima_1.html",
            "rust-doc": "book/ch01.html",
        }.get(name, "page.html")
        (base / path).parent.mkdir(parents=True)
        (base / path).write_text(page, encoding="utf-8")
        (base / "short.html").write_text("<p>Too short.</p>", encoding="utf-8")
    rust = tmp_path / "from" / "rust-doc" / "usr/share/doc/rust-doc/html"
    for other in ("std/vec.html", "book/print.html"):
        (rust / other).parent.mkdir(parents=True, exist_ok=True)
        (rust / other).write_text(page, encoding="utf-8")
    return tmp_path / "from"


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=120)


def test_a_folder_a_package_a_file_a_page(manuals, unpacked, tmp_path):
    out = tmp_path / "to"
    done = run(unpacked, out)
    assert done.returncode == 0, done.stderr
    found = sorted(p.relative_to(out).as_posix() for p in out.rglob("*.txt"))
    assert len(found) == len(manuals["PACKAGES"]) and "rust-doc/book__ch01.txt" in found
    lines = (out / "anarchism" / "page.txt").read_text(encoding="utf-8").split("\n\n")
    assert lines[0] == f"{SENTENCE} 0." and lines[-1] == "The end.\n" and len(lines) == 13
    again = run(unpacked, out)
    assert again.returncode and "exists" in again.stderr


def test_a_long_page_ends_with_the_paragraph_that_exceeds_the_limit(manuals):
    page = "".join(f"<p>{i:04d} {SENTENCE * 10}</p>" for i in range(30)).encode()
    lines = manuals["paragraphs"](page)
    assert sum(map(len, lines[:-1])) <= manuals["LONGEST"] < sum(map(len, lines))


def test_packages_that_are_missing_are_named(unpacked, tmp_path):
    (unpacked / "git-doc").rename(tmp_path / "elsewhere")
    done = run(unpacked, tmp_path / "to")
    assert done.returncode and "lacks the pages of git-doc;" in done.stderr
    assert not (tmp_path / "to").exists()
