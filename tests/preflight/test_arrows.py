"""Arrows of closed-form predictors: the fits of each fold, and worlds whose answer is known.

Axes: A articles, N windows.
"""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from lvmlib.baselines import STRENGTHS, fit_ridge, fit_weights
from lvmlib.data import worlds
from lvmlib.data.open import dataset
from lvmlib.errors import LVMError
from lvmlib.judge.arrow import arrow
from lvmlib.judge.fivecat import score
from lvmlib.preflight.arrows import _fit_folds, beyond, crossed_arrows, declared
from lvmlib.preflight.facts import joined
from lvmlib.statistics import over_articles


def both_ways(store, horizon=2):
    return dataset(store, horizon), dataset(store, horizon, direction="backward")


def test_folds_are_fitted_as_the_models_are_without_the_articles_that_are_judged():
    whole = joined(both_ways(worlds.rotation(articles=20, length=14, dim=8))[1])
    used = np.unique(whole.article)
    fits = _fit_folds(whole, used, 4)
    for fold in (0, 3):
        kept = replace(whole, start=whole.start[~np.isin(whole.article, used[fold::4])])
        torch.testing.assert_close(fits[fold]["weighted mean"].weights, fit_weights(kept), atol=1e-4, rtol=0)
        ridges = [fit_ridge(kept, (s,))[0] for s in STRENGTHS]
        assert min(float((fits[fold]["ridge"].weights - r).abs().max()) for r in ridges) < 1e-4


def test_crossed_arrows_are_the_arrow_of_each_fold():
    forward, backward = both_ways(worlds.announcing(articles=20, length=16, dim=8))
    found = crossed_arrows(forward, backward, folds=2)["ridge"]
    whole = [joined(d) for d in (forward, backward)]
    used = np.unique(found.article)
    fits = [_fit_folds(w, used, 2) for w in whole]
    rows = []
    for fold in (0, 1):
        tests = [replace(w, start=w.start[np.isin(w.article, used[fold::2])]) for w in whole]
        one = arrow([fits[0][fold]["ridge"]], [fits[1][fold]["ridge"]], tuple(tests))
        rows.append((one.differences["novel MRR"][0], one.article))
    values, article = (np.concatenate(r) for r in zip(*rows, strict=True))
    np.testing.assert_array_equal(found.article, article)
    np.testing.assert_allclose(found.differences["novel MRR"][0], values, atol=1e-12)
    row = found.table.set_index("measure").loc["novel MRR"]
    np.testing.assert_allclose(row[["difference", "low", "high"]].astype(float), over_articles(values, article))
    assert sorted(np.unique(article)) == sorted(np.unique(whole[0].article))  # every article once


def test_crossed_arrows_need_articles():
    with pytest.raises(LVMError, match="5 articles"):
        crossed_arrows(*both_ways(worlds.rotation(articles=5, length=20, dim=4)), folds=5)


@functools.cache
def arrows_of(name, articles, dim, horizon=2):
    return crossed_arrows(*both_ways(worlds.world(name, articles=articles, length=30, dim=dim), horizon))


@pytest.mark.parametrize("name", ["exchangeable", "diverging", "converging"])
@pytest.mark.parametrize(("articles", "dim"), [(100, 48), (400, 128), (1000, 48)])
def test_no_arrow_is_declared_where_there_is_none(name, articles, dim):
    """Many articles make ridge an averaging predictor, which feels diverging noise as the weighted mean does."""
    arrows = arrows_of(name, articles, dim)
    assert declared(arrows) == "none"
    if articles >= 400 and name != "exchangeable":
        assert arrows["ridge"].declared == {"diverging": "forward", "converging": "backward"}[name]
        seen = arrows["ridge"].table.assign(**{"forward above chance": 1.0, "backward above chance": 1.0})
        assert declared({**arrows, "ridge": replace(arrows["ridge"], table=seen)}) == "none"


@pytest.mark.parametrize(("name", "way"), [("announcing", "forward"), ("reversed_announcing", "backward")])
def test_an_arrow_is_declared_where_there_is_one_and_its_way_is_above_chance(name, way):
    arrows = arrows_of(name, 400, 48, horizon=1)
    assert declared(arrows) == way
    ridge, averaging = (arrows[n].differences["novel MRR"][0] for n in ("ridge", "weighted mean"))
    assert beyond(arrows) == over_articles(ridge - averaging, arrows["ridge"].article)
    at_chance = arrows["ridge"].table.assign(**{f"{way} above chance": -0.001})
    at_chance = {**arrows, "ridge": replace(arrows["ridge"], table=at_chance)}
    assert declared(at_chance) == "none"


def test_above_chance_is_the_lower_end_of_what_ridge_has_beyond_chance():
    forward, backward = both_ways(worlds.announcing(articles=20, length=16, dim=8))
    found = crossed_arrows(forward, backward, folds=2)["weighted mean"]
    table = found.table.set_index("measure").loc["novel MRR"]
    chance = np.mean(1 / np.arange(1, 12))  # 16 chunks less 5 of context, whichever way they are read
    for way in ("forward", "backward"):
        assert table[f"{way} above chance"] < table[way] - chance < table[f"{way} above chance"] + 0.2
    whole = [joined(d) for d in (forward, backward)]
    used = np.unique(found.article)
    values, article = [], []
    for fold in (0, 1):
        own = whole[0].start[np.isin(whole[0].article, used[fold::2])]
        test = replace(whole[0], start=own)
        common = np.isin(test.target, whole[1].target)
        test = replace(test, start=test.start[common])
        frame = score(_fit_folds(whole[0], used, 2)[fold]["weighted mean"], test)
        values.append(1 / frame["novel rank"] - chance)
        article.append(frame["article"])
    low = over_articles(np.concatenate(values), np.concatenate(article))[1]
    assert table["forward above chance"] == pytest.approx(low, abs=1e-9)
