"""What a user of own data should know before the training: that a folder is not there, or what stands beside it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.records import UserError
from datamodules.tasks import TaskDataModule
from experiments.config.schema import Config

log = logging.getLogger(__name__)

SAMPLE = "datamodules.sample."


def check_folder(config: Config, task: str, name: str, node: Mapping[str, Any]) -> None:
    """Raise UserError, with the keys that name another, if the folder of a collection's node is not there."""
    folder = node.get("folder")
    if folder is None or Path(folder).exists():
        return
    told = f"task.{task}.data.{name}: {folder}: no such folder. task.{task}.data=FOLDER names yours"
    if Path(config.data.root) in Path(folder).parents:
        told += f", or data.root=FOLDER the one that holds {Path(folder).relative_to(config.data.root)}"
    if len(config.tasks) > 1:
        told += f"; tasks=[...] without {task} trains on the other tasks alone"
    raise UserError(told)


def tell_of_sample(config: Config, tasks: Sequence[TaskDataModule]) -> None:
    """Warn where the synthetic sample is trained on beside collections of the user's."""
    sample = {
        name: {key for key, node in task.data.items() if node["_target_"].startswith(SAMPLE)}
        for name, task in config.task.items()
    }
    if all(set(task.data) == sample[name] for name, task in config.task.items()) or not any(sample.values()):
        return
    own = [name for name, task in config.task.items() if set(task.data) != sample[name]]
    measured = [key for task in tasks for key, found in task.collections.items() if "dev" in found.splits]
    chosen = ", ".join(measured) if config.evaluation.every_n_steps else ""
    log.warning(
        "the synthetic sample is trained on beside your data, and counts in the mean of the final table%s",
        f"; best.ckpt is chosen by the dev splits of {chosen}" if chosen else "",
    )
    for name, synthetic in sample.items():
        if name not in own:
            log.warning("  %s has the sample alone: tasks=[%s] trains without it", name, ",".join(own))
        elif synthetic:
            out = " ".join(f"task.{name}.data.{key}=null" for key in sorted(synthetic))
            log.warning("  %s: task.%s.data=FOLDER takes yours instead of all, %s leaves it out", name, name, out)
