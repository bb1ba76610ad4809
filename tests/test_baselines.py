"""The baselines against numpy: constant, copy last, mean, weighted mean, ridge.

Axes: T context length, D vector dimension, N windows.
"""

import numpy as np
import pytest
import torch
from judge.plain import store_of

from lvmlib.baselines import STRENGTHS, baselines, fit_ridge, fit_weights
from lvmlib.errors import LVMError
from lvmlib.windows import windows

T, D = 5, 6


def cut(articles, horizon=2, numbers=None):
    """Training windows of these articles, each (length, D)."""
    numbers = range(len(articles)) if numbers is None else numbers
    store = store_of({n: ("train", np.arange(len(x)), x) for n, x in zip(numbers, articles, strict=True)})
    return windows(store, "train", horizon)


def random_windows(horizon=2, count=12):
    """Random walks on the sphere: neighbours are similar."""
    random = np.random.default_rng(0)
    return cut([random.normal(size=(16, D)).cumsum(0) for _ in range(count)], horizon)


def design(w):
    """Contexts (N, T, D) and targets (N, D) in float64, cut by hand from the store."""
    rows = w.store.vectors.astype(np.float64)
    return np.stack([rows[s : s + T] for s in w.start]), np.stack([rows[s + T - 1 + w.horizon] for s in w.start])


def plain_ridge(x, y, strength):
    return np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ y)


def best_strength(w):
    """The strength with the least squared error on every fifth article number, fitted to the others."""
    context, target = design(w)
    x, out = context.reshape(len(context), -1), w.store.article[w.start] % 5 == 0
    assert out.any() and not out.all()
    return min(STRENGTHS, key=lambda s: ((x[out] @ plain_ridge(x[~out], target[~out], s) - target[out]) ** 2).sum())


def test_constant_copy_last_and_mean():
    w = random_windows()
    predictors = baselines(w)
    assert list(predictors) == ["constant", "copy last", "mean", "weighted mean", "ridge"]
    x = torch.nn.functional.normalize(torch.randn(3, T, D, generator=torch.Generator().manual_seed(0)), dim=-1)
    wanted = {"constant": design(w)[1].mean(0), "copy last": x[:, -1], "mean": sum(x[:, t] for t in range(T)) / T}
    for name, predictor in predictors.items():
        raw, unit = predictor(x)
        torch.testing.assert_close(unit, raw / raw.norm(dim=-1, keepdim=True))
        if name in wanted:
            np.testing.assert_allclose(raw.numpy(), np.broadcast_to(wanted[name], (3, D)), atol=1e-6)
        assert not list(predictor.parameters())
        with pytest.raises(LVMError):
            predictor(torch.ones(3, T, D + 1))


@pytest.mark.parametrize("horizon, count", [(1, 12), (2, 80)])
def test_weighted_mean_and_ridge_are_least_squares(horizon, count):
    w = random_windows(horizon, count)
    assert count == 12 or len(w) > 512  # more than one batch
    context, target = design(w)
    stacked, x = context.transpose(0, 2, 1).reshape(-1, T), context.reshape(len(context), -1)
    wanted = np.linalg.lstsq(stacked, target.reshape(-1), rcond=None)[0]  # a row for each coordinate of each window
    np.testing.assert_allclose(fit_weights(w), wanted, atol=1e-5)
    strength = best_strength(w)
    for strengths, best in ((STRENGTHS, strength), ((3.0,), 3.0)):
        weights, found = fit_ridge(w, strengths)
        assert found == best
        np.testing.assert_allclose(weights, plain_ridge(x, target, best), atol=1e-4)  # of all articles
    fitted = baselines(w)
    predicted = {name: fitted[name](torch.from_numpy(context).float())[0] for name in ("weighted mean", "ridge")}
    np.testing.assert_allclose(predicted["weighted mean"], np.einsum("t,ntd->nd", wanted, context), atol=1e-5)
    np.testing.assert_allclose(predicted["ridge"], x @ plain_ridge(x, target, strength), atol=1e-4)


@pytest.mark.parametrize("strange, expected", [(0, STRENGTHS[-1]), (1, STRENGTHS[0])])
def test_the_strength_is_chosen_on_every_fifth_article(strange, expected):
    """Articles rotate by a rule, those of number ≡ strange (mod 5) by its opposite. Where these are left out, the rule
    fails and the strongest shrinkage wins; where they are not, the weakest."""
    random = np.random.default_rng(0)
    rule = np.linalg.qr(random.normal(size=(D, D)))[0]
    articles = []
    for number in range(20):
        x = [random.normal(size=D)]
        for _ in range(39):
            x.append(x[-1] @ (-rule if number % 5 == strange else rule))
        articles.append(np.array(x))
    w = cut(articles, horizon=1)
    assert best_strength(w) == expected == fit_ridge(w)[1]


@pytest.mark.parametrize("numbers", [(1, 2, 3), (0, 5, 10)])
def test_without_articles_on_both_sides_the_middle_strength_is_taken(numbers):
    random = np.random.default_rng(0)
    assert fit_ridge(cut([random.normal(size=(12, D)) for _ in numbers], numbers=numbers))[1] == 30.0


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-3])
def test_near_constant_articles_do_not_break_the_fits(noise):
    """The five context vectors are collinear: the least-squares weights are not unique, the prediction is."""
    random = np.random.default_rng(0)
    w = cut([np.tile(random.normal(size=(1, D)), (14, 1)) + noise * random.normal(size=(14, D)) for _ in range(10)])
    context, target = (torch.from_numpy(a).float() for a in design(w))
    for name, predictor in baselines(w).items():
        raw, unit = predictor(context)
        assert torch.isfinite(raw).all()
        if name != "constant":  # which does not know the article
            assert torch.nn.functional.cosine_similarity(unit, target).min() > 0.98, name
    assert fit_weights(w).sum().item() == pytest.approx(1, abs=0.01) and fit_weights(w).abs().max() < 1.5
