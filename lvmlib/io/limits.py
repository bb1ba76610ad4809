"""Read untrusted YAML and JSON within limits: maps, lists, texts, numbers and dates, and no other objects.

Invalid content raises ValueError, which the caller turns into an LVMError that names the file.
"""

from __future__ import annotations

import datetime
import json
import os
import zipfile
from pathlib import Path

import yaml

from ..errors import LVMError

LARGEST = 1 << 24  # bytes of such a file: they hold parameters, counts and tables of figures
NOTEBOOK = 1 << 27  # bytes of an executed notebook, with its figures: ours have a few MB
DEEPEST = 50  # maps and lists within each other
MOST = 2_000_000  # values, counted as often as they are referred to: aliases of aliases multiply
DIGITS = 100  # of a number: more are no count, no seed and no size (a fingerprint of digits alone is a text)
UNSAFE_ZIP = 0x41  # flags of an encrypted member


class Loader(yaml.SafeLoader):
    """The safe loader without merge keys, which multiply in memory, and without numbers of any length."""

    def flatten_mapping(self, node):
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "merge keys (<<) are not read", key.start_mark)
        super().flatten_mapping(node)

    def construct_number(self, node):
        if len(str(node.value)) > DIGITS:
            problem = f"a number of more than {DIGITS} digits"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return yaml.SafeLoader.yaml_constructors[node.tag](self, node)


for _kind in ("int", "float"):
    Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", Loader.construct_number)


def read_yaml(path: Path):
    """Return the content of a YAML file. Raises OSError and ValueError."""
    return from_yaml(read_bytes(path))


def from_yaml(raw: bytes, loader: type[Loader] = Loader):
    """Return the content of YAML. Raises ValueError."""
    try:
        content = yaml.load(raw.decode("utf-8-sig"), loader)  # a child of the safe loader
    except RecursionError:
        raise ValueError(f"lists or maps within each other, more than {DEEPEST} deep") from None
    except yaml.YAMLError as e:
        raise ValueError(" ".join(str(e).split())[:500]) from e
    except (TypeError, KeyError, AttributeError, OverflowError) as e:  # a map as a key, a date that there is not
        raise ValueError(f"{type(e).__name__}: {str(e)[:200]}") from e
    return plain(content)


def read_json(path: Path, most: int = LARGEST):
    """Return the content of a JSON file of at most `most` bytes. Raises OSError and ValueError."""
    try:
        return plain(json.loads(read_bytes(path, most)))
    except RecursionError:
        raise ValueError(f"lists or maps within each other, more than {DEEPEST} deep") from None


def read_bytes(path: Path, most: int = LARGEST) -> bytes:
    """Return a whole file. Raises ValueError, before reading it, if it has more than `most` bytes."""
    if path.exists() and not path.is_file():  # a pipe would wait for ever
        raise ValueError(f"{path.name} is no plain file")
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > most:
            raise ValueError(f"{path.name} is larger than {most >> 20} MiB")
        return file.read(most)


def plain(content):
    """Return `content` if it consists of plain values, few and not deeply nested. Raises ValueError otherwise."""
    level, count = [content], 0
    for _ in range(DEEPEST):
        inner = []
        for value in level:
            if isinstance(value, dict):
                for key in value:
                    _check_leaf(key)
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            else:
                _check_leaf(value)
            if count + len(inner) > MOST:
                raise ValueError(f"more than {MOST:,} values, aliases counted at each place")
        if not inner:
            return content
        level, count = inner, count + len(inner)
    raise ValueError(f"lists or maps within each other, more than {DEEPEST} deep")


def _check_leaf(value) -> None:
    if not isinstance(value, str | int | float | datetime.date | None):
        raise ValueError(f"a {type(value).__name__}, where texts, numbers, lists and maps belong")
    if isinstance(value, int) and abs(value) >= 10**DIGITS:
        raise ValueError(f"a number of more than {DIGITS} digits")


def check_state(path: Path) -> None:
    """Raise LVMError unless the file is an uncompressed zip archive, as torch.save writes it.

    Reading it then takes no more memory than the file has bytes. The restricted unpickler checks what it holds.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no plain file")
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        if any(m.compress_type != zipfile.ZIP_STORED or m.flag_bits & UNSAFE_ZIP for m in members):
            raise ValueError("its parts are packed")
        if sum(m.file_size for m in members) > path.stat().st_size:
            raise ValueError("its parts claim more bytes than the file has")
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as e:
        advice = "restore the file, or train anew with `fresh`"
        raise LVMError(f"{path}: cannot be read, it is not what torch.save writes ({e}); {advice}") from e
