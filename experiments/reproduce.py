"""Is the paper reproduced? python -m experiments.reproduce results=FOLDER [system=SciMult-MHAExpert] [ours=NAME]

results      a folder with results.json, of make eval model=... benchmarks=all data.root=FOLDER
system       the row of the paper's tables that it is put beside; in table 6, whose models were trained on its own
             data, "DPR (SciMult-MHAExpert)"
ours         the system in results.json; it may be left out if there is one
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from datamodules.files import read_json
from datamodules.records import UserError
from experiments.results.paper import tables
from experiments.results.reproduction import Comparison, compare
from experiments.shared.console import choice, entry_point, key_values, table_console

log = logging.getLogger(__name__)

KEYS = {"results": "", "system": "SciMult-MHAExpert", "ours": ""}


def main(arguments: Sequence[str]) -> None:
    values = key_values(arguments, KEYS)
    path = Path(values["results"]) / "results.json"
    if not values["results"] or not path.is_file():
        raise UserError(
            f"results: got {values['results']!r}, expected a folder with results.json, as make eval makes it"
        )
    choice("system", values["system"], list(dict.fromkeys(row for table in tables() for row in table.rows)))
    benchmarks = read_json(path)["benchmarks"]
    cells = compare(benchmarks, _ours(benchmarks, values["ours"]), values["system"])
    show(cells, f"{path.parent}, beside {values['system']} in the paper")
    counts = Counter(cell.verdict for cell in cells)
    log.info("%d cells: %s", len(cells), ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))


def _ours(benchmarks: Mapping[str, Any], wanted: str) -> str:
    names = list(dict.fromkeys(name for result in benchmarks.values() for name in result["systems"]))
    if wanted:
        return choice("ours", wanted, names)
    if len(names) != 1:
        raise UserError(f"ours: which one? The results are of {', '.join(names) or 'no system'}")
    return names[0]


def show(cells: Sequence[Comparison], title: str) -> None:
    console = table_console()
    grid = Table(title=title, title_justify="left")
    for heading in ("table", "protocol", "metric"):
        grid.add_column(heading, no_wrap=True)
    for heading in ("ours", "paper", "difference"):
        grid.add_column(heading, justify="right", no_wrap=True)
    grid.add_column("", overflow="fold")
    for number, cell in enumerate(cells):
        if number and cell.table != cells[number - 1].table:
            grid.add_section()
        again = number and cell.column.protocol == cells[number - 1].column.protocol
        mark = f" ({cell.paper.mark})" if cell.paper.mark else ""
        comparable = cell.ours is not None and cell.verdict != "not comparable"
        grid.add_row(
            cell.table,
            cell.column.protocol,
            cell.column.metric,
            "" if cell.ours is None else f"{cell.ours:.2f}",
            f"{cell.paper}{mark}",
            f"{cell.difference:+.2f}" if comparable else "",
            f"{cell.verdict}: {cell.remark}" if cell.remark and not again else cell.verdict,
        )
    console.print(grid)


if __name__ == "__main__":
    entry_point(main)
