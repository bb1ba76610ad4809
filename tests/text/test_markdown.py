"""Markdown to prose: what stays and what goes, any input, hostile input."""

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lvmlib.text.markdown import prose

MARKDOWN = """---
title: Front
tags: [x]
---
Title
=====

Some *emphasised*, __strong__ and `coded` text with a [link](http://x.y/z_(a) "t"), an ![image](a.png)
and snake_case; 2 * 3 is \\*six\\* <!-- a
comment --> &amp; <b>more</b>[^1]. See <https://x.y>.

| a | b |
|---|--:|
| 1 | 2 |

a | b
--- | ---
1 | 2

## Second ##

- first **item**
1. second [item][ref]
- [x] done

> quoted
> twice

~~~text
code --- | <!--
~~~

    indented code

***

<div align="center">In a <i>block</i>.</div>

Last.

[ref]: http://x
[^1]: A note.
"""


def test_markdown_becomes_prose():
    assert [" ".join(block.split()) for block in prose(MARKDOWN).split("\n\n") if block.strip()] == [
        "Some emphasised, strong and coded text with a link, an and snake_case; 2 * 3 is *six* & more . See .",
        "first item",
        "second item",
        "done",
        "quoted twice",
        "In a block .",
        "Last.",
    ]


@pytest.mark.parametrize(
    ("markdown", "text"),
    [
        ("---\n\nA rule first.\n\n---\n\nAnd one more.", "A rule first. And one more."),
        ("+++\na = 1\n+++\nText.", "Text."),
        ("Text.\n\n```\nnever closed\n\nlost", "Text."),
        ("a\r\nb\r\n```", "a b"),
        ("# Only a heading\n", ""),
        ("Line\\\nbreak, <mailto:a@b.c> ~~gone~~", "Line break, gone"),
    ],
)
def test_small_markdown(markdown, text):
    assert " ".join(prose(markdown).split()) == text


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="a `~*_-=#>|[]()!<:/\\\n\r1.&;", max_size=80))
@example("---\na:\n" * 3)
def test_any_markdown_is_read(text):
    assert text.count("a") >= prose(text).count("a")


PARTS = ("[a](", "![", "<!--", "<a", "*", "_a", "`", "[[", "> ", "| - ", "&", "\\", "- ", "[a]: ", "[^")


@pytest.mark.parametrize("part", PARTS)
def test_hostile_markdown_is_read_in_time(part):
    started = time.monotonic()
    for markdown in (part * 20_000, (part + "\n") * 10_000, "---\na: b\n" + part * 20_000):
        prose(markdown)
    assert time.monotonic() - started < 15
