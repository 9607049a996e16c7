"""Contrastive training of an encoder, one task per batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from datamodules.options import check_options
from datamodules.packed import ContrastiveBatch
from datamodules.records import UserError
from lightning_modules.chunked import Embedded, embed, embed_cached
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.loading import describe
from lightning_modules.objective import FrozenEncoder, Objective
from lightning_modules.objective_options import ObjectiveOptions
from lightning_modules.optim import OptimOptions, parameter_groups, schedule
from lightning_modules.task_balance import UncertaintyWeights, loss_scaler


class CheckpointMismatch(UserError):
    """A checkpoint whose weights do not fit the module that is to resume from it."""


class ContrastiveModule(L.LightningModule):
    """An encoder with its objective and optimizer.

    L.Trainer(max_steps=1000).fit(ContrastiveModule(encoder, similarity="cosine", temperature=0.05), data)

    tasks: names of the tasks in training, by default all tasks of the encoder.
    guide_model, teacher_model: frozen models, required if the options of the objective name them.
    grad_cache: whether to keep the graph of only one chunk of texts in memory at a time (see chunked.py).
    optim: options of the optimizer.
    total_steps: optimizer steps of the learning-rate schedule, by default those of the trainer.
    objective: fields of ObjectiveOptions.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        tasks: Sequence[str] | None = None,
        guide_model: FrozenEncoder | None = None,
        teacher_model: FrozenEncoder | None = None,
        grad_cache: bool = False,
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
        frozen_models = (("guide", options.guide.model, guide_model), ("teacher", options.teacher.model, teacher_model))
        for role, name, model in frozen_models:
            if name and model is None:
                raise UserError(f"{role}.model: {name!r} is not loaded here; pass a FrozenEncoder as {role}_model")
        self.encoder = encoder
        encoder.similarity = options.similarity  # part of its description in checkpoints
        self.objective = Objective(options, tasks, encoder.dimension, guide_model, teacher_model)
        self.uncertainty = UncertaintyWeights(tasks) if options.balance == "uncertainty" else None

    def setup(self, stage: str) -> None:
        """Give the data module the encoder's tokenizer and prompts, unless it has a tokenizer already."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data is not None and getattr(data, "tokenizer", self) is None:
            data.tokenizer, data.prompts = self.encoder.tokenizer, self.encoder.prompts

    def on_fit_start(self) -> None:
        self.train()  # pretrained backbones are in eval mode, and Lightning leaves them there

    def embed(self, batch: ContrastiveBatch) -> Embedded:
        """Return the vectors of the distinct texts of a batch, (U, D), and the encoder's mean penalty."""
        return (embed_cached if self.grad_cache else embed)(self.encoder, batch)

    def training_step(self, batch: ContrastiveBatch, batch_idx: int) -> dict[str, Tensor]:
        vectors, penalty = self.embed(batch)
        outputs = self.objective(vectors, batch)
        outputs["loss"] = outputs["loss"] + penalty
        if self.uncertainty is not None:
            outputs["loss"], outputs["weight"] = self.uncertainty(outputs["loss"], batch.task)
        return outputs

    def configure_optimizers(self) -> dict[str, Any]:
        options = self.optim
        groups = parameter_groups(self.encoder, options, self.encoder.num_layers)
        temperatures = list(self.objective.parameters())
        # Other parameters come first, because the learning rate of the last group is logged.
        if temperatures:
            lr = self.objective.options.temperature_lr or options.lr
            groups.insert(0, {"params": temperatures, "lr": lr, "weight_decay": 0.0})
        if self.uncertainty is not None:
            groups.insert(0, {"params": list(self.uncertainty.parameters()), "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(
            groups, lr=options.lr, betas=(options.beta1, options.beta2), eps=options.eps, fused=True
        )
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
        # Lightning refuses to clip with a fused optimizer in fp16, because its step divides gradients by the scale of
        # the loss. If they are divided here, it does not do so again.
        if not gradient_clip_val:
            return
        if (scaler := loss_scaler(self._trainer)) is not None:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise CheckpointMismatch if the weights of a checkpoint do not fit this module."""
        if self.encoder.sharded:  # its strategy checks the weights
            return
        then, now = checkpoint["state_dict"], self.state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in now.items()}
        differences = [
            f"{name}: {tuple(then[name].shape) if name in then else 'missing'} there, {shapes.get(name, 'none')} here"
            for name in dict.fromkeys((*shapes, *then))
            if name not in then or tuple(then[name].shape) != shapes.get(name)
        ]
        if differences:
            raise CheckpointMismatch(
                f"the checkpoint does not fit the encoder: {len(differences)} weights differ "
                f"({'; '.join(differences[:3])}{'; ...' if differences[3:] else ''})"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the description from which load_encoder rebuilds the encoder."""
        checkpoint["encoder"] = describe(self.encoder)
