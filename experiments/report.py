"""Write a run's report as one HTML page that needs no network."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import UndefinedError

from datamodules.files import refuse_other_file, write_json, write_text
from datamodules.options import option
from datamodules.records import UserError, explained
from experiments.config.arguments import parse
from experiments.config.run_config import packages_option
from experiments.reporting.computed import compute
from experiments.reporting.page import render
from experiments.reporting.run_files import COMPUTED, RunFiles
from experiments.shared.console import entry_point

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ReportOptions:
    """Show a run as one HTML page: results, curves, experts, mined negatives, a map of papers, and failures.

    Each figure on the page shows which file it comes from, and where in the file. It also works for incomplete runs.
    """

    run: Path = option(help="folder of the run, such as runs/moe-sample-seed0-1a2b3c", key="RUN")
    output: Path | None = option(None, "HTML file; by default report.html in the run's folder")
    map: int = option(400, "number of papers on the map, 0 for no map", minimum=0)
    device: str = option(
        "auto", "device that encodes the papers on the map: cpu, cuda or cuda:N; auto: a GPU if there is one"
    )
    packages: tuple[str, ...] = packages_option()


def main(arguments: Sequence[str]) -> None:
    options = parse(ReportOptions, arguments)
    if options.output:
        refuse_other_file(options.output, rb"\s*<!doctype html", "an HTML page")
        refuse_other_file(options.output.with_name(COMPUTED), rb'\{\s+"last_step"', "a file of a report")
    run = RunFiles(options.run)
    output = options.output or run.path / "report.html"
    try:
        run.computed = compute(run, options.map, options.device, options.packages)
        page = render(run)
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, UndefinedError) as error:
        raise UserError(
            f"RUN: {run.path}: a file of the run is damaged, or another version wrote it ({error!r})"
        ) from error
    with explained(f"output: cannot write {output}"):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output.with_name(COMPUTED), run.computed)
        write_text(output, page)
    log.info("Report: %s", output)


if __name__ == "__main__":
    entry_point(main)
