"""How far a long step is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

log = logging.getLogger(__name__)

EVERY = 30  # seconds between lines


class Progress:
    """Used as `with Progress(what) as progress:`. unit: of what is reported, bytes or a word for what is counted.

    On a terminal only the first of several ranks shows a bar. brief: tell of nothing that takes less than EVERY
    seconds. total: of what advance counts.
    """

    def __init__(self, what: str, unit: str = "bytes", total: int | None = None, brief: bool = False):
        self.what, self.unit, self.started = what, unit, time.monotonic()
        self.total, self.done, self.brief = total, 0, brief
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
        elif not self.brief:
            log.info("%s ...", self.what)
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()
        if error[0] is None and not (self.brief and self.told == self.started):
            log.info("%s: %.0f s", self.what, time.monotonic() - self.started)

    def advance(self, count: int) -> None:
        """So many more are done."""
        self.done += count
        self.report(self.done, self.total)

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
