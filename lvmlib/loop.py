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
import torch.nn.functional as F
from torch import Tensor

from . import controller, losses, models
from .config import Corruption, Version
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
        model = models.build(version.model, dim, version.context_length, version.copied_layers).to(device)
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
    """Trains each batch in one process; `runs.team.Processes` overrides this to share it among several."""

    rank, size = 0, 1

    def seed(self, seed: int, epoch: int) -> None:
        """Begin this process's own random stream, of dropout and samples."""

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
    """The version, the training windows, and the store's vectors on the model's device (`windows.on_device`)."""

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
    """The figures of one step."""

    windows: int
    values: dict[str, float]  # terms, watched figures, angle, pull_<term>, loss
    shares: dict[str, float]  # λ, ρ and what depends on them: meaningful where the directional term `acts`
    decision: controller.Decision
    acts: bool
    gradient_norm: Tensor
    learning_rate: float


class StepBroke(ArithmeticError):
    """A loss, gradient or weight is not finite: in the step of `result`, or in the one `before`.

    `weights`: names of the parameters that are not finite. `runs.alarms` writes the message.
    """

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

    `control`: the version's, with the ceiling of λ after rewinds; `now`: the schedule's values in this epoch;
    `lowered`: the model's copy for bfloat16. If the loss is not finite, the weights stay as they are.
    """
    v = task.version
    batch = predict(state, task, index, lowered.model if lowered else state.model, now)
    terms = losses.terms(batch)
    gradients = losses.gradients(terms, batch)
    watched = losses.health(batch.unit, batch.target, batch.context, v.losses.directional.prev)
    watched["angle"] = losses.angle(gradients, batch.raw)
    norms = losses.gradient_norms(gradients, batch.raw)  # ‖∂L_term/∂raw‖, unweighted
    # One transfer from the device for all figures of the step.
    numbers = torch.stack([*terms.values(), *watched.values(), *norms.values()]).detach().tolist()
    values = dict(zip([*terms, *watched], numbers, strict=False))
    norms = dict(zip(norms, numbers[len(values) :], strict=True))

    measured = (values[name] for name in ("mse", "directional", "pos", "neg"))
    both = v.losses.mean_square * norms["mse"], norms["directional"]
    decision = controller.decide(control, now, *measured, state.memory, both)
    state.memory = decision.state

    weights = losses.weights(v.losses, decision.lambda_eff)
    values["loss"] = loss = sum(weight * values[name] for name, weight in weights.items())
    state.optimizer.zero_grad(set_to_none=True)
    losses.backward(terms, weights, batch, gradients)
    if lowered:
        lowered.hand_over()
    task.team.add_gradients(state.model)
    norm = clip(state.model, v.optimizer.clip_norm)
    rate = state.optimizer.param_groups[0]["lr"]
    if math.isfinite(loss):
        state.optimizer.step()
        if lowered:
            lowered.renew()

    # The pull of a term is its weight times its gradient's norm: 0 for a term of weight 0, even where the norm is NaN.
    pulls = {name: weights[name] * norms[name] if name in weights else 0.0 for name in terms}
    values |= {f"pull_{name}": pull for name, pull in pulls.items()}
    no_share = decision.lambda_eff and not v.losses.mean_square  # there is no mean-square gradient to be a share of
    shares = {
        "lambda_eff": decision.lambda_eff,
        "rho": decision.rho,
        "at_lambda_min": controller.at_bound(decision, control.lambda_min),
        "at_lambda_max": controller.at_bound(decision, control.lambda_max),
        "rho_gradient": math.nan if no_share else pulls["directional"] / max(pulls["mse"], controller.TINY),
    }
    acts = v.control.rule != "none" and not decision.skip
    return StepResult(len(index), values, shares, decision, acts, norm, rate)


def predict(
    state: TrainState, task: Task, index: np.ndarray, model: models.Predictor, now: controller.Phase
) -> losses.Batch:
    """The windows `index` (B,), their predictions, and what the version's loss terms need besides."""
    v, needed = task.version, losses.needed(task.version.losses)
    context, target = task.windows.batch(index, task.vectors)  # (B, T, D), (B, D)
    shown = corrupted(context, v.corruption) if v.corruption.share else context
    with torch.autocast(context.device.type, torch.bfloat16, enabled=task.precision == "bfloat16"):
        raw, unit, ranker = task.team.heads(model, shown)
        samples = task.team.samples(model, shown, v.losses.energy.samples) if "samples" in needed else None
    rivals = draw_rivals(state, task, index, ranker) if "rivals" in needed else None
    margin, number = now.margin if v.control.rule != "none" else 0.0, state.epoch + 1
    return losses.Batch(raw, unit, context, target, v.losses, margin, v.control.constraint, rivals, samples, number)


def corrupted(context: Tensor, settings: Corruption) -> Tensor:
    """`context` (B, T, D) whose last vector is, in a share of the windows, the one before it, or jittered."""
    last, draws = context[:, -1], torch.rand(2, len(context), 1, device=context.device)
    jittered = F.normalize(last + settings.jitter * torch.randn_like(last), dim=-1)
    replaced = torch.where(draws[1] < settings.swap, context[:, -2], jittered)
    return torch.cat([context[:, :-1], torch.where(draws[0] < settings.share, replaced, last)[:, None]], 1)


def draw_rivals(state: TrainState, task: Task, index: np.ndarray, ranker: Tensor) -> losses.Rivals:
    """The target of each window `index` (B,) among chunks of its article, and of other articles if `elsewhere`."""
    articles, settings, device = task.articles, task.version.losses.listwise, ranker.device
    draw = torch.rand(len(index), articles.longest).numpy()
    rows, counts = articles.rivals(index, settings.candidates, draw)
    if settings.elsewhere:
        others, other_article = articles.strangers(index, settings.elsewhere)
        rows = np.concatenate([rows, np.broadcast_to(others, other_article.shape)], 1)
        counts = np.concatenate([counts, other_article], 1)
    chunks = F.normalize(task.vectors[torch.from_numpy(rows).to(device)].float(), dim=-1)
    return losses.Rivals(ranker, chunks, torch.from_numpy(counts).to(device), state.log_scale.exp())


def epoch(state: TrainState, task: Task) -> tuple[dict[str, float], list[dict]]:
    """Train one pass over the windows, in an order of the version's seed and the epoch's number.

    Returns the means over the epoch's windows (`shares`: over those where the directional term acted), and rows of
    steps.csv: the run's first step, every `log_every` steps, its last. Raises StepBroke if a figure is not finite.
    """
    v, number = task.version, state.epoch + 1
    control = controller.cooled(v.control, v.rewind.cool if v.rewind else 1.0, state.rewinds)
    now = controller.phase(v.schedule, number)
    # The rules `fraction` and `rho_cap` have a fraction in place of ρ_target.
    aims = {"rho_target": now.fraction if math.isnan(now.rho_target) else now.rho_target, "rho_cap": now.rho_cap}
    meter, rows, skips, before = Meter(), [], 0, None
    done = (number - 1) * task.batches  # steps of the epochs before
    first_rate = learning_rate(state, task, done)
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
            result, count = step(state, task, index, control, now, lowered), done + i + 1
            if not math.isfinite(result.values["loss"]):
                raise StepBroke(number, count, result, before, state.model)
            before = result
            meter.add(result.values, result.windows)
            meter.add(result.shares, result.windows * result.acts)
            skips += result.decision.skip
            if count == 1 or count % v.log_every == 0 or count == task.batches * v.epochs:
                more = {"epoch": number, "step": count, "margin_target": now.margin, "gate": result.decision.gate}
                more |= {"skip": int(result.decision.skip), "gradient_norm": float(result.gradient_norm)}
                rows.append({**result.values, **result.shares, **aims, **more})
    if not math.isfinite(before.gradient_norm) or not_finite(state.model):
        raise StepBroke(number, done + task.batches, before, None, state.model)
    means = meter.means()
    return {**means, "train_loss": means["loss"], "skips": skips, **aims, "learning_rate": first_rate}, rows


def learning_rate(state: TrainState, task: Task, step: int) -> float:
    """The learning rate of the run's `step`, which counts from 0."""
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
    """Make torch's random streams depend on (seed, epoch) alone, and restore those of CPU and CUDA at the end."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1))
        yield


class Lowered:
    """A copy of a model for steps in bfloat16: its matrices are cast once a step, all other weights are shared.

    The numbers are those of autocast, which casts each weight whenever it is used.
    """

    def __init__(self, model: models.Predictor):
        self.model = copy.deepcopy(model)
        self.pairs: list[tuple[torch.nn.Parameter, torch.nn.Parameter, torch.Tensor]] = []
        for copied, module in zip(self.model.modules(), model.modules(), strict=True):
            for name, full in module.named_parameters(recurse=False):
                weight = full
                if full.ndim == 2 and isinstance(module, torch.nn.Linear | torch.nn.MultiheadAttention):
                    weight = torch.nn.Parameter(full.detach().bfloat16())
                    self.pairs.append((full, weight, torch.empty_like(full)))
                setattr(copied, name, weight)

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
    """Scale the model's gradient down to norm `most`, and return its norm before that.

    On a CPU a smaller gradient is left alone; `clip_grad_norm_` would multiply it by 1.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if norm.device.type != "cpu" or not norm <= most:  # NaN, too
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), most, norm)
    return norm


def not_finite(model: torch.nn.Module) -> list[str]:
    """The names of the parameters with a value that is not finite."""
    return [name for name, w in model.named_parameters() if not bool(torch.isfinite(w).all())]
