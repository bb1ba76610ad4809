"""What a run measures on the validation windows at the end of an epoch."""

from __future__ import annotations

import math

import torch

from .. import evaluate, losses, models
from ..evaluate import EVALUATION_BATCH, Moments
from ..ranking import Articles
from ..windows import OnDemand, Windows, on_device

SPREAD = ("effective_rank", "rank_share", "variance_share")  # of the predictions, in the table of epochs


class Validation:
    """Measures a model on the validation windows: `evaluate.validate`, `energy_score` and SPREAD."""

    def __init__(self, windows: Windows, vectors: torch.Tensor | OnDemand, energy: bool):
        self.windows, self.vectors, self.energy = windows, vectors, energy
        self.articles = Articles(windows, vectors)
        targets = self._moments()
        for _, target in windows.batches(EVALUATION_BATCH, vectors):
            targets.add(torch.nn.functional.normalize(target, dim=-1))
        self.targets = targets.facts()

    def _moments(self) -> Moments:
        return Moments(self.vectors.shape[1], self.vectors.device)

    def __call__(self, model: models.Predictor) -> dict[str, float]:
        moments = self._moments()
        figures = evaluate.validate(model, self.windows, self.vectors, self.articles, moments)
        figures["val_energy"] = energy_score(model, self.windows, self.vectors) if self.energy else math.nan
        if not math.isfinite(figures["val_cos"]):
            return figures | dict.fromkeys(SPREAD, math.nan)
        ours, theirs = moments.facts(), self.targets
        rank = (ours["effective rank"] - 1) / max(theirs["effective rank"] - 1, 1e-12)
        variance = ours["variance"] / max(theirs["variance"], 1e-12)
        return figures | dict(zip(SPREAD, (ours["effective rank"], rank, variance), strict=True))


@torch.no_grad()
def energy_score(
    model: models.Predictor, windows: Windows, vectors: torch.Tensor | OnDemand | None = None, samples: int = 16
) -> float:
    """Mean energy score over the windows of `samples` samples each, by the same noise at every call."""
    device = models.device_of(model)
    vectors = on_device(windows.store, device) if vectors is None else vectors
    noise, total = torch.Generator(device).manual_seed(0), 0.0
    with evaluate.evaluating(model):
        for context, y in windows.batches(EVALUATION_BATCH, vectors):
            total += float(losses.energy(model.samples(context, samples, noise), y).sum())
    return total / len(windows)
