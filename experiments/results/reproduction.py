"""What was measured beside what the paper says, cell by cell.

A figure stands beside the paper's only if the protocol, the numbers of queries and documents, the similarity and the
length of texts are the paper's; else it is told what differs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from experiments.results.paper import Cell, Column, tables

LENGTH = 512  # tokens of a text in the paper's evaluation
STEPS = (0.1, 0.5)  # points of a percentage


@dataclass(frozen=True, slots=True)
class Comparison:
    """One cell. ours: in percent, if it was measured. verdict: "reproduced" if it rounds to the paper's figure, "within
    0.1", "within 0.5", "differs", "not comparable", "not measured". remark: what makes it not comparable.
    """

    table: str
    column: Column
    paper: Cell
    ours: float | None
    verdict: str
    remark: str = ""

    @property
    def difference(self) -> float | None:
        return None if self.ours is None else self.ours - self.paper.value


def compare(benchmarks: Mapping[str, Any], ours: str, system: str) -> list[Comparison]:
    """The cells of the paper's system beside one that was measured.

    benchmarks: of a results.json. ours: the name of the system in it.
    """
    found = []
    for table in tables():
        for column, cell in zip(table.columns, table.rows.get(system, ()), strict=False):
            if cell is not None:
                found.append(_compared(table.name, column, cell, benchmarks, ours, system))
    return found


def _compared(table: str, column: Column, cell: Cell, benchmarks: Mapping[str, Any], ours: str, system: str):
    remark = ""
    for result in _related(column, benchmarks, ours):
        value = 100 * result["systems"][ours][column.metric]
        remark = "; ".join(_differences(column, result, result["measured"][ours], system))
        if not remark:
            return Comparison(table, column, cell, value, verdict(value, cell))
    if remark:
        return Comparison(table, column, cell, value, "not comparable", remark)
    return Comparison(table, column, cell, None, "not measured")


def _related(column: Column, benchmarks: Mapping[str, Any], ours: str) -> Iterator[Mapping[str, Any]]:
    """Results of the column's data and metric, the column's own protocol last: what is found last is told."""
    of_data = [
        result
        for result in benchmarks.values()
        if column.metric in result["systems"].get(ours, {}) and _data(result["protocol"]) == _data(column.protocol)
    ]
    return iter(sorted(of_data, key=lambda result: result["protocol"] == column.protocol))


def _data(protocol: str) -> str:
    """Whose second word names the data: scimult/scifact/all-splits, beir/scifact/test."""
    return [*protocol.split("/"), ""][1]


def _differences(column: Column, result: Mapping[str, Any], measured: Mapping[str, Any], system: str) -> Iterator[str]:
    """What was done otherwise than in the paper."""
    if result["protocol"] != column.protocol:
        yield f"protocol {result['protocol']}"
    for what in ("queries", "documents"):
        wanted = getattr(column, what)
        if wanted is not None and result[what] != wanted:
            yield f"{result[what]:,} {what}, the paper has {wanted:,}"
    wanted = column.similarity or similarity_of(system)
    if measured["similarity"] != wanted:
        yield f"similarity {measured['similarity']}, the paper's is {wanted}"
    if measured["max_length"] not in (None, LENGTH):
        yield f"texts of {measured['max_length']} tokens, the paper's of {LENGTH}"


def similarity_of(system: str) -> str:
    """What the paper compares vectors by (appendix B)."""
    if system == "BM25":
        return "bm25"
    return "dot" if "SciMult" in system else "cosine"


def verdict(ours: float, paper: Cell) -> str:
    difference = abs(ours - paper.value)
    if difference <= 0.5 * 10**-paper.decimals + 1e-9:
        return "reproduced"
    within = next((step for step in STEPS if difference <= step + 1e-9), math.inf)
    return "differs" if within == math.inf else f"within {within}"
