"""Run the trials of a sweep on this machine, in parallel processes."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import IO, Any

from datamodules.files import append_lines, read_rows
from datamodules.locks import lock_file
from datamodules.records import UserError
from experiments.config.experiment import ROOT
from experiments.config.sweep_file import Sweep, as_override
from experiments.config.sweep_parameters import suggest_trial
from experiments.run.folder import CHANGEABLE
from experiments.run.runner import Runner, log_tail, send
from experiments.shared.console import relative_path
from lightning_modules.distributed.signals import PREEMPTED

log = logging.getLogger(__name__)

MAX_FAILED = 3  # the sweep ends if this many trials fail before any succeeds
POLL_EVERY = 3.0  # seconds between two checks of a trial's logged metric
REPORT_EVERY = 20.0  # seconds between two log lines on a trial's progress
ENDED = ("finished", "stopped")  # stopped: by early_terminate
MAKE_ONLY = ("EXTRAS", "PYTHON", "VENV")  # variables that only make knows


@dataclass(frozen=True)
class Trial:
    """A trial of a sweep.

    values: value of each parameter by key, {} if not chosen yet.
    folder: folder of the trial's run.
    """

    number: int
    values: Mapping[str, Any]
    folder: Path

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    @property
    def has_results(self) -> bool:
        return (self.folder / "results.json").is_file()

    def __str__(self) -> str:
        return " ".join(starmap(as_override, self.values.items()))

    def arguments(self, sweep: Sweep) -> list[str]:
        """Return the key=value arguments that only this trial has."""
        has_group = any(text.startswith("wandb.group=") for text in sweep.overrides)
        folders = {"run.dir": str(self.folder)} | ({} if has_group else {"wandb.group": self.folder.parent.name})
        return [*starmap(as_override, {**self.values, **folders}.items())]

    def metric_values(self, metric: str) -> dict[int, float]:
        """Return the logged values of a metric by step. If a step was logged twice, the last value counts."""
        values = {row["step"]: row[metric] for row in self._rows() if _is_number(row.get(metric))}
        return dict(sorted(values.items()))

    def best(self, metric: str, maximize: bool) -> float | None:
        """Return the best finite value of a metric, or None if there is none yet."""
        values = filter(math.isfinite, self.metric_values(metric).values())
        return (max if maximize else min)(values, default=None)

    def progress(self, metric: str) -> str:
        """Describe the progress of the run."""
        steps, values = [row["step"] for row in self._rows()], self.metric_values(metric)
        if not steps:
            return "starting"
        if not values:
            return f"step {max(steps)}"
        step, value = next(reversed(values.items()))
        return f"step {max(steps)}, {metric} {value:.4f} at step {step}"

    def _rows(self) -> list[dict[str, Any]]:
        return [row for row in read_rows(self.folder / "metrics.jsonl") if _is_number(row.get("step"))]


def trials_of(sweep: Sweep, folder: Path) -> list[Trial]:
    """Return all trials of a sweep. folder: folder of their runs."""
    return [Trial(number, values, folder / f"t{number:03}") for number, values in enumerate(sweep.trials())]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Controller(Runner[Trial]):
    """Runs the trials of a sweep. After a kill, another controller continues the sweep.

    The sweep's folder has the trials' runs, and trials.jsonl with the states of each trial. Several controllers, on one
    or several machines, can share a folder. Only one of them runs a trial at a time.
    """

    def __init__(self, sweep: Sweep, folder: Path, parallel: int = 1, retry_failed: bool = False):
        super().__init__(parallel)
        self.sweep, self.folder, self.retry_failed = sweep, folder, retry_failed
        self.trials = trials_of(sweep, folder)
        self._stop_reasons: dict[int, dict[str, Any]] = {}  # number of a trial that is being stopped -> step and reason
        self._failed: list[Trial] = []
        self._any_succeeded = False
        self._writing = threading.Lock()

    @property
    def settings(self) -> dict[str, str]:
        """Settings of all trials by key, without settings that may change between the attempts of a run."""
        words = (word.partition("=") for word in self.sweep.command([]))
        return {
            key: value
            for key, equals, value in words
            if equals and key not in MAKE_ONLY and not key.startswith(CHANGEABLE)
        }

    def states(self) -> dict[int, dict[str, Any]]:
        """Return each trial's last row in trials.jsonl, by number."""
        types = {"trial": int, "state": str, "parameters": dict}
        rows = read_rows(self.folder / "trials.jsonl")
        return {row["trial"]: row for row in rows if all(isinstance(row.get(key), kind) for key, kind in types.items())}

    def ended(self) -> list[Trial]:
        """Return all ended trials with their values."""
        states = self.states()
        recorded = [(trial, states.get(trial.number, {})) for trial in self.trials]
        return [
            dataclasses.replace(trial, values=row.get("parameters", trial.values))
            for trial, row in recorded
            if trial.has_results or row.get("state") in ENDED
        ]

    def run(self) -> None:
        """Run all trials that have not ended.

        Raises Preempted after a signal, when all trials have saved. Raises UserError if the first trials all fail.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.run_all(self.trials)
        if self._is_hopeless():
            raise UserError(
                f"the first {len(self._failed)} trials failed; the log of the last one ends with\n"
                f"{log_tail(self._failed[-1].log)}"
            )

    def _is_hopeless(self) -> bool:
        return len(self._failed) >= MAX_FAILED and not self._any_succeeded

    def lock_of(self, trial: Trial) -> Path:
        return trial.folder.with_suffix(".lock")

    def may_start(self, trial: Trial) -> bool:
        return not self._is_hopeless()

    def run_item(self, trial: Trial, lock: IO[str]) -> None:
        """Run a trial unless it has ended."""
        recorded = self.states().get(trial.number, {})
        trial = dataclasses.replace(trial, values=recorded.get("parameters", trial.values))
        state = recorded.get("state")
        if trial.has_results and state != "finished":  # the trial ran in a job array, or its controller was killed
            self._record(trial, "finished", value=self._best(trial))
        elif state not in ENDED and (state != "failed" or self.retry_failed):
            self._run_to_its_end(self._start(trial), lock)

    def _start(self, trial: Trial) -> Trial:
        """Record that a trial starts, and return it. For `method: bayes`, this also chooses its values."""
        with lock_file(self.folder / "trials.lock"):  # one controller at a time chooses values
            if not trial.values:
                past = [
                    (row["parameters"], self._best(self.trials[number]))
                    for number, row in sorted(self.states().items())
                    if row["state"] != "failed" and number < len(self.trials)
                ]
                values = suggest_trial(self.sweep.parameters, past, self.sweep.maximize, trial.number)
                trial = dataclasses.replace(trial, values=values)
            self._record(trial, "started")
        return trial

    def _run_to_its_end(self, trial: Trial, lock: IO[str]) -> None:
        """Run a trial, resuming it whenever it is preempted, until it finishes, fails or is stopped."""
        while True:
            log.info("trial %d of %d: %s", trial.number, len(self.trials), trial)
            start = time.monotonic()
            status = self._run_process(trial, lock)
            state, value = self._state(trial, status), self._best(trial)
            reason = self._stop_reasons[trial.number] if state == "stopped" else {}
            self._record(trial, state, status=status, seconds=round(time.monotonic() - start, 1), value=value, **reason)
            if state != "preempted" or self.signal is not None:
                break
            log.info("trial %d was preempted; resuming it", trial.number)
            self._record(trial, "started")
        if state in ENDED:
            self._any_succeeded = True
            log.info("trial %d %s: %s %s", trial.number, state, self.sweep.metric, value)
        elif state == "failed":
            self._failed.append(trial)
            problem = f"with status {status}" if status else f"because it wrote no results.json into {trial.folder}"
            log.error("trial %d failed %s; its log is %s", trial.number, problem, relative_path(trial.log))
        else:
            log.info("trial %d was preempted and will be resumed later", trial.number)

    def _run_process(self, trial: Trial, lock: IO[str]) -> int:
        command = self.sweep.command(trial.arguments(self.sweep))
        if command[0] == "make":  # run it with this interpreter instead of the Makefile's
            words = [word for word in command[1:] if word.partition("=")[0] not in MAKE_ONLY]
            command = [sys.executable, "-m", "experiments", *words]
        with self.process(command, trial.log, lock, ROOT) as process:
            return self._watch(trial, process)

    def _watch(self, trial: Trial, process: subprocess.Popen) -> int:
        """Wait until a process ends, and stop it early if early_terminate says so. Returns the exit status."""
        rule, num_seen, reported = self.sweep.early_terminate, 0, time.monotonic()
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(POLL_EVERY)
            if time.monotonic() - reported >= REPORT_EVERY:
                reported = time.monotonic()
                log.info("  trial %d: %s", trial.number, trial.progress(self.sweep.metric))
            if rule is None or trial.number in self._stop_reasons or self.signal is not None:
                continue
            values = trial.metric_values(self.sweep.metric)
            if len(values) > num_seen:
                num_seen = len(values)
                self._stop_if_behind(trial, values, process)

    def _stop_if_behind(self, trial: Trial, values: Mapping[int, float], process: subprocess.Popen) -> None:
        """Stop a trial that is behind the others. values: its values of the metric by step."""
        metric, rule = self.sweep.metric, self.sweep.early_terminate
        others = [list(t.metric_values(metric).values()) for t in self.trials if t.number != trial.number]
        if reason := rule.reason(list(values.values()), others, self.sweep.maximize):
            self._stop_reasons[trial.number] = {"step": max(values), "reason": reason}
            # Record this before the signal, so that no other controller resumes the trial if this process is killed in
            # between.
            self._record(trial, "stopped", **self._stop_reasons[trial.number])
            log.info("trial %d is stopped early at step %d: %s", trial.number, max(values), reason)
            send(process, signal.SIGTERM)

    def _state(self, trial: Trial, status: int) -> str:
        if status == 0 and trial.has_results:
            return "finished"
        if trial.number in self._stop_reasons:
            return "stopped"
        is_requeued = status == 0 and "SLURM_JOB_ID" in os.environ  # SLURM will requeue the job with all its processes
        return "preempted" if status == PREEMPTED or is_requeued or self.signal is not None else "failed"

    def _best(self, trial: Trial) -> float | None:
        return trial.best(self.sweep.metric, self.sweep.maximize)

    def _record(self, trial: Trial, state: str, **details: Any) -> None:
        row = {"trial": trial.number, "state": state, "parameters": trial.values, "time": round(time.time(), 1)}
        row["settings"] = self.settings
        with self._writing:
            append_lines(self.folder / "trials.jsonl", json.dumps(row | details) + "\n")
