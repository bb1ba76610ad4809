"""λ, the weight of the directional loss, batch by batch: numbers in, numbers out (handbook §3).

ρ is the directional share of the loss, λ·L_dir / L_mse. Note that it compares values, not gradients
(handbook §4.1 point 7).
"""

from __future__ import annotations

from typing import NamedTuple

from .params import Control, Gate, Schedule, Steps

TINY = 1e-12  # L_mse and L_dir are positive, but may underflow


def scheduled(steps: Steps, epoch: int) -> float:
    """The value that holds in `epoch` (from 1): that of the last step whose first epoch has come; NaN without steps."""
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

    λ is solved for the target already, so the raise can act only at λ_max, where the range takes it back: as the
    original had it. The cap binds where λ_min alone is more than it allows.
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


class Decision(NamedTuple):
    """λ_eff and ρ of a batch (0 where the directional term is out), the gate's factor, whether the guard skipped."""

    lambda_eff: float
    rho: float
    gate: float
    skip: bool


def decide(c: Control, now: Phase, mse: float, directional: float, pos: float, neg: float) -> Decision:
    """λ_eff for a batch with these detached losses and mean cosines."""
    if c.rule == "none":
        return Decision(0.0, 0.0, 1.0, False)
    if guarded(pos, neg, c.guard):
        return Decision(0.0, 0.0, 1.0, True)
    if c.rule == "fraction":
        lambda_ = fraction(mse, directional, now.fraction, c)
    elif c.rule == "rho_cap":
        lambda_ = rho_cap(mse, directional, now.fraction, now.rho_cap, c)
    elif c.rule == "rho_controller":
        lambda_ = rho_controller(mse, directional, now.rho_target, now.rho_cap, c)
    else:  # fixed
        lambda_ = c.lambda_max
    gate = confidence(pos, c.gate) if c.gate else 1.0
    lambda_ *= gate
    return Decision(lambda_, share(lambda_, mse, directional), gate, False)
