"""Tables with named columns: CSV, TSV, Excel, parquet, and JSON objects without a published format."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import logging
import re
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datamodules.papers.paper_record import (
    LABEL_KINDS,
    Paper,
    clean,
    doi_names,
    labels_of,
    missing_package,
    optional_id,
    split_list,
    without_tags,
    year_of,
)
from datamodules.readers.checks import SPLIT_NAMES
from datamodules.readers.io import numbered_lines
from datamodules.readers.rows import BadLines, Record, Row
from datamodules.records import UserError, check_choice, explained, short
from datamodules.text import TEXT_KEYS

log = logging.getLogger(__name__)

# Usual names of each column, in order of preference. Case, spaces, dashes and underscores do not count. They include
# the names in exports of Scopus, Web of Science, Dimensions and Zotero.
COLUMNS: dict[str, tuple[str, ...]] = {
    "id": ("id", "paperid", "corpusid", "pmid", "key", "eid", "utuniquewosid", "publicationid"),
    "title": ("title", "articletitle", "papertitle", "documenttitle"),
    "abstract": (*TEXT_KEYS, "abstractnote", "summary"),
    "year": ("year", "publicationyear", "pubyear", "date", "publicationdate", "published"),
    "topics": ("topics", "topic", "categories", "category", "labels", "label"),
    "mesh": ("mesh", "meshterms", "meshheadings"),
    "fields": ("fields", "field", "fieldsofstudy", "subjects", "subject", "wosdcategories", "researchareas"),
    "keywords": ("keywords", "keyword", "authorkeywords", "manualtags", "tags"),
    "references": ("references", "citations", "cites", "cited"),
    "doi": ("doi",),
    "split": ("split",),
}
# Characters that may separate the items of a cell. Headings of MeSH contain commas.
SEPARATORS = {"topics": ";|", "mesh": ";|", "fields": ";|,", "keywords": ";|,", "references": ";|, "}
SEPARATOR = re.compile(r'"?sep=([,;|\t])"?', re.IGNORECASE)  # first line of a CSV file for Excel
MAX_CELL = 2**22  # characters; lists of references and full texts exceed csv's default of 131,072
MAX_EXCEL = 2**30  # bytes of an unpacked workbook


def plain_name(column: str) -> str:
    """Return a column's name in lower case, without spaces, dashes and underscores."""
    return "".join(character for character in column.casefold() if character not in " -_")


def parse_columns(pairs: Mapping[str, str]) -> dict[str, str]:
    """Check column names set by a user, such as {"title": "Titel"}."""
    return {check_choice("columns", name, list(COLUMNS)): column for name, column in pairs.items()}


def check_columns(path: Path, record: Record, columns: Mapping[str, str]) -> None:
    """Check the columns of a table, using its first row.

    Raises UserError if the table has neither a title nor an abstract, or lacks a column that the user named.
    """
    names = ", ".join(map(str, record))[:200]
    if unknown := [column for column in columns.values() if column not in record]:
        raise UserError(f"columns: {path} has no column {unknown[0]!r}; expected one of {names}")
    present = {plain_name(str(key)) for key in record}
    missing = [name for name in ("title", "abstract") if name not in columns and present.isdisjoint(COLUMNS[name])]
    if len(missing) == 2:
        raise UserError(f"{path}: no column is called title or abstract (found: {names}); set columns to your names")
    if missing:
        log.warning("%s: no column is called %s (found: %s); set columns to your names", path, missing[0], names)


def paper(record: Record, columns: Mapping[str, str]) -> Paper:
    """Return the paper of a row. columns: column names that differ from the usual ones."""
    values = _values(record, columns)
    return Paper(
        id=optional_id(values, "id"),
        title=without_tags(values.text("title")),
        abstract=without_tags(values.text("abstract")),
        year=year_of(values["year"]),
        labels={kind: labels_of(_items(kind, values[kind]), kind) for kind in LABEL_KINDS},
        references=[(doi_names(name) or [name])[0] for name in _items("references", values["references"])],
        names=doi_names(values["doi"]),
        split="" if values["split"] is None else check_split(values["split"]),
    )


def _values(record: Record, columns: Mapping[str, str]) -> Record:
    """Return a row's cell for each of COLUMNS, or None if the column is missing or the cell is empty."""
    cells: dict[str, Any] = {}
    for column, cell in record.items():
        cells.setdefault(plain_name(str(column)), cell)
    values = Record()
    for name, usual in COLUMNS.items():
        candidates = [record.get(columns[name])] if name in columns else map(cells.get, usual)
        values[name] = next((cell for cell in candidates if cell not in (None, "")), None)
    return values


def _items(name: str, value: Any) -> list[str]:
    """Return the items of a list, which may be a list, JSON, or text with separators."""
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError, RecursionError):  # plain text may also start with a bracket
            value = json.loads(value)
    if isinstance(value, str):
        return split_list(value, SEPARATORS[name])
    if isinstance(value, (int, float)):
        return [str(value)]
    items = [] if value is None else value
    if not isinstance(items, list) or not all(isinstance(item, (str, int)) for item in items):
        raise UserError(f"{name} must be a list, or a text with items separated by ;, got {short(value)}")
    return [clean(str(item), name) for item in items if str(item).strip()]


def check_split(value: Any) -> str:
    """Return "train", "dev" or "test". Raises UserError if the name of the split is unknown."""
    name = str(value).strip().lower()
    if name not in SPLIT_NAMES:
        raise UserError(f"split: expected one of {', '.join(SPLIT_NAMES)}, got {short(value)}")
    return SPLIT_NAMES[name]


# --- rows of files ---


def csv_rows(path: Path, bad: BadLines) -> Iterator[Row]:
    """Yield the rows of a CSV or TSV file. The header decides whether tabs, commas or semicolons separate the cells."""
    csv.field_size_limit(MAX_CELL)
    lines = _Lines(path)
    header, dialect = _csv_header(lines, path)
    count = 0
    for cells, problem in _csv_cells(lines, dialect):
        count += 1
        if not problem and len(cells) != len(header):
            problem = f"has {len(cells)} cells, but the header has {len(header)}"
        if problem:
            bad.report(Row(bad, path, lines.first_number, lines.row[0].rstrip("\r\n"), count), problem)
            lines.read_again_after_first()
        else:
            value = _by_column(zip(header, cells, strict=True))
            yield Row(bad, path, lines.first_number, "".join(lines.row).rstrip("\r\n"), count, value)
    bad.end_of_file(path, count)


def _by_column(cells: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return the cells of a row by column. If columns have the same name, the first one with a value counts."""
    values: dict[str, Any] = {}
    for name, cell in cells:
        if values.get(name) in (None, ""):
            values[name] = cell
    return values


def _csv_header(lines: _Lines, path: Path) -> tuple[list[str], dict[str, Any]]:
    """Read the header, and return its cells and the arguments for csv.reader."""
    line = next((line for line in lines if line.strip()), "")
    separator = SEPARATOR.fullmatch(line.strip())
    if separator:
        line = next((line for line in lines if line.strip()), "")
    dialect: dict[str, Any] = {"delimiter": separator[1] if separator else max("\t,;", key=line.count)}
    dialect["strict"] = True  # otherwise, an open quote swallows all rows up to the next quote
    with explained(f"{path}: the header is not valid CSV", csv.Error):
        header = next(csv.reader([line], **dialect), [])
    return header, dialect


def _csv_cells(lines: _Lines, dialect: dict[str, Any]) -> Iterator[tuple[list[str], str]]:
    """Yield the cells of each row that is not blank, or the reason why the row cannot be read."""
    while True:
        lines.row.clear()
        try:
            cells = next(csv.reader(lines, **dialect), None)
        except csv.Error as error:
            yield [], f"not valid CSV ({error})"
            continue
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield cells, ""


class _Lines:
    """The lines of a file. number: number of the last line that was read. row: lines of the current row."""

    def __init__(self, path: Path):
        self.number, self.row = 0, list[str]()
        self._lines, self._again = numbered_lines(path), deque[tuple[int, str]]()

    @property
    def first_number(self) -> int:
        """Line number at which the current row starts."""
        return self.number - len(self.row) + 1

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        self.number, line = self._again.popleft() if self._again else next(self._lines)
        self.row.append(line)
        return line

    def read_again_after_first(self) -> None:
        """Go back to the second line of the current row, because an open quote joined it with the rows below."""
        first = self.first_number
        self._again.extendleft(reversed(list(enumerate(self.row[1:], start=first + 1))))
        self.number = first


def excel_rows(path: Path, bad: BadLines) -> Iterator[Row]:
    """Yield the rows of the first sheet of an Excel workbook. Raises UserError if it is damaged or too large."""
    try:
        import openpyxl
    except ModuleNotFoundError as error:
        raise missing_package("Excel files", "openpyxl") from error
    count, number, header = 0, 0, None
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > MAX_EXCEL:
            raise UserError(f"{path}: expands to {size:,} bytes, more than {MAX_EXCEL:,}; save it as CSV")
        sheet, *others = openpyxl.load_workbook(path, read_only=True, data_only=True).worksheets
        for number, values in enumerate(sheet.iter_rows(values_only=True), start=1):
            if all(value is None for value in values):
                continue
            if header is None:
                header = values
            else:
                count += 1
                # Some programs leave out trailing cells.
                cells_by_name = itertools.zip_longest(header, map(_plain_cell, values))
                value = _by_column((str(name), cell) for name, cell in cells_by_name if name is not None)
                yield Row(bad, path, number, str(value), count, value)
        if filled := [other.title for other in others if any(map(any, other.iter_rows(values_only=True)))]:
            log.warning("%s: reading only the sheet %s; not read: %s", path, sheet.title, ", ".join(filled))
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # openpyxl raises whatever its parsers raise
        raise UserError(f"{path}: the Excel file is damaged after row {number} ({error})") from error
    bad.end_of_file(path, count)


def _plain_cell(value: Any) -> Any:
    """Return a cell's value, with whole numbers and dates as Excel shows them."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if value is None or isinstance(value, (str, int, float)) else str(value)
