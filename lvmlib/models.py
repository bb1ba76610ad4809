"""The four architectures of handbook §2, and ours, behind one call.

    raw, unit = model(context)      # context (B, T, D) → raw (B, D), unit = raw / ‖raw‖

Axes: B batch, T context length, D vector dimension (of the data), H hidden width, S samples.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import LVMError

HIDDEN = 512


class Predictor(nn.Module):
    """What all predictors share. A subclass defines `raw(context)`, (B, T, D) → (B, D)."""

    def __init__(self, dim: int, context_length: int):
        super().__init__()
        self.dim, self.context_length = dim, context_length

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        if context.ndim != 3 or context.shape[1:] != (self.context_length, self.dim):
            shape = tuple(context.shape)
            raise LVMError(f"context has shape {shape}; needed is (batch, {self.context_length}, {self.dim})")
        raw = self.raw(context)  # (B, D)
        raw = raw.float() if raw.dtype in (torch.bfloat16, torch.float16) else raw  # losses need float32 under autocast
        return raw, F.normalize(raw, dim=-1)

    def heads(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return raw, unit, and the unit vector (B, D) that ranks chunks, here the same one."""
        raw, unit = self(context)
        return raw, unit, unit

    def raw(self, context: Tensor) -> Tensor:
        raise NotImplementedError


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's tensors; the CPU if it has none."""
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def sinusoidal_positions(length: int, width: int) -> Tensor:
    """Return (length, width) sines and cosines of falling frequency (Vaswani et al. 2017, §3.5)."""
    position = torch.arange(length)[:, None]
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    table = torch.zeros(length, width)
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency)
    return table


class Transformer(Predictor):
    """Four decoder layers whose target and memory are both the context; the head reads the last position."""

    def __init__(self, dim: int, context_length: int):
        super().__init__(dim, context_length)
        self.project = nn.Linear(dim, HIDDEN)
        self.register_buffer("positions", sinusoidal_positions(context_length, HIDDEN), persistent=False)
        self.register_buffer("causal", nn.Transformer.generate_square_subsequent_mask(context_length), persistent=False)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(HIDDEN, nhead=8, dim_feedforward=2048, dropout=0.1, batch_first=True)
            for _ in range(4)
        )
        self.head = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, dim))

    def raw(self, context: Tensor) -> Tensor:
        memory = x = self.project(context) + self.positions  # (B, T, H)
        for layer in self.layers[:-1]:
            x = self._decoded(layer, x, x, memory)
        # The head reads the last position only, so the last layer skips the others.
        return self.head(self._decoded(self.layers[-1], x[:, -1:], x, memory)[:, 0])

    def _decoded(self, layer: nn.TransformerDecoderLayer, query: Tensor, x: Tensor, memory: Tensor) -> Tensor:
        """Return `layer(x, memory, …)[:, -Q:]`, (B, Q, H), at `query`, the last Q positions of `x` (B, T, H)."""
        own = self._attended(layer.self_attn, query, x)
        query = layer.norm1(query + dropout(own, layer.dropout1.p, self.training))
        crossed = self._attended(layer.multihead_attn, query, memory)
        query = layer.norm2(query + dropout(crossed, layer.dropout2.p, self.training))
        hidden = dropout(F.relu(layer.linear1(query)), layer.dropout.p, self.training)
        return layer.norm3(query + dropout(layer.linear2(hidden), layer.dropout3.p, self.training))

    def _attended(self, attention: nn.MultiheadAttention, query: Tensor, x: Tensor) -> Tensor:
        """Return (B, Q, H) causal attention of the last Q positions `query` to `x` (B, T, H), by plain products.

        At T = 5 they are faster than torch's fused kernel.
        """
        weight, bias, width = attention.in_proj_weight, attention.in_proj_bias, query.shape[-1]
        if query is x:
            q, k, v = F.linear(x, weight, bias).chunk(3, -1)
        else:
            (w_q, w_x), (b_q, b_x) = (p.split([width, 2 * width]) for p in (weight, bias))
            q, (k, v) = F.linear(query, w_q, b_q), F.linear(x, w_x, b_x).chunk(2, -1)
        q, k, v = (h.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for h in (q, k, v))  # (B, heads, Q|T, ·)
        scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1]) + self.causal[-q.shape[2] :]
        weights = dropout(scores.softmax(-1), attention.dropout, self.training)
        return attention.out_proj((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Return `x` with each element 0 with probability `p` and the others divided by 1 − p; `x` itself in evaluation.

    On a CPU it draws 16 bits an element, and p is rounded to 2⁻¹⁶: torch's own draw takes a tenth of a step.
    """
    if not training or p == 0 or x.device.type != "cpu":
        return F.dropout(x, p, training)
    below = round(p * 2**16)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    mask = bits[: x.numel()].view(x.shape) >= below - 2**15
    return x * (mask.to(x.dtype) * (2**16 / (2**16 - below)))


class GRU(Predictor):
    """Four GRU layers, each with a residual and a LayerNorm; the head reads the last step."""

    def __init__(self, dim: int, context_length: int):
        super().__init__(dim, context_length)
        self.project = nn.Linear(dim, HIDDEN)
        self.layers = nn.ModuleList(nn.GRU(HIDDEN, HIDDEN, batch_first=True) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(4))
        self.head = nn.Linear(HIDDEN, dim)

    def raw(self, context: Tensor) -> Tensor:
        x = self.project(context)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(x + layer(x)[0])  # (B, T, H)
        return self.head(x[:, -1])


class LSTM(Predictor):
    """A two-layer LSTM; the head reads the last step."""

    def __init__(self, dim: int, context_length: int):
        super().__init__(dim, context_length)
        self.lstm = nn.LSTM(dim, HIDDEN, num_layers=2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(HIDDEN, dim)

    def raw(self, context: Tensor) -> Tensor:
        return self.head(self.lstm(context)[0][:, -1])


class AMN(Predictor):
    """Attention mixture network: the context's mean, corrected by it and by an attention mixture of the context."""

    def __init__(self, dim: int, context_length: int):
        super().__init__(dim, context_length)
        self.query, self.key = nn.Linear(dim, 256), nn.Linear(dim, 256)
        self.residual = nn.Sequential(
            nn.Linear(2 * dim, 512),
            nn.GELU(),
            nn.LayerNorm(512),
            nn.Linear(512, 256),
            nn.GELU(),
            nn.LayerNorm(256),
            nn.Linear(256, dim),
        )

    def raw(self, context: Tensor) -> Tensor:
        baseline = context.mean(1)  # (B, D)
        # The mixture is one of the context vectors themselves: no value map, one head.
        mixed = F.scaled_dot_product_attention(self.query(baseline)[:, None], self.key(context), context)[:, 0]
        return baseline + self.residual(torch.cat([baseline, mixed], -1))


def _last(length: int) -> Tensor:
    """Return weights (T,) that copy the last vector."""
    return torch.eye(length)[-1].clone()


class Bilinear(Predictor):
    """Copying, corrected: raw = Σ_t w_t·context_t + A·drop(Σ_t v_t·context_t).

    At the start w and v copy the last vector (`averaging`: they average), and A is near 0.
    """

    def __init__(self, dim: int, context_length: int, averaging: bool = False, dropout: float = 0.7):
        super().__init__(dim, context_length)
        start = torch.full((context_length,), 1 / context_length) if averaging else _last(context_length)
        self.weights, self.mixture = nn.Parameter(start), nn.Parameter(start.clone())
        self.drop, self.metric = nn.Dropout(dropout), nn.Linear(dim, dim, bias=False)
        nn.init.normal_(self.metric.weight, std=0.02 / math.sqrt(dim))

    def raw(self, context: Tensor) -> Tensor:
        copied, mixed = (torch.einsum("t,btd->bd", w, context) for w in (self.weights, self.mixture))
        return copied + self.metric(self.drop(mixed))


class TwoHeads(Predictor):
    """Two heads that share no parameter: `point`, trained by its distance to the target, and `ranker`, by ranks.

    One vector cannot do both: the best point averages the context, and an average ranks chunks badly.
    """

    RANKER: type[Predictor] = Bilinear

    def __init__(self, dim: int, context_length: int):
        super().__init__(dim, context_length)
        self.point = Bilinear(dim, context_length, averaging=True, dropout=0.9)
        self.ranker = self.RANKER(dim, context_length)

    def raw(self, context: Tensor) -> Tensor:
        return self.point.raw(context)

    def heads(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return *self(context), self.ranker(context)[1]


class Gated(Predictor):
    """Bilinear's correction of copying, with weights that depend on the context, and a product of two views of it:

        raw = Σ_t w_t·context_t + A·drop(Σ_t v_t·context_t) + O·drop(P·context_T ⊙ Q·mean(context))·√D

    w = w⁰ + f_w and v = v⁰ + f_v, where the small network f reads each context vector in a few learned directions, and
    the cosines among them. At the start f and O are near 0.
    """

    VIEW, HIDDEN, RANK = 16, 64, 128

    def __init__(self, dim: int, context_length: int, dropout: float = 0.6):
        super().__init__(dim, context_length)
        pairs = torch.triu_indices(context_length, context_length, 1)
        self.register_buffer("pairs", pairs, persistent=False)
        self.weights, self.mixture = nn.Parameter(_last(context_length)), nn.Parameter(_last(context_length))
        self.metric = nn.Linear(dim, dim, bias=False)
        nn.init.normal_(self.metric.weight, std=0.02 / math.sqrt(dim))
        self.view = nn.Linear(dim, self.VIEW, bias=False)
        self.hidden = nn.Linear(context_length * self.VIEW + pairs.shape[1], self.HIDDEN)
        self.gate = nn.Linear(self.HIDDEN, 2 * context_length)
        self.left, self.right = (nn.Linear(dim, self.RANK, bias=False) for _ in range(2))
        self.product = nn.Linear(self.RANK, dim, bias=False)
        nn.init.zeros_(self.gate.bias)
        for near in (self.gate, self.product):
            nn.init.normal_(near.weight, std=0.02 / math.sqrt(near.in_features))
        self.drop, self.drop_hidden = nn.Dropout(dropout), nn.Dropout(dropout / 2)

    def raw(self, context: Tensor) -> Tensor:
        cosines = torch.einsum("bid,bjd->bij", context, context)[:, *self.pairs]
        seen = torch.cat([self.view(context).flatten(1), 2 * cosines], 1)
        w, v = self.gate(self.drop_hidden(F.gelu(self.hidden(seen)))).chunk(2, 1)
        copied = torch.einsum("bt,btd->bd", self.weights + w, context)
        mixed = torch.einsum("bt,btd->bd", self.mixture + v, context)
        both = self.left(context[:, -1]) * self.right(context.mean(1)) * math.sqrt(self.dim)
        return copied + self.metric(self.drop(mixed)) + self.product(self.drop(both))


class GatedHeads(TwoHeads):
    """Two heads with a `Gated` ranker: one member of a committee."""

    RANKER = Gated


class Committee(Predictor):
    """`point` as of two heads; the ranker is the sum of the unit vectors of `MEMBERS` rankers that share nothing.

    In training `heads` gives all of them, (B, MEMBERS, D), and the ranking loss is the mean of theirs.
    """

    MEMBERS = 3

    def __init__(self, dim: int, context_length: int):
        super().__init__(dim, context_length)
        self.point = Bilinear(dim, context_length, averaging=True, dropout=0.9)
        self.members = nn.ModuleList([Gated(dim, context_length) for _ in range(self.MEMBERS)])

    def raw(self, context: Tensor) -> Tensor:
        return self.point.raw(context)

    def heads(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rankers = torch.stack([member(context)[1] for member in self.members], 1)
        return *self(context), rankers if self.training else F.normalize(rankers.sum(1), dim=-1)


class Sampler(Predictor):
    """A distribution over the next vector: a corrected copy of the context, and noise, on the unit sphere.

        x = u / ‖u‖,  u = Σ_t w_t·context_t + A·drop(Σ_t v_t·context_t) + exp(τ·z₀)·(L·z + σ ⊙ z′),  all z normal

    As `Bilinear`, but w and v begin at the mean. The noise has a spread σ in each dimension and 16 common directions
    L; τ lets samples lie at different distances. `raw` is the mean of 32 samples from a fixed table of noise and its
    opposite, so that terms linear in the noise cancel.
    """

    def __init__(self, dim: int, context_length: int):
        super().__init__(dim, context_length)
        even = torch.full((context_length,), 1 / context_length)
        self.weights, self.mixture = nn.Parameter(0.75 * even), nn.Parameter(even.clone())
        self.drop, self.metric = nn.Dropout(0.9), nn.Linear(dim, dim, bias=False)
        self.directions, self.sigma = nn.Linear(16, dim, bias=False), nn.Parameter(torch.full((dim,), 0.8 / dim**0.5))
        self.tau = nn.Parameter(torch.tensor(0.3))
        nn.init.normal_(self.metric.weight, std=0.02 / math.sqrt(dim))
        nn.init.normal_(self.directions.weight, std=0.025 / math.sqrt(dim))
        half = torch.randn(16, 1 + 16 + dim, generator=torch.Generator().manual_seed(0), device="cpu")
        self.register_buffer("table", torch.cat([half, torch.cat([half[:, :1], -half[:, 1:]], 1)]))

    def drawn(self, context: Tensor, noise: Tensor) -> Tensor:
        """Return (S, B, D) unit vectors from `noise` (S, B or 1, 1 + 16 + D)."""
        copied, mixed = (torch.einsum("t,btd->bd", w, context) for w in (self.weights, self.mixture))
        point = copied + self.metric(self.drop(mixed))
        spread = self.directions(noise[..., 1:17]) + self.sigma * noise[..., 17:]
        spread = spread * (self.tau * noise[..., :1]).exp()
        return F.normalize(point + spread, dim=-1)  # float32 under autocast, as the noise is

    def samples(self, context: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Return (S, B, D) `count` independent samples for each context (B, T, D)."""
        shape = count, len(context), self.table.shape[1]
        return self.drawn(context, torch.randn(shape, generator=generator, device=context.device))

    def raw(self, context: Tensor) -> Tensor:
        return self.drawn(context, self.table[:, None]).mean(0)


# All that the key `model` of a version may name. Another one is added by `ARCHITECTURES[name] = class`.
ARCHITECTURES: dict[str, type[Predictor]] = {
    "transformer": Transformer,
    "gru": GRU,
    "lstm": LSTM,
    "amn": AMN,
    "bilinear": Bilinear,
    "two_heads": TwoHeads,
    "gated": GatedHeads,
    "committee": Committee,
    "sampler": Sampler,
}


def generative(name: str) -> bool:
    """Whether the architecture has samples."""
    return hasattr(ARCHITECTURES[name], "samples")


def several_heads(name: str) -> bool:
    """Whether the architecture ranks by another vector than its point."""
    return ARCHITECTURES[name].heads is not Predictor.heads


def build(name: str, dim: int, context_length: int = 5, copied_layers: bool = False) -> Predictor:
    """Return a freshly initialised architecture, a transformer's layers as copies of the first if so asked (as
    `nn.TransformerDecoder` makes them). Raises LVMError for an unknown name."""
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise LVMError(f"unknown model {name!r}; known: {', '.join(ARCHITECTURES)}")
    model = ARCHITECTURES[name](dim, context_length)
    for layer in model.layers[1:] if copied_layers and name == "transformer" else ():
        layer.load_state_dict(model.layers[0].state_dict())
    return model
