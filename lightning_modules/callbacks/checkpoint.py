"""The last checkpoint, renewed at fixed steps, and never half-written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.plugins.io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file and renames: a run that dies while it writes keeps the checkpoint before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        partial = f"{path}.partial"
        super().save_checkpoint(checkpoint, partial, storage_options)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)


class LastCheckpoint(L.Callback):
    """Saves the run's state to one file every n optimizer steps and after the last."""

    def __init__(self, path: Path, every_n_steps: int):
        self.path, self.every_n_steps = path, every_n_steps
        self.saved_at = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.saved_at = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step = trainer.global_step
        due = step % self.every_n_steps == 0 or step == trainer.max_steps
        if due and step > self.saved_at:
            self.saved_at = step
            trainer.save_checkpoint(self.path)
