"""Compare results with the paper's tables, cell by cell."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datamodules.options import option
from datamodules.records import UserError, check_choice
from experiments.config.arguments import parse
from experiments.results.paper import CellComparison, compare_with_paper, tables
from experiments.results.results import Results, read_results
from experiments.shared.console import entry_point
from experiments.shared.table_formats import Column, Table, print_table

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ReproduceOptions:
    """Compare results with the paper's tables, cell by cell."""

    results: Path = option(help="folder with results.json, made by make eval model=... benchmarks=all data.root=FOLDER")
    system: str = option(
        "SciMult-MHAExpert",
        "row of the paper's tables to compare with; for a model trained on PMC-Patients (table 6) "
        '"DPR (SciMult-MHAExpert)"',
    )
    ours: str | None = option(None, "system in results.json, by default the only one")


def main(arguments: Sequence[str]) -> None:
    options = parse(ReproduceOptions, arguments)
    path = options.results / "results.json"
    if not path.is_file():
        raise UserError(f"results: expected a folder with results.json, made by make eval, got {options.results}")
    rows = dict.fromkeys(row for table in tables() for row in table.rows)
    check_choice("system", options.system, rows)
    results = read_results(path)
    cells = compare_with_paper(results.benchmarks, _our_system(results, options.ours), options.system)
    _show(cells, f"{options.results}, compared with {options.system} in the paper")
    counts = Counter(cell.verdict for cell in cells)
    log.info("%d cells: %s", len(cells), ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))


def _our_system(results: Results, wanted: str | None) -> str:
    systems = results.systems
    if wanted in systems:
        return wanted
    if wanted is None and len(systems) == 1:
        return systems[0]
    raise UserError(f"ours: expected one of {', '.join(systems) or 'no system'}, got {wanted or 'nothing'}")


def _show(cells: Sequence[CellComparison], title: str) -> None:
    texts, numbers = ("table", "protocol", "metric"), ("ours", "paper", "difference")
    columns = [*map(Column, texts), *(Column(heading, ".2f") for heading in numbers), Column("", folds=True)]
    table = Table(columns, title)
    for number, cell in enumerate(cells):
        repeated = number and cell.column.protocol == cells[number - 1].column.protocol
        mark = f" ({cell.paper.mark})" if cell.paper.mark else ""
        comparable = cell.ours is not None and cell.verdict != "not comparable"
        table.add(
            *(cell.table, cell.column.protocol, cell.column.metric, cell.ours, f"{cell.paper}{mark}"),
            f"{cell.difference:+.2f}" if comparable else None,
            f"{cell.verdict}: {cell.remark}" if cell.remark and not repeated else cell.verdict,
            ends_section=number + 1 == len(cells) or cells[number + 1].table != cell.table,
        )
    print_table(table)


if __name__ == "__main__":
    entry_point(main)
