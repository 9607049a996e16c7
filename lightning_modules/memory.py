"""Measure memory: allocated on the GPU, or resident in this process."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch


class Memory:
    """Memory in bytes: allocated on the GPU, or resident on the CPU."""

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"

    def now(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.on_gpu else _process_memory("VmRSS")

    def reset_peak(self) -> None:
        """Measure the peak from now on."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def total(self) -> int:
        """Return the memory of the GPU, or of the machine."""
        if self.on_gpu:
            return torch.cuda.get_device_properties(self.device).total_memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def peak(self) -> int:
        """Return the peak memory since the last reset, or since the start."""
        return torch.cuda.max_memory_allocated(self.device) if self.on_gpu else _process_memory("VmHWM")


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the total size of tensors, in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _process_memory(key: str) -> int:
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS only has the peak, in bytes
    lines = status.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))
