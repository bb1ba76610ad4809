"""Health against plain derivations in float64, and the escape rule on real vectors and on paths that go on.

Axes: N windows, T context length, D vector dimension, K components.
"""

import functools
import math

import numpy as np
import pytest
import torch
from judge.plain import T, constant, mean_predictor, random_linear, store_of, unit, weighted

from lvmlib.baselines import baselines
from lvmlib.data.open import dataset
from lvmlib.judge import health as module
from lvmlib.judge import tricks
from lvmlib.judge.health import MATERIAL, health, leading_components
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
    model = mean_predictor(dim) if name == "mean" else random_linear(dim)
    facts = health(model, w)
    contexts = [w.store.vectors[r].astype(float) for r in w.context_rows(np.arange(len(w)))]
    targets = unit(w.store.vectors[w.target].astype(float))
    weights = np.tile(np.eye(dim) / T, (T, 1)) if name == "mean" else model.weights.double().numpy()
    raw = np.array([c.reshape(-1) @ weights for c in contexts])
    predictions, pool = unit(raw), unit(w.store.vectors[w.store.rows("val")].astype(float))
    wanted = {"norm": np.linalg.norm(raw, axis=1).mean(), "norm spread": np.linalg.norm(raw, axis=1).std()}
    copied = []
    for x, of in ((predictions, ""), (targets, " of targets")):
        wanted[f"effective rank{of}"], wanted[f"variance{of}"] = plain_moments(x)
        wanted[f"hubness{of}"] = plain_skewness(x, pool)
        copied.append(np.mean([max(y @ unit(c) for c in context) for y, context in zip(x, contexts, strict=True)]))
    wanted["copying ratio"] = copied[0] / copied[1]
    for key, value in wanted.items():
        assert facts[key] == pytest.approx(value, rel=1e-4 if key == "norm spread" else 1e-5, abs=1e-6), key
    weights = [lstsq_weights(p, context) for p, context in zip(predictions, contexts, strict=True)]
    assert facts["weights"] == pytest.approx(np.mean(weights, 0), abs=3e-6)
    plain = {"weights": list, "escape": bool, "escape band": int | None}
    assert all(isinstance(value, plain.get(key, float)) for key, value in facts.items())


def test_batches_change_nothing():
    w = wikipedia().val.at_most(30)
    trick = tricks.tricks(w.store.dim, T, 0.5, components(8))["mean − a·context[-2]"]
    found, wanted = health(trick, w, batch_size=7), health(trick, w)
    assert found.pop("weights") == pytest.approx(wanted.pop("weights"), abs=1e-5)
    assert found == pytest.approx(wanted, abs=1e-5, rel=1e-5)


def test_a_constant_predictor_has_one_rank_no_variance_and_hubs():
    w = wikipedia().val.at_most(60)
    facts = health(constant(w.store.dim), w)
    assert facts["effective rank"] == 1 and facts["variance"] == pytest.approx(0, abs=1e-5)
    share = 10 / len(w.store.rows("val"))  # ten chunks are always the nearest, the others never: skewness of a coin
    assert facts["hubness"] == pytest.approx((1 - 2 * share) / math.sqrt(share * (1 - share)))
    assert facts["hubness"] > 3 * facts["hubness of targets"]


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
@pytest.mark.parametrize("strength, place", [(0.3, -2), (0.5, -2), (0.3, -1), (0.5, -1), (0.5, None), (1.0, None)])
def test_every_trick_is_named_escape(strength, place, horizon):
    trick = f"mean − a·context[{place}]" if place else "residual flip"
    w = wikipedia(horizon).val
    facts = health(tricks.tricks(w.store.dim, T, strength, components(8))[trick], w)
    assert facts["escape"] is True
    assert facts["margin bought"] >= facts["margin bought low"] > MATERIAL
    assert facts["cosine paid low"] > 0 and facts["novel MRR paid high"] > 0
    assert facts["escape band"] == (8 if trick == "residual flip" else 0)


@pytest.mark.parametrize("horizon, direction", [(2, "forward"), (1, "backward")])
def test_no_plain_predictor_is_named_escape(horizon, direction):
    data = wikipedia(horizon, direction)
    less = tricks.tricks(data.store.dim, T, 0.15, components(8))["mean − a·context[-2]"]
    for name, model in (baselines(data.train) | {"mean, one vector less": less}).items():
        for split in (data.val, data.ood)[: 1 if name == "ridge" else 2]:
            facts = health(model, split)
            assert facts["escape"] is False, name
            assert name == "ridge" or facts["margin bought"] < MATERIAL, name


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


@pytest.mark.parametrize("kind, noise, horizon", [("circle", 0.0, 1), ("circle", 0.005, 2), ("line", 0.0, 2)])
def test_a_negative_weight_that_pays_is_no_escape(kind, noise, horizon):
    """Linear extrapolation, 2·c[-1] − c[-2], subtracts a context vector, and comes nearer to the target by it."""
    store = path(kind, noise)
    facts = health(weighted(store.dim, 0.0, 0.0, 0.0, -1.0, 2.0), windows(store, "val", horizon, T))
    assert min(facts["weights"]) < -0.05 and facts["escape band"] is not None  # it was examined
    assert facts["margin bought"] > 0 and facts["cosine paid high"] < 0 and facts["escape"] is False


def test_extrapolation_that_overshoots_is_escape():
    """On the same circle, more of the same is further from context[-2], and no nearer to the target."""
    store = path("circle", 0.03)
    facts = health(weighted(store.dim, 0.0, 0.0, 0.0, -2.0, 3.0), windows(store, "val", 1, T))
    assert facts["escape"] is True and facts["cosine paid low"] > 0


def test_bands_fit_small_vectors():
    store = path("circle", 0.1, dim=6)  # bands of at most 3 components
    facts = health(weighted(6, 0.2, 0.2, 0.2, 0.2, -0.4), windows(store, "val", 1, T))
    assert facts["escape band"] in (0, 1, 2)
