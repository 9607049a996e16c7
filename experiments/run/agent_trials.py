"""Trials of W&B's sweeps on several ranks: the agent of the first rank gets them, and the other ranks follow."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from datamodules.files import read_json, write_json
from lightning_modules.distributed import launch

VARIABLE = "SCIMULT_TRIALS"  # environment variable with the folder in which the first rank publishes its trials
END = "over"  # file that ends the folder's trials


def publish_trial(experiment: str, overrides: Sequence[str], run: Path) -> None:
    """Publish the training of this process, if it is a trial that other ranks wait for. run: its folder."""
    if VARIABLE in os.environ and launch.rank() == 0:
        folder = Path(os.environ[VARIABLE])
        number = sum(1 for _ in folder.glob("*.json"))
        write_json(folder / f"{number}.json", [experiment, *overrides, f"run.dir={run}"])


def published_trials(folder: Path) -> Iterator[list[str]]:
    """Yield the arguments of each trial that the first rank publishes, until its agent has ended."""
    for number in itertools.count():
        trial = folder / f"{number}.json"
        while not trial.exists():
            # In this order: the last trial may be published between the two looks.
            if (folder / END).exists() and not trial.exists():
                return
            time.sleep(0.5)
        yield read_json(trial)
