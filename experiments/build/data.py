"""From a configuration to data and their schedule."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only

from datamodules.batches import BatchOptions, MultiTaskDataModule
from datamodules.records import Task, UserError
from datamodules.schedule import Phase, check_phases, checked_weights, task_weights
from datamodules.tasks import KINDS, CollectionError, Reader
from experiments.build.leaks import answer_leaks
from experiments.build.mining import add_rounds
from experiments.build.own_data import check_folder, tell_of_sample
from experiments.config.schema import Config
from experiments.config.targets import accepted_arguments, instantiate
from experiments.config.paths import folder_of

log = logging.getLogger(__name__)


def build_data(config: Config, training: bool = False) -> MultiTaskDataModule:
    """All tasks' data, read and checked. The tokenizer comes with the encoder. training: answer leaks as configured,
    and draw from mined hard negatives."""
    options = BatchOptions(
        batch_size=config.data.batch_size,
        batch_tokens=config.data.batch_tokens,
        num_batches=config.trainer.max_steps * batches_per_step(config),
        max_length=config.data.max_length,
        token_budget=config.data.token_budget,
        num_positives=config.data.num_positives,
        num_hard_negatives=config.data.num_hard_negatives,
        carry_texts=bool(config.objective.guide.model or config.objective.teacher.model),
        num_workers=config.data.num_workers,
        seed=config.run.seed,
        cache=config.data.cache or "",
    )
    tasks = []
    for name, task in config.task.items():
        for key, node in task.data.items():
            check_folder(config, name, key, node)
        readers = {key: _reader(config, node) for key, node in task.data.items()}
        keys = ("batch_size", "max_length", "num_positives", "num_hard_negatives")
        own = {key: getattr(task, key) for key in keys if getattr(task, key) is not None}
        own |= {"batch_tokens": 0} if "batch_size" in own else {}
        own_options = dataclasses.replace(options, **own)
        tasks.append(KINDS[task.kind](Task(name, task.expert, task.instruction), readers, own_options))
    data = MultiTaskDataModule(tasks, options)
    try:
        data.setup()
    except CollectionError as error:
        raise UserError(f"task.{error.task}.data.{error.collection}: {error.problem}") from error
    if training:
        tell_of_sample(config, data.tasks)
        answer_leaks(config.data, data.tasks)
        add_rounds(config, data)
    data.options = dataclasses.replace(options, phases=_phases(config, data))
    return data


def _reader(config: Config, node: Mapping[str, Any]) -> Reader:
    """A task's reader; what becomes of bad lines is as data.on_error says, unless its node does."""
    rank = rank_zero_only.rank
    name = f"quarantine-rank{rank}.jsonl" if rank else "quarantine.jsonl"  # ranks read the same files
    given = {"on_error": config.data.on_error, "quarantine": str(folder_of(config) / name)}
    return instantiate(node, **{key: given[key] for key in accepted_arguments(node, given) if key not in node})


def batches_per_step(config: Config) -> int:
    """Batches of one optimizer step, on each rank."""
    together = len(config.tasks) if config.data.schedule == "together" else 1
    return config.trainer.accumulate_grad_batches * together


def _phases(config: Config, data: MultiTaskDataModule) -> tuple[Phase, ...]:
    """The schedule's phases, in batches."""
    sizes = {task.task.name: len(task.examples) for task in data.tasks}
    settings = config.data
    if settings.curriculum and settings.schedule == "together":
        raise UserError("data.curriculum: with data.schedule=together every step has a batch of every task")
    with _prefixed("data."):
        phases = [Phase(0, task_weights(settings.schedule, sizes, settings.schedule_temperature, settings.weights))]
    for i, phase in enumerate(settings.curriculum):
        with _prefixed(f"data.curriculum[{i}]."):
            weights = checked_weights(phase.weights, sizes)
        phases.append(Phase(phase.from_step * config.trainer.accumulate_grad_batches, weights))
    with _prefixed("data.curriculum: "):
        check_phases(phases)
    return tuple(phases)


@contextmanager
def _prefixed(key: str) -> Iterator[None]:
    """Put a configuration key before the messages of errors."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}{error}") from error


def describe_schedule(config: Config, data: MultiTaskDataModule) -> dict[str, dict[str, float]]:
    """Task -> its batches in the whole training and the passes through its examples, on all ranks; told in the log."""
    schedule, batches = data.schedule(), data.options.num_batches
    devices = torch.cuda.device_count() if config.trainer.devices == -1 else config.trainer.devices
    ranks = devices * config.trainer.num_nodes
    told = {}
    for task in schedule.tasks:
        turns = schedule.turns(batches, task)
        told[task] = {"batches": turns, "passes": round(schedule.passes(batches, task, ranks), 2)}
    first = " ".join(schedule.task(step) for step in range(min(batches, 2 * len(schedule.tasks) + 2)))
    log.info("schedule (%s): %s%s", config.data.schedule, first, " ..." if batches > 2 * len(told) + 2 else "")
    for task in data.tasks:
        counts, parts = told[task.task.name], task.examples_by_collection()
        of = ", ".join(f"{name} ({size})" if len(parts) > 1 else name for name, size in parts.items())
        size, passes = len(task.examples), counts["passes"]
        log.info(
            "  %s: %d batches, %.2f passes through %d examples of %s",
            *(task.task.name, counts["batches"], passes, size, of),
        )
    return told
