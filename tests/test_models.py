"""The models against handbook §2: forward passes rewritten in plain tensor operations.

Axes: B batch, T context length, D vector dimension, H hidden width, N windows.
"""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F

from lvmlib import models
from lvmlib.errors import LVMError
from lvmlib.judge.spread import OneSample
from lvmlib.models import several_heads

T, H = 5, 512
NAMES = ("transformer", "gru", "lstm", "amn", "bilinear", "two_heads", "gated", "committee", "sampler")


@functools.cache
def build(name, dim=24, seed=0):
    """A model in eval mode. Built once: not to be changed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return models.build(name, dim, T).eval()


def contexts(dim=24, size=3, seed=0, dtype=torch.float32):
    x = torch.randn(size, T, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(x, dim=-1).to(dtype)


# Shapes and sizes


@pytest.mark.parametrize("name", NAMES)
def test_shapes_unit_norm_and_float32_under_autocast(name):
    model = build(name)
    with torch.no_grad():
        raw, unit = model(contexts())
        _, same, ranker = model.heads(contexts())
        with torch.autocast("cpu", torch.bfloat16):
            low, low_unit = model(contexts())
    assert torch.equal(same, unit) and (ranker is same) == (not several_heads(name))
    assert raw.shape == unit.shape == (3, 24)
    torch.testing.assert_close(raw / raw.norm(dim=-1, keepdim=True), unit)
    assert low.dtype == low_unit.dtype == torch.float32
    torch.testing.assert_close(low_unit.norm(dim=-1), torch.ones(3))
    assert F.cosine_similarity(unit, low_unit).min() > 0.99


@pytest.mark.parametrize("name, millions", [("transformer", 17.9), ("gru", 7), ("lstm", 5), ("amn", 1.5)])
def test_parameter_counts(name, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in models.build(name, 768, T).parameters())
    assert name != "amn" or count == 1_510_912
    assert count == pytest.approx(1e6 * millions, abs=3e5)


def test_the_dropouts_of_the_handbook():
    transformer, lstm = build("transformer"), build("lstm")
    rates = [m.p for m in transformer.modules() if isinstance(m, torch.nn.Dropout)]
    rates += [m.dropout for m in transformer.modules() if isinstance(m, torch.nn.MultiheadAttention)]
    assert len(rates) == 4 * (4 + 2) and set(rates) == {0.1}
    assert lstm.lstm.dropout == 0.2
    x = contexts()
    with torch.no_grad():
        for model in (transformer, lstm):
            assert torch.equal(model(x)[0], model(x)[0])
            model.train()
            assert not torch.equal(model(x)[0], model(x)[0])
            model.eval()


# Refusals


@pytest.mark.parametrize("shape", [(3, T, 23), (T, 24), (1, 3, T, 24), (3, T + 1, 24)])
def test_a_wrong_shape_is_refused(shape):
    for name in NAMES:
        with pytest.raises(LVMError, match=r"\(batch, 5, 24\)"):
            build(name)(torch.zeros(shape))


@pytest.mark.parametrize("name", ["transfomer", None])
def test_an_unknown_model_lists_the_known(name):
    with pytest.raises(LVMError, match=f"{name!r}.*{', '.join(NAMES)}"):
        models.build(name, 24)


# Forward passes, from the text of handbook §2. `w` is the module's state; all in float64.


def linear(w, name, x):
    return F.linear(x, w[name + ".weight"], w[name + ".bias"])


def layer_norm(w, name, x):
    return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"])


def positions(length, width):
    """Vaswani et al. 2017, §3.5: sin(t / 10000^(2i / width)) at 2i, the cosine at 2i + 1."""
    table = torch.zeros(length, width, dtype=torch.float64)
    for t in range(length):
        for i in range(width // 2):
            angle = t / 10000 ** (2 * i / width)
            table[t, 2 * i], table[t, 2 * i + 1] = math.sin(angle), math.cos(angle)
    return table


def own_weights(w, prefix):
    return {name.removeprefix(prefix): x for name, x in w.items() if name.startswith(prefix)}


def torchs(kind, w, prefix, *sizes, **more):
    """A layer of torch with these weights, in float64."""
    layer = kind(*sizes, batch_first=True, **more).double().eval()
    layer.load_state_dict(own_weights(w, prefix))
    return layer


def plain_transformer(w, context):
    """By torch's own decoder layers, at every position."""
    memory = x = linear(w, "project", context) + positions(T, H)
    causal = torch.full((T, T), -math.inf, dtype=torch.float64).triu(1)
    for i in range(4):
        layer = torchs(torch.nn.TransformerDecoderLayer, w, f"layers.{i}.", H, 8, dim_feedforward=2048)
        x = layer(x, memory, tgt_mask=causal, memory_mask=causal)
    return linear(w, "head.3", layer_norm(w, "head.2", F.gelu(linear(w, "head.0", x[:, -1]))))


def plain_gru(w, context):
    x = linear(w, "project", context)
    for i in range(4):
        x = layer_norm(w, f"norms.{i}", x + torchs(torch.nn.GRU, w, f"layers.{i}.", H, H)(x)[0])
    return linear(w, "head", x[:, -1])


def plain_lstm(w, context):
    return linear(w, "head", torchs(torch.nn.LSTM, w, "lstm.", context.shape[-1], H, num_layers=2)(context)[0][:, -1])


def plain_amn(w, context):
    baseline = sum(context[:, t] for t in range(T)) / T
    query, keys = linear(w, "query", baseline), linear(w, "key", context)
    attention = F.softmax(torch.einsum("bd,btd->bt", query, keys) / math.sqrt(256), -1)
    x = torch.cat([baseline, torch.einsum("bt,btd->bd", attention, context)], -1)
    x = layer_norm(w, "residual.2", F.gelu(linear(w, "residual.0", x)))
    x = layer_norm(w, "residual.5", F.gelu(linear(w, "residual.3", x)))
    return baseline + linear(w, "residual.6", x)


def plain_bilinear(w, context):
    copied, mixed = (sum(w[name][t] * context[:, t] for t in range(T)) for name in ("weights", "mixture"))
    return copied + torch.stack([w["metric.weight"] @ x for x in mixed])


def plain_point(w, context):
    """Of several heads; the rankers are tested below."""
    return plain_bilinear(own_weights(w, "point."), context)


def plain_sample(w, context, noise):
    """One sample of one window from (1 + 16 + D) numbers."""
    size = math.exp(w["tau"] * noise[0])
    pulled = w["directions.weight"] @ noise[1:17]
    point = plain_bilinear(w, context[None])[0]
    x = torch.stack([p + size * (a + s * z) for p, a, s, z in zip(point, pulled, w["sigma"], noise[17:], strict=True)])
    return F.normalize(x, dim=0)


def plain_sampler(w, context):
    assert torch.equal(w["table"][:16, 1:], -w["table"][16:, 1:])
    return torch.stack([sum(plain_sample(w, c, noise) for noise in w["table"]) / 32 for c in context])


PLAIN = {
    "transformer": plain_transformer,
    "gru": plain_gru,
    "lstm": plain_lstm,
    "amn": plain_amn,
    "bilinear": plain_bilinear,
    "sampler": plain_sampler,
} | dict.fromkeys(filter(several_heads, NAMES), plain_point)


def doubled(name, sharpen=1.0):
    """The model in float64 with biases and LayerNorms moved off their initial zeros and ones."""
    model = copy.deepcopy(build(name)).double()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            moved = 0.1 * torch.randn(p.shape, generator=g, dtype=torch.float64) if p.ndim == 1 else 0.0
            p.mul_(sharpen if p.ndim == 2 else 1.0).add_(moved)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_forward_pass_and_its_gradient(name):
    model, x = doubled(name, sharpen=2.0), contexts(dtype=torch.float64, size=4).requires_grad_()
    found, expected = model.raw(x), PLAIN[name](model.state_dict(), x)
    assert expected.std(0).min() > 1e-4  # the batch's predictions differ, so there is something to compare
    slopes = [torch.autograd.grad(raw.square().sum(), x)[0] for raw in (found, expected)]
    # The transformer keeps its positions, and normalises attention, in float32.
    rtol, atol = (1e-4, 1e-5) if name == "transformer" else (1e-9, 1e-11)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(*slopes, rtol=rtol, atol=atol)


@pytest.mark.parametrize("p", [0.1, 0.25, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    x = torch.ones(400_001, requires_grad=True)
    assert models.dropout(x, p, False) is x and models.dropout(x, 0.0, True) is x
    torch.manual_seed(3)
    dropped = models.dropout(x, p, True)
    torch.manual_seed(3)
    assert torch.equal(dropped, models.dropout(x, p, True))
    passed = dropped != 0
    assert abs(float((~passed).double().mean()) - p) < 5 * math.sqrt(p * (1 - p) / len(x))
    torch.testing.assert_close(dropped[passed], torch.full_like(dropped[passed], 1 / (1 - p)), rtol=2e-4, atol=0)
    (gradient,) = torch.autograd.grad(dropped.sum(), x)
    assert torch.equal(gradient, dropped.detach())
    pairs = passed[:-1].view(-1, 4)  # the four that share a random number are independent
    both = [float((~pairs[:, i] & ~pairs[:, j]).double().mean()) for i in range(4) for j in range(i)]
    assert max(abs(b - p * p) for b in both) < 5 * math.sqrt(p * p * (1 - p * p) / len(pairs))


# Samples


def test_samples_are_the_formula():
    model, x = doubled("sampler"), contexts(dtype=torch.float64)
    noise = torch.randn(4, 3, 1 + 16 + 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    w = model.state_dict()
    expected = torch.stack([torch.stack([plain_sample(w, c, z) for c, z in zip(x, row, strict=True)]) for row in noise])
    torch.testing.assert_close(model.drawn(x, noise), expected, rtol=0, atol=1e-11)


def test_samples_are_independent_and_the_table_stands_for_all_noise():
    model, x = build("sampler"), contexts().expand(3, T, 24)
    drawn = model.samples(x, 50, torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn.norm(dim=-1), torch.ones(50, 3))
    assert len(torch.unique(drawn.detach().flatten(0, 1), dim=0)) == 150  # none twice
    assert torch.equal(drawn, model.samples(x, 50, torch.Generator().manual_seed(1)))
    mean = model.samples(x[:1], 4000, torch.Generator().manual_seed(2)).mean(0)
    assert F.cosine_similarity(mean, model.raw(x[:1])).item() > 0.98


@torch.no_grad()
def test_one_sample_depends_on_the_window_alone():
    """Neither on the batch nor on the order in the context; and it is a sample, not the mean."""
    model, x = OneSample(build("sampler")), contexts(size=40)
    found, mean = model(x)[0], model.model(x)[0]
    turned = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x[turned])[0], found[turned])
    assert torch.equal(torch.cat([model(x[i : i + 1])[0] for i in range(40)]), found)
    # At the start the sampler is all but symmetric in its context: reversed, only the noise could tell.
    assert (model(x.flip(1))[0] - found).norm(dim=1).max() < 0.2
    assert (OneSample(build("sampler"), seed=1)(x)[0] - found).norm(dim=1).min() > 0.3
    expected = (model.model.samples(x, 200, torch.Generator().manual_seed(0)) - mean).norm(dim=-1)
    error = expected.std().item() / math.sqrt(40)
    assert (found - mean).norm(dim=1).mean() == pytest.approx(expected.mean().item(), abs=4 * error)


# Several heads


def plain_gated(w, context):
    """One window's ranker, by loops over plain numbers."""
    length, dim = context.shape
    seen = [float(row @ x) for x in context for row in w["view.weight"]]
    seen += [2 * float(context[i] @ context[j]) for i in range(length) for j in range(i + 1, length)]
    gate = linear(w, "gate", F.gelu(linear(w, "hidden", torch.tensor(seen))))
    copied = sum((w["weights"][t] + gate[t]) * context[t] for t in range(length))
    mixed = sum((w["mixture"][t] + gate[length + t]) * context[t] for t in range(length))
    mean = sum(context) / length
    both = (w["left.weight"] @ context[-1]) * (w["right.weight"] @ mean) * math.sqrt(dim)
    return copied + w["metric.weight"] @ mixed + w["product.weight"] @ both


def stirred(name):
    """A model away from its start, where gate and product are near 0."""
    model, generator = models.build(name, 24), torch.Generator().manual_seed(3)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) / 4
    return model.eval()


def plain_ranker(member, x):
    return F.normalize(torch.stack([plain_gated(dict(member.named_parameters()), c) for c in x]), dim=1)


@torch.no_grad()
def test_gated_heads_and_a_committee_rank_by_the_formula():
    """A committee by the sum of its members' unit vectors."""
    x, gated, committee = contexts(size=6), stirred("gated"), stirred("committee")
    torch.testing.assert_close(gated.heads(x)[2], plain_ranker(gated.ranker, x), rtol=0, atol=1e-5)
    members = torch.stack([plain_ranker(member, x) for member in committee.members], 1)
    torch.testing.assert_close(committee.heads(x)[2], F.normalize(members.sum(1), dim=1), rtol=0, atol=1e-5)
    for member in committee.members:
        member.drop.p = member.drop_hidden.p = 0.0
    torch.testing.assert_close(committee.train().heads(x)[2], members, rtol=0, atol=1e-5)  # (B, MEMBERS, D)


@pytest.mark.parametrize("name", ["bilinear", "two_heads", "gated", "committee"])
def test_the_ranker_begins_as_copying_and_the_point_of_several_heads_as_the_mean(name):
    x, model = contexts(384, size=50), build(name, 384)
    with torch.no_grad():
        _, unit, ranker = model.eval().heads(x)
    assert F.cosine_similarity(ranker, x[:, -1]).min() > 0.999
    assert name == "bilinear" or F.cosine_similarity(unit, x.mean(1)).min() > 0.99


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name):
    model = build(name)
    _, unit, ranker = model.heads(contexts(size=8))
    gradients = torch.autograd.grad(((unit + ranker) * contexts(size=8, seed=5)[:, 0]).sum(), list(model.parameters()))
    largest = {key: g.abs().max() for (key, _), g in zip(model.named_parameters(), gradients, strict=True)}
    assert all(torch.isfinite(g) for g in largest.values())
    # A bias of amn's keys adds the same to every score: softmax does not see it.
    assert [key for key, g in largest.items() if g < 1e-8] == (["key.bias"] if name == "amn" else [])
