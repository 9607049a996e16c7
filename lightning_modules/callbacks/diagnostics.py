"""How tasks and experts get along in a training, measured on the last batch of each task."""

from __future__ import annotations

import dataclasses
import logging
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from datamodules.records import ContrastiveBatch
from lightning_modules.chunked import embed
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.diagnostics import (
    anisotropy,
    effective_negatives,
    expert_distances,
    expert_names,
    masked_share,
)
from lightning_modules.distributed.collectives import gather_rows, world_size
from lightning_modules.distributed.sharding import replica, sharded_gradients, slice_of
from lightning_modules.encoders.base import Encoder
from lightning_modules.expert_picture import write_svg
from lightning_modules.loggers import log_picture
from lightning_modules.losses import comparable, duplicate_mask, membership_mask
from lightning_modules.objective import text_keys_of_queries
from lightning_modules.task_balance import TaskGradients

log = logging.getLogger(__name__)

# What is logged of each task, beside what it has with others.
OF_TASK = ("gradient_norm", "masked_share", "effective_negatives", "mean_cosine", "first_share")


class Diagnostics(L.Callback):
    """Every n optimizer steps logs, as means over ranks:

        diag/<task>/gradient_norm               of the parameters that all tasks share
        diag/<task>/gradient_cosine/<other>     of two tasks' gradients of them; below 0 they conflict
        diag/<task>/transplant/<other>          loss of the task with the other's expert, prompt or adapter
        diag/<task>/masked_share                documents that are masked, as known positives or for their text
        diag/<task>/effective_negatives         perplexity of the softmax over a query's negatives
        diag/<task>/mean_cosine, /first_share   anisotropy of the vectors
        diag/experts/<one>-<other>/distance     relative, and /cosine, of their parameters
        diag/seconds                            that all this took

    What was measured last of transplants, cosines and distances is drawn after every draw_every_n_steps (0: never) and
    after the last step, into the file picture, and given to the loggers as diag/experts.

    Training is not changed by it. For T tasks it costs T steps without optimizer and T * T forwards, and the memory of
    T gradients.
    """

    def __init__(self, every_n_steps: int, draw_every_n_steps: int = 0, picture: Path | None = None):
        self.every_n_steps, self.draw_every_n_steps, self.picture = every_n_steps, draw_every_n_steps, picture
        self.batches: dict[str, ContrastiveBatch] = {}  # the last one of each task
        self.measured: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.logged_at = self.drawn_at = trainer.global_step

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
        with _kept_random_state(module):
            encoder = replica(module.encoder)
            values = self._gradients(trainer, module) | self._vectors(trainer, module, encoder)
        if world_size() > 1:
            table = torch.tensor(list(values.values()), dtype=torch.float64, device=module.device)
            dist.all_reduce(table)
            values = dict(zip(values, (table / world_size()).tolist(), strict=True))
        values |= {f"experts/{name}": value for name, value in expert_distances(encoder).items()}
        values["seconds"] = time.perf_counter() - started
        for logger in trainer.loggers:
            logger.log_metrics({f"diag/{name}": value for name, value in values.items()}, step=step)
        self.measured = values

    def _draw_if_due(self, trainer: L.Trainer, module: ContrastiveModule, step: int) -> None:
        due = step == trainer.max_steps or (self.draw_every_n_steps and step % self.draw_every_n_steps == 0)
        if not due or self.logged_at <= self.drawn_at or self.picture is None or not trainer.is_global_zero:
            return
        self.drawn_at, told = self.logged_at, f"tasks and experts at step {self.logged_at}"
        try:
            drawn = write_svg(self.picture, self.measured, sorted(self.batches), expert_names(module.encoder), told)
        except OSError as error:  # a full disk: no reason to end a training
            log.warning("%s cannot be written (%s)", self.picture, error.strerror)
            return
        if drawn:
            log_picture(trainer.loggers, "diag/experts", self.picture, step)

    def _gradients(self, trainer: L.Trainer, module: ContrastiveModule) -> dict[str, float]:
        """Norms and cosines of the tasks' gradients; nothing where tasks share no parameter."""
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        gradients, sharded = TaskGradients(list(map(slice_of, trained)), sorted(self.batches)), module.encoder.sharded
        for task in gradients.tasks:
            with trainer.precision_plugin.train_step_context():
                loss = module.training_step(self.batches[task], 0)["loss"]
            if sharded:
                gradients.add(task, sharded_gradients(loss, trained))
            else:
                gradients.add(task, torch.autograd.grad(loss, trained, allow_unused=True))
        if not gradients.used.all(0).any():
            return {}
        if not sharded:
            gradients.average_over_ranks()
        products = gradients.products().double()
        if sharded:
            dist.all_reduce(products)  # each rank has those of its slices
        products = products.cpu()
        norms = products.diagonal().sqrt()
        cosines = products / (norms[:, None] * norms).clamp(min=1e-30)
        values = {f"{task}/gradient_norm": norms[i].item() for i, task in enumerate(gradients.tasks)}
        for i, task in enumerate(gradients.tasks):
            for j, other in enumerate(gradients.tasks[:i]):
                values[f"{task}/gradient_cosine/{other}"] = cosines[i, j].item()
        return values

    @torch.no_grad()
    def _vectors(self, trainer: L.Trainer, module: ContrastiveModule, encoder: Encoder) -> dict[str, float]:
        """What the encoder's vectors of the tasks' batches tell, without dropout."""
        values: dict[str, float] = {}
        with _evaluating(module), trainer.precision_plugin.train_step_context():
            for task in sorted(self.batches):
                batch = self.batches[task]
                for other in sorted(self.batches):
                    if other == task or encoder.served_by(other) == encoder.served_by(task):
                        continue
                    transplanted = embed(encoder, dataclasses.replace(batch, task=other))[0]
                    values[f"{task}/transplant/{other}"] = float(module.objective(transplanted, batch)["loss"])
                vectors = embed(encoder, batch)[0]
                values[f"{task}/transplant/{task}"] = float(module.objective(vectors, batch)["loss"])
                values |= {f"{task}/{name}": value for name, value in _of_batch(module, vectors, batch).items()}
        return values


def _of_batch(module: ContrastiveModule, vectors: torch.Tensor, batch: ContrastiveBatch) -> dict[str, float]:
    """What the vectors (U, D) of a batch tell of its negatives, over the distinct documents of all ranks."""
    options, temperature = module.objective.options, module.objective.temperature(batch.task)
    documents, ids = gather_rows(vectors[batch.documents]), gather_rows(batch.document_ids)
    first = ~duplicate_mask(ids)
    documents, ids = documents[first], ids[first]
    own = torch.where(batch.positives < 0, -1, batch.document_ids[batch.positives.clamp(min=0)])  # (B, P) ids
    own, masked = membership_mask(own, ids), torch.zeros(len(own), len(ids), dtype=torch.bool, device=own.device)
    if options.mask_known_positives:
        masked |= membership_mask(batch.known_positives, ids)
    if options.mask_same_text and batch.text_keys is not None:
        keys = gather_rows(batch.text_keys[batch.documents])[first]
        masked |= membership_mask(text_keys_of_queries(batch), keys)
    with torch.autocast(module.device.type, enabled=False):
        queries, documents = (comparable(x, options.similarity) for x in (vectors[batch.queries], documents))
        mean_cosine, first_share = anisotropy(vectors)
        return {
            "masked_share": masked_share(own, masked),
            "effective_negatives": effective_negatives(queries @ documents.T / temperature, own | masked),
            "mean_cosine": mean_cosine,
            "first_share": first_share,
        }


@contextmanager
def _kept_random_state(module: ContrastiveModule):
    devices = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield


@contextmanager
def _evaluating(module: ContrastiveModule):
    """Without dropout; afterwards each part is in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
