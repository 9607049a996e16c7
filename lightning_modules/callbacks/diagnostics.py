"""Measure how tasks and experts interact during training, on the last batch of each task.

Shapes: B queries, M documents, U texts, D dimensions of a vector, T tasks.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn

from datamodules.packed import ContrastiveBatch
from lightning_modules.callbacks.negatives import masked_and_positive
from lightning_modules.chunked import embed
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.distributed.collectives import mean_over_ranks
from lightning_modules.distributed.sharding import replica, sharded_gradients, slice_of
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.cross_stitch import CrossStitchEncoder
from lightning_modules.encoders.loading import without_lora
from lightning_modules.loggers import log_picture
from lightning_modules.loss_weights import loss_scaler
from lightning_modules.losses import similarities
from lightning_modules.objective import Supervision
from lightning_modules.pictures import write_expert_picture
from lightning_modules.retrieval.compute import evaluating
from lightning_modules.task_balance import TaskGradients

log = logging.getLogger(__name__)

# Values of a single task. All other values compare two tasks.
OF_TASK = ("gradient_norm", "masked_share", "effective_negatives", "mean_cosine", "first_share")


class Diagnostics(L.Callback):
    """Logs every n optimizer steps, as means over ranks:

        diag/<task>/gradient_norm               norm of the gradient with respect to parameters that all tasks share
        diag/<task>/gradient_cosine/<other>     cosine of these gradients of two tasks; below 0, they conflict
        diag/<task>/transplant/<other>          loss of the task with the other task's expert, prompt or adapter
        diag/<task>/masked_share                share of documents that the loss masks: known positives, equal texts,
                                                documents above a guide's margin, copies from other ranks
        diag/<task>/effective_negatives         perplexity of the softmax over a query's negatives
        diag/<task>/mean_cosine, /first_share   anisotropy of the vectors
        diag/experts/<one>-<other>/distance     relative distance of the parameters of two experts
        diag/experts/<one>-<other>/cosine       cosine of the parameters of two experts
        diag/stitches/<one>/<other>             weight of the other expert's output for tasks of one expert, averaged
                                                over layers
        diag/seconds                            time spent on diagnostics

    Training itself is not affected. Each measurement costs T steps without an optimizer, T * T forward passes, and the
    memory of T gradients.

    draw_every_n_steps: number of steps between plots of the latest transplants, cosines and distances. The last step
        always draws a plot; with 0, it is the only one.
    picture: SVG file to write. Loggers receive it as diag/experts.
    """

    def __init__(self, every_n_steps: int, draw_every_n_steps: int = 0, picture: Path | None = None):
        self.every_n_steps, self.draw_every_n_steps, self.picture = every_n_steps, draw_every_n_steps, picture
        self.batches: dict[str, ContrastiveBatch] = {}  # last batch of each task
        self.values: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, module: ContrastiveModule) -> None:
        self.logged_at = self.drawn_at = trainer.global_step
        source = getattr(trainer.train_dataloader, "batches", None)  # a user's own loader may lack this attribute
        if source is not None:  # a resumed run measures the same batches as an uninterrupted run
            batches = source.last_of_each_task(trainer.global_step * trainer.accumulate_grad_batches)
            self.batches = {task: batch.to(module.device) for task, batch in batches.items()}

    def on_train_batch_end(
        self, trainer: L.Trainer, module: ContrastiveModule, outputs: Any, batch: ContrastiveBatch, batch_idx: int
    ) -> None:
        self.batches[batch.task] = batch
        step = trainer.global_step
        if step > self.logged_at and step % self.every_n_steps == 0:
            self._measure(trainer, module, step)
        self._draw_if_due(trainer, module, step)

    def _measure(self, trainer: L.Trainer, module: ContrastiveModule, step: int) -> None:
        self.logged_at, started = step, time.perf_counter()
        with torch.random.fork_rng([module.device] if module.device.type == "cuda" else []):
            encoder = without_lora(replica(module.encoder))
            values = self._gradients(trainer, module) | self._vectors(trainer, module, encoder)
        means = mean_over_ranks(torch.tensor(list(values.values()), dtype=torch.float64, device=module.device))
        values = dict(zip(values, means.tolist(), strict=True))
        values |= {f"experts/{name}": value for name, value in expert_distances(encoder).items()}
        values |= {f"stitches/{name}": value for name, value in mean_stitches(encoder).items()}
        values["seconds"] = time.perf_counter() - started
        for logger in trainer.loggers:
            logger.log_metrics({f"diag/{name}": value for name, value in values.items()}, step=step)
        self.values = values

    def _draw_if_due(self, trainer: L.Trainer, module: ContrastiveModule, step: int) -> None:
        due = step == trainer.max_steps or (self.draw_every_n_steps and step % self.draw_every_n_steps == 0)
        if not due or self.logged_at <= self.drawn_at or self.picture is None or not trainer.is_global_zero:
            return
        self.drawn_at, title = self.logged_at, f"tasks and experts at step {self.logged_at}"
        tasks, experts = sorted(self.batches), expert_names(module.encoder)
        try:
            drawn = write_expert_picture(self.picture, self.values, tasks, experts, title)
        except OSError as error:  # a full disk must not end the run
            log.warning("%s: cannot be written (%s)", self.picture, error.strerror)
            return
        if drawn:
            log_picture(trainer.loggers, "diag/experts", self.picture, step)

    def _gradients(self, trainer: L.Trainer, module: ContrastiveModule) -> dict[str, float]:
        """Return norms and cosines of the tasks' gradients, or {} if no parameters are shared."""
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        gradients, sharded = TaskGradients([slice_of(x) for x in trained], sorted(self.batches)), module.encoder.sharded
        scaler = loss_scaler(trainer)
        scale = scaler.get_scale() if scaler else 1.0  # without it, small gradients would vanish in fp16
        for task in gradients.tasks:
            with trainer.precision_plugin.train_step_context():
                loss = scale * module.training_step(self.batches[task], 0)["loss"]
            if sharded:
                gradients.add(task, sharded_gradients(loss, trained))
            else:
                gradients.add(task, torch.autograd.grad(loss, trained, allow_unused=True))
        if not gradients.used.all(0).any():
            return {}
        if not sharded:
            gradients.average_over_ranks()
        products = gradients.products().double()  # (T, T)
        if sharded:
            dist.all_reduce(products)  # each rank has computed the products of its slices
        products = products.cpu()
        norms = products.diagonal().sqrt()  # includes the scale, which cancels in the cosines
        cosines = products / (norms[:, None] * norms).clamp(min=1e-30)
        values = {f"{task}/gradient_norm": norms[i].item() / scale for i, task in enumerate(gradients.tasks)}
        for i, task in enumerate(gradients.tasks):
            for j, other in enumerate(gradients.tasks[:i]):
                values[f"{task}/gradient_cosine/{other}"] = cosines[i, j].item()
        return values

    @torch.no_grad()
    def _vectors(self, trainer: L.Trainer, module: ContrastiveModule, encoder: Encoder) -> dict[str, float]:
        """Return each task's transplants, and figures on its negatives and vectors, computed without dropout."""
        values: dict[str, float] = {}
        with evaluating(module), trainer.precision_plugin.train_step_context():
            for task in sorted(self.batches):
                batch = self.batches[task]
                supervision = module.objective.supervise(batch)
                for other in sorted(self.batches):
                    if other == task or encoder.served_by(other) == encoder.served_by(task):
                        continue
                    transplanted = embed(encoder, dataclasses.replace(batch, task=other)).vectors
                    loss = module.objective(transplanted, batch, supervision)["loss"]
                    values[f"{task}/transplant/{other}"] = float(loss)
                vectors = embed(encoder, batch).vectors
                values[f"{task}/transplant/{task}"] = float(module.objective(vectors, batch, supervision)["loss"])
                figures = negative_figures(module, vectors, batch, supervision)
                values |= {f"{task}/{name}": value for name, value in figures.items()}
        return values


def negative_figures(
    module: ContrastiveModule, vectors: Tensor, batch: ContrastiveBatch, supervision: Supervision
) -> dict[str, float]:
    """Return figures on the vectors (U, D) of a batch, and on its negatives among the documents of all ranks."""
    objective, temperature = module.objective, module.objective.temperature(batch.task)
    direction, *_ = objective.directions(vectors, batch, supervision)
    with torch.autocast(module.device.type, enabled=False):
        masked, positives = masked_and_positive(direction)  # (B, M)
        scores = similarities(direction.queries, direction.candidates, objective.options.similarity)
        mean_cosine, first_share = anisotropy(vectors)
        return {
            "masked_share": masked_share(positives, masked),
            "effective_negatives": effective_negatives(scores / temperature, positives | masked),
            "mean_cosine": mean_cosine,
            "first_share": first_share,
        }


def masked_share(positives: Tensor, masked: Tensor) -> float:
    """Return the share of non-positive documents that are masked. positives, masked: (B, M) bool."""
    return ((masked & ~positives).sum() / (~positives).sum().clamp(min=1)).item()


def effective_negatives(logits: Tensor, excluded: Tensor) -> float:
    """Return the perplexity of the softmax over a query's negatives, averaged over queries.

    The perplexity is the number of negatives if all have the same weight, 1 if one of them has all the weight, and 0
    without negatives.

    logits: scores divided by the temperature, (B, M).
    excluded: documents that are not negatives, (B, M) bool.
    """
    logs = logits.double().masked_fill(excluded, -torch.inf).log_softmax(1)
    entropy = -(logs.exp() * logs.masked_fill(excluded, 0.0)).sum(1)
    return torch.where(excluded.all(1), 0.0, entropy.exp()).mean().item()


def anisotropy(vectors: Tensor) -> tuple[float, float]:
    """Return the mean cosine of two texts, and the largest squared singular value as a share of their sum.

    Both are near 1 if all vectors point in the same direction. The first follows Ethayarajh (arXiv 1909.00512, section
    4.1).

    vectors: vectors of any norm, (U, D).
    """
    vectors = nn.functional.normalize(vectors.double(), dim=1)
    count = len(vectors)
    mean = (vectors.sum(0).square().sum() - count) / max(1, count * (count - 1))
    gram = vectors.T @ vectors if vectors.shape[1] < count else vectors @ vectors.T  # the smaller one
    squares = torch.linalg.eigvalsh(gram)  # ascending
    return mean.item(), (squares[-1] / squares.sum()).item()


def expert_names(encoder: Encoder) -> tuple[str, ...]:
    return tuple(getattr(encoder, "experts", None) or dict.fromkeys(encoder.tasks.values()))


def expert_distances(encoder: Encoder) -> dict[str, float]:
    """Return the cosine of each pair of experts, and their distance relative to the norm of their mean.

    The result is empty for an encoder without experts.
    """
    names = expert_names(encoder)
    groups = [m for m in encoder.modules() if isinstance(m, nn.ModuleDict) and set(names) <= set(m.keys())]
    values = {}
    for one, other in itertools.combinations(names, 2) if groups else ():
        a, b = (
            torch.cat([p.detach().double().flatten() for group in groups for p in group[name].parameters()])
            for name in (one, other)
        )
        values[f"{one}-{other}/distance"] = ((a - b).norm() / ((a + b) / 2).norm()).item()
        values[f"{one}-{other}/cosine"] = nn.functional.cosine_similarity(a, b, dim=0).item()
    return values


def mean_stitches(encoder: Encoder) -> dict[str, float]:
    """Return EXPERT/OTHER -> weight in a CrossStitchEncoder, averaged over layers, or {} for other encoders."""
    if not isinstance(encoder, CrossStitchEncoder):
        return {}
    return {
        f"{expert}/{other}": sum(row[other].item() for row in rows) / len(rows)
        for expert in encoder.experts
        for rows in [[encoder.stitch_weights(index, expert) for index in encoder.expert_layers]]
        for other in encoder.experts
    }
