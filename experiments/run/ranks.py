"""Processes that share the work of an entry point as ranks: those of torchrun or srun, or started here.

Beside training, whose ranks Lightning starts.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from subprocess import DEVNULL, Popen

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from datamodules.records import UserError
from experiments.run.children import Children
from experiments.shared.console import whole_number
from lightning_modules.distributed import launch

GRACE = 3.0  # seconds in which the rank whose error it is may tell it


@contextmanager
def ranks(module: str, arguments: Sequence[str], devices: str) -> Iterator[None]:
    """Within, this process is one of several, on a device of its own (as "cuda"), if it is to be.

    module, arguments: the entry point that the others run too. devices: as given on the command line. When one rank
    ends with an error, all end. Raises UserError for devices that are not there, or beside a launcher's.
    """
    count = whole_number("devices", devices)
    with _Others() as others:
        _start(others, module, arguments, count)
        several = launch.num_ranks() > 1
        try:
            if several:
                _join()
            yield
            if several:
                dist.barrier()
        except (UserError, RuntimeError) as error:
            if several and (launch.rank() > 0 or isinstance(error, RuntimeError)):
                time.sleep(GRACE)  # it may be the echo of another rank's, which then ends this process
            raise
        finally:
            others.end()
            if dist.is_initialized():
                dist.destroy_process_group()


def _start(others: _Others, module: str, arguments: Sequence[str], count: int) -> None:
    if launch.num_ranks() > 1:
        if count not in (1, launch.num_ranks()):
            raise UserError(f"devices: got {count}, but the launcher started {launch.num_ranks()} processes")
        if "RANK" not in os.environ:
            _tell_of_slurm()
    elif count > 1:
        if torch.cuda.is_available() and count > torch.cuda.device_count():
            raise UserError(f"devices: got {count}, and there are {torch.cuda.device_count()} GPUs here")
        others.start_ranks(module, arguments, count)


class _Others(Children):
    """The ranks that this one, the first, starts on this machine."""

    def start_ranks(self, module: str, arguments: Sequence[str], count: int) -> None:
        """Become rank 0 of count."""
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port())}
        os.environ |= {"WORLD_SIZE": str(count), "RANK": "0", "LOCAL_RANK": "0"}
        threads = max(1, torch.get_num_threads() // count)
        torch.set_num_threads(threads)
        for rank in range(1, count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": str(threads)}
            # Ctrl-C reaches the first rank alone, which then ends the others.
            process = self.start(module, arguments, os.environ | own, stdin=DEVNULL, start_new_session=True)
            threading.Thread(target=self._end_with, args=(rank, process), daemon=True).start()

    def _end_with(self, rank: int, process: Popen) -> None:
        """End all when one has ended with an error, for this process may wait for it for ever."""
        status = process.wait()
        if status and not self.over:
            self.end()
            print(f"error: rank {rank} ended with status {status}", file=sys.stderr, flush=True)
            os._exit(2)


def _tell_of_slurm() -> None:
    """What torch.distributed reads of srun's ranks."""
    first = SLURMEnvironment.resolve_root_node_address(os.environ.get("SLURM_NODELIST", "127.0.0.1"))
    os.environ.setdefault("MASTER_ADDR", first)
    os.environ.setdefault("MASTER_PORT", str(15_000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 10_000))
    os.environ |= {"WORLD_SIZE": str(launch.num_tasks()), "RANK": os.environ["SLURM_PROCID"]}
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]


def _join() -> None:
    """Meet the other ranks, on a GPU of its own where there are some."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    # Objects are exchanged by gloo in any case.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
