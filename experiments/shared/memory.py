"""Measure memory: allocated on the GPU, or resident in this process."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch


class Memory:
    """Memory in bytes: allocated on the GPU, or resident on the CPU (0 where /proc does not exist)."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"

    def now(self) -> int:
        return torch.cuda.memory_allocated() if self.on_gpu else _process_memory("VmRSS")

    def reset_peak(self) -> None:
        """Measure the peak from now on."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.on_gpu else _process_memory("VmHWM")


def _process_memory(key: str) -> int:
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    lines = status.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))
