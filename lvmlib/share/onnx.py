"""A model as one ONNX file, checked against torch.

Axes: B batch, T context length, D vector dimension.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import models
from ..errors import LVMError, format_error, require
from ..io.disk import write_atomic
from .export import load

ONNX_TOLERANCE = 1e-4  # of an output's largest magnitude; float32 kernels sum in another order


class _Heads(nn.Module):
    """What ONNX computes of a predictor: its point, and the unit vector that ranks chunks."""

    def __init__(self, model: models.Predictor):
        super().__init__()
        self.model = model

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        raw, _, ranker = self.model.heads(context)
        return raw, ranker


class _AddHeadsAxis(TorchFunctionMode):
    """Gives attention without an axis for its heads, as AMN's, such an axis: the converter needs one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention and args[0].ndim == 3:
            return func(*(a[:, None] for a in args[:3]), *args[3:], **(kwargs or {}))[:, 0]
        return func(*args, **(kwargs or {}))


def to_onnx(model: models.Predictor | str | os.PathLike, path: str | os.PathLike) -> float:
    """Write a model, or that of an exported folder, as one ONNX file. Returns its largest difference from torch.

    Input `context` (B, T, D) float32, any B; outputs `point` (B, D), the raw prediction, and `ranker` (B, D), the unit
    vector that ranks chunks. Of a sampler only the point: drawing samples needs torch. The difference is relative to
    the largest magnitude of each output, over batches of 1, 3 and 64 random contexts, by ONNX Runtime on the CPU.
    Raises LVMError, and leaves no file, if it is above ONNX_TOLERANCE, if the model cannot be converted, and if `path`
    exists.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):  # torch's exporter imports them late
        require(module, "export")
    path = Path(path)
    if path.exists():
        raise LVMError(f"{path}: is there already; name a new file, or move the old one aside")
    model = copy.deepcopy(model).cpu().eval() if isinstance(model, models.Predictor) else load(model, "cpu")
    heads, noise = _Heads(model).eval(), torch.Generator().manual_seed(0)
    shape = model.context_length, model.dim
    contexts = [F.normalize(torch.randn(size, *shape, generator=noise), dim=-1) for size in (1, 3, 64)]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), torch.no_grad(), _AddHeadsAxis():
            program = torch.onnx.export(
                heads,
                (contexts[1],),
                input_names=["context"],
                output_names=["point", "ranker"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # stack traces, with this machine's paths
        content = program.model_proto.SerializeToString()
        difference = _largest_difference(content, heads, contexts)
    except Exception as e:  # the converter and the runtime raise many kinds
        name = type(model).__name__
        raise LVMError(f"{path}: this {name} cannot be converted ({format_error(e)}); use it with torch") from e
    if not difference <= ONNX_TOLERANCE:  # or NaN
        raise LVMError(
            f"{path}: differs from torch by {difference:.1e} of the largest value, allowed is {ONNX_TOLERANCE:g}; "
            "use the model with torch"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda partial: partial.write_bytes(content))
    return difference


def _largest_difference(content: bytes, heads: nn.Module, contexts: list[Tensor]) -> float:
    """Return the largest difference of ONNX Runtime from torch, relative to each output's largest magnitude."""
    session = require("onnxruntime", "export").InferenceSession(content, providers=["CPUExecutionProvider"])
    differences = []
    for context in contexts:
        with torch.no_grad():
            wanted = [t.numpy() for t in heads(context)]
        outputs = session.run(None, {"context": context.numpy()})
        differences += [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(outputs, wanted, strict=True)]
    return float(np.max(differences))  # NaN if one is
