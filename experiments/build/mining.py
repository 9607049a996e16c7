"""Mined hard negatives, from the configuration to objects."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import lightning as L
import torch

from datamodules.batches import MultiTaskDataModule
from datamodules.hard_negatives import Rounds
from datamodules.records import UserError
from experiments.config.schema import Config
from experiments.config.targets import instantiate
from experiments.config.paths import folder_of
from lightning_modules.callbacks.hard_negatives import HardNegativeMining
from lightning_modules.encoders.loading import load_encoder
from lightning_modules.mining.mine import Mining

log = logging.getLogger(__name__)

NEGATIVES = "negatives"  # in a run's folder


def add_rounds(config: Config, data: MultiTaskDataModule) -> None:
    """Let the data draw from mined hard negatives, if there are or will be any."""
    settings = config.mining
    if not (settings.store or settings.every_n_steps or settings.every_n_epochs):
        return
    data.rounds = Rounds(folder_of(config).absolute() / NEGATIVES, settings.use, data.fingerprints())
    if settings.store:
        try:
            data.rounds.begin(0, str(Path(settings.store).absolute()))
        except UserError as error:
            raise UserError(f"mining.store: {error}") from error


def steps_between(config: Config, data: MultiTaskDataModule, batches_per_step: int) -> int:
    """Optimizer steps between two minings."""
    if not config.mining.every_n_epochs:
        return config.mining.every_n_steps
    devices = torch.cuda.device_count() if config.trainer.devices == -1 else config.trainer.devices
    ranks, schedule = devices * config.trainer.num_nodes, data.schedule()
    lengths = {task: int(schedule.costs[task].sum()) for task in schedule.costs}
    lengths = schedule.sizes | lengths  # in queries, or tokens, as batches are
    batches = sum(math.ceil(length / (schedule.batch_sizes[task] * ranks)) for task, length in lengths.items())
    return max(1, round(config.mining.every_n_epochs * batches / batches_per_step))


def build_mining(config: Config, vectors: Path) -> Mining:
    """What mines as the configuration says. vectors: folder of cached ones."""
    settings = config.mining
    nodes = {task: settings.miners.get(task, settings.miner) for task in config.task}
    if not any(nodes.values()):
        raise UserError("mining.miners: every task is null, so there is nothing to mine")
    guide = load_encoder(settings.guide, {t: t for t in config.task}, key="mining.guide") if settings.guide else None
    missing = [task for task, node in nodes.items() if guide and node and task not in guide.tasks]
    if missing:
        raise UserError(f"mining.guide: has no task {', '.join(missing)} (it has {', '.join(guide.tasks)})")
    return Mining(
        settings,
        {task: instantiate(node) for task, node in nodes.items() if node},
        vectors,
        similarity=config.objective.similarity,
        token_budget=config.data.token_budget,
        seed=config.run.seed,
        guide=guide,
    )


def build_mining_callback(
    config: Config, data: MultiTaskDataModule, folder: Path, batches_per_step: int
) -> list[L.Callback]:
    """The callback that mines in training, if the experiment asks for it."""
    every = steps_between(config, data, batches_per_step)
    if not every:
        return []
    first = every if config.mining.first_step is None else config.mining.first_step
    if first >= config.trainer.max_steps:
        log.warning(
            "mining.first_step: the first mining would be at step %d, and trainer.max_steps is %d: nothing is mined",
            first,
            config.trainer.max_steps,
        )
    mining = build_mining(config, folder / NEGATIVES / "vectors")
    for task in data.tasks:
        if not task.options.num_hard_negatives and task.task.name in mining.miners:
            log.info("%s is not mined, since task.%s.num_hard_negatives is 0", task.task.name, task.task.name)
            del mining.miners[task.task.name]
    return [HardNegativeMining(mining, first, every, config.mining.stop_at)]
