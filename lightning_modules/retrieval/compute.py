"""Device, precision and token budget of forward passes without gradients."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import nn

from datamodules.records import UserError

# Maximum number of tokens per forward pass. A CPU is fastest if the tokens fit into its cache.
TOKEN_BUDGETS = {"cpu": 2048, "cuda": 65536}
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # types of matrix products other than float32
TF32_CAPABILITY = (8, 0)  # Ampere, the first GPUs with TF32


def default_device(number: int | None = None) -> torch.device:
    """Return a GPU if there is one, else the CPU. number: index of the GPU, by default the current GPU's."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device() if number is None else number % torch.cuda.device_count())


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device with this name: "auto" (default_device), "cpu", "cuda" or "cuda:N".

    Raises UserError for any other name, or if this machine does not have the device.
    """
    if name == "auto":
        return default_device()
    with contextlib.suppress(RuntimeError):
        device = torch.device(name)
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < count):
            return device
        if device.type == "cuda":
            raise UserError(f"device: got {name}, but this machine has {count or 'no'} GPUs")
    raise UserError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")


def describe_device(device: torch.device | str) -> str:
    """Describe a device for the log: "cpu", or "cuda:0 (NVIDIA H100)"."""
    device = torch.device(device)
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def default_token_budget(device: torch.device | str) -> int:
    """Return the default maximum number of tokens per forward pass on a device."""
    return TOKEN_BUDGETS.get(torch.device(device).type, TOKEN_BUDGETS["cuda"])


def resolve_precision(precision: str, device: torch.device | str) -> str:
    """Return "fp32", "tf32", "bf16" or "fp16". "auto" means bf16 on GPUs with native support and on CPUs with AMX.

    On hardware without TF32, "tf32" becomes "fp32". For CPUs, bf16 instructions alone (avx512_bf16) are not enough:
    matrix products were 2.5 times as fast as in fp32 on one such CPU, but only 0.55 times as fast on another.
    bf16_speed measures this.
    """
    on_gpu = torch.device(device).type == "cuda"
    if precision == "tf32" and not (on_gpu and torch.cuda.get_device_capability() >= TF32_CAPABILITY):
        return "fp32"
    if precision != "auto":
        return precision
    native = torch.cuda.is_bf16_supported(False) if on_gpu else torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "fp32"


@contextlib.contextmanager
def computing_in(precision: str, device: torch.device) -> Iterator[None]:
    """Compute forward passes in this precision, regardless of the surrounding code's settings."""
    resolved = resolve_precision(precision, device)
    dtype = AUTOCAST.get(resolved)
    autocast = torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)
    with matrix_products_in(resolved), autocast:
        yield


@contextlib.contextmanager
def matrix_products_in(precision: str) -> Iterator[None]:
    """Let float32 matrix products on a GPU use TF32 (10 bits of mantissa) only if precision is "tf32"."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Turn dropout off, and restore the mode of each submodule on exit."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training


def active_precision(device: torch.device) -> str:
    """Return the dtype of the active autocast, such as "bf16". Without autocast, it is "tf32" if enabled, or "fp32"."""
    if not torch.is_autocast_enabled(device.type):
        return "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    dtype = torch.get_autocast_dtype(device.type)
    return {dtype: name for name, dtype in AUTOCAST.items()}.get(dtype, str(dtype).removeprefix("torch."))


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
