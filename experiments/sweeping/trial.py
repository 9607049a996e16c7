"""One trial of a sweep: its folder, its command and environment, and what its process came to."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.locks import lock_file
from experiments.sweeping.file import Sweep, as_override

SHOWN = 15  # lines of a failed trial's log
OF_MAKE = ("EXTRAS", "PY", "PYTHON", "VENV")  # variables of make that its trials' make needs too


@dataclass(frozen=True)
class Trial:
    """folder: of its run; its log lies beside, under the same name."""

    number: int
    parameters: Mapping[str, Any]
    folder: Path

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    @property
    def shown(self) -> str:
        return " ".join(as_override(key, value) for key, value in self.parameters.items())

    @property
    def has_results(self) -> bool:
        return (self.folder / "results.json").is_file()

    def arguments(self, sweep: Sweep) -> list[str]:
        """key=value that are this trial's own."""
        own = [as_override(key, value) for key, value in self.parameters.items()]
        grouped = any(text.startswith("wandb.group=") for text in sweep.overrides)
        return [*own, f"run.dir={self.folder}", *([] if grouped else [f"wandb.group={self.folder.parent.name}"])]

    def command(self, sweep: Sweep) -> list[str]:
        command = sweep.command(self.arguments(sweep))
        return command + _variables_of_make() if command[0] == "make" else command

    def values(self, metric: str) -> dict[int, float]:
        """Step -> what the run logged of a metric, in order; of two rows of a step, the later counts."""
        found = {row["step"]: row[metric] for row in self._rows() if _is_number(row.get(metric))}
        return dict(sorted(found.items()))

    def so_far(self, metric: str) -> str:
        """How far the run is, in words."""
        steps, values = [row["step"] for row in self._rows()], self.values(metric)
        if not steps:
            return "starting"
        step, value = next(reversed(values.items()), (0, 0.0))
        return f"step {max(steps)}" + (f", {metric} {value:.4f} at step {step}" if values else "")

    def _rows(self) -> list[dict[str, Any]]:
        """What the run logged, as it was written."""
        path, rows = self.folder / "metrics.jsonl", []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            with suppress(ValueError):  # a line that is just being written, or a part of it
                row = json.loads(line)
                if isinstance(row, dict) and _is_number(row.get("step")):
                    rows.append(row)
        return rows

    def value(self, metric: str, maximize: bool) -> float | None:
        """The best of those that are finite."""
        return (max if maximize else min)(filter(math.isfinite, self.values(metric).values()), default=None)

    def end_of_log(self) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN:])

    def status(self, command: str, status: int) -> int:
        """The status of the training: make itself ends with 2 whatever it was, and says it in its last line."""
        if command != "make" or status != 2:
            return status
        told = re.findall(r"^make: \*\*\* .* Error (\d+)$", self.end_of_log(), re.MULTILINE)
        return int(told[-1]) if told else status

    @contextmanager
    def alone(self, wait: Callable[[], bool]) -> Iterator[int | None]:
        """A lock on the trial, to be inherited by its process.

        None while another controller runs it, or a process that a killed one left. wait: whether to try again.
        """
        while (lock := lock_file(self.folder.with_suffix(".lock"), wait=False)) is None and wait():
            pass
        with lock or nullcontext():
            yield lock.fileno() if lock else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def trials_of(sweep: Sweep, folder: Path) -> list[Trial]:
    """All trials of a sweep, with their folders in one."""
    return [Trial(number, values, folder / f"t{number:03}") for number, values in enumerate(sweep.trials())]


def _variables_of_make() -> list[str]:
    given = [word for word in shlex.split(os.environ.get("MAKEFLAGS", "")) if word.partition("=")[0] in OF_MAKE]
    own = [] if any(word.startswith("PY=") for word in given) else [f"PY={sys.executable}"]
    return [*given, *own]


def environment(slot: int, parallel: int) -> dict[str, str]:
    """Of a trial: without what the make above set; of several beside each other, each has one GPU, in turns."""
    found = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    found |= {"LC_ALL": "C", "PYTHONUNBUFFERED": "1"}
    if parallel > 1 and (gpus := _gpus()):
        found["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return found


def _gpus() -> list[str]:
    import torch

    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return seen.split(",") if seen else [str(i) for i in range(torch.cuda.device_count())]
