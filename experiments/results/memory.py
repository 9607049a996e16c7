"""The memory that a step takes: of the GPU, or of this process."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch


class Memory:
    """Of the GPU, or of this process; 0 where the system does not tell (on Linux it does)."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"

    def now(self) -> int:
        return torch.cuda.memory_allocated() if self.on_gpu else _of_process("VmRSS")

    def forget_peak(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.on_gpu else _of_process("VmHWM")


def _of_process(key: str) -> int:
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    lines = status.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))
