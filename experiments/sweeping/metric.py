"""What the metric of a sweep may be: something that its runs log."""

from __future__ import annotations

import re
from collections.abc import Iterator

from datamodules.records import UserError
from experiments.config.schema import Config
from experiments.config.suggest import did_you_mean
from lightning_modules.callbacks.diagnostics import OF_TASK
from lightning_modules.mining.report import FIGURES

DISTANCE = re.compile(r"diag/experts/.+-.+/(distance|cosine)")


def check_metric(name: str, config: Config) -> None:
    """Raise UserError if runs of a configuration do not log a metric."""
    evaluation, benchmarks = config.evaluation, [key for task in config.task.values() for key in task.data]
    known = [f"train/{task}/loss" for task in config.tasks]
    known.append(f"{evaluation.split}/mean/{evaluation.metrics[0]}")
    splits = [evaluation.split]
    if evaluation.every_n_steps:
        splits.append("val")
        known.append(f"val/mean/{evaluation.metrics[0]}")
    known += [f"{s}/{b}/{metric}" for s in dict.fromkeys(splits) for b in benchmarks for metric in evaluation.metrics]
    known += _of_callbacks(config)
    if name not in known and not (config.diagnostics.every_n_steps and DISTANCE.fullmatch(name)):
        hint = did_you_mean(name, known)
        raise UserError(f"metric.name: no run logs {name!r}; {hint}there are {', '.join(known[:12])}, ...")


def _of_callbacks(config: Config) -> Iterator[str]:
    """What diagnostics and mining log, if they are asked for, without distances: the encoder names its experts."""
    for task in config.tasks if config.diagnostics.every_n_steps else ():
        yield from (f"diag/{task}/{name}" for name in OF_TASK)
        yield from (
            f"diag/{task}/{kind}/{other}" for kind in ("gradient_cosine", "transplant") for other in config.tasks
        )
    if config.diagnostics.every_n_steps:
        yield "diag/seconds"
    if config.mining.every_n_steps:
        yield "mine/seconds"
        yield from (f"mine/{task}/{name}" for task in config.tasks for name in FIGURES)
