"""RIS: exports of reference managers and databases. Needs the package rispy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datamodules.papers.paper_record import (
    Paper,
    doi_names,
    first_text,
    labels_of,
    missing_package,
    split_list,
    without_tags,
    year_of,
)
from datamodules.readers.io import numbered_lines
from datamodules.readers.rows import BadLines, Record, Row
from datamodules.records import UserError, explained, short

TAGGED = re.compile(r"[A-Z][A-Z0-9]  -")
MAX_LINES = 100_000  # maximum number of lines per record
TITLES, ABSTRACTS = ("title", "primary_title"), ("abstract", "notes_abstract")
YEARS = ("year", "publication_year", "date")


def rows(path: Path, bad: BadLines) -> Iterator[Row]:
    """Yield the records. A record without start or end is reported as bad."""
    parser, count = _parser(), 0
    for count, (number, lines) in enumerate(_records(path), start=1):
        row = Row(bad, path, number, "\n".join(lines), count)
        with row:
            row.value = _parse(parser, lines)
        if row.value is not None:
            yield row
    bad.end_of_file(path, count)


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield each record's first line number and lines. A record ends at ER, or before the next TY.

    Lines outside records are skipped if they have no tag, such as the headers of some databases.
    """
    number, lines = 0, list[str]()
    for line_number, line in numbered_lines(path):
        line = line.rstrip("\r\n")
        if lines and (line.startswith("TY  -") or len(lines) >= MAX_LINES):
            yield number, lines
            lines = []
        if lines or TAGGED.match(line):
            number = number if lines else line_number
            lines.append(line)
        if lines and line.startswith("ER  -"):
            yield number, lines
            lines = []
    if lines:
        yield number, lines


def _parse(parser, lines: list[str]) -> dict[str, Any]:
    if not lines[0].startswith("TY  -"):
        raise UserError(f"expected TY as the first field of a record, got {short(lines[0])}")
    if not lines[-1].startswith("ER  -"):
        raise UserError("the record does not end with ER")
    with explained("cannot be read", KeyError, TypeError, ValueError):  # a line that does not continue any field
        (record,) = parser.parse_lines(iter(lines))
    return record


def _parser():
    try:
        import rispy
    except ModuleNotFoundError as error:
        raise missing_package("RIS files", "rispy") from error
    return rispy.RisParser()


def paper(record: Record) -> Paper:
    keywords = [keyword for text in record.array("keywords") for keyword in split_list(text)]
    return Paper(
        id=first_text(record, "id", "accession_number"),
        title=without_tags(first_text(record, *TITLES)),
        abstract=without_tags(first_text(record, *ABSTRACTS)),
        year=year_of(first_text(record, *YEARS)),
        labels={"keywords": labels_of(keywords, "KW")},
        names=doi_names(record.text("doi")),
    )
