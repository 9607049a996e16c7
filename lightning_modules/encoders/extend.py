"""New tasks for a trained encoder: copies of its nearest experts are trained, everything else stays as it is.

The vectors of the tasks that were there before stay the same, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch

from datamodules.records import ContrastiveBatch, UserError
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.base import Encoder


def check_new_tasks(encoder: Encoder, tasks: Mapping[str, str]) -> None:
    """Raise UserError for tasks (task -> expert) that are there already, or would change an expert that is.

    Also for an encoder that has no experts by task.
    """
    if type(encoder).add_expert is Encoder.add_expert:
        encoder.add_expert("", "")
    for task, expert in tasks.items():
        if task in encoder.tasks:
            raise UserError(f"task {task}: the encoder has it already (its tasks are {', '.join(encoder.tasks)})")
        if expert in encoder.tasks.values():
            raise UserError(f"task.{task}.expert: {expert} is there already; a new task needs an expert of its own")


def add_tasks(encoder: Encoder, tasks: Mapping[str, str], like: Mapping[str, str]) -> None:
    """Give an encoder new tasks, and freeze all but their experts.

    tasks: task -> expert; tasks may share one. like: task -> an older task, whose expert the new one begins as. Raises
    UserError as check_new_tasks, and for an encoder without experts.
    """
    check_new_tasks(encoder, tasks)
    encoder.requires_grad_(False)
    for task, expert in tasks.items():
        if expert not in encoder.tasks.values():
            encoder.add_expert(expert, encoder.expert_of(like[task]))
        encoder.tasks[task] = expert


def losses_by_task(module: ContrastiveModule, batches: Iterable[ContrastiveBatch]) -> dict[str, float]:
    """The mean loss of batches of a new task if they were of each of the encoder's tasks: the lowest is the nearest."""
    tasks, batches = list(module.encoder.tasks), list(batches)
    training = module.training
    module.eval()
    with torch.no_grad():
        losses = {task: sum(_loss_as(module, batch, task) for batch in batches) for task in tasks}
    module.train(training)
    return {task: total / len(batches) for task, total in losses.items()}


def _loss_as(module: ContrastiveModule, batch: ContrastiveBatch, task: str) -> float:
    """A batch's loss, by its own task's objective, if its texts were encoded for another task."""
    vectors, penalty = module.embed(dataclasses.replace(batch, task=task))
    return float(module.objective(vectors, batch)["loss"] + penalty)
