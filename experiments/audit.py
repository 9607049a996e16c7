"""Report the evaluation texts that are in the training data of an experiment."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datamodules.files import refuse_other_file, write_json
from datamodules.leakage import WAYS
from datamodules.options import option
from datamodules.records import UserError, explained
from experiments.build.leaks import EXAMPLES, Leaks, find_leaks
from experiments.config.experiment import ExperimentOptions, digest, parse_experiment
from experiments.shared.console import entry_point
from experiments.shared.table_formats import Column, Table, print_table

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class AuditOptions(ExperimentOptions):
    """Report the evaluation texts that are in the training data of an experiment.

    Training texts are compared with the queries of the dev and test splits, with the corpora of collections without a
    train split, and with further folders. Documents that the splits of a collection share are not leaks, but a test
    query among the training queries is. Ids are only compared within a collection.
    """

    beir: tuple[str, ...] = option((), "further evaluations: folders in BEIR layout or with JSON lines")
    output: Path | None = option(None, "JSON file for the report; by default, audits/<experiment>-<scale>-<hash>.json")
    examples: int = option(5, "number of leaks to show per set and matching method", minimum=0, maximum=EXAMPLES)


def main(arguments: Sequence[str]) -> None:
    options, config = parse_experiment(AuditOptions, arguments)
    from experiments.build.data import build_data  # only here, because Lightning takes seconds to import

    folders = [str(Path(folder).resolve()) for folder in options.beir]
    digits = hashlib.blake2b(repr((digest(config), folders)).encode(), digest_size=3).hexdigest()
    output = options.output or Path("audits") / f"{config.experiment}-{config.scale}-{digits}.json"
    refuse_other_file(output, rb'\{\s+"trained"', "the report of an audit")
    data = build_data(config)
    started = time.perf_counter()
    leaks = find_leaks(data.tasks, options.beir, corpora=True)
    if not leaks.sets:
        raise UserError("nothing to compare with: no task has a dev or test split; set beir=FOLDER to an evaluation")
    report = _report(leaks, options.examples)
    _show(report)
    with explained(f"output: {output} cannot be written"):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, report)
    seconds = time.perf_counter() - started
    log.info("compared %s training texts in %.1f s; the report is in %s", f"{leaks.trained:,}", seconds, output)


def _report(leaks: Leaks, num_examples: int) -> dict[str, Any]:
    evaluated = {
        name: asdict(each) | {"examples": _examples(each.examples, num_examples)} for name, each in leaks.sets.items()
    }
    return {"trained": leaks.trained, "evaluated": evaluated}


def _examples(examples: Mapping[str, Sequence[str]], count: int) -> list[str]:
    """Return up to `count` examples per matching method. A pair found by several methods is listed once."""
    pairs: dict[str, str] = {}
    for texts in examples.values():
        new = [text for text in texts if text.rpartition(" by ")[0] not in pairs][:count]
        pairs |= {text.rpartition(" by ")[0]: text for text in new}
    return list(pairs.values())


def _show(report: Mapping[str, Any]) -> None:
    columns = [Column("evaluated", folds=True), Column("documents", ",d"), *(Column(way, "d") for way in WAYS)]
    table = Table(columns, "evaluation texts in the training data, by")
    for name, evaluated in report["evaluated"].items():
        table.add(name, evaluated["documents"], *(evaluated["overlaps"].get(way) for way in WAYS))
    print_table(table)
    for name, evaluated in report["evaluated"].items():
        for example in evaluated["examples"]:
            log.info("%s: %s", name, example)


if __name__ == "__main__":
    entry_point(main)
