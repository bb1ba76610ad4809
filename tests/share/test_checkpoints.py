"""Checkpoints of the original: files built from handbook §2 under its names, against plain forward passes."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from test_models import PLAIN, contexts, doubled

import lvmlib as lvm
from lvmlib import models
from lvmlib.errors import LVMError

# Our names → the original's, longest first.
NAMES = {
    "transformer": {"project": "input_proj", "layers": "transformer_decoder.layers", "head": "head"},
    "gru": {
        "project": "input_proj",
        **{f"layers.{i}": f"blocks.{i}.gru" for i in range(4)},
        **{f"norms.{i}": f"blocks.{i}.norm" for i in range(4)},
        "head": "output_proj",
    },
    "lstm": {"lstm": "lstm", "head": "output_proj"},
    "amn": {"query": "query_encoder", "key": "context_encoder", "residual": "residual_net"},
}


def original_weights(name, model):
    """The state of `model` under the original's names; the transformer with its table of positions."""
    renamed = {}
    for key, tensor in model.state_dict().items():
        ours = next(prefix for prefix in NAMES[name] if key.startswith(prefix + "."))
        renamed[NAMES[name][ours] + key.removeprefix(ours)] = tensor.float()
    if name == "transformer":
        renamed["pos_encoder.pe"] = models.sinusoidal_positions(100, models.HIDDEN)[None]
    return renamed


def write(path, weights, **more):
    content = {"epoch": 3, "model_state_dict": weights, "val_loss": np.float64(0.5), "val_cosine": np.float32(0.4)}
    content |= {"optimizer_state_dict": {"state": {}, "param_groups": []}, "args": {"train_npz": "x/p6_train.npz"}}
    torch.save(content | more, path)
    return path


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_checkpoint_gives_the_predictions_of_its_weights(name, tmp_path):
    model, x = doubled(name), contexts(size=4)
    loaded = lvm.load(write(tmp_path / "best_model.pt", original_weights(name, model)), device="cpu", horizon=1)
    weights = {key: tensor.float().double() for key, tensor in model.state_dict().items()}
    plain = torch.nn.functional.normalize(PLAIN[name](weights, x.double()), dim=-1)
    torch.testing.assert_close(loaded(x)[1].double(), plain, rtol=0, atol=1e-6)
    config = loaded.config
    assert (config.model, config.dim, config.context_length, config.horizon) == (name, 24, 5, 1)
    assert (config.version, config.dataset) == ("best_model", "p6_train") and not loaded.training


@pytest.mark.parametrize("layout", ["state_dict", "module.", "_orig_mod.", "bare", "float16"])
def test_other_layouts(layout, tmp_path):
    model = doubled("amn")
    weights, path = original_weights("amn", model), tmp_path / "m.pth"
    if layout == "state_dict":
        torch.save({"state_dict": weights}, path)
    elif layout == "bare":
        torch.save(weights, path)
    elif layout == "float16":
        write(path, {key: tensor.half() for key, tensor in weights.items()})
    else:
        write(path, {layout + key: tensor for key, tensor in weights.items()})
    loaded = lvm.load(path, device="cpu").state_dict()
    for key, tensor in model.state_dict().items():
        assert loaded[key].dtype == torch.float32
        torch.testing.assert_close(loaded[key].double(), tensor, rtol=0, atol=1e-2 if layout == "float16" else 1e-6)


class Hostile:
    def __reduce__(self):
        return print, ("run",)


def damaged(path, weights, kind):
    if kind == "text":
        path.write_text("no checkpoint")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"model_state_dict": weights}))
    elif kind == "cut":
        write(path, weights)
        path.write_bytes(path.read_bytes()[:-2000])
    elif kind == "packed":
        content = io.BytesIO()
        torch.save({"model_state_dict": weights}, content)
        with zipfile.ZipFile(content) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for member in old.namelist():
                new.writestr(member, old.read(member))
    elif kind == "code":
        write(path, weights, args=Hostile())
    elif kind == "no weights":
        torch.save({"epoch": 3, "args": {}}, path)
    elif kind == "nan":
        write(path, weights | {"residual_net.6.bias": torch.full((24,), float("nan"))})
    elif kind == "shape":
        write(path, weights | {"residual_net.6.bias": torch.zeros(23)})
    elif kind == "missing":
        write(path, {key: tensor for key, tensor in weights.items() if key != "query_encoder.bias"})
    elif kind == "other names":
        write(path, {f"x{key}": tensor for key, tensor in weights.items()})


KINDS = ["text", "pickle", "cut", "packed", "code", "no weights", "nan", "shape", "missing", "other names", "absent"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_or_hostile_file_is_refused_by_name(kind, tmp_path, capsys):
    path = tmp_path / "best_model.pt"
    damaged(path, original_weights("amn", doubled("amn")), kind)
    with pytest.raises(LVMError, match=r"best_model\.pt"):
        lvm.load(path, device="cpu")
    assert capsys.readouterr().out == ""


def test_other_positions_are_another_model(tmp_path):
    weights = original_weights("transformer", doubled("transformer"))
    weights["pos_encoder.pe"] = weights["pos_encoder.pe"] + 0.1
    with pytest.raises(LVMError):
        lvm.load(write(tmp_path / "best_model.pt", weights), device="cpu")
