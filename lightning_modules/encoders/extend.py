"""Add tasks to a trained encoder. If only the new experts are trained, the vectors of the old tasks do not change."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch

from datamodules.packed import ContrastiveBatch
from datamodules.records import UserError
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.base import Encoder
from lightning_modules.retrieval.compute import evaluating


def check_new_tasks(encoder: Encoder, tasks: Mapping[str, str]) -> None:
    """Raise UserError if a task or expert already exists, or if the encoder has no experts. tasks: task -> expert."""
    if type(encoder).add_expert is Encoder.add_expert:
        encoder.add_expert("", "")  # raises
    for task, expert in tasks.items():
        if task in encoder.tasks:
            raise UserError(
                f"task {task}: the encoder already has this task (its tasks are {', '.join(encoder.tasks)})"
            )
        if expert in encoder.tasks.values():
            raise UserError(f"task {task}: the expert {expert} already exists; a new task needs a new expert")


def add_tasks(encoder: Encoder, tasks: Mapping[str, str], like: Mapping[str, str], freeze: bool = True) -> None:
    """Add tasks to an encoder. Raises UserError like check_new_tasks.

    tasks: task -> expert. New tasks can share an expert.
    like: task -> the existing task whose expert is copied.
    freeze: whether to freeze everything except the new experts.
    """
    check_new_tasks(encoder, tasks)
    if freeze:
        encoder.requires_grad_(False)
    for task, expert in tasks.items():
        if expert not in encoder.tasks.values():
            encoder.add_expert(expert, encoder.expert_of(like[task]))
        encoder.tasks[task] = expert


def losses_by_task(module: ContrastiveModule, batches: Iterable[ContrastiveBatch]) -> dict[str, float]:
    """Return existing task -> mean loss of a new task's batches when they are encoded as the existing task.

    The task with the lowest loss is the nearest.
    """
    tasks, batches = list(module.encoder.tasks), list(batches)
    with evaluating(module), torch.no_grad():
        losses = {task: sum(_loss_as(module, batch, task) for batch in batches) for task in tasks}
    return {task: total / len(batches) for task, total in losses.items()}


def _loss_as(module: ContrastiveModule, batch: ContrastiveBatch, task: str) -> float:
    """Return the loss of a batch when its texts are encoded for another task. The objective does not change."""
    batch = batch.to(module.encoder.device)
    vectors, penalty = module.embed(dataclasses.replace(batch, task=task))
    return float(module.objective(vectors, batch)["loss"] + penalty)
