"""The pre-flight's verdict: what `preflight` and `leaks` found, turned into words and advice by fixed rules.

Axes: N windows, A articles.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..judge.arrow import Arrow
from ..statistics import articles_needed, effective_articles, few, over_articles, smallest_difference
from ..windows import SPLITS, Dataset, Windows
from .facts import ARITHMETIC, TRAINED, best_trivial, joined, unused
from .leaks import NEAR, Leak, shared_titles
from .probe import OrderProbe

LEAK = 0.01  # share of a split's chunks that stand in train, too: MRR may be raised by as much
COPIES = 0.05  # share of the windows whose target is near-same as a chunk of its context
ALIKE = 0.5  # mean cosine of chunks of different articles: from here the mean vector alone has √½ = 0.7 to a chunk
VISIBLE = 0.02  # novel MRR: a smallest difference above this leaves open what matters
HEAVY = 0.3  # share of a split's windows from one article: the split then weighs as 1/0.3² = 11 articles at the most
UNUSED = 0.5  # share of the chunks that stand in no window: the figures then speak for the lesser part of the text
EQUAL = 0.05  # share of the vectors that equal another one: as for COPIES
SMALL = 37_000  # training windows: midway, in powers of ten, from 3,144 (a transformer hardly begins) to 431,895


@dataclass(frozen=True)
class Finding:
    """What was found, on which numbers, and what to try."""

    what: str
    why: str
    advice: str


@dataclass(frozen=True, eq=False)
class Found:
    """All that the verdict rests on; what was not measured is empty or None.

    `data`: the whole dataset. `scored`: `scores` of the trivial predictors, and of a small model after a few steps if
    one was TRAINED, on all of it or on a draw. `order`: lag → `crossed_order_probe`. `arrows`: `crossed_arrows`.
    `leaks`, `nearest`, `facts`: what `leaks`, `nearest_training`, `vector_facts` gave. `strangers`: mean cosine of
    chunks of different articles. `copied`: split → share of the windows whose target is a near copy. `peeked`: of
    validation. `trained_arrow`: the small model's `arrow`. `drawn`: what order and arrows are of, if not of `data`.
    """

    data: Dataset
    scored: Mapping[tuple[str, str], pd.DataFrame]
    order: Mapping[int, OrderProbe]
    arrows: Mapping[str, Arrow]
    leaks: Sequence[Leak]
    nearest: pd.DataFrame
    facts: Mapping[str, float]
    strangers: float
    copied: Mapping[str, float]
    peeked: pd.DataFrame | None = None
    trained_arrow: Arrow | None = None
    drawn: Dataset | None = None

    @property
    def articles(self) -> dict[str, int]:
        """Articles with windows, in the whole dataset."""
        return {s: len(np.unique(getattr(self.data, s).article)) for s in SPLITS}

    @property
    def draw(self) -> str:
        """That the figures of validation are of a draw, in a sentence; empty if they are of all of it."""
        return _draw("These figures are", self.scored["val", "mean"], self.data.val, "validation articles")

    def less(self, name: str, other: str, split: str = "val") -> tuple[float, float, float]:
        """Novel MRR of one trivial predictor less that of another, and its interval."""
        one, two = self.scored[split, name], self.scored[split, other]
        return over_articles(one["novel MRR"] - two["novel MRR"], one["article"])


def _draw(what: str, part: Windows, whole: Windows, noun: str = "articles") -> str:
    some, every = (pd.Series(w.article).value_counts() for w in (part, whole))
    if some.sum() == every.sum():
        return ""
    less = ", long ones cut to a stretch; whole articles have more candidates, and so a lower MRR"
    return (
        f" {what} of a draw of {len(some):,} {noun} of {len(every):,}{less * bool((some < every[some.index]).any())}."
    )


def probed(order: Mapping[int, OrderProbe]) -> pd.DataFrame:
    """Accuracy of the order probe, a row a lag: lag, accuracy, low, high (95 %), pairs, articles, and order: whether it
    is above ½ beyond doubt, where so many lags are looked at (Bonferroni)."""
    rows = []
    for lag, o in order.items():
        value, low, high = over_articles(o.correct, o.article, share=True)
        strict = over_articles(o.correct, o.article, level=1 - 0.05 / len(order), share=True)[1]
        rows.append((lag, value, low, high, len(o.correct), o.articles, bool(strict > 0.5)))
    columns = ["lag", "accuracy", "low", "high", "pairs", "articles", "order"]
    return pd.DataFrame(rows, columns=columns).astype({"order": bool})


def beyond(arrows: Mapping[str, Arrow]) -> tuple[float, float, float]:
    """Ridge's forward less backward, less the weighted mean's, window by window, in novel MRR: value, low, high.

    Five weights know no direction, but gain one way, as averaging does, where chunks grow noisier along every article;
    and with many articles ridge learns to average.
    """
    ridge, averaging = (arrows[n].differences["novel MRR"].mean(0) for n in ("ridge", "weighted mean"))
    return over_articles(ridge - averaging, arrows["ridge"].article)


def declared(arrows: Mapping[str, Arrow]) -> str:
    """The arrow that `crossed_arrows` show, "forward", "backward" or "none": ridge's, if it is beyond the weighted
    mean's on the same side, and ridge is above chance that way."""
    way = arrows["ridge"].declared if arrows else "none"
    if way == "none":
        return way
    _, low, high = beyond(arrows)
    return way if (low > 0 if way == "forward" else high < 0) and above_chance(arrows, way) else "none"


def above_chance(arrows: Mapping[str, Arrow], way: str) -> bool:
    """Whether ridge, read that way, foretells more than chance on the windows of its arrow."""
    return bool(arrows["ridge"].table[f"{way} above chance"].iloc[0] > 0)


def direction(found: Found) -> str:
    """What is known of the text's direction: "forward" or "backward" (an arrow: it is easier to continue that way),
    "order" (the vectors tell the order, no arrow is seen), "none" (neither is seen), "not measured". The small model
    declares nothing: it is of one seed."""
    if (way := declared(found.arrows)) != "none":
        return way
    if probed(found.order)["order"].any():
        return "order"
    return "none" if found.order or found.arrows else "not measured"


def blind(found: Found) -> tuple[float, float]:
    """The smallest arrow that ridge would show with 80 %, plain and beyond the weighted mean, in novel MRR, and how
    many articles would show one half as large; NaN where it was not measured."""
    if not found.arrows:
        return float("nan"), float("nan")
    ridge, averaging = (found.arrows[n].differences["novel MRR"].mean(0) for n in ("ridge", "weighted mean"))
    each, article = (ridge, ridge - averaging), found.arrows["ridge"].article
    least = [smallest_difference(v, article) for v in each]
    return max(least), max(articles_needed(v, article, max(least) / 2) for v in each)


def gain(found: Found) -> dict:
    """What there is to beat on validation, in novel MRR: best (name of the best trivial predictor), its value, low,
    high; chance; plain (the best that only weighs its context); other (the small model if one was trained, else ridge,
    or plain where ridge is the best); smallest (the difference seen with 80 %, from how other − best varies), needed
    0.02, needed 0.01 (articles); range (of `smallest` over all that read their context, less best, in words);
    both sides, beside (`peeked`: the chunks on both sides, and best on the same candidates); NaN if not measured."""
    best = best_trivial(found.scored)
    frame, total = found.scored["val", best], found.articles["val"]
    value, low, high = over_articles(frame["novel MRR"], frame["article"], share=True)
    plain = max(ARITHMETIC, key=lambda n: found.scored["val", n]["novel MRR"].mean())
    names = [n for s, n in found.scored if s == "val" and n not in (best, "constant")]
    other = TRAINED if TRAINED in names else plain if best == "ridge" else "ridge"
    less = {n: found.scored["val", n]["novel MRR"] - frame["novel MRR"] for n in names}
    smallest = {n: smallest_difference(v, frame["article"], articles=total) for n, v in less.items()}
    facts = {"best": best, "value": value, "low": low, "high": high, "plain": plain, "other": other}
    facts |= {"chance": float(frame["chance"].mean()), "both sides": float("nan"), "beside": float("nan")}
    facts |= {"smallest": smallest[other], "range": f"{min(smallest.values()):.3f} to {max(smallest.values()):.3f}"}
    facts |= {f"needed {w:g}": articles_needed(less[other], frame["article"], w) for w in (0.02, 0.01)}
    if found.peeked is not None:
        p = found.peeked
        facts |= {"both sides": float(p["both sides"].mean()), "beside": float(p[best].mean())}
    return facts


def answers(found: Found) -> tuple[str, str]:
    """The two questions, answered in a few sentences of Markdown: is there a signal of direction in the dataset, and
    how much could a model gain over trivial predictors?"""
    way, table, g, total = direction(found), probed(found.order), gain(found), sum(found.articles.values())
    signal = {
        "forward": "**Yes, forwards.** The text is easier to continue forwards than backwards.",
        "backward": "**Yes, but backwards.** The text is easier to continue backwards than forwards.",
        "order": "**Order, but no arrow that was seen.** The order of the chunks can be told from their vectors; "
        "that it is easier to continue one way is not shown.",
        "none": f"**None that {total} articles show.**",
        "not measured": f"**Not measured.** {total} articles with windows are too few.",
    }[way]
    if way == "order" and not found.arrows:
        signal = "**Order; an arrow was not measured.** The order of the chunks can be told from their vectors."
    if len(table):
        row = table[table["order"]].iloc[0] if table["order"].any() else table.iloc[0]
        signal += (
            f" A small classifier tells which of two chunks {row['lag']} apart comes first in "
            f"{_range(row, 'accuracy', '.1%')} of pairs, over {row['articles']} articles; chance is 50 %."
        )
    if found.arrows:
        signal += f" {_ridge_both_ways(found)}"
    if found.drawn is not None:
        signal += _draw("Order and ridge's arrow are", joined(found.drawn), joined(found.data))
    if found.trained_arrow is not None:
        signal += f" {trained_both_ways(found.trained_arrow)}"
    room = (
        f"The best trivial predictor is **{g['best']}**: its novel MRR is {_range(g, 'value')}, where chance gives "
        f"{g['chance']:.3f}."
    )
    beside = [] if g["best"] == "ridge" else [f"ridge, fitted to train, {signed(found.less('ridge', g['best']))}"]
    if g["other"] == TRAINED:
        beside.append(f"the {TRAINED}, after a few steps, {signed(found.less(TRAINED, g['best']))}")
    if g["best"] == "ridge":
        room += f" It is {signed(found.less('ridge', g['plain']))} from {g['plain']}, which only weighs its context."
    if beside:
        room += f" Less {g['best']}: {', '.join(beside)}."
    if g["both sides"] == g["both sides"]:
        room += (
            " What the best possible predictor would have is not known, but 1.0 is not it. A mark, no ceiling: both "
            f"neighbours of the target together, one of which no predictor may see, have {g['both sides']:.3f}, where "
            f"{g['best']} has {g['beside']:.3f} on the same candidates."
        )
        if _overlap(found)[1]:
            room += " Here they share tokens with the target, so that the mark is too high."
    room += found.draw
    room += (
        f" On {found.articles['val']} validation articles a difference of {g['smallest']:.3f} is seen four times in "
        f"five (by {g['other']} less {g['best']}; {g['range']} over all comparisons), a smaller one less often; "
        f"0.02 takes {_count(g['needed 0.02'])} such articles, 0.01 {_count(g['needed 0.01'])}."
        if g["smallest"] == g["smallest"]
        else " With a single validation article no difference can be told from chance."
    )
    return signal, room


def conclusion(found: Found) -> str:
    """The verdict in one paragraph of Markdown: direction, what there is to beat, what could be seen, what to try."""
    g, way = gain(found), direction(found)
    said = {
        "forward": "The text is easier to continue forwards than backwards: there is a direction to learn.",
        "backward": "The text is easier to continue backwards than forwards: there is a direction, but not the usual "
        "one.",
        "order": "The vectors tell the order of the chunks, but that it helps to continue the text one way is not "
        "seen.",
        "none": "No order is seen in these vectors, and so nothing that a directional loss could learn.",
        "not measured": "Whether there is a direction to learn could not be measured.",
    }[way]
    said += f" To beat is {g['best']}, with a novel MRR of {g['value']:.3f} (chance {g['chance']:.3f})"
    said += (
        f"; on {found.articles['val']} validation articles a gain of {g['smallest']:.3f} would be seen four times in "
        f"five, if it varies as {g['other']} less {g['best']} does."
        if g["smallest"] == g["smallest"]
        else "; no gain could be told from chance."
    )
    said += found.draw
    spoils = [finding for rule in SPOILS for finding in rule(found, g)]
    if spoils:
        return f"{said} Before anything else: {spoils[0].what[0].lower()}{spoils[0].what[1:]}. {spoils[0].advice}"
    return f"{said} To try first: {verdict(found)[0].advice}"


def both_ways(a: Arrow) -> str:
    """Forward less backward in novel MRR, with copying taken off and left in, in words."""
    row = a.table.set_index("measure").loc["novel MRR"]
    left_in = row["forward"] - row["backward"], row["raw low"], row["raw high"]
    return (
        f"{_range(row, 'difference', '+.3f')} in novel MRR over {int(row['articles'])} articles with what copying "
        f"gains by the direction taken off, {signed(left_in)} with it left in"
    )


def _ridge_both_ways(found: Found) -> str:
    said = f"Forward less backward, ridge has {both_ways(found.arrows['ridge'])}, and {signed(beyond(found.arrows))}"
    said += " beyond the weighted mean; an arrow needs all three on one side of 0, and ridge above chance that way."
    if declared(found.arrows) != "none" or np.isnan(least := blind(found)[0]):
        return said
    return f"{said} One of {least:.3f} would be seen four times in five."


def trained_both_ways(a: Arrow) -> str:
    """The small model's arrow in a sentence, with what makes its interval less than it seems."""
    said = "; ".join(filter(None, (both_ways(a), a.caution, "it declares nothing")))
    return f"The {TRAINED}, trained both ways, has {said}."


def verdict(found: Found) -> list[Finding]:
    """What speaks for an experiment on this dataset and what stands in its way, by fixed rules on figures and their
    intervals; the bounds are the constants at the file's head. What would spoil every figure comes first."""
    g = gain(found)
    rules = (_of_direction, _of_warnings, _of_gain, _of_nearness, _of_power, _of_size, _of_vectors, _of_ood)
    return [finding for rule in (*SPOILS, *rules) for finding in rule(found, g)]


def _of_leaks(found: Found, g: dict) -> Iterator[Finding]:
    store = found.data.store
    for leak in (leak for leak in found.leaks if leak.other == "train"):
        articles = leak.articles(store)
        if leak.share >= LEAK or articles:
            many = f" ({articles} article{'s' if articles > 1 else ''} for more than half)" if articles else ""
            yield Finding(
                f"{leak.share:.1%} of the {leak.split} chunks stand in train, too{many}",
                f"{leak.near:,} of {len(leak.rows):,} have a training chunk at cosine {NEAR} or more. A model that "
                f"remembers what followed there is right without any knowledge of order; {leak.split} figures may be "
                f"too high by about that share.",
                "Drop near-duplicates when encoding, or put the articles that share chunks into one split.",
            )
    for titles in shared_titles(store)[:1]:
        yield Finding(
            "Titles that are all but equal stand in two splits",
            f"Such as {' and '.join(titles[:3])}.",
            "If they are one article, put them into one split.",
        )


def _of_copies(found: Found, g: dict) -> Iterator[Finding]:
    split = max(found.copied, key=found.copied.get)
    if found.copied[split] >= COPIES:
        yield Finding(
            "Copying wins: targets repeat their context",
            f"In {found.copied[split]:.0%} of the {split} windows the target is at cosine {NEAR} or more to a chunk of "
            "its own context. Whoever copies has a high cosine, and ranks are decided among chunks that hardly differ.",
            "Drop near-duplicate chunks within an article, or cut larger chunks.",
        )


def _overlap(found: Found) -> tuple[int, int]:
    """Tokens of a chunk, and how many of them the next one shares, by the datasheet; 0, 0 if it does not say."""
    build = found.data.store.datasheet.get("build") or {}
    return (build["tokens"], build["overlap"]) if build.get("unit") == "tokens" else (0, 0)


def _of_overlap(found: Found, g: dict) -> Iterator[Finding]:
    (tokens, overlap), horizon = _overlap(found), found.data.val.horizon
    shared = tokens - horizon * (tokens - overlap)  # chunks begin tokens − overlap apart
    if shared > 0:
        free = -(-tokens // (tokens - overlap))
        yield Finding(
            "Chunks overlap: the target holds words of its context",
            f"By construction it shares {shared} of its {tokens} tokens ({shared / tokens:.0%}) with the last chunk of "
            "the context, so that copying looks better than it is, and every model that copies.",
            f"Encode with overlap 0, or take horizon {free} {_horizon(free)}, from which nothing is shared.",
        )


def _of_warnings(found: Found, g: dict) -> Iterator[Finding]:
    for warning in found.data.store.datasheet.get("warnings") or ():
        yield Finding("The datasheet warns", f"{warning.rstrip('.')}.", "Read every figure with this in mind.")


SPOILS = (_of_leaks, _of_copies, _of_overlap)  # what would spoil every figure comes first


def _of_direction(found: Found, g: dict) -> Iterator[Finding]:
    way, (least, needed), total = direction(found), blind(found), sum(found.articles.values())
    missed = (
        f"An arrow below {least:.3f} in novel MRR would mostly be missed" if least == least else "No arrow was measured"
    )
    more = (
        f"more articles ({_count(needed)} would show an arrow half as large)" if needed == needed else "more articles"
    )
    if way in ("forward", "backward"):
        yield Finding(
            f"An arrow of time: the text is easier to continue {way}s",
            "Ridge fitted both ways differs beyond doubt, with what copying gains by the direction taken off and left "
            "in, and beyond the weighted mean.",
            "Train a version both ways (`-p direction backward`) with several seeds; gate F in `compare.ipynb` says "
            "whether a trained model sees it, too.",
        )
    elif way == "order":
        yield Finding(
            "The vectors tell their order" + (", but no arrow is seen in prediction" if found.arrows else ""),
            "The order probe is above chance beyond doubt"
            + (f"; {_not_an_arrow(found)}" if found.arrows else "")
            + f". {missed}.",
            "See whether a trained model reads in order (gate C, shuffled), look at the probe by lag (a slow drift is "
            f"easier to see at larger ones, and says nothing of the next chunk), and take {more}.",
        )
    elif way == "none":
        seen = ["A small classifier cannot tell which of two chunks comes first."] if found.order else []
        seen += [f"{_not_an_arrow(found).capitalize()}."] if found.arrows else []
        yield Finding(
            f"No order that {total} articles could show",
            f"{' '.join(seen)} {missed}.",
            f"Take {more}; cut other chunks (sentences for paragraphs, or the reverse); try another encoder. As it "
            "stands a directional loss has nothing to work on.",
        )
    else:
        yield Finding(
            "Order and arrow could not be measured",
            f"{total} articles with windows are too few to fit on some and to judge on others.",
            "Take more articles: some tens at the least.",
        )


def _not_an_arrow(found: Found) -> str:
    row = found.arrows["ridge"].table.set_index("measure").loc["novel MRR"]
    sides = [int(low > 0) - int(high < 0) for low, high in (row[["low", "high"]], row[["raw low", "raw high"]])]
    if not any(sides):
        return "ridge fitted forwards and backwards is not told apart"
    if (way := found.arrows["ridge"].declared) != "none":
        if not above_chance(found.arrows, way):
            return f"ridge does better {way}s, but there, too, it is not above chance"
        return "ridge fitted forwards and backwards differs, but not beyond the weighted mean, which knows no direction"
    return (
        "ridge fitted forwards and backwards differs, but not to one side with what copying gains by the direction "
        "taken off and with it left in, as uneven ends of the articles make it"
    )


def _of_gain(found: Found, g: dict) -> Iterator[Finding]:
    value, low, high = found.less("ridge", g["plain"])
    said = f"Ridge less {g['plain']}: {signed((value, low, high))} in novel MRR on validation"
    trained = found.less(TRAINED, g["best"]) if g["other"] == TRAINED else (float("nan"),) * 3
    said += f"; the {TRAINED} less {g['best']}: {signed(trained)}." if g["other"] == TRAINED else "."
    if low > 0:
        yield Finding(
            "A linear map foretells more than nearness and topic do",
            said,
            "Train `p6` first, and ask of every model whether it beats ridge, not whether it beats copying.",
        )
    elif trained[1] > 0:
        yield Finding(
            f"A small AMN gains over {g['best']} within a few steps",
            said,
            "Train `p6` in full; what a directional loss adds has to show against that.",
        )
    elif g["low"] <= g["chance"]:
        yield Finding(
            "The context hardly says which chunk comes",
            f"The best trivial predictor, {g['best']}, has a novel MRR of {_range(g, 'value')}; chance is "
            f"{g['chance']:.3f}.",
            f"Try horizon 1 {_horizon(1)} if it is not; see that positions are in reading order; cut other chunks.",
        )
    elif low == low:
        yield Finding(
            f"No fitted predictor beats {g['plain']}",
            said,
            f"Judge every model by its novel MRR less that of {g['plain']}, paired; margins and R@5 of six say nothing "
            "here. What there is to gain lies beyond a linear map, or takes more windows.",
        )


def _of_nearness(found: Found, g: dict) -> Iterator[Finding]:
    value, low, high = found.less("copy last", "mean")
    if low > 0:
        yield Finding(
            "Nearness tells: copying the last chunk beats the mean of the context",
            f"By {signed((value, low, high))} in novel MRR.",
            f"Try horizon 1 {_horizon(1)} to see what nearness gives at most; a model's own part is what it adds to "
            "copying."
            if found.data.val.horizon > 1
            else f"Try horizon 2 {_horizon(2)} to see what is left where the nearest chunk is not read.",
        )
    elif high < 0:
        yield Finding(
            "Topic tells, nearness does not: the mean of the context beats its last chunk",
            f"By {signed((-value, -high, -low))} in novel MRR.",
            "Take the mean for the predictor to beat.",
        )


def _of_power(found: Found, g: dict) -> Iterator[Finding]:
    caution = few(found.data.val.article)
    if caution or not g["smallest"] <= VISIBLE:
        known = g["smallest"] == g["smallest"]
        spread = f"Going by how {g['other']} less {g['best']} varies over {found.articles['val']} validation articles"
        yield Finding(
            f"Few articles: below {g['smallest']:.3f} in novel MRR little is seen"
            if known
            else "Too few articles to judge",
            f"{spread}; over all comparisons it is {g['range']}{'; ' * bool(caution)}{caution}."
            if known
            else f"Validation has {caution}.",
            f"Have {_count(g['needed 0.02'])} validation articles to see 0.02, {_count(g['needed 0.01'])} to see 0.01; "
            "do not choose between versions by less, however many seeds."
            if known
            else "Have some tens of articles in each split.",
        )
    for split in ("val", "ood"):
        article = getattr(found.data, split).article
        share = np.unique(article, return_counts=True)[1].max() / len(article)
        if share > max(HEAVY, 1.5 / found.articles[split]):
            yield Finding(
                f"One article gives {share:.0%} of the {split} windows",
                f"The {found.articles[split]} articles weigh as much as {effective_articles(article):.1f} equal ones.",
                "Cut that article short, or move it to train.",
            )


def _of_size(found: Found, g: dict) -> Iterator[Finding]:
    idle = unused(found.data)
    if len(found.data.train) < SMALL:
        yield Finding(
            f"{len(found.data.train):,} training windows are few for a transformer",
            "On the 3,144 of the embedded data it hardly begins to learn; the original trained on 431,895; where "
            "between the two it begins to pay was not measured.",
            "Begin with `-p model amn` or `-p model lstm`, which get further on little.",
        )
    if idle > UNUSED:
        yield Finding(
            f"{idle:.0%} of the chunks stand in no window",
            f"A window takes {found.data.train.context_length + found.data.train.horizon} chunks on end; articles are "
            "shorter, or positions have gaps.",
            "Cut smaller chunks; where ready vectors came with gaps, take in those that are missing.",
        )


def _of_vectors(found: Found, g: dict) -> Iterator[Finding]:
    facts = found.facts
    if facts["equal"] > EQUAL * facts["chunks"]:
        yield Finding(
            f"{facts['equal'] / facts['chunks']:.0%} of the vectors equal another one",
            "Boilerplate, or empty texts.",
            "Drop chunks that come up again and again when encoding.",
        )
    if found.strangers > ALIKE:
        yield Finding(
            f"All vectors are alike: chunks of different articles have cosine {found.strangers:.2f}",
            "A direction common to all makes every cosine high, that of a constant vector, too.",
            "Read ranks and differences, not cosines; another encoder may spread the texts more.",
        )


def _of_ood(found: Found, g: dict) -> Iterator[Finding]:
    typical = found.nearest.groupby("split")["cosine"].median()
    if typical.get("ood", -1.0) >= typical.get("val", 1.0):
        yield Finding(
            "OOD is no farther from train than validation is",
            f"In the median the nearest training article is at cosine {typical['ood']:.2f} for OOD, "
            f"{typical['val']:.2f} for validation.",
            "Take OOD for a second validation split, or split anew by topic or source.",
        )


def _horizon(value: int) -> str:
    """How a notebook is told another horizon."""
    training = f"ARGS=\"-y 'overrides: {{horizon: {value}}}' -p run_name horizon{value}\""
    return f"(here `-p horizon {value}`; to train, `{training}`)"


def _range(row: Mapping, value: str, form: str = ".3f") -> str:
    interval = f" [{row['low']:{form}}, {row['high']:{form}}]" if row["low"] == row["low"] else " (no interval)"
    return f"{row[value]:{form}}{interval}"


def signed(found: tuple[float, float, float], form: str = "+.3f") -> str:
    """A figure and its interval (value, low, high) in words: "+0.012 [-0.003, +0.027]"."""
    if found[0] != found[0]:
        return "–"
    return _range(dict(zip(("value", "low", "high"), found, strict=True)), "value", form)


def _count(number: float) -> str:
    return f"{number:,.0f}" if number < 10**9 else "a billion or more"
