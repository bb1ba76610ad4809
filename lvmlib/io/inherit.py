"""YAML files that extend one another: small files of nested keys, each with only what differs from its parent."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import LVMError
from . import limits

BASE = "base"  # the file that all others extend in the end


def known(folder: Path) -> list[str]:
    """Return the names of the files but base: by length, then by letter."""
    return sorted((p.stem for p in folder.glob("*.yaml") if p.stem != BASE), key=lambda n: (len(n), n))


def read(folder: Path, name: str, chain: tuple[str, ...] = ()) -> tuple[dict, str, str]:
    """Return a file's content over all that it extends, its own first comment line, and its parent ("" for base).

    Raises LVMError for an unknown parent, a circle, and what is no YAML of keys and values.
    """
    where = f"{folder.name}/{name}.yaml"
    if name in chain:
        raise LVMError(f"{where}: extends itself through {' → '.join((*chain, name))}")
    try:
        text = (folder / f"{name}.yaml").read_text(encoding="utf-8-sig")
        content = limits.from_yaml(text.encode(), _Loader)
    except (OSError, ValueError) as e:
        raise LVMError(f"{where}: cannot be read as YAML ({e})") from e
    if not isinstance(content, dict | None):
        raise LVMError(f"{where}: holds a {type(content).__name__}, but must hold `key: value` lines")
    content = content or {}
    about = text.splitlines()[0].removeprefix("#").strip() if text.startswith("#") else ""
    if name == BASE and "extends" not in content:
        return content, about, ""
    parent = content.pop("extends", BASE)
    if parent not in [BASE, *known(folder)]:
        raise LVMError(f"{where}: extends an {unknown(parent, known(folder))}, {BASE}")
    return merge(read(folder, parent, (*chain, name))[0], content), about, "" if parent == BASE else parent


class _Loader(limits.Loader):
    """The safe loader, which also refuses a key that is given twice (in YAML the last one would win)."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)


def merge(base: Mapping, over: Mapping) -> dict:
    """Return `base` with `over` laid on it, dicts merged at every depth; lists and scalars are replaced whole."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(merged.get(key), Mapping) and isinstance(value, Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def flat(nested: Mapping, prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} → {'a.b': 1}."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def unknown(name: Any, names: list[str]) -> str:
    """Return that there is no version of this name, with the nearest and all known ones."""
    hint = nearest(name if isinstance(name, str) else f"v{name}", names)
    return f"unknown version {name!r}{hint}; known: {', '.join(names)}"


def nearest(name: str, names: Iterable) -> str:
    """Return " (did you mean 'x'?)" for the nearest of `names`, or "" if none is near."""
    close = difflib.get_close_matches(str(name), [str(k) for k in names], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
