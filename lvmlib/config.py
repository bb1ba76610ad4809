"""Versions: small YAML files in `params/`, merged deeply and checked, as frozen dataclasses.

`version("v22", epochs=3)` reads params/v22.yaml, all that it extends down to base.yaml, and then the overrides.
Every mistake is an LVMError that names the file, the key, the value, what is needed, and the nearest known name.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import field, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, TypeAdapter, model_validator

from .controller import RULES, Control, Schedule
from .errors import LVMError
from .io.inherit import flat, known, merge, nearest, read, unknown
from .io.paths import PARAMS, folder_name
from .io.strict import Cosine, Count, Flag, Group, Number, Positive, Share, Text, Weight, Whole, group, validate, wrong
from .models import ARCHITECTURES, generative, several_heads

# Figures of validation by which a checkpoint is chosen, and whether the highest is best.
SELECT = {"val_loss": False, "val_unit_loss": False, "val_energy": False, "novel_mrr": True, "margin": True}


@group
class Files(Group):
    """The original's .npz files (handbook §1), in place of a dataset's name."""

    train: Text | None = None  # sequence files: all three, or none
    val: Text | None = None
    ood: Text | None = None
    articles: Text | None = None  # the article file; alone, it is split and all its windows are taken

    @model_validator(mode="after")
    def _complete(self) -> Files:
        sequences = [name for name in ("train", "val", "ood") if getattr(self, name)]
        if len(sequences) not in (0, 3) or not (sequences or self.articles):
            needed = "the sequence files train, val and ood (all three), an article file (articles), or both"
            raise wrong("", ", ".join(sequences) or "no file", needed)
        return self


@group
class Corruption(Group):
    """What training does to the last context vector, so that copying it is unreliable (handbook §5.6)."""

    share: Annotated[Number, Field(ge=0, le=1)]  # of the windows
    swap: Annotated[Number, Field(ge=0, le=1)]  # of these: replaced by the vector before it; the others are jittered
    jitter: Weight  # normalise(v + jitter·N(0, I))


@group
class Optimizer(Group):
    lr: Positive  # of AdamW
    weight_decay: Weight
    decay: Literal["all", "matrices"]  # what weight_decay shrinks
    clip_norm: Positive  # gradients are clipped to this total norm
    schedule: Literal["plateau", "cosine"]  # of lr: lowered when validation stops improving, or to 0 by a cosine
    plateau_factor: Share  # of ReduceLROnPlateau on the validation loss
    plateau_patience: Annotated[Whole, Field(ge=0)]  # epochs


@group
class Directional(Group):
    """L_dir, handbook §3."""

    kind: Literal["none", "smooth", "scale_aware"]
    gamma: Positive  # sharpness of the softplus
    alpha: Annotated[Number, Field(ge=0, le=1)]  # weight of the gap against the ratio (scale_aware)
    margin_ratio: Cosine  # m_ratio (scale_aware)
    prev: Annotated[Whole, Field(le=-1)]  # the context vector that the prediction is compared with


@group
class Floor(Group):
    tau: Cosine  # cos(p, y) below tau is penalised
    weight: Weight  # β


@group
class Listwise(Group):
    """Cross-entropy of the target among the chunks of its article outside the context, and of other articles."""

    weight: Weight
    temperature: Positive  # at the start; it is learned
    candidates: Count  # at most so many of its article, the target among them, drawn anew each step
    elsewhere: Annotated[Whole, Field(ge=0)] = 0  # chunks of other articles besides, drawn anew for each batch

    @model_validator(mode="after")
    def _has_rivals(self) -> Listwise:
        if self.candidates < 2 and not self.elsewhere:
            raise wrong("candidates", self.candidates, "at least 2 if elsewhere is 0")
        return self


@group
class Energy(Group):
    """Energy score of samples, for a model that has them."""

    weight: Weight
    samples: Annotated[Whole, Field(ge=2)]  # drawn for each window in training


@group
class Losses(Group):
    mean_square: Weight  # the weight of L_mse
    listwise: Listwise
    energy: Energy
    directional: Directional
    floor: Floor
    norm: Weight  # η
    orthogonality: Weight  # κ
    norm_of: Literal["raw", "unit"] = "raw"  # what the norm term acts on; of the unit vector it is 0
    extra: dict[Text, Weight] = field(default_factory=dict)  # weights of terms of your own, by name


@group
class Rewind(Group):
    """The escape guard: at an epoch's end a run that goes wrong returns to its best epoch, with a lower rate."""

    fall: Share  # wrong: the validation novel MRR is below its best by more than this share of it
    escape: Annotated[Number, Field(gt=0, le=1)]  # or the epoch's escape share (`losses.health`) exceeds this
    cool: Share  # then the learning rate and control.lambda_max are multiplied by this
    most: Annotated[Whole, Field(ge=0)]  # rewinds; if one more is due, the run ends


@group
class Expected(Group):
    """What the handbook expects from `from_epoch` on."""

    from_epoch: Whole
    margin: tuple[Number, Number]  # low, high
    recall_at_5: Number
    val_cos: Number
    rho: Number


Pair = tuple[Number | None, Number | None]  # on validation, on OOD


@group
class Published(Group):
    """What the original run gave, on its own data and model, by the mini-5CAT of its training."""

    margin: Number | None  # of the mini-5CAT: against the last context vector, on its first 320 validation windows
    recall_at_5: Number | None  # among six candidates, chance 5/6
    val_cos: Number | None
    note: Text
    full: dict[Text, Pair] | None = None  # by its own 5CAT, of the best checkpoint, first 5,000 windows (handbook §5.3)


def _name_of_digits(data: Any) -> Any:
    """Turn a number back into text: papermill makes one of a dataset's name of digits."""
    return str(data) if isinstance(data, int) and not isinstance(data, bool) else data


Data = Annotated[
    Annotated[Text, Tag("(name)")] | Annotated[Files, Tag("(files)")],
    Discriminator(lambda data: "(files)" if isinstance(data, Mapping | Files) else "(name)"),
    BeforeValidator(_name_of_digits),
]


def _known_model(name: str) -> str:
    if name not in ARCHITECTURES:
        raise wrong("", name, f"one of {', '.join(ARCHITECTURES)}{nearest(name, ARCHITECTURES)}")
    return name


@group
class Version(Group):
    """Everything a run depends on. Built by `version` from the files in params/."""

    name: Text
    about: Text  # the file's first comment line: why this version exists
    extends: Text  # the parent version, empty for the first
    data: Data  # an embedded dataset, world:NAME, a store's folder, or the original's .npz files
    horizon: Count  # the target is this many chunks after the context
    context_length: Annotated[Whole, Field(ge=2)]
    direction: Literal["forward", "backward"]  # backward reads the articles reversed: the control of the arrow of time
    model: Annotated[Text, AfterValidator(_known_model)]
    copied_layers: Flag  # a transformer begins with all its layers alike
    epochs: Count
    select: Literal[*SELECT]  # the best checkpoint is best in this figure of validation
    batch_size: Count
    seed: Annotated[Whole, Field(ge=0)]
    device: Text
    precision: Literal["auto", "float32", "bfloat16"]
    log_every: Count  # steps between two rows of steps.csv
    fast: Flag  # a smoke run: a few hundred windows, two epochs
    optimizer: Optimizer
    corruption: Corruption
    losses: Losses
    control: Control
    schedule: Schedule
    rewind: Rewind | None
    trouble: Literal["go_on", "stop"]  # what a run does at an alarm
    expected: tuple[Expected, ...]
    published: Published

    def to_dict(self) -> dict:
        """Return a plain nested dict, as it is written to `run.yaml`."""
        return _VERSION.dump_python(self, mode="json")

    @model_validator(mode="after")
    def _consistent(self) -> Version:
        for good, key, value, needed in (*_loss_rules(self), *_control_rules(self), *_constraint_rules(self)):
            if not good:
                raise wrong(key, value, needed)
        return self


_VERSION, _DATA = TypeAdapter(Version), TypeAdapter(Data)
Rules = Iterable[tuple[bool, str, Any, str]]  # whether it holds, and else: key, value, what is needed


def _loss_rules(v: Version) -> Rules:
    square, listwise, energy = v.losses.mean_square, v.losses.listwise.weight, v.losses.energy.weight
    own = sum(v.losses.extra.values())
    prev = v.losses.directional.prev
    yield prev >= -v.context_length, "losses.directional.prev", prev, f"-{v.context_length} to -1"
    needed = "above 0 if losses.listwise.weight and losses.energy.weight are 0, and losses.extra is empty"
    yield square + listwise + energy + own > 0, "losses.mean_square", square, needed
    needed = f"one with samples ({', '.join(filter(generative, ARCHITECTURES))}), for losses.energy"
    yield not energy or generative(v.model), "model", v.model, needed
    needed = "one with a single head if losses.mean_square or losses.listwise.weight is 0: a head would stay untrained"
    yield not several_heads(v.model) or (square > 0 and listwise > 0), "model", v.model, needed
    needed = "another figure if losses.energy.weight is 0"
    yield v.select != "val_energy" or energy > 0, "select", v.select, needed


def _control_rules(v: Version) -> Rules:
    c, kind = v.control, v.losses.directional.kind
    yield c.lambda_min <= c.lambda_max, "control.lambda_min", c.lambda_min, f"at most lambda_max {c.lambda_max}"
    needed = f"{'none or constrained' if kind == 'none' else 'a rule'} if losses.directional.kind is {kind!r}"
    yield (kind == "none") == (c.rule in ("none", "constrained")), "control.rule", c.rule, needed
    needed = "kp below 1 and ki + 2·kp below 2 (else the loop of `controller.pi` never settles)"
    yield c.rule != "pi" or (c.kp < 1 and c.ki + 2 * c.kp < 2), "control", (c.kp, c.ki), needed
    if c.rule in ("gradient_share", "pi"):
        yield v.losses.mean_square > 0, "losses.mean_square", v.losses.mean_square, f"above 0 for rule {c.rule}"
        lowest = min((value for _, value in v.schedule.rho_target), default=1.0)
        yield lowest > 0, "schedule.rho_target", lowest, f"above 0 for rule {c.rule}"
    for key in RULES[c.rule].schedule:
        yield bool(getattr(v.schedule, key)), f"schedule.{key}", (), f"steps [[1, value], …], for rule {c.rule}"


def _constraint_rules(v: Version) -> Rules:
    c, bound = v.control, v.control.constraint
    needed = "{measure: …, at_least: …} for rule constrained, and null for the others"
    yield (c.rule == "constrained") == (bound is not None), "control.constraint", bound, needed
    if bound is not None:
        most = {"cosine": 1, "margin": 2}[bound.measure]
        yield -most <= bound.at_least <= most, "control.constraint.at_least", bound.at_least, f"-{most} to {most}"
        inside = bool(bound.against) and all(-v.context_length <= t <= -1 for t in bound.against)
        needed = f"a list of places in the context, -{v.context_length} to -1"
        yield inside, "control.constraint.against", bound.against, needed
        needed = "guard none and gate null for rule constrained"
        yield c.guard == "none" and c.gate is None, "control", (c.guard, c.gate), needed


# Reading versions


def version(name: str, overrides: Mapping[str, Any] | None = None, **top: Any) -> Version:
    """Return the version `name` with `overrides` (nested, merged deeply) and then `top` (top-level keys; None = keep).

    In fast mode the run has at most two epochs. Raises LVMError for an unknown version or key and for a wrong value.
    """
    if name not in known_versions():
        raise LVMError(unknown(name, known_versions()))
    if overrides is not None and not isinstance(overrides, Mapping):
        raise LVMError(f"overrides: {overrides!r} must be a dict, such as {{'optimizer': {{'lr': 1.0e-4}}}}")
    built = _load(name, overrides or {}, {key: value for key, value in top.items() if value is not None})
    return replace(built, epochs=min(built.epochs, 2)) if built.fast else built


def resolved(parameters: Mapping[str, Any], where: str) -> Version:
    """Return the version of a run.yaml's `parameters`, checked; an LVMError names `where`."""
    return validate(_VERSION, parameters, where)


def files(data: str | Files | Mapping) -> str | Files:
    """Return `data` as a version holds it: a name, or Files of a mapping. Raises LVMError for anything else."""
    return validate(_DATA, data, "data")


def known_versions() -> list[str]:
    """Return the names of the version files in the order of the family: by length, then by letter."""
    return known(PARAMS)


def changes(own: Version) -> list[tuple[str, Any, Any]]:
    """Return how a version differs from its parent: (dotted key, parent's value, own value), keys in order."""
    theirs, ours = flat(_load(own.extends or "base").to_dict()), flat(own.to_dict())
    skip = ("name", "about", "extends", "expected", "published")
    return [
        (k, theirs.get(k), ours.get(k))
        for k in {**theirs, **ours}
        if not k.startswith(skip) and theirs.get(k) != ours.get(k)
    ]


def data_name(data: str | Files) -> str:
    """Return what a run's folder and the figures call a dataset: the last part of its name, without .npz."""
    return folder_name((data.articles or data.train) if isinstance(data, Files) else data)


def watched() -> bool:
    """Return whether a person watches: in a terminal or a Jupyter server's kernel (papermill starts its own)."""
    return "JPY_SESSION_NAME" in os.environ or sys.stdout.isatty()


def _load(name: str, *overrides: Mapping) -> Version:
    merged, about, extends = read(PARAMS, name)
    where = f"params/{name}.yaml" + (" with overrides" if any(overrides) else "")
    for over in overrides:
        merged = merge(merged, over)
    for key in ("name", "about", "extends"):
        if key in merged:
            raise LVMError(f"{where}: key {key!r} cannot be set")
    return validate(_VERSION, {**merged, "name": name, "about": about, "extends": extends}, where)
