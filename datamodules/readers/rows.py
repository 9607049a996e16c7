"""Rows of files, the policy for bad rows, and the records in rows."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from datamodules.readers.checks import check_grade, check_id, check_text
from datamodules.readers.gaps import Gaps
from datamodules.records import Document, UserError, check_choice, short
from datamodules.text import text_key

log = logging.getLogger(__name__)
QUARANTINED_TEXT = 2000  # characters


@dataclass(slots=True)
class Row:
    """A line of a file, an entry of a JSON list or object, or a row of a table, with its location.

    A UserError inside `with row:` goes to the policy for bad lines.

    number: line number, from 1.
    text: the line or entry as in the file.
    entry: number of the entry or row, from 1; None for a plain line.
    value: the parsed entry or row; `as_object` parses a plain line.
    """

    bad: BadLines
    path: Path
    number: int
    text: str
    entry: int | None = None
    value: Any = None

    @property
    def ordinal(self) -> int:
        """Number of the line or entry in its file, counting bad ones. Records without an id are named after it."""
        return self.number if self.entry is None else self.entry

    def __str__(self) -> str:
        return f"{self.path}, line {self.number}" + ("" if self.entry is None else f", entry {self.entry}")

    def __enter__(self) -> Row:
        return self

    def __exit__(self, kind, error, traceback) -> bool:
        if not isinstance(error, UserError):
            return False
        self.bad.report(self, str(error), error)
        return True


class BadLines:
    """The policy for bad lines during one `read()`, used as `with BadLines(...) as bad:`.

    on_error: "fail" raises UserError at the first bad line. "skip" leaves bad lines out, appends them to the quarantine
        file, and logs their number as a warning at the end. If more than half of a file's lines are bad, "skip" also
        raises, because the file probably has another format.
    quarantine: file for skipped lines, by default quarantine.jsonl. Each line is a JSON object with file, line, reason
        and text (the first 2,000 characters).

    gaps: gaps in files that are not damaged, which are logged as warnings at the end.
    """

    POLICIES = ("fail", "skip")

    def __init__(self, on_error: str = "fail", quarantine: str | None = None):
        self.fails = check_choice("on_error", on_error, self.POLICIES) == "fail"
        self.quarantine = Path(quarantine or "quarantine.jsonl")
        self.by_file: Counter[Path] = Counter()
        self.num_lines: Counter[Path] = Counter()
        self.by_reason: Counter[str] = Counter()
        self.gaps = Gaps()
        self._file: TextIO | None = None

    def report(self, row: Row, reason: str, cause: Exception | None = None) -> None:
        """Handle a bad line. Raises UserError under "fail", and if the quarantine file cannot be written."""
        if self.fails:
            raise UserError(f"{row}: {reason}") from cause
        self.by_file[row.path] += 1
        self.by_reason[_without_details(reason)] += 1
        record = {
            "file": str(row.path),
            "line": row.number,
            "reason": reason if row.entry is None else f"entry {row.entry}: {reason}",
            "text": row.text[:QUARANTINED_TEXT],
        }
        try:
            if self._file is None:
                self.quarantine.parent.mkdir(parents=True, exist_ok=True)
                # Bytes that are not UTF-8 are surrogates in the text, and are written as JSON escapes.
                self._file = open(self.quarantine, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{self.quarantine}: cannot write the quarantine file ({error.strerror})") from error

    def end_of_file(self, path: Path, num_lines: int) -> None:
        """Raise UserError if more than half of the file's lines are bad.

        num_lines: number of lines in this pass over the file, including bad ones.
        """
        self.num_lines[path] += num_lines
        bad, total = self.by_file[path], self.num_lines[path]
        if bad * 2 > total:
            raise UserError(
                f"{path}: {bad} of {total} lines are bad, more than half ({self.summary()}). "
                f"{self._question()} The bad lines are in {self.quarantine}"
            )

    def _question(self) -> str:
        if any("not UTF-8" in reason for reason in self.by_reason):
            return "Save the file as UTF-8, or convert it (if it is from Windows: iconv -f WINDOWS-1252 -t UTF-8)."
        return "Is the file in this reader's format?"

    def summary(self) -> str:
        """Return the most frequent reasons with their counts."""
        return "; ".join(f"{count} x {reason}" for reason, count in self.by_reason.most_common(8))

    def __enter__(self) -> BadLines:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._file is not None:
            self._file.close()
            total = self.by_reason.total()
            count = "1 bad line" if total == 1 else f"{total} bad lines"
            log.warning("left out %s, saved in %s: %s", count, self.quarantine, self.summary())
        if kind is None:
            self.gaps.report()


def _without_details(reason: str) -> str:
    """Replace quoted values, numbers and parentheses, which differ from line to line, by dots."""
    return re.sub(r"'.*'|\".*\"|\(.*\)|(?<!UTF-)[0-9]+", "...", reason, flags=re.DOTALL)


class Record(dict[str, Any]):
    """A JSON object or a row of a table. The methods return checked values, and raise UserError for wrong values.

    row: row of the file that contains the object. It also counts gaps in documents.
    """

    row: Row | None = None

    @classmethod
    def of(cls, row: Row | None, values: Mapping[str, Any], **more: Any) -> Record:
        """Return a record of a row. more: values to add or replace."""
        record = cls(values, **more)
        record.row = row
        return record

    def text(self, key: str, required: bool = False) -> str:
        """Return a string. A missing key or null is an empty string, unless it is required."""
        value = self.get(key)
        if value is None and not required:
            return ""
        if not isinstance(value, str):
            raise self._wrong_type(key, "a string")
        return check_text(value, key)

    def words(self, key: str) -> str:
        """Return a string that is not blank."""
        text = self.text(key, required=True)
        if not text.strip():
            raise UserError(f"{key} is empty")
        return text

    def id(self, *keys: str) -> str:
        """Return the id under the first key that exists. It may be a string or an integer."""
        for key in keys:
            if self.get(key) is not None:
                return check_id(self[key], key)
        raise self.missing(" or ".join(keys))

    def array(self, key: str, required: bool = False) -> list[Any]:
        """Return a list. A missing key or null is an empty list, unless it is required."""
        value = self.get(key)
        if value is None and not required:
            return []
        if not isinstance(value, list):
            raise self._wrong_type(key, "a list")
        return value

    def ids(self, key: str, required: bool = False) -> list[str]:
        """Return a list of ids without duplicates."""
        return list(dict.fromkeys(check_id(value, key) for value in self.array(key, required)))

    def grade(self, key: str) -> int:
        """Return a whole number."""
        return check_grade(self.get(key), key)

    def grades(self, key: str) -> dict[str, int]:
        """Return an object that maps ids to scores."""
        value = self.get(key)
        if not isinstance(value, dict):
            raise UserError(f"{key} must be an object that maps ids to scores, got {short(value)}")
        return {check_id(document, key): check_grade(score) for document, score in value.items()}

    def object(self, key: str) -> Record:
        """Return an object inside the record."""
        if not isinstance(self.get(key), dict):
            raise UserError(f"{key} must be an object, got {short(self.get(key))} ({self._keys()})")
        return Record.of(self.row, self[key])

    def document(
        self, *id_keys: str, title: str = "title", body: str = "abstract", id: str = "", may_be_blank: bool = False
    ) -> Document:
        """Return the record as a document.

        id_keys: keys that may contain the id.
        title, body: keys of the title and of the text (see text_key). One of them may be blank.
        id: id for a record without an id.
        may_be_blank: whether both may be blank, for corpus documents. A record with neither key is an error.
        """
        id = id or self.id(*id_keys)
        key = text_key(self, body)
        document = Document(id, self.text(title), self.text(key))
        if document.is_blank and not (may_be_blank and (title in self or key in self)):
            raise UserError(f"document {id!r} has neither {title} nor {body} ({self._keys()})")
        if self.row is not None:
            self.row.bad.gaps.add_document(self.row.path, document, self)
        return document

    def judged(self, documents: Sequence[str], corpus: Container[str]) -> None:
        """Count judged documents, and those of them that are not in the corpus."""
        if self.row is not None:
            self.row.bad.gaps.add_judgements(self.row.path, documents, corpus)

    def missing(self, key: str) -> UserError:
        """Return the error for a missing key."""
        return UserError(f"{key} is missing ({self._keys()})")

    def _wrong_type(self, key: str, expected: str) -> UserError:
        return UserError(f"{key} must be {expected}, got {short(self[key])}") if key in self else self.missing(key)

    def _keys(self) -> str:
        return f"keys here: {', '.join(map(str, self))[:200] or 'none'}"
