"""Run the jobs of a study, each after the jobs it needs. A kill only loses the running commands."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from datamodules.files import read_json, write_json
from datamodules.records import UserError
from experiments.config.study_file import Job
from experiments.run.runner import Runner, log_tail
from experiments.shared.console import relative_path
from lightning_modules.distributed.signals import PREEMPTED

log = logging.getLogger(__name__)

PROGRAM = (sys.executable, "-m", "experiments")


class JobRunner(Runner[Job]):
    """Runs incomplete jobs, each after the jobs it needs.

        NAME.json    commands of a job, and the seconds of the completed ones
        NAME.log     their output
        NAME.lock    locked while a process runs the commands

    folder: folder of the study. parallel: number of jobs to run at a time. minutes: time after which to stop.
    """

    def __init__(self, folder: Path, jobs: Sequence[Job], parallel: int = 1, minutes: float | None = None):
        super().__init__(parallel, minutes)
        self.folder, self.jobs = folder, list(jobs)
        self.failed: list[Job] = []
        self._complete: set[str] = set()  # names of jobs

    def run(self) -> None:
        """Run all jobs, except jobs that need a failed one.

        Raises Preempted like run_all, and UserError if a job was started with other commands.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._complete = {job.name for job in self.jobs if is_complete(self.folder, job)}
        self.run_all([job for job in self.jobs if job.name not in self._complete])

    def lock_of(self, job: Job) -> Path:
        return self.folder / f"{job.name}.lock"

    def may_start(self, job: Job) -> bool:
        return job.needs <= self._complete

    def run_item(self, job: Job, lock: IO[str]) -> None:
        seconds, output = seconds_of(self.folder, job), self.folder / f"{job.name}.log"
        while len(seconds) < len(job.commands) and self.signal is None:
            command = job.commands[len(seconds)]
            log.info("%s: %s", job.name, command[0])
            started = time.monotonic()
            status = self._run_command(command, output, lock)
            if self.signal is not None and (status != 0 or "SLURM_JOB_ID" in os.environ):
                return  # in SLURM, a preempted training exits with 0
            if status == 0:
                seconds.append(round(time.monotonic() - started, 1))
                write_json(self.folder / f"{job.name}.json", {"commands": job.commands, "seconds": seconds})
            elif status != PREEMPTED:
                self.failed.append(job)
                log.error(
                    "%s failed with status %d; %s ends with\n%s",
                    job.name,
                    status,
                    relative_path(output),
                    log_tail(output),
                )
                return
        if len(seconds) == len(job.commands):
            self._complete.add(job.name)

    def _run_command(self, command: Sequence[str], output: Path, lock: IO[str]) -> int:
        with self.process([*PROGRAM, *command], output, lock) as process:
            return process.wait()


def is_complete(folder: Path, job: Job) -> bool:
    """Return whether all commands of a job are done."""
    return len(seconds_of(folder, job)) == len(job.commands)


def seconds_of(folder: Path, job: Job) -> list[float]:
    """Return the seconds of each completed command. The last command, the evaluation, only counts if its results exist.

    Raises UserError if a completed command has changed in the study's file; other commands may change.
    """
    path = folder / f"{job.name}.json"
    if not path.is_file():
        return []
    record = read_json(path, {"commands": list, "seconds": list}, "Delete it to run the job again.")
    done = len(record["seconds"])
    now = [list(command) for command in job.commands[:done]]
    if record["commands"][:done] != now:
        then = [word for command in record["commands"][:done] for word in command]
        words = [word for command in now for word in command]
        differing = next(((a, b) for a, b in zip(then, words, strict=False) if a != b), ("more words", "fewer words"))
        raise UserError(
            f"{job.name} was started with other commands ({differing[0]} then, {differing[1]} now); choose another "
            f"output, or delete {relative_path(path)} and the job's results"
        )
    has_results = (job.output / "results.json").is_file()
    return record["seconds"] if has_results else record["seconds"][: len(job.commands) - 1]
