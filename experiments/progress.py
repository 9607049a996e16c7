"""How far a long step is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import time

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

log = logging.getLogger(__name__)

EVERY = 30  # seconds between lines


class Progress:
    """Used as `with Progress(what) as progress:`. unit: of what is reported, bytes or a word for what is counted.

    On a terminal only the first of several ranks shows a bar.
    """

    def __init__(self, what: str, unit: str = "bytes"):
        self.what, self.unit, self.started = what, unit, time.monotonic()
        self.told = self.started
        self.bar: Bar | None = None
        if (console := Console()).is_terminal and log.isEnabledFor(logging.INFO):
            amounts = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(),)
            columns = (BarColumn(), *amounts, TimeRemainingColumn())
            self.bar = Bar(TextColumn("{task.description}"), *columns, console=console, transient=True)
            self.task = self.bar.add_task(what, total=None)

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        else:
            log.info("%s ...", self.what)
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()
        if error[0] is None:
            log.info("%s: %.0f s", self.what, time.monotonic() - self.started)

    def report(self, done: int, total: int | None) -> None:
        """So many bytes, or things, are done."""
        if self.bar:
            self.bar.update(self.task, completed=done, total=total)
        elif self.unit != "bytes":
            rate = done / (time.monotonic() - self.started)
            left = f", {(total - done) / rate / 60:,.0f} minutes left" if total and rate else ""
            self._now_and_then(f"{done:,} of {total or 0:,} {self.unit}, {rate:,.1f}/s{left}")
        else:
            share = f" of {total / 1e6:,.0f}" if total else ""
            self._now_and_then(f"{done / 1e6:,.0f}{share} MB")

    def say(self, what: str) -> None:
        """What is being done."""
        if self.bar:
            self.bar.update(self.task, description=f"{self.what}: {what}")
        else:
            self._now_and_then(what)

    def _now_and_then(self, what: str) -> None:
        if time.monotonic() - self.told >= EVERY:
            self.told = time.monotonic()
            log.info("%s: %s", self.what, what)


class Counter:
    """How many of a known number are done, by rank 0: a bar on a terminal, else a line now and then.

    Used as `with Counter(what, unit, total) as counter: ... counter.advance(n)`.
    """

    def __init__(self, what: str, unit: str, total: int):
        self.what, self.unit, self.total, self.done = what, unit, total, 0
        self.told = self.started = time.monotonic()
        self.silent = rank_zero_only.rank > 0
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self.bar = Bar(*columns, transient=True, disable=self.silent or not Console().is_terminal or not total)

    def __enter__(self) -> Counter:
        self.bar.start()
        self.task = self.bar.add_task(self.what, total=self.total or None)
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def advance(self, count: int) -> None:
        self.done += count
        self.bar.advance(self.task, count)
        now = time.monotonic()
        if self.bar.disable and not self.silent and now - self.told >= EVERY:
            self.told = now
            left = (self.total - self.done) * (now - self.started) / max(1, self.done)
            done = f"{self.done:,} of {self.total:,} {self.unit}"
            log.info("%s: %s, about %.0f s to go", self.what, done, max(0.0, left))
