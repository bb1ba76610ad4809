"""Conclusions of the pre-flight: the results of `facts`, `probe`, `arrows` and `leaks` as sentences, by fixed rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..judge.arrow import Arrow
from ..judge.table import row_text, signed
from ..statistics import effective_articles, few, over_articles, paired
from ..windows import SPLITS, Dataset, Windows
from .arrows import above_chance, beyond, declared, ridge_and_mean
from .facts import TRAINED, WEIGHTING, best_trivial, joined, unused
from .leaks import NEAR, Leak, shared_titles
from .power import articles_needed, smallest_difference
from .probe import OrderProbe, probed

LEAK = 0.01  # share of a split's chunks that are also in train: MRR may be too high by as much
COPIES = 0.05  # share of the windows whose target nearly equals a chunk of its context
ALIKE = 0.5  # mean cosine of chunks of different articles: from here the mean vector alone has √½ = 0.7 to a chunk
VISIBLE = 0.02  # novel MRR: if the smallest visible difference is larger, relevant differences are missed
HEAVY = 0.3  # share of a split's windows from one article: the split then counts as at most 1/0.3² = 11 articles
UNUSED = 0.5  # share of the chunks that are in no window
EQUAL = 0.05  # share of the vectors that equal another one
SMALL = 37_000  # training windows: midway, in powers of ten, from 3,144 (a transformer hardly learns) to 431,895


@dataclass(frozen=True)
class Finding:
    """A conclusion: its `kind`, a headline, the figures behind it, and what to try."""

    kind: str
    what: str
    why: str
    advice: str


@dataclass(frozen=True, eq=False)
class Results:
    """All results that the conclusions rest on; what was not measured is empty or None."""

    data: Dataset  # the whole one
    scored: Mapping[tuple[str, str], pd.DataFrame]  # `scores` of the baselines, and of the small model TRAINED, if any
    order: Mapping[int, OrderProbe]  # lag → `crossed_order_probe`
    arrows: Mapping[str, Arrow]  # `crossed_arrows`
    leaks: Sequence[Leak]
    nearest: pd.DataFrame  # `nearest_training`
    facts: Mapping[str, float]  # `vector_facts`
    strangers: float
    copied: Mapping[str, float]  # split → share of windows whose target nearly equals a context chunk
    peeked: pd.DataFrame | None = None  # of validation
    trained_arrow: Arrow | None = None  # of the small model
    drawn: Dataset | None = None  # the dataset of order and arrows, if not `data`

    @property
    def articles(self) -> dict[str, int]:
        """The number of articles with windows in each split of the whole dataset."""
        return {s: len(np.unique(getattr(self.data, s).article)) for s in SPLITS}

    @property
    def draw_note(self) -> str:
        """A sentence if the validation figures are of a random part of the articles, else an empty string."""
        return _draw_note("These figures use", self.scored["val", "mean"], self.data.val, "validation articles")

    def difference(self, name: str, other: str) -> tuple[float, float, float]:
        """Novel MRR of one predictor minus that of another on validation, and its interval."""
        one, two = self.scored["val", name], self.scored["val", other]
        return paired(one["novel MRR"], two["novel MRR"], one["article"])


def _draw_note(subject: str, part: Windows | pd.DataFrame, total: Windows, noun: str) -> str:
    some, every = (pd.Series(w.article).value_counts() for w in (part, total))
    if some.sum() == every.sum():
        return ""
    cut = " Long articles were cut; whole ones have more candidates, and so a lower MRR."
    return f" {subject} a draw of {len(some):,} of {len(every):,} {noun}.{cut * bool((some < every[some.index]).any())}"


def direction(results: Results) -> str:
    """The text's direction: "forward" or "backward" (easier to continue that way), "order" (detected, but no arrow),
    "none" (neither detected), "not measured". The small model has one seed, and does not count."""
    if (way := declared(results.arrows)) != "none":
        return way
    if probed(results.order)["order"].any():
        return "order"
    return "none" if results.order or results.arrows else "not measured"


def smallest_arrow(results: Results) -> tuple[float, float]:
    """The smallest arrow in novel MRR that is found with 80 % probability, and the number of articles for one half as
    large; NaN if no arrow was measured."""
    if not results.arrows:
        return float("nan"), float("nan")
    ridge, averaging = ridge_and_mean(results.arrows)
    each, article = (ridge, ridge - averaging), results.arrows["ridge"].article
    smallest = max(smallest_difference(v, article) for v in each)
    return smallest, max(articles_needed(v, article, smallest / 2) for v in each)


def gain(results: Results) -> dict:
    """The baselines on validation, in novel MRR.

    best (its name), value, low, high; chance; plain (the best baseline that only weighs its context); other (the small
    model, else ridge, or plain where ridge is best); smallest (the difference other − best that is found with 80 %),
    needed 0.02, needed 0.01 (articles); range (of `smallest` over all predictors).
    """
    scored = {name: frame for (split, name), frame in results.scored.items() if split == "val"}
    best = best_trivial(results.scored)
    frame, total = scored[best], results.articles["val"]
    value, low, high = over_articles(frame["novel MRR"], frame["article"], share=True)
    plain = max(WEIGHTING, key=lambda n: scored[n]["novel MRR"].mean())
    other = plain if best == "ridge" else "ridge"
    if TRAINED in scored:
        other = TRAINED
    less = {n: f["novel MRR"] - frame["novel MRR"] for n, f in scored.items() if n not in (best, "constant")}
    smallest = {n: smallest_difference(v, frame["article"], articles=total) for n, v in less.items()}
    gained = {"best": best, "value": value, "low": low, "high": high, "plain": plain, "other": other}
    gained |= {"chance": float(frame["chance"].mean()), "smallest": smallest[other]}
    gained |= {"range": f"{min(smallest.values()):.3f} to {max(smallest.values()):.3f}"}
    return gained | {f"needed {w:g}": articles_needed(less[other], frame["article"], w) for w in (0.02, 0.01)}


# The answers

SIGNAL = {
    "forward": ("Yes, forwards.", "The text is easier to continue forwards than backwards."),
    "backward": ("Yes, backwards.", "The text is easier to continue backwards than forwards."),
    "order": ("Order, but no arrow.", "The order of chunks can be detected, but no direction is easier to predict."),
    "order alone": ("Order; the arrow was not measured.", "The order of chunks can be detected."),
    "none": ("None detected.", "These vectors show no order, so a directional loss has nothing to learn."),
    "not measured": ("Not measured.", "There are too few articles to measure a direction."),
}


def _signal(results: Results) -> tuple[str, str]:
    way = direction(results)
    return SIGNAL["order alone" if way == "order" and not results.arrows else way]


def answers(results: Results) -> tuple[str, str]:
    """Answer two questions in Markdown: is there a signal of direction, and how much could a model gain?"""
    return _answer_direction(results), _answer_gain(results)


def _answer_direction(results: Results) -> str:
    headline, sentence = _signal(results)
    text, table = f"**{headline}** {sentence}", probed(results.order)
    if len(table):
        row = table.loc[table["order"].idxmax()]  # the first lag with order, or the first lag
        text += (
            f" For two chunks {row['lag']} apart, a small classifier finds which comes first in "
            f"{row_text(row, 'accuracy', '.1%')} of pairs, over {row['articles']} articles; chance is 50 %."
        )
    if results.arrows:
        text += (
            f" Forward − backward, ridge has {both_ways(results.arrows['ridge'])}. It has "
            f"{signed(beyond(results.arrows))} beyond the weighted mean. An arrow is declared if all three are on one "
            "side of 0, and ridge is above chance that way."
        )
        if declared(results.arrows) == "none" and (smallest := smallest_arrow(results)[0]) == smallest:
            text += f" An arrow of {smallest:.3f} would be found with 80 % probability."
    if results.drawn is not None:
        text += _draw_note("Order and ridge's arrow use", joined(results.drawn), joined(results.data), "articles")
    if results.trained_arrow is not None:
        text += f" {trained_both_ways(results.trained_arrow)}"
    return text


def _answer_gain(results: Results) -> str:
    g = gain(results)
    mrr = row_text(g, form=".3f")
    text = f"The best baseline is **{g['best']}**: its novel MRR is {mrr}, chance is {g['chance']:.3f}."
    for name in (g["plain"] if g["best"] == "ridge" else "ridge", TRAINED):
        if ("val", name) in results.scored:
            text += f" {name} − {g['best']}: {signed(results.difference(name, g['best']))}."
    if results.peeked is not None:
        both, beside = (results.peeked[name].mean() for name in ("both sides", g["best"]))
        text += f" For reference: the mean of both neighbours of the target has {both:.3f}, and {g['best']} has "
        text += f"{beside:.3f} on the same candidates. No predictor may see the later neighbour."
        text += " Chunks overlap here, so the reference is too high." * bool(_overlap(results)[1])
    return f"{text}{results.draw_note} {_visible(results, g)}"


def _visible(results: Results, g: dict) -> str:
    if g["smallest"] != g["smallest"]:
        return "With a single validation article no difference can be distinguished from chance."
    return (
        f"On {results.articles['val']} validation articles a difference of {g['smallest']:.3f} is found with 80 % "
        f"probability, if it varies as {g['other']} − {g['best']} does ({g['range']} over all comparisons). "
        f"A difference of 0.02 needs {_count(g['needed 0.02'])} articles, 0.01 needs {_count(g['needed 0.01'])}."
    )


def conclusion(results: Results) -> str:
    """Return one paragraph of Markdown: direction, the baseline to beat, what could be seen, what to try first."""
    g, first = gain(results), verdict(results)[0]
    best = f"The best baseline is {g['best']}, with a novel MRR of {g['value']:.3f} (chance {g['chance']:.3f})."
    problem = f"First solve this problem: {first.what}." if first.kind in SPOILERS else "To try first:"
    sentences = _signal(results)[1], best, _visible(results, g) + results.draw_note, problem, first.advice
    return " ".join(sentences)


def both_ways(a: Arrow) -> str:
    """Forward − backward in novel MRR, with copying's own difference subtracted and included, in words."""
    row = a.table.set_index("measure").loc["novel MRR"]
    included = row["forward"] - row["backward"], row["raw low"], row["raw high"]
    return (
        f"{row_text(row, 'difference')} in novel MRR over {int(row['articles'])} articles with copying's own "
        f"difference subtracted, {signed(included)} with it included"
    )


def trained_both_ways(a: Arrow) -> str:
    """The small model's arrow as sentences, with the caution about its interval."""
    caution = f" Caution: {a.caution}." * bool(a.caution)
    return f"The {TRAINED}, trained both ways, has {both_ways(a)}.{caution} It does not count for the conclusion."


# The rules: each yields the fields of its Findings

SPOILERS = ("leak", "titles", "copies", "overlap")  # kinds that would invalidate every figure
Rule = Iterator[tuple[str, str, str, str]]


def verdict(results: Results) -> list[Finding]:
    """Return what supports an experiment on this dataset and what is in its way, the SPOILERS first."""
    g = gain(results)
    rules = (_leaks, _copies, _direction, _gain, _nearness, _power, _train, _vectors, _ood)
    return [Finding(*finding) for rule in rules for finding in rule(results, g)]


def _leaks(results: Results, g: dict) -> Rule:
    store = results.data.store
    for leak in (leak for leak in results.leaks if leak.other == "train"):
        articles = leak.articles(store)
        if leak.share >= LEAK or articles:
            what = f"{leak.share:.1%} of the {leak.split} chunks are also in train"
            what += f" (in {articles} article{'s' * (articles > 1)} more than half)" * bool(articles)
            why = (
                f"{leak.near:,} of {len(leak.rows):,} have a training chunk at cosine {NEAR} or more. The {leak.split} "
            )
            why += "figures may be too high by about that share: a model can remember what followed there."
            yield "leak", what, why, "Drop near-duplicates when encoding, or put such articles into one split."
    for titles in shared_titles(store)[:1]:
        why, advice = f"For example {' and '.join(titles[:3])}.", "If they are one article, put them into one split."
        yield "titles", "Nearly equal titles are in two splits", why, advice


def _overlap(results: Results) -> tuple[int, int]:
    """Tokens of a chunk, and how many the next chunk shares, by the datasheet; 0, 0 if unknown."""
    build = results.data.store.datasheet.get("build") or {}
    return (build["tokens"], build["overlap"]) if build.get("unit") == "tokens" else (0, 0)


def _copies(results: Results, g: dict) -> Rule:
    split = max(results.copied, key=results.copied.get)
    if (share := results.copied[split]) >= COPIES:
        why = f"In {share:.0%} of the {split} windows a chunk of the context nearly equals the target."
        advice = "Drop near-duplicate chunks within an article, or use larger chunks."
        yield "copies", "Targets repeat their context, so copying wins", why, advice
    tokens, overlap = _overlap(results)
    shared = tokens - results.data.val.horizon * (tokens - overlap)  # chunks begin tokens − overlap apart
    if shared > 0:
        free = -(-tokens // (tokens - overlap))
        why = (
            f"It shares {shared} of {tokens} tokens ({shared / tokens:.0%}) with the last chunk. This favours copying."
        )
        advice = f"Encode with overlap 0, or take horizon {free} {_horizon(free)}, which shares nothing."
        yield "overlap", "Chunks overlap: the target contains words of its context", why, advice


def _direction(results: Results, g: dict) -> Rule:
    way, (smallest, needed), total = direction(results), smallest_arrow(results), sum(results.articles.values())
    why = "No arrow was measured."
    if results.arrows:
        why = f"{_why_no_arrow(results)} Arrows below {smallest:.3f} in novel MRR may be missed."
    more = "Take more articles" + (f" ({_count(needed)} would show an arrow half as large)" if needed == needed else "")
    if way in ("forward", "backward"):
        why = "Ridge differs significantly, with and without copying's own difference, and beyond the weighted mean."
        advice = (
            "Train a version both ways (`-p direction backward`) with several seeds; see gate F in `compare.ipynb`."
        )
        yield "arrow", f"An arrow of time: the text is easier to continue {way}s", why, advice
    elif way == "order":
        what = "The order of chunks can be detected" + ", but no arrow in prediction" * bool(results.arrows)
        advice = f"See whether a trained model uses the order (gate C, shuffled), and look at the probe by lag. {more}."
        yield "order", what, f"The order probe is significantly above chance. {why}", advice
    elif way == "none":
        why = "The order probe is at chance. " * bool(results.order) + why
        yield "no order", f"No order detected in {total} articles", why, f"{more}; use other chunks or another encoder."
    else:
        why = f"{total} articles with windows are too few to fit on some and test on others."
        yield "not measured", "Order and arrow could not be measured", why, "Take more articles, at least several tens."
    for warning in results.data.store.datasheet.get("warnings") or ():
        yield "datasheet", "The datasheet warns", f"{warning.rstrip('.')}.", "Read every figure with this in mind."


def _why_no_arrow(results: Results) -> str:
    ridge = results.arrows["ridge"]
    if (way := ridge.declared) != "none":
        if not above_chance(results.arrows, way):
            return f"Ridge does better {way}s, but is not above chance that way."
        return "Ridge differs forwards and backwards, but no more than the weighted mean, which has no direction."
    row = ridge.table.set_index("measure").loc["novel MRR"]
    if row["low"] > 0 or row["high"] < 0 or row["raw low"] > 0 or row["raw high"] < 0:
        return "Ridge differs forwards and backwards because the beginnings and ends of the articles differ."
    return "Ridge fitted forwards and backwards shows no significant difference."


def _gain(results: Results, g: dict) -> Rule:
    best, plain = g["best"], g["plain"]
    linear, small = results.difference("ridge", plain), (float("nan"),) * 3
    why = f"Ridge − {plain}: {signed(linear)} in novel MRR on validation"
    if g["other"] == TRAINED:
        small = results.difference(TRAINED, best)
        why += f"; {TRAINED} − {best}: {signed(small)}"
    if linear[1] > 0:
        advice = "Train `p6` first, and compare every model with ridge, not with copying."
        yield "linear gain", "A linear map predicts more than nearness and topic do", f"{why}.", advice
    elif small[1] > 0:
        advice = "Train `p6` in full, and compare versions with a directional loss with it."
        yield "small model gain", f"A small AMN beats {best} within a few steps", f"{why}.", advice
    elif g["low"] <= g["chance"]:
        why = f"The best baseline, {best}, has a novel MRR of {row_text(g, form='.3f')}; chance is {g['chance']:.3f}."
        advice = f"Try horizon 1 {_horizon(1)} if it is not; check the order of positions; use other chunks."
        yield "no signal", "The context hardly predicts the target", why, advice
    elif linear[1] == linear[1]:
        advice = f"Judge every model by its novel MRR minus that of {plain}, paired. Gains take more than a linear map."
        yield "no gain", f"No fitted predictor beats {plain}", f"{why}.", advice


def _nearness(results: Results, g: dict) -> Rule:
    value, low, high = results.difference("copy last", "mean")
    if low > 0:
        advice = f"Try horizon 1 {_horizon(1)} to see the most that nearness gives."
        if results.data.val.horizon == 1:
            advice = f"Try horizon 2 {_horizon(2)} to see what is left without it."
        why = f"By {signed((value, low, high))} in novel MRR."
        yield "nearness", "Nearness predicts: copying the last chunk beats the mean of the context", why, advice
    elif high < 0:
        why = f"By {signed((-value, -high, -low))} in novel MRR."
        yield "topic", "Topic predicts: the mean of the context beats its last chunk", why, "Use the mean as baseline."


def _power(results: Results, g: dict) -> Rule:
    caution, articles = few(results.data.val.article), results.articles
    if g["smallest"] != g["smallest"]:
        advice = "Have some tens of articles in each split."
        yield "few articles", "Too few articles to judge", f"Validation has {caution}.", advice
    elif caution or g["smallest"] > VISIBLE:
        what = f"Few articles: differences below {g['smallest']:.3f} in novel MRR may be missed"
        why = _visible(results, g) + f" Validation has {caution}." * bool(caution)
        yield "few articles", what, why, "Take more validation articles."
    for split in ("val", "ood"):
        article = getattr(results.data, split).article
        share = np.unique(article, return_counts=True)[1].max() / len(article)
        if share > max(HEAVY, 1.5 / articles[split]):
            why = f"The {articles[split]} articles count as {effective_articles(article):.1f} equal ones."
            advice = "Shorten that article, or move it to train."
            yield "heavy article", f"One article gives {share:.0%} of the {split} windows", why, advice


def _train(results: Results, g: dict) -> Rule:
    train, idle = results.data.train, unused(results.data)
    if len(train) < SMALL:
        why = "A transformer hardly learns on the 3,144 of the embedded data; the original trained on 431,895."
        advice = "Begin with `-p model amn` or `-p model lstm`, which learn more from little data."
        yield "small", f"{len(train):,} training windows are few for a transformer", why, advice
    if idle > UNUSED:
        why = f"A window takes {train.context_length + train.horizon} consecutive chunks of one article."
        advice = "Use smaller chunks. If ready vectors came with gaps, add the missing ones."
        yield "unused", f"{idle:.0%} of the chunks are in no window", why, advice


def _vectors(results: Results, g: dict) -> Rule:
    equal = results.facts["equal"] / results.facts["chunks"]
    if equal > EQUAL:
        advice = "Drop repeated chunks when encoding."
        yield "equal", f"{equal:.0%} of the vectors equal another one", "They are boilerplate, or empty texts.", advice
    if results.strangers > ALIKE:
        why = "A common direction makes every cosine high, even that of a constant vector."
        advice = "Read ranks and differences, not cosines. Another encoder may spread the texts more."
        what = f"All vectors are alike: chunks of different articles have cosine {results.strangers:.2f}"
        yield "alike", what, why, advice


def _ood(results: Results, g: dict) -> Rule:
    typical = results.nearest.groupby("split")["cosine"].median()
    if typical.get("ood", -1.0) >= typical.get("val", 1.0):
        why = f"Median cosine to the nearest training article: OOD {typical['ood']:.2f}, val {typical['val']:.2f}."
        advice = "Use OOD as a second validation split, or split again by topic or source."
        yield "ood", "OOD is no farther from train than validation is", why, advice


def _horizon(value: int) -> str:
    """How to set another horizon in the notebook and in training."""
    training = f"ARGS=\"-y 'overrides: {{horizon: {value}}}' -p run_name horizon{value}\""
    return f"(here `-p horizon {value}`; to train, `{training}`)"


def _count(number: float) -> str:
    return f"{number:,.0f}" if number < 10**9 else "a billion or more"
