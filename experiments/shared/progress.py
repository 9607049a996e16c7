"""Show the progress of a long step: as a bar on a terminal, and as a line every 30 seconds in a log."""

from __future__ import annotations

import logging
import time

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

from datamodules.progress_lines import ProgressLines
from experiments.shared.console import table_console
from experiments.shared.plain import plain

log = logging.getLogger(__name__)


class Progress(ProgressLines):
    """Show the progress of a step, used as `with Progress("embedding", "texts", total) as progress:`.

    title: name of the step.
    unit: unit of the count, in the plural; "bytes" are shown as MB.
    total: expected count, if known.
    brief: whether to log nothing if the step takes less than 30 seconds.
    Only the first rank shows a bar.
    """

    def __init__(self, title: str, unit: str = "bytes", total: int | None = None, brief: bool = False):
        super().__init__(title, unit, total)
        self.brief = brief
        self.bar: Bar | None = None
        if (console := table_console()).is_terminal and log.isEnabledFor(logging.INFO):
            amounts = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(),)
            columns = (BarColumn(), *amounts, TimeRemainingColumn())
            self.bar = Bar(TextColumn("{task.description}", markup=False), *columns, console=console, transient=True)
            self.task = self.bar.add_task(plain(title), total=None)

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        elif not self.brief:
            log.info("%s ...", self.title)
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()
        if error[0] is None and not (self.brief and self.logged == self.started):
            log.info("%s: %.0f s", self.title, time.monotonic() - self.started)

    def report(self, done: int, total: int | None) -> None:
        if self.bar:
            self.bar.update(self.task, completed=done, total=total)
        elif self.unit == "bytes":
            goal = f" of {total / 1e6:,.0f}" if total else ""
            self.log_sometimes(f"{done / 1e6:,.0f}{goal} MB")
        else:
            super().report(done, total)

    def say(self, activity: str) -> None:
        """Show the current activity, such as the file being unpacked."""
        if self.bar:
            self.bar.update(self.task, description=plain(f"{self.title}: {activity}"))
        else:
            self.log_sometimes(activity)
