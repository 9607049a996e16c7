"""Precision and token budget of forward passes without gradients."""

from __future__ import annotations

import contextlib
import time

import torch

# Maximum number of tokens per forward pass. A CPU is fastest when they fit into its cache.
TOKEN_BUDGETS = {"cpu": 2048, "cuda": 65536}


def default_token_budget(device: torch.device | str) -> int:
    """Return the default maximum number of tokens per forward pass on a device."""
    return TOKEN_BUDGETS.get(torch.device(device).type, TOKEN_BUDGETS["cuda"])


def resolve_precision(precision: str, device: torch.device | str) -> str:
    """Return "fp32" or "bf16". "auto" means bf16 on GPUs with native support and on CPUs with AMX.

    bf16 instructions alone (avx512_bf16) do not make a CPU fast. On one such CPU, matrix products were 2.5 times as
    fast as in fp32, on another 0.55 times as fast. bf16_speed measures this.
    """
    if precision != "auto":
        return precision
    on_gpu = torch.device(device).type == "cuda"
    native = torch.cuda.is_bf16_supported(False) if on_gpu else torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "fp32"


def computing_in(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Return an autocast context for forward passes in this precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=resolve_precision(precision, device) == "bf16")


def active_precision(device: torch.device) -> str:
    """Return the precision of the active autocast, "fp32" if there is none."""
    active = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if active else torch.float32
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(dtype, str(dtype).removeprefix("torch."))


def bf16_speed() -> float:
    """Return the speed of bf16 relative to fp32 on this CPU, for a matrix product of typical size."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        texts, weight = torch.ones(2048, 384, dtype=dtype), torch.ones(384, 1536, dtype=dtype)
        seconds[dtype] = min(_seconds(texts, weight) for _ in range(8))
    return seconds[torch.float32] / seconds[torch.bfloat16]


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    start = time.perf_counter()
    left @ right
    return time.perf_counter() - start
