"""Device and precision."""

from __future__ import annotations

import torch

from .errors import LVMError


def pick_device(name: str) -> torch.device:
    """`auto`: a CUDA device, else Apple's, else the CPU. Raises LVMError where the named one is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise LVMError(f"device {name!r}: not on this machine ({str(e).splitlines()[0]}); use auto or cpu") from e
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """`auto`: bfloat16 where the device computes it fast (a CPU by AVX-512 BF16 or AMX), else float32."""
    if name != "auto":
        return name
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        able = torch.cpu.get_capabilities()
        fast = able.get("avx512_bf16") or able.get("amx_bf16")
    return "bfloat16" if fast else "float32"
