"""Markdown to running text, by mistune."""

from __future__ import annotations

import html
import re

import mistune

_PARSE = mistune.create_markdown(renderer=None, plugins=["table", "footnotes", "strikethrough", "task_lists"])
_DROPPED = {"heading", "block_code", "table", "footnotes", "footnote_ref", "image", "thematic_break", "blank_line"}
_BLOCKS = {"paragraph", "block_text", "block_html", "list_item", "task_list_item"}  # a blank line follows each
_FRONT_MATTER = re.compile(
    r"\A(?:---[ \t]*\n(?=[\w\"'-]+[ \t]*:)|\+\+\+[ \t]*\n).*?\n(?:---|\+\+\+|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL
)
_MARKUP = re.compile(r"<!--.*?(?:-->|\Z)|</?[A-Za-z][^<>]*>", re.DOTALL)


def prose(markdown: str) -> str:
    """Return the running text of a Markdown file: its paragraphs, list items and quotations, blank lines between.

    Left out: front matter, headings, code blocks, tables, rules, images, notes, HTML tags, comments and addresses.
    """
    text = _FRONT_MATTER.sub("", re.sub("\r\n?", "\n", markdown), count=1)
    return "".join(map(_text, _PARSE(text))).strip("\n")


def _text(token: dict) -> str:
    kind, raw = token["type"], token.get("raw", "")
    if kind in _DROPPED:
        return ""
    if kind in ("softbreak", "linebreak"):
        return "\n"
    if kind == "text":
        return html.unescape(raw)
    if kind in ("inline_html", "block_html"):
        raw = _MARKUP.sub(" ", raw)
    text = "".join(map(_text, token["children"])) if "children" in token else raw
    if kind == "link" and token["attrs"]["url"] in (text, f"mailto:{text}"):
        return " "  # an address
    return text + "\n\n" if kind in _BLOCKS else text
