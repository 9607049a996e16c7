"""Does an evaluation stand in the training data? python -m experiments.audit EXPERIMENT [beir=FOLDER,...] [key=value]

The texts that the experiment trains on (queries, positives and hard negatives of the train splits) are compared with
the queries of its dev and test splits, with the corpora of those of its collections that have no train split, and with
queries and corpus of further folders in BEIR layout (beir=). Documents that a collection's splits share are no leak; a
query of the test split that is trained on is one. The report goes to output (leakage.json), by default in the working
directory; examples=5 are shown of each kind.

Ids are compared within a collection alone, since two collections may number other documents alike.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from datamodules.leakage import WAYS
from datamodules.records import UserError
from experiments.building.data import build_data
from experiments.building.leaks import EXAMPLES, find_leaks
from experiments.console import entry_point, table_console, whole_number
from experiments.files import write_json
from experiments.settings.config import experiments, load_config

log = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> None:
    if not arguments or "=" in arguments[0]:
        raise UserError(f"which experiment? There are {', '.join(experiments())}: python -m experiments.audit moe")
    own = {"beir": "", "output": "leakage.json", "examples": "5"}
    rest = []
    for argument in arguments[1:]:
        key, _, value = argument.partition("=")
        if key in own:
            own[key] = value
        else:
            rest.append(argument)
    num_examples = whole_number("examples", own["examples"], 0)
    if num_examples > EXAMPLES:
        raise UserError(f"examples: got {num_examples}, allowed are up to {EXAMPLES}")
    data = build_data(load_config(arguments[0], rest, list(own)))
    started = time.perf_counter()
    leaks = find_leaks(data.tasks, [f for f in own["beir"].split(",") if f], corpora=True)
    if not leaks.sets:
        raise UserError("nothing is evaluated: no task has a dev or test split. Name what is, as beir=FOLDER")
    table = Table("evaluated", "documents", *WAYS, title="documents that stand in the training data, by")
    report: dict[str, Any] = {"trained": leaks.trained, "evaluated": {}}
    for name, found in leaks.sets.items():
        table.add_row(name, f"{found.documents:,}", *(str(found.overlaps.get(way, "")) for way in WAYS))
        examples = [text for way in found.examples.values() for text in way[:num_examples]]
        report["evaluated"][name] = asdict(found) | {"examples": examples}
    table_console().print(table)
    for name, one in report["evaluated"].items():
        for example in one["examples"]:
            log.info("%s: %s", name, example)
    write_json(Path(own["output"]), report)
    seconds = time.perf_counter() - started
    log.info("%s texts of the training in %.1f s; the report is %s", f"{leaks.trained:,}", seconds, own["output"])


if __name__ == "__main__":
    entry_point(main)
