"""One training step, one epoch, and the state that a run saves and loads.

    state = start(version, dim, device)     # TrainState: all that training changes
    task = Task(version, windows, vectors)  # what it trains by and on
    means, rows = epoch(state, task)        # one pass over the windows: a `step` for each batch

Axes: B batch, T context length, D vector dimension, S samples.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import controller, losses, models
from .config import Version
from .controller import Control
from .ranking import Articles
from .windows import OnDemand, Windows


@dataclass
class TrainState:
    """All that training changes, and that `runs.checkpoint` saves and loads."""

    model: models.Predictor
    optimizer: torch.optim.AdamW
    plateau: torch.optim.lr_scheduler.ReduceLROnPlateau
    log_scale: torch.nn.Parameter  # −ln temperature of the listwise loss, learned
    memory: controller.State = controller.START
    best: float = math.inf  # score of the best epoch so far; lower is better
    short: float = math.inf  # by how much that epoch misses the constraint
    rewinds: int = 0
    peak: float = -math.inf  # novel MRR of the epoch that a rewind returns to
    stopped: str = ""  # why the run ended before its last epoch
    history: list[dict] = field(default_factory=list)  # rows of epochs.csv
    steps: list[dict] = field(default_factory=list)  # rows of steps.csv

    @property
    def epoch(self) -> int:
        """The epochs that are finished."""
        return len(self.history)

    def learned(self) -> dict:
        """What a rewind restores: weights, optimizer, schedule, temperature, controller."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "plateau")}
        return {**parts, "scale": self.log_scale.detach(), "controller": list(self.memory)}

    def load_learned(self, saved: Mapping) -> None:
        for name in ("model", "optimizer", "plateau"):
            getattr(self, name).load_state_dict(saved[name])
        self.log_scale.data.copy_(saved["scale"])
        self.memory = controller.State(*map(float, saved["controller"]))


def start(version: Version, dim: int, device: torch.device) -> TrainState:
    """The state before the first step: weights by the version's seed, AdamW, ReduceLROnPlateau."""
    o, listwise = version.optimizer, version.losses.listwise
    with seeded(version.seed, 0):
        model = models.build(version.model, dim, version.context_length).to(device)
    log_scale = torch.nn.Parameter(torch.tensor(-math.log(listwise.temperature), device=device))
    groups: list[dict] = [{"params": list(model.parameters())}]
    if o.decay == "matrices":
        matrices, others = ([p for p in model.parameters() if (p.ndim > 1) == many] for many in (True, False))
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    if listwise.weight:
        groups.append({"params": [log_scale], "weight_decay": 0.0})
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(groups, lr=o.lr, weight_decay=o.weight_decay, fused=fused)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=o.plateau_factor, patience=o.plateau_patience
    )
    return TrainState(model, optimizer, plateau, log_scale)


class OneProcess:
    """The processes that share each batch: this one alone. `runs.team` has several."""

    rank, size = 0, 1

    def seed(self, seed: int, epoch: int) -> None:
        """Begin this process's own random stream, for dropout and samples; all else draws from the common one."""

    def heads(self, model: models.Predictor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`model.heads` of the whole batch's `context` (B, T, D)."""
        return model.heads(context)

    def samples(self, model: models.Predictor, context: Tensor, count: int) -> Tensor:
        """`model.samples` of the whole batch, (S, B, D)."""
        return model.samples(context, count)

    def add_gradients(self, model: models.Predictor) -> None:
        """After backward: add up the gradients of all processes, in each."""


@dataclass(frozen=True, eq=False)
class Task:
    """What a run trains by and on. `vectors`: of the store, on the model's device (`windows.on_device`)."""

    version: Version
    windows: Windows
    vectors: Tensor | OnDemand
    precision: str = "float32"
    team: OneProcess = field(default_factory=OneProcess)
    articles: Articles | None = None  # for the listwise loss

    @property
    def batches(self) -> int:
        """Steps of an epoch."""
        return math.ceil(len(self.windows) / self.version.batch_size)


class StepResult(NamedTuple):
    """What a step gave. `values`: the terms, the watched figures, the weighted pulls, the loss; `shares`: figures of
    the control, which have a meaning only where the directional term `acts`."""

    windows: int
    values: dict[str, float]
    shares: dict[str, float]
    decision: controller.Decision
    acts: bool
    gradient_norm: Tensor
    learning_rate: float


class StepBroke(ArithmeticError):
    """A loss, gradient or weight is not finite. `result`: of the step where it was seen; `before`: of the step before
    it; `weights`: names of the parameters that are not finite. `runs.alarms` puts it into words."""

    def __init__(self, epoch: int, step: int, result: StepResult, before: StepResult | None, model: torch.nn.Module):
        super().__init__(f"not finite at epoch {epoch}, step {step}")
        self.epoch, self.step, self.result, self.before = epoch, step, result, before
        self.weights = not_finite(model)


def step(
    state: TrainState,
    task: Task,
    index: np.ndarray,
    control: Control,
    now: controller.Phase,
    lowered: Lowered | None = None,
) -> StepResult:
    """Train on the windows `index` (B,): predict, compute the loss terms, decide λ, update the weights.

    `control`: the version's, cooled; `now`: the schedule's values. `lowered`: the model's copy for bfloat16. If the
    loss is not finite, the weights stay as they are.
    """
    v = task.version
    batch = predict(state, task, index, lowered.model if lowered else state.model, now)
    terms = losses.terms(batch)
    gradients = losses.gradients(terms, batch)
    watched = losses.health(batch.unit, batch.target, batch.context, v.losses.directional.prev)
    figures = {**terms, **watched, **losses.pulls(gradients, batch.raw)}
    # One transfer a step from the device, for all that the controller and the log need.
    values = dict(zip(figures, torch.stack(list(figures.values())).detach().tolist(), strict=True))
    decision = controller.decide(
        control,
        now,
        *(values[name] for name in ("mse", "directional", "pos", "neg")),
        state.memory,
        (v.losses.mean_square * values["pull_mse"], values["pull_directional"]),
    )
    state.memory = decision.state
    weights = losses.weights(v.losses, decision.lambda_eff)
    state.optimizer.zero_grad(set_to_none=True)
    losses.backward(terms, weights, batch, gradients)
    if lowered:
        lowered.hand_over()
    task.team.add_gradients(state.model)
    norm = clip(state.model, v.optimizer.clip_norm)
    loss = sum(weight * values[name] for name, weight in weights.items())
    rate = state.optimizer.param_groups[0]["lr"]
    if math.isfinite(loss):
        state.optimizer.step()
        if lowered:
            lowered.renew()
    # A pull is logged weighted, as it acts; a term of weight 0 pulls at nothing, whatever its gradient.
    values |= {f"pull_{n}": weights[n] * values[f"pull_{n}"] if n in weights else 0.0 for n in terms} | {"loss": loss}
    shares = {
        "lambda_eff": decision.lambda_eff,
        "rho": decision.rho,
        "at_lambda_min": controller.at_bound(decision, control.lambda_min),
        "at_lambda_max": controller.at_bound(decision, control.lambda_max),
        "rho_gradient": values["pull_directional"] / max(values["pull_mse"], controller.TINY),
    }
    if not v.losses.mean_square and decision.lambda_eff:
        shares["rho_gradient"] = math.nan  # a share of nothing
    acts = v.control.rule != "none" and not decision.skip
    return StepResult(len(index), values, shares, decision, acts, norm, rate)


def predict(
    state: TrainState, task: Task, index: np.ndarray, model: models.Predictor, now: controller.Phase
) -> losses.Batch:
    """The windows `index` (B,), their predictions, and what the version's loss terms need besides."""
    v, device = task.version, state.log_scale.device
    context, target = task.windows.batch(index, task.vectors)  # (B, T, D), (B, D)
    with torch.autocast(device.type, torch.bfloat16, enabled=task.precision == "bfloat16"):
        raw, unit, ranker = task.team.heads(model, context)
        samples = task.team.samples(model, context, v.losses.energy.samples) if v.losses.energy.weight else None
    rivals = None
    if v.losses.listwise.weight:
        articles, listwise = task.articles, v.losses.listwise
        draw = torch.rand(len(index), articles.longest).numpy()
        rows, there = articles.rivals(index, listwise.candidates, draw)
        if listwise.elsewhere:
            others, apart = articles.strangers(index, listwise.elsewhere)
            rows = np.concatenate([rows, np.broadcast_to(others, apart.shape)], 1)
            there = np.concatenate([there, apart], 1)
        chunks = torch.nn.functional.normalize(task.vectors[torch.from_numpy(rows).to(device)].float(), dim=-1)
        rivals = ranker, chunks, torch.from_numpy(there).to(device), state.log_scale.exp()
    margin = now.margin if v.control.rule != "none" else 0.0
    return losses.Batch(raw, unit, context, target, v.losses, margin, v.control.constraint, rivals, samples)


def epoch(state: TrainState, task: Task) -> tuple[dict[str, float], list[dict]]:
    """Train one pass over the windows, in an order of the version's seed and the epoch's number.

    Returns means over the epoch's windows (λ and both ρ: over the windows where the directional term acted), and a row
    for the first step, every `log_every` steps and the run's last. Raises StepBroke where a figure is not finite.
    """
    v, number = task.version, state.epoch + 1
    control = controller.cooled(v.control, v.rewind.cool if v.rewind else 1.0, state.rewinds)
    now = controller.phase(v.schedule, number)
    # What λ aims at: ρ_target, or for the older rules the fraction.
    aims = {"rho_target": now.fraction if math.isnan(now.rho_target) else now.rho_target, "rho_cap": now.rho_cap}
    done, meter, rows, skips, before = (number - 1) * task.batches, Meter(), [], 0, None
    begins_at = learning_rate(state, task, done)
    with seeded(v.seed, number):
        task.team.seed(v.seed, number)
        order = torch.randperm(len(task.windows)).numpy()
        lowered = Lowered(state.model) if task.precision == "bfloat16" else None
        (lowered.model if lowered else state.model).train()
        for i in range(task.batches):
            if v.optimizer.schedule == "cosine":
                for group in state.optimizer.param_groups:
                    group["lr"] = learning_rate(state, task, done + i)
            index = order[i * v.batch_size : (i + 1) * v.batch_size]
            result, at = step(state, task, index, control, now, lowered), done + i + 1
            if not math.isfinite(result.values["loss"]):
                raise StepBroke(number, at, result, before, state.model)
            before = result
            meter.add(result.values, result.windows)
            meter.add(result.shares, result.windows * result.acts)
            skips += result.decision.skip
            if at == 1 or at % v.log_every == 0 or at == task.batches * v.epochs:
                more = {"epoch": number, "step": at, "margin_target": now.margin, "gate": result.decision.gate}
                more |= {"skip": int(result.decision.skip), "gradient_norm": float(result.gradient_norm)}
                rows.append({**result.values, **result.shares, **aims, **more})
    if not math.isfinite(before.gradient_norm) or not_finite(state.model):
        raise StepBroke(number, done + task.batches, before, None, state.model)
    means = meter.means()
    return {**means, "train_loss": means["loss"], "skips": skips, **aims, "learning_rate": begins_at}, rows


def learning_rate(state: TrainState, task: Task, step: int) -> float:
    """The learning rate of a step of the run, from 0 on; a cosine depends on the step and the rewinds alone."""
    v = task.version
    if v.optimizer.schedule != "cosine":
        return state.optimizer.param_groups[0]["lr"]
    highest = v.optimizer.lr * (v.rewind.cool if v.rewind else 1.0) ** state.rewinds
    return highest * (1 + math.cos(math.pi * step / (task.batches * v.epochs))) / 2


class Meter:
    """Weighted means of named figures."""

    def __init__(self):
        self.sums: dict[str, float] = {}
        self.weights: dict[str, int] = {}

    def add(self, figures: Mapping[str, float], weight: int) -> None:
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * weight
            self.weights[name] = self.weights.get(name, 0) + weight

    def means(self) -> dict[str, float]:
        return {name: total / max(self.weights[name], 1) for name, total in self.sums.items()}


@contextlib.contextmanager
def seeded(seed: int, epoch: int):
    """Inside, torch's random streams depend on (seed, epoch) alone; outside, those of CPU and CUDA are unchanged."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1))
        yield


class Lowered:
    """A model's copy for steps in bfloat16: `model` has the weights of the products in bfloat16 and shares all others.

    The numbers are those of autocast, which casts at each use, into new memory; here it is once a step.
    """

    def __init__(self, model: models.Predictor):
        self.model = copy.deepcopy(model)
        self.pairs: list[tuple[torch.nn.Parameter, torch.nn.Parameter, torch.Tensor]] = []
        for ours, theirs in zip(self.model.modules(), model.modules(), strict=True):
            for name, full in theirs.named_parameters(recurse=False):
                if full.ndim == 2 and isinstance(theirs, torch.nn.Linear | torch.nn.MultiheadAttention):
                    half = torch.nn.Parameter(full.detach().bfloat16())
                    self.pairs.append((full, half, torch.empty_like(full)))
                setattr(ours, name, half if self.pairs and self.pairs[-1][0] is full else full)

    def hand_over(self) -> None:
        """Give the gradients to the model itself, in float32."""
        for full, half, gradient in self.pairs:
            full.grad, half.grad = None if half.grad is None else gradient.copy_(half.grad), None

    @torch.no_grad()
    def renew(self) -> None:
        """Take over the weights of the model itself."""
        for full, half, _ in self.pairs:
            half.copy_(full)


def clip(model: torch.nn.Module, most: float) -> Tensor:
    """Scale the model's gradient down to norm `most` where it is larger, and return its norm before that; as
    `clip_grad_norm_`, without a multiplication by 1."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if norm.device.type != "cpu" or not norm <= most:  # also where it is NaN
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), most, norm)
    return norm


def not_finite(model: torch.nn.Module) -> list[str]:
    """The names of the parameters with a value that is not finite."""
    return [name for name, w in model.named_parameters() if not bool(torch.isfinite(w).all())]
