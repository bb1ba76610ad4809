"""The arrow of time against a plain derivation, and on stores read both ways.

Axes: S seeds, A articles, N targets that both directions share.
"""

import functools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from judge.plain import constant, cos, store_of

from lvmlib.baselines import Linear, untrained
from lvmlib.data import worlds
from lvmlib.errors import LVMError
from lvmlib.judge.arrow import MEASURES, Arrow, arrow, sign_flip
from lvmlib.statistics import over_seeds
from lvmlib.windows import windows

T, DIM = 5, 10


@functools.cache
def store(reverse=False, turn=False, articles=6, length=18):
    """Noisy articles with a gap in one; `turn`: each chunk is the one before, turned by a fixed rotation, plus noise.
    `reverse`: the same articles backwards."""
    random, made = np.random.default_rng(8), {}
    rotation = np.linalg.qr(random.standard_normal((DIM, DIM)))[0]
    for a in range(articles):
        rows = [random.standard_normal(DIM)]
        while len(rows) < length:
            before = rotation @ rows[-1] if turn else 0.5 * rows[-1]
            rows.append(before / np.linalg.norm(before) + (0.2 if turn else 0.3) * random.standard_normal(DIM))
        places = np.delete(np.arange(length + 1), 3 if a == 1 else length)
        made[a] = "val", *((length - places[::-1], rows[::-1]) if reverse else (places, rows))
    return store_of(made), rotation


def both_ways(horizon=2, **which):
    s, _ = store(**which)
    return windows(s, "val", horizon, T), windows(s, "val", horizon, T, "backward")


def seeds(first, count=3):
    generators = (torch.Generator().manual_seed(s) for s in range(first, first + count))
    return [Linear(DIM, torch.randn(T * DIM, DIM, generator=g) / T) for g in generators]


def plain_figures(model, s, target, step, horizon):
    """Novel MRR, cosine and loss of one prediction of the chunk in row `target`, read with `step`."""
    x, weights = s.vectors.astype(float), model.weights.double().numpy()
    rows = [target - step * (horizon + T - 1 - t) for t in range(T)]
    raw = x[rows].reshape(-1) @ weights if weights.ndim == 2 else weights @ x[rows]
    others = [r for r in np.flatnonzero(s.article == s.article[target]) if r not in rows]
    cosines, own = [cos(raw, x[r]) for r in others], cos(raw, x[target])
    above, equal = sum(c > own + 1e-6 for c in cosines), sum(abs(c - own) <= 1e-6 for c in cosines)
    mrr = 1 / (1 + above + (equal - 1) / 2)
    return {"novel MRR": mrr, "cosine": own, "loss": np.mean((raw - x[target]) ** 2)}


@pytest.mark.parametrize("horizon", [1, 2])
def test_arrow_is_that_of_the_plain_derivation(horizon):
    s, _ = store()
    cut = both_ways(horizon)
    forward, backward = seeds(0), seeds(10)
    copy_last = untrained(DIM, T)["copy last"]
    found = arrow(forward, backward, cut)
    common = sorted(set(cut[0].target.tolist()) & set(cut[1].target.tolist()))
    assert 0 < len(common) < len(cut[0])
    np.testing.assert_array_equal(found.article, s.article[common])
    at = {
        (m, way): [plain_figures(m, s, r, way, horizon) for r in common]
        for m, way in [*((f, 1) for f in forward), *((b, -1) for b in backward), (copy_last, 1), (copy_last, -1)]
    }
    assert list(found.table["measure"]) == list(MEASURES) == ["novel MRR", "cosine", "loss"]
    for name, row in found.table.set_index("measure").iterrows():
        value = {key: np.array([r[name] for r in rows]) for key, rows in at.items()}
        copying = value[copy_last, 1] - value[copy_last, -1]
        difference = [value[f, 1] - value[b, -1] - copying for f, b in zip(forward, backward, strict=True)]
        np.testing.assert_allclose(found.differences[name], difference, rtol=2e-6, atol=2e-6)
        assert row["forward"] == pytest.approx(np.mean([value[f, 1] for f in forward]), rel=1e-6, abs=1e-6)
        assert row["backward"] == pytest.approx(np.mean([value[b, -1] for b in backward]), rel=1e-6, abs=1e-6)
        assert row["copying"] == pytest.approx(copying.mean(), abs=1e-6)
        assert row["difference"] == pytest.approx(row["forward"] - row["backward"] - row["copying"], abs=1e-9)
        wanted = over_seeds(np.array(difference), s.article[common])
        assert (row["difference"], row["low"], row["high"]) == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        assert row["p"] == sign_flip(np.mean(difference, 0), s.article[common])
        assert (row["seeds"], row["articles"], row["windows"]) == (3, len(set(s.article[common])), len(common))


def test_the_sign_flips_when_the_articles_are_reversed():
    forward, backward = seeds(0), seeds(10)
    ahead, back = arrow(forward, backward, both_ways()), arrow(backward, forward, both_ways(reverse=True))
    assert (ahead.article == back.article).all()
    for name in MEASURES:
        for a in range(6):  # windows are in the other order in each article
            ours, theirs = (x.differences[name][:, ahead.article == a] for x in (ahead, back))
            np.testing.assert_allclose(theirs, -ours[:, ::-1], atol=1e-6)
    one, two = ahead.table.set_index("measure"), back.table.set_index("measure")
    for ours, theirs in (("difference", "difference"), ("copying", "copying"), ("low", "high"), ("high", "low")):
        np.testing.assert_allclose(one[ours], -two[theirs], atol=1e-6)
    np.testing.assert_allclose(one[["forward", "p"]], two[["backward", "p"]], atol=1e-6)


def test_copying_has_no_arrow():
    copying = [untrained(DIM, T)["copy last"]] * 2
    result = arrow(copying, copying, both_ways())
    assert (result.table[["difference", "low", "high"]] == 0).all(axis=None) and result.declared == "none"
    # Its forward and backward figures differ, since the two ends of an article do.
    assert (result.table["copying"] != 0).all()
    np.testing.assert_allclose(result.table["forward"] - result.table["backward"], result.table["copying"])


def test_an_arrow_is_found_where_there_is_one():
    """A predictor that knows the rotation of the world, forwards; read backwards it turns the same way."""
    _, rotation = store(turn=True)
    weights = torch.zeros(T * DIM, DIM)
    weights[-DIM:] = torch.from_numpy(rotation.T).float()
    knows = [Linear(DIM, weights)] * 2
    result = arrow(knows, knows, both_ways(1, turn=True))
    table = result.table.set_index("measure")
    assert result.declared == "forward"
    assert table.loc["novel MRR", "low"] > 0.2 and table.loc["cosine", "low"] > 0.2 and table.loc["loss", "high"] < 0
    assert (table["p"] == 2 / 2**6).all()  # of 2⁶ signs of six articles, only the two with all alike are as extreme
    assert arrow(knows, knows, both_ways(1, turn=True, reverse=True)).declared == "backward"


@pytest.mark.parametrize(
    "interval, raw, declared",
    [
        ((0.1, 0.2), (0.1, 0.2), "forward"),
        ((-0.2, -0.1), (-0.3, -0.1), "backward"),
        ((-0.1, 0.1), (0.1, 0.2), "none"),
        ((0.1, 0.2), (-0.1, 0.1), "none"),  # copying's own arrow, with the sign changed
        ((0.1, 0.2), (-0.2, -0.1), "none"),
        ((math.nan, math.nan), (math.nan, math.nan), "none"),
    ],
)
def test_the_declared_arrow_is_that_of_novel_mrr(interval, raw, declared):
    ends = zip(("low", "high", "raw low", "raw high"), (*interval, *raw), strict=True)
    table = pd.DataFrame({"measure": ["cosine", "novel MRR"], **{k: [1.0, x] for k, x in ends}})
    assert Arrow(table, {}, np.zeros(1)).declared == declared


@pytest.mark.parametrize("name", ["converging", "diverging"])
def test_a_constant_has_no_arrow_where_copying_has_one(name):
    """It reads nothing. Copying's own difference, subtracted, would give it the opposite one."""
    world = worlds.world(name, dim=48, articles=200, length=20)
    cut = tuple(windows(world, "val", 2, direction=d) for d in ("forward", "backward"))
    result = arrow([constant(48)], [constant(48)], cut)
    row = result.table.set_index("measure").loc["novel MRR"]
    assert result.declared == "none" and abs(row["copying"]) > 3 * abs(row["forward"] - row["backward"])


def test_few_articles_or_seeds_give_a_caution():
    simple = untrained(DIM, T)["mean"]
    cases = (3, both_ways()), (1, both_ways()), (1, both_ways(articles=2, length=30))
    cautions = [arrow([simple] * n, [simple] * n, cut).caution for n, cut in cases]
    assert cautions[0] == "" and "one seed" in cautions[1] and "only 2 articles" not in cautions[1]
    assert "only 2 articles" in cautions[2] and "one seed" in cautions[2]


def test_bad_input_is_refused():
    cut, mean = both_ways(), untrained(DIM, T)["mean"]
    for forward, backward in (([mean], []), ([], []), ([mean] * 2, [mean])):
        with pytest.raises(LVMError, match=f"{len(forward)} forward and {len(backward)} backward"):
            arrow(forward, backward, cut)
    other = both_ways(turn=True)[1]
    short = both_ways(articles=3, length=12)  # no target is shared
    for pair in (cut[::-1], (cut[0], cut[0]), (cut[1], cut[1]), short, (cut[0], other)):
        with pytest.raises(LVMError):
            arrow([mean], [mean], pair)
