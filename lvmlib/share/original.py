"""Checkpoints of the original work: `best_model.pt` as a Predictor.

Such a file is what torch.save wrote of a dict with `model_state_dict`, and is read without running code of its own.
Its architecture follows from the names and shapes of its weights; names are changed to ours, values are not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import models
from ..errors import LVMError
from ..io.limits import check_state

# By architecture: patterns of the original's names, and ours.
RENAMED = {
    "transformer": {r"input_proj\.": "project.", r"transformer_decoder\.layers\.": "layers."},
    "gru": {
        r"input_proj\.": "project.",
        r"blocks\.(\d+)\.gru\.": r"layers.\1.",
        r"blocks\.(\d+)\.norm\.": r"norms.\1.",
        r"output_proj\.": "head.",
    },
    "lstm": {r"output_proj\.": "head."},
    "amn": {r"query_encoder\.": "query.", r"context_encoder\.": "key.", r"residual_net\.": "residual."},
    "p7": {r"input_proj\.": "project.", r"transformer\.": "encoder.", "anchor_lambda_logit": "anchor"},
    "p8": {
        r"input_proj\.": "project.",
        "pos_encoder": "positions",
        r"transformer\.": "encoder.",
        r"context_attention\.": "head.",
    },
}
FIRST = ("project.weight", "lstm.weight_ih_l0", "query.weight")  # one of these reads the context: (…, D)
POSITIONS = ("pos_encoder.pe", "pos_encoder")  # fixed tables, which ours computes; P8 learns its own
WRAPPERS = ("module.", "_orig_mod.", "model.")  # what DataParallel, torch.compile and Lightning put before each name
# Figures of validation may be numpy's; their reconstruction runs no code.
NUMBERS = [np.dtype, *{type(np.dtype(c)) for c in "?bBhHiIlLqQefd"}]
NUMBERS += [(np.float64(0).__reduce__()[0], f"{module}.multiarray.scalar") for module in ("numpy.core", "numpy._core")]
ADVICE = "give a checkpoint of the original's transformer, gru, lstm, amn, p7 or p8, or a folder made by `export`"


def load_checkpoint(path: Path, context_length: int = 5) -> tuple[models.Predictor, str, dict]:
    """Return the model in eval mode, float32, on the CPU; its architecture; and what else the file says in `args`.

    Raises LVMError for a file that is damaged, needs code to be read, or holds another architecture.
    """
    check_state(path)
    try:
        with torch.serialization.safe_globals(NUMBERS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # whatever a damaged file makes of torch.load
        raise LVMError(f"{path}: cannot be read without running its code ({type(e).__name__}); {ADVICE}") from e
    weights = _weights(content)
    if not weights:
        raise LVMError(f"{path}: holds no weights under model_state_dict, state_dict or model; {ADVICE}")
    name, model, renamed = _recognise(path, weights, context_length)
    for key, tensor in renamed.items():
        if not bool(tensor.isfinite().all()):
            raise LVMError(f"{path}: {key} holds NaN or infinite values; restore the file")
    model.load_state_dict(renamed)
    args = content.get("args") if isinstance(content.get("args"), dict) else {}
    return model.eval(), name, args


def _weights(content: Any) -> dict[str, Tensor]:
    """Return the tensors by name, without what wrappers put before the names; empty if there are none."""
    for key in ("model_state_dict", "state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        return {}
    for wrapper in WRAPPERS:
        if all(key.startswith(wrapper) for key in content):
            content = {key.removeprefix(wrapper): tensor for key, tensor in content.items()}
    return dict(content)


def _recognise(path: Path, weights: dict[str, Tensor], length: int) -> tuple[str, models.Predictor, dict[str, Tensor]]:
    """Return name and model of the architecture whose names these are, and the weights by our names."""
    for name, patterns in RENAMED.items():
        renamed = {_rename(key, patterns): tensor.float() for key, tensor in weights.items()}
        first = next((renamed[k] for k in FIRST if k in renamed), None)
        if first is None or first.ndim != 2:
            continue
        if name == "p8" and "positions" in renamed:
            renamed["positions"] = renamed["positions"].flatten(0, -2)
            length = len(renamed["positions"])
        model = models.build(name, first.shape[1], length)
        wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        renamed = {k: t for k, t in renamed.items() if k in wanted or not (k in POSITIONS and _is_table(t, name))}
        if wanted.keys() != renamed.keys():
            continue
        for key, shape in wanted.items():
            if tuple(renamed[key].shape) != shape:
                raise LVMError(f"{path}: as {name}, {key} is {tuple(renamed[key].shape)}, needed is {shape}; {ADVICE}")
        return name, model, renamed
    raise LVMError(f"{path}: the weights are of no known architecture ({', '.join(list(weights)[:3])}, …); {ADVICE}")


def _rename(key: str, patterns: Mapping[str, str]) -> str:
    for pattern, ours in patterns.items():
        key, count = re.subn(f"^{pattern}", ours, key)
        if count:
            break
    return key


def _is_table(tensor: Tensor, name: str) -> bool:
    """Whether `tensor` (1, length, width) holds the positions that our model computes: sines, for P7 zeros."""
    length, width = tensor.shape[-2:]
    table = models.sinusoidal_positions(length, width) if name == "transformer" else torch.zeros(length, width)
    return torch.allclose(tensor.reshape(length, width), table, atol=1e-4)
