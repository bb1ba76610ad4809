"""Versions: small YAML files in `params/`, merged deeply into frozen dataclasses and checked.

`version("v22", epochs=3)` reads params/v22.yaml, what it extends, down to base.yaml, and then the overrides.
Unknown keys, wrong types and impossible values are refused with the file, the key and the nearest known name.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import yaml

from .errors import LVMError
from .io import limits as untrusted
from .io.paths import PARAMS

UNFIT = set('\\*?"<>|`${};')  # signs that no name of a folder made here has: those of paths, shells and markup
LONGEST = 200  # bytes of such a name
GENERATIVE = ("sampler",)  # the models that have samples
SEVERAL_HEADS = ("two_heads", "gated", "committee")  # those whose ranker is another vector than their point
ACTIONS = ("go_on", "stop", "rewind")  # what a run does at an alarm
Steps = tuple[tuple[int, float], ...]  # ((first epoch, value), …): a value holds until the next first epoch


@dataclass(frozen=True)
class Files:
    """The original's .npz files (handbook §1) in place of a dataset's name; `importers` reads them."""

    train: str | None = None  # sequence files: all three, or none
    val: str | None = None
    ood: str | None = None
    articles: str | None = None  # the article file; alone, it is split and all its windows are taken


@dataclass(frozen=True)
class Optimizer:
    lr: float  # AdamW
    weight_decay: float
    decay: Literal["all", "matrices"]  # what weight_decay shrinks
    clip_norm: float  # gradients are clipped to this total norm
    schedule: Literal["plateau", "cosine"]  # of lr: halved where validation stands still, or down to 0 by a cosine
    plateau_factor: float  # ReduceLROnPlateau on the validation loss
    plateau_patience: int


@dataclass(frozen=True)
class Directional:
    """L_dir, handbook §3."""

    kind: Literal["none", "smooth", "scale_aware"]
    gamma: float  # sharpness of the softplus
    alpha: float  # weight of the gap against the ratio (scale_aware)
    margin_ratio: float  # m_ratio (scale_aware)
    prev: int  # the context vector that the prediction is to leave behind


@dataclass(frozen=True)
class Floor:
    tau: float  # cos(p, y) below tau is penalised
    weight: float  # β


@dataclass(frozen=True)
class Listwise:
    """Cross-entropy of the target among the chunks of its article outside the context, and of other articles."""

    weight: float
    temperature: float  # at the start; it is learned
    candidates: int  # at most so many of its article, the target among them, drawn anew each step
    elsewhere: int = 0  # so many chunks of other articles beside them, drawn anew for each batch


@dataclass(frozen=True)
class Energy:
    """Energy score of samples, for a model that has them."""

    weight: float
    samples: int  # drawn for each window in training


@dataclass(frozen=True)
class Losses:
    mean_square: float  # the weight of L_mse
    listwise: Listwise
    energy: Energy
    directional: Directional
    floor: Floor
    norm: float  # η
    orthogonality: float  # κ
    extra: dict[str, float] = dataclasses.field(default_factory=dict)  # weights of terms of your own, by name


@dataclass(frozen=True)
class Gate:
    """Confidence gate: λ is multiplied by clamp((mean cos(p, y) − low) / width, 0, 1)."""

    low: float
    width: float


@dataclass(frozen=True)
class Constraint:
    """What rule `constrained` keeps the batch mean at: cos(p, y), or the margin against context vectors, at least so
    much."""

    measure: Literal["cosine", "margin"]
    at_least: float
    against: tuple[int, ...] = (-1,)  # margin: these context vectors, of which the nearest in the mean counts


@dataclass(frozen=True)
class Control:
    rule: Literal["none", "fraction", "rho_cap", "rho_controller", "fixed", "gradient_share", "pi", "constrained"]
    lambda_min: float  # but a multiplier (rule constrained) may vanish
    lambda_max: float  # rule `fixed` stays here
    guard: Literal["none", "v2", "v21"]
    gate: Gate | None
    smoothing: float = 0.99  # of the exponential means (gradient_share), of the error that kp acts on (constrained)
    measure: Literal["value", "gradient"] = "value"  # what rule pi holds at rho_target: the share of the loss, or this
    kp: float = 0.0  # gains per batch: of the error in ln λ (pi), of the shortfall in λ (constrained)
    ki: float = 0.1
    constraint: Constraint | None = None


@dataclass(frozen=True)
class Rewind:
    """The escape guard, at an epoch's end: back to the best epoch, slower, where a run goes wrong."""

    fall: float  # wrong: the validation novel MRR is below its best by more than this share of it
    escape: float  # or the epoch's escape share (`losses.health`) has risen above this
    cool: float  # then the learning rate and control.lambda_max are multiplied by this
    most: int  # so many rewinds; where one more is due, the run ends


@dataclass(frozen=True)
class Trouble:
    """What a run does at each kind of alarm (`alarms`), one of ACTIONS."""

    broken: str = "go_on"  # which cannot go on: an error, as it always was
    divergence: str = "go_on"
    collapse: str = "go_on"
    escape: str = "go_on"
    control: str = "go_on"


@dataclass(frozen=True)
class Schedule:
    """Piecewise constant over epochs, which count from 1."""

    margin: Steps  # m_gap
    fraction: Steps  # rules fraction and rho_cap
    rho_target: Steps  # rules rho_controller, gradient_share and pi: the share that they hold
    rho_cap: Steps  # rules rho_cap and rho_controller


@dataclass(frozen=True)
class Expected:
    """What the handbook expects from `from_epoch` on; margin as a band (low, high)."""

    from_epoch: int
    margin: tuple[float, float]
    recall_at_5: float
    val_cos: float
    rho: float


@dataclass(frozen=True)
class Published:
    """What the original run gave (on its own data and model)."""

    margin: float | None  # offset-sweep margin, read one step late
    recall_at_5: float | None  # among six candidates, chance 5/6
    val_cos: float | None
    note: str


@dataclass(frozen=True)
class Version:
    """Everything a run depends on. Built by `version`, never by hand; the numbers stand in params/."""

    name: str
    about: str  # the file's first comment line: why this version exists
    extends: str  # the parent version, empty for the first
    data: str | Files  # an embedded dataset, world:NAME, a store's folder, or the original's .npz files
    horizon: int  # the target is this many chunks after the context
    context_length: int
    direction: Literal["forward", "backward"]  # backward reads the articles reversed: the control of the arrow of time
    model: Literal["transformer", "gru", "lstm", "amn", "bilinear", "two_heads", "gated", "committee", "sampler"]
    epochs: int
    select: Literal["val_loss", "novel_mrr", "val_energy"]  # what the best checkpoint is best in, on validation
    batch_size: int
    seed: int
    device: str
    precision: Literal["auto", "float32", "bfloat16"]
    log_every: int  # steps between two rows of steps.csv
    fast: bool  # a smoke run: a few hundred windows, two epochs
    optimizer: Optimizer
    losses: Losses
    control: Control
    schedule: Schedule
    rewind: Rewind | None
    trouble: str | Trouble  # one of ACTIONS for all kinds of alarm, or one for each
    expected: tuple[Expected, ...]
    published: Published

    def to_dict(self) -> dict:
        """Plain nested dict, as `run.yaml` keeps it."""
        return _plain(dataclasses.asdict(self))


def files(data: str | Files | Mapping) -> str | Files:
    """`data` as a version holds it: text, or Files of a mapping, checked. Raises LVMError for what is neither."""
    plain = dataclasses.asdict(data) if isinstance(data, Files) else _named(data)
    built = _value(str | Files, plain, "data", "data")
    if isinstance(built, Files):
        _check_files(built, "data")
    return built


def _named(data: Any) -> Any:
    """`data`, as text where papermill has made a number of a name of digits."""
    return str(data) if isinstance(data, int) and not isinstance(data, bool) else data


def watched() -> bool:
    """Whether a person watches: a terminal, or a kernel that a Jupyter server started (papermill starts its own)."""
    return "JPY_SESSION_NAME" in os.environ or sys.stdout.isatty()


def data_name(data: str | Files) -> str:
    """What a run's folder and the figures call a dataset: the last part of its name, without .npz.

    Raises LVMError where that is no plain name: a dataset is read wherever it lies, but its name is written to.
    """
    if isinstance(data, Files):
        data = data.articles or data.train
    name = data.rstrip("/").rsplit("/", 1)[-1].removesuffix(".npz").replace(":", "-")
    if not name or name.startswith(".") or not name.isprintable() or set(name) & UNFIT or len(name.encode()) > LONGEST:
        raise LVMError(
            f"data {data[:LONGEST]!r}: its runs would lie in a folder of its name, and {name[:LONGEST]!r} is none; the "
            f"last part of the path begins with another sign than '.', has none of {' '.join(sorted(UNFIT))}, and at "
            f"most {LONGEST} bytes"
        )
    return name


def known_versions() -> list[str]:
    """Names of the version files, in the order of the family: by length, then by letter."""
    return sorted((p.stem for p in PARAMS.glob("*.yaml") if p.stem != "base"), key=lambda n: (len(n), n))


def version(name: str, overrides: Mapping[str, Any] | None = None, **top: Any) -> Version:
    """The version `name` with `overrides` (nested, merged deeply) and then `top` (top-level keys; None = keep).

    In fast mode the run has at most two epochs. Raises LVMError for an unknown version (the known ones are
    listed), an unknown key (the nearest is named), a wrong type or an impossible value.
    """
    if name not in known_versions():
        raise LVMError(_unknown(name))
    if overrides is not None and not isinstance(overrides, Mapping):
        raise LVMError(f"overrides: is {overrides!r}; needed is a dict, such as {{'optimizer': {{'lr': 1.0e-4}}}}")
    built = _resolved(name, overrides or {}, {key: value for key, value in top.items() if value is not None})
    return dataclasses.replace(built, epochs=min(built.epochs, 2)) if built.fast else built


def resolved(parameters: Mapping[str, Any], where: str) -> Version:
    """The version of a run.yaml's `parameters`, checked; `where` is what an LVMError names."""
    built = _build(Version, parameters, where)
    _check(built, where)
    return built


def _resolved(name: str, overrides: Mapping = MappingProxyType({}), top: Mapping = MappingProxyType({})) -> Version:
    merged, about, extends = _merged(name)
    where = f"params/{name}.yaml" + (" with overrides" if overrides or top else "")
    merged = merge(merge(merged, overrides), top)
    merged["data"] = _named(merged["data"])
    for key in ("name", "about", "extends"):
        if key in merged:
            raise LVMError(f"{where}: key {key!r} cannot be set")
    built = _build(Version, {**merged, "name": name, "about": about, "extends": extends}, where)
    _check(built, where)
    return built


def changes(own: Version) -> list[tuple[str, Any, Any]]:
    """How a version differs from its parent: (dotted key, parent's value, own value), keys in order."""
    theirs, ours = flat(_resolved(own.extends or "base").to_dict()), flat(own.to_dict())
    skip = ("name", "about", "extends", "expected", "published")
    return [
        (k, theirs.get(k), ours.get(k))
        for k in {**theirs, **ours}
        if not k.startswith(skip) and theirs.get(k) != ours.get(k)
    ]


def merge(base: Mapping, over: Mapping) -> dict:
    """`base` with `over` laid on it, dicts merged at every depth; lists and scalars are replaced whole."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(merged.get(key), Mapping) and isinstance(value, Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def flat(nested: Mapping, prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} → {'a.b': 1}."""
    out: dict[str, Any] = {}
    for key, value in nested.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def _unknown(name: Any) -> str:
    known = known_versions()
    hint = _nearest(name if isinstance(name, str) else f"v{name}", known)
    return f"unknown version {name!r}{hint}; known: {', '.join(known)}"


def _merged(name: str, chain: tuple[str, ...] = ()) -> tuple[dict, str, str]:
    """A version's content over all it extends; its own first comment line; its parent."""
    if name in chain:
        raise LVMError(f"params/{name}.yaml: extends itself through {' → '.join((*chain, name))}")
    text, content = _read(PARAMS / f"{name}.yaml")
    about = text.splitlines()[0].removeprefix("#").strip() if text.startswith("#") else ""
    if name == "base":
        if "extends" in content:
            raise LVMError("params/base.yaml: the base itself extends nothing; drop the key 'extends'")
        return content, about, ""
    parent = content.pop("extends", "base")
    if parent not in ["base", *known_versions()]:
        raise LVMError(f"params/{name}.yaml: extends an {_unknown(parent)}, base")
    return merge(_merged(parent, (*chain, name))[0], content), about, "" if parent == "base" else parent


class _Loader(untrusted.Loader):
    """The safe loader, but a key given twice is an error: YAML itself would let the last one win."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)


def _read(path: Path) -> tuple[str, dict]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = untrusted.from_yaml(text.encode(), _Loader)
    except (OSError, ValueError) as e:
        raise LVMError(f"params/{path.name}: cannot be read as YAML ({e})") from e
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise LVMError(
            f"params/{path.name}: holds {type(content).__name__} {str(content)[:40]!r}; needed are `key: value` lines"
        )
    return text, content


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _build(cls, content: Mapping, where: str, prefix: str = ""):
    hints = typing.get_type_hints(cls)
    for key in content:
        if key not in hints:
            raise LVMError(
                f"{where}: unknown key {prefix + str(key)!r}{_nearest(key, hints)}; known here: {', '.join(hints)}"
            )
    values = {k: _value(hints[k], v, where, prefix + k) for k, v in content.items()}
    missing = [f.name for f in dataclasses.fields(cls) if f.name not in content and f.default is f.default_factory]
    if missing:
        raise LVMError(f"{where}: key {prefix + missing[0]!r} is missing")
    return cls(**values)


def _value(kind, value, where: str, key: str):
    """`value` as `kind`, or LVMError. Whole numbers pass as floats; nothing else is converted."""

    def refuse(needed: str):
        hint = (
            " (in YAML write 1.0e-4: without the dot it is text)"
            if isinstance(value, str) and needed == "a number"
            else ""
        )
        return LVMError(f"{where}: {key} is {_shown(value)}; needed is {needed}{hint}")

    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise refuse(f"a group of keys: {', '.join(f.name for f in dataclasses.fields(kind))}")
        return _build(kind, value, where, key + ".")
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType and types.NoneType in args:  # X | None
        return None if value is None else _value(args[0], value, where, key)
    if origin is types.UnionType:  # text, or a group of keys
        return _value(args[isinstance(value, Mapping)], value, where, key)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise refuse("a group of keys")
        return {str(k): _value(args[1], v, where, f"{key}.{k}") for k, v in value.items()}
    if origin is Literal:
        if value not in args or not isinstance(value, str):
            raise refuse("one of " + ", ".join(args) + (_nearest(value, args) if isinstance(value, str) else ""))
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise refuse("a list")
        if args[-1] is Ellipsis:
            return tuple(_value(args[0], v, where, f"{key}[{i}]") for i, v in enumerate(value))
        if len(value) != len(args):
            raise refuse(f"a list of {len(args)}")
        return tuple(_value(a, v, where, f"{key}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:  # nor NaN
            raise refuse("a number")
        return float(value)
    needed = {int: "a whole number", str: "text", bool: "true or false"}[kind]
    if not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or not -(2**63) < value < 2**63)):
        raise refuse(needed)
    return value


def _shown(value) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python does not write whole numbers of any length
        return "a number of thousands of digits"
    return text if len(text) <= 500 else text[:500] + "…"


def _check(v: Version, where: str) -> None:
    def need(good: bool, key: str, value, needed: str):
        if not good:
            raise LVMError(f"{where}: {key} is {_shown(value)}; needed is {needed}")

    if isinstance(v.data, Files):
        _check_files(v.data, where)
    for key in ("epochs", "batch_size", "horizon", "log_every"):
        need(getattr(v, key) >= 1, key, getattr(v, key), "at least 1")
    need(v.seed >= 0, "seed", v.seed, "0 or more")
    need(v.context_length >= 2, "context_length", v.context_length, "at least 2")
    d, c, o = v.losses.directional, v.control, v.optimizer
    need(-v.context_length <= d.prev <= -1, "losses.directional.prev", d.prev, f"-{v.context_length} to -1")
    need(d.gamma > 0, "losses.directional.gamma", d.gamma, "above 0")
    need(0 <= d.alpha <= 1, "losses.directional.alpha", d.alpha, "0 to 1")
    need(-1 <= d.margin_ratio <= 1, "losses.directional.margin_ratio", d.margin_ratio, "-1 to 1")
    need(-1 <= v.losses.floor.tau <= 1, "losses.floor.tau", v.losses.floor.tau, "a cosine, -1 to 1")
    listwise = v.losses.listwise
    need(listwise.temperature > 0, "losses.listwise.temperature", listwise.temperature, "above 0")
    need(listwise.elsewhere >= 0, "losses.listwise.elsewhere", listwise.elsewhere, "0 or more")
    least = 1 if listwise.elsewhere else 2  # 1: the target alone, among chunks of other articles
    need(listwise.candidates >= least, "losses.listwise.candidates", listwise.candidates, f"at least {least}")
    energy = v.losses.energy
    need(energy.samples >= 2, "losses.energy.samples", energy.samples, "at least 2")
    total = v.losses.mean_square + listwise.weight + energy.weight
    others = "losses.listwise.weight and losses.energy.weight are"
    need(total > 0, "losses.mean_square", v.losses.mean_square, f"above 0 where {others} 0")
    for key, weight in (
        ("mean_square", v.losses.mean_square),
        ("listwise.weight", listwise.weight),
        ("energy.weight", energy.weight),
        ("floor.weight", v.losses.floor.weight),
        ("norm", v.losses.norm),
        ("orthogonality", v.losses.orthogonality),
    ):
        need(weight >= 0, f"losses.{key}", weight, "0 or more")
    needed = f"one with samples ({', '.join(GENERATIVE)}), for losses.energy"
    need(not energy.weight or v.model in GENERATIVE, "model", v.model, needed)
    both = v.losses.mean_square > 0 and listwise.weight > 0
    needed = (
        "one with a single head: losses.mean_square or losses.listwise.weight is 0, and a head would stay untrained"
    )
    need(v.model not in SEVERAL_HEADS or both, "model", v.model, needed)
    needed = "val_loss or novel_mrr, as losses.energy.weight is 0"
    need(v.select != "val_energy" or energy.weight > 0, "select", v.select, needed)
    need(
        0 < c.lambda_min <= c.lambda_max,
        "control.lambda_min",
        c.lambda_min,
        f"above 0 and at most lambda_max {c.lambda_max}",
    )
    need(c.gate is None or c.gate.width > 0, "control.gate.width", c.gate and c.gate.width, "above 0")
    need(o.lr > 0 and o.clip_norm > 0, "optimizer", (o.lr, o.clip_norm), "lr and clip_norm above 0")
    need(
        o.weight_decay >= 0 and o.plateau_patience >= 0,
        "optimizer",
        (o.weight_decay, o.plateau_patience),
        "weight_decay and plateau_patience 0 or more",
    )
    need(0 < o.plateau_factor < 1, "optimizer.plateau_factor", o.plateau_factor, "between 0 and 1")
    need(
        (d.kind == "none") == (c.rule in ("none", "constrained")),
        "control.rule",
        c.rule,
        f"{'none or constrained' if d.kind == 'none' else 'a rule'}, as losses.directional.kind is {d.kind!r}",
    )
    _check_control(v, need)
    if v.rewind is not None:
        _check_rewind(v.rewind, need)
    named = vars(v.trouble) if isinstance(v.trouble, Trouble) else {"": v.trouble}
    for kind, action in named.items():
        need(action in ACTIONS, f"trouble.{kind}".rstrip("."), action, "one of " + ", ".join(ACTIONS))
    needs = {
        "none": (),
        "gradient_share": ("margin", "rho_target"),
        "pi": ("margin", "rho_target"),
        "constrained": (),
        "fraction": ("margin", "fraction"),
        "rho_cap": ("margin", "fraction", "rho_cap"),
        "rho_controller": ("margin", "rho_target", "rho_cap"),
        "fixed": ("margin",),
    }[c.rule]
    for key in needs:
        need(bool(getattr(v.schedule, key)), f"schedule.{key}", (), f"steps [[1, value], …], for rule {c.rule}")
    for f in dataclasses.fields(v.schedule):
        firsts = [first for first, _ in getattr(v.schedule, f.name)]
        need(
            not firsts or (firsts[0] == 1 and all(a < b for a, b in pairwise(firsts))),
            f"schedule.{f.name}",
            firsts,
            "first epochs that rise from 1",
        )
        low, high = (-2, 2) if f.name == "margin" else (0, float("inf"))
        for _, value in getattr(v.schedule, f.name):
            need(low <= value <= high, f"schedule.{f.name}", value, f"{low} to {high}")
    for epoch in {first for first, _ in (*v.schedule.rho_target, *v.schedule.rho_cap)}:
        target, cap = (
            [value for first, value in steps if first <= epoch][-1:]
            for steps in (v.schedule.rho_target, v.schedule.rho_cap)
        )
        need(
            not (target and cap) or target <= cap,
            "schedule.rho_cap",
            cap,
            f"at least rho_target {target} (epoch {epoch})",
        )


def _check_rewind(r: Rewind, need) -> None:
    need(0 < r.fall < 1, "rewind.fall", r.fall, "a share of the best novel MRR, between 0 and 1")
    need(0 < r.escape <= 1, "rewind.escape", r.escape, "above 0 and at most 1, which is never exceeded")
    need(0 < r.cool < 1, "rewind.cool", r.cool, "between 0 and 1")
    need(r.most >= 0, "rewind.most", r.most, "0 or more")


def _check_control(v: Version, need) -> None:
    """The parameters of the rules with a memory."""
    c = v.control
    need(0 <= c.smoothing < 1, "control.smoothing", c.smoothing, "at least 0 and below 1")
    need(c.kp >= 0 and c.ki > 0, "control", (c.kp, c.ki), "kp 0 or more, and ki above 0")
    if c.rule == "pi":  # the poles of the loop that `controller.pi` describes lie inside the unit circle
        need(
            c.kp < 1 and c.ki + 2 * c.kp < 2,
            "control",
            (c.kp, c.ki),
            "kp below 1 and ki + 2·kp below 2, or it never settles",
        )
    if c.rule in ("gradient_share", "pi"):
        need(v.losses.mean_square > 0, "losses.mean_square", v.losses.mean_square, f"above 0 for rule {c.rule}")
        lowest = min((value for _, value in v.schedule.rho_target), default=1.0)
        need(lowest > 0, "schedule.rho_target", lowest, f"above 0 for rule {c.rule}")
    need(
        (c.rule == "constrained") == (c.constraint is not None),
        "control.constraint",
        c.constraint,
        "{measure: …, at_least: …} for rule constrained, and null for the others",
    )
    if c.constraint is not None:
        most = {"cosine": 1, "margin": 2}[c.constraint.measure]
        bound = c.constraint.at_least
        need(-most <= bound <= most, "control.constraint.at_least", bound, f"-{most} to {most}")
        against = c.constraint.against
        places = bool(against) and all(-v.context_length <= t <= -1 for t in against)
        need(
            places, "control.constraint.against", against, f"a list of places in the context, -{v.context_length} to -1"
        )
        need(
            c.guard == "none" and c.gate is None, "control", (c.guard, c.gate), "guard none and gate null: constrained"
        )


def _check_files(data: Files, where: str) -> None:
    sequences = [name for name in ("train", "val", "ood") if getattr(data, name)]
    if len(sequences) not in (0, 3) or not (sequences or data.articles):
        raise LVMError(
            f"{where}: data names {', '.join(sequences) or 'no file'}; needed are the sequence files train, val and "
            "ood, all three, or an article file (articles), or both"
        )


def _plain(value):
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
