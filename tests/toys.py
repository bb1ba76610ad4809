"""What several test files need: a small dataset, versions for it, and what is asked of a run's folder."""

import html.parser
import time

import numpy as np
import pandas as pd
import psutil
import safetensors.torch
import torch

import lvmlib as lvm
from lvmlib import config
from lvmlib.data.store import make_store

DIM = 24


def make_data(seed=0, articles=12, length=16):
    """Articles that drift from a topic, so that there is something to learn."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((articles, 1, DIM)) + 0.8 * random.standard_normal((articles, length, DIM))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    split = np.array(["train", "train", "train", "val", "ood"])[np.arange(articles) % 5]
    frame = pd.DataFrame({"title": [f"a{i}" for i in range(articles)], "split": split}, index=range(articles))
    store = make_store(
        "toy",
        x.reshape(-1, DIM).astype(np.float32),
        np.repeat(np.arange(articles), length),
        np.tile(np.arange(length), articles),
        frame,
    )
    return lvm.dataset(store)


def version(name="v22", **top):
    settings = {"model": "amn", "epochs": 3, "precision": "float32", "device": "cpu", "log_every": 2} | top
    return lvm.version(name, settings.pop("overrides", None), **settings)


def weights(folder, name="best.safetensors"):
    return safetensors.torch.load_file(folder / name)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def finish(run):
    rows = list(run)
    assert run.finished and len(rows) == len(run)
    return run


def begin(own, data, folder, epochs=1):
    """Train a run for some epochs and leave it: its folder."""
    rows = iter(lvm.train(own, data, folder))
    for _ in range(epochs):
        next(rows)
    rows.close()
    return folder


def guarded(fall=0.03, escape=0.9, cool=0.5, most=2, lr=0.01, name="v22", **top):
    settings = {"optimizer": {"lr": lr}, "rewind": {"fall": fall, "escape": escape, "cool": cool, "most": most}}
    return version(name, overrides=config.merge(settings, top.pop("overrides", {})), **{"epochs": 9} | top)


def until(condition, sweeping=None, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert sweeping is None or sweeping.poll() is None, sweeping.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # of an orphan, init may be slow to collect it
    except psutil.NoSuchProcess:
        return False


class Tags(html.parser.HTMLParser):
    """The start tags of an HTML page with their attributes, and its texts."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]
