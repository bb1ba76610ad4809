"""Validation: loss, cosine, mini-5CAT, novel MRR, and the moments of the predictions."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from . import losses, models
from .ranking import Articles, among_context
from .windows import Windows, on_device

EVALUATION_BATCH = 512
COLLAPSED = 0.1  # our bound: the predictions have collapsed if their variance is below this share of the targets'


@contextlib.contextmanager
def evaluating(model: models.Predictor):
    """The model in eval mode, and then in the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def validate(
    model: models.Predictor,
    windows: Windows,
    vectors: torch.Tensor | None = None,
    articles: Articles | None = None,
    moments: Moments | None = None,
) -> dict[str, float]:
    """Validation loss (L_mse of raw, and of unit), cosine, the mini-5CAT of handbook §4, novel MRR, in float32.

    margin = mean [cos(p, y) − cos(p, context[-1])]; recall_at_5 = share of windows whose target is among the five best
    of {context vectors, target}, by the ranking head (chance 5/6 at T = 5). Adds the unit predictions to `moments`.
    """
    vectors = on_device(windows.store, models.device_of(model)) if vectors is None else vectors
    articles = Articles(windows, vectors) if articles is None else articles
    sums = torch.zeros(6, dtype=torch.float64)
    with evaluating(model):
        for index in windows.indices(EVALUATION_BATCH):
            context, y = windows.batch(index, vectors)
            raw, unit, ranker = model.heads(context)
            if moments is not None:
                moments.add(unit)
            to_target = losses.cosine(unit, y)
            figures = (
                (raw - y).square().mean(-1),
                (unit - y).square().mean(-1),
                to_target,
                to_target - losses.cosine(unit, context[:, -1]),
                among_context(ranker, context, y) <= 5,
                1 / articles.ranks(ranker[None], index)[1][0],
            )
            sums += torch.stack([figure.sum() for figure in figures]).cpu().double()
    names = ("val_loss", "val_unit_loss", "val_cos", "margin", "recall_at_5", "novel_mrr")
    return dict(zip(names, (sums / len(windows)).tolist(), strict=True))


class Moments:
    """Running first and second moment of unit vectors (N, D), in float64."""

    def __init__(self, dim: int, device: torch.device):
        device = torch.device("cpu") if device.type == "mps" else device  # Apple's devices have no float64
        self.count = 0
        self.first, self.second = (torch.zeros(n, dtype=torch.float64, device=device) for n in (dim, (dim, dim)))

    def add(self, x: Tensor) -> None:
        x = x.to(self.first.device).double()  # or the rounding of equal predictions would have a rank of its own
        self.count += len(x)
        self.first += x.sum(0)
        self.second += x.T @ x

    def facts(self) -> dict[str, float]:
        mean, second = (x.cpu() / self.count for x in (self.first, self.second))
        spread = torch.linalg.eigvalsh(second - torch.outer(mean, mean)).clamp(min=0)
        share = spread / spread.sum().clamp(min=1e-12)
        rank = float(torch.exp(-(share * share.clamp(min=1e-30).log()).sum())) if spread.sum() > 1e-9 else 1.0
        return {"effective rank": rank, "variance": max(0.0, float(1 - mean.square().sum()))}
