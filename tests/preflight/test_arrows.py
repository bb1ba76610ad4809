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
    every = joined(both_ways(worlds.rotation(articles=20, length=14, dim=8))[1])
    used = np.unique(every.article)
    fits = _fit_folds(every, used, 4)
    for fold in (0, 3):
        others = replace(every, start=every.start[~np.isin(every.article, used[fold::4])])
        torch.testing.assert_close(fits[fold]["weighted mean"].weights, fit_weights(others), atol=1e-4, rtol=0)
        ridges = [fit_ridge(others, (s,))[0] for s in STRENGTHS]
        assert min(float((fits[fold]["ridge"].weights - r).abs().max()) for r in ridges) < 1e-4


@pytest.mark.parametrize("name", ["ridge", "weighted mean"])
def test_crossed_arrows_are_the_arrow_of_each_fold(name):
    data = both_ways(worlds.announcing(articles=20, length=16, dim=8))
    found = crossed_arrows(*data, folds=2)[name]
    every, used = [joined(d) for d in data], np.unique(found.article)
    fits = [_fit_folds(windows, used, 2) for windows in every]
    above = np.full(len(found.article), np.nan)
    for fold in (0, 1):
        tests = [replace(w, start=w.start[np.isin(w.article, used[fold::2])]) for w in every]
        one = arrow([fits[0][fold][name]], [fits[1][fold][name]], tuple(tests))
        inside = np.isin(found.article, used[fold::2])
        np.testing.assert_allclose(found.differences["novel MRR"][0, inside], one.differences["novel MRR"][0])
        common = replace(tests[0], start=tests[0].start[np.isin(tests[0].target, tests[1].target)])
        chance = np.mean(1 / np.arange(1, 12))  # 16 chunks less 5 of context, whichever way they are read
        above[inside] = 1 / score(fits[0][fold][name], common)["novel rank"] - chance
    row = found.table.set_index("measure").loc["novel MRR"]
    wanted = over_articles(found.differences["novel MRR"][0], found.article)
    np.testing.assert_allclose(row[["difference", "low", "high"]].astype(float), wanted)
    assert row["forward above chance"] == pytest.approx(over_articles(above, found.article)[1])
    assert row["backward above chance"] < row["backward"] - chance < row["backward above chance"] + 0.2
    assert set(found.article) == set(every[0].article)


def test_crossed_arrows_need_articles():
    with pytest.raises(LVMError, match="5 articles"):
        crossed_arrows(*both_ways(worlds.rotation(articles=5, length=20, dim=4)), folds=5)


@functools.cache
def arrows_of(name, articles, dim, horizon=2):
    return crossed_arrows(*both_ways(worlds.world(name, articles=articles, length=30, dim=dim), horizon))


def with_ridge(arrows, **columns):
    table = arrows["ridge"].table.assign(**columns)
    return {**arrows, "ridge": replace(arrows["ridge"], table=table)}


@pytest.mark.parametrize("name", ["exchangeable", "diverging", "converging"])
@pytest.mark.parametrize(("articles", "dim"), [(100, 48), (400, 48)])
def test_no_arrow_is_declared_where_there_is_none(name, articles, dim):
    """Many articles make ridge an averaging predictor, which feels diverging noise as the weighted mean does."""
    arrows = arrows_of(name, articles, dim)
    assert declared(arrows) == "none"
    if articles >= 400 and name != "exchangeable":
        assert arrows["ridge"].declared == {"diverging": "forward", "converging": "backward"}[name]
        above = {"forward above chance": 1.0, "backward above chance": 1.0}
        assert declared(with_ridge(arrows, **above)) == "none"


@pytest.mark.parametrize(("name", "way"), [("announcing", "forward"), ("reversed_announcing", "backward")])
def test_an_arrow_is_declared_where_there_is_one_and_its_way_is_above_chance(name, way):
    arrows = arrows_of(name, 400, 48, horizon=1)
    assert declared(arrows) == way
    ridge, averaging = (arrows[n].differences["novel MRR"][0] for n in ("ridge", "weighted mean"))
    assert beyond(arrows) == over_articles(ridge - averaging, arrows["ridge"].article)
    assert declared(with_ridge(arrows, **{f"{way} above chance": -0.001})) == "none"
