"""Text of another kind for `make encode`: the HTML manuals of Debian packages, a folder a package, a file a page.

    apt-get download PACKAGE …; for deb in *.deb; do dpkg -x "$deb" "FROM/${deb%%_*}"; done
    python workflow/manuals.py FROM TO

`TO/PACKAGE/PAGE.txt` holds the paragraphs of a page, without navigation, tables and code, up to the one with which
they exceed 5,000 characters; pages of fewer than 500 are left out. Needs BeautifulSoup, which nbconvert brings along.
"""

import re
import shutil
import sys
from itertools import accumulate
from pathlib import Path

from bs4 import BeautifulSoup

LONGEST, SHORTEST = 5000, 500  # characters of a page
PACKAGES = {  # where the pages of each are, and which of them are English prose
    "anarchism": ("usr/share/doc/anarchism/html", r".*\.html"),
    "apache2-doc": ("usr/share/doc/apache2-doc/manual/en", r".*\.html"),
    "debian-reference-en": ("usr/share/debian-reference", r"[^/]*\.en\.html"),
    "developers-reference": ("usr/share/developers-reference", r"[^/]*\.html"),
    "exim4-doc-html": ("usr/share/doc/exim4-doc-html/spec_html", r".*\.html"),
    "gimp-help-en": ("usr/share/gimp/2.0/help/en", r".*\.html"),
    "git-doc": ("usr/share/doc/git-doc", r".*\.html"),
    "gnucash-docs": ("usr/share/doc/gnucash-docs", r"gnucash-(guide|help)-en/.*\.html"),
    "lilypond-doc-html": (
        "usr/share/doc/lilypond/html/Documentation",
        r"(?!internals|snippets|music-glossary|changes)[^.]*\.html",
    ),
    "maxima-doc": ("usr/share/doc/maxima-doc/html", r"maxima_\d+\.html"),
    "octave-doc": ("usr/share/doc/octave/octave.html", r"(?!XREF).*\.html"),
    "postgresql-doc-15": ("usr/share/doc/postgresql-doc-15/html", r"(?!release).*\.html"),
    "python3.11-doc": (
        "usr/share/doc/python3.11/html",
        r"(?!genindex|py-modindex|search|contents|_|whatsnew/changelog).*\.html",
    ),
    "rust-doc": (
        "usr/share/doc/rust-doc/html",
        r"(book|cargo|clippy|edition-guide|embedded-book|lint-docs|nomicon|reference|rust-by-example|rustc|rustdoc"
        r"|style-guide|unstable-book)/.*\.html",
    ),
    "sqlite3-doc": ("usr/share/doc/sqlite3", r"(?!syntax|c3ref|releaselog|session).*\.html"),
}
ALL_IN_ONE = {"book.html", "manual.html", "onepage.html", "print.html"}  # repeat all other pages


def paragraphs(page: bytes) -> list[str]:
    """Return the paragraphs of an HTML page, each on one line, up to the one with which they exceed LONGEST."""
    soup = BeautifulSoup(page, "html.parser")
    for part in soup.find_all(["nav", "header", "footer", "table", "pre", "script", "style"]):
        part.decompose()
    lines = [" ".join(p.get_text(" ").split()) for p in soup.find_all("p") if not p.find("p")]
    lines = [re.sub(r" ([.,;:!?)])", r"\1", line) for line in lines if line]
    if len(" ".join(lines)) < SHORTEST:
        return []
    before = accumulate(map(len, lines), initial=0)  # characters before each paragraph
    return [line for line, size in zip(lines, before, strict=False) if size <= LONGEST]


def main(source: Path, target: Path) -> None:
    if missing := [name for name, (folder, _) in PACKAGES.items() if not (source / name / folder).is_dir()]:
        lacking = ", ".join(missing)
        raise SystemExit(f"{source}: lacks the pages of {lacking}; fetch and unpack these Debian packages there")
    if target.exists():
        raise SystemExit(f"{target}: exists; remove it, or name another folder")
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name, (folder, wanted) in PACKAGES.items():
        base = source / name / folder
        (partial / name).mkdir(parents=True)
        for page in sorted(base.rglob("*.html")):
            path = page.relative_to(base).as_posix()
            if page.is_symlink() or page.name in ALL_IN_ONE or not re.fullmatch(wanted, path):
                continue
            if lines := paragraphs(page.read_bytes()):
                text = "\n\n".join(lines) + "\n"
                (partial / name / path.replace("/", "__")).with_suffix(".txt").write_text(text, encoding="utf-8")
    partial.rename(target)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
