"""Build the data of an experiment, and the schedule of its batches."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.batches import BatchOptions, MultiTaskDataModule
from datamodules.files import expanded
from datamodules.records import Reader, Task, UserError, prefixed
from datamodules.schedule import Phase, checked_weights, task_weights
from datamodules.tasks import KINDS, CollectionError, TaskDataModule
from experiments.build.leaks import handle_leaks
from experiments.build.mining import add_rounds
from experiments.build.models import device_of, ranks_of
from experiments.config.experiment import folder_of
from experiments.config.schema import Config, TaskConfig
from experiments.config.targets import instantiate
from lightning_modules.distributed import launch
from lightning_modules.objective_options import ObjectiveOptions

log = logging.getLogger(__name__)

SAMPLE = "datamodules.sample."
# A GPU is idle between small chunks, and large ones need much memory.
TRAINING_TOKEN_BUDGETS = {"cpu": 2048, "cuda": 32768}


def build_data(config: Config, training: bool = False) -> MultiTaskDataModule:
    """Read and check the data of all tasks. build_module sets the tokenizer.

    training: also apply data.on_leak, and use mined hard negatives.
    """
    options = batch_options(config)
    data = MultiTaskDataModule(
        [_build_task(config, name, task, options) for name, task in config.task.items()], options
    )
    try:
        data.setup()
    except CollectionError as error:
        raise UserError(f"task.{error.task}.data.{error.collection}: {error.problem}") from error
    if training:
        warn_about_sample(config, data.tasks)
        handle_leaks(config.data, data.tasks, set().union(*_sample_collections(config).values()))
        add_rounds(config, data)
    data.options = dataclasses.replace(options, phases=_phases(config, data))
    return data


def batch_options(config: Config) -> BatchOptions:
    """Return the batch options, without the overrides of individual tasks."""
    settings = config.data
    return BatchOptions(
        batch_size=settings.batch_size,
        batch_tokens=settings.batch_tokens,
        num_batches=config.trainer.max_steps * batches_per_step(config),
        max_length=settings.max_length,
        token_budget=settings.token_budget or TRAINING_TOKEN_BUDGETS[device_of(config).type],
        num_positives=settings.num_positives,
        num_hard_negatives=settings.num_hard_negatives,
        collection_temperature=settings.collection_temperature,
        mixed_batches=settings.mixed_batches,
        carry_texts=_needs_texts(config.objective),
        num_workers=settings.num_workers,
        seed=config.run.seed,
        cache=str(expanded(settings.cache, "data.cache", ", or data.cache=null")) if settings.cache else "",
    )


def _needs_texts(objective: ObjectiveOptions) -> bool:
    """Return whether a frozen model must encode the texts of each batch."""
    encodes_batches = objective.vector_teacher.model and not objective.vector_teacher.cached
    return bool(objective.guide.model or objective.teacher.model or encodes_batches)


def batches_per_step(config: Config) -> int:
    """Return the number of batches per optimizer step on each rank."""
    tasks_per_step = len(config.tasks) if config.data.schedule == "together" else 1
    return config.trainer.accumulate_grad_batches * tasks_per_step


def resolve_epochs(config: Config, data: MultiTaskDataModule) -> None:
    """If trainer.max_epochs is set, set trainer.max_steps to the same number of optimizer steps.

    data: data that has the tokenizer, on which the number of batches depends if their size is in tokens.
    """
    settings = config.trainer
    if not settings.max_epochs:
        return
    per_step, batches = batches_per_step(config), data.schedule().batches_per_pass(ranks_of(config))
    settings.max_steps = max(1, round(settings.max_epochs * batches / per_step))
    data.options = dataclasses.replace(data.options, num_batches=settings.max_steps * per_step)
    num_examples = sum(len(task.examples) for task in data.tasks)
    message = "trainer.max_epochs=%g: passes over %d examples in %d optimizer steps"
    log.info(message, settings.max_epochs, num_examples, settings.max_steps)


def _build_task(config: Config, name: str, task: TaskConfig, options: BatchOptions) -> TaskDataModule:
    for key, node in task.data.items():
        check_folder(config, name, key, node)
    readers = {key: _build_reader(config, f"task.{name}.data.{key}", node) for key, node in task.data.items()}
    overrides = {
        key: value
        for key in (
            *("batch_size", "max_length", "num_positives", "num_hard_negatives"),
            *("collection_temperature", "mixed_batches"),
        )
        if (value := getattr(task, key)) is not None
    }
    return KINDS[task.kind](Task(name, task.expert, task.instruction), readers, options.override(**overrides))


def _build_reader(config: Config, key: str, node: Mapping[str, Any]) -> Reader:
    """Create the reader of a collection. The collection's on_error overrides data.on_error. key: key of the node."""
    rank = launch.rank(max(config.trainer.devices, 1))
    name = f"quarantine-rank{rank}.jsonl" if rank else "quarantine.jsonl"  # all ranks read the same files
    return instantiate(node, key, on_error=config.data.on_error, quarantine=str(folder_of(config) / name))


def check_folder(config: Config, task: str, name: str, node: Mapping[str, Any]) -> None:
    """Raise UserError if the folder of a collection is missing. The message names the keys that set it."""
    folder = node.get("folder")
    if folder is None or Path(folder).exists():
        return
    message = f"task.{task}.data.{name}: {folder}: no such folder. Set task.{task}.data=FOLDER to use yours"
    if Path(config.data.root) in Path(folder).parents:
        message += f", or data.root=FOLDER to the folder that contains {Path(folder).relative_to(config.data.root)}"
    if len(config.tasks) > 1:
        message += f"; tasks=[...] without {task} trains only the other tasks"
    raise UserError(message)


def _sample_collections(config: Config) -> dict[str, set[str]]:
    """Return the names of the collections of the synthetic sample, by task."""
    return {
        name: {key for key, node in task.data.items() if node["_target_"].startswith(SAMPLE)}
        for name, task in config.task.items()
    }


def warn_about_sample(config: Config, tasks: Sequence[TaskDataModule]) -> None:
    """Warn if the training mixes the synthetic sample with the user's collections."""
    sample = _sample_collections(config)
    with_own_data = [name for name, task in config.task.items() if set(task.data) != sample[name]]
    if not with_own_data or not any(sample.values()):
        return
    evaluated = [key for task in tasks for key, collection in task.collections.items() if "dev" in collection.splits]
    evaluated = evaluated if config.evaluation.every_n_steps else []
    log.warning(
        "training uses the synthetic sample in addition to your data, and it counts in the mean of the final table%s",
        f"; best.ckpt is selected on the dev splits of {', '.join(evaluated)}" if evaluated else "",
    )
    for name, synthetic in sample.items():
        if name not in with_own_data:
            log.warning("  %s has only the sample: tasks=[%s] trains without this task", name, ",".join(with_own_data))
        elif synthetic:
            removals = " ".join(f"task.{name}.data.{key}=null" for key in sorted(synthetic))
            log.warning("  %s: task.%s.data=FOLDER uses only your data; %s drops the sample", name, name, removals)


def _phases(config: Config, data: MultiTaskDataModule) -> tuple[Phase, ...]:
    """Return the phases of the schedule. Their starts are counted in batches, not in optimizer steps."""
    sizes = {task.task.name: len(task.examples) for task in data.tasks}
    settings = config.data
    if settings.curriculum and settings.schedule == "together":
        raise UserError(
            "data.curriculum: cannot be used with data.schedule=together, where every step has a batch of every task"
        )
    with prefixed("data."):
        weights = task_weights(settings.schedule, sizes, settings.schedule_temperature, settings.weights)
    phases = [Phase(0, weights)]
    for i, phase in enumerate(settings.curriculum):
        with prefixed(f"data.curriculum[{i}]."):
            weights = checked_weights(phase.weights, sizes)
        phases.append(Phase(phase.from_step * config.trainer.accumulate_grad_batches, weights))
    return tuple(phases)


def describe_schedule(config: Config, data: MultiTaskDataModule) -> dict[str, dict[str, float]]:
    """Log the schedule. Return each task's number of batches, and the number of passes over its examples."""
    schedule, num_batches, ranks = data.schedule(), data.options.num_batches, ranks_of(config)
    shares = {
        task: {
            "batches": schedule.turns(num_batches, task),
            "passes": round(schedule.passes(num_batches, task, ranks), 2),
        }
        for task in schedule.tasks
    }
    shown = min(num_batches, 2 * len(shares) + 2)
    first = " ".join(schedule.task(step) for step in range(shown))
    log.info("schedule (%s): %s%s", config.data.schedule, first, " ..." if num_batches > shown else "")
    for task in data.tasks:
        sizes = task.examples_by_collection()
        names = ", ".join(f"{name} ({size})" if len(sizes) > 1 else name for name, size in sizes.items())
        share = shares[task.task.name]
        log.info(
            "  %s: %d batches, %.2f passes over %d examples of %s",
            *(task.task.name, share["batches"], share["passes"], len(task.examples), names),
        )
    return shares
