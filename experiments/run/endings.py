"""End a run: exit status, last message, and requeueing in SLURM.

    75     preempted: the same command resumes the run (EX_TEMPFAIL of sysexits.h)
    0      complete; or preempted, with the job back in SLURM's queue
    143    SLURM ended the job with SIGTERM, and decides whether to run it again
    130    Ctrl-C
    2      an error that the user can fix, or a lost rank

After a signal, all ranks but the first exit with 0, because launchers take any other status for a crash.
"""

from __future__ import annotations

import logging
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lightning as L

from datamodules.records import UserError
from experiments.config.experiment import LAST
from experiments.config.schema import Config
from experiments.shared.plain import say
from lightning_modules.callbacks.heartbeat import Heartbeat
from lightning_modules.callbacks.preemption import Preemption
from lightning_modules.checkpoint_files import candidates, read_checkpoint
from lightning_modules.distributed import launch
from lightning_modules.distributed.signals import Preempted
from lightning_modules.loggers import RunLogger

log = logging.getLogger(__name__)

THIS_RUN_ONLY = ("run.dir", "run.resume", "scale", "wandb.name")  # keys that must not be copied to another run


def describe_resuming(folder: Path) -> str:
    """Describe where the same command would resume, according to the run's checkpoints."""
    newest = next(iter(candidates(folder / LAST)), None)
    if newest is None:
        return "the same command starts from the beginning"
    return f"the same command resumes from step {read_checkpoint(newest)['global_step']}"


def next_steps(config: Config, overrides: Sequence[str], folder: Path) -> str:
    """Suggest the report, and the same training with another encoder if the overrides fit it."""
    report = f"Next: make report RUN={shlex.quote(str(folder))}"
    keys = [text.partition("=")[0] for text in overrides]
    if config.extend.model or config.init_from or any(key.startswith(("encoder", "callbacks.")) for key in keys):
        return report
    other = "moe" if config.experiment == "vanilla" else "vanilla"
    return f"{report}, or the same with another encoder: {train_command(other, config, overrides)}"


def train_command(experiment: str, config: Config, overrides: Sequence[str]) -> str:
    """Return the command that trains an experiment with these settings and scale as a new run."""
    shared = [text for text in overrides if text.partition("=")[0] not in THIS_RUN_ONLY]
    scale = [] if config.scale == Config.scale else [f"SCALE={config.scale}"]
    return shlex.join(["make", "train", f"EXP={experiment}", *scale, *shared])


def raise_if_preempted(trainer: L.Trainer) -> None:
    """Raise Preempted if a signal has stopped the training."""
    preemption = next(callback for callback in trainer.callbacks if isinstance(callback, Preemption))
    if preemption.asked:
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.preempted()
        raise Preempted(preemption.asked)


def exit_status(preempted: Preempted, folder: Path) -> int:
    """Log how to resume a preempted run, requeue its SLURM job after SIGUSR1, and return the exit status."""
    if launch.rank() > 0:
        return 0
    if preempted.signal == signal.SIGINT:
        say(f"interrupted: {describe_resuming(folder)}", sys.stderr)
        return preempted.status
    log.info("preempted by %s: %s", preempted, describe_resuming(folder))
    job = launch.slurm_job()
    if job is None:
        return preempted.status
    if preempted.signal == signal.SIGTERM:
        return 128 + signal.SIGTERM
    return 0 if _requeue(job) else preempted.status


def _requeue(job: str) -> bool:
    """Put a SLURM job back into the queue, which ends this attempt. Returns whether SLURM accepted the request."""
    try:
        result = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        problem = (result.stderr.strip() or f"status {result.returncode}") if result.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        log.warning("job %s: scontrol cannot requeue it from here (%s); exiting with status 75", job, problem)
        return False
    log.info("job %s is in the queue again", job)
    return True


@contextmanager
def name_lost_ranks(trainer: L.Trainer) -> Iterator[None]:
    """Turn an error caused by a lost rank into a UserError that names the rank."""
    heartbeat = next(callback for callback in trainer.callbacks if isinstance(callback, Heartbeat))
    try:
        yield
    except RuntimeError as error:  # raised by gloo and NCCL
        lost = _failed_children(trainer) or heartbeat.lost()
        if not lost:
            raise
        if trainer.strategy.launcher:
            trainer.strategy.launcher.kill(signal.SIGKILL)  # a suspended rank would otherwise survive
        resuming = describe_resuming(Path(trainer.default_root_dir))
        raise UserError(f"{' and '.join(lost)} ended or no longer answers; {resuming}") from error
    finally:
        heartbeat.stop()


def _failed_children(trainer: L.Trainer) -> list[str]:
    """Return the names of the ranks that Lightning started here and that failed.

    This must be quick, because Lightning kills this process next.
    """
    children = getattr(trainer.strategy.launcher, "procs", [])
    deadline = time.monotonic() + 0.5  # a dying process closes its connections before it exits
    while children and time.monotonic() < deadline and not any(child.poll() for child in children):
        time.sleep(0.02)
    names = (f"rank {trainer.global_rank + i} (process {child.pid})" for i, child in enumerate(children, start=1))
    return [name for name, child in zip(names, children, strict=True) if child.poll()]
