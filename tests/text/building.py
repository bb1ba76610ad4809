"""What the tests of `build` share: an encoder in no time, builds that stop or run in a child, and their files."""

import os
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch

from lvmlib.text import build as E
from lvmlib.text import encoders as N

SHARD = 24
CHUNKS = 240  # of the fixture `folder`


class Hashed:
    """Stands for a SentenceTransformer: the vector of a text comes from its hash, in no time."""

    tokenizer, max_seq_length = None, 64

    def __init__(self, dim=16):
        self.dim, self.seen = dim, []

    def encode(self, texts, **options):
        self.seen += texts
        seeds = [int.from_bytes(blake2b(t.encode(), digest_size=8).digest()) for t in texts]
        made = np.stack([np.random.default_rng(s).standard_normal(self.dim, dtype=np.float32) for s in seeds])
        return made / np.linalg.norm(made, axis=1, keepdims=True)


def use(patch, model, revision="revision 1"):
    patch.setattr(N, "find", lambda name: (name.partition("@")[0], Path("nowhere"), revision))
    patch.setattr(N, "encoder", lambda n, d, p: N.Encoder(n, revision, model, torch.device("cpu"), p))
    return model


def stop(*_, **__):
    raise KeyboardInterrupt


def make(source, out, **options):
    return E.build(str(source), out, **{"shard": SHARD, "progress": False, "precision": "float32", **options})


def stopped(source, out, **options):
    """A build that is stopped when all shards are there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(E, "_assemble", stop)
        with pytest.raises(KeyboardInterrupt):
            make(source, out, **options)


def content(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "checked.json"}


def files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in ("lock", "checked.json")}


def in_child(run):
    """`run` in a forked child; gives its number."""
    pid = os.fork()
    if pid == 0:
        try:
            run()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return pid
