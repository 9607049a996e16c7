"""Run the jobs of a study in parallel processes, each after the jobs it needs. A kill loses only running commands."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from typing import IO

from datamodules.files import read_json, write_json
from datamodules.locks import lock_file
from datamodules.records import UserError
from experiments.config.study_file import Job
from experiments.run.trials import LOG_TAIL, environment, send, start
from experiments.shared.console import near
from lightning_modules.distributed.signals import ASKING, PREEMPTED, Preempted

log = logging.getLogger(__name__)

PROGRAM = (sys.executable, "-m", "experiments")


class JobRunner:
    """Runs jobs that are not complete.

        NAME.json    commands of a job, and the seconds of those that are done
        NAME.log     their output
        NAME.lock    locked while a process runs them, so several machines may share the folder

    folder: folder of the study. parallel: number of jobs to run at a time. minutes: when to stop.
    """

    def __init__(self, folder: Path, jobs: Sequence[Job], parallel: int = 1, minutes: float | None = None):
        self.folder, self.jobs, self.parallel = folder, list(jobs), parallel
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.signal: signal.Signals | None = None  # signal that asked this runner to end
        self.failed: list[Job] = []
        self._processes: dict[str, subprocess.Popen] = {}
        self._slots: SimpleQueue[int] = SimpleQueue()

    def run(self) -> None:
        """Run all jobs, except those that need a job that has failed.

        Raises Preempted after a signal or when the time is up; the commands that can resume have saved by then.
        Raises UserError if a job was begun with other commands.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        waiting = [job for job in self.jobs if not is_complete(self.folder, job)]
        complete = {job.name for job in self.jobs} - {job.name for job in waiting}
        for number in ASKING:
            signal.signal(number, lambda received, _frame: self._stop(signal.Signals(received)))
        for slot in range(self.parallel):
            self._slots.put(slot)
        running: dict[Future[bool], Job] = {}
        with ThreadPoolExecutor(self.parallel) as pool:
            while True:
                ready = [job for job in waiting if job.needs <= complete and self.signal is None]
                waiting = [job for job in waiting if job not in ready]
                running |= {pool.submit(self._run, job): job for job in ready}
                if not running:
                    break
                for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    if future.result():
                        complete.add(job.name)
                if self.signal is None and self.deadline is not None and time.monotonic() > self.deadline:
                    log.info("the time is up, so running commands save and end")
                    self._stop(signal.SIGTERM)
        if self.signal is not None:
            raise Preempted(self.signal)

    def _stop(self, number: signal.Signals) -> None:
        self.signal = number
        for process in list(self._processes.values()):
            send(process, number)

    def _run(self, job: Job) -> bool:
        """Run the rest of a job's commands. Returns whether it is complete."""
        slot = self._slots.get()
        path = self.folder / f"{job.name}.lock"
        try:
            while (lock := lock_file(path, wait=False)) is None:  # another process runs it
                if self.signal is not None:
                    return False
                time.sleep(1)
            with lock:
                return self._run_commands(job, slot, lock)
        finally:
            self._slots.put(slot)

    def _run_commands(self, job: Job, slot: int, lock: IO[str]) -> bool:
        seconds = seconds_of(self.folder, job)
        while len(seconds) < len(job.commands) and self.signal is None:
            command = job.commands[len(seconds)]
            log.info("%s: %s", job.name, command[0])
            started = time.monotonic()
            status = self._run_process(job, command, slot, lock)
            if self.signal is not None and (status != 0 or "SLURM_JOB_ID" in os.environ):
                return False  # in SLURM, a preempted training ends with 0
            if status == 0:
                seconds.append(round(time.monotonic() - started, 1))
                write_json(self._record(job), {"commands": job.commands, "seconds": seconds})
            elif status != PREEMPTED:
                self.failed.append(job)
                tail = "\n".join(self._log(job).read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL:])
                log.error("%s failed with status %d; %s ends with\n%s", job.name, status, near(self._log(job)), tail)
                return False
        return len(seconds) == len(job.commands)

    def _run_process(self, job: Job, command: Sequence[str], slot: int, lock: IO[str]) -> int:
        process = start([*PROGRAM, *command], self._log(job), environment(slot, self.parallel), lock)
        self._processes[job.name] = process
        if self.signal is not None:  # the signal came before the process was registered
            send(process, self.signal)
        try:
            return process.wait()
        finally:
            del self._processes[job.name]

    def _record(self, job: Job) -> Path:
        return self.folder / f"{job.name}.json"

    def _log(self, job: Job) -> Path:
        return self.folder / f"{job.name}.log"


def is_complete(folder: Path, job: Job) -> bool:
    """Return whether all commands of a job are done."""
    return len(seconds_of(folder, job)) == len(job.commands)


def seconds_of(folder: Path, job: Job) -> list[float]:
    """Return the seconds of each completed command. The last one, the evaluation, counts only if its results exist.

    Raises UserError if the job was begun with other commands.
    """
    path = folder / f"{job.name}.json"
    if not path.is_file():
        return []
    record = read_json(path, {"commands": list, "seconds": list}, "Delete it to run the job again.")
    now = [list(command) for command in job.commands]
    if record["commands"] != now:
        then = [word for command in record["commands"] for word in command]
        words = [word for command in now for word in command]
        differing = next(((a, b) for a, b in zip(then, words, strict=False) if a != b), ("more words", "fewer words"))
        raise UserError(
            f"{job.name} was begun with other commands ({differing[0]} then, {differing[1]} now); choose another "
            f"output, or delete {near(path)} and what the job has made"
        )
    has_results = (job.output / "results.json").is_file()
    return record["seconds"] if has_results else record["seconds"][: len(job.commands) - 1]
