"""Every loss term against handbook §3, derived again in plain Python floats, one sample at a time.

The reference knows no torch: its gradients are central differences of the plain loops, taken at the raw
prediction, so that they pass through the normalisation p = raw / ‖raw‖.
"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from lvmlib import config as params
from lvmlib import losses
from lvmlib.config import Floor
from lvmlib.errors import LVMError

B, T, D = 4, 5, 6
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}
DTYPES = [torch.float32, torch.float64]


# The handbook in plain Python: rows are lists of floats.


def weighted_sum(terms, weights):
    """The weighted sum of the terms; a term without a weight costs no gradient."""
    return sum((weight * terms[name] for name, weight in weights.items()), torch.zeros_like(terms["mse"]))


def make_directional(kind="none", gamma=4.0, alpha=0.7, margin_ratio=0.05, prev=-2):
    return params.Directional(kind, gamma, alpha, margin_ratio, prev)


def make_losses(directional=None, floor=None, norm=0.0, orthogonality=0.0):
    rest = directional or make_directional(), floor or Floor(0.0, 0.0), norm, orthogonality
    return params.Losses(1.0, params.Listwise(0.0, 0.1, 128), params.Energy(0.0, 8), *rest)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def length(a):
    return math.sqrt(dot(a, a))


def cos(a, b):
    return dot(a, b) / (length(a) * length(b))


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def plain_mse(raw, y):
    return mean((a - b) ** 2 for r, t in zip(raw, y, strict=True) for a, b in zip(r, t, strict=True))


def plain_gap(r, t, v):
    return cos(r, t) - cos(r, v)


def plain_ratio(r, t, v):
    return plain_gap(r, t, v) / (abs(cos(r, t)) + abs(cos(r, v)) + 1e-6)


def plain_smooth(raw, y, prev, margin, gamma):
    return mean(softplus(gamma * (margin - plain_gap(*row))) / gamma for row in zip(raw, y, prev, strict=True))


def plain_scale_aware(raw, y, prev, margin, gamma, alpha, margin_ratio):
    return mean(
        alpha * softplus(gamma * (margin - plain_gap(*row))) / gamma
        + (1 - alpha) * softplus(gamma * (margin_ratio - plain_ratio(*row))) / gamma
        for row in zip(raw, y, prev, strict=True)
    )


def plain_floor(raw, y, tau):
    return mean(max(0.0, tau - cos(r, t)) ** 2 for r, t in zip(raw, y, strict=True))


def plain_norm(raw):
    return mean((length(r) - 1) ** 2 for r in raw)


def plain_orthogonality(raw, prev):
    return mean(cos(r, v) ** 2 for r, v in zip(raw, prev, strict=True))


# Batches: (raw, y, prev), each (B, D). Cosines do not depend on length, so the plain loops may take raw for p.


def random_batch(seed, dtype=torch.float64, size=B):
    g = torch.Generator().manual_seed(seed)
    raw, y, prev = (torch.randn(size, D, generator=g, dtype=torch.float64) for _ in range(3))
    return tuple(x.to(dtype) for x in (0.7 * raw, F.normalize(y, dim=-1), F.normalize(prev, dim=-1)))


def axis(*coordinates):
    return F.normalize(torch.tensor([[*coordinates] + [0.0] * (D - len(coordinates))], dtype=torch.float64), dim=-1)


EDGES = {
    "p equals target and prev": (axis(1, 2, 3), axis(1, 2, 3), axis(1, 2, 3)),
    "p equals target, opposite prev": (axis(1, 2, 3), axis(1, 2, 3), -axis(1, 2, 3)),
    "p opposite target, equals prev": (axis(1, 2, 3), -axis(1, 2, 3), axis(1, 2, 3)),
    "p opposite both": (axis(1, 2, 3), -axis(1, 2, 3), -axis(1, 2, 3)),
    "p at right angles to both": (axis(1), axis(0, 1), axis(0, 0, 1)),
    "both cosines tiny": (axis(1), axis(3e-7, 1), axis(-1e-7, 0, 1)),
    "both cosines negative": (axis(1), axis(-0.058, math.sqrt(1 - 0.058**2)), axis(-0.519, 0, math.sqrt(1 - 0.519**2))),
    "raw long": (25 * axis(1, 2, 3), axis(2, -1), axis(0, 1, 1)),
    "raw short": (1e-3 * axis(1, 2, 3), axis(2, -1), axis(0, 1, 1)),
}
BATCHES = {**{f"random {s}": random_batch(s) for s in range(4)}, "batch of one": random_batch(9, size=1), **EDGES}


@pytest.fixture(params=BATCHES, ids=lambda name: name.replace(" ", "-"))
def batch(request):
    return BATCHES[request.param]


def plain(*tensors):
    return [t.double().tolist() for t in tensors]


def close(value, expected, dtype):
    assert value.shape == ()
    assert value.dtype == dtype
    assert float(value) == pytest.approx(expected, rel=TOLERANCE[dtype], abs=TOLERANCE[dtype])


# Values

SETTINGS = {  # name of a term: arguments beside the vectors
    "mse": [()],
    "directional_smooth": [(0.02, 8.0), (0.05, 4.0), (0.0, 1.0), (-0.3, 4.0)],
    "directional_scale_aware": [(0.02, 4, 0.7, 0.05), (0.07, 4, 0.7, 0.05), (0.04, 8, 0.2, 0.3), (0.02, 4, 0.0, 0.05)],
    "floor": [(0.10,), (0.12,), (0.9,), (-0.2,)],
    "norm": [()],
    "orthogonality": [()],
}
TAKES = {"mse": "ry", "floor": "py", "norm": "r", "orthogonality": "pv"}  # r raw, p unit, y target, v prev; else "pyv"
PLAIN = {
    "mse": plain_mse,
    "directional_smooth": plain_smooth,
    "directional_scale_aware": plain_scale_aware,
    "floor": plain_floor,
    "norm": plain_norm,
    "orthogonality": plain_orthogonality,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_each_term_is_the_handbooks(batch, name, dtype):
    raw, y, prev = (x.to(dtype) for x in batch)
    given = {"r": raw, "p": F.normalize(raw, dim=-1), "y": y, "v": prev}
    code = [given[x] for x in TAKES.get(name, "pyv")]
    plainly = plain(*(given[x.replace("p", "r")] for x in TAKES.get(name, "pyv")))
    # The ratio of two cosines of 1e-7 is as exact as the cosines: float32 gives 1e-7 / 1e-6.
    rough = dtype == torch.float32 and "scale_aware" in name and batch is EDGES["both cosines tiny"]
    for arguments in SETTINGS[name]:
        value, expected = getattr(losses, name)(*code, *arguments), PLAIN[name](*plainly, *arguments)
        if rough:
            assert float(value) == pytest.approx(expected, rel=0.05, abs=0.05)
        else:
            close(value, expected, dtype)


def test_gap_and_ratio_are_per_sample(batch):
    raw, y, prev = batch
    pos, neg = losses.cosine(raw, y), losses.cosine(raw, prev)
    rows = list(zip(*plain(raw, y, prev), strict=True))
    assert losses.gap(pos, neg).tolist() == pytest.approx([plain_gap(*row) for row in rows], abs=1e-12)
    assert losses.ratio(pos, neg).tolist() == pytest.approx([plain_ratio(*row) for row in rows], abs=1e-9)


@pytest.mark.parametrize(
    "pos, neg, expected",
    [
        (-0.058, -0.519, 0.80),  # the handbook's example, §4.1 point 8: two negatives pass for a good ratio
        (0.5, 0.5, 0.0),
        (0.5, -0.5, 1.0),
        (-0.5, 0.5, -1.0),
        (0.6, 0.2, 0.5),
        (0.0, 0.0, 0.0),
        (1e-6, 0.0, 0.5),
        (0.0, 1e-6, -0.5),
        (1e-9, 0.0, 1e-3),
    ],
)
def test_ratio_of_known_cosines(pos, neg, expected):
    value = losses.ratio(torch.tensor([pos], dtype=torch.float64), torch.tensor([neg], dtype=torch.float64))
    assert value.item() == pytest.approx(expected, rel=5e-3, abs=1e-5)


def test_hinge_is_ln2_over_gamma_at_the_margin_and_tends_to_relu():
    x = torch.tensor([-0.4, 0.05, 0.4], dtype=torch.float64)
    assert losses.hinge(x, 0.05, 4.0)[1].item() == pytest.approx(math.log(2) / 4)  # "near 0.17", §4.1 point 7
    assert losses.hinge(x, 0.05, 8.0)[1].item() == pytest.approx(math.log(2) / 8)
    assert losses.hinge(x, 0.05, 1e5).tolist() == pytest.approx([0.45, 0.0, 0.0], abs=1e-5)


# Terms, total, health

VERSIONS = {
    "p6": make_losses(),
    "v1": make_losses(make_directional("smooth", gamma=8.0)),
    "v21": make_losses(make_directional("scale_aware"), Floor(0.10, 1e-3), 1e-3),
    "v22": make_losses(make_directional("scale_aware"), Floor(0.12, 2e-3), 1e-3, 5e-4),
    "heavy": make_losses(
        make_directional("scale_aware", gamma=6.0, alpha=0.4, margin_ratio=0.2, prev=-1), Floor(0.6, 3.0), 2.0, 1.5
    ),
    "oldest": make_losses(make_directional("smooth", prev=-5), orthogonality=1.0),
}


def plain_terms(raw, context, y, margin, w):
    """[mse, directional, floor, norm, orthogonality] of lists of floats."""
    d, prev = w.directional, [c[w.directional.prev] for c in context]
    kind = {
        "none": lambda: 0.0,
        "smooth": lambda: plain_smooth(raw, y, prev, margin, d.gamma),
        "scale_aware": lambda: plain_scale_aware(raw, y, prev, margin, d.gamma, d.alpha, d.margin_ratio),
    }
    return [
        plain_mse(raw, y),
        kind[d.kind](),
        plain_floor(raw, y, w.floor.tau),
        plain_norm(raw),
        plain_orthogonality(raw, prev),
    ]


def terms(raw, context, y, margin, weights, **more):
    """The batch and its terms."""
    batch = losses.Batch(raw, F.normalize(raw, dim=-1), context, y, weights, margin, **more)
    return batch, losses.terms(batch)


def total(raw, context, y, margin, weights, lambda_eff, **more):
    found = terms(raw, context, y, margin, weights, **more)[1]
    return weighted_sum(found, losses.weights(weights, lambda_eff))


def plain_total(raw, context, y, margin, w, lambda_eff):
    mse, directional, floor, norm, orthogonality = plain_terms(raw, context, y, margin, w)
    return mse + lambda_eff * directional + w.floor.weight * floor + w.norm * norm + w.orthogonality * orthogonality


def full_batch(seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    raw = 0.8 * torch.randn(B, D, generator=g, dtype=torch.float64)
    context = F.normalize(torch.randn(B, T, D, generator=g, dtype=torch.float64), dim=-1)
    y = F.normalize(torch.randn(B, D, generator=g, dtype=torch.float64), dim=-1)
    return raw.to(dtype), context.to(dtype), y.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VERSIONS)
def test_terms_and_total(name, dtype):
    weights = VERSIONS[name]
    for seed in range(3):
        raw, context, y = full_batch(seed, dtype)
        found = terms(raw, context, y, 0.04, weights)[1]
        expected = plain_terms(*plain(raw, context, y), 0.04, weights)
        assert list(found) == ["mse", "directional", "floor", "norm", "orthogonality", "listwise", "energy"]
        for value, number in zip(found.values(), [*expected, 0.0, 0.0], strict=True):
            close(value, number, dtype)
        for lambda_eff in (0.0, 1e-4, 0.03, 2.0):
            expected = plain_total(*plain(raw, context, y), 0.04, weights, lambda_eff)
            close(total(raw, context, y, 0.04, weights, lambda_eff), expected, dtype)


def test_terms_stay_finite_on_a_zero_prediction():
    y, prev = random_batch(0, torch.float32, size=2)[1:]
    weights = make_losses(make_directional("scale_aware"), Floor(0.1, 1.0), 1.0, 1.0)
    found = terms(torch.zeros(2, D), torch.stack([y, prev, y], 1), y, 0.02, weights)[1]
    assert found["norm"] == 1.0
    assert found["floor"] == pytest.approx(0.01)  # cosine counts as 0
    assert all(torch.isfinite(t) for t in found.values())


def test_a_version_without_a_directional_loss_has_no_gradient_and_no_pull_of_it():
    raw, context, y = full_batch(0)
    batch, found = terms(raw.requires_grad_(), context, y, float("nan"), make_losses())  # p6 has no margin
    assert found["directional"] == 0 and not found["directional"].requires_grad
    pulls = losses.pulls(losses.gradients(found, batch), raw)
    assert math.isnan(pulls["pull_directional"]) and math.isnan(pulls["angle"]) and pulls["pull_mse"] > 0


def test_terms_of_weight_zero_cost_nothing_even_where_they_are_not_finite():
    nan, mse = (torch.tensor(x, requires_grad=True) for x in (float("nan"), 2.0))
    value = weighted_sum(dict.fromkeys(losses.TERMS, nan) | {"mse": mse}, losses.weights(make_losses(), 0.0))
    value.backward()
    assert (value.item(), mse.grad, nan.grad) == (2.0, 1.0, None)


def test_pulls_are_the_norms_of_the_finite_differences():
    raw, context, y = full_batch(0)
    weights = make_losses(directional=make_directional("scale_aware"), floor=Floor(0.9, 1.0))
    batch, found = terms(raw.requires_grad_(), context, y, 0.05, weights)
    pulls, gradients = losses.pulls(losses.gradients(found, batch), raw), {}
    lists = plain(context, y)
    for i, name in enumerate(list(found)[:5]):
        slope = differences(lambda r, i=i: plain_terms(r, *lists, 0.05, weights)[i], raw.detach())
        gradients[name] = slope.flatten()
        assert float(pulls[f"pull_{name}"].detach()) == pytest.approx(float(slope.norm()), rel=1e-6, abs=1e-8)
    assert math.isnan(pulls["pull_listwise"]) and math.isnan(pulls["pull_energy"])  # not of this version
    a, b = gradients["mse"], gradients["directional"]
    assert float(pulls["angle"]) == pytest.approx(math.degrees(math.acos(float(a @ b / a.norm() / b.norm()))), abs=0.01)


# A term of a user's own


@pytest.fixture
def own():
    """A registered term `far`, and settings that give it the weight 0.5."""
    losses.register("far", lambda b: losses.cosine(b.unit, b.context.mean(1)).square().mean())
    yield dataclasses.replace(VERSIONS["v22"], extra={"far": 0.5})
    losses.OWN.clear()


def test_a_registered_term_is_computed_weighted_and_pulls(own):
    raw, context, y = full_batch(1)
    batch, found = terms(raw.requires_grad_(), context, y, 0.04, own)
    middle = [[sum(x) / T for x in zip(*rows, strict=True)] for rows in context.tolist()]
    expected = plain_orthogonality(raw.tolist(), middle)
    assert list(found)[-1] == "far" and float(found["far"]) == pytest.approx(expected)
    without = plain_total(*plain(raw, context, y), 0.04, own, 0.3)
    weights = losses.weights(own, 0.3)
    assert float(weighted_sum(found, weights)) == pytest.approx(without + 0.5 * expected)
    gradients = losses.gradients(found, batch)
    (wanted,) = torch.autograd.grad(weighted_sum(found, weights), raw, retain_graph=True)
    losses.backward(found, weights, batch, gradients)
    torch.testing.assert_close(raw.grad, wanted)
    slope = differences(lambda r: plain_orthogonality(r, middle), raw.detach())
    assert float(losses.pulls(gradients, raw)["pull_far"]) == pytest.approx(float(slope.norm()), rel=1e-6)
    assert "far" not in terms(raw, context, y, 0.04, VERSIONS["v22"])[1]  # versions without it are as before


def test_a_term_must_be_registered_under_a_free_name(own):
    losses.register("far", lambda b: b.raw.sum())  # again: replaced
    for name in ("mse", "a b"):
        with pytest.raises(LVMError, match=name):
            losses.register(name, lambda b: b.raw.sum())
    with pytest.raises(LVMError, match=r"losses\.extra\.near.*far"):
        losses.active(dataclasses.replace(own, extra={"near": 1.0}))


def test_health(batch):
    raw, y, prev = batch
    unit = F.normalize(raw, dim=-1).requires_grad_()
    context = torch.stack([y.roll(1, 0), prev, y + prev], 1)  # (B, 3, D); prev stands second
    found = losses.health(unit, y, context, -2)
    rows = list(zip(*plain(raw, y, prev), strict=True))
    assert set(found) == {"pos", "neg", "gap", "ratio", "escape"}
    assert not any(x.requires_grad for x in found.values())
    assert float(found["pos"]) == pytest.approx(mean(cos(r, t) for r, t, _ in rows), abs=1e-12)
    assert float(found["neg"]) == pytest.approx(mean(cos(r, v) for r, _, v in rows), abs=1e-12)
    assert float(found["gap"]) == pytest.approx(mean(plain_gap(*row) for row in rows), abs=1e-12)
    assert float(found["ratio"]) == pytest.approx(mean(plain_ratio(*row) for row in rows), abs=1e-9)


def test_escape_is_the_share_of_subtracted_context_vectors():
    context = F.normalize(torch.randn(6, 5, 32, dtype=torch.float64), dim=-1)
    for weights in ([0.2] * 5, [0.5, 0.3, 0.1, -0.4, 0.7], [-1.0, -1.0, -1.0, -1.0, -1.0]):
        raw = torch.einsum("t,btd->bd", torch.tensor(weights, dtype=torch.float64), context)
        unit = raw / raw.norm(dim=-1, keepdim=True)
        found = losses.context_weights(unit, context)
        wanted = torch.tensor(weights, dtype=torch.float64) / raw.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
        share = sum(-w for w in weights if w < 0) / sum(abs(w) for w in weights)
        assert float(losses.health(unit, unit, context, -2)["escape"]) == pytest.approx(share, abs=1e-3)


def test_context_weights_stay_finite_where_the_context_is_one_vector():
    context = F.normalize(torch.randn(3, 1, 8), dim=-1).expand(3, 5, 8)
    weights = losses.context_weights(context[:, 0], context)
    assert bool(weights.isfinite().all())
    torch.testing.assert_close(weights.sum(1), torch.ones(3), atol=1e-3, rtol=0)


# Gradients with respect to the raw prediction, through the normalisation


def differences(function, raw, step=1e-5):
    """Central differences of a plain function of lists of floats."""
    rows, gradient = raw.tolist(), torch.zeros_like(raw)
    for i in range(raw.shape[0]):
        for j in range(raw.shape[1]):
            at = rows[i][j]
            rows[i][j] = at + step
            above = function(rows)
            rows[i][j] = at - step
            gradient[i, j] = (above - function(rows)) / (2 * step)
            rows[i][j] = at
    return gradient


def autograd(function, raw):
    raw = raw.clone().requires_grad_()
    return torch.autograd.grad(function(raw, F.normalize(raw, dim=-1)), raw)[0]


TERMS = {  # code, plain
    "mse": (lambda r, p, y, v: losses.mse(r, y), lambda r, y, v: plain_mse(r, y)),
    "smooth": (
        lambda r, p, y, v: losses.directional_smooth(p, y, v, 0.05, 8.0),
        lambda r, y, v: plain_smooth(r, y, v, 0.05, 8.0),
    ),
    "scale_aware": (
        lambda r, p, y, v: losses.directional_scale_aware(p, y, v, 0.05, 4.0, 0.7, 0.05),
        lambda r, y, v: plain_scale_aware(r, y, v, 0.05, 4.0, 0.7, 0.05),
    ),
    "floor": (lambda r, p, y, v: losses.floor(p, y, 0.4), lambda r, y, v: plain_floor(r, y, 0.4)),
    "norm": (lambda r, p, y, v: losses.norm(r), lambda r, y, v: plain_norm(r)),
    "orthogonality": (lambda r, p, y, v: losses.orthogonality(p, v), lambda r, y, v: plain_orthogonality(r, v)),
    "short of a cosine": (
        lambda r, p, y, v: losses.shortfall(p, y, v[:, None], params.Constraint("cosine", 0.4)),
        lambda r, y, v: 0.4 - mean(cos(*row) for row in zip(r, y, strict=True)),
    ),
    "short of a margin": (
        lambda r, p, y, v: losses.shortfall(p, y, v[:, None], params.Constraint("margin", 0.1)),
        lambda r, y, v: 0.1 - mean(plain_gap(*row) for row in zip(r, y, v, strict=True)),
    ),
}
ANGULAR = (
    "smooth",
    "scale_aware",
    "floor",
    "orthogonality",
    "short of a cosine",
    "short of a margin",
)  # functions of p's direction alone


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("seed", range(3))
def test_gradient_of_each_term(name, seed):
    raw, y, prev = random_batch(seed)
    code, reference = TERMS[name]
    found = autograd(lambda r, p: code(r, p, y, prev), raw)
    expected = differences(lambda rows: reference(rows, y.tolist(), prev.tolist()), raw)
    assert expected.abs().max() > 1e-3  # there is a gradient to compare
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert torch.autograd.gradcheck(lambda r: code(r, F.normalize(r, dim=-1), y, prev), raw.clone().requires_grad_())


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("lambda_eff", [0.0, 0.03, 2.0])
def test_gradient_of_the_total(name, lambda_eff):
    raw, context, y = full_batch(5)
    weights = VERSIONS[name]
    found = autograd(lambda r, p: total(r, context, y, 0.06, weights, lambda_eff), raw)
    expected = differences(lambda rows: plain_total(rows, context.tolist(), y.tolist(), 0.06, weights, lambda_eff), raw)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def plain_listwise(raw, rivals, there, scale):
    total = 0.0
    for p, chunks, counts in zip(raw, rivals, there, strict=True):
        scores = [math.exp(scale * dot(p, c) / length(p)) for c, here in zip(chunks, counts, strict=True) if here]
        total -= math.log(scores[0] / sum(scores)) / len(raw)
    return total


def rivals_of(y, seed=0):
    """(B, 5, D) unit vectors with the target first, and which of them count: the target always, one alone."""
    g = torch.Generator().manual_seed(seed)
    others = F.normalize(torch.randn(B, 4, D, generator=g, dtype=torch.float64), dim=-1)
    there = torch.rand(B, 5, generator=g) > 0.4
    there[:, 0], there[0, 1:] = True, False
    return torch.cat([F.normalize(y, dim=-1)[:, None], others], 1), there


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_listwise(scale):
    raw, y, _ = random_batch(2)
    rivals, there = rivals_of(y)
    of = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    expected = plain_listwise(raw.tolist(), rivals.tolist(), there.tolist(), scale)
    found = losses.listwise(F.normalize(raw, dim=-1), rivals, there, of)
    assert expected > 0.1 and found.item() == pytest.approx(expected, rel=1e-12)
    gradient = autograd(lambda r, p: losses.listwise(p, rivals, there, of.detach()), raw)
    slopes = differences(lambda rows: plain_listwise(rows, rivals.tolist(), there.tolist(), scale), raw)
    torch.testing.assert_close(gradient, slopes, rtol=1e-6, atol=1e-8)
    (by_scale,) = torch.autograd.grad(found, of)  # finite, though some scores are −∞
    step = 1e-6
    above, below = (plain_listwise(raw.tolist(), rivals.tolist(), there.tolist(), scale + d) for d in (step, -step))
    assert by_scale.item() == pytest.approx((above - below) / (2 * step), rel=1e-5)


def test_listwise_of_several_rankers_is_the_mean_of_theirs():
    raw, y, other = random_batch(2)
    rivals, there = rivals_of(y)
    scale = torch.tensor(7.0, dtype=torch.float64)
    each = [F.normalize(r, dim=-1) for r in (raw, y + raw / 2, other if other.shape == raw.shape else -raw)]
    expected = sum(losses.listwise(unit, rivals, there, scale) for unit in each) / 3
    torch.testing.assert_close(losses.listwise(torch.stack(each, 1), rivals, there, scale), expected)


def weighted(listwise=0.0, energy=0.0):
    return dataclasses.replace(
        make_losses(), mean_square=0.3, listwise=params.Listwise(listwise, 0.1, 128), energy=params.Energy(energy, 5)
    )


def test_the_head_that_ranks_takes_the_listwise_loss_and_the_point_none_of_it():
    raw, context, y = full_batch(4)
    rivals, there = rivals_of(y)
    scale = torch.tensor(7.0, dtype=torch.float64)
    ranker = torch.randn(raw.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    raw.requires_grad_(), ranker.requires_grad_()
    w = weighted(listwise=2.0)
    ranking = F.normalize(ranker, dim=-1), rivals, there, scale
    batch, found = terms(raw, context, y, 0.0, w, rivals=ranking)
    value = weighted_sum(found, losses.weights(w, 0.0))
    points, ranks = plain_mse(*plain(raw, y)), plain_listwise(*plain(ranker, rivals), there.tolist(), 7.0)
    assert float(value) == pytest.approx(0.3 * points + 2.0 * ranks)
    gradients = torch.autograd.grad(value, (raw, ranker), retain_graph=True)
    torch.testing.assert_close(gradients[0], 0.3 * 2 * (raw - y).detach() / (B * D))
    slopes = differences(lambda r: 2.0 * plain_listwise(r, rivals.tolist(), there.tolist(), 7.0), ranker.detach())
    torch.testing.assert_close(gradients[1], slopes, rtol=1e-6, atol=1e-8)
    assert math.isnan(losses.pulls(losses.gradients(found, batch), raw)["pull_listwise"])  # it pulls at the other head


def plain_energy(samples, y):
    """The mean over the batch, all pairs in a loop; `samples` by sample, then by window."""

    def distance(a, b):
        return math.sqrt(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)))

    total, count = 0.0, len(samples)
    for b, truth in enumerate(y):
        mine = [s[b] for s in samples]
        total += sum(distance(x, truth) for x in mine) / count
        pairs = sum(distance(mine[i], mine[j]) for i in range(count) for j in range(count) if i != j)
        total -= pairs / (2 * count * (count - 1)) if count > 1 else 0.0
    return total / len(y)


def samples_of(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, B, D, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_energy_and_its_gradient(count):
    y = random_batch(2)[1]
    x = samples_of(count).requires_grad_()
    found = losses.energy(x, y)
    assert found.shape == (B,) and found.mean().item() == pytest.approx(plain_energy(x.tolist(), y.tolist()), rel=1e-12)
    (gradient,) = torch.autograd.grad(found.mean(), x)
    flat, slopes = x.detach().flatten(), torch.zeros(x.numel(), dtype=torch.float64)
    for i in range(x.numel()):
        step = torch.zeros_like(flat)
        step[i] = 1e-6
        up, down = (plain_energy((flat + s).view_as(x).tolist(), y.tolist()) for s in (step, -step))
        slopes[i] = (up - down) / 2e-6
    torch.testing.assert_close(gradient, slopes.view_as(x), rtol=1e-6, atol=1e-8)


def test_energy_of_equal_samples_is_their_distance_with_a_finite_gradient():
    y = random_batch(2)[1]
    x = samples_of(1).expand(4, B, D).clone().requires_grad_()
    found = losses.energy(x, y)
    torch.testing.assert_close(found, (x[0] - y).norm(dim=-1), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(gradient.sum(0), (x[0] - y) / (x[0] - y).norm(dim=-1, keepdim=True))


def test_energy_is_least_for_the_true_distribution_whatever_the_number_of_samples():
    """Strictly proper: wider, narrower and shifted normals score higher in the mean, and S does not shift the mean."""
    g = torch.Generator().manual_seed(0)
    truth, windows = torch.randn(4000, 3, generator=g, dtype=torch.float64), 4000

    def score(width, shift=0.0, count=8):
        x = width * torch.randn(count, windows, 3, generator=g, dtype=torch.float64) + shift
        return losses.energy(x, truth).mean().item()

    right = score(1.0)
    assert min(score(0.6), score(1.5), score(1.0, 0.4)) > right + 0.01
    # E‖x − y‖/2 of two normal vectors in 3 dimensions: √2 · √(8/π) / 2
    for count in (2, 8, 30):
        assert score(1.0, count=count) == pytest.approx(math.sqrt(2) * math.sqrt(8 / math.pi) / 2, abs=0.025)


def test_energy_in_the_total_and_its_pull():
    raw, context, y = full_batch(4)
    x, w = samples_of(5).requires_grad_(), weighted(energy=2.0)
    batch, found = terms(raw.requires_grad_(), context, y, 0.0, w, samples=x)
    expected = 0.3 * plain_mse(raw.tolist(), y.tolist()) + 2.0 * plain_energy(x.tolist(), y.tolist())
    assert weighted_sum(found, losses.weights(w, 0.0)).item() == pytest.approx(expected)
    together = differences(  # all samples of a window move together
        lambda rows: plain_energy((x.detach() + torch.tensor(rows)).tolist(), y.tolist()), torch.zeros_like(raw)
    )
    pull = losses.pulls(losses.gradients(found, batch), raw)["pull_energy"]
    assert float(pull) == pytest.approx(float(together.norm()), rel=1e-6)


@pytest.mark.parametrize("name", ANGULAR)
def test_angular_terms_do_not_see_length_and_pull_sideways_only(name):
    raw, y, prev = random_batch(2)
    code = TERMS[name][0]
    value, longer = (code(r, F.normalize(r, dim=-1), y, prev) for r in (raw, 3 * raw))
    assert longer.item() == pytest.approx(value.item(), rel=1e-12)
    gradient = autograd(lambda r, p: code(r, p, y, prev), raw)
    assert (gradient * raw).sum(-1).abs().max() < 1e-14
    assert gradient.norm(dim=-1).max() > 1e-3


@pytest.mark.parametrize("measure, prev", [("cosine", -1), ("margin", -1), ("margin", -2)])
def test_the_shortfall_of_a_constraint_takes_the_directional_place(measure, prev):
    """Its value is the plain one, below 0 where the bound is kept, and its weight in the total is λ."""
    raw, context, y = full_batch(5)
    w = make_losses(make_directional(prev=prev))
    rows = list(zip(raw.tolist(), y.tolist(), context[:, prev].tolist(), strict=True))
    reached = mean(cos(r, t) - (cos(r, v) if measure == "margin" else 0.0) for r, t, v in rows)
    for bound in (reached - 0.2, reached + 0.3):
        constraint = params.Constraint(measure, bound, (prev,))
        found = terms(raw, context, y, 0.0, w, constraint=constraint)[1]
        assert float(found["directional"]) == pytest.approx(bound - reached, abs=1e-12)
        expected = plain_mse(raw.tolist(), y.tolist()) + 2.5 * (bound - reached)
        assert float(total(raw, context, y, 0.0, w, 2.5, constraint=constraint)) == pytest.approx(expected)
    assert float(terms(raw, context, y, 0.0, w)[1]["directional"]) == 0


def test_of_several_places_the_nearest_in_the_mean_binds():
    raw, context, y = full_batch(5)
    apart = []
    for t in (-1, -2, -4):
        apart.append(
            mean(
                cos(r, a) - cos(r, v) for r, a, v in zip(raw.tolist(), y.tolist(), context[:, t].tolist(), strict=True)
            )
        )
    unit, bound = F.normalize(raw, dim=-1), params.Constraint("margin", 0.1, (-1, -2, -4))
    assert float(losses.shortfall(unit, y, context, bound)) == pytest.approx(0.1 - min(apart), abs=1e-12)
