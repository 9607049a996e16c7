"""Contrastive training of an encoder, one task per batch."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from datamodules.batches import ContrastiveDataModule
from datamodules.options import check_options
from datamodules.packed import Companion, ContrastiveBatch
from datamodules.records import UserError, prefixed
from lightning_modules.auxiliary.auxiliary_loss import AuxiliaryLoss
from lightning_modules.chunked import Batch, Embedded, embed, embed_cached
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.loading import describe, weight_problems
from lightning_modules.frozen import FrozenEncoder
from lightning_modules.loss_weights import UncertaintyWeights, loss_scaler
from lightning_modules.losses import comparable
from lightning_modules.objective import Objective
from lightning_modules.objective_options import ObjectiveOptions
from lightning_modules.optim import ExpertDecay, freeze, parameter_groups, schedule
from lightning_modules.optim_options import OptimOptions
from lightning_modules.parts import can_name_module
from lightning_modules.retrieval.vector_cache import VectorCache, vectors_of_parts

log = logging.getLogger(__name__)

START_TEACHER = "start"  # the encoder before training, as vector teacher
VECTORS = "teacher-vectors"  # folder inside the cache of converted collections


class CheckpointMismatch(UserError):
    """Raised if a checkpoint does not fit the module that should resume from it."""


class ContrastiveModule(L.LightningModule):
    """An encoder with its objective and optimizer.

        L.Trainer(max_steps=1000).fit(ContrastiveModule(encoder, similarity="cosine", temperature=0.05), data)

    tasks: names of the tasks in training, by default all tasks of the encoder.
    guide_model, teacher_model, vector_teacher_model: frozen models, required if the options of the objective name them.
        The vector teacher "start" is a copy of the encoder.
    grad_cache: whether to keep the graph of only one chunk of texts in memory at a time (see chunked.py).
    losses: losses added to InfoNCE, by name. Losses with weight 0 are left out.
    optim: options of the optimizer.
    total_steps: number of optimizer steps of the learning-rate schedule, by default the trainer's.
    objective: fields of ObjectiveOptions.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        tasks: Sequence[str] | None = None,
        guide_model: FrozenEncoder | None = None,
        teacher_model: FrozenEncoder | None = None,
        vector_teacher_model: FrozenEncoder | None = None,
        grad_cache: bool = False,
        losses: Mapping[str, AuxiliaryLoss] | None = None,
        optim: OptimOptions | None = None,
        total_steps: int | None = None,
        **objective: Any,
    ):
        super().__init__()
        if any(encoder.document_task(task) != task for task in encoder.tasks):
            raise UserError("an encoder with a separate adapter for documents can be used, but not trained")
        options, tasks = ObjectiveOptions(**objective), tasks or list(encoder.tasks)
        self.optim, self.total_steps, self.grad_cache = optim or OptimOptions(), total_steps, grad_cache
        check_options(self.optim)
        if options.vector_teacher.model == START_TEACHER and vector_teacher_model is None:
            vector_teacher_model = FrozenEncoder(copy.deepcopy(encoder), options.similarity)
        frozen_models = {"guide": guide_model, "teacher": teacher_model, "vector_teacher": vector_teacher_model}
        for role, model in frozen_models.items():
            name = getattr(options, role).model
            if name and model is None:
                raise UserError(f"{role}.model: {name!r} is not loaded here; pass a FrozenEncoder as {role}_model")
        freeze(encoder, self.optim.lr_scale)
        self.encoder = encoder
        encoder.similarity = options.similarity  # part of its description in checkpoints
        self.objective = Objective(options, tasks, encoder.dimension, *frozen_models.values())
        for name in losses or ():
            if not (name.isidentifier() and can_name_module(name)):
                raise UserError(f"losses: {name!r} cannot be the name of a loss; choose a word, such as consistency")
        self.named_losses = {name: loss for name, loss in (losses or {}).items() if loss.weight}
        self.losses = nn.ModuleDict(self.named_losses)
        self.num_companions: dict[str, list[int]] = {}  # task -> number of companions of each loss
        self._mark = object()  # identifies the data that the losses have prepared
        self.uncertainty = UncertaintyWeights(tasks) if options.balance == "uncertainty" else None
        self.document_vectors: VectorCache | None = None  # document vectors, if the encoder has none

    def setup(self, stage: str) -> None:
        """Give the data module the encoder's tokenizer and prompts, and the vectors of the vector teacher.

        All ranks encode the vectors together.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, ContrastiveDataModule):  # replaces those of an earlier training with the same data
            data.tokenizer, data.prompts = self.encoder.tokenizer, self.encoder.prompts
        if stage == "fit":
            self.encoder.prepare(data)
        if (teacher := self.objective.vector_teacher) is not None and hasattr(data, "teacher_vectors"):
            self._store_teacher_vectors(data, teacher)
        self.prepare_losses(data)

    def prepare_losses(self, data: ContrastiveDataModule) -> None:
        """Prepare the losses with the data, and make the data add the texts that the losses need to each batch.

        Training calls this itself. With an average of the weights, call it before the trainer is started, because
        Lightning copies the module for the average before it calls setup.
        """
        if not self.named_losses or getattr(data, "prepared_by", None) is self._mark:
            return
        if not isinstance(data, ContrastiveDataModule):
            raise UserError("losses: they need a data module of one or several tasks; pass it to trainer.fit")
        for name, loss in self.named_losses.items():
            with prefixed(f"losses.{name}: "):
                loss.prepare(data)
        for task in data.tasks:
            sources = [list(loss.companions(data, task.task.name)) for loss in self.named_losses.values()]
            self.num_companions[task.task.name] = [len(each) for each in sources]
            task.companions = [source for each in sources for source in each]
        data.prepared_by = self._mark

    def _store_teacher_vectors(self, data: Any, model: FrozenEncoder) -> None:
        """Set a data module's teacher_vectors, and document_vectors. Stored vectors are read from data.cache."""
        options, teacher = self.objective.options.vector_teacher, model.encoder
        folder = Path(data.options.cache) / VECTORS if data.options.cache else None
        cache = VectorCache(teacher, folder, similarity=model.similarity, token_budget=data.options.token_budget)
        teacher.to(self.trainer.strategy.root_device)
        data.teacher_vectors = {}  # an earlier training may have had another teacher
        if options.cached:
            log.info("encoding all texts with the vector teacher, except those whose vectors are stored")
            with self.trainer.precision_plugin.forward_context():
                data.teacher_vectors = {
                    task: vectors_of_parts(cache, parts, task)
                    for task, parts in data.texts_of_rows().items()
                    if options.is_used_for(task)
                }
        if options.asymmetric:
            self.document_vectors = cache
        elif options.cached:
            teacher.to("cpu")  # no longer needed

    def on_fit_start(self) -> None:
        self.train()  # pretrained backbones are in eval mode, and Lightning leaves them there

    def embed(self, batch: Batch) -> Embedded:
        """Return the vectors of the distinct texts of a batch or companion, (U, D), and the encoder's mean penalty."""
        return (embed_cached if self.grad_cache else embed)(self.encoder, batch)

    def training_step(self, batch: ContrastiveBatch, batch_idx: int) -> dict[str, Tensor]:
        vectors, penalty = self.embed(batch)
        outputs = self.objective(vectors, batch)
        outputs["loss"] = outputs["loss"] + penalty
        for name, loss in self._additional_losses(vectors, batch).items():
            outputs["loss"] = outputs["loss"] + self.named_losses[name].weight * loss * batch.weight
            outputs[f"{name}_loss"] = loss.detach()
        if self.uncertainty is not None:
            outputs["loss"], outputs["weight"] = self.uncertainty(outputs["loss"], batch.task)
        return outputs

    def _additional_losses(self, vectors: Tensor, batch: ContrastiveBatch) -> dict[str, Tensor]:
        """Return the value of each additional loss. vectors: vectors of the batch, (U, D)."""
        companions = iter(batch.companions)
        values, vectors = {}, comparable(vectors)
        for (name, loss), count in zip(self.named_losses.items(), self.num_companions.get(batch.task, ()), strict=True):
            texts = tuple(islice(companions, count))
            encoded = [self._embed_companion(companion) for companion in texts]
            with torch.autocast(vectors.device.type, enabled=False):
                values[name] = loss(dataclasses.replace(batch, companions=texts), vectors, encoded)
            if (parameters := list(loss.parameters())) and self.training:
                values[name] = values[name] + 0.0 * sum(p.sum() for p in parameters)  # DDP needs a gradient for each
        return values

    def _embed_companion(self, companion: Companion) -> Tensor:
        """Return the vectors of a companion's texts, (n, D)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not companion.detached):
            return comparable(self.embed(companion).vectors[companion.index])

    def configure_optimizers(self) -> dict[str, Any]:
        options = self.optim
        groups = parameter_groups(self.encoder, options, self.encoder.num_layers)
        temperatures = list(self.objective.temperature.parameters())
        if self.objective.projection is not None:
            groups.insert(0, {"params": [self.objective.projection], "weight_decay": options.weight_decay})
        for loss in self.named_losses.values():
            if parameters := list(loss.parameters()):
                rate = {"lr": options.lr if loss.lr is None else loss.lr, "weight_decay": options.weight_decay}
                groups.insert(0, {"params": parameters} | rate)
        if temperatures:
            lr = self.objective.options.temperature_lr or options.lr
            groups.insert(0, {"params": temperatures, "lr": lr, "weight_decay": 0.0})
        if self.uncertainty is not None:
            rate = {"lr": self.objective.options.uncertainty_lr, "weight_decay": 0.0}
            groups.insert(0, {"params": list(self.uncertainty.parameters())} | rate)
        optimizer = torch.optim.AdamW(
            groups, lr=options.lr, betas=(options.beta1, options.beta2), eps=options.eps, fused=True
        )
        if options.expert_decay:
            optimizer.register_step_post_hook(ExpertDecay(self.encoder, options.expert_decay))
        if temperatures:
            optimizer.register_step_post_hook(lambda *_: self.objective.temperature.clamp())
        factor = schedule(options.schedule, options.warmup, self._num_steps())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _num_steps(self) -> int:
        if self.total_steps is not None:
            return self.total_steps
        steps = math.inf if self._trainer is None else self.trainer.estimated_stepping_batches
        if steps == math.inf:
            raise UserError(
                "the length of the schedule is unknown; set total_steps, or max_steps or max_epochs of the trainer"
            )
        return int(steps)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        # Lightning refuses to clip with a fused optimizer in fp16, because the optimizer's step divides gradients by
        # the loss scale. If they are divided here, the step does not divide them again.
        if not gradient_clip_val:
            return
        if (scaler := loss_scaler(self._trainer)) is not None:
            scaler.unscale_(optimizer)
        if gradient_clip_algorithm == "value":
            # foreach refuses a mixture of sharded and other gradients.
            foreach = False if self.encoder.sharded else None
            nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val, foreach)
        else:
            nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise CheckpointMismatch if the weights of a checkpoint or its frozen models do not fit this module."""
        then, now = checkpoint.get("frozen_models", {}), self.objective.fingerprints()  # earlier versions wrote none
        for role in then.keys() & now.keys():
            if then[role] != now[role]:
                raise CheckpointMismatch(
                    f"objective.{role}.model has changed since the training began (fingerprint {then[role]} then, "
                    f"{now[role]} now)"
                )
        if self.encoder.sharded:  # its strategy checks the weights
            return
        if problems := weight_problems(checkpoint["state_dict"], self.state_dict()):
            raise CheckpointMismatch(f"the checkpoint does not fit the encoder: {problems}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the description from which load_encoder rebuilds the encoder, and hashes of the frozen models."""
        checkpoint["encoder"] = describe(self.encoder)
        checkpoint["frozen_models"] = self.objective.fingerprints()
