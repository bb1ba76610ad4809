"""The models against handbook §2: forward passes rewritten in plain tensor operations, fits against numpy.

Axes: B batch, T context length, D vector dimension, H hidden width, N windows.
"""

import copy
import functools
import math

import pytest
import torch

from lvmlib import models
from lvmlib.errors import LVMError
from lvmlib.judge.spread import OneSample

T, H = 5, 512
NAMES = ("transformer", "gru", "lstm", "amn", "bilinear", "two_heads", "gated", "committee", "sampler")


@functools.cache
def build(name, dim=24, seed=0):
    """A model in eval mode. Built once: not to be changed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return models.build(name, dim, T).eval()


@pytest.fixture(params=NAMES)
def small(request):
    """(name, model at D = 24)."""
    return request.param, build(request.param)


def contexts(dim=24, size=3, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(size, T, dim, generator=g, dtype=torch.float64), dim=-1).to(dtype)


# Shapes and sizes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [24, 384])
def test_shapes_and_unit_norm(name, dim):
    with torch.no_grad():
        raw, unit = build(name, dim)(contexts(dim))
    assert raw.shape == unit.shape == (3, dim)
    assert raw.dtype == unit.dtype == torch.float32
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(raw / raw.norm(dim=-1, keepdim=True), unit)


DECODER = 4 * (2 * (4 * H * H + 4 * H) + (H * 2048 + 2048) + (2048 * H + H) + 3 * 2 * H)
COUNTS = {  # by hand from the handbook's rows, at D = 768
    "transformer": (768 * H + H) + DECODER + (H * H + H) + 2 * H + (H * 768 + 768),
    "gru": (768 * H + H) + 4 * (6 * H * H + 6 * H + 2 * H) + (H * 768 + 768),
    "lstm": 4 * (768 * H + H * H + 2 * H) + 4 * (2 * H * H + 2 * H) + (H * 768 + 768),
}


@pytest.mark.parametrize("name, millions", [("transformer", 17.9), ("gru", 7), ("lstm", 5), ("amn", 2)])
def test_parameter_counts(name, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in models.build(name, 768, T).parameters())
    assert COUNTS.get(name, count) == count == pytest.approx(1e6 * millions, abs=3e5)


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


@pytest.mark.parametrize("shape", [(3, T, 23), (T, 24), (24,), (1, 3, T, 24), (3, 1, 24), (3, T + 1, 24)])
def test_a_wrong_shape_is_refused(small, shape):
    with pytest.raises(LVMError, match=r"\(batch, 5, 24\)"):
        small[1](torch.zeros(shape))


@pytest.mark.parametrize("name", ["transfomer", "", None, "Transformer"])
def test_an_unknown_model_lists_the_known(name):
    with pytest.raises(LVMError, match=", ".join(NAMES)) as e:
        models.build(name, 24)
    assert repr(name) in str(e.value)


# Forward passes, from the text of handbook §2. `w` is the module's state; all in float64.


def linear(w, name, x):
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def layer_norm(w, name, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5) * w[name + ".weight"] + w[name + ".bias"]


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def softmax(x):
    e = torch.exp(x - x.max(-1, keepdim=True).values)
    return e / e.sum(-1, keepdim=True)


def causal_attention(w, name, x, memory, heads=8):
    """Position t of x attends to positions 0 … t of memory."""
    q, k, v = (
        (source @ weight.T + bias).unflatten(-1, (heads, -1))
        for source, weight, bias in zip(
            (x, memory, memory), w[name + ".in_proj_weight"].chunk(3), w[name + ".in_proj_bias"].chunk(3), strict=True
        )
    )
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    for t in range(scores.shape[-2]):
        for s in range(t + 1, scores.shape[-1]):
            scores[..., t, s] = -math.inf
    return linear(w, name + ".out_proj", torch.einsum("bhts,bshd->bthd", softmax(scores), v).flatten(-2))


def positions(length, width):
    """Vaswani et al. 2017, §3.5: sin(t / 10000^(2i / width)) at 2i, the cosine at 2i + 1."""
    table = torch.zeros(length, width, dtype=torch.float64)
    for t in range(length):
        for i in range(width // 2):
            angle = t / 10000 ** (2 * i / width)
            table[t, 2 * i], table[t, 2 * i + 1] = math.sin(angle), math.cos(angle)
    return table


def plain_transformer(w, context):
    memory = x = linear(w, "project", context) + positions(T, H)
    for i in range(4):
        layer = f"layers.{i}."
        x = layer_norm(w, layer + "norm1", x + causal_attention(w, layer + "self_attn", x, x))
        x = layer_norm(w, layer + "norm2", x + causal_attention(w, layer + "multihead_attn", x, memory))
        x = layer_norm(
            w, layer + "norm3", x + linear(w, layer + "linear2", torch.relu(linear(w, layer + "linear1", x)))
        )
    return linear(w, "head.3", layer_norm(w, "head.2", gelu(linear(w, "head.0", x[:, -1]))))


def gates(w, name, layer, x, h):
    """The input's and the hidden state's share of a recurrent layer's gates."""
    return (
        x @ w[f"{name}.weight_ih_l{layer}"].T + w[f"{name}.bias_ih_l{layer}"],
        h @ w[f"{name}.weight_hh_l{layer}"].T + w[f"{name}.bias_hh_l{layer}"],
    )


def plain_gru(w, context):
    x = linear(w, "project", context)
    for i in range(4):
        h, steps = torch.zeros(len(x), H, dtype=torch.float64), []
        for t in range(T):
            a, b = gates(w, f"layers.{i}", 0, x[:, t], h)
            (ar, az, an), (br, bz, bn) = a.chunk(3, -1), b.chunk(3, -1)
            reset, update = torch.sigmoid(ar + br), torch.sigmoid(az + bz)
            h = (1 - update) * torch.tanh(an + reset * bn) + update * h
            steps.append(h)
        x = layer_norm(w, f"norms.{i}", x + torch.stack(steps, 1))
    return linear(w, "head", x[:, -1])


def plain_lstm(w, context):
    x = context
    for layer in range(2):
        h = c = torch.zeros(len(x), H, dtype=torch.float64)
        steps = []
        for t in range(T):
            a, b = gates(w, "lstm", layer, x[:, t], h)
            i, f, g, o = (a + b).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            steps.append(h)
        x = torch.stack(steps, 1)
    return linear(w, "head", x[:, -1])


def plain_amn(w, context):
    baseline = sum(context[:, t] for t in range(T)) / T
    query, keys, values = linear(w, "query", baseline), linear(w, "key", context), linear(w, "value", context)
    attention = softmax(torch.einsum("bd,btd->bt", query, keys) / math.sqrt(256))
    attended = linear(w, "attended", torch.einsum("bt,btd->bd", attention, values))
    x = torch.cat([baseline, attended], -1)
    x = layer_norm(w, "residual.2", gelu(linear(w, "residual.0", x)))
    x = layer_norm(w, "residual.5", gelu(linear(w, "residual.3", x)))
    return baseline + linear(w, "residual.6", x)


def plain_bilinear(w, context):
    copied, mixed = (sum(w[name][t] * context[:, t] for t in range(T)) for name in ("weights", "mixture"))
    return copied + torch.stack([w["metric.weight"] @ x for x in mixed])


def plain_two_heads(w, context):
    """The point; the rankers are tested below."""
    return plain_bilinear({n.removeprefix("point."): x for n, x in w.items() if n.startswith("point.")}, context)


def plain_sample(w, context, noise):
    """One sample of one window from (1 + 16 + D) numbers."""
    size = math.exp(w["tau"] * noise[0])
    pulled = w["directions.weight"] @ noise[1:17]
    point = plain_bilinear(w, context[None])[0]
    x = torch.stack([p + size * (a + s * z) for p, a, s, z in zip(point, pulled, w["sigma"], noise[17:], strict=True)])
    return x / math.sqrt(x @ x)


def plain_sampler(w, context):
    assert torch.equal(w["table"][:16, 1:], -w["table"][16:, 1:])
    return torch.stack([sum(plain_sample(w, c, noise) for noise in w["table"]) / 32 for c in context])


PLAIN = {
    "two_heads": plain_two_heads,
    "gated": plain_two_heads,
    "committee": plain_two_heads,
    "transformer": plain_transformer,
    "gru": plain_gru,
    "lstm": plain_lstm,
    "amn": plain_amn,
    "bilinear": plain_bilinear,
    "sampler": plain_sampler,
}


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
@pytest.mark.parametrize("graph", [True, False], ids=["grad", "no_grad"])  # torch has a fast path of its own for each
def test_forward_pass(name, graph):
    model, x = doubled(name, sharpen=2.0), contexts(dtype=torch.float64, size=4)
    with torch.set_grad_enabled(graph):
        found = model.raw(x).detach()
    expected = PLAIN[name](model.state_dict(), x)
    assert expected.std(0).min() > 1e-4  # the batch's predictions differ, so there is something to compare
    # The module keeps its positions in float32.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 if name == "transformer" else 1e-11)


def test_the_transformer_is_causal():
    """What a decoder layer makes of position t does not change with later positions; it does with earlier ones."""
    model, seen = build("transformer"), []
    hook = model.layers[-2].norm3.register_forward_hook(lambda module, args, output: seen.append(output))
    x = contexts()
    changed = x.clone()
    changed[:, 3] = contexts(seed=1)[:, 3]
    with torch.no_grad():
        (raw, _), (other, _) = model(x), model(changed)
    hook.remove()
    moved = (seen[0] - seen[1]).abs().amax((0, 2))  # (T,)
    assert (moved[:3] < 1e-5).all() and (moved[3:] > 1e-3).all()
    assert (raw - other).abs().max() > 1e-3


def test_the_transformer_is_torchs_decoder_layers():
    """Without dropout, whatever is computed of it: torch's layers at every position, values and gradients alike."""
    model = copy.deepcopy(build("transformer")).double()
    x = contexts(dtype=torch.float64)
    memory = found = model.project(x) + model.positions
    for layer in model.layers:
        found = layer(found, memory, tgt_mask=model.causal, memory_mask=model.causal)
    expected = model.head(found[:, -1])
    weights = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    ours = torch.autograd.grad(model.raw(x).square().sum(), list(model.parameters()))
    torch.testing.assert_close(model.raw(x), expected, rtol=0, atol=1e-5)  # attention is normalised in float32
    for a, b in zip(ours, weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("p", [0.1, 0.25, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    x = torch.ones(400_001, requires_grad=True)
    torch.manual_seed(3)
    dropped = models.dropout(x, p, True)
    torch.manual_seed(3)
    assert torch.equal(dropped, models.dropout(x, p, True))
    kept = dropped != 0
    assert abs(float((~kept).double().mean()) - p) < 5 * math.sqrt(p * (1 - p) / len(x))
    torch.testing.assert_close(dropped[kept], torch.full_like(dropped[kept], 1 / (1 - p)), rtol=2e-4, atol=0)
    (gradient,) = torch.autograd.grad(dropped.sum(), x)
    assert torch.equal(gradient, dropped.detach())
    pairs = kept[:-1].view(-1, 4)  # the four that share a random number are independent
    both = [float((~pairs[:, i] & ~pairs[:, j]).double().mean()) for i in range(4) for j in range(i)]
    assert max(abs(b - p * p) for b in both) < 5 * math.sqrt(p * p * (1 - p * p) / len(pairs))


def test_no_dropout_in_evaluation():
    x = torch.ones(9)
    assert models.dropout(x, 0.5, False) is x and models.dropout(x, 0.0, True) is x


def test_order_matters_but_to_amn(small):
    name, model = small
    x = contexts()
    with torch.no_grad():
        change = (model(x)[0] - model(x.flip(1))[0]).abs().max()
    # The sampler and the point of several heads begin with equal weights; they learn the order.
    assert change < 1e-5 if name in ("amn", "sampler", "two_heads", "gated", "committee") else change > 1e-3


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
    assert torch.nn.functional.cosine_similarity(mean, model.raw(x[:1])).item() > 0.98


def test_one_sample_depends_on_the_window_alone():
    """Neither on the batch nor on the order in the context; and it is a sample, not the mean."""
    model, x = OneSample(build("sampler")), contexts(size=40)
    with torch.no_grad():
        whole = model(x)[0]
        turned = torch.randperm(40, generator=torch.Generator().manual_seed(0))
        assert torch.equal(model(x[turned])[0], whole[turned])
        assert torch.equal(torch.cat([model(x[i : i + 1])[0] for i in range(40)]), whole)
        # At the start the sampler is all but symmetric in its context: reversed, only the noise could tell.
        assert (model(x.flip(1))[0] - whole).norm(dim=1).max() < 0.2
        assert (OneSample(build("sampler"), seed=1)(x)[0] - whole).norm(dim=1).min() > 0.3
        at = (whole - model.model(x)[0]).norm(dim=1)
        expected = (build("sampler").samples(x, 200, torch.Generator().manual_seed(0)) - model.model(x)[0]).norm(dim=-1)
    assert at.mean() == pytest.approx(expected.mean().item(), abs=4 * expected.std().item() / math.sqrt(40))


# Training and keeping


def test_two_heads_are_two_bilinear_models_on_one_context():
    x, model = contexts(384, size=50), build("two_heads", 384)
    with torch.no_grad():
        raw, unit, ranker = model.heads(x)
        assert torch.equal(raw, model.point(x)[0]) and torch.equal(ranker, model.ranker(x)[1])
        assert torch.equal(unit, model(x)[1])


def plain_gated(w, context):
    """One window's ranker, by loops over plain numbers."""
    length, dim = context.shape
    seen = [float(row @ x) for x in context for row in w["view.weight"]]
    seen += [2 * float(context[i] @ context[j]) for i in range(length) for j in range(i + 1, length)]
    hidden = w["hidden.weight"] @ torch.tensor(seen) + w["hidden.bias"]
    hidden = torch.tensor([h * 0.5 * (1 + math.erf(h / math.sqrt(2))) for h in hidden.tolist()])
    gate = w["gate.weight"] @ hidden + w["gate.bias"]
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
    votes = torch.stack([plain_gated(dict(member.named_parameters()), c) for c in x])
    return votes / votes.norm(dim=1, keepdim=True)


@torch.no_grad()
def test_a_committee_ranks_by_the_sum_of_its_members_unit_vectors():
    x, model = contexts(size=6), stirred("committee")
    ranker = model.heads(x)[2]
    members = [plain_ranker(member, x) for member in model.members]
    votes = sum(members)
    assert torch.allclose(ranker, votes / votes.norm(dim=1, keepdim=True), atol=1e-5)
    for member in model.members:
        member.drop.p = member.drop_hidden.p = 0.0
    alone = model.train().heads(x)[2]
    assert alone.shape == (6, 3, 24)
    for i, m in enumerate(members):
        assert torch.allclose(alone[:, i], m, atol=1e-5)


@torch.no_grad()
def test_gated_heads_rank_as_a_member_of_a_committee_would():
    x, model = contexts(size=6), stirred("gated")
    assert torch.allclose(model.heads(x)[2], plain_ranker(model.ranker, x), atol=1e-5)


@pytest.mark.parametrize("name", ["bilinear", "two_heads", "gated", "committee"])
def test_the_ranker_begins_as_copying_and_the_point_of_several_heads_as_the_mean(name):
    x, model = contexts(384, size=50), build(name, 384)
    with torch.no_grad():
        _, unit, ranker = model.eval().heads(x)
    assert torch.nn.functional.cosine_similarity(ranker, x[:, -1]).min() > 0.999
    assert name == "bilinear" or torch.nn.functional.cosine_similarity(unit, x.mean(1)).min() > 0.99


@pytest.mark.parametrize("name", ["amn", "bilinear"])
def test_one_head_ranks_by_its_point(name):
    with torch.no_grad():
        _, unit, ranker = build(name, 384).heads(contexts(384, size=5))
    assert ranker is unit


def test_gradients_reach_every_parameter(small):
    name, model = small
    _, unit, ranker = model.heads(contexts(size=8))
    gradients = torch.autograd.grad(((unit + ranker) * contexts(size=8, seed=5)[:, 0]).sum(), list(model.parameters()))
    largest = {key: g.abs().max() for (key, _), g in zip(model.named_parameters(), gradients, strict=True)}
    assert all(torch.isfinite(g) for g in largest.values())
    # A bias of amn's keys adds the same to every score: softmax does not see it.
    assert [key for key, g in largest.items() if g < 1e-8] == (["key.bias"] if name == "amn" else [])


def test_autocast_gives_float32_predictions(small):
    x = contexts()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        raw, unit = small[1](x)
    assert raw.dtype == unit.dtype == torch.float32
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(3))
    with torch.no_grad():
        assert torch.nn.functional.cosine_similarity(small[1](x)[1], unit).min() > 0.99


def test_state_dict_brings_back_the_same_model(small, tmp_path):
    name, model = small
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other, x = build(name, seed=1), contexts()
    with torch.no_grad():
        assert not torch.equal(other(x)[0], model(x)[0])
        other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
        assert torch.equal(other(x)[0], model(x)[0])
