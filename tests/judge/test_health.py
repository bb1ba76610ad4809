"""Health against plain derivations in float64, and the escape rule on real vectors and on paths that go on.

Axes: N windows, T context length, D vector dimension, K components.
"""

import functools
import math

import numpy as np
import pytest
import torch
from judge.plain import T, random_linear, store_of, unit, weighted

from lvmlib.baselines import Constant, Linear, Weighted, fit_constant, fit_ridge, fit_weights, untrained
from lvmlib.data.open import dataset
from lvmlib.judge import health as module
from lvmlib.judge import tricks
from lvmlib.judge.health import BANDS, MATERIAL, health, leading_components
from lvmlib.statistics import over_articles
from lvmlib.windows import windows


@functools.cache
def wikipedia(horizon=1, direction="forward"):
    return dataset("wikipedia", horizon, T, direction=direction)


@functools.cache
def components(count):
    store = wikipedia().store
    return leading_components(store, torch.from_numpy(store.vectors), count)


# Facts


def plain_moments(x):
    covariance = np.cov(x.T, bias=True)
    shares = np.linalg.eigvalsh(covariance) / np.trace(covariance)
    entropy = -sum(s * math.log(s) for s in shares if s > 1e-12)
    return math.exp(entropy), 1 - sum(v**2 for v in x.mean(0))


def plain_skewness(x, pool):
    """Of the numbers of times that each chunk of the split is one of a row's ten nearest."""
    counts = np.zeros(len(pool))
    for row in x:
        cosines = [row @ c for c in pool]
        for place in sorted(range(len(pool)), key=lambda i: -cosines[i])[:10]:
            counts[place] += 1
    spread = math.sqrt(np.mean((counts - counts.mean()) ** 2))
    return np.mean((counts - counts.mean()) ** 3) / spread**3


def lstsq_weights(p, context):
    """With the slight ridge that keeps them finite where context vectors are all but equal."""
    ridge = 1e-4 * np.mean([c @ c for c in context])
    return np.linalg.solve(context @ context.T + ridge * np.eye(len(context)), context @ p)


@pytest.mark.parametrize("horizon, direction", [(1, "forward"), (2, "backward")])
@pytest.mark.parametrize("name", ["mean", "linear"])
def test_facts_are_those_of_a_plain_derivation(name, horizon, direction):
    w = wikipedia(horizon, direction).val.at_most(40)
    dim = w.store.dim
    model = weighted(dim, *[1 / T] * T) if name == "mean" else random_linear(dim)
    facts = health(model, w)
    contexts = [w.store.vectors[r].astype(float) for r in w.context_rows(np.arange(len(w)))]
    targets = unit(w.store.vectors[w.target].astype(float))
    if name == "mean":
        raw = np.array([c.mean(0) for c in contexts])
    else:
        raw = np.array([c.reshape(-1) @ model.weights.double().numpy() for c in contexts])
    predictions, pool = unit(raw), unit(w.store.vectors[w.store.rows("val")].astype(float))
    for x, of in ((predictions, ""), (targets, " of targets")):
        rank, variance = plain_moments(x)
        assert facts[f"effective rank{of}"] == pytest.approx(rank, rel=1e-5)
        assert facts[f"variance{of}"] == pytest.approx(variance, abs=1e-6)
        assert facts[f"hubness{of}"] == pytest.approx(plain_skewness(x, pool), abs=1e-6)
    norms = np.linalg.norm(raw, axis=1)
    assert facts["norm"] == pytest.approx(norms.mean(), rel=1e-5)
    assert facts["norm spread"] == pytest.approx(norms.std(), rel=1e-4)
    best = [[max(x @ unit(c) for c in context) for x, context in zip(some, contexts, strict=True)]
            for some in (predictions, targets)]  # fmt: skip
    assert facts["copying ratio"] == pytest.approx(np.mean(best[0]) / np.mean(best[1]), abs=1e-5)
    weights = [lstsq_weights(p, context) for p, context in zip(predictions, contexts, strict=True)]
    assert facts["weights"] == pytest.approx(np.mean(weights, 0), abs=3e-6)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batches_change_nothing(batch_size):
    w = wikipedia().val.at_most(30)
    trick = tricks.tricks(w.store.dim, T, 0.5, components(8))["mean − a·context[-2]"]
    found, wanted = health(trick, w, batch_size=batch_size), health(trick, w)
    assert found.pop("weights") == pytest.approx(wanted.pop("weights"), abs=1e-5)
    assert found == pytest.approx(wanted, abs=1e-5, rel=1e-5)


def test_facts_are_plain_numbers_and_the_model_stays_in_its_mode():
    w = wikipedia().val.at_most(30)
    for training in (True, False):
        model = random_linear(w.store.dim).train(training)
        facts = health(model, w)
        assert model.training is training
    for key, value in facts.items():
        kinds = {"weights": list, "escape": bool, "escape band": int | None}
        assert isinstance(value, kinds.get(key, float)), key
    assert len(facts["weights"]) == T


def test_a_constant_predictor_has_one_rank_no_variance_and_hubs():
    w = wikipedia().val.at_most(60)
    vector = torch.randn(w.store.dim, generator=torch.Generator().manual_seed(0))
    facts = health(Constant(w.store.dim, T, vector), w)
    assert facts["effective rank"] == 1 and facts["variance"] == pytest.approx(0, abs=1e-5)
    n = len(w.store.rows("val"))  # ten chunks are always the nearest, and the others never: skewness of a coin
    share = 10 / n
    assert facts["hubness"] == pytest.approx((1 - 2 * share) / math.sqrt(share * (1 - share)))
    assert facts["hubness"] > 3 * facts["hubness of targets"]
    assert facts["norm spread"] == pytest.approx(0, abs=1e-5)


def test_copying_copies_all_and_knowing_copies_as_much_as_the_truth():
    w = wikipedia().val.at_most(60)
    last = health(weighted(w.store.dim, 0.0, 0.0, 0.0, 0.0, 1.0), w)
    assert last["weights"] == pytest.approx([0, 0, 0, 0, 1], abs=1e-3)
    _, target = w.batch(np.arange(len(w)))

    class Oracle(Constant):
        def raw(self, context):
            return target  # one batch, all windows

    knows = health(Oracle(w.store.dim, T, target[0]), w)
    assert knows["copying ratio"] == pytest.approx(1) and last["copying ratio"] > 1.3
    for name in ("effective rank", "variance", "hubness"):
        assert knows[name] == pytest.approx(knows[f"{name} of targets"], rel=1e-4)


def test_nearest_in_parts_is_nearest_in_the_whole():
    random = np.random.default_rng(0)
    vectors = torch.from_numpy(unit(random.standard_normal((60, 8))).astype(np.float16))
    pool = torch.from_numpy(random.permutation(60)[:45])
    x = torch.from_numpy(unit(random.standard_normal((9, 8)))).float()
    wanted = (x @ vectors[pool].float().T).numpy()
    for chunk in (4, 7, 44, 100):
        found = module._nearest(x, vectors, pool, 10, chunk).numpy()
        for i, row in enumerate(found):
            assert set(row) == set(np.argsort(-wanted[i])[:10])
    assert module._nearest(x, vectors, pool[:6], 10).shape == (9, 6)  # fewer chunks than neighbours


@pytest.mark.parametrize("counts, wanted", [([3, 3, 3], 0.0), ([0, 0, 0, 4], 2 / math.sqrt(3)), ([0, 2, 4], 0.0)])
def test_skewness(counts, wanted):
    assert module._skewness(torch.tensor(counts).double()) == pytest.approx(wanted)


def test_leading_components_are_the_right_singular_vectors():
    """Of the second moment, not the covariance: the mean of all text is among them. All splits count."""
    x = wikipedia().store.vectors.astype(float)
    wanted = np.linalg.svd(x, full_matrices=False)[2][:8]
    found = components(8).numpy().astype(float)
    np.testing.assert_allclose(found @ found.T, np.eye(8), atol=1e-5)
    np.testing.assert_allclose(np.abs((found * wanted).sum(1)), 1, atol=1e-4)
    assert abs(found[0] @ unit(x.mean(0))) > 0.8


# Escape

FACTS = ("margin bought", "cosine paid", "novel MRR paid")


@pytest.mark.parametrize("horizon", [1, 2])
@pytest.mark.parametrize(
    "trick, strength",
    [(f"mean − a·context[{place}]", s) for place in (-2, -1) for s in (0.3, 0.5)]
    + [("residual flip", 0.5), ("residual flip", 1.0)],
)
def test_every_trick_is_named_escape(trick, strength, horizon):
    w = wikipedia(horizon).val
    facts = health(tricks.tricks(w.store.dim, T, strength, components(8))[trick], w)
    assert facts["escape"] is True
    assert facts["margin bought"] >= facts["margin bought low"] > MATERIAL
    assert facts["cosine paid low"] > 0 and facts["novel MRR paid high"] > 0
    assert facts["escape band"] == (8 if trick == "residual flip" else 0)


@pytest.mark.parametrize("horizon, direction", [(1, "forward"), (2, "forward"), (1, "backward")])
def test_no_plain_predictor_is_named_escape(horizon, direction):
    data = wikipedia(horizon, direction)
    dim = data.store.dim
    fitted = {"constant": Constant(dim, T, fit_constant(data.train))}
    fitted |= {"weighted mean": Weighted(dim, fit_weights(data.train))}
    fitted |= {"mean, one vector less": tricks.tricks(dim, T, 0.15, components(8))["mean − a·context[-2]"]}
    for name, model in (untrained(dim, T) | fitted).items():
        for split in (data.val, data.ood):
            facts = health(model, split)
            assert facts["escape"] is False, name
            assert all(facts[f] == 0 for f in FACTS) or facts["margin bought"] < MATERIAL, name


@pytest.mark.parametrize("horizon", [1, 2])
def test_ridge_is_not_named_escape(horizon):
    data = wikipedia(horizon)
    assert health(Linear(data.store.dim, fit_ridge(data.train)[0]), data.val)["escape"] is False


@pytest.mark.parametrize("place", [-2, -1])
def test_what_an_escape_bought_and_paid_is_that_of_a_plain_derivation(place):
    """Take the negative mean weight out of each prediction, and see what becomes of margin, cosine and rank."""
    w = wikipedia(2).val.at_most(60)
    dim, store = w.store.dim, w.store
    facts = health(tricks.tricks(dim, T, 0.5, components(8))[f"mean − a·context[{place}]"], w)
    contexts = [store.vectors[r].astype(float) for r in w.context_rows(np.arange(len(w)))]
    own = np.full(T, 0.2)
    own[place] -= 0.5
    predictions = [unit(own @ context) for context in contexts]
    weight = np.mean([lstsq_weights(p, c) for p, c in zip(predictions, contexts, strict=True)], 0)
    assert [t - T for t in range(T) if weight[t] < 0] == [place]
    rows = {name: [] for name in FACTS}
    for i, (p, context) in enumerate(zip(predictions, contexts, strict=True)):
        mended = unit(p - weight[place] * context[place])
        target, subtracted = unit(store.vectors[w.target[i]].astype(float)), unit(context[place])
        outside = set(np.flatnonzero(store.article == w.article[i])) - set(w.context_rows([i])[0])
        chunks = [unit(store.vectors[r].astype(float)) for r in outside]
        inverse = [1 / sum(x @ c >= x @ target - 1e-12 for c in chunks) for x in (p, mended)]
        margin = [x @ target - x @ subtracted for x in (p, mended)]
        rows["margin bought"].append(margin[0] - margin[1])
        rows["cosine paid"].append((mended - p) @ target)
        rows["novel MRR paid"].append(inverse[1] - inverse[0])
    for name, values in rows.items():
        found = [facts[name], facts[f"{name} low"], facts[f"{name} high"]]
        assert found == pytest.approx(over_articles(values, w.article), abs=1e-5), name


def path(kind, noise=0.0, dim=16, articles=10, length=24):
    """Articles that go slowly round a circle, or along a great circle's short arc that hardly bends (a line)."""
    random = np.random.default_rng(0)
    speed = {"circle": 0.15, "line": 0.02}[kind]
    found = {}
    for a in range(articles):
        plane = np.linalg.qr(random.standard_normal((dim, 2)))[0].T
        angle = random.uniform(0, 6) + speed * np.arange(length)
        x = np.stack([np.cos(angle), np.sin(angle)], 1) @ plane + noise * random.standard_normal((length, dim))
        found[a] = ("val", np.arange(length), x)
    return store_of(found)


@pytest.mark.parametrize("kind, noise", [("circle", 0.0), ("circle", 0.005), ("line", 0.0)])
@pytest.mark.parametrize("horizon", [1, 2])
def test_a_negative_weight_that_pays_is_no_escape(kind, noise, horizon):
    """Linear extrapolation, 2·c[-1] − c[-2], subtracts a context vector, and comes nearer to the target by it."""
    store = path(kind, noise)
    facts = health(weighted(store.dim, 0.0, 0.0, 0.0, -1.0, 2.0), windows(store, "val", horizon, T))
    assert min(facts["weights"]) < -0.05 and facts["escape band"] is not None  # it was examined
    assert facts["margin bought"] > 0 and facts["cosine paid high"] < 0
    assert facts["escape"] is False


def test_extrapolation_that_overshoots_is_escape():
    """On the same circle, more of the same is further from context[-2], and no nearer to the target: bought."""
    store = path("circle", 0.03)
    facts = health(weighted(store.dim, 0.0, 0.0, 0.0, -2.0, 3.0), windows(store, "val", 1, T))
    assert facts["escape"] is True and facts["cosine paid low"] > 0


def test_bands_start_with_the_whole_space_and_fit_small_vectors():
    assert BANDS[0] == 0 and list(BANDS) == sorted(BANDS)
    store = path("circle", 0.1, dim=6)  # bands of at most 3 components
    facts = health(weighted(6, 0.2, 0.2, 0.2, 0.2, -0.4), windows(store, "val", 1, T))
    assert facts["escape band"] in (0, 1, 2)
