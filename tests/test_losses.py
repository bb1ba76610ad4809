"""Every loss term against handbook §3, derived again in plain numpy, one window at a time.

The reference knows no torch. Its gradients are central differences of the plain loops, taken at the raw prediction, so
that they pass through the normalisation p = raw / ‖raw‖. Axes: B batch, T context length, D vector dimension.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from judge.plain import cos

from lvmlib import config, losses
from lvmlib.config import Floor
from lvmlib.controller import Constraint
from lvmlib.errors import LVMError

B, T, D = 4, 5, 6

# The handbook in plain loops. Cosines do not depend on length, so `raw` may stand for p.


def over_windows(function, *rows):
    """The mean of a function of a window's vectors."""
    return np.mean([function(*window) for window in zip(*rows, strict=True)])


def length(a):
    return math.sqrt(a @ a)


def plain_gap(r, t, v):
    return cos(r, t) - cos(r, v)


def plain_ratio(r, t, v):
    return plain_gap(r, t, v) / (abs(cos(r, t)) + abs(cos(r, v)) + 1e-6)


def plain_directional(r, t, v, margin, d):
    by_gap = math.log1p(math.exp(d.gamma * (margin - plain_gap(r, t, v)))) / d.gamma
    by_ratio = math.log1p(math.exp(d.gamma * (d.margin_ratio - plain_ratio(r, t, v)))) / d.gamma
    return {"none": 0.0, "smooth": by_gap, "scale_aware": d.alpha * by_gap + (1 - d.alpha) * by_ratio}[d.kind]


def plain_shortfall(raw, context, y, c):
    places = c.against if c.measure == "margin" else []
    against = max([over_windows(cos, raw, context[:, t]) for t in places], default=0.0)
    return c.at_least - (over_windows(cos, raw, y) - against)


def plain_orthogonality(raw, prev):
    return over_windows(lambda r, v: cos(r, v) ** 2, raw, prev)


def plain_terms(raw, context, y, margin, w, constraint=None):
    """mse, directional, floor, norm, orthogonality."""
    d, prev = w.directional, context[:, w.directional.prev]
    directional = over_windows(lambda *window: plain_directional(*window, margin, d), raw, y, prev)
    return {
        "mse": over_windows(lambda r, t: sum((r - t) ** 2) / len(r), raw, y),
        "directional": plain_shortfall(raw, context, y, constraint) if constraint else directional,
        "floor": over_windows(lambda r, t: max(0.0, w.floor.tau - cos(r, t)) ** 2, raw, y),
        "norm": over_windows(lambda r: (length(r) - 1) ** 2, raw),
        "orthogonality": plain_orthogonality(raw, prev),
    }


def numbers(*tensors):
    return [x.detach().double().numpy() for x in tensors]


def differences(function, at, step=1e-5):
    """Central differences of a plain function of an array, at a tensor."""
    x = at.detach().numpy().copy()
    gradient = np.empty_like(x)
    for i in np.ndindex(x.shape):
        before = x[i]
        x[i] = before + step
        above = function(x)
        x[i] = before - step
        gradient[i] = (above - function(x)) / (2 * step)
        x[i] = before
    return torch.from_numpy(gradient)


def assert_slopes(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


# Batches (raw, y, prev), each (B, D), and versions: (settings, m_gap)


def normal(seed, *shape):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def units(seed, *shape):
    return F.normalize(normal(seed, *shape), dim=-1)


def random_batch(seed, size=B):
    raw, y, prev = normal(seed, 3, size)
    return 0.7 * raw, F.normalize(y, dim=-1), F.normalize(prev, dim=-1)


def axis(*coordinates):
    return F.normalize(torch.tensor([[*coordinates] + [0.0] * (D - len(coordinates))], dtype=torch.float64), dim=-1)


BATCHES = {
    **{f"random {s}": random_batch(s) for s in range(3)},
    "one window": random_batch(9, size=1),
    "p equals target and prev": (axis(1, 2, 3), axis(1, 2, 3), axis(1, 2, 3)),
    "p equals target, opposite prev": (axis(1, 2, 3), axis(1, 2, 3), -axis(1, 2, 3)),
    "p opposite both": (axis(1, 2, 3), -axis(1, 2, 3), -axis(1, 2, 3)),
    "p at right angles to both": (axis(1), axis(0, 1), axis(0, 0, 1)),
    "both cosines tiny": (axis(1), axis(3e-7, 1), axis(-1e-7, 0, 1)),
    "both cosines negative": (axis(1), axis(-0.058, math.sqrt(1 - 0.058**2)), axis(-0.519, 0, math.sqrt(1 - 0.519**2))),
    "raw long": (25 * axis(1, 2, 3), axis(2, -1), axis(0, 1, 1)),
    "raw short": (1e-3 * axis(1, 2, 3), axis(2, -1), axis(0, 1, 1)),
}


def settings(kind="none", gamma=4.0, alpha=0.7, ratio=0.05, prev=-2, floor=(0.0, 0.0), norm=0.0, orthogonality=0.0):
    directional = config.Directional(kind, gamma, alpha, ratio, prev)
    rest = config.Listwise(0.0, 0.1, 128), config.Energy(0.0, 8), directional, Floor(*floor), norm, orthogonality
    return config.Losses(1.0, *rest)


V22 = settings("scale_aware", floor=(0.12, 2e-3), norm=1e-3, orthogonality=5e-4)
VERSIONS = {
    "p6": (settings(), math.nan),  # which has no margin
    "v1": (settings("smooth", gamma=8.0), 0.02),
    "v22": (V22, 0.07),
    "heavy": (settings("scale_aware", 6.0, 0.4, 0.2, -1, (0.6, 3.0), 2.0, 1.5), 0.04),
    "oldest": (settings("smooth", gamma=1.0, prev=-5, floor=(0.9, 1.0), orthogonality=1.0), -0.3),
    "ratio alone": (settings("scale_aware", alpha=0.0, floor=(-0.2, 1.0)), 0.02),
}
CONSTRAINTS = {"cosine": Constraint("cosine", 0.4), "margin": Constraint("margin", 0.1, (-1, -2, -4))}


def context_with(prev, place, seed=7):
    """(B, T, D) with `prev` (B, D) at one place."""
    context = units(seed, len(prev), T)
    context[:, place] = prev
    return context


def full_batch(seed):
    raw, y, prev = random_batch(seed)
    return raw.requires_grad_(), context_with(prev, -2, seed + 50), y


def terms(raw, context, y, margin, weights, **more):
    """The batch and its terms."""
    batch = losses.Batch(raw, F.normalize(raw, dim=-1), context, y, weights, margin, **more)
    return batch, losses.terms(batch)


# Values and gradients


@pytest.mark.parametrize("dtype, close", [(torch.float32, 2e-5), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("name", BATCHES, ids=lambda name: name.replace(" ", "-"))
def test_terms_and_what_is_watched_are_the_handbooks(name, dtype, close):
    raw, y, prev = (x.to(dtype) for x in BATCHES[name])
    if dtype == torch.float32 and name == "both cosines tiny":
        close = 0.05  # the ratio of two cosines of 1e-7 is as exact as they are: float32 gives 1e-7 / 1e-6
    for w, margin in VERSIONS.values():
        context = context_with(prev, w.directional.prev).to(dtype)
        batch, found = terms(raw, context, y, margin, w)
        expected = plain_terms(*numbers(raw, context, y), margin, w)
        expected |= {"listwise": 0, "energy": 0}  # without rivals and samples
        assert list(found) == list(expected) and {term.dtype for term in found.values()} == {dtype}
        watched = losses.health(batch.unit, y, context, w.directional.prev)
        found |= {figure: watched[figure] for figure in ("pos", "neg", "gap", "ratio")}
        r, t, v = numbers(raw, y, prev)
        expected |= {"pos": over_windows(cos, r, t), "neg": over_windows(cos, r, v)}
        expected |= {"gap": over_windows(plain_gap, r, t, v), "ratio": over_windows(plain_ratio, r, t, v)}
        assert {name: float(term) for name, term in found.items()} == pytest.approx(expected, rel=close, abs=close)


def test_weights_of_the_terms():
    w = VERSIONS["heavy"][0]
    assert losses.weights(w, 0.3) == {"mse": 1, "directional": 0.3, "floor": 3, "norm": 2, "orthogonality": 1.5}
    assert losses.weights(settings(), 0.0) == {"mse": 1}


@pytest.mark.parametrize("version, constraint", [*((v, None) for v in VERSIONS), *(("p6", c) for c in CONSTRAINTS)])
def test_gradients_norms_angle_and_backward(version, constraint):
    (w, margin), bound = VERSIONS[version], CONSTRAINTS.get(constraint)
    raw, context, y = full_batch(6)
    rest = *numbers(context, y), margin, w, bound
    expected = plain_terms(*numbers(raw), *rest)
    slopes = {name: differences(lambda r, name=name: plain_terms(r, *rest)[name], raw) for name in expected}
    batch, found = terms(raw, context, y, margin, w, constraint=bound)
    assert found["directional"].item() == pytest.approx(expected["directional"], abs=1e-12)
    gradients = losses.gradients(found, batch)
    norms, angle = losses.gradient_norms(gradients, raw), losses.angle(gradients, raw)
    assert math.isnan(norms["listwise"]) and math.isnan(norms["energy"])  # not of these versions
    if version == "p6" and not bound:
        assert gradients["directional"] is None and math.isnan(norms["directional"]) and math.isnan(angle)
        slopes.pop("directional")
    else:
        between = cos(slopes["mse"].flatten(), slopes["directional"].flatten())
        assert float(angle) == pytest.approx(math.degrees(math.acos(between)), abs=0.01)
    for name, slope in slopes.items():
        assert_slopes(gradients[name], slope)
        assert_slopes(norms[name], slope.norm())
        assert slope.norm() > 1e-3 or name == "floor"
    weights = losses.weights(w, 0.03)
    losses.backward(found, weights, batch, gradients)
    assert_slopes(raw.grad, sum(weight * slopes[name] for name, weight in weights.items() if name in slopes))


def test_ratio_and_hinge_of_known_numbers():
    pos, neg = torch.tensor([[-0.058, 0.5, -0.5, 0.0], [-0.519, 0.5, 0.5, 0.0]])
    # First the handbook's example, §4.1 point 8: two negatives pass for a good ratio.
    assert losses.ratio(pos, neg).tolist() == pytest.approx([0.80, 0, -1, 0], rel=5e-3, abs=1e-5)
    x = torch.tensor([-0.4, 0.05, 0.4], dtype=torch.float64)
    assert losses.hinge(x, 0.05, 4.0)[1].item() == pytest.approx(math.log(2) / 4)  # "near 0.17", §4.1 point 7
    assert losses.hinge(x, 0.05, 1e5).tolist() == pytest.approx([0.45, 0.0, 0.0], abs=1e-5)  # relu


def test_terms_stay_finite_on_a_zero_prediction():
    y, prev = (x[:2].float() for x in random_batch(0)[1:])
    w = settings("scale_aware", floor=(0.1, 1.0), norm=1.0, orthogonality=1.0)
    found = terms(torch.zeros(2, D), torch.stack([y, prev, y], 1), y, 0.02, w)[1]
    assert found["norm"] == 1.0 and found["floor"] == pytest.approx(0.01)  # the cosine counts as 0
    assert all(torch.isfinite(t) for t in found.values())


def test_terms_of_weight_zero_cost_nothing_even_where_they_are_not_finite():
    raw, context, y = full_batch(0)
    batch, found = terms(raw, context, y, 0.0, settings())
    found |= dict.fromkeys(("directional", "floor", "norm"), raw.sum() * math.nan) | {"mse": (2 * raw).sum()}
    losses.backward(found, losses.weights(settings(), 0.0), batch, losses.gradients(found, batch))
    assert torch.equal(raw.grad, torch.full_like(raw, 2.0))


@pytest.mark.parametrize("weights", [[0.2] * 5, [0.5, 0.3, 0.1, -0.4, 0.7], [-1.0] * 5])
def test_escape_is_the_share_of_subtracted_context_vectors(weights):
    context = F.normalize(torch.randn(6, T, 32, generator=torch.Generator().manual_seed(0)).double(), dim=-1)
    weights = torch.tensor(weights, dtype=torch.float64)
    raw = torch.einsum("t,btd->bd", weights, context)
    unit = F.normalize(raw, dim=-1)
    wanted = weights / raw.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(losses.context_weights(unit, context), wanted, atol=1e-3, rtol=1e-3)
    share = -weights.clamp(max=0).sum() / weights.abs().sum()
    assert float(losses.health(unit, unit, context, -2)["escape"]) == pytest.approx(float(share), abs=1e-3)
    one = context[:, :1].expand(6, T, 32)  # finite where the context is one vector
    torch.testing.assert_close(losses.context_weights(one[:, 0], one).sum(1), torch.ones(6).double(), atol=1e-3, rtol=0)


# A term of a user's own


@pytest.fixture
def own():
    """A registered term `far`, and settings that give it the weight 0.5."""
    losses.register("far", lambda b: losses.cosine(b.unit, b.context.mean(1)).square().mean())
    yield dataclasses.replace(V22, extra={"far": 0.5})
    del losses.OWN["far"]


def test_a_registered_term_is_computed_weighted_and_differentiated(own):
    raw, context, y = full_batch(1)
    batch, found = terms(raw, context, y, 0.04, own)
    middle = context.numpy().mean(1)
    assert list(found)[-1] == "far" and found["far"].item() == pytest.approx(plain_orthogonality(*numbers(raw), middle))
    assert losses.weights(own, 0.3) == losses.weights(V22, 0.3) | {"far": 0.5}
    assert_slopes(losses.gradients(found, batch)["far"], differences(lambda r: plain_orthogonality(r, middle), raw))
    assert "far" not in terms(raw, context, y, 0.04, V22)[1]  # versions without it are as before


def test_a_term_must_be_registered_under_a_free_name(own):
    losses.register("far", lambda b: b.raw.sum())  # again: replaced
    for name in ("mse", "a b"):
        with pytest.raises(LVMError, match=name):
            losses.register(name, lambda b: b.raw.sum())
    with pytest.raises(LVMError, match=r"losses\.extra\.near.*far"):
        losses.active(dataclasses.replace(own, extra={"near": 1.0}))


# The listwise loss


def plain_listwise(rankers, chunks, counts, scale):
    def of(p, others, which):
        scores = [math.exp(scale * (p @ c) / length(p)) for c, here in zip(others, which, strict=True) if here]
        return -math.log(scores[0] / sum(scores))

    return over_windows(of, rankers, chunks, counts)


def candidates_of(y, seed=0):
    """(B, 5, D) unit vectors with the target first, and which of them count: the target always, once it alone."""
    counts = torch.rand(B, 5, generator=torch.Generator().manual_seed(seed)) > 0.4
    counts[:, 0], counts[0, 1:] = True, False
    return torch.cat([y[:, None], units(seed, B, 4)], 1), counts


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_listwise(scale):
    raw, y, other = random_batch(2)
    chunks, counts = candidates_of(y)
    rest = chunks.numpy(), counts.numpy()
    by, raw = torch.tensor([scale], dtype=torch.float64, requires_grad=True), raw.requires_grad_()
    found = losses.listwise(losses.Rivals(F.normalize(raw, dim=-1), chunks, counts, by))
    expected = plain_listwise(*numbers(raw), *rest, scale)
    assert expected > 0.1 and found.item() == pytest.approx(expected, rel=1e-12)
    gradient, by_scale = torch.autograd.grad(found, (raw, by))  # finite, though some scores are −∞
    assert_slopes(gradient, differences(lambda r: plain_listwise(r, *rest, scale), raw))
    assert_slopes(by_scale, differences(lambda s: plain_listwise(*numbers(raw), *rest, s[0]), by))
    each = [F.normalize(ranker, dim=-1) for ranker in (raw, y + raw / 2, other)]  # of several rankers, the mean
    expected = sum(losses.listwise(losses.Rivals(unit, chunks, counts, by)) for unit in each) / 3
    torch.testing.assert_close(losses.listwise(losses.Rivals(torch.stack(each, 1), chunks, counts, by)), expected)


# The energy score


def plain_energy(samples, y):
    """The mean over the batch, all pairs in a loop; `samples` (S, B, D)."""

    def of(mine, truth):
        count, others = len(mine), [math.dist(a, b) for i, a in enumerate(mine) for b in np.delete(mine, i, 0)]
        return np.mean([math.dist(x, truth) for x in mine]) - sum(others) / (2 * max(count * (count - 1), 1))

    return over_windows(of, samples.swapaxes(0, 1), y)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_energy_and_its_gradient(count):
    y, x = random_batch(2)[1], normal(0, count, B).requires_grad_()
    found = losses.energy(x, y)
    assert found.shape == (B,) and found.mean().item() == pytest.approx(plain_energy(*numbers(x, y)), rel=1e-12)
    assert_slopes(torch.autograd.grad(found.mean(), x)[0], differences(lambda r: plain_energy(r, y.numpy()), x))


def test_energy_of_equal_samples_is_their_distance_with_a_finite_gradient():
    y = random_batch(2)[1]
    x = normal(0, 1, B).expand(4, B, D).clone().requires_grad_()
    found = losses.energy(x, y)
    torch.testing.assert_close(found, (x[0] - y).norm(dim=-1), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(gradient.sum(0), F.normalize(x[0] - y, dim=-1))


def test_energy_is_least_for_the_true_distribution_whatever_the_number_of_samples():
    """Strictly proper: wider, narrower and shifted normals score higher in the mean, and S does not shift the mean."""
    g, windows = torch.Generator().manual_seed(0), 4000
    truth = torch.randn(windows, 3, generator=g, dtype=torch.float64)

    def score(width, shift=0.0, count=8):
        x = width * torch.randn(count, windows, 3, generator=g, dtype=torch.float64) + shift
        return losses.energy(x, truth).mean().item()

    right = score(1.0)
    assert min(score(0.6), score(1.5), score(1.0, 0.4)) > right + 0.01
    # E‖x − y‖/2 of two normal vectors in 3 dimensions: √2 · √(8/π) / 2
    for count in (2, 8, 30):
        assert score(1.0, count=count) == pytest.approx(math.sqrt(2) * math.sqrt(8 / math.pi) / 2, abs=0.025)


def test_rivals_and_samples_are_differentiated_through_their_own_vectors():
    """The prediction gets the gradient of the mean square alone."""
    raw, context, y = full_batch(4)
    chunks, counts = candidates_of(y)
    rest = chunks.numpy(), counts.numpy(), 7.0
    ranker, samples = normal(3, B).requires_grad_(), normal(0, 5, B).requires_grad_()
    rivals = losses.Rivals(F.normalize(ranker, dim=-1), chunks, counts, torch.tensor(7.0, dtype=torch.float64))
    parts = {"listwise": config.Listwise(2.0, 0.1, 128), "energy": config.Energy(3.0, 5)}
    w = dataclasses.replace(settings(), mean_square=0.3, **parts)
    batch, found = terms(raw, context, y, 0.0, w, rivals=rivals, samples=samples)
    assert found["listwise"].item() == pytest.approx(plain_listwise(*numbers(ranker), *rest))
    assert found["energy"].item() == pytest.approx(plain_energy(*numbers(samples, y)))
    weights = losses.weights(w, 0.0)
    assert weights == {"mse": 0.3, "listwise": 2.0, "energy": 3.0}
    gradients = losses.gradients(found, batch)
    losses.backward(found, weights, batch, gradients)
    assert_slopes(raw.grad, 0.3 * 2 * (raw - y).detach() / (B * D))
    assert_slopes(ranker.grad, 2.0 * differences(lambda r: plain_listwise(r, *rest), ranker))
    slopes = differences(lambda x: plain_energy(x, y.numpy()), samples)
    assert_slopes(samples.grad, 3.0 * slopes)
    norms = losses.gradient_norms(gradients, raw)
    assert math.isnan(norms["listwise"])
    assert_slopes(norms["energy"], slopes.sum(0).norm())  # all samples of a window move together
