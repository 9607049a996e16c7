"""What becomes of a line that a reader cannot use: an error with its place, or the quarantine file and a warning."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from datamodules.records import UserError

log = logging.getLogger(__name__)

QUARANTINED_TEXT = 2000  # characters


@dataclass(slots=True)
class Place:
    """A line of a file. Used as `with place:`, it gives a UserError that is raised inside to the policy.

    entry: counted from 1, and value: as parsed, where the file is one JSON list or object.
    """

    bad: BadLines
    path: Path
    number: int
    text: str
    entry: int | None = None
    value: Any = None

    @property
    def ordinal(self) -> int:
        """Of the line or the entry in its file, whatever is bad before it: for ids of records that have none."""
        return self.number if self.entry is None else self.entry

    def __str__(self) -> str:
        return f"{self.path}, line {self.number}" + ("" if self.entry is None else f", entry {self.entry}")

    def __enter__(self) -> Place:
        return self

    def __exit__(self, kind, error, traceback) -> bool:
        if not isinstance(error, UserError):
            return False
        self.bad.report(self, str(error), error)
        return True


class BadLines:
    """The policy for bad lines during one read(), as `with BadLines(...) as bad:`.

    on_error: "fail" raises UserError with the place of the first bad line. "skip" appends each as a JSON line of file,
    line, reason and text (its first 2,000 characters) to the quarantine file, and warns at the end with their counts.
    A file with more than half of its lines bad is an error under "skip" too: it is not what the reader takes it for.
    """

    POLICIES = ("fail", "skip")

    def __init__(self, on_error: str = "fail", quarantine: str | None = None):
        if on_error not in self.POLICIES:
            raise UserError(f"on_error: got {on_error!r}, allowed are {', '.join(self.POLICIES)}")
        self.fails = on_error == "fail"
        self.quarantine = Path(quarantine or "quarantine.jsonl")
        self.by_file: Counter[Path] = Counter()
        self.by_reason: Counter[str] = Counter()
        self._file: TextIO | None = None

    def report(self, place: Place, reason: str, cause: Exception | None = None) -> None:
        """Say that a line is bad. Raises UserError under "fail", and where the quarantine file cannot be written."""
        if self.fails:
            raise UserError(f"{place}: {reason}") from cause
        self.by_file[place.path] += 1
        self.by_reason[_kind(reason)] += 1
        record = {
            "file": str(place.path),
            "line": place.number,
            "reason": reason if place.entry is None else f"entry {place.entry}: {reason}",
            "text": place.text[:QUARANTINED_TEXT],
        }
        try:
            if self._file is None:
                self.quarantine.parent.mkdir(parents=True, exist_ok=True)
                # A byte that is no UTF-8 is half of a surrogate pair in the text; it is written as a JSON escape.
                self._file = open(self.quarantine, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{self.quarantine}: the quarantine file cannot be written ({error.strerror})") from error

    def end_of_file(self, path: Path, num_lines: int) -> None:
        """Raises UserError if more than half of the file's lines are bad."""
        bad = self.by_file[path]
        if bad * 2 > num_lines:
            raise UserError(
                f"{path}: {bad} of {num_lines} lines are bad, which is more than half ({self.summary()}); "
                f"they stand in {self.quarantine}. Is the file in this reader's format?"
            )

    def summary(self) -> str:
        return "; ".join(f"{count} x {reason}" for reason, count in self.by_reason.most_common(8))

    def __enter__(self) -> BadLines:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._file is not None:
            self._file.close()
            total = self.by_reason.total()
            told = "1 bad line is left out and stands" if total == 1 else f"{total} bad lines are left out and stand"
            log.warning("%s in %s: %s", told, self.quarantine, self.summary())


def _kind(reason: str) -> str:
    """The reason without what differs from line to line: quoted values, numbers, remarks in brackets."""
    return re.sub(r"'.*'|\".*\"|\(.*\)|[0-9]+", "...", reason, flags=re.DOTALL)
