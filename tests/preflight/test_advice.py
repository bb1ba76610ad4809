"""The conclusions of the pre-flight on worlds whose answer is known, by the kinds of the findings."""

import contextlib
import functools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lvmlib.baselines import baselines, untrained
from lvmlib.data import worlds
from lvmlib.data.open import dataset
from lvmlib.data.store import make_store
from lvmlib.errors import LVMError
from lvmlib.preflight import advice, facts, leaks
from lvmlib.preflight.advice import SIGNAL, Results
from lvmlib.preflight.arrows import crossed_arrows
from lvmlib.preflight.power import smallest_difference
from lvmlib.preflight.probe import crossed_order_probe
from lvmlib.windows import SPLITS


def examine(store, horizon=2, trained=False):
    data = dataset(store, horizon)
    trivial = baselines(data.train)
    small = {facts.TRAINED: untrained(store.dim, 5)["mean"]} if trained else {}
    order, arrows, peeked = {}, {}, None
    with contextlib.suppress(LVMError):  # too few articles
        order = {lag: crossed_order_probe(store, lag=lag) for lag in (1, 2)}
    with contextlib.suppress(LVMError):
        arrows = crossed_arrows(data, dataset(store, horizon, direction="backward"))
    with contextlib.suppress(LVMError):
        peeked = facts.peeked(data.val, trivial)
    scored, found = facts.scores(data, trivial | small), (facts.nearest_training(store), facts.vector_facts(store))
    copied = {s: float(leaks.copied(getattr(data, s)).mean()) for s in SPLITS}
    return Results(data, scored, order, arrows, leaks.leaks(store), *found, facts.strangers(store), copied, peeked)


@functools.cache
def world(name):
    """Horizon 1: in 48 dimensions the announcing world is as clear there as in 384 at its own."""
    return examine(worlds.world(name, articles=100, length=30, dim=48), horizon=1)


@functools.cache
def small_world():
    return examine(worlds.announcing(articles=60, length=20, dim=48), trained=True)


def changed(store, name="changed", **fields):
    return make_store(name, *(fields.get(f, getattr(store, f)) for f in ("vectors", "article", "position", "articles")))


def kinds(results):
    return {f.kind for f in advice.verdict(results)}


def finding(results, kind):
    return next(f for f in advice.verdict(results) if f.kind == kind)


def texts(results):
    return [*advice.answers(results), advice.conclusion(results)]


def assert_finished(results):
    findings = advice.verdict(results)
    assert all(f.why.endswith(".") and f.advice.endswith(".") and not f.what.endswith(".") for f in findings)
    words = [*texts(results), *(part for f in findings for part in (f.what, f.why, f.advice))]
    assert not any("  " in text or "nan" in text for text in words)


@pytest.mark.parametrize(
    ("name", "ways", "wanted", "unwanted"),
    [
        ("exchangeable", {"none"}, {"no order", "no signal", "small"}, {"arrow", "order", "copies", "leak"}),
        ("rotation", {"order"}, {"order", "linear gain"}, {"arrow", "no order"}),
        ("announcing", {"forward"}, {"arrow"}, {"order", "no order"}),
        ("reversed_announcing", {"backward"}, {"arrow"}, {"order", "no order"}),
        ("converging", {"order", "none"}, set(), {"arrow"}),
        ("diverging", {"order", "none"}, set(), {"arrow"}),
        ("copy", {"order", "none"}, {"copies"}, {"arrow"}),
    ],
)
def test_the_direction_of_known_worlds(name, ways, wanted, unwanted):
    results = world(name)
    found = kinds(results)
    assert wanted <= found and not unwanted & found and advice.direction(results) in ways
    signal, _, conclusion = texts(results)
    headline, sentence = SIGNAL[advice.direction(results)]
    assert signal.startswith(f"**{headline}**") and conclusion.startswith(sentence)
    if "arrow" in found:
        assert f"{advice.direction(results)}s" in finding(results, "arrow").what
    assert_finished(results)


def test_why_no_arrow_is_declared():
    exchangeable, rotation = world("exchangeable"), world("rotation")
    reasons = [advice._why_no_arrow(world(name)) for name in ("exchangeable", "converging", "diverging")]
    assert reasons[1] == reasons[2] != reasons[0] and reasons[0] in finding(exchangeable, "no order").why
    ridge = world("announcing").arrows["ridge"]  # an arrow of ridge that is not above chance
    at_chance = replace(ridge, table=ridge.table.assign(**{"forward above chance": -0.001}))
    results = replace(exchangeable, arrows={**world("announcing").arrows, "ridge": at_chance})
    assert "not above chance" in finding(results, "no order").why
    alone = replace(rotation, arrows={})  # order without a measured arrow
    assert advice.direction(alone) == "order" and advice.answers(alone)[0].startswith(f"**{SIGNAL['order alone'][0]}**")


def test_false_alarms_are_rare():
    ways = [advice.direction(examine(worlds.exchangeable(30, 14, 16, seed=s))) for s in range(12)]
    assert ways.count("none") >= 10


def test_a_small_model_of_one_seed_declares_nothing():
    exchangeable, ridge = world("exchangeable"), world("announcing").arrows["ridge"]
    results = replace(exchangeable, trained_arrow=ridge)
    assert ridge.declared == "forward" and advice.direction(results) == "none"
    assert "one seed" in ridge.caution and ridge.caution in advice.answers(results)[0]
    assert facts.TRAINED not in advice.answers(exchangeable)[0]


@pytest.mark.parametrize(("tokens", "overlap", "horizon"), [(64, 16, 1), (64, 16, 2), (10, 9, 3), (64, 0, 1)])
def test_overlapping_chunks_share_tokens_with_the_target(tokens, overlap, horizon):
    sheet = {"build": {"unit": "tokens", "tokens": tokens, "overlap": overlap}}
    data = dataset(replace(small_world().data.store, datasheet=sheet), horizon)
    results, step = replace(small_world(), data=data), tokens - overlap
    last, target = (set(range(at * step, at * step + tokens)) for at in (4, 4 + horizon))
    first, shared = advice.verdict(results)[0], len(last & target)
    assert (first.kind == "overlap") is (shared > 0)
    if shared:
        free = next(h for h in range(1, 99) if h * step >= tokens)
        assert f" {shared} of {tokens} tokens" in first.why and f"horizon {free} " in first.advice
        assert first.what in advice.conclusion(results)
    assert ("the reference is too high" in advice.answers(results)[1]) is (overlap > 0)


def test_a_warning_of_the_datasheet_is_a_finding():
    warning, base = "docs: 80% of the chunks hold their article's title in the first line; encode anew.", small_world()
    store = replace(base.data.store, datasheet={"warnings": [warning], "build": {"unit": "sentence"}})
    assert finding(replace(base, data=replace(base.data, store=store)), "datasheet").why == warning


def test_figures_of_a_draw_are_marked():
    data = dataset(worlds.rotation(articles=60, length=40, dim=8))
    results = examine(data.store)
    assert not any("draw" in text for text in [*texts(results), advice.answers(replace(results, drawn=data))[0]])
    for fewest, cut in ((2, False), (12, True)):
        part = facts.drawn(data, {"train": 400, "val": 240, "ood": 240}, fewest=fewest)
        drawn = replace(results, scored=facts.scores(part, baselines(part.train)), drawn=part)
        signal, gained, conclusion = texts(drawn)
        assert f"a draw of {12 if cut else 6} of 12 validation articles" in conclusion
        assert f"a draw of {len(np.unique(facts.joined(part).article))} of 60 articles" in signal
        assert ("a lower MRR" in gained) is ("a lower MRR" in signal) is cut


def test_spoilers_come_first():
    first = advice.verdict(world("copy"))[0]
    assert first.kind == "copies" and first.what in advice.conclusion(world("copy"))
    store = worlds.exchangeable(articles=20, length=15, dim=48, seed=1)
    x, val, train = np.array(store.vectors), store.rows("val"), store.rows("train")
    x[val[::6]] = x[train[: len(val[::6])]]
    leaking = examine(changed(store, vectors=x))
    first = advice.verdict(leaking)[0]
    assert first.kind == "leak" and "10 of 60" in first.why and first.what in advice.conclusion(leaking)
    named = changed(store, articles=store.articles.assign(title=["The Who", "the  who!", *map(str, range(18))]))
    same = replace(leaking, leaks=[], data=replace(leaking.data, store=named))
    assert ("titles" in kinds(same)) is (named.articles["split"].iloc[:2].nunique() == 2)


def test_few_articles():
    assert "only 3 articles" in finding(examine(worlds.rotation(articles=15, length=12, dim=16)), "few articles").why
    many = world("exchangeable")
    steady = {k: f.assign(**{"novel MRR": f["chance"]}) for k, f in many.scored.items()}  # no variation at all
    assert "few articles" not in kinds(replace(many, scored=steady))


@pytest.mark.parametrize("length", [7, 12])
def test_one_article_a_split_gives_finished_texts(length):
    results = examine(worlds.rotation(articles=5, length=length, dim=8, splits=("train", "val", "ood", "", "")))
    assert advice.direction(results) == "not measured" and "few articles" in kinds(results)
    assert_finished(results)
    assert len(facts.power_table(results.scored, results.arrows, results.articles))


def test_the_power_table_is_for_all_articles_of_a_draw():
    results = world("rotation")
    here = facts.power_table(results.scored, results.arrows, results.articles)
    more = facts.power_table(results.scored, results.arrows, {"val": 80, "ood": 80})
    own = here["split"] == "val"
    assert (here.loc[own, "articles"] == 20).all() and (more.loc[own, "articles"] == 80).all()
    assert (more.loc[own, "smallest 80%"] < 0.6 * here.loc[own, "smallest 80%"]).all()
    pd.testing.assert_frame_equal(here[here["split"] == "both ways"], more[more["split"] == "both ways"])
    best = facts.best_trivial(results.scored)
    first = here[here["comparison"] == f"copy last − {best}"].iloc[0]
    values = results.scored["val", "copy last"]["novel MRR"] - results.scored["val", best]["novel MRR"]
    assert first["smallest 80%"] == smallest_difference(values, results.scored["val", best]["article"])


def test_the_rules_on_size_vectors_and_splits():
    results = world("exchangeable")
    for ood, near in ((0.2, False), (0.6, True)):
        nearest = results.nearest.assign(cosine=results.nearest["split"].map({"train": 0.5, "val": 0.5, "ood": ood}))
        assert ("ood" in kinds(replace(results, nearest=nearest))) is near
    odd = replace(results, facts={**results.facts, "equal": 2000}, strangers=0.7)
    assert {"equal", "alike"} <= kinds(odd) and not {"equal", "alike", "unused"} & kinds(results)
    splits = ("train", "train", "train", "val", "val", "ood", "ood", "")
    short = worlds.rotation(articles=60, length=8, dim=8)
    heavy = worlds.rotation(articles=8, length=40, dim=8, splits=splits)
    for kind, store, keep in (
        ("unused", short, (short.position < 6) | (short.article % 6 == 0)),  # most articles are too short for a window
        ("heavy article", heavy, (heavy.article != 4) | (heavy.position < 9)),
    ):
        part = {field: getattr(store, field)[keep] for field in ("vectors", "article", "position")}
        assert kind in kinds(examine(changed(store, **part)))


def test_a_small_model_that_gains():
    """The "trained" model is the mean; then one that is always right. The power statement is of it, too."""
    results, g = small_world(), advice.gain(small_world())
    perfect = results.scored["val", facts.TRAINED].assign(**{"novel MRR": 1.0})
    knows = replace(results, scored={**results.scored, ("val", facts.TRAINED): perfect})
    assert "small model gain" in kinds(knows) - kinds(results) and advice.gain(knows)["best"] == g["best"]
    assert g["other"] == facts.TRAINED != advice.gain(world("exchangeable"))["other"]
    table = facts.power_table(results.scored, results.arrows, results.articles)
    smallest = table[table["split"] == "val"].set_index("comparison")["smallest 80%"]
    assert g["smallest"] == smallest[f"{facts.TRAINED} − {g['best']}"]
    assert g["range"] == f"{smallest.min():.3f} to {smallest.max():.3f}"
    assert all(g["range"] in text and facts.TRAINED in text for text in texts(results)[1:])
