"""Plain derivations for the tests of 5CAT: one window at a time, in float64, in plain loops.

Axes: N windows, T context length, D vector dimension.
"""

import copy
import functools
import math

import numpy as np
import pandas as pd
import torch

from lvmlib import models
from lvmlib.baselines import Constant, Linear, Weighted
from lvmlib.data.store import make_store
from lvmlib.judge.measure import KINDS, PARTS, Measurements, measure, negatives
from lvmlib.windows import windows

T = 5
OFFSETS = range(-8, 6)
ORIGINAL_OFFSETS = range(-3, 4)
STEPS = range(1, 6)
ABLATIONS = ("shuffled", "reversed", *(f"without [{i}]" for i in range(-T, 0)), "last repeated", "last from elsewhere")
ORIGINAL_ABLATIONS = ("shuffled", "reversed", "leave one out", "last repeated", "last replaced")
TIE = 1e-6
TOLERANCE = 1e-6  # a float32 cosine is within 3e-7 of the float64 one, a difference of two within 6e-7
WEIGHTS = 3e-6  # least squares over five vectors multiplies float32's rounding by their condition: seen up to 1.4e-6


# Stores and predictors


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def store_of(articles, dtype=np.float32):
    """A store from {number: (split, positions, vectors)}; vectors are normalised here."""
    numbers = pd.Index(list(articles), name="article")
    frame = pd.DataFrame({"title": [f"title {a}" for a in articles]}, index=numbers)
    frame["split"] = [split for split, _, _ in articles.values()]
    vectors = unit(np.concatenate([x for _, _, x in articles.values()])).astype(dtype)
    article = np.repeat(list(articles), [len(p) for _, p, _ in articles.values()])
    return make_store("small", vectors, article, np.concatenate([p for _, p, _ in articles.values()]), frame)


@functools.cache
def small_store(dtype=np.float32, dim=16):
    """Articles of several lengths, splits mixed, numbers with holes; article 5 and 12 have a gap in positions."""
    random = np.random.default_rng(1)
    layout = {
        0: ("train", range(8)),
        3: ("val", range(9)),
        4: ("ood", range(2, 12)),
        5: ("val", [*range(9), *range(10, 18), *range(30, 33)]),  # one chunk missing, later twelve
        6: ("val", range(6)),  # one window at horizon 1, none at 2
        7: ("val", range(3, 26)),
        8: ("val", range(4)),  # too short for any
        11: ("ood", range(7)),
        12: ("ood", [*range(15), 18, 19, 20, 21, 22, 23, 24, 25]),
        13: ("val", range(20)),  # as 7 long enough for a whole rollout at horizon 2
    }
    articles = {}
    for a, (split, p) in layout.items():
        x = random.standard_normal(dim) + 0.8 * random.standard_normal((len(p), dim))
        articles[a] = (split, np.array(p), x)
    return store_of(articles, dtype)


def only_article():
    """Windows of a store with a single article."""
    x = np.random.default_rng(0).standard_normal((15, 8))
    return windows(store_of({0: ("val", np.arange(15), x)}), "val", 1, T)


class Scan(models.Predictor):
    """An order-sensitive predictor: a small recurrent net with fixed random weights."""

    def __init__(self, dim, context_length=T, seed=3):
        super().__init__(dim, context_length)
        g = torch.Generator().manual_seed(seed)
        self.register_buffer("state", torch.randn(dim, dim, generator=g) / dim**0.5)
        self.register_buffer("input", torch.randn(dim, dim, generator=g) / dim**0.5)

    def raw(self, context):
        x = torch.zeros_like(context[:, 0])
        for t in range(context.shape[1]):
            x = torch.tanh(x @ self.state + 2 * context[:, t] @ self.input)
        return x


def random_linear(dim, seed=0):
    return Linear(dim, torch.randn(T * dim, dim, generator=torch.Generator().manual_seed(seed)))


def weighted(dim, *weights):
    return Weighted(dim, torch.tensor(weights))


def mean_predictor(dim):
    return Weighted(dim, torch.full((T,), 1 / T))


def copy_last(dim):
    return Weighted(dim, torch.eye(T)[-1])


def constant(dim):
    return Constant(dim, T, torch.randn(dim, generator=torch.Generator().manual_seed(0)))


def seeded_transformer(dim):
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return models.build("transformer", dim).eval()


PREDICTORS = {
    "linear": random_linear,
    "weighted": lambda dim: weighted(dim, 0.1, -0.2, 0.3, 0.5, 0.7),
    "scan": Scan,
    "mean": mean_predictor,
    "transformer": seeded_transformer,
}


@functools.cache
def rotation(dim=64, length=24):
    """(store, R): x_{t+1} = R x_t with an orthogonal R; the next vector is a linear function of the last."""
    random = np.random.default_rng(2)
    turn = np.linalg.qr(random.standard_normal((dim, dim)))[0]
    articles = {}
    for a in range(12):
        x = [random.standard_normal(dim)]
        while len(x) < length:
            x.append(turn @ x[-1])
        articles[a] = (("train", "train", "val", "ood")[a % 4], np.arange(length), np.array(x))
    return store_of(articles), turn


def knowing(turn, horizon=1):
    """The predictor that continues `rotation` perfectly."""
    weights = np.zeros((T * len(turn), len(turn)))
    weights[-len(turn) :] = np.linalg.matrix_power(turn, horizon).T
    return Linear(len(turn), torch.from_numpy(weights).float())


# Measurements as a frame, one column a figure, and back

PLACES = {name: (name, None) for name in ("article", "target", "loss", "cosine", "cosine_article", "coherence")}
PLACES |= {name.replace("_", " "): (name, None) for name in ("margin_last", "margin_prev", "six_rank")}
PLACES |= {name.replace("_", " "): (name, None) for name in ("hundred", "hundred_candidates")}
PLACES |= {f"offset {k:+d}": ("offsets", i) for i, k in enumerate(OFFSETS)}
for kind, prefix in zip(KINDS, ("", "novel ", "possible "), strict=True):
    PLACES |= {f"{prefix}rank": ("ranks", kind), f"{prefix}candidates": ("candidates", kind)}
for name in (*ABLATIONS, "last replaced"):
    PLACES |= {name: ("cosine_change", name), f"{name}, novel MRR": ("mrr_change", name)}
PLACES["leave one out"] = ("cosine_change", "leave one out")
for h in STEPS:
    PLACES |= {f"rollout {kind}{h}": ("rollout" + end, h - 1) for kind, end in
               (("", ""), ("late ", "_late"), ("still ", "_still"), ("chance ", "_chance"))}  # fmt: skip
    PLACES |= {f"similarity {h}": ("similarity", h - 2)} if h > 1 else {}
PLACES |= {f"weight {t - T}": ("weights", t) for t in range(T)} | {name: ("parts", name) for name in PARTS}


def flat(measured):
    """A frame with a column a figure, of a context of T."""
    columns = {}
    for name, (field, key) in PLACES.items():
        whole = getattr(measured, field)
        columns[name] = whole if key is None else whole[key] if isinstance(key, str) else whole[:, key]
    return pd.DataFrame(columns)


def unflat(columns):
    """Measurements of such columns; NaN for those that are not there."""
    fields, missing = {}, np.full(len(columns["article"]), math.nan)
    for name, (field, key) in PLACES.items():
        values = np.asarray(columns.get(name, missing))
        fields |= {field: values} if key is None else {field: fields.get(field, {}) | {key: values}}
    stacked = {f: np.column_stack(list(v.values())) for f, v in fields.items() if isinstance(v, dict) and 0 in v}
    return Measurements(**fields | stacked)


# The reference: handbook §4 and the fields of Measurements


def cos(a, b):
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


class Reference:
    """What `measure` must give for the windows of `cut`: `rows`, plain dicts, and `frame`.

    `unclear`: ranks that float32 cannot tell (a candidate within 0.5e-6 of the edge of a tie), as (window, column).
    """

    def __init__(self, model, cut):
        self.model, store, self.step = copy.deepcopy(model).double().eval(), cut.store, cut.step
        self.vectors = store.vectors.astype(np.float64)
        self.at = {(int(a), int(p)): row for row, (a, p) in enumerate(zip(store.article, store.position, strict=True))}
        self.places = {row: place for place, row in self.at.items()}
        self.windows, self.rows, self.unclear = [], [], set()
        wanted = set(cut.target.tolist())
        span = range(T - 1 + cut.horizon + 1)
        for article, position in self.at:
            needed = [(article, position + i) for i in span]
            if store.articles.loc[article, "split"] == cut.split and all(c in self.at for c in needed):
                needed = [self.at[c] for c in (needed if cut.step == 1 else needed[::-1])]
                if needed[-1] in wanted:
                    self.windows.append((needed[:T], needed[-1]))
        self.order, self.others = negatives(cut, np.arange(len(cut)), 0, 99)  # the draws have tests of their own
        for window, (context_rows, target_row) in enumerate(self.windows):
            self.rows.append(self.measured(window, context_rows, target_row, cut.horizon))
        self.frame = pd.DataFrame(self.rows)

    def measured(self, window, context_rows, target_row, horizon):
        article = self.places[target_row][0]
        own = [row for row, (a, _) in self.places.items() if a == article]
        outside = [row for row in own if row not in context_rows]
        context, target = self.vectors[context_rows], self.vectors[target_row]
        others = [int(row) for row in self.others[window] if row >= 0]
        variants = self.ablated(context, self.order[window], others)
        raws, units = self.predict([context, *variants.values()])
        p = units[0]
        base = cos(p, target)

        def share(unit):
            return np.mean([cos(unit, self.vectors[c]) for c in outside])

        def at_offset(unit, k):
            row = self.around(target_row, k)
            return math.nan if row is None else cos(unit, self.vectors[row])

        def rank(unit, candidates, column):
            """From 1; places that equal cosines share count as their mean."""
            gaps = [cos(unit, self.vectors[c]) - cos(unit, target) for c in candidates]
            if any(abs(abs(g) - TIE) < TIE / 2 for g in gaps):
                self.unclear.add((window, column))
            above, equal = sum(g > TIE for g in gaps), sum(abs(g) <= TIE for g in gaps)  # the target itself is equal
            return sum(range(above + 1, above + equal + 1)) / equal

        row = {"article": article, "target": target_row, "loss": np.mean((raws[0] - target) ** 2), "cosine": base}
        row["cosine_article"] = share(p)
        to_context = [cos(p, c) for c in context]
        row |= {"margin last": base - to_context[-1], "margin prev": base - to_context[-2]}
        row["six rank"] = 1 + sum(c > base for c in to_context)
        row |= {f"offset {k:+d}": at_offset(p, k) for k in OFFSETS}
        row |= {"rank": rank(p, own, "rank"), "candidates": len(own)}
        row |= {"novel rank": rank(p, outside, "novel rank"), "novel candidates": len(outside)}
        possible = [c for c in outside if self.around(c, 1 - T - horizon) is not None]
        row |= {"possible rank": rank(p, possible, "possible rank"), "possible candidates": len(possible)}
        rivals = [cos(p, self.vectors[c]) for c in others]
        won = all(r <= base + TIE for r in rivals) / (1 + sum(abs(r - base) <= TIE for r in rivals))
        row |= {"hundred": won if others else math.nan, "hundred candidates": len(others) + 1}

        for name, unit in zip(variants, units[1:], strict=True):
            column = f"{name}, novel MRR"
            row |= {name: cos(unit, target) - base, column: 1 / rank(unit, outside, column) - 1 / row["novel rank"]}
        if not others:
            row |= {"last from elsewhere": math.nan, "last from elsewhere, novel MRR": math.nan}
        # The original fills up with the context's own last vector, so that without the last one nothing changes.
        filled = [[*np.delete(context, t, 0), context[-1]] for t in range(T)]
        row["leave one out"] = np.mean([cos(unit, target) - base for unit in self.predict(filled)[1]])

        rolling, unit = list(context), p
        for h in STEPS:
            # The newest vector foretells the chunk `horizon` after it, taking each prediction for the next chunk.
            place = (h - 1) * horizon
            row |= {f"rollout {h}": at_offset(unit, place), f"rollout late {h}": at_offset(unit, h)}
            row |= {f"rollout still {h}": at_offset(p, place), f"rollout chance {h}": share(unit)}
            rolling.append(unit)
            before, unit = unit, self.predict([rolling[-T:]])[1][0]
            if h < 5:
                row[f"similarity {h + 1}"] = cos(before, unit)
        row["coherence"] = np.mean([cos(context[i], context[i + 1]) for i in range(T - 1)])

        ridge = 1e-4 * np.mean([c @ c for c in context])
        weights = np.linalg.solve(context @ context.T + ridge * np.eye(T), context @ p)
        row |= {f"weight {t - T}": weights[t] for t in range(T)}
        mean = context.mean(0) / np.linalg.norm(context.mean(0))
        along = p @ mean
        apart = np.array([c - (c @ mean) * mean for c in context])
        # By singular values: the five sum to 0, so that one of the directions is rounding alone.
        _, size, directions = np.linalg.svd(apart, full_matrices=False)
        inside = sum((p @ d) ** 2 for d, s in zip(directions, size, strict=True) if s > 1e-5)
        parts = {"along the mean": along * abs(along), "along differences": inside}
        return row | parts | {"outside the context": 1 - along**2 - inside}

    def ablated(self, context, order, others):
        first, *_, last = context
        return {
            "shuffled": context[order],
            "reversed": context[::-1],
            "without [-5]": context[[1, 2, 3, 4, 4]],
            "without [-4]": context[[0, 2, 3, 4, 4]],
            "without [-3]": context[[0, 1, 3, 4, 4]],
            "without [-2]": context[[0, 1, 2, 4, 4]],
            "without [-1]": context[[0, 1, 2, 3, 3]],
            "last repeated": [last] * T,
            "last replaced": [*context[:-1], first],
            "last from elsewhere": [*context[:-1], self.vectors[others[0]] if others else last],
        }

    def around(self, row, k):
        """The row k chunks on from `row`, as it is read; none outside the article or across a gap in it."""
        article, position = self.places[row]
        way = [(article, position + self.step * j) for j in range(min(k, 0), max(k, 0) + 1)]
        return self.at[article, position + self.step * k] if all(w in self.at for w in way) else None

    def predict(self, contexts):
        with torch.no_grad():
            raw = self.model.raw(torch.from_numpy(np.array(contexts, float))).numpy()
        return raw, [r / math.sqrt(r @ r) for r in raw]


EXACT = ("article", "target", "six rank", "rank", "candidates", "novel rank", "novel candidates", "hundred candidates")
EXACT += ("possible rank", "possible candidates")


def assert_same(frame, wanted, tolerance=TOLERANCE, unclear=()):
    assert set(frame) == set(wanted)
    assert len(frame) == len(wanted) and len(unclear) <= 1 + len(frame) / 20
    for column in wanted:
        clear = np.array([(i, column) not in unclear for i in range(len(frame))])
        ours, theirs = frame[column].to_numpy(float)[clear], wanted[column].to_numpy(float)[clear]
        atol = 0 if column in EXACT else WEIGHTS if column.startswith("weight") else tolerance
        rtol = 1e-6 if column == "loss" else 0  # the raw prediction of a random linear model is of any size
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol, err_msg=column)


@functools.cache
def small_windows(split, horizon, direction="forward", dtype=np.float32, most=None):
    cut = windows(small_store(dtype), split, horizon, T, direction)
    return cut.at_most(most or len(cut))


@functools.cache
def reference(name, *cut, **more):
    cut = small_windows(*cut, **more)
    return Reference(PREDICTORS[name](cut.store.dim), cut)


@functools.cache
def measured(name, *cut, batch_size=512, **more):
    cut = small_windows(*cut, **more)
    return flat(measure(PREDICTORS[name](cut.store.dim), cut, batch_size=batch_size))
