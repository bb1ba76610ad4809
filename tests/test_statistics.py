"""Chance levels against enumeration; intervals against plain derivations, and against known truths in simulation."""

import itertools
import math
import statistics

import numpy as np
import pytest
from scipy import stats

from lvmlib.judge.arrow import sign_flip
from lvmlib.judge.table import median_over_articles
from lvmlib.statistics import (
    FEW,
    adjusted,
    between,
    chance_median_rank,
    chance_recall,
    chance_reciprocal_rank,
    effective_articles,
    few,
    over_articles,
    over_seeds,
    paired,
)


@pytest.mark.parametrize("n", range(1, 8))
def test_chance_is_the_mean_over_every_ranking(n):
    """Every order of n candidates is as likely as any other; the target is the first of them."""
    ranks = [order.index(0) + 1 for order in itertools.permutations(range(n))]
    for k in (1, 2, 5, 10):
        assert chance_recall(n, k) == pytest.approx(statistics.mean(r <= k for r in ranks))
        np.testing.assert_array_equal(chance_recall([[n], [n]], k), [[chance_recall(n, k)]] * 2)
    mean = statistics.mean(1 / r for r in ranks)
    np.testing.assert_allclose(chance_reciprocal_rank([[n], [n]]), [[mean], [mean]])
    assert chance_recall([], 5).shape == chance_reciprocal_rank([]).shape == (0,)


@pytest.mark.parametrize("sizes", [[6], [5], [1], [3, 12], [5, 7, 7, 40], [2, 4], [1, 1, 30]])
def test_chance_median_rank_is_the_median_of_every_rank(sizes):
    """Every window's ranks 1 … n once, times as often as makes all windows weigh the same."""
    ranks = [r for n in sizes for r in range(1, n + 1) for _ in range(math.lcm(*sizes) // n)]
    assert chance_median_rank(sizes) == statistics.median(ranks) and math.isnan(chance_median_rank([]))


def test_adjusted_is_0_at_chance_and_1_at_the_best():
    """Of a predictor that knows the target in 30 % of windows, and guesses in the others: 0.3."""
    random = np.random.default_rng(0)
    n = random.integers(2, 60, 100_000)
    guess = random.integers(1, n + 1)
    for skill in (0.0, 0.3):
        rank = np.where(random.random(100_000) < skill, 1, guess)
        for k in (1, 5):
            assert adjusted((rank <= k).mean(), chance_recall(n, k).mean()) == pytest.approx(skill, abs=0.01)
        assert adjusted((1 / rank).mean(), chance_reciprocal_rank(n).mean()) == pytest.approx(skill, abs=0.01)
    np.testing.assert_allclose(adjusted([1.0, 0.5, 0.0, 1.0], [0.5, 0.5, 0.5, 1.0]), [1, 0, -1, math.nan])
    assert np.ndim(adjusted(0.75, 0.5)) == 0


# Intervals: derivations


def clustered(random, articles=30, effect=1.0, noise=1.0, truth=0.3):
    """Values = truth + the article's own effect + noise, articles of 1 to 20 windows."""
    sizes = random.integers(1, 21, articles)
    article = np.repeat(np.arange(articles), sizes)
    own = effect * random.standard_normal(articles)
    return truth + own[article] + noise * random.standard_normal(len(article)), article


def plain(values, articles, level=0.95):
    """Mean, variance, df from the definitions: leave out an article, average the rest; loops over lists."""
    values, articles = list(map(float, values)), list(articles)
    names = sorted(set(articles))
    mean = sum(values) / len(values)
    without = [[v for v, a in zip(values, articles, strict=True) if a != name] for name in names]
    variance = (len(names) - 1) / len(names) * sum((sum(w) / len(w) - mean) ** 2 for w in without)
    sizes = [articles.count(name) for name in names]
    return mean, variance, max(sum(sizes) ** 2 / sum(n * n for n in sizes) - 1, 1)


@pytest.mark.parametrize("seed, level", [(0, 0.95), (1, 0.5), (2, 0.99)])
def test_over_articles_from_its_definition(seed, level):
    """The interval of a share is made on the scale of log-odds."""
    values, article = clustered(np.random.default_rng(seed), articles=4 + 5 * seed)
    mean, variance, df = plain(values, article)
    half = stats.t.ppf(0.5 + level / 2, df) * math.sqrt(variance)
    assert over_articles(values, article, level) == pytest.approx((mean, mean - half, mean + half), rel=1e-10)
    values = (values > 1).astype(float)
    p, variance, df = plain(values, article)
    reach = stats.t.ppf(0.5 + level / 2, df) * math.sqrt(variance) / (p * (1 - p))
    low, high = (1 / (1 + (1 - p) / p * math.exp(sign * reach)) for sign in (1, -1))
    assert 0 < low < p < high < 1
    assert over_articles(values, article, level, share=True) == pytest.approx((p, low, high), rel=1e-10)
    assert over_articles(1 - values, article, level, share=True) == pytest.approx((1 - p, 1 - high, 1 - low))


def test_numbers_and_order_of_articles_mean_nothing():
    values, article = clustered(np.random.default_rng(0))
    shuffled = np.random.default_rng(1).permutation(len(values))
    for interval in (over_articles, median_over_articles):
        mean, low, high = found = interval(values, article)
        assert low < mean < high
        for x, articles in ((values[shuffled], article[shuffled]), (list(values), [f"a{a:03}" for a in article])):
            assert interval(x, articles) == pytest.approx(found)
        assert low < interval(values, article, 0.5)[1] < interval(values, article, 0.5)[2] < high
        assert interval(-values, article) == pytest.approx((-mean, -high, -low))


def test_nan_is_left_out_with_articles_that_have_nothing_else():
    values, article = clustered(np.random.default_rng(0))
    nan = math.nan
    more, articles = np.r_[nan, values, nan, nan], np.r_[article[0], article, 900, 901]
    for interval in (over_articles, median_over_articles):
        assert interval(more, articles) == pytest.approx(interval(values, article))
    kept = over_seeds(np.stack([values, values**2]), article)
    seeds = np.stack([np.r_[1.0, values, nan, 2.0], np.r_[nan, values**2, nan, nan]])  # NaN in one seed is enough
    assert over_seeds(seeds, articles) == pytest.approx(kept)
    assert sign_flip(more, articles) == pytest.approx(sign_flip(values, article))
    other = np.where(np.arange(len(values)) < 5, nan, 2 * values)
    assert paired(values, other, article) == pytest.approx(over_articles(-values[5:], article[5:]))


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
    values, articles = np.array(values), np.array(articles, int)
    found = [over_articles(values, articles), median_over_articles(values, articles)]
    found += [over_seeds([values] * 2, articles), between(values + 5, articles, [5.0, 5.0], [8, 9])]
    np.testing.assert_array_equal(found, [(mean, math.nan, math.nan)] * 4)
    assert few(articles[~np.isnan(values)])


def test_no_spread_has_no_width_and_one_huge_article_a_wide_one():
    article, same = [0, 0, 0, 1, 2, 2], [0.1] * 6
    found = over_articles(same, article), median_over_articles(same, article), over_seeds([same] * 3, article)
    np.testing.assert_allclose(found, 0.1, atol=1e-15)
    bound = 0.025 ** (1 / effective_articles(article))  # nothing missed is not never missed
    assert over_articles([True] * 6, article, share=True) == pytest.approx((1, bound, 1))
    assert over_articles([False] * 6, article, share=True) == pytest.approx((0, 0, 1 - bound))
    _, low, high = over_articles(np.r_[np.zeros(1000), 1.0], np.r_[np.zeros(1000), 1])  # one huge article
    assert math.isfinite(high) and low < 0 and high > 1


def test_paired_is_the_interval_of_the_difference_and_narrower_than_apart():
    random = np.random.default_rng(0)
    values, article = clustered(random, articles=12)
    better = values + 0.1 + 0.05 * random.standard_normal(len(values))
    difference, low, high = paired(better, values, article)
    assert (difference, low, high) == over_articles(better - values, article)
    assert 0 < low < 0.1 < high and high - low < 0.2 * np.diff(over_articles(values, article)[1:])[0]


def test_between_is_welchs_test_where_articles_are_single_windows():
    random = np.random.default_rng(0)
    a, b = random.standard_normal(9), 3 * random.standard_normal(14)
    low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert between(a, np.arange(9), b, np.arange(20, 34)) == pytest.approx((a.mean() - b.mean(), low, high), rel=1e-9)
    assert between(b, np.arange(20, 34), a, np.arange(9)) == pytest.approx((b.mean() - a.mean(), -high, -low), rel=1e-9)


def test_seeds_from_the_analysis_of_variance():
    """Equal articles of one window: the crossed layout's mean squares give the variance in closed form."""
    random = np.random.default_rng(0)
    x = random.standard_normal((4, 1)) + random.standard_normal(7) + 0.5 * random.standard_normal((4, 7))
    grand, by_seed, by_article = x.mean(), x.mean(1), x.mean(0)
    ms_seed = 7 * ((by_seed - grand) ** 2).sum() / 3
    ms_article = 4 * ((by_article - grand) ** 2).sum() / 6
    ms_rest = ((x - by_seed[:, None] - by_article + grand) ** 2).sum() / 18
    assert ms_seed > ms_rest
    variance = (ms_seed + ms_article - ms_rest) / 28
    df = variance**2 / ((ms_article / 28) ** 2 / 6 + ((ms_seed - ms_rest) / 28) ** 2 / 3)
    half = stats.t.ppf(0.975, df) * math.sqrt(variance)
    assert over_seeds(x, np.arange(7)) == pytest.approx((grand, grand - half, grand + half), rel=1e-9)
    for seeds in (1, 3):  # one seed, or equal ones, leave the interval over articles
        assert over_seeds(x[[0] * seeds], np.arange(7)) == pytest.approx(over_articles(x[0], np.arange(7)))


@pytest.mark.parametrize(
    "interval",
    [
        lambda x, articles: over_articles(x + 0.5, articles, share=True),
        lambda x, articles: over_articles(x, articles[1:]),
        lambda x, articles: over_seeds(x, articles),  # without an axis of seeds
        lambda x, articles: paired(x, x[1:], articles),
        lambda x, articles: between(x, articles, x, articles + 3),  # a common article
        lambda x, articles: between([x] * 2, articles, [x] * 3, articles + 4),  # other seeds
    ],
)
def test_values_that_do_not_fit_are_refused(interval):
    with pytest.raises(ValueError):
        interval(np.array([0.0, 0.1, 1.0, 0.3]), np.arange(4))


def test_sign_flip_is_exact_where_it_can_be():
    values, article, sums = [1.0, 2.0, -0.5, 4.0, 3.0], [0, 0, 1, 2, 3], [3.0, -0.5, 4.0, 3.0]
    every = [abs(np.dot(sums, signs)) for signs in itertools.product((-1, 1), repeat=4)]
    assert sign_flip(values, article) == sum(e >= abs(sum(sums)) for e in every) / 16 == 4 / 16
    assert sign_flip([1.0] * 15, range(15)) == 2 / 2**15
    assert sign_flip([1.0] * 40, range(40), 500) == 1 / 501  # drawn: the observed one counts itself
    assert sign_flip([0.0, 0.0], [1, 2]) == sign_flip([1.0], [1]) == 1
    assert math.isnan(sign_flip([], []))
    random = np.random.default_rng(0).standard_normal(30)
    assert sign_flip(random, range(30)) == sign_flip(random, range(30))
    assert sign_flip(random, range(30), 20_000) == pytest.approx(stats.ttest_1samp(random, 0).pvalue, abs=0.03)


@pytest.mark.parametrize("articles", [10, 20])
def test_sign_flip_raises_no_more_false_alarms_than_it_says(articles):
    random = np.random.default_rng(0)
    data = [clustered(random, articles, truth=0) for _ in range(400)]
    nulls, shifted = (np.array([sign_flip(x + shift, article, 200) for x, article in data]) for shift in (0, 2))
    for alpha in (0.05, 0.2):
        assert abs((nulls <= alpha).mean() - alpha) < 3.5 * math.sqrt(alpha * (1 - alpha) / 400)
    assert (shifted <= 0.05).mean() > 0.95


def test_effective_articles_and_the_caveats_of_few():
    assert effective_articles([3, 3, 3, 8, 8, 8]) == 2 and effective_articles([]) == 0
    assert effective_articles(np.repeat([0, 1, 2], [8, 1, 1])) == pytest.approx(100 / 66)
    assert few(np.arange(FEW)) == few(np.repeat(np.arange(10), 7), seeds=3) == ""
    unequal = np.repeat(np.arange(13), [200] + [5] * 12)
    for caveat, figure in ((few(np.arange(4)), "4 "), (few(unequal), "1.7 "), (few([1, 1]), "1 ")):
        assert figure in caveat and ";" not in caveat
    for seeds in (1, 2):
        assert few(np.arange(20), seeds=seeds) and few(np.arange(4), seeds=seeds).count("; ") == 1


# Intervals: coverage of a known truth

DATASETS = 500
# The numbers of windows in the embedded data's validation and OOD articles, and the fewest articles `few` accepts.
SIZES = {
    "validation": [1, 4, 7, 10, 21, 32, 36, 37, 45, 45, 48, 112, 126],
    "ood": [2, 3, 14, 32, 37, 39, 57, 66, 120, 135],
    "few": [40] * int(FEW),
}


def latent(random, sizes, icc=0.2, memory=0.6):
    """Standard normal values (R, N): an article's own effect (share `icc` of the variance) + AR(1) in the article."""
    sizes = np.array(sizes)
    noise = random.standard_normal((DATASETS, len(sizes), sizes.max()))
    for t in range(1, sizes.max()):
        noise[..., t] = memory * noise[..., t - 1] + math.sqrt(1 - memory**2) * noise[..., t]
    own = random.standard_normal((DATASETS, len(sizes), 1))
    values = math.sqrt(icc) * own + math.sqrt(1 - icc) * noise
    return values[:, np.arange(sizes.max()) < sizes[:, None]]


def ranks(values, candidates=48, skill=1.6):
    """Standard normal values to ranks; the greater the skill, the more of them low."""
    return np.ceil(candidates * stats.norm.cdf(values) ** skill).clip(1, candidates)


def covered(truth, intervals):
    return np.mean([low <= truth <= high for _, low, high in intervals])


def assert_covered(share, most=0.98):
    """92 to 98 %, give or take two Monte Carlo standard errors of the ends."""
    below, above = (2 * math.sqrt(p * (1 - p) / DATASETS) for p in (0.92, most))
    assert 0.92 - below <= share <= most + above, share


@pytest.mark.parametrize("split", SIZES)
def test_coverage_of_each_figure(split):
    random = np.random.default_rng(5)
    article = np.repeat(np.arange(len(SIZES[split])), SIZES[split])
    z = latent(random, SIZES[split])
    rank, every = ranks(z), ranks(stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000))
    assert_covered(covered(0, (over_articles(v, article) for v in z)))
    assert_covered(covered((1 / every).mean(), (over_articles(v, article, share=True) for v in 1 / rank)))
    for k in (1, 5):
        assert_covered(covered((every <= k).mean(), (over_articles(v, article, share=True) for v in rank <= k)))
    assert_covered(covered(np.median(every), (median_over_articles(v, article) for v in rank)))
    other = ranks(0.8 * z + 0.6 * latent(random, SIZES[split]))
    assert_covered(covered(0, (paired(*v, article) for v in zip(1 / rank, 1 / other, strict=True))), most=0.985)


@pytest.mark.parametrize("seeds, by_seed, interaction", [(3, 0.0, 0.0), (3, 0.5, 0.1), (5, 0.3, 0.5)])
def test_coverage_over_articles_and_seeds(seeds, by_seed, interaction):
    random = np.random.default_rng(7)
    article = np.repeat(np.arange(10), SIZES["ood"])
    values = latent(random, SIZES["ood"])[:, None] + by_seed * random.standard_normal((DATASETS, seeds, 1))
    values = values + interaction * random.standard_normal((DATASETS, seeds, 10))[..., article]
    share = covered(0, (over_seeds(v, article) for v in values))
    assert_covered(share)
    assert not by_seed or covered(0, (over_articles(v[0], article) for v in values)) < share  # lacks the seeds' spread


def test_coverage_of_the_difference_of_two_splits():
    """Of one seed, and of three that shift both splits, and the first one more."""
    random = np.random.default_rng(8)
    first, second = (np.repeat(np.arange(len(SIZES[s])) + i, SIZES[s]) for s, i in (("validation", 0), ("ood", 100)))
    one, three = [], []
    for a, b in zip(latent(random, SIZES["validation"]), latent(random, SIZES["ood"]), strict=True):
        common, own = 2 * random.standard_normal((3, 1)), 0.3 * random.standard_normal((3, 1))
        one.append(between(a, first, 0.5 * b - 0.2, second))
        three.append(between(a + common + own, first, b + common, second))
    assert_covered(covered(0.2, one))
    assert_covered(covered(0, three))


def test_this_coverage_test_refuses_too_narrow_and_too_wide_intervals():
    random = np.random.default_rng(9)
    article = np.repeat(np.arange(10), SIZES["ood"])
    z = latent(random, SIZES["ood"])
    narrow = covered(0, (over_articles(v, np.arange(len(v))) for v in z))  # windows as if they were independent
    for wrong in (narrow, covered(0, (over_articles(v, article, 0.998) for v in z))):
        with pytest.raises(AssertionError):
            assert_covered(wrong)
