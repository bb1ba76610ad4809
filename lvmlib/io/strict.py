"""Groups of keys that are checked strictly (pydantic), and the first mistake in one line.

    @group
    class Floor(Group):
        tau: Cosine

Unknown keys are refused with the nearest known name. Whole numbers pass as floats; nothing else is converted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any

import pydantic
from pydantic import Field, Strict, TypeAdapter
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from ..errors import LVMError
from .inherit import nearest

Text = Annotated[str, Strict()]
Flag = Annotated[bool, Strict()]
Whole = Annotated[int, Strict(), Field(ge=-(2**63), lt=2**63)]
Count = Annotated[Whole, Field(ge=1)]
Number = Annotated[float, Strict(), Field(gt=-1e300, lt=1e300, allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
Weight = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(gt=0, lt=1)]
Cosine = Annotated[Number, Field(ge=-1, le=1)]

group = dataclass(frozen=True, config={"extra": "forbid"})


@dataclass(frozen=True)
class Group:
    """What all groups of keys share."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _known_keys(cls, content: Any) -> Any:
        if not isinstance(content, Mapping):
            return content
        known = [f.name for f in fields(cls)]
        for key in content:
            if key not in known:
                hint = f"{nearest(key, known)}; known here: {', '.join(known)}"
                raise PydanticCustomError("unknown", hint, {"key": str(key)})
        return dict(content)


def wrong(key: str, value: Any, needed: str) -> PydanticCustomError:
    """Return the error of a validator: `key` of its group, which is `value`, must be `needed`."""
    return PydanticCustomError("wrong", "it must be {needed}", {"key": key, "value": value, "needed": needed})


def validate(kind: TypeAdapter, content: Any, where: str) -> Any:
    """Return `content` as `kind`. Raises LVMError that names `where`, the key, its value, and what is needed."""
    try:
        return kind.validate_python(content)
    except pydantic.ValidationError as e:
        error = e.errors(include_url=False)[0]
    value, needed, details = error["input"], error["msg"].replace("Input should be", "it must be"), error.get("ctx", {})
    places = [p for p in error["loc"] if not str(p).startswith("(")]  # without the tags of a union
    places += filter(None, [details.get("key")])
    key = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in places).lstrip(".")[:80]
    if error["type"] == "unknown":
        raise LVMError(f"{where}: unknown key {key!r}{needed}")
    if error["type"] == "missing":
        raise LVMError(f"{where}: key {key!r} is missing")
    if isinstance(value, str) and error["type"] == "float_type":
        needed += " (in YAML write 1.0e-4: without the dot it is text)"
    if isinstance(value, str) and error["type"] == "literal_error":
        needed += nearest(value, re.findall(r"'(\w+)'", details["expected"]))
    try:
        shown = repr(details.get("value", value))[:500]
    except ValueError:  # Python does not write whole numbers of any length
        shown = "a number of thousands of digits"
    raise LVMError(f"{where}: {key} is {shown}; {needed}")
