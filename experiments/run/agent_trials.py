"""Share the trials of W&B's agent with all ranks. The first rank writes them to a folder, and the others read them."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from datamodules.files import read_json, write_json
from experiments.config.sweep_file import as_override
from lightning_modules.distributed import launch

VARIABLE = "SCIMULT_TRIALS"  # environment variable with the folder in which the first rank publishes its trials
END = "over"  # file that the first rank creates after its last trial


def publish_trial(experiment: str, overrides: Sequence[str], run: Path) -> None:
    """Publish the trial that this process trains, if other ranks are waiting for it. run: folder of the trial's run."""
    if VARIABLE in os.environ and launch.rank() == 0:
        folder = Path(os.environ[VARIABLE])
        number = sum(1 for _ in folder.glob("*.json"))
        write_json(folder / f"{number}.json", [experiment, *overrides, as_override("run.dir", str(run))])


def published_trials(folder: Path) -> Iterator[list[str]]:
    """Yield the arguments of each trial that the first rank publishes, until the agent ends."""
    for number in itertools.count():
        trial = folder / f"{number}.json"
        while not trial.exists():
            # Check END first, because the last trial may be published between the two checks.
            if (folder / END).exists() and not trial.exists():
                return
            time.sleep(0.5)
        yield read_json(trial, list)
