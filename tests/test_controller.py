"""λ batch by batch against handbook §3, transcribed here in plain Python, and the versions' rows in `test_family`."""

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
import torch
from test_family import TABLE

from lvmlib import controller
from lvmlib.config import version
from lvmlib.controller import Control, Phase

NAN = float("nan")


def clamped(x, low, high):
    return low if x < low else high if x > high else x


# The handbook's three rules, each with the name of the branch it took.


def by_fraction(mse, dir_, frac, low, high):
    wanted = mse * frac / dir_
    return clamped(wanted, low, high), "low" if wanted < low else "high" if wanted > high else "free"


def by_rho_cap(mse, dir_, frac, cap, low, high):
    lam, branch = by_fraction(mse, dir_, frac, low, high)
    rho = lam * dir_ / mse
    if rho > cap:
        return lam * cap / rho, branch + " capped"
    return lam, branch


def by_rho_controller(mse, dir_, rho_target, rho_cap, low, high):
    lam, branch = by_fraction(mse, dir_, rho_target, low, high)
    rho = lam * dir_ / mse
    if rho < 0.8 * rho_target:
        return clamped(lam * rho_target / max(rho, 1e-6), low, high), branch + " raised"
    if rho > rho_cap:
        return lam * rho_cap / rho, branch + " capped"
    return lam, branch


PLAIN = {"fraction": by_fraction, "rho_cap": by_rho_cap, "rho_controller": by_rho_controller}
FREE = {"low", "free", "high"}
CAPPED = {"low capped", "free capped", "high capped"}
CASES = list(
    itertools.product(
        (1e-8, 1e-5, 2e-4, 1e-3, 2.6e-3, 0.02, 0.5, 3.0),  # L_mse; a mean over D dimensions, about 2.6e-3 at D = 384
        (1e-9, 1e-6, 1e-3, 0.02, 0.17, 0.7, 2.0),  # L_dir
        (0.02, 0.15, 0.25, 0.35),  # what ρ aims at
        (0.01, 0.25, 0.35, 0.50),  # cap: also below the target
        ((1e-4, 0.02), (1e-4, 0.03), (0.01, 0.01)),  # range of λ
    )
)


def same(a, b):
    return a == pytest.approx(b, rel=1e-9)


def control(rule, low=1e-4, high=1.0, guard="none", **settings):
    return Control(rule, low, high, guard, None, **settings)


@pytest.mark.parametrize(
    "rule, branches",
    [("fraction", FREE), ("rho_cap", FREE | CAPPED), ("rho_controller", FREE | CAPPED | {"high raised"})],
)
def test_the_three_rules_of_the_handbook(rule, branches):
    seen = set()
    for mse, dir_, aim, cap, (low, high) in CASES:
        bounds = (aim,) if rule == "fraction" else (aim, cap)
        expected, branch = PLAIN[rule](mse, dir_, *bounds, low, high)
        seen.add(branch)
        found = getattr(controller, rule)(mse, dir_, *bounds, control(rule, low, high))
        assert same(found, expected), (mse, dir_, aim, cap, low, high)
        if branch == "free":
            assert same(found * dir_ / mse, aim)  # where range and cap leave it free, ρ is the target itself
        if "raised" in branch:
            assert found == high  # only the ceiling leaves ρ below 0.8·target: the raise meets it again
    assert seen == branches


@pytest.mark.parametrize("rho_share, raised", [(0.79, True), (0.81, False)])
def test_the_threshold_of_the_raise_is_eight_tenths_of_the_target(rho_share, raised):
    """Past the ceiling the raise changes nothing; above 0.8·target the cap is looked at, below it is not."""
    target, mse, high = 0.25, 0.01, 0.03
    dir_ = rho_share * target * mse / high  # the ceiling gives ρ = rho_share·target
    found = controller.rho_controller(mse, dir_, target, 0.1, control("rho_controller", high=high))
    assert same(found * dir_ / mse, rho_share * target if raised else 0.1)


@pytest.mark.parametrize("mse, dir_", [(0.0, 0.1), (0.01, 0.0), (0.0, 0.0), (1e-30, 1e-30), (1e-30, 1.0), (1.0, 1e-30)])
def test_vanishing_losses_give_a_finite_lambda_in_range(mse, dir_):
    c = control("fraction", high=0.03)
    assert 1e-4 <= controller.fraction(mse, dir_, 0.25, c) <= 0.03
    for rule in (controller.rho_cap, controller.rho_controller):
        assert 0 <= rule(mse, dir_, 0.25, 0.35, c) <= 0.03


# The whole rule of each version, by the handbook's rows


def in_epoch(name, epoch):
    """m_gap, fraction, ρ_target and ρ_cap: of each the last step that has begun."""
    steps = (TABLE[name][f"schedule.{key}"] for key in Phase._fields)
    return [[NAN, *(value for first, value in each if first <= epoch)][-1] for each in steps]


def decided(name, epoch, mse, dir_, pos, neg):
    """(λ_eff, ρ, gate, skip) by the table's row."""
    rule, guard, low, high = (TABLE[name][f"control.{key}"] for key in ("rule", "guard", "lambda_min", "lambda_max"))
    _, frac, target, cap = in_epoch(name, epoch)
    if rule == "none":
        return 0.0, 0.0, 1.0, False
    if guard == "v2" and (pos < 0 or neg < 0):
        return 0.0, 0.0, 1.0, True
    if guard == "v21" and (pos < 0 or (pos < 0.05 and neg < -0.05)):
        return 0.0, 0.0, 1.0, True
    gate = clamped((pos - 0.30) / 0.15, 0, 1) if name == "v23_confident" else 1.0
    aims = {"fraction": (frac,), "rho_cap": (frac, cap), "rho_controller": (target, cap)}
    lam = high if rule == "fixed" else PLAIN[rule](mse, dir_, *aims[rule], low, high)[0]
    return lam * gate, lam * gate * dir_ / mse, gate, False


@pytest.mark.parametrize("name", TABLE)
def test_schedule_and_decision_of_each_version(name):
    v, r, skips = version(name), random.Random(1), 0
    edges = (-0.5, -1e-9, 0.0, 0.02, 0.049, 0.05, 0.30, 0.33, 0.45), (-0.5, -0.051, -0.05, -0.049, -1e-9, 0.0, 0.3)
    for epoch in (*range(1, 13), 40):  # the last values hold in longer runs
        now = controller.phase(v.schedule, epoch)
        assert list(now) == pytest.approx(in_epoch(name, epoch), rel=0, abs=0, nan_ok=True)
        for pos, neg in itertools.product(*edges):
            mse, dir_ = 10 ** r.uniform(-5, 0), 10 ** r.uniform(-4, 0.3)
            found = controller.decide(v.control, now, mse, dir_, pos, neg)
            lam, rho, gate, skip = decided(name, epoch, mse, dir_, pos, neg)
            assert (found.skip, found.gate) == (skip, pytest.approx(gate)), (epoch, mse, dir_, pos, neg)
            assert same(found.lambda_eff, lam) and same(found.rho, rho), (epoch, mse, dir_, pos, neg)
            assert found.state == controller.START  # these rules have no memory
            skips += skip
    assert (skips > 0) == (TABLE[name]["control.guard"] != "none")


def test_the_margins_of_v22_epoch_by_epoch():
    margins = [controller.phase(version("v22").schedule, epoch).margin for epoch in range(1, 13)]
    assert margins == [0.02, 0.02, 0.04, 0.04, 0.06, 0.06, 0.06, 0.06, 0.07, 0.07, 0.07, 0.07]


# The rules with a memory


NOW = Phase(0.05, NAN, 0.25, NAN)


def decide(c, directional, state=controller.START, mse=1.0, pulls=(NAN, NAN)):
    """A decision on a batch with cosines that no guard skips, at ρ_target 0.25."""
    return controller.decide(c, NOW, mse, directional, 0.5, 0.4, state, pulls)


def test_gradient_share_is_the_share_of_two_weighted_means():
    """The means written out as sums over all batches so far, 0.9ᵏ for the one k ago."""
    random = np.random.default_rng(0)
    mse, directional = np.exp(random.normal(-7, 0.5, 40)), np.exp(random.normal(-2, 0.5, 40))
    c, state = control("gradient_share", smoothing=0.9), controller.START
    for t in range(40):
        found = decide(c, 0.2, state, 0.3, (mse[t], directional[t]))
        weights = 0.9 ** np.arange(t, -1, -1.0)
        wanted = 0.25 * np.average(mse[: t + 1], weights=weights) / np.average(directional[: t + 1], weights=weights)
        assert same(found.lambda_eff, wanted), t
        assert same(found.rho, wanted * 0.2 / 0.3)  # ρ stays the share of the value
        state = found.state


@pytest.mark.parametrize(
    "pulls, end", [((1.0, 1e-9), 0.03), ((1e-9, 1.0), 1e-4), ((0.0, 0.0), 1e-4), ((1.0, 0.0), 0.03)]
)
def test_gradient_share_stays_in_its_range(pulls, end):
    assert decide(control("gradient_share", high=0.03), 0.2, mse=0.3, pulls=pulls).lambda_eff == end


def test_a_skipped_batch_leaves_the_state_alone():
    for rule, settings in (("gradient_share", {}), ("pi", {}), ("pi", {"measure": "gradient"})):
        c = control(rule, guard="v21", **settings)
        first = decide(c, 0.2, mse=0.3, pulls=(0.01, 0.1))
        skipped = controller.decide(c, NOW, 9.0, 0.2, -0.5, 0.4, first.state, (9.0, 0.1))
        assert first.state != controller.START and skipped.state == first.state
        assert (skipped.lambda_eff, skipped.skip) == (0.0, True)


def driven(c, steps, value=(2.0, 3.0), gradient=(0.5, 0.7), noise=0.0):
    """λ and the two shares as they were applied, over so many batches of a model that gives way.

    The harder it is pulled, the smaller gets the directional loss: it and the gradient's norm tend to a / (1 + b·λ), a
    tenth of the way a batch. With L_mse = 1 the share λ·a / (1 + b·λ) is s at λ = s / (a − b·s).
    """
    random, state, rows = np.random.default_rng(1), controller.START, []
    (a, b), level = np.transpose([value, gradient]), np.array([value[0], gradient[0]])
    for _ in range(steps):
        batch = level * np.exp(noise * random.normal(size=2))
        found = decide(c, batch[0], state, pulls=(1.0, batch[1]))
        state, lambda_ = found.state, found.lambda_eff
        level += 0.1 * (a / (1 + b * lambda_) - level)
        rows.append((lambda_, *lambda_ * batch))
    return np.array(rows)


@pytest.mark.parametrize("kp, ki", [(0.0, 0.1), (0.1, 0.1), (0.5, 0.3), (0.0, 1.0)])
def test_pi_settles_where_the_share_is_the_target(kp, ki):
    """By value at λ = 0.25 / (2 − 3·0.25) = 0.2; of the gradient at 0.25 / (0.5 − 0.7·0.25), where the value's share is
    another."""
    assert driven(control("pi", kp=kp, ki=ki, measure="value"), 400)[-1, :2] == pytest.approx([0.2, 0.25], rel=1e-6)
    lambda_ = 0.25 / 0.325
    wanted = lambda_, lambda_ * 2 / (1 + 3 * lambda_), 0.25
    assert driven(control("pi", kp=kp, ki=ki, measure="gradient"), 400)[-1] == pytest.approx(wanted, rel=1e-6)


def test_pi_averages_the_noise_of_batches():
    """In logarithms λ varies by ki / (2 − ki) of the noise's variance (an exponential mean's); solving for the target
    in each batch hands it all on. The mean share in ln is on target."""
    slow, at_once = (np.log(driven(control("pi", ki=ki), 8_000, (2.0, 0.0), noise=0.3)[500:]) for ki in (0.1, 1.0))
    assert slow[:, 0].std() == pytest.approx(0.3 * math.sqrt(0.1 / 1.9), rel=0.1)
    assert at_once[:, 0].std() == pytest.approx(0.3, rel=0.05)
    assert slow[:, 1].mean() == pytest.approx(math.log(0.25), abs=0.01)


@pytest.mark.parametrize("ratio, saturated", [(1e-4, 0.3), (1e8, 1e-4)])
def test_pi_does_not_wind_up(ratio, saturated):
    """500 batches out of reach, above or below, then within reach again: a tenth of the way is gone at each batch.

    An integrator without bounds would have to undo 500 batches of errors first: ten times as long.
    """
    c = control("pi", high=0.3, ki=0.1, kp=0.1)
    found = decide(c, 1.0)
    for _ in range(499):
        found = decide(c, ratio, found.state)
    assert found.lambda_eff == pytest.approx(saturated)
    batches = 0
    while abs(found.rho / 0.25 - 1) >= 0.05:
        found, batches = decide(c, 2.0, found.state), batches + 1
    assert batches <= 1.1 * math.log(abs(math.log(0.125 / saturated)) / 0.05) / 0.1 + 1


def test_pi_takes_a_lowered_ceiling():
    c = control("pi", high=0.3)
    found = decide(control("pi", high=0.1), 1e-3, decide(c, 1e-3).state)
    assert found.lambda_eff == pytest.approx(0.1) and found.state.integral == pytest.approx(math.log(0.1))


@pytest.mark.parametrize("kp, nu", [(0.0, 0.0), (0.2, 0.0), (0.5, 0.9)])
@pytest.mark.parametrize("at_least, multiplier", [(3.0, 0.4), (1.5, 0.1), (0.5, 0.0), (-4.0, 0.0)])
def test_the_multiplier_is_the_one_of_karush_kuhn_and_tucker(at_least, multiplier, kp, nu):
    """min ½‖x − a‖² subject to b·x ≥ c, a = (1, 0), b = (1, 2), by descent in x and `decide` in λ.

    At its Karush-Kuhn-Tucker point λ = max(0, (c − b·a) / ‖b‖²) = max(0, (c − 1) / 5), x = a + λ·b.
    """
    a, b = np.array([1.0, 0.0]), np.array([1.0, 2.0])
    c, x, state = control("constrained", high=10.0, ki=0.02, kp=kp, smoothing=nu), np.zeros(2), controller.START
    for _ in range(2000):
        found = decide(c, float(at_least - b @ x), state)
        state = found.state
        x = x - 0.2 * (x - a - found.lambda_eff * b)
    assert found.lambda_eff == pytest.approx(multiplier, abs=1e-6)
    assert x == pytest.approx(a + multiplier * b, abs=1e-6)


def test_a_bound_out_of_reach_leaves_the_multiplier_at_its_ceiling_without_winding_up():
    c, state = control("constrained", high=2.0, ki=0.1, smoothing=0.0), controller.START
    for _ in range(50):
        state = decide(c, 1.0, state).state
    assert state.integral == 2.0
    assert decide(c, -1.0, state).lambda_eff == pytest.approx(1.9)  # it yields at once


@pytest.mark.parametrize("kp, ki, nu", [(0.0, 0.1, 0.0), (0.5, 0.1, 0.0), (2.0, 0.3, 0.9)])
def test_the_multiplier_goes_as_cooper_s_nupi(kp, ki, nu):
    """Step by step against the library's own optimizer on the same shortfalls.

    Its ξ is set to the first of them, as its documentation has it: version 1.0.1 itself begins with 0.
    """
    cooper = pytest.importorskip("cooper", reason='needs the extra "constrained": pip install -e ".[constrained]"')
    multiplier = cooper.multipliers.DenseMultiplier(num_constraints=1)
    multiplier.set_constraint_type(cooper.ConstraintType.INEQUALITY)
    theirs = cooper.optim.nuPI(multiplier.parameters(), lr=1.0, Kp=kp, Ki=ki, ema_nu=nu, maximize=True)
    c, state, ours, expected = control("constrained", high=100.0, kp=kp, ki=ki, smoothing=nu), controller.START, [], []
    violations = np.random.default_rng(0).normal(0.0, 0.3, 200)
    theirs.state[next(multiplier.parameters())]["xi"] = torch.full((1,), violations[0], dtype=torch.float32)
    for violation in violations:
        theirs.zero_grad()
        (multiplier() * torch.tensor(violation)).sum().backward()
        theirs.step()
        multiplier.post_step_()
        expected.append(multiplier().item())
        state = decide(c, float(violation), state).state
        ours.append(state.integral)
    assert ours == pytest.approx(expected, abs=1e-5)
    assert min(ours[5:]) == 0 < max(ours)  # the projection, too


def test_each_rewind_lowers_the_ceiling_and_never_below_the_floor():
    c = dataclasses.replace(version("v22").control, lambda_min=0.01, lambda_max=0.08)
    assert controller.cooled(c, 0.5, 0) == c
    assert [controller.cooled(c, 0.5, n).lambda_max for n in (1, 2, 3, 4)] == [0.04, 0.02, 0.01, 0.01]
    assert dataclasses.replace(controller.cooled(c, 0.5, 4), lambda_max=0.08) == c
