"""New tasks for a trained encoder: copies of its nearest experts are trained, and everything else is frozen.

The vectors of the existing tasks do not change, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch

from datamodules.records import ContrastiveBatch, UserError
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.base import Encoder


def check_new_tasks(encoder: Encoder, tasks: Mapping[str, str]) -> None:
    """Raise UserError if a task or its expert exists already, or if the encoder has no experts by task.

    tasks: task -> expert.
    """
    if type(encoder).add_expert is Encoder.add_expert:
        encoder.add_expert("", "")
    for task, expert in tasks.items():
        if task in encoder.tasks:
            raise UserError(f"task {task}: the encoder has it already (its tasks are {', '.join(encoder.tasks)})")
        if expert in encoder.tasks.values():
            raise UserError(f"task {task}: the expert {expert} exists already; a new task needs a new expert")


def add_tasks(encoder: Encoder, tasks: Mapping[str, str], like: Mapping[str, str]) -> None:
    """Add tasks to an encoder, and freeze everything except their experts.

    tasks: task -> expert. New tasks can share an expert.
    like: task -> the existing task from whose expert the new one is initialized.

    Raises UserError as check_new_tasks does.
    """
    check_new_tasks(encoder, tasks)
    encoder.requires_grad_(False)
    for task, expert in tasks.items():
        if expert not in encoder.tasks.values():
            encoder.add_expert(expert, encoder.expert_of(like[task]))
        encoder.tasks[task] = expert


def losses_by_task(module: ContrastiveModule, batches: Iterable[ContrastiveBatch]) -> dict[str, float]:
    """Return the mean loss of a new task's batches when they are encoded for each existing task.

    The task with the lowest loss is the nearest one.
    """
    tasks, batches = list(module.encoder.tasks), list(batches)
    training = module.training
    module.eval()
    with torch.no_grad():
        losses = {task: sum(_loss_as(module, batch, task) for batch in batches) for task in tasks}
    module.train(training)
    return {task: total / len(batches) for task, total in losses.items()}


def _loss_as(module: ContrastiveModule, batch: ContrastiveBatch, task: str) -> float:
    """Return the loss of a batch, by the objective of its own task, when its texts are encoded for another task."""
    vectors, penalty = module.embed(dataclasses.replace(batch, task=task))
    return float(module.objective(vectors, batch)["loss"] + penalty)
