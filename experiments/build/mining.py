"""Build the mining of hard negatives from the configuration, and pass mined negatives to the data."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from datamodules.batches import MultiTaskDataModule
from datamodules.hard_negatives import Rounds
from datamodules.records import UserError, prefixed
from experiments.build.models import device_of, ranks_of
from experiments.config.experiment import NEGATIVES, folder_of
from experiments.config.schema import Config
from experiments.config.targets import instantiate
from lightning_modules.callbacks.hard_negatives import HardNegativeMining
from lightning_modules.encoders.backbone import installed
from lightning_modules.encoders.loading import check_serves, load_encoder
from lightning_modules.mining.mine import Mining
from lightning_modules.mining.relabel import Judge

log = logging.getLogger(__name__)


def add_rounds(config: Config, data: MultiTaskDataModule) -> None:
    """Make the data use mined hard negatives if the run has, or will have, any."""
    settings = config.mining
    if not (settings.store or settings.every_n_steps or settings.every_n_epochs):
        return
    data.rounds = Rounds(folder_of(config).absolute() / NEGATIVES, settings.use, data.fingerprints())
    if settings.store:
        with prefixed("mining.store: "):
            data.rounds.begin(0, str(Path(settings.store).absolute()))


def steps_between(config: Config, data: MultiTaskDataModule, batches_per_step: int) -> int:
    """Return the number of optimizer steps from one mining to the next."""
    if not config.mining.every_n_epochs:
        return config.mining.every_n_steps
    batches = data.schedule().batches_per_pass(ranks_of(config))
    return max(1, round(config.mining.every_n_epochs * batches / batches_per_step))


def build_mining(config: Config, vectors: Path, device: torch.device) -> Mining:
    """Build the mining for all tasks. vectors: folder for cached vectors. device: device of the guide model."""
    settings = config.mining
    nodes = {task: settings.miners.get(task, settings.miner) for task in config.task}
    if not any(nodes.values()):
        raise UserError("mining.miners: null for every task, so there is nothing to mine; set a miner for one of them")
    guide = None
    if settings.guide:
        tasks, allowed = {task: task for task in config.task}, config.extend.packages
        guide = load_encoder(installed(settings.guide, "mining.guide"), tasks, key="mining.guide", packages=allowed)
        check_serves(guide, [task for task, node in nodes.items() if node], "mining.guide")
    return Mining(
        settings,
        {task: instantiate(node, _key(settings.miners, "miner", task)) for task, node in nodes.items() if node},
        vectors,
        similarity=config.objective.similarity,
        token_budget=config.data.token_budget,
        seed=config.run.seed,
        guide=guide,
        device=device,
        judges=_build_judges(config, [task for task, node in nodes.items() if node]),
    )


def _build_judges(config: Config, tasks: Sequence[str]) -> dict[str, Judge]:
    """Return the judge of each mined task that has one. Tasks with the same node share it."""
    settings, judges = config.mining, {}
    nodes = {task: settings.judges.get(task, settings.judge) for task in tasks}
    for task, node in nodes.items():
        if node and task not in judges:
            judged = [other for other, each in nodes.items() if each == node]
            provided = {"tasks": dict(zip(judged, judged, strict=True)), "packages": config.extend.packages}
            judges |= dict.fromkeys(judged, instantiate(node, _key(settings.judges, "judge", task), **provided))
    return judges


def _key(by_task: Mapping[str, Any], kind: str, task: str) -> str:
    """Return the key of a task's miner or judge. by_task: mining.miners or mining.judges. kind: miner or judge."""
    return f"mining.{kind}s.{task}" if by_task.get(task) else f"mining.{kind}"


def build_mining_callback(
    config: Config, data: MultiTaskDataModule, folder: Path, batches_per_step: int
) -> list[L.Callback]:
    """Build the callback that mines during training, if the experiment asks for it. folder: the run's folder."""
    every, max_steps = steps_between(config, data, batches_per_step), config.trainer.max_steps
    if not every:
        if config.mining.judge or any(config.mining.judges.values()):
            raise UserError(
                "mining.judge: this run mines nothing, so there is nothing to judge; set mining.every_n_steps, or "
                "judge the negatives of a store with make mine mining.store=FOLDER mining.judge=..., and train on its "
                "output"
            )
        return []
    first = every if config.mining.first_step is None else config.mining.first_step
    if first >= max_steps:
        message = (
            "mining.first_step: nothing is mined, because the first mining would be at step %d, but trainer.max_steps "
            "is %d"
        )
        log.warning(message, first, max_steps)
    mining = build_mining(config, folder / NEGATIVES / "vectors", device_of(config))
    for task in data.tasks:
        if not task.options.num_hard_negatives and task.task.name in mining.miners:
            log.info("%s: not mined, because task.%s.num_hard_negatives=0", task.task.name, task.task.name)
            del mining.miners[task.task.name]
    return [HardNegativeMining(mining, first, every, config.mining.stop_at)]
