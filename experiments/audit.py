"""Does an evaluation stand in the training data? python -m experiments.audit EXPERIMENT [beir=FOLDER,...] [key=value]

The texts that the experiment trains on (queries, positives and hard negatives of the train splits) are compared with
the queries of its dev and test splits, with the corpora of those of its collections that have no train split, and with
queries and corpus of further folders (beir=, in BEIR layout or of JSON lines). Documents that a collection's splits
share are no leak; a query of the test split that is trained on is one. The report goes to output, by default a file in
audits/ for each configuration and beir; examples=5 are shown of each kind, of every pair the first.

Ids are compared within a collection alone, since two collections may number other documents alike.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from datamodules.leakage import WAYS
from datamodules.records import UserError
from experiments.build.data import build_data
from experiments.build.leaks import EXAMPLES, find_leaks
from experiments.config.experiment import digest, experiments, load_config
from experiments.config.schema import Config
from experiments.shared.console import entry_point, table_console, whole_number
from experiments.shared.files import write_json

log = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> None:
    if not arguments or "=" in arguments[0]:
        raise UserError(f"which experiment? There are {', '.join(experiments())}: python -m experiments.audit moe")
    own = {"beir": "", "output": "", "examples": "5"}
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
    config = load_config(arguments[0], rest, list(own))
    output = Path(own["output"] or default_output(config, own["beir"]))
    data = build_data(config)
    started = time.perf_counter()
    leaks = find_leaks(data.tasks, [f for f in own["beir"].split(",") if f], corpora=True)
    if not leaks.sets:
        raise UserError("nothing is evaluated: no task has a dev or test split. Name what is, as beir=FOLDER")
    table = Table("evaluated", "documents", *WAYS, title="documents that stand in the training data, by")
    report: dict[str, Any] = {"trained": leaks.trained, "evaluated": {}}
    for name, found in leaks.sets.items():
        table.add_row(name, f"{found.documents:,}", *(str(found.overlaps.get(way, "")) for way in WAYS))
        examples = _examples(found.examples, num_examples)
        report["evaluated"][name] = asdict(found) | {"examples": examples}
    table_console().print(table)
    for name, one in report["evaluated"].items():
        for example in one["examples"]:
            log.info("%s: %s", name, example)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, report)
    except OSError as error:
        raise UserError(f"output: {output} cannot be written ({error})") from error
    seconds = time.perf_counter() - started
    log.info("%s texts of the training in %.1f s; the report is %s", f"{leaks.trained:,}", seconds, output)


def default_output(config: Config, beir: str) -> Path:
    """A file of its own for each configuration and what it is compared with."""
    others = [str(Path(folder).resolve()) for folder in beir.split(",") if folder]
    digits = hashlib.blake2b(repr((digest(config), others)).encode(), digest_size=3).hexdigest()
    return Path("audits") / f"{config.experiment}-{config.scale}-{digits}.json"


def _examples(ways: Mapping[str, Sequence[str]], count: int) -> list[str]:
    """So many of each way; a pair that was found in several is told once."""
    told: dict[str, str] = {}
    for examples in ways.values():
        new = [text for text in examples if text.rpartition(" by ")[0] not in told][:count]
        told |= {text.rpartition(" by ")[0]: text for text in new}
    return list(told.values())


if __name__ == "__main__":
    entry_point(main)
