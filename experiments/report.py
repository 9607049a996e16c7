"""Write a run's report as one HTML page: python -m experiments.report RUN=FOLDER [output=FILE.html] [map=400]

RUN      a run's folder; incomplete runs too
output   by default report.html in the run's folder; report.json, what the report works out itself, lies beside it
map      papers that are encoded and drawn, 0 for none

The page needs no network. Every figure in it has a data-source: the file of the run, and the place in it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from datamodules.files import write_json, write_text
from datamodules.records import UserError
from experiments.reporting.figures import work_out
from experiments.reporting.page import page
from experiments.reporting.run_files import FIGURES, RunFiles
from experiments.shared.console import entry_point, key_values, whole_number

log = logging.getLogger(__name__)

KEYS = {"RUN": "", "output": "", "map": "400"}


def main(arguments: Sequence[str]) -> None:
    values = key_values(arguments, KEYS)
    if not values["RUN"]:
        raise UserError("RUN: which run? For instance make report RUN=runs/moe-sample-seed0-...")
    run = RunFiles(Path(values["RUN"]))
    output = Path(values["output"] or run.path / "report.html")
    run.figures = work_out(run, whole_number("map", values["map"], 0))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output.with_name(FIGURES), run.figures)
        write_text(output, page(run))
    except OSError as error:
        raise UserError(f"output: {output} cannot be written ({error})") from error
    log.info("The report: %s", output)


if __name__ == "__main__":
    entry_point(main)
