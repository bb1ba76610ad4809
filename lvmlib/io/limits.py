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


def _short(build):
    def number(loader, node):
        if len(str(node.value)) > DIGITS:
            mark = node.start_mark
            raise yaml.constructor.ConstructorError(None, None, f"a number of more than {DIGITS} digits", mark)
        return build(loader, node)

    return number


Loader.add_constructor("tag:yaml.org,2002:int", _short(yaml.SafeLoader.construct_yaml_int))
Loader.add_constructor("tag:yaml.org,2002:float", _short(yaml.SafeLoader.construct_yaml_float))


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


def read_json(path: Path):
    """Return the content of a JSON file. Raises OSError and ValueError."""
    try:
        return plain(json.loads(read_bytes(path)))
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
    """Return `content` if it is of plain values, few and not deeply nested. Raises ValueError otherwise."""
    level, count = [content], 0
    for _ in range(DEEPEST):
        inner = []
        for value in level:
            if isinstance(value, dict):
                for key in value:
                    _leaf(key)
                inner += value.values()
                count += len(value)
            elif isinstance(value, list):
                inner += value
                count += len(value)
            else:
                _leaf(value)
            if count > MOST:
                raise ValueError(f"more than {MOST:,} values, aliases counted as often as they stand there")
        if not inner:
            return content
        level = inner
    raise ValueError(f"lists or maps within each other, more than {DEEPEST} deep")


def _leaf(value) -> None:
    if not isinstance(value, str | int | float | datetime.date | None):
        raise ValueError(f"a {type(value).__name__}, where texts, numbers, lists and maps belong")
    if isinstance(value, int) and abs(value) >= 10**DIGITS:
        raise ValueError(f"a number of more than {DIGITS} digits")


def check_state(path: Path) -> None:
    """Raise LVMError unless the file is an uncompressed zip archive, as torch.save writes it.

    Reading it then takes no more memory than the file has bytes. The restricted unpickler checks what it holds.
    """
    advice = "restore the file, or train anew with `fresh`"
    if path.exists() and not path.is_file():
        raise LVMError(f"{path}: cannot be read, it is no plain file; {advice}")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as e:
        raise LVMError(f"{path}: cannot be read, it is not what torch.save writes ({e}); {advice}") from e
    if any(m.compress_type != zipfile.ZIP_STORED or m.flag_bits & UNSAFE_ZIP for m in members):
        raise LVMError(f"{path}: cannot be read, its parts are packed, as torch.save never does; {advice}")
    size = path.stat().st_size
    if sum(m.file_size for m in members) > size:
        raise LVMError(f"{path}: cannot be read, its parts claim more bytes than the {size:,} of the file; {advice}")
