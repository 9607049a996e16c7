"""Log the progress of a long step, with a line every 30 seconds."""

from __future__ import annotations

import logging
import time

log = logging.getLogger(__name__)

EVERY = 30  # seconds between two lines


class ProgressLines:
    """Log the progress of a step, unless it ends within EVERY seconds.

    title: name of the step.
    unit: unit of the count, in the plural.
    total: expected count, if known.
    """

    def __init__(self, title: str, unit: str, total: int | None = None):
        self.title, self.unit, self.total = title, unit, total
        self.started = self.logged = time.monotonic()
        self.done = 0

    def advance(self, count: int) -> None:
        self.done += count
        self.report(self.done, self.total)

    def report(self, done: int, total: int | None) -> None:
        rate = done / max(time.monotonic() - self.started, 1e-9)
        remaining = f", {(total - done) / rate / 60:,.0f} min left" if total and rate else ""
        goal = f" of {total:,}" if total else ""
        self.log_sometimes(f"{done:,}{goal} {self.unit}, {rate:,.1f}/s{remaining}")

    def log_sometimes(self, text: str) -> None:
        if time.monotonic() - self.logged >= EVERY:
            self.logged = time.monotonic()
            log.info("%s: %s", self.title, text)
