"""Read the paper's tables from experiments/tables/*.yaml, and compare our results with them cell by cell.

Source: Zhang et al., Pre-training Multi-task Contrastive Learning Models for Scientific Literature Understanding,
Findings of EMNLP 2023; and the leaderboard of PMC-Patients, for the later version of its data.

A row is a line of cells as printed in the paper, in percent, with the average after a bar:

    SciBERT: 79.7† 18.81 80.7† 12.29 | 47.88      † quoted there from another paper, ‡ computed there from a released
                                                  output, – no value
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from omegaconf import MISSING

from datamodules.files import damage_explained
from datamodules.options import option
from datamodules.records import UserError
from experiments.config.structured import read_yaml, structured
from experiments.results.results import Benchmarks, BenchmarkTable, SystemResult
from lightning_modules.retrieval.metrics import parse_metric

FOLDER = Path(__file__).parents[1] / "tables"
MARKS = {"†": "quoted", "‡": "computed"}
ABSENT = "–"
MAX_LENGTH = 512  # maximum number of tokens per text in the paper's evaluation
TOLERANCES = (0.1, 0.5)  # percentage points

Verdict = Literal["reproduced", "within 0.1", "within 0.5", "differs", "not comparable", "not measured"]


@dataclass
class ColumnGroup:
    """Columns of a table file that share a protocol."""

    protocol: str = option(MISSING, "id of the protocol")
    metrics: list[str] = option(MISSING, "metrics, one per column")
    queries: int | None = option(None, "number of queries, if known", minimum=1)
    documents: int | None = option(None, "number of documents, if known", minimum=1)
    similarity: str | None = option(None, "similarity of the protocol, if it has its own")


@dataclass
class TableFile:
    """A file in experiments/tables."""

    name: str = option(MISSING, "name of the table in the paper")
    title: str = option(MISSING, "what the table shows")
    source: str = option("", "where the values come from, if not from the paper")
    columns: list[ColumnGroup] = option(MISSING, "columns, in order")
    rows: dict[str, str] = option(MISSING, "system -> cells, with the average after a bar")


@dataclass(frozen=True, slots=True)
class Cell:
    """A value in percent. decimals: number of printed digits. mark: "quoted" or "computed" if it was not measured."""

    value: float
    decimals: int
    mark: str = ""

    def __str__(self) -> str:
        return f"{self.value:.{self.decimals}f}"


@dataclass(frozen=True, slots=True)
class Column:
    """The protocol and metric of a column, and what is known about the protocol (see ColumnGroup)."""

    protocol: str
    metric: str
    queries: int | None = None
    documents: int | None = None
    similarity: str | None = None


@dataclass(frozen=True, slots=True)
class PaperTable:
    """A table of the paper. rows: system -> one cell per column."""

    name: str
    columns: tuple[Column, ...]
    rows: Mapping[str, tuple[Cell | None, ...]]


@dataclass(frozen=True, slots=True)
class CellComparison:
    """A cell of the paper and our value.

    ours: our value in percent, or None if it was not measured.
    verdict: "reproduced" if our value rounds to the paper's. remark: why the values are not comparable.
    """

    table: str
    column: Column
    paper: Cell
    ours: float | None
    verdict: Verdict
    remark: str = ""

    @property
    def difference(self) -> float | None:
        return None if self.ours is None else self.ours - self.paper.value


@cache
def tables() -> tuple[PaperTable, ...]:
    """Read all tables, the paper's tables first. Raises UserError if a file is malformed."""
    paths = sorted(FOLDER.glob("*.yaml"), key=lambda path: ("table" not in path.name, path.name))
    return tuple(map(_read_table, paths))


def figures(protocol: str, metric: str) -> dict[str, Cell]:
    """Return the value of each system for a protocol and metric, from the first table that has it."""
    cells: dict[str, Cell] = {}
    for table in tables():
        for position, column in enumerate(table.columns):
            if (column.protocol, column.metric) == (protocol, metric):
                cells = {system: row[position] for system, row in table.rows.items() if row[position]} | cells
    return cells


def compare_with_paper(benchmarks: Benchmarks, ours: str, system: str) -> list[CellComparison]:
    """Compare one of our systems with a row of the paper's tables.

    ours: name of our system in the benchmarks. system: row of the paper's tables.
    """
    return [
        _compare_cell(table.name, column, cell, benchmarks, ours, system)
        for table in tables()
        for column, cell in zip(table.columns, table.rows.get(system, ()), strict=False)
        if cell is not None
    ]


def _compare_cell(
    table: str, column: Column, cell: Cell, benchmarks: Benchmarks, ours: str, system: str
) -> CellComparison:
    comparison = CellComparison(table, column, cell, None, "not measured")
    for result in _same_data(column, benchmarks, ours):
        value = 100 * result.systems[ours].metrics[column.metric]
        remark = "; ".join(_deviations(column, result, result.systems[ours], system))
        if not remark:
            return CellComparison(table, column, cell, value, _verdict(value, cell))
        comparison = CellComparison(table, column, cell, value, "not comparable", remark)
    return comparison


def _same_data(column: Column, benchmarks: Benchmarks, ours: str) -> list[BenchmarkTable]:
    """Return our results in a column's metric on its data. Those with its protocol come last and set the remark."""
    results = [
        result
        for result in benchmarks.values()
        if ours in result.systems
        and column.metric in result.systems[ours].metrics
        and _data_of(result.protocol) == _data_of(column.protocol)
    ]
    return sorted(results, key=lambda result: result.protocol == column.protocol)


def _data_of(protocol: str) -> str:
    """Return the second part of a protocol, which names the data: scimult/scifact/all-splits, beir/scifact/test."""
    return [*protocol.split("/"), ""][1]


def _deviations(column: Column, result: BenchmarkTable, measured: SystemResult, system: str) -> Iterator[str]:
    """Yield each deviation from the paper's procedure."""
    if result.protocol != column.protocol:
        yield f"protocol {result.protocol}"
    for field in ("queries", "documents"):
        count, expected = getattr(result, field), getattr(column, field)
        if expected is not None and count != expected:
            yield f"{count:,} {field} (paper: {expected:,})"
    similarity = column.similarity or _similarity_of(system)
    if measured.similarity != similarity:
        yield f"similarity {measured.similarity} (paper: {similarity})"
    if measured.max_length not in (None, MAX_LENGTH):
        yield f"texts of up to {measured.max_length} tokens (paper: {MAX_LENGTH})"


def _similarity_of(system: str) -> str:
    """Return the similarity that the paper uses for a system (appendix B)."""
    if system == "BM25":
        return "bm25"
    return "dot" if "SciMult" in system else "cosine"


def _verdict(ours: float, paper: Cell) -> Verdict:
    difference = abs(ours - paper.value)
    if difference <= 0.5 * 10**-paper.decimals + 1e-9:
        return "reproduced"
    tolerance = next((points for points in TOLERANCES if difference <= points + 1e-9), None)
    return f"within {tolerance}" if tolerance else "differs"


def _read_table(path: Path) -> PaperTable:
    content = structured(TableFile, [read_yaml(path)], str(path))
    columns = tuple(
        Column(group.protocol, metric, group.queries, group.documents, group.similarity)
        for group in content.columns
        for metric in group.metrics
    )
    for column in columns:
        parse_metric(column.metric)
    with damage_explained(path, "a table of cells", hint=""):
        rows = {system: tuple(map(_read_cell, line.partition("|")[0].split())) for system, line in content.rows.items()}
    for system, cells in rows.items():
        if len(cells) != len(columns):
            raise UserError(f"{path}: {system}: expected {len(columns)} cells, one per column, got {len(cells)}")
    return PaperTable(content.name, columns, rows)


def _read_cell(text: str) -> Cell | None:
    if text == ABSENT:
        return None
    mark = MARKS.get(text[-1], "")
    digits = text[:-1] if mark else text
    return Cell(float(digits), len(digits.partition(".")[2]), mark)
