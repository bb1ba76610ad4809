"""P8, the constrained mixture: a prediction within the span of the context, and its loss terms.

    L = p8_rank + p8_repel        (weights: params/p8.yaml)

Axes: B batch, T context length, D vector dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import losses, models
from ..losses import Batch, cosine
from .p7 import TEMPERATURE, repelled

RANDOM = 30  # targets of other windows among the candidates


class Mixture(models.Predictor):
    """raw = Σ_t α_t·context_t, α the softmax of what a 4-layer pre-norm encoder says at the last position."""

    def __init__(self, dim: int, context_length: int):
        super().__init__(dim, context_length)
        width = models.HIDDEN
        self.project = nn.Linear(dim, width)
        self.positions = nn.Parameter(torch.randn(context_length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, nhead=8, dim_feedforward=4 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers=4, enable_nested_tensor=False)
        self.head = nn.Sequential(
            nn.Linear(width, width // 2), nn.GELU(), nn.Dropout(0.1), nn.Linear(width // 2, context_length)
        )

    def raw(self, context: Tensor) -> Tensor:
        last = self.encoder(self.project(context) + self.positions)[:, -1]
        return torch.einsum("bt,btd->bd", self.head(last).softmax(-1).to(context.dtype), context)


def rank(b: Batch) -> Tensor:
    """Cross-entropy of the target among itself, the previous chunk, and 30 targets of other windows of the batch."""
    count = len(b.target)
    own = torch.arange(count)[:, None]
    drawn = (own + 1 + torch.randint(max(count - 1, 1), (count, RANDOM))) % count
    chunks = F.normalize(b.target, dim=-1)[drawn.to(b.target.device)]  # (B, 30, D)
    others = torch.einsum("bd,bcd->bc", b.unit, chunks)
    others = others.masked_fill((drawn == own).to(others.device), float("-inf"))  # of a single window there are none
    near = torch.stack([cosine(b.unit, b.target), cosine(b.unit, b.context[:, -1])], 1)
    logits = torch.cat([near, others], 1) / TEMPERATURE
    return F.cross_entropy(logits, torch.zeros(count, dtype=torch.long, device=logits.device))


models.ARCHITECTURES["p8"] = Mixture
losses.register("p8_rank", rank)
losses.register("p8_repel", lambda b: repelled(b).mean())
