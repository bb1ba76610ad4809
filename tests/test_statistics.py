"""Chance levels against enumeration, and intervals over articles against answers known beforehand."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from lvmlib.statistics import chance_recall, chance_reciprocal_rank, over_articles


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7])
def test_chance_is_the_mean_over_every_ranking(n):
    """Every order of n candidates is as likely as any other; the target is the first of them."""
    ranks = [order.index(0) + 1 for order in itertools.permutations(range(n))]
    for k in (1, 2, 5, 10):
        assert chance_recall(n, k) == pytest.approx(float(Fraction(sum(r <= k for r in ranks), len(ranks))))
    assert chance_reciprocal_rank(n) == pytest.approx(float(sum(Fraction(1, r) for r in ranks) / len(ranks)))


def test_chance_of_random_scores():
    """Simulation: candidates scored at random, ranks counted; within four standard errors."""
    random = np.random.default_rng(0)
    for n in (6, 40):
        scores = random.random((20_000, n))
        rank = 1 + (scores > scores[:, :1]).sum(1)
        for chance, values in (
            (chance_recall(n, 1), rank <= 1),
            (chance_recall(n, 5), rank <= 5),
            (chance_reciprocal_rank(n), 1 / rank),
        ):
            assert abs(np.mean(values) - chance) < 4 * np.std(values) / math.sqrt(len(rank))


def test_chance_is_elementwise():
    n = np.array([[3, 12], [5, 7]])
    np.testing.assert_allclose(chance_recall(n, 5), [[1, 5 / 12], [1, 5 / 7]])
    wanted = [[sum(1 / i for i in range(1, m + 1)) / m for m in row] for row in n]
    np.testing.assert_allclose(chance_reciprocal_rank(n), wanted)
    assert chance_recall([], 5).shape == chance_reciprocal_rank([]).shape == (0,)


def test_mini_recall_at_5_of_six_has_chance_five_sixths():
    assert chance_recall(6, 5) == pytest.approx(5 / 6)  # handbook §4.1 point 3


# Intervals


def clustered(random, articles=30, effect=1.0, noise=1.0, truth=0.3):
    """Values = truth + the article's own effect + noise, articles of 1 to 20 windows."""
    sizes = random.integers(1, 21, articles)
    article = np.repeat(np.arange(articles), sizes)
    own = effect * random.standard_normal(articles)
    return truth + own[article] + noise * random.standard_normal(len(article)), article


def test_the_mean_is_that_of_the_windows():
    values, article = clustered(np.random.default_rng(0))
    mean, low, high = over_articles(values, article)
    assert mean == pytest.approx(sum(values) / len(values), rel=1e-12)
    assert low < mean < high
    # Numbers and order of the articles mean nothing.
    shuffled = np.random.default_rng(1).permutation(len(values))
    assert over_articles(values[shuffled], article[shuffled]) == pytest.approx((mean, low, high))
    assert over_articles(values, article * 7 + 1000) == pytest.approx((mean, low, high))
    assert over_articles(list(values), [f"a{a:03}" for a in article]) == pytest.approx((mean, low, high))


def test_nan_is_left_out_with_articles_that_have_nothing_else():
    values, article = clustered(np.random.default_rng(0))
    kept = over_articles(values, article)
    more = np.r_[math.nan, values, math.nan, math.nan], np.r_[article[0], article, 900, 901]
    assert over_articles(*more) == pytest.approx(kept)


def test_three_articles_by_hand():
    """27 resamples: all three the lowest has probability 1/27 > 2.5 %, so the ends are the extreme articles' means."""
    values, article = [1.0, 3.0, 10.0, 10.0, 13.0, 4.0], [5, 5, 2, 2, 2, 9]
    mean, low, high = over_articles(values, article)
    assert (mean, low, high) == pytest.approx((41 / 6, 2.0, 11.0))


def test_a_resample_weighs_articles_by_their_windows():
    """Two articles: half of the resamples hold both, and then give the mean over windows, not over articles."""
    values, article = [0.0, 1.0, 1.0, 1.0, 1.0], [0, 1, 1, 1, 1]
    assert over_articles(values, article, level=0.4) == pytest.approx(
        (0.8, 0.8, 0.8)
    )  # the middle 40 % of 1/4, 1/2, 1/4
    assert over_articles(values, article, level=0.9) == pytest.approx((0.8, 0.0, 1.0))


@pytest.mark.parametrize(
    "values, articles, mean",
    [
        ([], [], math.nan),
        ([math.nan] * 3, [1, 2, 3], math.nan),
        ([1.0, 2.0], [4, 4], 1.5),
        ([1.0, math.nan], [4, 5], 1.0),
    ],
)
def test_no_interval_with_fewer_than_two_articles(values, articles, mean):
    found = over_articles(np.array(values), np.array(articles, int))
    assert found == pytest.approx((mean, math.nan, math.nan), nan_ok=True)


def test_booleans_are_shares():
    mean, low, high = over_articles(np.array([True, False, False, True]), [0, 0, 1, 2])
    assert mean == 0.5 and 0 <= low <= mean <= high <= 1


def test_wider_than_a_bootstrap_over_windows_on_clustered_data():
    values, article = clustered(np.random.default_rng(2), articles=40, effect=1.0, noise=0.1)
    _, low, high = over_articles(values, article)
    random = np.random.default_rng(0)
    means = [values[random.integers(0, len(values), len(values))].mean() for _ in range(1000)]
    window_low, window_high = np.quantile(means, [0.025, 0.975])
    assert high - low > 2 * (window_high - window_low)


def test_as_wide_as_theory_where_windows_are_independent():
    values, article = clustered(np.random.default_rng(3), articles=400, effect=0.0)
    _, low, high = over_articles(values, article)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(len(values)), rel=0.15)


def test_seeded():
    values, article = clustered(np.random.default_rng(0))
    assert over_articles(values, article) == over_articles(values, article)
    assert over_articles(values, article, seed=1) == over_articles(values, article, seed=1)
    assert over_articles(values, article, seed=1) != over_articles(values, article)


def test_levels_nest():
    values, article = clustered(np.random.default_rng(0))
    _, low50, high50 = over_articles(values, article, level=0.5)
    _, low, high = over_articles(values, article)
    assert low < low50 < high50 < high


@pytest.mark.parametrize("articles, least, most", [(30, 0.90, 0.98), (6, 0.70, 0.95)])
def test_coverage_of_a_known_truth(articles, least, most):
    """300 datasets: nominal 95 % holds the truth nearly as often with 30 articles, and, as the docstring warns, less
    often with few."""
    random = np.random.default_rng(4)
    held = 0
    for seed in range(300):
        values, article = clustered(random, articles, truth=0.3)
        _, low, high = over_articles(values, article, resamples=600, seed=seed)
        held += low <= 0.3 <= high
    assert least <= held / 300 <= most, held / 300
