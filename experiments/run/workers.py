"""Which share of a job that is done in shards this process takes: of the command line, torchrun's ranks, or SLURM's.

Processes that share by this need not talk to each other.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from datamodules.records import UserError
from experiments.run.children import Children
from lightning_modules.distributed import launch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """This process is number `index` of `count`, and number `local` of its machine."""

    index: int = 0
    count: int = 1
    local: int = 0

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"

    def shards(self, count: int) -> range:
        """Its shards, of count."""
        return range(self.index, count, self.count)

    @property
    def device(self) -> str:
        """The GPU that is its own, or the CPU."""
        if not torch.cuda.is_available():
            return "cpu"
        return f"cuda:{self.local % torch.cuda.device_count()}"


def share_of(part: str, environment: Mapping[str, str] = os.environ) -> Share:
    """The share that part=I/N says, times that of the process among torchrun's ranks or the tasks of an srun.

    Without part, tasks of a SLURM array are parts. Raises UserError for a part that is none.
    """
    index, count = _part(part, environment)
    # A batch script without srun has SLURM_NTASKS too, and is all alone.
    srun = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    for rank, size, local in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), srun):
        among = launch.number(size, 1, environment)
        if among > 1 and rank in environment:
            own, here = (launch.number(name, 0, environment) for name in (rank, local))
            return Share(index * among + own, count * among, here)
    return Share(index, count, launch.number("LOCAL_RANK", 0, environment))


def _part(part: str, environment: Mapping[str, str]) -> tuple[int, int]:
    if part:
        match = re.fullmatch(r"(\d+)/(\d+)", part)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"part: got {part!r}, expected one of 1/8 to 8/8 for the shares of eight processes")
        return int(match[1]) - 1, int(match[2])
    if "SLURM_ARRAY_TASK_COUNT" in environment:
        number, least = (int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN"))
        count, last = (int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in ("COUNT", "MAX"))
        if last - least != count - 1:
            raise UserError(f"the SLURM array must be numbered without gaps, got {count} tasks from {least} to {last}")
        return number - least, count
    return 0, 1


def run_processes(module: str, arguments: Sequence[str], share: Share, devices: int) -> None:
    """Run the entry point in `devices` processes of this machine, which divide the share between them.

    Raises UserError, once all have ended, if some failed.
    """
    cores = torch.get_num_threads()
    with Children() as processes:
        for local in range(devices):
            part = f"part={share.index * devices + local + 1}/{share.count * devices}"
            own = {"LOCAL_RANK": str(local), "OMP_NUM_THREADS": str(max(1, cores // devices))}
            # Not of the launcher that started this process: its share is divided already.
            others = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "SLURM_PROCID")}
            processes.start(module, [*arguments, "devices=1", part], others | own)
        ended = [process.wait() for process in processes.processes]
    failed = [f"{number + 1} (status {status})" for number, status in enumerate(ended) if status]
    if failed:
        raise UserError(f"of {devices} processes failed: {', '.join(failed)}; the same command goes on")
