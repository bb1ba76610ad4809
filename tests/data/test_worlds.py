"""Worlds against their closed forms.

Axes: A articles, L chunks an article, D vector dimension.
"""

import itertools
import math
from functools import cache

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import scipy.stats
import torch
import yaml
from stores import simulated

from lvmlib.baselines import baselines, untrained
from lvmlib.config import version
from lvmlib.data import laws, worlds
from lvmlib.data.open import dataset
from lvmlib.data.store import make_store
from lvmlib.errors import LVMError
from lvmlib.judge.fivecat import score
from lvmlib.runs.run import train
from lvmlib.statistics import over_articles
from lvmlib.windows import windows


def articles_of(store):
    """(A, L, D) float64, in the order of article and position."""
    order = np.lexsort((store.position, store.article))
    return store.vectors[order].astype(float).reshape(len(store.articles), -1, store.dim)


@pytest.mark.parametrize("name", worlds.WORLDS)
def test_samples_have_the_cosines_that_the_world_says(name):
    x = articles_of(worlds.world(name, articles=150, length=9, dim=256, seed=3))
    expected = worlds.cosines(name, 9, **({} if name in worlds.SLOPES else {"dim": 256}))
    apart = ~np.eye(9, dtype=bool)
    # Averaged over articles a cosine scatters by less than 1/√D in each, and its bias is of order 1/D.
    found = np.einsum("atd,aud->tu", x, x) / len(x)
    np.testing.assert_allclose(found[apart], expected[apart], rtol=0, atol=5 / math.sqrt(256 * 150) + 2 / 256)


@pytest.mark.parametrize("first, last", [(2.0, 0.6), (0.6, 2.0), (3.0, 0.0)])
def test_sloping_cosines(first, last):
    """topic·topic = 1 is all that two chunks share; each has length √(1 + s²)."""
    expected = worlds.cosines("converging", 9, first=first, last=last)
    scale = [first + (last - first) * t / 8 for t in range(9)]
    for t, u in itertools.permutations(range(9), 2):
        assert expected[t, u] == pytest.approx(1 / math.sqrt((1 + scale[t] ** 2) * (1 + scale[u] ** 2)))
    # Δ = cos(last, next) − cos(last, previous) is not 0, though the order holds nothing to predict (§4.1 point 2).
    assert {np.sign(expected[t, t + 1] - expected[t, t - 1]) for t in range(1, 8)} == {np.sign(first - last)}


@pytest.mark.parametrize("name", ["rotation", "announcing"])
def test_lag_cosines_are_those_of_wikipedia_at_every_strength(name):
    """Embedded Wikipedia: lags 1 to 4, and different articles."""
    for lag, real in zip(range(1, 5), (0.501, 0.455, 0.431, 0.415), strict=True):
        by_strength = [worlds.law(name, strength=s).lag_cosine(lag) for s in (0.0, 0.4, 1.0)]
        np.testing.assert_allclose(by_strength, 0.4 + 0.184 * 0.55**lag, atol=1e-9)
        assert by_strength[0] == pytest.approx(real, abs=0.003)
    centre = articles_of(worlds.world(name)).mean(1)
    assert (centre @ centre.T)[~np.eye(len(centre), dtype=bool)].mean() == pytest.approx(worlds.COMMON, abs=0.003)


def test_by_name():
    with pytest.raises(LVMError, match="converging"):
        worlds.law("converging")
    assert worlds.world("converging").fingerprint == dataset("world:converging").store.fingerprint
    with pytest.raises(LVMError, match="converging"):
        worlds.world("convergent")
    with pytest.raises(LVMError, match="converging"):
        dataset("world:")


# The stationary worlds


SMALL = {"articles": 10, "length": 12, "dim": 32}


@pytest.mark.parametrize("name", worlds.WORLDS)
def test_every_world_is_a_clean_store(name):
    store = worlds.world(name, **SMALL, seed=7)
    assert store.name.startswith("world:") and store.vectors.dtype == np.float32 and store.vectors.shape == (120, 32)
    np.testing.assert_allclose(np.linalg.norm(store.vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(store.article, np.repeat(np.arange(10), 12))
    np.testing.assert_array_equal(store.position, np.tile(np.arange(12), 10))
    assert store.articles["split"].tolist() == ["train", "train", "train", "val", "ood"] * 2
    assert yaml.safe_load(yaml.safe_dump(store.datasheet)) == store.datasheet  # plain numbers
    again, other = worlds.world(name, **SMALL, seed=7), worlds.world(name, **SMALL, seed=8)
    assert store.fingerprint == again.fingerprint != other.fingerprint


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_the_autoregression_has_the_covariance_it_says(delay):
    random = np.random.default_rng(0)
    transition = np.array([[[0.3, 0.2], [-0.4, 0.5]], [[0.0, 0.0], [0.6, 0.5]]])
    variance = np.array([scipy.linalg.solve_discrete_lyapunov(m, np.diag([1.0, 0.5])) for m in transition])
    part = laws.Part(transition, variance, delay)
    z = part.sample(random, 60_000, 5).astype(float)
    assert z.shape == (60_000, 5, 2, 2)
    for t, u in [(0, 0), (4, 4), (1, 0), (4, 2), (3, 0), (0, 3)]:
        found = np.einsum("api,apj->pij", z[:, t], z[:, u]) / len(z)
        np.testing.assert_allclose(found, part.covariance(t - u), atol=0.03)
        np.testing.assert_allclose(part.covariance(t - u), part.covariance(u - t).mT)


def test_rotation_is_a_damped_turn_with_its_strength_in_the_antisymmetric_part():
    for strength in (0.0, 0.3, 1.0):
        law = worlds.law("rotation", dim=32, strength=strength)
        for lag in (1, 2, 5):
            for p in range(4):
                angle = lag * (p + 0.5) * math.pi / 4
                j = np.array([[0, -1], [1, 0]])
                turned = 0.2 / 8 * 0.8**lag * (math.cos(angle) * np.eye(2) + strength * math.sin(angle) * j)
                rest = (0.375 + 0.184 * 0.55**lag) / 32 * np.eye(2)
                np.testing.assert_allclose(law.covariance(lag)[p], turned + rest, atol=1e-12)
                np.testing.assert_allclose(law.covariance(lag)[10], rest, atol=1e-12)  # beyond the planes that turn


def optimal_cosine(law, horizon, t=5):
    """√(explained share) of the optimum: it is as long as its product with the target."""
    products = zip(law.weights(horizon, t), (law.covariance(j - (t - 1 + horizon)) for j in range(t)), strict=True)
    return math.sqrt(law.common + sum(np.einsum("pij,pji->", kernel, across) for kernel, across in products))


def dense(law, lag):
    """(D, D) E[(x_{t+lag} − mean)(x_t − mean)ᵀ] in the space of the vectors."""
    return law.basis @ scipy.linalg.block_diag(*law.covariance(lag)) @ law.basis.T


@pytest.mark.parametrize("name", ["exchangeable", "rotation", "announcing", "reversed", "reversed_announcing"])
@pytest.mark.parametrize("horizon", [1, 2])
def test_the_optimal_predictor_is_the_gaussian_conditional_mean(name, horizon):
    """Against the textbook formula on the whole (T·D)-dimensional vector, planes unknown."""
    law, t = worlds.law(name, dim=16), 3
    gram = np.block([[dense(law, i - j) for j in range(t)] for i in range(t)])
    moment = np.hstack([dense(law, t - 1 + horizon - j) for j in range(t)])
    context = np.random.default_rng(0).standard_normal((6, t, 16))
    wanted = law.mean + (context - law.mean).reshape(6, -1) @ np.linalg.solve(gram, moment.T)
    raw, unit = law.optimal(horizon, context_length=t)(torch.from_numpy(context).float())
    np.testing.assert_allclose(raw, wanted, atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-5)
    explained = law.common + np.trace(moment @ np.linalg.solve(gram, moment.T))
    assert optimal_cosine(law, horizon, t) == pytest.approx(math.sqrt(explained))


@pytest.mark.parametrize("name", ["rotation", "announcing", "reversed"])
def test_the_law_s_ranker_is_the_logarithm_of_the_likelihood_ratio(name):
    """Against scipy's Gaussian densities of the whole vector given the context, planes unknown: its gradient at c."""
    law, t, horizon, elsewhere = worlds.law(name, dim=16), 3, 2, 9
    context = np.random.default_rng(0).standard_normal((4, t, 16))
    gram = np.block([[dense(law, i - j) for j in range(t)] for i in range(t)])
    found = law.ranking(horizon, t, elsewhere).raw(torch.from_numpy(context).float()).numpy()

    def conditional(h, window):
        moment = np.hstack([dense(law, t - 1 + h - j) for j in range(t)])
        mean = law.mean + moment @ np.linalg.solve(gram, (window - law.mean).ravel())
        return scipy.stats.multivariate_normal(mean, dense(law, 0) - moment @ np.linalg.solve(gram, moment.T))

    for window, vector in zip(context, found, strict=True):
        near, far = conditional(horizon, window), conditional(elsewhere, window)
        ratio = [near.logpdf(c) - far.logpdf(c) for c in (law.mean + np.eye(16), law.mean - np.eye(16))]
        np.testing.assert_allclose(vector, (ratio[0] - ratio[1]) / 2, atol=1e-4)  # the square of c falls out
    still = worlds.law("exchangeable", dim=16).ranking(horizon)
    torch.testing.assert_close(still.weights, torch.zeros_like(still.weights), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["rotation", "announcing"])
def test_the_optimum_does_what_its_closed_form_says_and_nothing_beats_it(name):
    data = dataset(worlds.world(name, articles=60, length=24, dim=192, seed=5), horizon=1)
    law = worlds.law(name, dim=192)
    optimum = law.optimal(1)
    assert cosine_at_target(optimum, data.store, 1) == pytest.approx(optimal_cosine(law, 1), abs=0.02)
    context, target = data.val.batch(np.arange(len(data.val)))
    cosine = {
        n: float((m(context)[1] * target).sum(-1).mean()) for n, m in {**baselines(data.train), "": optimum}.items()
    }
    assert cosine.pop("") > max(cosine.values()) + 0.02


def cosine_at_target(predictor, store, horizon):
    data = dataset(store, horizon=horizon)
    total = [
        (predictor(c)[1] * y).sum(-1).numpy() for w in (data.train, data.val, data.ood) for c, y in w.batches(4096)
    ]
    return np.concatenate(total).mean()


def gain(store, predictor, other, horizon):
    """Forward minus backward: `predictor` on the articles as they are, `other` on the same ones reversed."""
    return cosine_at_target(predictor, store, horizon) - cosine_at_target(other, worlds.reverse(store), horizon)


@pytest.mark.parametrize("name", ["rotation", "announcing"])
def test_at_strength_0_both_directions_have_one_law(name):
    law = worlds.law(name, dim=48, strength=0)
    np.testing.assert_allclose(law.weights(2), law.reversed().weights(2), atol=1e-12)
    # One predictor before both directions: its mean gain over the samples is 0 within error.
    optimum = law.optimal(1)
    mean, error = simulated(
        lambda s: gain(s, optimum, optimum, 1), name, 20, articles=20, length=20, dim=48, strength=0
    )
    assert abs(mean) < 3.5 * error and error < 0.003


@pytest.mark.parametrize("name", ["rotation", "announcing"])
def test_a_fixed_predictor_sees_the_arrow_and_the_reversed_world_flips_it(name):
    law = worlds.law(name)
    store = worlds.world(name, articles=20, length=20)
    for horizon in (1, 2):
        optimum = law.optimal(horizon)
        found = gain(store, optimum, optimum, horizon)
        assert found > 0.05
        assert gain(worlds.reverse(store), optimum, optimum, horizon) == pytest.approx(-found, abs=1e-6)


def test_whoever_trains_in_each_direction_finds_no_arrow_in_a_rotation():
    """The two optima are mirror images: the reason for the world `announcing`."""
    law = worlds.law("rotation", dim=64)
    mirror = np.diag([1.0, -1.0])
    np.testing.assert_allclose(mirror @ law.weights(2) @ mirror, law.reversed().weights(2), atol=1e-10)
    assert optimal_cosine(law, 2) == pytest.approx(optimal_cosine(law.reversed(), 2))


@pytest.mark.parametrize("horizon, delay, least", [(1, 0, 0.03), (2, 0, 0.01), (2, 1, 0.03)])
def test_announced_things_are_better_predicted_than_recalled(horizon, delay, least):
    law = worlds.law("announcing", delay=delay)
    optimum, back = law.optimal(horizon), law.reversed().optimal(horizon)
    wanted = optimal_cosine(law, horizon) - optimal_cosine(law.reversed(), horizon)
    assert wanted > least
    store = worlds.announcing(articles=40, length=30, delay=delay)
    found = gain(store, optimum, back, horizon)
    assert found == pytest.approx(wanted, abs=0.008)
    assert gain(worlds.reverse(store), back, optimum, horizon) == pytest.approx(-found, abs=1e-6)


# Time reversal and shuffling, of any store


def gapped():
    """Three articles of 4, 1 and 3 chunks, not in order of their numbers, with gaps."""
    vectors = np.eye(8, dtype=np.float32)
    articles = pd.DataFrame({"title": list("abc"), "split": ["train", "val", ""]}, index=[2, 5, 9])
    return make_store("small", vectors, [5, 5, 5, 5, 2, 9, 9, 9], [3, 4, 7, 8, 0, 1, 2, 6], articles)


def test_reverse_reads_each_article_from_its_end_and_keeps_gaps():
    back = worlds.reverse(gapped())
    np.testing.assert_array_equal(back.vectors.argmax(1), [3, 2, 1, 0, 4, 7, 6, 5])
    np.testing.assert_array_equal(back.article, gapped().article)
    np.testing.assert_array_equal(back.position, [3, 4, 7, 8, 0, 1, 5, 6])
    assert back.name == "small reversed" and back.fingerprint != gapped().fingerprint
    twice = worlds.reverse(back)
    assert twice.name == "small" and twice.fingerprint == gapped().fingerprint


def test_reversed_worlds():
    np.testing.assert_allclose(worlds.cosines("diverging", 9), worlds.cosines("converging", 9)[::-1, ::-1])
    forward, back = worlds.world("rotation", **SMALL), worlds.world("reversed", **SMALL)
    np.testing.assert_array_equal(articles_of(forward)[:, ::-1], articles_of(back))
    law, reversed_law = (worlds.law(name, dim=32) for name in ("announcing", "reversed_announcing"))
    np.testing.assert_array_equal(law.sample(4, 6, 0)[:, ::-1], reversed_law.sample(4, 6, 0))
    np.testing.assert_allclose(reversed_law.covariance(3), law.covariance(-3))


def test_shuffled_moves_chunks_within_their_articles_only():
    store = gapped()
    orders = np.array([worlds.shuffled(store, seed).vectors.argmax(1) for seed in range(200)])
    for rows in ([0, 1, 2, 3], [4], [5, 6, 7]):
        np.testing.assert_array_equal(np.sort(orders[:, rows]), np.tile(rows, (200, 1)))
        for row in rows:  # each chunk is as often in each place
            share = (orders[:, rows] == row).mean(0)
            np.testing.assert_allclose(share, 1 / len(rows), atol=4 * 0.5 / math.sqrt(200))
    once = worlds.shuffled(store, 3)
    np.testing.assert_array_equal(once.position, store.position)
    assert once.fingerprint == worlds.shuffled(store, 3).fingerprint


IMPOSSIBLE = [({"strength": 1.5}, "strength"), ({"strength": -1}, "strength"), ({"dim": 15}, "dim")]


@pytest.mark.parametrize(
    "name, arguments, key",
    [
        *((name, *case) for name in ("rotation", "announcing") for case in IMPOSSIBLE),
        ("exchangeable", {"dim": 16, "topic": 1.175}, "share"),
        ("copy", {"dim": 16, "splits": ("train", "test")}, "'test'"),
    ],
)
def test_impossible_worlds_are_refused(name, arguments, key):
    with pytest.raises(LVMError, match=key):
        worlds.world(name, articles=5, length=8, **arguments)


# The versions find what is there, and nothing else. Small worlds have few steps to an epoch: a higher learning rate.


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(world, version) → the scores of a brief run of it on fresh articles; of another name, of that predictor."""

    @cache
    def scored(name, of):
        data = dataset(worlds.world(name, dim=48))
        fresh = windows(worlds.world(name, articles=40, dim=48, seed=10**6, splits=("val",)), "val")
        if of == "optimum":
            return score(worlds.law(name, dim=48).optimal(2), fresh)
        if of not in ("rank", "two_heads"):
            return score((untrained(48, 5) | baselines(data.train))[of], fresh)
        own = version(of, {"optimizer": {"lr": 3.0e-3}}, seed=0, epochs=6, device="cpu", precision="float32")
        run = train(own, data, out=tmp_path_factory.mktemp("runs") / "run")
        list(run)
        return score(run.best, fresh)

    return scored


def reciprocal(frame, kind="novel"):
    return 1 / frame[f"{kind} rank"]


@pytest.mark.parametrize("kind", ["novel", "possible"])
def test_rank_has_the_gain_of_the_optimum_where_there_is_order(small, kind):
    ours, best, copy = (reciprocal(small("rotation", n), kind).mean() for n in ("rank", "optimum", "copy last"))
    assert best > copy + 0.15
    assert (ours - copy) / (best - copy) >= 0.95
    ours, copy = small("exchangeable", "rank"), small("exchangeable", "copy last")
    assert over_articles(reciprocal(ours, kind) - reciprocal(copy, kind), ours["article"])[1] <= 0


@pytest.mark.parametrize("name", ["rotation", "exchangeable"])
def test_two_heads_point_as_well_as_the_weighted_mean_and_rank_as_well_as_rank(small, name):
    """Neither pays for the other, though the gradients are clipped together and the dropout is another draw."""
    two = small(name, "two_heads")
    assert two["cosine"].mean() >= small(name, "weighted mean")["cosine"].mean() - 0.005
    assert abs(reciprocal(two).mean() - reciprocal(small(name, "rank")).mean()) < 0.02
