"""Runs the trials of a sweep on this machine: each a process, several beside each other, and goes on after a kill."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from datamodules.records import UserError
from experiments.config.experiment import FOLDER
from experiments.run.endings import PREEMPTED
from experiments.shared.console import near
from experiments.sweeping.file import Sweep
from experiments.sweeping.trial import Trial, environment, trials_of
from lightning_modules.distributed.signals import ASKING, Preempted

log = logging.getLogger(__name__)

HOPELESS = 3  # trials that fail before any has succeeded end the sweep
LOOKS_EVERY = 3.0  # seconds, for early_terminate
TELLS_EVERY = 20.0  # seconds, how far a trial is
ENDED = ("finished", "stopped")  # the latter by early_terminate


class Controller:
    """Runs the trials of a sweep, whose folder holds their runs and trials.jsonl, which says what became of each.

    Several controllers may share a folder, on one machine or on several: a trial is run by one at a time.
    """

    def __init__(self, sweep: Sweep, folder: Path, parallel: int = 1, retry_failed: bool = False):
        self.sweep, self.folder, self.parallel, self.retry_failed = sweep, folder, parallel, retry_failed
        self.trials = trials_of(sweep, folder)
        self.asked: signal.Signals | None = None  # that ends the sweep here
        self._stopped: dict[int, dict[str, Any]] = {}  # trial -> why
        self._failed: list[Trial] = []
        self._succeeded = False
        self._processes: dict[int, subprocess.Popen] = {}
        self._writing = threading.Lock()
        self._slots: SimpleQueue[int] = SimpleQueue()

    def states(self) -> dict[int, dict[str, Any]]:
        """Return the last row of trials.jsonl of each trial. Lines that a kill or a full disk cut short are skipped."""
        path, states = self.folder / "trials.jsonl", {}
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and "trial" in row:
                    states[row["trial"]] = row
        return states

    def run(self) -> None:
        """Run what is left.

        Raises Preempted when a signal asks for the end: trials then have saved. Raises UserError if the first all fail.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for number in ASKING:
            signal.signal(number, self._pass_on)
        for slot in range(self.parallel):
            self._slots.put(slot)
        with ThreadPoolExecutor(self.parallel) as pool:
            free = list(pool.map(lambda trial: self._run(trial, lambda: False), self.trials))
            others = [trial for trial, was_free in zip(self.trials, free, strict=True) if not was_free]
            if others and self.asked is None:
                log.info("%d trials are run by another controller, or by what one left: waiting for them", len(others))
            list(pool.map(lambda trial: self._run(trial, self._wait), others))
        if self.asked is not None:
            raise Preempted(self.asked)
        if self._is_hopeless():
            told = self._failed[-1].end_of_log()
            raise UserError(f"the first {len(self._failed)} trials failed; the last one's log ends with\n{told}")

    def _is_hopeless(self) -> bool:
        return len(self._failed) >= HOPELESS and not self._succeeded

    def _wait(self) -> bool:
        time.sleep(1)
        return self.asked is None

    def _run(self, trial: Trial, wait: Callable[[], bool]) -> bool:
        """Run a trial if that is left to do. Returns whether nobody else had it."""
        if self.asked is not None or self._is_hopeless():
            return True
        slot = self._slots.get()
        try:
            with trial.alone(wait) as lock:
                if lock is None:
                    return False
                state = self.states().get(trial.number, {}).get("state")
                if trial.has_results and state != "finished":  # by a task of an array, or what a controller left
                    self._note(trial, "finished", value=trial.value(self.sweep.metric, self.sweep.maximize))
                elif state not in ENDED and (state != "failed" or self.retry_failed):
                    self._to_its_end(trial, slot, lock)
            return True
        finally:
            self._slots.put(slot)

    def _to_its_end(self, trial: Trial, slot: int, lock: int) -> None:
        """Run a trial until it is finished or failed: again whenever it was preempted."""
        state = "preempted"
        while state == "preempted" and self.asked is None:
            log.info("trial %d of %d: %s", trial.number, len(self.trials), trial.shown)
            self._note(trial, "started")
            began = time.monotonic()
            status = self._once(trial, slot, lock)
            state, value = self._state_after(trial, status), trial.value(self.sweep.metric, self.sweep.maximize)
            why = self._stopped[trial.number] if state == "stopped" else {}
            self._note(trial, state, status=status, seconds=round(time.monotonic() - began, 1), value=value, **why)
            if state in ENDED:
                self._succeeded = True
                log.info("trial %d %s: %s %s", trial.number, state, self.sweep.metric, value)
            elif state == "failed":
                self._failed.append(trial)
                log.error("trial %d failed with status %d; its log is %s", trial.number, status, near(trial.log))
            else:
                log.info("trial %d was preempted, and goes on%s", trial.number, " later" if self.asked else "")

    def _once(self, trial: Trial, slot: int, lock: int) -> int:
        command = trial.command(self.sweep)
        with open(trial.log, "a", encoding="utf-8") as output:
            process = subprocess.Popen(
                command,
                cwd=FOLDER.parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(slot, self.parallel),
                process_group=0,  # signals reach it through this process alone
                pass_fds=[lock],  # if this process is killed, the trial stays locked until its own end
            )
            self._processes[trial.number] = process
            if self.asked is not None:
                self._send(process, self.asked)
            status = self._end_of(trial, process)
            del self._processes[trial.number]
        return trial.status(command[0], status)

    def _end_of(self, trial: Trial, process: subprocess.Popen) -> int:
        """The process's status. It is asked to end when early_terminate gives the trial up."""
        seen, told = 0, time.monotonic()
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(LOOKS_EVERY)
            if time.monotonic() - told >= TELLS_EVERY:
                told = time.monotonic()
                log.info("  trial %d: %s", trial.number, trial.so_far(self.sweep.metric))
            if self.sweep.hyperband is None:
                continue
            values = trial.values(self.sweep.metric)
            if len(values) > seen and trial.number not in self._stopped and self.asked is None:
                self._stop_if_behind(trial, values, process)
            seen = len(values)

    def _stop_if_behind(self, trial: Trial, values: Mapping[int, float], process: subprocess.Popen) -> None:
        """values: step -> the metric."""
        metric, maximize = self.sweep.metric, self.sweep.maximize
        others = [list(other.values(metric).values()) for other in self.trials if other is not trial]
        reason = self.sweep.hyperband.reason(list(values.values()), others, maximize)
        if reason:
            self._stopped[trial.number] = {"step": max(values), "reason": reason}
            # Before the signal: should this process be killed now, another controller leaves the trial alone.
            self._note(trial, "stopped", **self._stopped[trial.number])
            log.info("trial %d is stopped early at step %d: %s", trial.number, max(values), reason)
            self._send(process, signal.SIGTERM)

    def _state_after(self, trial: Trial, status: int) -> str:
        if status == 0 and trial.has_results:
            return "finished"
        if trial.number in self._stopped:
            return "stopped"
        in_queue_again = status == 0 and "SLURM_JOB_ID" in os.environ  # with the job, and so with this process
        return "preempted" if status == PREEMPTED or in_queue_again or self.asked is not None else "failed"

    def _note(self, trial: Trial, state: str, **more: Any) -> None:
        row = {"trial": trial.number, "state": state, "parameters": trial.parameters, "time": round(time.time(), 1)}
        with self._writing, open(self.folder / "trials.jsonl", "ab+", buffering=0) as lines:
            lines.seek(max(0, lines.seek(0, os.SEEK_END) - 1))
            cut_short = lines.read(1) not in (b"", b"\n")  # the next row must not continue such a line
            lines.write(("\n" * cut_short + json.dumps(row | more) + "\n").encode())

    def _pass_on(self, number: int, _frame: object) -> None:
        self.asked = signal.Signals(number)
        for process in list(self._processes.values()):
            self._send(process, self.asked)

    def _send(self, process: subprocess.Popen, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
