"""Write the built-in sample as folders in BEIR layout."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datamodules.options import option
from datamodules.readers.beir import write_beir
from datamodules.sample import SampleReader
from experiments.config.arguments import parse
from experiments.shared.console import entry_point

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class SampleOptions:
    """Write the built-in sample in BEIR layout: to look at, for other tools, or as a template for your own data."""

    output: Path = option(help="folder for the four collections")
    papers: int = option(5000, "number of papers", minimum=1)
    seed: int = option(0, "seed of the synthetic texts", minimum=0)


def main(arguments: Sequence[str]) -> None:
    options = parse(SampleOptions, arguments)
    for view in SampleReader.VIEWS:
        folder = options.output / view
        write_beir(SampleReader(view, options.papers, options.seed).read(), folder)
        log.info("%s", folder)


if __name__ == "__main__":
    entry_point(main)
