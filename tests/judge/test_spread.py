"""Spread against truth: figures derived again by hand, and answers where the truth is known.

Axes: N windows, S samples, T context length, D vector dimension.
"""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from judge.plain import store_of
from scipy import stats

from lvmlib import models
from lvmlib.baselines import Weighted, fit_weights
from lvmlib.config import version
from lvmlib.errors import LVMError
from lvmlib.judge import controls
from lvmlib.judge.spread import histogram, kolmogorov, measure, place, reading, references, spread, summarise
from lvmlib.report import plots
from lvmlib.statistics import over_articles
from lvmlib.windows import windows

T, D = 2, 12
ARTICLES, LENGTH = 30, 42


class Normal(models.Predictor):
    """Samples about a place, of a width; with `uneven`, a width that differs from sample to sample."""

    def __init__(self, width, uneven=0.0):
        super().__init__(D, T)
        self.width, self.uneven = width, uneven

    def samples(self, context, count, generator=None):
        shape = count, len(context)
        size = self.width * torch.exp(self.uneven * torch.randn(shape, generator=generator))
        return self.raw(context) + size[..., None] * torch.randn(*shape, D, generator=generator) / math.sqrt(D)

    def raw(self, context):
        return torch.eye(D)[:1].expand(len(context), -1)


def world(width=0.5, uneven=0.0, seed=0):
    """Windows whose every chunk is a draw of Normal(width, uneven), made a unit vector, whatever came before."""
    g = torch.Generator().manual_seed(seed)
    drawn = Normal(width, uneven).samples(torch.zeros(ARTICLES * LENGTH, T, D), 1, g)[0]
    articles = drawn.view(ARTICLES, LENGTH, D).numpy()
    store = store_of({a: ("train" if a < 10 else "val", range(LENGTH), x) for a, x in enumerate(articles)})
    return {split: windows(store, split, 1, T) for split in ("train", "val")}


class OnSphere(Normal):
    def samples(self, context, count, generator=None):
        return torch.nn.functional.normalize(super().samples(context, count, generator), dim=-1)


# By hand


def test_measure_by_hand():
    """One window at a time, in loops, from the very samples."""
    part = world()["val"].at_most(7)
    model = Normal(0.4)
    found = measure(model, part, count=5, seed=3)
    context, target = part.batch(np.arange(len(part)))
    drawn = model.samples(context, 5, torch.Generator().manual_seed(3)).double().numpy()
    for i, y in enumerate(target.double().numpy()):
        x = drawn[:, i]
        off = np.mean([np.linalg.norm(s - y) for s in x])
        apart = np.mean([np.linalg.norm(x[a] - x[b]) for a in range(5) for b in range(5) if a != b])
        row = found.iloc[i]
        assert (row["off"], row["apart"], row["energy"]) == pytest.approx((off, apart, off - apart / 2), rel=1e-5)
        members = [y, *x]
        away = [sum(np.linalg.norm(m - other) for other in members) / 5 for m in members]
        below = sum(a < away[0] for a in away)
        assert below / 6 <= row["distance"] < (below + 1) / 6
    assert found["article"].tolist() == list(part.article) and found["target"].tolist() == list(part.target)
    pd.testing.assert_frame_equal(found, measure(model, part, count=5, seed=3))
    assert not found["direction"].equals(measure(model, part, count=5, seed=4)["direction"])


def test_place_shares_what_is_equal():
    random = np.random.default_rng(0)
    order = np.array([[2.0] * 1000, [1.0] * 1000, [2.0] * 1000, [3.0] * 1000])
    u = place(order, random)
    assert 0.25 <= u.min() < 0.26 and 0.74 < u.max() < 0.75
    assert place(np.array([[0.0], [1.0]]), random) < 0.5 <= place(np.array([[2.0], [1.0]]), random)


def test_kolmogorov_by_hand():
    random = np.random.default_rng(1)
    for u in (random.random(200), random.random(200) ** 2, np.sqrt(random.random(200))):
        value, low, high = over_articles(kolmogorov(u), np.arange(200) // 10)
        assert value == pytest.approx(stats.kstest(u, "uniform").statistic, abs=1e-12)
        assert low < value < high


def test_the_interval_of_the_ratio_holds_the_ratio():
    """Nominal 95 % over 200 simulated splits of 20 unlike articles; the ratio is 0.8."""
    random, covered = np.random.default_rng(0), 0
    for _ in range(200):
        article = np.repeat(np.arange(20), 10)
        hard = random.gamma(8, 1 / 8, 20)[article]
        off = hard * (1 + 0.1 * random.standard_normal(200))
        apart = 0.8 * hard * (1 + 0.1 * random.standard_normal(20)[article])
        frame = pd.DataFrame({"article": article, "off": off, "apart": apart, "energy": off - apart / 2})
        frame = frame.assign(distance=random.random(200), direction=random.random(200))
        row = next(r for r in summarise(frame) if r["measure"] == "spread ratio")
        assert row["value"] == pytest.approx(apart.sum() / off.sum())
        covered += row["low"] <= 0.8 <= row["high"]
    assert 180 <= covered <= 199


# Where the truth is known


@pytest.fixture(scope="module")
def draws():
    return world(0.5)


def test_samples_like_the_truth_are_found_calibrated(draws):
    found = spread(OnSphere(0.5), {"val": draws["val"]}, references(draws["train"]))
    for name, wanted in (("spread ratio", 1.0), ("covered by the inner 50%", 0.5), ("covered by the inner 90%", 0.9)):
        row = found.row(name)
        assert row["low"] <= wanted <= row["high"] and row["high"] - row["low"] < 0.15 and row["chance"] == wanted
    for name in ("distance", "direction"):
        assert found.row(f"KS of ranks by {name}")["value"] < 0.06  # 800 windows: 0.03 in the mean
        shares = histogram(found.frames["val", "model"], name)
        assert (shares["low"] <= 0.1).sum() >= 9 and (shares["high"] >= 0.1).sum() >= 9
        assert shares["share"].sum() == pytest.approx(1.0)
    # Its energy score is the least: what is drawn from the training chunks, of the same distribution, comes next.
    assert found.row("energy score less weighted mean, a point")["high"] < 0
    assert found.row("energy score less context vectors")["high"] < 0
    assert found.row("energy score less climatology")["value"] == pytest.approx(0, abs=0.01)
    assert "spread is not significantly different" in reading(found, "val")


@pytest.mark.parametrize("width, word", [(0.3, "narrower"), (0.9, "wider")])
def test_samples_too_narrow_or_too_wide(draws, width, word):
    found = spread(OnSphere(width), {"val": draws["val"]}, {"right": OnSphere(0.5)})
    ratio, ranks = found.row("spread ratio"), found.frames["val", "model"]
    by_distance, by_direction = (histogram(ranks, c)["share"].to_numpy() for c in ("distance", "direction"))
    ends, middle = by_direction[[0, -1]].mean(), by_direction[4:6].mean()
    if word == "narrower":
        assert ratio["high"] < 0.95 and by_distance[-1] > 0.3 > 0.05 > by_distance[0] and ends > 1.5 * middle  # a U
    else:
        assert ratio["low"] > 1.05 and by_distance[0] > 0.3 > 0.05 > by_distance[-1] and middle > 1.5 * ends  # a hill
    assert found.row("KS of ranks by distance")["low"] > 0.1 and found.row("KS of ranks by direction")["low"] > 0
    assert found.row("energy score less right")["low"] > 0
    assert word in reading(found, "val") and "higher (worse)" in reading(found, "val")


def test_truths_of_uneven_distance_are_seen_though_the_spread_is_right():
    """Both ends of the ranks by distance fill up; the ratio does not tell."""
    part = world(0.5, uneven=0.6)["val"]
    even = spread(OnSphere(0.55), {"val": part}, {"uneven": OnSphere(0.5, 0.6)})
    shares = histogram(even.frames["val", "model"], "distance")["share"].to_numpy()
    assert abs(even.row("spread ratio")["value"] - 1) < 0.05 and shares[[0, -1]].min() > 0.15
    assert even.row("KS of ranks by distance", forecast="uneven")["value"] < 0.06


# References


def test_references_are_what_their_names_say(draws):
    refs = references(draws["train"])
    context, _ = draws["train"].batch(np.arange(50))
    _, everything = draws["train"].batch(np.arange(len(draws["train"])))
    g = torch.Generator().manual_seed(0)
    drawn = {name: r.samples(context, 30, g) for name, r in refs.items()}
    assert all(x.shape == (30, 50, D) for x in drawn.values())
    point = Weighted(D, fit_weights(draws["train"])).raw(context)
    torch.testing.assert_close(drawn["weighted mean, a point"], point.expand(30, -1, -1))
    rows = {tuple(y) for y in everything.tolist()}
    assert all(tuple(x) in rows for x in drawn["climatology"].flatten(0, 1).tolist())
    same = (drawn["context vectors"][:, :, None] == context).all(-1)  # (S, B, T)
    assert same.any(2).all() and same.float().mean((0, 1)) == pytest.approx([0.5, 0.5], abs=0.06)
    torch.testing.assert_close(drawn["weighted mean, dressed"].norm(dim=-1), torch.ones(30, 50))
    torch.testing.assert_close(refs["climatology"].raw(context), everything.mean(0).expand(50, -1))
    torch.testing.assert_close(refs["context vectors"].raw(context), context.mean(1))


def test_a_model_without_samples_is_refused(draws):
    with pytest.raises(LVMError, match="Weighted"):
        measure(Weighted(D, torch.ones(T)), draws["val"])
    with pytest.raises(LVMError, match="depth"):
        spread(OnSphere(0.5), {"val": draws["val"].at_most(50)}, {}).row("depth")


def test_figure_and_table_have_the_figures(draws):
    found = spread(OnSphere(0.3), {"val": draws["val"].at_most(200)}, {"right": OnSphere(0.5)})
    axes = plots.ranks(found, "val").axes
    shares = histogram(found.frames["val", "model"], "distance")["share"]
    assert [patch.get_height() for patch in axes[0].patches] == pytest.approx(100 * shares.to_numpy())
    ratios = [line.get_xdata()[0] for line in axes[2].lines if line.get_marker() == "o"]
    values = [found.row("spread ratio", "val", n)["value"] for n in found.forecasts]
    assert sorted(ratios) == pytest.approx(sorted(values))
    shown, row = plots.spread_table(found).data.set_index("forecast"), found.row("energy score less right")
    assert list(shown.index) == ["model", "right", "if calibrated"]
    assert shown.loc["right", "model less it"] == f"{row['value']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
    assert shown.loc["model", "spread ratio"].startswith(f"{found.row('spread ratio')['value']:.3f} [")


# Training


@pytest.mark.parametrize("sigma", [0.2, 2.0])
def test_the_energy_score_teaches_the_spread_whatever_the_start(monkeypatch, sigma):
    """Draws about one place: from too narrow and from too wide a start, the samples end as wide as the truth."""

    class Start(models.Sampler):
        def __init__(self, dim, length):
            super().__init__(dim, length)
            self.sigma.data.fill_(sigma / math.sqrt(dim))

    monkeypatch.setitem(models.ARCHITECTURES, "sampler", Start)
    parts, own = world(0.4), version("energy", context_length=T)
    learned = controls.brief(own, parts["train"], steps=300, seed=0, learning_rate=0.01)
    before, after = (spread(m, {"val": parts["val"]}, {}).row("spread ratio")["value"] for m in (Start(D, T), learned))
    assert abs(before - 1) > 0.1 and abs(after - 1) < 0.05
