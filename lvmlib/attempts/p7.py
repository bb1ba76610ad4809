"""P7, the ranker: its encoder, anchored to the context's mean, and its three loss terms.

    L = p7_rank + 0.5·repel + 0.2·p7_teacher        (weights: params/p7.yaml)

Axes: B batch, T context length, D vector dimension, C candidates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import losses, models
from ..losses import Batch, cosine

TEMPERATURE, MARGIN, FLOOR = 0.07, 0.07, 0.20
TEACHER_EPOCHS = 2
SIGNAL, WEAK = 0.03, 0.25  # a window with a weaker forward signal has this weight
ANCHOR = (0.6, 0.9)


class Anchored(models.Predictor):
    """raw = a·q + (1 − a)·normalise(mean context): q is the unit output of a 4-layer encoder at the last position.

    The weight a is learned within 0.6 … 0.9, from 0.8. The encoder sees no positions: the original's are zeros.
    """

    def __init__(self, dim: int, context_length: int):
        super().__init__(dim, context_length)
        width = models.HIDDEN
        self.project = nn.Linear(dim, width)
        layer = nn.TransformerEncoderLayer(width, nhead=8, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=4)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width), nn.Linear(width, dim))
        low, high = ANCHOR
        self.anchor = nn.Parameter(torch.logit(torch.tensor((0.8 - low) / (high - low))))

    def raw(self, context: Tensor) -> Tensor:
        low, high = ANCHOR
        own = F.normalize(self.head(self.encoder(self.project(context))[:, -1]), dim=-1)
        share = low + (high - low) * torch.sigmoid(self.anchor)
        return share * own + (1 - share) * F.normalize(context.mean(1), dim=-1)


def signal_weights(context: Tensor, target: Tensor) -> Tensor:
    """(B,) the weight of each window: 1, or `WEAK` where cos(last, next) − cos(last, previous) < `SIGNAL`."""
    signal = cosine(context[:, -1], target) - cosine(context[:, -1], context[:, -2])
    return torch.where(signal >= SIGNAL, 1.0, WEAK)


def rank(b: Batch) -> Tensor:
    """Mean InfoNCE over the windows, weighted by signal: the target against the previous chunk, the targets of the
    other windows, and chunks of its article."""
    chunks, counts = b.rivals.chunks[:, 1:], b.rivals.counts[:, 1:]  # (B, C, D): without the target
    own = torch.einsum("bd,bcd->bc", b.unit, chunks).masked_fill(~counts, float("-inf"))
    previous = cosine(b.unit, b.context[:, -1])[:, None]
    logits = torch.cat([b.unit @ F.normalize(b.target, dim=-1).T, previous, own], 1) / TEMPERATURE
    each = F.cross_entropy(logits, torch.arange(len(logits), device=logits.device), reduction="none")
    return (signal_weights(b.context, b.target) * each).mean()


def repelled(b: Batch) -> Tensor:
    """(B,) relu(0.07 − cos(p, y) + cos(p, last context vector))."""
    return F.relu(MARGIN - cosine(b.unit, b.target) + cosine(b.unit, b.context[:, -1]))


def teacher(b: Batch) -> Tensor:
    """In the first epochs, mean 1 − cos(p, mean context) over the windows where that cosine is below the floor."""
    if b.epoch > TEACHER_EPOCHS:
        return b.unit.new_zeros(())
    near = cosine(b.unit, b.context.mean(1))
    below = near < FLOOR
    return ((1 - near) * below).sum() / below.sum().clamp(min=1)


models.ARCHITECTURES["p7"] = Anchored
losses.register("p7_rank", rank, needs="rivals")
losses.register("p7_repel", lambda b: (signal_weights(b.context, b.target) * repelled(b)).mean())
losses.register("p7_teacher", teacher)
