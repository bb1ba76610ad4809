"""An executed notebook as one HTML file that needs nothing else: no font, no request, no script but ours.

Displayed HTML is untrusted (titles, passages): nh3 keeps only what tables and text need, SVG becomes an image, in which
no script runs, and the page's Content-Security-Policy allows the one script of ours and no request. Formulas between
$ signs stay as typed. A widget, which needs a kernel, becomes a one-line note.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import jinja2
import nbformat
import nh3
from markupsafe import Markup
from nbconvert.filters import Highlight2HTML, ansi2html
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

from ..errors import LVMError
from ..io.disk import write_atomic
from ..io.limits import NOTEBOOK, read_bytes

SITE = Path(__file__).resolve().parent / "site"
WIDGET = "application/vnd.jupyter.widget-view+json"
# The formats that are shown, in order of preference.
KINDS = (WIDGET, "text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain")

TEXT = "p br hr h1 h2 h3 h4 h5 h6 a b strong i em u s del sub sup small code pre kbd blockquote ul ol li dl dt dd"
BOXES = "div span details summary table caption thead tbody tfoot tr th td colgroup col img"
NAMES = "id class style colspan rowspan scope dir lang alt title open"
LINKS = {"href": re.compile(r"#|https?:|mailto:"), "src": re.compile(r"data:image/(png|jpeg|gif);base64,")}
STYLE = re.compile(  # a harmless CSS declaration: a plain value, without functions and quotes
    r"\s*(text-align|vertical-align|white-space|font-size|font-weight|font-style|caption-side|overflow-wrap|"
    r"color|background-color|width|max-width)\s*:[\w\s#%.,-]*"
)
TABLE_STYLE = re.compile(r"<style[^<>]*>([^<]*)</style>", re.IGNORECASE)  # the rules that a pandas table brings
LONGEST = 1 << 20  # characters of these rules; a table with one colour a cell has some hundred thousand


def page(notebook: Mapping, home: str = "") -> str:
    """Return the HTML page of a notebook (as JSON). `home`: the relative link back to the gallery."""
    notebook, _ = CoalesceStreamsPreprocessor().preprocess(nbformat.from_dict(notebook), {})  # from_dict copies
    given = notebook["metadata"].get("papermill", {}).get("parameters") or {}
    facts = {"executed": date(notebook)} if date(notebook) else {}
    facts |= {name: str(value) for name, value in given.items()}
    return render("page.html.j2", title=title(notebook), cells=notebook["cells"], home=home, facts=facts, kinds=KINDS)


def write(notebook: Path, target: Path) -> None:
    """Write the page of the notebook at a path, whole or not at all. Raises LVMError if it cannot be read."""
    text = page(read(notebook))
    write_atomic(target, lambda partial: partial.write_text(text, encoding="utf-8"))


def read(path: Path) -> dict:
    """Return a notebook's JSON, of format 4. Raises LVMError if the file is no notebook."""
    try:
        return nbformat.reads(read_bytes(path, NOTEBOOK).decode("utf-8"), as_version=4)
    except Exception as e:  # nbformat raises anything for a damaged file
        raise LVMError(f"{path}: not a notebook that can be read ({type(e).__name__}); execute it again") from e


def title(notebook: Mapping) -> str:
    """Return the first heading of a notebook as plain text."""
    text = "\n".join(c["source"] for c in notebook["cells"] if c["cell_type"] == "markdown")
    return next(iter(re.findall(r"^# +(.+)$", text, re.MULTILINE)), "Notebook").strip()


def date(notebook: Mapping) -> str:
    """Return the day on which papermill executed a notebook, or an empty text."""
    return str(notebook["metadata"].get("papermill", {}).get("start_time") or "")[:10]


def render(template: str, **values) -> str:
    """Fill a template of share/site; all values are escaped."""
    return _templates().get_template(template).render(**values)


@functools.cache
def _templates() -> jinja2.Environment:
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(SITE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    style, script = (Markup((SITE / name).read_text(encoding="utf-8")) for name in ("site.css", "site.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    templates.globals |= {"style": style, "script": script, "digest": digest}
    templates.filters |= {
        "clean": clean,
        "markdown": _markdown,
        "highlight": lambda source: Markup(Highlight2HTML(pygments_lexer="ipython3")(source)),  # both escape their text
        "ansi": lambda text: Markup(ansi2html(text)),
        "image": _image,
        "heading": lambda source: next(iter(re.findall(r"^#+ +(.+)$", source, re.MULTILINE)), ""),
    }
    return templates


def clean(text: str) -> Markup:
    """Remove from HTML what could run, fetch, or cover the page. Keeps the style rules of pandas tables."""
    styles = [f"<style>{rules}</style>" for rules in TABLE_STYLE.findall(text) if _is_table_style(rules)]
    cleaned = nh3.clean(
        TABLE_STYLE.sub("", text),
        tags=set(f"{TEXT} {BOXES}".split()),
        attributes={"*": set(NAMES.split()), "a": {"href"}, "img": {"src"}},
        attribute_filter=_filter_attribute,
        url_schemes={"http", "https", "mailto", "data"},
    )
    return Markup("".join(styles) + cleaned)


def _filter_attribute(_tag: str, name: str, value: str) -> str | None:
    """Return the value to keep of an allowed attribute: links by scheme, images inside the page, harmless styles."""
    if name == "style":
        return ";".join(filter(STYLE.fullmatch, value.split(";"))) or None
    return value if name not in LINKS or LINKS[name].match(value) else None


def _is_table_style(rules: str) -> bool:
    """Whether CSS holds only harmless declarations for the inside of pandas tables (`#T_…`)."""
    *blocks, rest = rules.split("}")
    for block in blocks:
        selectors, _, declarations = block.partition("{")
        if not all(re.fullmatch(r"#T_[\w #.-]+", selector.strip()) for selector in selectors.split(",")):
            return False
        if not all(STYLE.fullmatch(d) for d in declarations.split(";") if d.strip()):
            return False
    return not rest.strip() and len(rules) <= LONGEST


def _markdown(text: str) -> Markup:
    return clean(MarkdownWithMath(renderer=IPythonRenderer(escape=False, exclude_anchor_links=True)).render(text))


def _image(text: str, kind: str) -> str:
    """Return the data: address of an image, from SVG text or from base64 of another kind."""
    text = base64.b64encode(text.encode()).decode() if kind == "image/svg+xml" else "".join(text.split())
    return f"data:{kind};base64,{text}"
