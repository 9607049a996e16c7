"""What encoders compute in, by the words of trainer.precision."""

from __future__ import annotations

import contextlib
import time

import torch

PRECISIONS = ("auto", "fp32", "bf16")


def resolved(precision: str, device: torch.device | str) -> str:
    """fp32 or bf16: "auto" is bf16 on GPUs that compute in it, and on CPUs with AMX.

    Instructions for bf16 alone (avx512_bf16) do not make it fast: of two such CPUs, products were 2.5 times as fast as
    in fp32 on one and 0.55 times on the other (bf16_speed measures it).
    """
    if precision != "auto":
        return precision
    on_gpu = torch.device(device).type == "cuda"
    native = torch.cuda.is_bf16_supported(False) if on_gpu else torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "fp32"


def computing_in(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16, enabled=resolved(precision, device) == "bf16")


def current(device: torch.device) -> str:
    """What is computed in under the autocast that is on."""
    used = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(used, str(used).removeprefix("torch."))


def bf16_speed() -> float:
    """How many times as fast as in fp32 this CPU multiplies in bf16, by a product of the size of a training's."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        texts, weight = torch.ones(2048, 384, dtype=dtype), torch.ones(384, 1536, dtype=dtype)
        seconds[dtype] = min(_seconds(texts, weight) for _ in range(8))
    return seconds[torch.float32] / seconds[torch.bfloat16]


def _seconds(one: torch.Tensor, other: torch.Tensor) -> float:
    started = time.perf_counter()
    one @ other
    return time.perf_counter() - started


TOKEN_BUDGET = {"cpu": 2048, "cuda": 65536}  # padded tokens; a CPU is fastest where those of a forward fit its cache


def token_budget_of(device: torch.device | str) -> int:
    """Padded tokens of a forward without gradients on a device."""
    return TOKEN_BUDGET.get(torch.device(device).type, TOKEN_BUDGET["cuda"])
