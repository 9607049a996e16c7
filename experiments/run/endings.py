"""How a training ends before it is done: with which words, with which status, and under SLURM in the queue again.

    75     it goes on when the same command is run again (EX_TEMPFAIL of sysexits.h)
    0      the same, and SLURM runs it again by itself
    143    SLURM ends the job by SIGTERM, and knows itself whether it runs again
    130    Ctrl-C
    2      an error that the user can mend; a lost rank too

Asked by a signal, all ranks but the first end with 0: launchers take anything else for a crash.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L

from datamodules.records import UserError
from experiments.config.paths import LAST
from lightning_modules.callbacks.heartbeat import Heartbeat
from lightning_modules.callbacks.preemption import Preemption
from lightning_modules.checkpoint_files import candidates, read_checkpoint
from lightning_modules.distributed import launch
from lightning_modules.distributed.signals import Preempted
from lightning_modules.loggers import RunLogger

log = logging.getLogger(__name__)

PREEMPTED = 75


def how_to_go_on(folder: Path) -> str:
    """What the same command does, by the run's last checkpoint."""
    newest = next(iter(candidates(folder / LAST)), None)
    if newest is None:
        return "the same command starts anew"
    return f"the same command goes on from step {read_checkpoint(newest)['global_step']}"


def raise_if_preempted(trainer: L.Trainer) -> None:
    """Raise Preempted if the training was stopped by a signal."""
    preemption = next(callback for callback in trainer.callbacks if isinstance(callback, Preemption))
    if preemption.asked:
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.preempted()
        raise Preempted(preemption.asked)


def answer(preempted: Preempted, folder: Path) -> int:
    """Tell what becomes of the run that lies in a folder. Returns the process's exit status."""
    if launch.rank() > 0:
        return 0
    if preempted.signal == signal.SIGINT:
        print(f"interrupted: {how_to_go_on(folder)}", file=sys.stderr)
        return 128 + signal.SIGINT
    log.info("preempted by %s: %s", preempted, how_to_go_on(folder))
    job = launch.slurm_job()
    if job is None:
        return PREEMPTED
    if preempted.signal == signal.SIGTERM:
        return 128 + signal.SIGTERM
    return 0 if _requeue(job) else PREEMPTED


def _requeue(job: str) -> bool:
    """Put the SLURM job into the queue again, which ends it here. Returns whether that could be done."""
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        problem = (done.stderr.strip() or f"status {done.returncode}") if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        log.warning("job %s cannot be put into the queue again from here (%s): ending with status 75", job, problem)
        return False
    log.info("job %s is in the queue again", job)
    return True


@contextmanager
def naming_lost_ranks(trainer: L.Trainer) -> Iterator[None]:
    """What fails because another rank was lost ends in a UserError that names it."""
    heartbeat = next(callback for callback in trainer.callbacks if isinstance(callback, Heartbeat))
    try:
        yield
    except RuntimeError as error:  # as gloo and NCCL call it
        lost = _ended_children(trainer) or heartbeat.lost()
        if not lost:
            raise
        if trainer.strategy.launcher:
            trainer.strategy.launcher.kill(signal.SIGKILL)  # a rank that is stopped would stay
        raise UserError(
            f"{' and '.join(lost)} ended or no longer answers; {how_to_go_on(Path(trainer.default_root_dir))}"
        ) from error
    finally:
        heartbeat.stop()


def _ended_children(trainer: L.Trainer) -> list[str]:
    """Of the ranks that Lightning started from here, those that failed. At once, for it kills this one after them."""
    children = getattr(trainer.strategy.launcher, "procs", [])
    deadline = time.monotonic() + 0.5  # connections close before the process has ended
    while children and time.monotonic() < deadline and not any(child.poll() for child in children):
        time.sleep(0.02)
    names = (f"rank {trainer.global_rank + i} (process {child.pid})" for i, child in enumerate(children, start=1))
    return [name for name, child in zip(names, children, strict=True) if child.poll()]
