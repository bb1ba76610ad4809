"""P7 and P8 against handbook §5: forward passes and loss terms rewritten plainly, gradients included.

Axes: B batch, T context length, D vector dimension, C candidates.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from test_models import linear, own_weights, torchs

from lvmlib import losses, models, version
from lvmlib.attempts import p7, p8

B, T, D, H = 6, 5, 24, 512


def unit(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1)


def built(name):
    torch.manual_seed(0)
    model = models.build(name, D, T).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p) if p.ndim == 1 else 0.0)
    return model


def plain_encoder(w, x, **settings):
    for i in range(4):
        layer = torchs(torch.nn.TransformerEncoderLayer, w, f"encoder.layers.{i}.", H, 8, **settings)
        x = layer(x)
    return x[:, -1]


def plain_p7(w, context):
    x = plain_encoder(w, linear(w, "project", context), dim_feedforward=2048)
    x = torch.relu(linear(w, "head.0", x))
    x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
    own = linear(w, "head.3", x * w["head.2.weight"] + w["head.2.bias"])
    a = 0.6 + 0.3 / (1 + math.exp(-float(w["anchor"])))
    mean = context.mean(1)
    return a * own / own.norm(dim=-1, keepdim=True) + (1 - a) * mean / mean.norm(dim=-1, keepdim=True)


def plain_p8(w, context):
    more = {"dim_feedforward": 2048, "activation": "gelu", "norm_first": True}
    x = plain_encoder(w, linear(w, "project", context) + w["positions"], **more)
    alpha = F.softmax(linear(w, "head.3", F.gelu(linear(w, "head.0", x))), -1)
    return torch.stack([sum(alpha[b, t] * context[b, t] for t in range(T)) for b in range(len(context))])


@pytest.mark.parametrize("name, plain", [("p7", plain_p7), ("p8", plain_p8)])
@torch.no_grad()
def test_forward_pass(name, plain):
    model, x = built(name), unit(4, T, D)
    found = model.raw(x)
    assert found.std(0).min() > 1e-4
    torch.testing.assert_close(found, plain(model.state_dict(), x), rtol=0, atol=1e-10)


def test_the_anchor_begins_at_0_8_and_the_layers_alike():
    model = models.build("p7", D, T)
    assert 0.6 + 0.3 * float(torch.sigmoid(model.anchor.detach())) == pytest.approx(0.8)
    w = model.state_dict()
    first = own_weights(w, "encoder.layers.0.")
    assert all(torch.equal(first[k], own_weights(w, f"encoder.layers.{i}.")[k]) for i in (1, 2, 3) for k in first)


# Loss terms


def batch(epoch=1, seed=0):
    """A Batch whose prediction is a leaf, with two more chunks of the article, one of which does not count."""
    raw = unit(B, D, seed=seed).mul(2).requires_grad_()
    context, target = unit(B, T, D, seed=seed + 1), unit(B, D, seed=seed + 2)
    context[: B // 2, -2] = context[: B // 2, -1]  # no forward signal: weak windows
    target[B // 2 :] = context[B // 2 :, -1]  # a strong one
    chunks = torch.cat([target[:, None], unit(B, 2, D, seed=seed + 3)], 1)
    counts = torch.ones(B, 3, dtype=torch.bool)
    counts[0, 2] = False
    prediction = torch.nn.functional.normalize(raw, dim=-1)
    rivals = losses.Rivals(prediction, chunks, counts, torch.tensor(1.0))
    settings = version("p7").losses
    return losses.Batch(raw, prediction, context, target, settings, rivals=rivals, epoch=epoch)


def cos(a, b):
    return (a @ b) / (a.norm() * b.norm())


def plain_weight(b, i):
    last = b.context[i, -1]
    return 1.0 if cos(last, b.target[i]) - cos(last, b.context[i, -2]) >= 0.03 else 0.25


def plain_p7_rank(b):
    total = 0
    for i in range(B):
        own = [b.rivals.chunks[i, c] for c in (1, 2) if b.rivals.counts[i, c]]
        against = [*(b.target[j] for j in range(B) if j != i), b.context[i, -1], *own]
        scores = torch.stack([cos(b.raw[i], y) / 0.07 for y in (b.target[i], *against)])
        total = total + plain_weight(b, i) * (torch.log(torch.exp(scores).sum()) - scores[0])
    return total / B


def plain_repel(b, weighted):
    each = [(0.07 - cos(b.raw[i], b.target[i]) + cos(b.raw[i], b.context[i, -1])).clamp(min=0) for i in range(B)]
    return sum(x * (plain_weight(b, i) if weighted else 1) for i, x in enumerate(each)) / B


def plain_teacher(b):
    near = [cos(b.raw[i], b.context[i].mean(0)) for i in range(B)]
    low = [1 - x for x in near if x < 0.20]
    return sum(low) / len(low)


TERMS = {
    "p7_rank": plain_p7_rank,
    "p7_repel": lambda b: plain_repel(b, weighted=True),
    "p7_teacher": plain_teacher,
    "p8_repel": lambda b: plain_repel(b, weighted=False),
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("seed", range(3))
def test_a_term_and_its_gradient(name, seed):
    b = batch(seed=10 * seed)
    assert {plain_weight(b, i) for i in range(B)} == {1.0, 0.25}
    found, expected = losses.OWN[name].compute(b), TERMS[name](b)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, b.raw, retain_graph=True)[0] for x in (found, expected)))


def test_the_teacher_ends_after_two_epochs():
    values = [p7.teacher(batch(epoch)).item() for epoch in (1, 2, 3)]
    assert values[0] == values[1] > 0 == values[2]


def test_p8_ranks_the_target_among_the_previous_and_thirty_others():
    """With 30 draws of all five others, the mean over many draws is that of the exact expectation's bounds."""
    b = batch()
    torch.manual_seed(0)
    found = torch.stack([p8.rank(b) for _ in range(300)]).detach().numpy()
    assert found.std() > 0  # drawn anew
    exact = []
    g = torch.Generator().manual_seed(1)
    for _ in range(300):
        total = 0.0
        for i in range(B):
            others = [j for j in range(B) if j != i]
            drawn = [others[k] for k in torch.randint(B - 1, (30,), generator=g).tolist()]
            against = [b.target[i], b.context[i, -1], *(b.target[j] for j in drawn)]
            scores = torch.stack([cos(b.raw[i], y) / 0.07 for y in against]).detach()
            total += float(torch.logsumexp(scores, 0) - scores[0])
        exact.append(total / B)
    assert found.mean() == pytest.approx(sum(exact) / 300, abs=0.05)


def test_p8_of_a_single_window_has_no_others():
    b = batch()
    one = b._replace(raw=b.raw[:1], unit=b.unit[:1], context=b.context[:1], target=b.target[:1])
    scores = torch.stack([cos(b.raw[0], y) / 0.07 for y in (b.target[0], b.context[0, -1])])
    torch.testing.assert_close(p8.rank(one), torch.logsumexp(scores, 0) - scores[0])
