"""λ, the weight of the directional loss, batch by batch: numbers in, numbers out (handbook §3).

ρ = λ·L_dir / L_mse is the directional share of the loss. It compares values, not gradients (handbook §4.1 point 7).
Under rule `constrained`, λ is the constraint's Lagrange multiplier, and `directional` is its shortfall: how far the
batch stays below the bound (`losses.shortfall`), negative where the bound is kept.

A rule is added here: a function, its line in RULES, and its name in `Control.rule`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field, model_validator

from .io.strict import Group, Number, Positive, Weight, Whole, group, wrong

TINY = 1e-12  # L_mse and L_dir are positive, but may underflow


# Settings: the keys `schedule` and `control` of a version


def _rising(steps: tuple) -> tuple:
    firsts = [first for first, _ in steps]
    if firsts and (firsts[0] != 1 or any(a >= b for a, b in pairwise(firsts))):
        raise wrong("", firsts, "first epochs that rise from 1")
    return steps


Steps = Annotated[tuple[tuple[Whole, Weight], ...], AfterValidator(_rising)]  # ((first epoch, value), …)
Gaps = Annotated[tuple[tuple[Whole, Annotated[Number, Field(ge=-2, le=2)]], ...], AfterValidator(_rising)]


@group
class Schedule(Group):
    """Piecewise constant over epochs, which count from 1."""

    margin: Gaps  # m_gap
    fraction: Steps  # rules fraction and rho_cap
    rho_target: Steps  # rules rho_controller, gradient_share and pi: the share that they hold
    rho_cap: Steps  # rules rho_cap and rho_controller

    @model_validator(mode="after")
    def _cap_above_target(self) -> Schedule:
        for epoch in {first for first, _ in (*self.rho_target, *self.rho_cap)}:
            target, cap = scheduled(self.rho_target, epoch), scheduled(self.rho_cap, epoch)
            if target > cap:  # false where either is NaN
                raise wrong("rho_cap", cap, f"at least rho_target {target} (epoch {epoch})")
        return self


@group
class Gate(Group):
    """Confidence gate: λ is multiplied by clamp((mean cos(p, y) − low) / width, 0, 1)."""

    low: Number
    width: Positive


@group
class Constraint(Group):
    """The bound that rule `constrained` keeps on the batch mean of cos(p, y), or of the margin against the context."""

    measure: Literal["cosine", "margin"]
    at_least: Number
    against: tuple[Whole, ...] = (-1,)  # margin: these context vectors, of which the nearest in the mean counts


@group
class Control(Group):
    rule: Literal["none", "fraction", "rho_cap", "rho_controller", "fixed", "gradient_share", "pi", "constrained"]
    lambda_min: Positive  # but a multiplier (rule constrained) may vanish
    lambda_max: Number  # rule `fixed` stays here
    guard: Literal["none", "v2", "v21"]
    gate: Gate | None
    smoothing: Annotated[Number, Field(ge=0, lt=1)] = 0.99  # of the means (gradient_share) and errors (constrained)
    measure: Literal["value", "gradient"] = "value"  # rule pi holds the loss's share at rho_target, or the gradient's
    kp: Weight = 0.0  # gains per batch: of the error in ln λ (pi), of the shortfall in λ (constrained)
    ki: Positive = 0.1
    constraint: Constraint | None = None


# The schedule


def scheduled(steps: Steps, epoch: int) -> float:
    """The value of the last step that has begun in `epoch` (from 1); NaN without one."""
    return next((value for first, value in reversed(steps) if first <= epoch), float("nan"))


class Phase(NamedTuple):
    """What the schedule sets for one epoch; NaN where the version has no such quantity."""

    margin: float
    fraction: float
    rho_target: float
    rho_cap: float


def phase(schedule: Schedule, epoch: int) -> Phase:
    """The schedule's values in `epoch`, from 1."""
    return Phase(*(scheduled(getattr(schedule, name), epoch) for name in Phase._fields))


# The rules


def clamp(x: float, low: float, high: float) -> float:
    return max(low, min(high, x))


def share(lambda_: float, mse: float, directional: float) -> float:
    """ρ = λ·L_dir / L_mse."""
    return lambda_ * directional / max(mse, TINY)


def fraction(mse: float, directional: float, target: float, c: Control) -> float:
    """v1, v2: the λ at which the directional loss is `target` times the mean-square loss, within its range."""
    return clamp(mse * target / max(directional, TINY), c.lambda_min, c.lambda_max)


def rho_cap(mse: float, directional: float, target: float, cap: float, c: Control) -> float:
    """v2.1: as `fraction`, then scaled down where ρ exceeds the cap (below λ_min, if need be)."""
    lambda_ = fraction(mse, directional, target, c)
    rho = share(lambda_, mse, directional)
    return lambda_ * cap / rho if rho > cap else lambda_


def rho_controller(mse: float, directional: float, target: float, cap: float, c: Control) -> float:
    """v2.2: λ for ρ = target; raised once where the range left ρ below 0.8·target, scaled down above the cap.

    As in the original: λ already solves for the target, so the raise acts only at λ_max, and the range takes it back.
    """
    lambda_ = fraction(mse, directional, target, c)
    rho = share(lambda_, mse, directional)
    if rho < 0.8 * target:
        return clamp(lambda_ * target / max(rho, 1e-6), c.lambda_min, c.lambda_max)
    return lambda_ * cap / rho if rho > cap else lambda_


def confidence(pos: float, gate: Gate) -> float:
    """v2.3-confident: clamp((mean cos(p, y) − low) / width, 0, 1)."""
    return clamp((pos - gate.low) / gate.width, 0.0, 1.0)


def guarded(pos: float, neg: float, guard: str) -> bool:
    """Whether the sign guard keeps the directional term out of a batch with these mean cosines to y and prev."""
    if guard == "v2":
        return pos < 0 or neg < 0
    if guard == "v21":
        return pos < 0 or (pos < 0.05 and neg < -0.05)
    return False


class State(NamedTuple):
    """What a rule with a memory carries from batch to batch; plain floats, as `last/state.pt` keeps them."""

    weight: float = 0.0  # of the exponential sums; 0 before the first batch
    mse: float = 0.0  # gradient_share: exponential sums of the two gradients' norms
    directional: float = 0.0
    integral: float = 0.0  # pi: the integral of the error, in ln λ; constrained: the multiplier
    last: float = 0.0  # pi: ln λ of the last batch; constrained: the smoothed shortfall


START = State()  # before the first batch


def gradient_share(norms: tuple[float, float], target: float, c: Control, state: State) -> tuple[float, State]:
    """λ at which the directional gradient at the prediction has `target` times the norm of the mean square's.

    `norms`: ‖μ·∂L_mse/∂raw‖ and ‖∂L_dir/∂raw‖ of the batch. λ comes from their weighted means over all batches so far,
    `c.smoothing`ᵏ for the batch k ago, as in the loss balancer of EnCodec (Défossez et al. 2022, §3.4).
    """
    b = c.smoothing
    weight, mse, directional = (b * x + (1 - b) * y for x, y in zip(state[:3], (1.0, *norms), strict=True))
    lambda_ = fraction(mse / weight, directional / weight, target, c)
    return lambda_, state._replace(weight=weight, mse=mse, directional=directional)


def pi(ratio: float, target: float, c: Control, state: State) -> tuple[float, State]:
    """A PI controller of the share λ·`ratio`, by value (`ratio` = L_dir / L_mse) or of the gradient.

        e_t = ln target − ln(λ_{t−1}·ratio_t),    I_t = I_{t−1} + ki·e_t,    ln λ_t = I_t + kp·e_t

    It starts on the target. At a constant ratio the error follows z² − (1 − ki − kp)·z − kp = 0, which settles for
    kp < 1 and ki + 2·kp < 2. ki = 1, kp = 0 solves for the target in every batch; a smaller ki averages over about
    1/ki batches. Anti-windup: nothing is integrated while λ is at the end of its range that the error pushes to, and
    the integral stays in the range (conditional integration, as in ControlVAE: Shao et al. 2020).
    """
    low, high = math.log(c.lambda_min), math.log(c.lambda_max)
    wanted = math.log(target / max(ratio, TINY))
    start = clamp(wanted, low, high)
    integral, last = (clamp(x, low, high) for x in (state.integral, state.last)) if state.weight else (start, start)
    error = wanted - last
    before = integral + c.kp * error
    if not (before >= high if error > 0 else before <= low):
        integral = clamp(integral + c.ki * error, low, high)
    level = clamp(integral + c.kp * error, low, high)
    return clamp(math.exp(level), c.lambda_min, c.lambda_max), state._replace(weight=1.0, integral=integral, last=level)


def constrained(violation: float, c: Control, state: State) -> tuple[float, State]:
    """The Lagrange multiplier of the constraint `violation` ≤ 0 (`losses.shortfall`): ascent in the dual, by νPI.

        ξ_t = ν·ξ_{t−1} + (1 − ν)·g_t,    λ_t = clamp(λ_{t−1} + ki·g_t + kp·(ξ_t − ξ_{t−1}), 0, λ_max)

    with ν = `c.smoothing` and ξ_{−1} = g_0 (Sohrabi et al. 2024, algorithm 1; kp = 0 is plain gradient ascent). It
    falls to 0, below λ_min, where the constraint does not bind.
    """
    smoothed = c.smoothing * state.last + (1 - c.smoothing) * violation if state.weight else violation
    change = smoothed - state.last if state.weight else 0.0
    multiplier = clamp(state.integral + c.ki * violation + c.kp * change, 0.0, c.lambda_max)
    return multiplier, state._replace(weight=1.0, integral=multiplier, last=smoothed)


def cooled(c: Control, cool: float, rewinds: int) -> Control:
    """The control with the ceiling of λ after so many rewinds: times `cool` at each, never below lambda_min."""
    if not rewinds:
        return c
    return dataclasses.replace(c, lambda_max=max(c.lambda_max * cool**rewinds, c.lambda_min))


def by_gradient(c: Control) -> bool:
    """Whether the schedule's rho_target is a share of the gradient, `rho_gradient` in the tables, not of the loss."""
    return c.rule == "gradient_share" or (c.rule == "pi" and c.measure == "gradient")


class Measured(NamedTuple):
    """What a rule reads of a batch: two losses, and their gradients' `norms`, as `gradient_share` has them."""

    mse: float
    directional: float
    norms: tuple[float, float]


class Rule(NamedTuple):
    """A control rule: `solve` gives λ and the next state; `schedule`: the keys of the schedule that it needs."""

    solve: Callable[[Measured, Phase, Control, State], tuple[float, State]]
    schedule: tuple[str, ...] = ()


def _rho_cap(m: Measured, now: Phase, c: Control, s: State) -> tuple[float, State]:
    return rho_cap(m.mse, m.directional, now.fraction, now.rho_cap, c), s


def _rho_controller(m: Measured, now: Phase, c: Control, s: State) -> tuple[float, State]:
    return rho_controller(m.mse, m.directional, now.rho_target, now.rho_cap, c), s


def _pi(m: Measured, now: Phase, c: Control, s: State) -> tuple[float, State]:
    mse, directional = m.norms if by_gradient(c) else (m.mse, m.directional)
    return pi(directional / max(mse, TINY), now.rho_target, c, s)


RULES: dict[str, Rule] = {
    "none": Rule(lambda m, now, c, s: (0.0, s)),
    "fixed": Rule(lambda m, now, c, s: (c.lambda_max, s), ("margin",)),
    "fraction": Rule(lambda m, now, c, s: (fraction(*m[:2], now.fraction, c), s), ("margin", "fraction")),
    "rho_cap": Rule(_rho_cap, ("margin", "fraction", "rho_cap")),
    "rho_controller": Rule(_rho_controller, ("margin", "rho_target", "rho_cap")),
    "gradient_share": Rule(
        lambda m, now, c, s: gradient_share(m.norms, now.rho_target, c, s), ("margin", "rho_target")
    ),
    "pi": Rule(_pi, ("margin", "rho_target")),
    "constrained": Rule(lambda m, now, c, s: constrained(m.directional, c, s)),
}


# The decision


class Decision(NamedTuple):
    """λ_eff and ρ of a batch (0 where the directional term is out), the gate's factor, whether the guard skipped."""

    lambda_eff: float
    rho: float
    gate: float
    skip: bool
    state: State = START


def decide(
    c: Control,
    now: Phase,
    mse: float,
    directional: float,
    pos: float,
    neg: float,
    state: State = START,
    norms: tuple[float, float] = (math.nan, math.nan),
) -> Decision:
    """Decide λ_eff for a batch with these figures; `norms` (see `gradient_share`) is needed where `by_gradient`.

    `state`: that of the last decision; a batch that the guard skips does not change it.
    """
    if c.rule == "none":
        return Decision(0.0, 0.0, 1.0, False, state)
    if guarded(pos, neg, c.guard):
        return Decision(0.0, 0.0, 1.0, True, state)
    lambda_, state = RULES[c.rule].solve(Measured(mse, directional, norms), now, c, state)
    gate = confidence(pos, c.gate) if c.gate else 1.0
    lambda_ *= gate
    return Decision(lambda_, share(lambda_, mse, directional), gate, False, state)


def at_bound(decision: Decision, bound: float) -> float:
    """1 if λ, before the gate, is at this end of its range, else 0."""
    return float(decision.gate > 0 and math.isclose(decision.lambda_eff, bound * decision.gate))
