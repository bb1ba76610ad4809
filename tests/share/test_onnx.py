"""ONNX Runtime computes what torch computes, or no file is left."""

import os
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_export import write_untrained

from lvmlib import models
from lvmlib.errors import LVMError
from lvmlib.judge.spread import OneSample
from lvmlib.share import onnx
from lvmlib.share.onnx import ONNX_TOLERANCE, to_onnx

pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")

DEEP = ("gru", "transformer")  # slow to convert: two of the four layers are enough


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_onnx_computes_what_torch_computes(name, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "HIDDEN", 32)  # as wide as eight heads need; the converter unrolls loops over T
    model = write_untrained(name, tmp_path / "model", dim=16, length=2)
    for part in ("layers", "norms"):
        if name in DEEP and hasattr(model, part):
            setattr(model, part, getattr(model, part)[2:])
    source = model if name in DEEP else tmp_path / "model"
    assert to_onnx(source, tmp_path / "new" / "model.onnx") <= ONNX_TOLERANCE
    assert os.listdir(tmp_path / "new") == ["model.onnx"]
    assert b".py" not in (tmp_path / "new" / "model.onnx").read_bytes()  # no stack trace names this machine's folders
    session = runtime.InferenceSession(tmp_path / "new" / "model.onnx", providers=["CPUExecutionProvider"])
    assert [i.shape for i in session.get_inputs()] == [["batch", 2, 16]]
    for size in (1, 2, 130):  # sizes that the conversion did not see
        x = F.normalize(torch.randn(size, 2, 16), dim=-1)
        with torch.no_grad():
            raw, _, ranks = model.heads(x)
        outputs = session.run(["point", "ranker"], {"context": x.numpy()})
        for output, wanted in zip(outputs, (raw, ranks), strict=True):
            atol = ONNX_TOLERANCE * float(wanted.abs().max())
            np.testing.assert_allclose(output, wanted.numpy(), atol=atol, rtol=0)
    if models.several_heads(name):
        assert not np.allclose(outputs[1], F.normalize(torch.from_numpy(outputs[0]), dim=-1).numpy(), atol=1e-2)


def test_a_difference_or_a_failure_leaves_no_file(tmp_path, monkeypatch):
    model = models.build("bilinear", 16).train()
    torch.nn.init.constant_(model.metric.weight, torch.nan)
    with pytest.raises(LVMError, match="differs from torch by nan"):
        to_onnx(model, tmp_path / "model.onnx")
    assert model.training
    with pytest.raises(LVMError, match="OneSample"):
        to_onnx(OneSample(models.build("sampler", 16)), tmp_path / "model.onnx")
    monkeypatch.setattr(torch.onnx, "export", MagicMock())  # which takes seconds
    monkeypatch.setattr(onnx, "_largest_difference", lambda *_: 2 * ONNX_TOLERANCE)
    with pytest.raises(LVMError, match=r"model\.onnx: differs"):
        to_onnx(model, tmp_path / "model.onnx")
    assert not os.listdir(tmp_path)
    (tmp_path / "model.onnx").write_text("")
    with pytest.raises(LVMError, match=r"model\.onnx"):
        to_onnx(model, tmp_path / "model.onnx")
