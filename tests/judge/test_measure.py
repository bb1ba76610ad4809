"""`measure`, `judge` and `score` against plain derivations, and the random draws.

Axes: N windows, T context length, D vector dimension.
"""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from judge.plain import (
    ORIGINAL_OFFSETS,
    PREDICTORS,
    Reference,
    Scan,
    T,
    assert_same,
    copy_last,
    flat,
    knowing,
    measured,
    only_article,
    random_linear,
    reference,
    rotation,
    small_windows,
    store_of,
)
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from lvmlib import models
from lvmlib.baselines import Linear, Weighted
from lvmlib.data.open import dataset
from lvmlib.errors import LVMError
from lvmlib.evaluate import validate
from lvmlib.judge import health as health_module
from lvmlib.judge import tricks
from lvmlib.judge.health import health
from lvmlib.judge.measure import PARTS, judge, measure, negatives, score
from lvmlib.windows import Windows, windows

# Every figure


@pytest.mark.parametrize("horizon", [1, 2])
@pytest.mark.parametrize("split, direction", [("val", "forward"), ("ood", "forward"), ("val", "backward")])
@pytest.mark.parametrize("name", ["linear", "weighted", "scan"])
def test_every_figure_is_that_of_the_plain_derivation(name, split, direction, horizon):
    wanted = reference(name, split, horizon, direction)
    frame = wanted.frame
    # The store is worth the test: windows with and without every offset, rollouts that meet a gap, and too few chunks
    # of other articles for 99 negatives.
    complete = frame[[f"offset {k:+d}" for k in ORIGINAL_OFFSETS]].notna().all(axis=1)
    assert complete.any() and not complete.all() and frame["offset -8"].notna().any()
    assert frame["rollout 5"].notna().any() and frame["rollout 5"].isna().any()
    assert (frame["hundred candidates"] < 100).all()
    assert_same(measured(name, split, horizon, direction), frame, unclear=wanted.unclear)


@pytest.mark.parametrize(
    "name, cut, more",
    [
        ("transformer", ("val", 1, "forward"), {"most": 3}),
        ("transformer", ("val", 2, "backward"), {"most": 3}),
        ("scan", ("val", 2), {"dtype": np.float16}),
    ],
)
def test_every_figure_of_a_transformer_and_of_float16_vectors(name, cut, more):
    wanted = reference(name, *cut, **more)
    assert_same(measured(name, *cut, **more), wanted.frame, unclear=wanted.unclear)


@pytest.mark.parametrize("name, horizon, direction", [("mean", 1, "backward"), ("linear", 2, "forward")])
def test_every_figure_on_real_vectors(name, horizon, direction):
    cut = dataset("wikipedia", horizon, T, direction=direction).val.at_most(12)
    model = PREDICTORS[name](cut.store.dim)
    wanted = Reference(model, cut)
    assert (wanted.frame["hundred candidates"] == 100).all() and wanted.frame["candidates"].max() > 50
    assert_same(flat(measure(model, cut)), wanted.frame, unclear=wanted.unclear)


def test_score_is_a_few_figures_of_measure():
    cut = small_windows("val", 2, "backward")
    frame, wanted = score(Scan(cut.store.dim), cut, batch_size=7), measure(Scan(cut.store.dim), cut)
    assert set(frame) == {
        "article",
        "target",
        "loss",
        "cosine",
        "novel rank",
        "possible rank",
        "novel MRR",
        "possible MRR",
    }
    for column in frame:
        np.testing.assert_allclose(frame[column], wanted[column], rtol=0, atol=1e-6, err_msg=column)


class Heads(models.Predictor):
    """The point of one predictor and the ranks of another."""

    def __init__(self, point, ranker):
        super().__init__(point.dim, point.context_length)
        self.point, self.ranker = point, ranker

    def raw(self, context):
        return self.point.raw(context)

    def heads(self, context):
        return *self(context), self.ranker(context)[1]


def test_of_two_heads_one_is_ranked_and_the_other_is_measured():
    data = small_windows("val", 2)
    point, ranker = copy_last(data.store.dim), random_linear(data.store.dim)
    model = Heads(point, ranker)
    both, of_point, of_ranker = (flat(measure(m, data)) for m in (model, point, ranker))
    ranks = ["six rank", "rank", "novel rank", "possible rank", "hundred", *(c for c in both if ", novel MRR" in c)]
    pd.testing.assert_frame_equal(both[ranks], of_ranker[ranks])
    pd.testing.assert_frame_equal(both.drop(columns=ranks), of_point.drop(columns=ranks))
    assert not both["novel rank"].equals(of_point["novel rank"]) and not both["cosine"].equals(of_ranker["cosine"])
    pd.testing.assert_series_equal(score(model, data)["novel rank"], both["novel rank"])
    wanted = {
        "novel_mrr": (1 / of_ranker["novel rank"]).mean(),
        "recall_at_5": (of_ranker["six rank"] <= 5).mean(),
        "val_cos": of_point["cosine"].mean(),
        "margin": of_point["margin last"].mean(),
        "val_loss": of_point["loss"].mean(),
        "val_unit_loss": 2 * (1 - of_point["cosine"].mean()) / data.store.dim,
    }
    assert validate(model, data) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4, 7])
@pytest.mark.parametrize("name", ["linear", "weighted", "scan"])
def test_batches_that_cut_articles_apart_change_nothing(name, batch_size):
    assert_same(measured(name, "val", 1, batch_size=batch_size), measured(name, "val", 1))


def test_a_window_is_the_same_in_a_selection():
    """`at_most` drops windows, not chunks: candidates, offsets, draws and chance stay those of the whole article."""
    whole = small_windows("val", 2)
    few = whole.at_most(7)
    same = np.flatnonzero(np.isin(whole.start, few.start))
    wanted = measured("scan", "val", 2).iloc[same].reset_index(drop=True)
    assert_same(flat(measure(Scan(whole.store.dim), few)), wanted)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("call", [measure, score, health])
def test_the_model_is_in_eval_mode_and_then_in_the_mode_it_was_in(call, training):
    class Dropping(Scan):
        def raw(self, context):
            return torch.nn.functional.dropout(super().raw(context), 0.5, self.training)

    cut = small_windows("val", 1)
    model = Dropping(cut.store.dim).train(training)
    found, wanted = call(model, cut), call(Scan(cut.store.dim), cut)
    assert model.training is training
    np.testing.assert_array_equal(*((x["norm"] if call is health else x["cosine"]) for x in (found, wanted)))


def test_an_only_article_has_no_chunk_from_elsewhere():
    model, cut = random_linear(8), only_article()
    wanted = Reference(model, cut)
    assert wanted.frame[["hundred", "last from elsewhere", "last from elsewhere, novel MRR"]].isna().all(axis=None)
    assert_same(flat(measure(model, cut)), wanted.frame, unclear=wanted.unclear)


def test_a_stranger_that_equals_the_target_shares_its_place_in_the_hundred():
    """Two articles of the same chunks: the perfect prediction has its target's double among the other article's."""
    store, turn = rotation()
    first = store.vectors[store.article == 0]
    twins = store_of({a: ("val", np.arange(len(first)), first) for a in (0, 1)})
    found = measure(knowing(turn), windows(twins, "val", 1, T))
    assert (found.hundred == 0.5).all() and (found.hundred_candidates == 1 + len(first)).all()
    assert (found.ranks["novel"] == 1).all()


def test_a_predictor_of_nan_is_refused():
    for call in (measure, score):
        with pytest.raises(LVMError, match="val"):
            call(Linear(16, torch.full((T * 16, 16), math.nan)), small_windows("val", 1))


def test_memory_does_not_grow_with_the_number_of_windows():
    """No tensor of `measure` is larger for more windows, but for the store itself, which is mapped."""

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, call, types, args=(), kwargs=None):
            made = call(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, list | tuple) else [made]:
                if isinstance(tensor, torch.Tensor) and call is not torch.ops.aten.detach.default:
                    self.most = max(self.most, tensor.numel())
            return made

    random = np.random.default_rng(0)
    layout = {a: ("val", np.arange(20), random.standard_normal((20, 32))) for a in range(20)}
    cut = windows(store_of(layout), "val", 1, T)
    most = []
    for count in (60, len(cut)):
        with Largest() as largest:
            measure(random_linear(32), Windows(cut.store, "val", cut.start[:count], T, 1), batch_size=20)
        most.append(largest.most)
    assert len(cut) == 300 and most[0] == most[1]


# Judge


def test_every_gate_shares_one_pass_over_each_distinct_input():
    """The context, ten ablations and four further rollout steps; nothing for health, and nothing twice in a window."""

    class Counting(Scan):
        def raw(self, context):
            self.__dict__.setdefault("asked", []).append(context.clone())
            return super().raw(context)

    cut = small_windows("val", 2)
    model, seen = Counting(cut.store.dim), []
    found, facts = judge(model, cut, progress=seen.append)
    assert len(model.asked) == 1 + 10 + 4 and all(x.shape == (len(cut), T, cut.store.dim) for x in model.asked)
    for one, other in itertools.combinations(model.asked, 2):  # a shuffle may be the order itself
        assert (one == other).all((1, 2)).float().mean() < 0.1
    assert sum(seen) == len(cut)
    assert_same(flat(found), measured("scan", "val", 2))
    alone = health(Scan(cut.store.dim), cut)
    assert set(facts) == set(alone)
    for key, value in alone.items():
        assert facts[key] == (value if isinstance(value, bool | None) else pytest.approx(value, abs=1e-6)), key


def test_predictions_beyond_the_memory_are_in_a_file_and_give_the_same(monkeypatch):
    cut = small_windows("val", 1)
    model = tricks.tricks(cut.store.dim, T, 0.5, torch.eye(cut.store.dim)[:2])["mean − a·context[-2]"]
    wanted = health(model, cut, batch_size=7)
    assert wanted["escape band"] is not None  # the predictions were read again
    monkeypatch.setattr(health_module, "IN_MEMORY", 10)
    assert health(model, cut, batch_size=7) == wanted


def test_bfloat16_gives_the_same_figures_within_its_rounding():
    cut = dataset("wikipedia", 2, T).val.at_most(16)
    model = PREDICTORS["transformer"](cut.store.dim)
    (exact, facts), (rough, rough_facts) = (judge(model, cut, precision=p) for p in ("float32", "bfloat16"))
    exact, rough = flat(exact), flat(rough)
    assert not exact["cosine"].equals(rough["cosine"])
    for column in exact:
        if not ("rank" in column or "MRR" in column or column == "hundred"):
            # bfloat16 has 8 bits, and the errors of a sum cancel by chance
            atol = 0.1 if column.startswith("weight") else 0.02
            np.testing.assert_allclose(rough[column], exact[column], rtol=0.02, atol=atol, err_msg=column)
    for column in ("novel rank", "possible rank", "rank"):
        assert abs((1 / rough[column]).mean() - (1 / exact[column]).mean()) < 0.05
    pd.testing.assert_frame_equal(exact, flat(measure(model, cut, precision="float32")))
    for key in ("norm", "copying ratio", "variance", "variance of targets"):
        assert rough_facts[key] == pytest.approx(facts[key], rel=0.02, abs=0.01)


# The prediction's parts and weights


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-3])
def test_parts_and_weights_are_sound_where_the_context_hardly_varies(spread):
    random = np.random.default_rng(3)
    x = random.standard_normal(16) + spread * random.standard_normal((14, 16))
    found = measure(random_linear(16), windows(store_of({0: ("val", np.arange(14), x)}), "val", 1, T))
    np.testing.assert_allclose(sum(np.abs(found.parts[name]) for name in PARTS), 1, atol=1e-5)
    inside = found.parts["along differences"]
    assert (inside >= 0).all() and (inside <= 1).all() and np.isfinite(found.weights).all()
    np.testing.assert_allclose(found.weights.sum(1), found.at([-1])[:, 0], atol=2e-3)


# Ties


@pytest.mark.parametrize("dim, batch_size", [(48, 1), (384, 512)])
def test_duplicate_chunks_share_their_mean_rank(dim, batch_size):
    """Chunks 10 and 2, 9 and 28, 8 and 11 of an article are the same vector."""
    random, articles = np.random.default_rng(4), {}
    for a in (0, 1):
        x = random.standard_normal((29, dim))
        x[10], x[9], x[8] = x[2], x[28], x[11]
        articles[a] = ("val", np.arange(29), x)
    cut, model = windows(store_of(articles), "val", 1, T), random_linear(dim, seed=dim)
    wanted = Reference(model, cut).frame
    assert (wanted["rank"] % 1 == 0.5).any() and (wanted["novel rank"] % 1 == 0.5).any()
    ranks = measure(model, cut, batch_size=batch_size).ranks
    np.testing.assert_array_equal(ranks["all"], wanted["rank"])
    np.testing.assert_array_equal(ranks["novel"], wanted["novel rank"])


# Random draws


def own_rows(w, i):
    return set(np.flatnonzero(w.store.article == w.article[i]))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("count", [7, 99])
def test_negatives_are_of_other_articles_of_the_split_without_repeats(direction, count):
    w = small_windows("val", 1, direction)
    orders, rows = negatives(w, np.arange(len(w)), 0, count)
    assert (np.sort(orders) == np.arange(T)).all() and rows.shape == (len(w), count)
    pool = set(np.flatnonzero(w.store.articles.loc[w.store.article, "split"] == "val"))
    for i in range(len(w)):
        drawn, others = rows[i][rows[i] >= 0], pool - own_rows(w, i)
        assert (rows[i][len(drawn) :] == -1).all() and len(drawn) == len(set(drawn)) == min(count, len(others))
        assert set(drawn) <= others


def test_draws_depend_on_the_seed_and_the_target_alone():
    w = small_windows("val", 1)
    orders, rows = negatives(w, np.arange(len(w)), 4, 9)
    few = w.at_most(6)
    places = [int(np.flatnonzero(w.start == s)[0]) for s in few.start]
    for cut, index, same in ((w, [5, 2], [5, 2]), (w, [11], [11]), (few, range(6), places)):  # any batch or selection
        again = negatives(cut, np.array(index), 4, 9)
        np.testing.assert_array_equal(again[0], orders[same])
        np.testing.assert_array_equal(again[1], rows[same])
    other = negatives(w, np.arange(len(w)), 5, 9)
    assert (other[0] != orders).any(axis=1).mean() > 0.9 and (other[1] != rows).any(axis=1).all()
    assert len({tuple(r) for r in rows}) == len(w)  # not one draw for all windows


def test_draws_are_those_of_all_reports_so_far():
    """Golden: by the code that first raised the instrument to 3."""
    orders, rows = negatives(dataset("wikipedia", 2).val, np.array([0, 176, 523]), 0, 99)
    assert orders.tolist() == [[1, 0, 2, 4, 3], [2, 0, 4, 1, 3], [1, 4, 0, 2, 3]]
    first = [[3841, 3758, 1627, 894, 2797, 3782], [2630, 2616, 1986, 3793, 950, 1618], [1622, 996, 1980, 941, 1964]]
    assert [row[: len(f)] for row, f in zip(rows.tolist(), first, strict=True)] == first
    assert rows.sum(1).tolist() == [226215, 226811, 171473]


def test_draws_are_uniform():
    """Chi-square over many seeds: every order of the context, and every chunk of the other articles, alike."""
    w = small_windows("val", 1)
    drawn = [negatives(w, np.arange(len(w)), s, 3) for s in range(200)]
    orders = np.concatenate([o for o, _ in drawn])
    counts = pd.Series(map(tuple, orders)).value_counts().reindex(itertools.permutations(range(T)), fill_value=0)
    assert stats.chisquare(counts).pvalue > 1e-3
    for i in (0, len(w) // 2, len(w) - 1):  # of three articles
        others = set(w.store.rows("val")) - own_rows(w, i)
        counts = pd.Series(np.concatenate([r[i] for _, r in drawn])).value_counts()
        assert set(counts.index) == others and stats.chisquare(counts).pvalue > 1e-3
        first = pd.Series([r[i, 0] for _, r in drawn]).value_counts().reindex(list(others), fill_value=0)
        assert stats.chisquare(first).pvalue > 1e-3  # the first of them stands in for the last context vector


def test_a_model_of_zeros_is_refused():
    data = small_windows("val", 2)
    with pytest.raises(LVMError, match="zero vector"):
        measure(Weighted(data.store.dim, torch.zeros(5)), data)
