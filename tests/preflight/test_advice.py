"""The conclusions of the pre-flight on worlds whose answer is known, by the kinds of the findings.

Axes: N windows, A articles.
"""

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
    with contextlib.suppress(LVMError):
        order = {lag: crossed_order_probe(store, lag=lag) for lag in (1, 2)}
    with contextlib.suppress(LVMError):
        arrows = crossed_arrows(data, dataset(store, horizon, direction="backward"))
    with contextlib.suppress(LVMError):
        peeked = facts.peeked(data.val, trivial)
    return Results(
        data,
        facts.scores(data, trivial | small),
        order,
        arrows,
        leaks.leaks(store),
        facts.nearest_training(store),
        facts.vector_facts(store),
        facts.strangers(store),
        {s: float(leaks.copied(getattr(data, s)).mean()) for s in SPLITS},
        peeked,
    )


@functools.cache
def world(name):
    """Horizon 1: in 48 dimensions the announcing world is as clear there as in 384 at its own."""
    return examine(worlds.world(name, articles=100, length=30, dim=48), horizon=1)


@functools.cache
def small_world():
    return examine(worlds.announcing(articles=60, length=20, dim=48), trained=True)


def kinds(results):
    return [f.kind for f in advice.verdict(results)]


def finding(results, kind):
    return next(f for f in advice.verdict(results) if f.kind == kind)


def texts(results):
    return [*advice.answers(results), advice.conclusion(results)]


@pytest.mark.parametrize(
    ("name", "way", "wanted", "unwanted"),
    [
        ("exchangeable", "none", {"no order", "no signal", "small"}, {"arrow", "order", "copies", "leak", "datasheet"}),
        ("rotation", "order", {"order", "linear gain"}, {"arrow", "no order"}),
        ("announcing", "forward", {"arrow"}, {"order", "no order"}),
        ("reversed_announcing", "backward", {"arrow"}, {"order", "no order"}),
        ("converging", None, set(), {"arrow"}),
        ("diverging", None, set(), {"arrow"}),
    ],
)
def test_the_direction_of_known_worlds(name, way, wanted, unwanted):
    results, found = world(name), set(kinds(world(name)))
    assert wanted <= found and not unwanted & found
    assert advice.direction(results) == way or (way is None and advice.direction(results) in ("order", "none"))
    signal, _, conclusion = texts(results)
    headline, sentence = SIGNAL[advice.direction(results)]
    assert signal.startswith(f"**{headline}**") and conclusion.startswith(sentence)
    if way in ("forward", "backward"):
        assert f"{way}s" in finding(results, "arrow").what


def test_why_no_arrow_is_declared():
    exchangeable, rotation = world("exchangeable"), world("rotation")
    reasons = {name: advice._why_no_arrow(world(name)) for name in ("exchangeable", "converging", "diverging")}
    assert reasons["converging"] == reasons["diverging"] != reasons["exchangeable"]
    assert reasons["exchangeable"] in finding(exchangeable, "no order").why
    seen = world("announcing").arrows  # an arrow of ridge that is not above chance
    at_chance = replace(seen["ridge"], table=seen["ridge"].table.assign(**{"forward above chance": -0.001}))
    results = replace(exchangeable, arrows={**seen, "ridge": at_chance})
    assert "not above chance" in finding(results, "no order").why
    alone = replace(rotation, arrows={})  # order without a measured arrow
    assert advice.direction(alone) == "order" and advice.answers(alone)[0].startswith(f"**{SIGNAL['order alone'][0]}**")


def test_false_alarms_are_rare():
    ways = [advice.direction(examine(worlds.exchangeable(30, 14, 16, seed=s))) for s in range(12)]
    assert ways.count("none") >= 10


def test_a_small_model_of_one_seed_declares_nothing():
    exchangeable, seen = world("exchangeable"), world("announcing").arrows["ridge"]
    results = replace(exchangeable, trained_arrow=seen)
    assert seen.declared == "forward" and advice.direction(results) == "none"
    assert "one seed" in seen.caution and seen.caution in advice.answers(results)[0]
    assert facts.TRAINED not in advice.answers(exchangeable)[0]


@pytest.mark.parametrize(("tokens", "overlap"), [(64, 16), (10, 9), (64, 0)])
def test_overlapping_chunks_share_tokens_with_the_target(tokens, overlap):
    sheet = {"build": {"unit": "tokens", "tokens": tokens, "overlap": overlap}}
    base = small_world()
    for horizon in (1, 2, 3):
        data = dataset(replace(base.data.store, datasheet=sheet), horizon)
        results, step = replace(base, data=data), tokens - overlap
        last, target = (set(range(at * step, at * step + tokens)) for at in (4, 4 + horizon))
        assert ("overlap" in kinds(results)) is bool(last & target)
        if last & target:
            first = advice.verdict(results)[0]
            assert first.kind == "overlap" and f" {len(last & target)} of {tokens} tokens" in first.why
            free = next(h for h in range(1, 99) if h * step >= tokens)
            assert f"horizon {free} " in first.advice and first.what in advice.conclusion(results)
        assert ("the reference is too high" in advice.answers(results)[1]) is (overlap > 0)


def test_a_warning_of_the_datasheet_is_a_finding():
    warning = "docs: 80% of the chunks hold their article's title in the first line; encode anew."
    base = small_world()
    store = replace(base.data.store, datasheet={"warnings": [warning], "build": {"unit": "sentence"}})
    assert finding(replace(base, data=replace(base.data, store=store)), "datasheet").why == warning


def test_figures_of_a_draw_are_marked():
    data = dataset(worlds.rotation(articles=60, length=40, dim=8))
    results = examine(data.store)
    assert results.draw_note == "" and not any("draw" in text for text in texts(results))
    for fewest, cut in ((2, False), (12, True)):
        part = facts.drawn(data, {"train": 400, "val": 240, "ood": 240}, fewest=fewest)
        drawn = replace(results, scored=facts.scores(part, baselines(part.train)))
        assert f"a draw of {12 if cut else 6} of 12 validation articles" in advice.conclusion(drawn)
        assert ("a lower MRR" in advice.answers(drawn)[1]) is cut
        count, signal = len(np.unique(facts.joined(part).article)), advice.answers(replace(results, drawn=part))[0]
        assert f"a draw of {count} of 60 articles" in signal and ("a lower MRR" in signal) is cut
    assert "draw" not in advice.answers(replace(results, drawn=data))[0]


def test_spoilers_come_first():
    first = advice.verdict(world("copy"))[0]
    assert first.kind == "copies" and first.what in advice.conclusion(world("copy"))
    store = worlds.exchangeable(articles=20, length=15, dim=48, seed=1)
    x, val, train = np.array(store.vectors), store.rows("val"), store.rows("train")
    x[val[::6]] = x[train[: len(val[::6])]]
    leaking = examine(make_store("leaking", x, store.article, store.position, store.articles))
    first = advice.verdict(leaking)[0]
    assert first.kind == "leak" and "10 of 60" in first.why and first.what in advice.conclusion(leaking)
    titles = store.articles.assign(title=["The Who", "the  who!", *map(str, range(18))])
    named = make_store("titles", store.vectors, store.article, store.position, titles)
    splits = named.articles["split"].iloc[:2]
    same = replace(leaking, leaks=[], data=replace(leaking.data, store=named))
    assert ("titles" in kinds(same)) is (splits.nunique() == 2)


def test_few_articles():
    few = finding(examine(worlds.rotation(articles=15, length=12, dim=16)), "few articles")
    assert "only 3 articles" in few.why
    many = world("exchangeable")
    steady = {k: f.assign(**{"novel MRR": f["chance"]}) for k, f in many.scored.items()}  # no variation at all
    assert "few articles" not in kinds(replace(many, scored=steady))


@pytest.mark.parametrize("length", [7, 12])
def test_one_article_a_split_gives_finished_texts(length):
    results = examine(worlds.rotation(articles=5, length=length, dim=8, splits=("train", "val", "ood", "", "")))
    assert advice.direction(results) == "not measured" and "few articles" in kinds(results)
    findings = [f.what + f.why + f.advice for f in advice.verdict(results)]
    assert not any("nan" in text for text in [*texts(results), *findings])
    assert len(facts.power_table(results.scored, results.arrows, results.articles))


def test_the_power_table_is_for_all_articles_of_a_draw():
    results = world("rotation")
    here = facts.power_table(results.scored, results.arrows)
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
    assert {"equal", "alike"} <= set(kinds(odd)) and not {"equal", "alike", "unused"} & set(kinds(results))
    short = worlds.rotation(articles=60, length=8, dim=8)
    keep = (short.position < 6) | (short.article % 6 == 0)  # most articles are too short for a window
    short = make_store("short", short.vectors[keep], short.article[keep], short.position[keep], short.articles)
    assert "unused" in kinds(examine(short))
    splits = ("train", "train", "train", "val", "val", "ood", "ood", "")
    heavy = worlds.rotation(articles=8, length=40, dim=8, splits=splits)
    keep = (heavy.article != 4) | (heavy.position < 9)
    heavy = make_store("heavy", heavy.vectors[keep], heavy.article[keep], heavy.position[keep], heavy.articles)
    assert "heavy article" in kinds(examine(heavy))


def test_a_small_model_that_gains():
    """The "trained" model is the mean; then one that is always right."""
    results = small_world()
    frame = results.scored["val", facts.TRAINED]
    perfect = {**results.scored, ("val", facts.TRAINED): frame.assign(**{"novel MRR": 1.0})}
    knows = replace(results, scored=perfect)
    assert "small model gain" in kinds(knows) and "small model gain" not in kinds(results)
    assert advice.gain(knows)["best"] == advice.gain(results)["best"]


def test_the_power_statement_is_of_the_small_model_if_there_is_one():
    results, g = small_world(), advice.gain(small_world())
    best = results.scored["val", g["best"]]
    smallest = {
        n: smallest_difference(f["novel MRR"] - best["novel MRR"], best["article"])
        for (s, n), f in results.scored.items()
        if s == "val" and n not in (g["best"], "constant")
    }
    assert g["other"] == facts.TRAINED != advice.gain(world("exchangeable"))["other"]
    assert g["smallest"] == smallest[facts.TRAINED]
    assert g["range"] == f"{min(smallest.values()):.3f} to {max(smallest.values()):.3f}"
    assert all(g["range"] in text and facts.TRAINED in text for text in texts(results)[1:])
    table = facts.power_table(results.scored, results.arrows)
    row = table[(table["comparison"] == f"{facts.TRAINED} − {g['best']}") & (table["split"] == "val")]
    assert row["smallest 80%"].item() == g["smallest"]


@pytest.mark.parametrize("name", ["exchangeable", "rotation", "announcing", "copy"])
def test_findings_are_finished_sentences(name):
    for f in advice.verdict(world(name)):
        assert f.why.endswith(".") and f.advice.endswith(".") and not f.what.endswith(".")
        assert "  " not in f.what + f.why + f.advice
    assert not any("  " in text for text in texts(world(name)))
