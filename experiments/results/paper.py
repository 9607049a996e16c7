"""The figures of the paper's tables, as data: experiments/tables/*.yaml.

Source: Zhang et al., Pre-training Multi-task Contrastive Learning Models for Scientific Literature Understanding,
Findings of EMNLP 2023; and the leaderboard of PMC-Patients, for the later version of its data.

A row of a table is a line of cells as they are printed there, in percent, with the average behind a bar:

    SciBERT: 79.7† 18.81 80.7† 12.29 | 47.88      † quoted there from another paper, ‡ computed there from a released
                                                  output, – not there
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from datamodules.records import UserError
from lightning_modules.retrieval.metrics import parse_metric

FOLDER = Path(__file__).parents[1] / "tables"
MARKS = {"†": "quoted", "‡": "computed"}
ABSENT = "–"
COLUMN_KEYS = {"protocol", "metrics", "queries", "documents", "similarity"}


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure in percent. decimals: that are printed. mark: "quoted" or "computed", where it is no measurement."""

    value: float
    decimals: int
    mark: str = ""

    def __str__(self) -> str:
        return f"{self.value:.{self.decimals}f}"


@dataclass(frozen=True, slots=True)
class Column:
    """What a column measures.

    queries, documents: how many there are, where it is known. similarity: of the protocol, if it has one.
    """

    protocol: str
    metric: str
    queries: int | None = None
    documents: int | None = None
    similarity: str | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """rows: system -> a cell for each column. averages: system -> mean of its row, as printed."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: Mapping[str, tuple[Cell | None, ...]]
    averages: Mapping[str, Cell | None]


@cache
def tables() -> tuple[Table, ...]:
    """All tables, those of the paper first. Raises UserError for a file that is not as above."""
    return tuple(
        _table(path) for path in sorted(FOLDER.glob("*.yaml"), key=lambda path: ("table" not in path.name, path.name))
    )


def figures(protocol: str, metric: str) -> dict[str, Cell]:
    """System -> its figure, where one of the tables has a column for this; the first of them counts."""
    found: dict[str, Cell] = {}
    for table in tables():
        for place, column in enumerate(table.columns):
            if (column.protocol, column.metric) == (protocol, metric):
                found = {system: row[place] for system, row in table.rows.items() if row[place]} | found
    return found


def _table(path: Path) -> Table:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if unknown := set(content) - {"name", "title", "source", "columns", "rows"}:
        raise UserError(f"{path}: unknown key {sorted(unknown)[0]}")
    columns = tuple(column for group in content["columns"] for column in _columns(path, group))
    rows, averages = {}, {}
    for system, line in content["rows"].items():
        cells, _, average = line.partition("|")
        rows[system] = tuple(map(_cell, cells.split()))
        if len(rows[system]) != len(columns):
            raise UserError(f"{path}: {system} has {len(rows[system])} cells for {len(columns)} columns")
        if average:
            averages[system] = _cell(average.strip())
    return Table(content["name"], content["title"], columns, rows, averages)


def _columns(path: Path, group: Mapping[str, Any]) -> list[Column]:
    if unknown := set(group) - COLUMN_KEYS:
        raise UserError(f"{path}: unknown key {sorted(unknown)[0]} of a column, allowed are {', '.join(COLUMN_KEYS)}")
    for metric in group["metrics"]:
        parse_metric(metric)
    rest = {key: group.get(key) for key in ("queries", "documents", "similarity")}
    return [Column(group["protocol"], metric, **rest) for metric in group["metrics"]]


def _cell(text: str) -> Cell | None:
    if text == ABSENT:
        return None
    mark = MARKS.get(text[-1], "")
    digits = text[:-1] if mark else text
    return Cell(float(digits), len(digits.partition(".")[2]), mark)
