"""An executed notebook as one HTML file that needs nothing else: no script of others, no font, no request when opened.

Code is folded, figures lie in the file, tables scroll in their own box. What a notebook displays may hold text that
nobody vouches for (titles, passages): HTML is cleaned to what tables and text need, SVG becomes a picture, in which
nothing runs, and the page's Content-Security-Policy lets the browser run the one script of ours and fetch nothing.
Formulas between $ signs stay as they were typed: the notebooks write theirs in plain text and Unicode.
Widgets, which need a kernel, are told in a line; what a cell displayed beside them is shown.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import re
from collections.abc import Mapping
from pathlib import Path

import bleach
import jinja2
import nbformat
from bleach.css_sanitizer import CSSSanitizer
from markupsafe import Markup
from nbconvert.filters import Highlight2HTML, ansi2html
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from ..errors import LVMError
from ..io.disk import write_whole
from ..io.limits import NOTEBOOK, read_bytes

SITE = Path(__file__).resolve().parent / "site"
WIDGET = "application/vnd.jupyter.widget-view+json"
# In the order in which they are preferred; what a notebook displays in none of these is not shown.
KINDS = ("text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain")

TEXT = "p br hr h1 h2 h3 h4 h5 h6 a b strong i em u s del sub sup small code pre kbd blockquote ul ol li dl dt dd"
BOXES = "div span details summary table caption thead tbody tfoot tr th td colgroup col img"
TAGS = frozenset(f"{TEXT} {BOXES}".split())
STYLES = ("text-align", "vertical-align", "white-space", "font-size", "font-weight", "font-style", "caption-side",
          "overflow-wrap", "color", "background-color", "width", "max-width")  # fmt: skip
# What a table of pandas brings: rules for its own cells, by harmless properties, with no way to fetch anything.
TABLE_STYLE = re.compile(r"<style[^<>]*>([^<]*)</style>", re.IGNORECASE)
LONGEST = 1 << 20  # characters of such rules: a table with a colour a cell has some hundred thousand


def page(notebook: Mapping, home: str = "", facts: Mapping[str, str] | None = None) -> str:
    """The HTML of a notebook (as JSON). `home`: the relative link back; `facts`: told in a line under the title."""
    given = notebook.get("metadata", {}).get("papermill", {}).get("parameters") or {}
    executed = str(notebook.get("metadata", {}).get("papermill", {}).get("start_time") or "")[:10]
    facts = dict(facts or {}) | ({"executed": executed} if executed else {}) | {k: str(v) for k, v in given.items()}
    cells, heading = [], ""
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            heading = next(iter(re.findall(r"^#+ +(.+)$", source, re.MULTILINE)), heading)
            cells.append({"kind": "markdown", "html": _markdown(source)})
        elif cell["cell_type"] == "code" and source.strip():
            outputs = [part for o in _joined(cell.get("outputs", [])) if (part := _output(o, heading))]
            lines = source.count("\n") + 1
            cells.append({"kind": "code", "html": _highlighted(source), "lines": lines, "outputs": outputs})
    return render("page.html.j2", title=title(notebook), cells=cells, home=home, facts=facts)


def write(notebook: Path, target: Path, **more) -> None:
    """Write a notebook's page, whole or not at all. `more` as in `page`; LVMError for what is no notebook."""
    text = page(read(notebook), **more)
    write_whole(target, lambda partial: Path(partial).write_text(text, encoding="utf-8"))


def read(path: Path) -> dict:
    """A notebook's JSON, of format 4. Raises LVMError for what is none."""
    try:
        return nbformat.reads(read_bytes(Path(path), NOTEBOOK).decode("utf-8"), as_version=4)
    except Exception as e:  # whatever a damaged file makes nbformat raise
        raise LVMError(f"{path}: not a notebook that can be read ({type(e).__name__}); execute it again") from e


def title(notebook: Mapping) -> str:
    """A notebook's title: its first heading, as plain text."""
    text = "\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown")
    return next(iter(re.findall(r"^# +(.+)$", text, re.MULTILINE)), "Notebook").strip()


def render(template: str, **values) -> str:
    """A page of lvmlib/site, all values escaped, with the one style and the one script in it."""
    script = (SITE / "site.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = Markup((SITE / "site.css").read_text(encoding="utf-8"))
    return _templates().get_template(template).render(style=style, script=Markup(script), digest=digest, **values)


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(SITE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )


def clean(text: str) -> Markup:
    """HTML without what could run, fetch or lay itself over the page; what is left out is shown as text."""
    styles = [rules for rules in TABLE_STYLE.findall(text) if _of_a_table(rules)]
    kept = bleach.clean(
        TABLE_STYLE.sub("", text),
        tags=TAGS,
        attributes=_attribute,
        protocols=("http", "https", "mailto", "data"),
        css_sanitizer=CSSSanitizer(allowed_css_properties=STYLES),
    )
    return Markup("".join(f"<style>{rules}</style>" for rules in styles) + kept)


def _of_a_table(rules: str) -> bool:
    """Whether CSS is rules for the inside of tables of pandas alone, by harmless properties with plain values."""
    *blocks, rest = rules.split("}")
    for block in blocks:
        selectors, _, declarations = block.partition("{")
        if not all(re.fullmatch(r"#T_[\w #.-]+", selector.strip()) for selector in selectors.split(",")):
            return False
        for declaration in filter(str.strip, declarations.split(";")):
            name, colon, value = declaration.partition(":")
            if not (colon and name.strip() in STYLES and re.fullmatch(r"[\w\s#%.,-]*", value)):
                return False
    return not rest.strip() and len(rules) <= LONGEST


def _attribute(tag: str, name: str, value: str) -> bool:
    if name in ("href", "src"):  # an inner link, one that a reader may follow, a picture that lies in the page
        return {"a": r"#|https?:|mailto:", "img": r"data:image/(png|jpeg|gif);base64,"}.get(tag) is not None and bool(
            re.match({"a": r"#|https?:|mailto:", "img": r"data:image/(png|jpeg|gif);base64,"}[tag], value)
        )
    return name in ("id", "class", "style", "colspan", "rowspan", "scope", "dir", "lang", "alt", "title", "open")


def _markdown(text: str) -> Markup:
    rendered = MarkdownWithMath(renderer=IPythonRenderer(escape=False, exclude_anchor_links=True)).render(text)
    return clean(rendered)


def _highlighted(source: str) -> Markup:
    return Markup(Highlight2HTML(pygments_lexer="ipython3")(source))  # pygments escapes what it marks up


def _joined(outputs: list) -> list:
    """Outputs, neighbouring pieces of one stream as one."""
    joined: list = []
    for output in outputs:
        if output["output_type"] == "stream":
            text = "".join(output["text"])
            if joined and joined[-1].get("name") == output["name"]:
                joined[-1] = {**joined[-1], "text": joined[-1]["text"].rstrip("\n") + "\n" + text}
                continue
            output = {"output_type": "stream", "name": output["name"], "text": text}
        joined.append(output)
    return joined


def _output(output: Mapping, heading: str) -> dict | None:
    """What a cell put out, for the template: its kind and its HTML; None for what is not shown."""
    if output["output_type"] == "stream":
        return {"kind": output["name"], "html": Markup(ansi2html(output["text"].strip("\n")))}
    if output["output_type"] == "error":
        return {"kind": "error", "html": Markup(ansi2html("\n".join(output["traceback"])))}
    data = output.get("data", {})
    if WIDGET in data:
        return {"kind": "note", "html": "A widget: it needs a kernel. Open the notebook in JupyterLab to move it."}
    kind = next((k for k in KINDS if k in data), None)
    if kind is None:
        return None
    text = "".join(data[kind])
    if kind == "text/html":
        return {"kind": "html", "html": clean(text)}
    if kind == "text/markdown":
        return {"kind": "text", "html": _markdown(text)}
    if kind == "text/plain":
        return {"kind": "stdout", "html": Markup(ansi2html(text))}
    if kind == "image/svg+xml":
        text = base64.b64encode(text.encode()).decode()
    source = f"data:{kind};base64,{''.join(text.split())}"
    return {"kind": "figure", "src": source, "alt": f"Figure: {html.unescape(heading)}" if heading else "Figure"}
