"""Run evaluate, mine or embed in several processes. This module starts them, or the user with torchrun or srun.

It uses torchrun's launcher, because Lightning's launcher, which training uses, kills the command with SIGKILL if a
process fails. That would give no useful exit status.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from datamodules.records import UserError, reason
from experiments.shared.console import verbosity
from experiments.shared.plain import say
from lightning_modules.distributed import launch
from lightning_modules.retrieval.compute import default_device

LAUNCHER = "SCIMULT_LAUNCHER"  # environment variable with the id of the process that launched this one
GRACE = 10.0  # seconds that a rank waits before it raises an error, which another rank may have caused
PR_SET_PDEATHSIG = 1  # option of Linux's prctl: signal for this process when its parent ends
TORCHRUN_LOGGERS = ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api")


def run_on_ranks(work: Callable[[], None], command: str, arguments: Sequence[str], devices: int) -> None:
    """Run a command's work on all ranks: in `devices` processes on this machine, or in those of torchrun or srun.

    work: function that each rank calls.
    command, arguments: module and arguments to run in each process. They must lead to this function again, which then
        calls `work`.
    If one rank fails, all ranks end. Raises UserError if there are fewer GPUs than devices, or if a launcher started
    a different number of processes.
    """
    num_ranks = launch.num_ranks()
    if num_ranks == 1 and devices > 1:
        if torch.cuda.is_available() and devices > torch.cuda.device_count():
            raise UserError(f"devices: got {devices}, but this machine has {torch.cuda.device_count()} GPUs")
        launch_processes(command, arguments, devices)
    elif devices not in (1, num_ranks):
        raise UserError(f"devices: got {devices}, but the launcher started {num_ranks} processes; leave out devices=")
    elif num_ranks == 1:
        work()
    else:
        end_with_launcher()
        _work_as_rank(work)


def launch_processes(command: str, arguments: Sequence[str], devices: int) -> None:
    """Run `python -m command arguments` in `devices` processes, with torchrun's environment variables.

    If one process fails, the others are stopped. After a UserError, which the process has printed, this exits with
    status 2. Raises UserError if a process was killed or failed in another way.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in TORCHRUN_LOGGERS:  # they would report each failure again
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // devices))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        # Leave out SIGINT, so that Ctrl-C raises KeyboardInterrupt, and SIGHUP, which nohup ignores.
        signals_to_handle="SIGTERM",
        shutdown_timeout=5,
    )
    try:
        elastic_launch(config, sys.executable)("-m", command, *arguments, *verbosity())
    except SignalException as error:
        say(f"ended by {error.sigval.name}", sys.stderr)
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == 2:  # a UserError
            sys.exit(2)
        status = f"status {failure.exitcode}" if failure.exitcode > 0 else signal.Signals(-failure.exitcode).name
        raise UserError(
            f"process {rank + 1} of {devices} ended with {status}; the same command continues where this one ended"
        ) from error


@contextmanager
def connection_explained() -> Iterator[None]:
    """Turn the errors of ranks that cannot connect into a UserError."""
    try:
        yield
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise UserError(
            f"environment: the ranks cannot connect ({reason(error)}). Start all of them with the same MASTER_ADDR and "
            "MASTER_PORT; on a single machine, unset both"
        ) from error


def end_with_launcher() -> None:
    """Make sure that this process ends with the command that launched it, even if that command is killed.

    torchrun's launcher stops its processes when it shuts down, but if it is killed, they would outlive it.
    """
    if LAUNCHER not in os.environ:
        return
    launcher = int(os.environ[LAUNCHER])
    try:
        watched = ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) == 0
    except (AttributeError, OSError, TypeError):  # not Linux
        watched = False
    if os.getppid() != launcher:  # the launcher ended before prctl was called
        os.kill(os.getpid(), signal.SIGKILL)
    if not watched:
        threading.Thread(target=_watch, args=(launcher,), daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def _work_as_rank(work: Callable[[], None]) -> None:
    """Call `work` as one rank of the process group. If there are GPUs, each rank has its own."""
    if "RANK" not in os.environ:
        _translate_slurm()
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        # gloo exchanges Python objects, even if tensors are on GPUs.
        with connection_explained():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        work()
        dist.barrier()
    except (UserError, RuntimeError) as error:
        # Another rank may have raised the same error, or caused this one. If so, the launcher stops this process during
        # the wait, and the error is only printed once.
        if launch.rank() > 0 or isinstance(error, RuntimeError):
            time.sleep(GRACE)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _translate_slurm() -> None:
    """Set torch.distributed's environment variables from srun's."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    first_node = SLURMEnvironment.resolve_root_node_address(os.environ.get("SLURM_NODELIST", "127.0.0.1"))
    os.environ.setdefault("MASTER_ADDR", first_node)
    os.environ.setdefault("MASTER_PORT", str(15_000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 10_000))
    os.environ |= {"WORLD_SIZE": str(launch.num_tasks()), "RANK": os.environ["SLURM_PROCID"]}
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]


@dataclass(frozen=True)
class Share:
    """One process's share of work that is divided into shards.

    index, count: index of this process, and number of processes.
    local_rank: index of this process on this machine.
    """

    index: int = 0
    count: int = 1
    local_rank: int = 0

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"

    def shards(self, count: int) -> range:
        """Return the numbers of this process's shards, out of `count`."""
        return range(self.index, count, self.count)

    @property
    def device(self) -> torch.device:
        """The GPU of this process, or the CPU if there are no GPUs."""
        return default_device(self.local_rank)


def share_of(part: str, environment: Mapping[str, str] = os.environ) -> Share:
    """Return this process's share of a job whose processes never communicate.

    part: "I/N" for the I-th of N parts; by default, this task of a SLURM array. Ranks of torchrun or tasks of srun
        divide the part further.
    Raises UserError if the part is invalid.
    """
    index, count = _parse_part(part, environment)
    # SLURM_NTASKS would be wrong here: it is also set in a batch script without srun, which is a single process.
    srun = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    for rank_key, size_key, local_key in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), srun):
        size = launch.number(size_key, 1, environment)
        if size > 1 and rank_key in environment:
            rank, local_rank = (launch.number(key, 0, environment) for key in (rank_key, local_key))
            return Share(index * size + rank, count * size, local_rank)
    return Share(index, count, launch.number("LOCAL_RANK", 0, environment))


def _parse_part(part: str, environment: Mapping[str, str]) -> tuple[int, int]:
    """Return the index of the part, from 0, and the number of parts."""
    if part:
        match = re.fullmatch(r"(\d+)/(\d+)", part)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"part: expected I/N with I from 1 to N, such as 3/8, got {part!r}")
        return int(match[1]) - 1, int(match[2])
    if "SLURM_ARRAY_TASK_COUNT" in environment:
        number, first, last, count = (
            launch.number(f"SLURM_ARRAY_TASK_{name}", "", environment) for name in ("ID", "MIN", "MAX", "COUNT")
        )
        if last - first != count - 1:
            raise UserError(
                f"SLURM array: expected task numbers without gaps, got {count} tasks from {first} to {last}; use "
                f"--array=1-{count}"
            )
        return number - first, count
    return 0, 1
