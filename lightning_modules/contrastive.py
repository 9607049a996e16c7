"""Contrastive training of an encoder on batches of one task at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from datamodules.records import ContrastiveBatch, UserError
from lightning_modules.chunked import embed, embed_cached
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.loading import describe
from lightning_modules.objective import FrozenEncoder, Objective
from lightning_modules.objective.options import ObjectiveOptions
from lightning_modules.optim import OptimOptions, linear_schedule, parameter_groups
from lightning_modules.task_balance import UncertaintyWeights


class ContrastiveModule(L.LightningModule):
    """An encoder, its objective and its optimizer.

    tasks: of the batches, by default the encoder's. judges: "guide" and "teacher" of the objective, where it has them.
    grad_cache: keep the graph of one chunk at a time in memory (gradcache.py). total_steps: optimizer steps of the
    schedule. objective: fields of ObjectiveOptions.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        tasks: Sequence[str] | None = None,
        judges: Mapping[str, FrozenEncoder] | None = None,
        grad_cache: bool = False,
        optim: OptimOptions | None = None,
        total_steps: int = 1000,
        **objective: Any,
    ):
        super().__init__()
        if any(encoder.document_task(task) != task for task in encoder.tasks):
            raise UserError(
                "an encoder whose documents have an adapter of their own is for inference, not for training"
            )
        self.encoder = encoder
        options, tasks = ObjectiveOptions(**objective), tasks or list(encoder.tasks)
        self.objective = Objective(options, tasks, encoder.dimension, judges or {})
        self.uncertainty = UncertaintyWeights(tasks) if options.balance == "uncertainty" else None
        self.grad_cache = grad_cache
        self.optim, self.total_steps = optim or OptimOptions(), total_steps

    def on_fit_start(self) -> None:
        self.train()  # pretrained backbones come in eval mode, and Lightning leaves modules as they are

    def embed(self, batch: ContrastiveBatch) -> tuple[Tensor, Tensor]:
        """Vectors (U, D) of the batch's distinct texts, in the order of its chunks, and the encoder's mean penalty."""
        return (embed_cached if self.grad_cache else embed)(self.encoder, batch)

    def training_step(self, batch: ContrastiveBatch, batch_idx: int) -> dict[str, Tensor]:
        vectors, penalty = self.embed(batch)
        found = self.objective(vectors, batch)
        found["loss"] = found["loss"] + penalty
        if self.uncertainty is not None:
            found["loss"], found["weight"] = self.uncertainty(found["loss"], batch.task)
        return found

    def configure_optimizers(self):
        options = self.optim
        groups = parameter_groups(self.encoder, options, self.encoder.num_layers)
        temperatures = list(self.objective.parameters())
        # Not last: the learning rate of the last group is the one that is logged.
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
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, linear_schedule(options.warmup, self.total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        # Lightning refuses to clip for a fused optimizer under autocast, because of loss scaling; bf16 has none.
        if gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """A checkpoint holds all that is needed to build its encoder: kind, arguments, backbone, tokenizer."""
        checkpoint["encoder"] = describe(self.encoder)
