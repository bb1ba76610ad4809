"""Stores for tests, and what damages them."""

import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import yaml

from lvmlib import windows as W
from lvmlib.data import store as V
from lvmlib.data import worlds
from lvmlib.errors import LVMError

DIM = 6


def random_store(seed, dtype=np.float32, gaps=True, articles=12, longest=25):
    """Articles of 1 to `longest` chunks in shuffled numbering, some with gaps in their positions."""
    rng = np.random.default_rng(seed)
    numbers = rng.permutation(np.arange(3, 3 + 2 * articles, 2))
    article, position = [], []
    for number in numbers:
        steps = rng.choice([1, 2, 5], p=[0.8, 0.15, 0.05], size=rng.integers(1, longest + 1)) if gaps else [1] * longest
        article += [number] * len(steps)
        position += list(np.cumsum(steps) + rng.integers(0, 4))
    x = rng.standard_normal((len(article), DIM))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype)
    split = [("train", "val", "ood", "")[i % 4] for i in range(articles)]
    frame = pd.DataFrame({"title": [f"T{n}" for n in numbers], "split": split}, index=pd.Index(numbers, name="article"))
    return V.make_store(f"random{seed}", x, article, position, frame)


def naive_starts(store, split, horizon, context_length):
    """First rows of the windows, by the definition, in plain loops."""
    found = []
    for first in range(len(store.article)):
        if store.articles.loc[store.article[first], "split"] != split:
            continue
        rows = range(first, first + context_length + horizon)
        if rows[-1] < len(store.article) and all(
            store.article[r] == store.article[first] and store.position[r] == store.position[first] + r - first
            for r in rows
        ):
            found.append(first)
    return found


# --- damaged and hostile stores --------------------------------------------------------------------------------------


def reseal(folder):
    """Make the checksums right again, so that the check behind them is what must refuse."""
    sheet = yaml.safe_load((folder / "datasheet.yaml").read_text(encoding="utf-8"))
    files = [name for name in (*V.STORE_FILES[:3], *V.OPTIONAL_FILES) if (folder / name).is_file()]
    sheet["sha256"] = {name: V.sha256_file(folder / name) for name in files}
    (folder / "datasheet.yaml").write_text(yaml.safe_dump(sheet), encoding="utf-8")


def refused(folder, *words):
    with pytest.raises(LVMError) as e:
        V.open_store(folder)
    for word in words:
        assert str(word) in str(e.value), f"{word!r} not in: {e.value}"


def spoil(folder, change, name="vectors.npy"):
    """Save another array under a name, with the right checksum."""
    np.save(folder / name, change(np.load(folder / name)))
    reseal(folder)


def row_set(row, value):
    def change(x):
        x[row] = value
        return x

    return change


def edit_articles(folder, change):
    frame = pd.read_csv(folder / "articles.csv", keep_default_na=False, dtype=str)
    change(frame).to_csv(folder / "articles.csv", index=False)
    reseal(folder)


def with_row(frame, like, **values):
    return pd.concat([frame, frame.iloc[[like]].assign(**values)], ignore_index=True)


def put(frame, row, column, value):
    frame.loc[row, column] = value
    return frame


# --- the remembered check --------------------------------------------------------------------------------------------


def age(folder, seconds=3600):
    """Make the files look as if they had been written an hour ago."""
    for path in folder.iterdir():
        stat = path.stat()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns - int(seconds * 1e9)))


def same(a, b):
    assert a.fingerprint == b.fingerprint and a.name == b.name and a.datasheet == b.datasheet
    assert np.array_equal(a.vectors, b.vectors) and a.articles.equals(b.articles)
    assert np.array_equal(a.article, b.article) and np.array_equal(a.position, b.position)
    assert a.article.dtype == b.article.dtype == np.int32


# --- texts and given windows -----------------------------------------------------------------------------------------


def with_extras(seed=5):
    """A store that kept its texts and came with some of its windows, in an order of their own."""
    store = random_store(seed, gaps=False)
    cut = {s: W.windows(store, s, horizon=1, context_length=3).start[::-2] for s in W.SPLITS}
    split = np.concatenate([np.full(len(start), i) for i, start in enumerate(cut.values())])
    given = W.GivenWindows(split, np.concatenate(list(cut.values())), 1, 3)
    texts = [f"row {i}\nof \u2028 many \u00e9 \U0001f600" for i in range(len(store.vectors))]
    return replace(store, texts=texts, given=given), cut


# --- worlds ----------------------------------------------------------------------------------------------------------


def simulated(measure, name, draws, **arguments):
    """The mean of a measure (a number or an array) over independent samples of a world, and its error."""
    values = np.array([measure(worlds.world(name, seed=10**6 + i, **arguments)) for i in range(draws)], float)
    return values.mean(0), values.std(0, ddof=1) / np.sqrt(draws)
