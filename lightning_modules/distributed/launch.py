"""Read this process's launcher and rank from the environment, before Lightning does."""

from __future__ import annotations

import os
from collections.abc import Mapping


def number(name: str, default: int | str = 0, environment: Mapping[str, str] = os.environ) -> int:
    """Return an environment variable as an integer. Raises UserError if it is not an integer."""
    value = str(environment.get(name, default))
    if not value.isdecimal():
        from datamodules.records import UserError

        raise UserError(f"environment: {name} is {value!r}, expected a whole number; unset it, or use a launcher")
    return int(value)


def rank(devices: int = 1) -> int:
    """Return the global rank.

    devices: number of ranks per node. Without it, the result may be wrong for ranks other than 0.
    """
    if "RANK" in os.environ:  # torchrun
        return number("RANK")
    if "LOCAL_RANK" not in os.environ and under_srun():
        return number("SLURM_PROCID")
    node = number("NODE_RANK" if "NODE_RANK" in os.environ else "GROUP_RANK")
    return node * devices + number("LOCAL_RANK")


def local_rank() -> int:
    """Return the rank among the processes of this machine."""
    return number("SLURM_LOCALID" if "LOCAL_RANK" not in os.environ and under_srun() else "LOCAL_RANK")


def under_srun() -> bool:
    """Return whether srun started this process itself, not just a shell around it."""
    return "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ and not by_torchrun()


def by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def num_tasks() -> int:
    """Return the number of tasks in the SLURM job step."""
    return number("SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS", 1)


def num_ranks() -> int:
    """Return the number of ranks, whether torchrun, srun or Lightning started them."""
    return number("WORLD_SIZE", num_tasks() if under_srun() else 1)


def alone() -> bool:
    """Return whether this is the only rank, so that no other rank can wait for it."""
    if under_srun() and num_tasks() > 1:
        return False
    return number("WORLD_SIZE", 1) == 1 and "NODE_RANK" not in os.environ


def slurm_job() -> str | None:
    """Return the SLURM job id in the form of scontrol (12, or 12_3 in a job array), or None outside SLURM."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}") for name in ("JOB_ID", "TASK_ID"))
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")
