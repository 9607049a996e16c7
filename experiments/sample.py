"""Write the embedded sample as BEIR folders: python -m experiments.sample output=FOLDER [papers=5000] [seed=0]

To look at it, to feed it to other tools, and as a pattern for one's own data.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from datamodules.readers.beir import write_beir
from datamodules.records import UserError
from datamodules.sample import SampleReader
from experiments.shared.console import entry_point, key_values, whole_number

log = logging.getLogger(__name__)

KEYS = {"output": "", "papers": "5000", "seed": "0"}


def main(arguments: Sequence[str]) -> None:
    values = key_values(arguments, KEYS)
    if not values["output"]:
        raise UserError("where to? Give output=FOLDER")
    seed = whole_number("seed", values["seed"], least=0)
    for view in SampleReader.VIEWS:
        folder = Path(values["output"]) / view
        write_beir(SampleReader(view, whole_number("papers", values["papers"]), seed).read(), folder)
        log.info("%s", folder)


if __name__ == "__main__":
    entry_point(main)
