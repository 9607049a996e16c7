"""What encoders compute in, by the words of trainer.precision."""

from __future__ import annotations

import contextlib

import torch

PRECISIONS = ("auto", "fp32", "bf16")


def resolved(precision: str, device: torch.device | str) -> str:
    """fp32 or bf16: "auto" is bf16 where the hardware computes in it."""
    if precision != "auto":
        return precision
    on_gpu = torch.device(device).type == "cuda"
    native = torch.cuda.is_bf16_supported(False) if on_gpu else torch.cpu._is_avx512_bf16_supported()
    return "bf16" if native else "fp32"


def computing_in(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16, enabled=resolved(precision, device) == "bf16")


def current(device: torch.device) -> str:
    """What is computed in under the autocast that is on."""
    used = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(used, str(used).removeprefix("torch."))
