"""What the original's training did besides its losses (handbook §5, 5 to 8): each a parameter, on in the family."""

import math

import pandas as pd
import pytest
import torch

from lvmlib import loop, losses, version
from lvmlib.config import Corruption
from lvmlib.runs import checkpoint

T = 5


def unit(*shape, seed=0):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("dim, kept", [(768, 0.77), (384, 0.86)])
def test_the_last_vector_is_corrupted_at_the_published_rates(dim, kept):
    """By simulation; handbook §5.6: at D = 768 the jitter keeps a cosine of 0.77 = 1 / √(1 + 768·0.03²)."""
    context = unit(20_000, 1, dim).repeat(1, T, 1)
    context[:, -2] = unit(20_000, dim, seed=1)
    torch.manual_seed(0)
    found = loop.corrupted(context, Corruption(share=0.15, swap=0.05, jitter=0.03))
    assert torch.equal(found[:, :-1], context[:, :-1])
    same = (found[:, -1] == context[:, -1]).all(1)
    swapped = (found[:, -1] == context[:, -2]).all(1)
    jittered = found[~same & ~swapped, -1]
    assert 1 - same.float().mean() == pytest.approx(0.15, abs=4 * math.sqrt(0.15 * 0.85 / 20_000))
    assert swapped.sum() / (~same).sum() == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 3_000))
    cosine = torch.nn.functional.cosine_similarity(jittered, context[~same & ~swapped, -1])
    assert cosine.mean() == pytest.approx(kept, abs=0.01) == 1 / math.sqrt(1 + dim * 0.03**2)
    torch.testing.assert_close(jittered.norm(dim=-1), torch.ones(len(jittered)))


def test_what_is_on_in_the_family_and_off_in_ours():
    names = {"p6", "v1", "v2", "v21", "v22", "v23", "v23_confident", "v23_forward", "v23_unguarded"}
    for name in (*names, "share", "pi", "rank", "two_heads", "committee", "margin", "bounded", "energy"):
        v = version(name)
        found = (v.corruption.share, v.copied_layers, v.losses.norm_of)
        assert found == ((0.15, True, "unit") if name in names else (0.0, False, "raw")), name
        assert (v.select == "val_unit_loss") == (name in names)


def test_copied_layers_begin_alike_and_are_trained_apart():
    state = loop.start(version("p6"), 24, torch.device("cpu"))
    first, *others = (layer.state_dict() for layer in state.model.layers)
    assert all(torch.equal(first[k], other[k]) for other in others for k in first)
    apart = loop.start(version("p6", copied_layers=False), 24, torch.device("cpu")).model
    assert not torch.equal(apart.layers[0].linear1.weight, apart.layers[1].linear1.weight)
    assert torch.equal(apart.layers[0].linear1.weight, state.model.layers[0].linear1.weight)


def test_the_norm_term_on_the_unit_vector_is_0():
    v = version("v22")
    raw = unit(6, 24).mul(3).requires_grad_()
    b = losses.Batch(
        raw, torch.nn.functional.normalize(raw, dim=-1), unit(6, T, 24, seed=1), unit(6, 24, seed=2), v.losses
    )
    value = losses.TERMS["norm"].compute(b)
    assert value.item() < 1e-12
    assert torch.autograd.grad(value, raw)[0].abs().max() < 1e-6
    on_raw = version("v22", {"losses": {"norm_of": "raw"}}).losses
    assert losses.TERMS["norm"].compute(b._replace(settings=on_raw)).item() == pytest.approx(4.0)  # (3 − 1)²


@pytest.mark.parametrize("select, best", [("val_loss", 2), ("val_unit_loss", 1), ("margin", 3), ("novel_mrr", 2)])
def test_the_best_epoch_is_chosen_by_select(select, best):
    epochs = {"epoch": [1, 2, 3], "val_loss": [3, 1, 2], "val_unit_loss": [1, 2, 3], "margin": [-0.2, -0.1, 0.1]}
    epochs |= {"novel_mrr": [0.1, 0.3, 0.2], "directional": [0.0] * 3}
    parameters = {"select": select, "control": {"constraint": None}}
    assert checkpoint.best_epoch(parameters, pd.DataFrame(epochs)) == best
