"""A trainer on the CPU that logs, prints and saves nothing unless asked to."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import LambdaCallback


def after_batch(function: Callable[[L.Trainer, L.LightningModule], Any]) -> L.Callback:
    """Return a callback that calls a function with trainer and module after each batch."""
    return LambdaCallback(on_train_batch_end=lambda trainer, module, *_: function(trainer, module))


def save_once(file: Path) -> L.Callback:
    """Return a callback that saves a checkpoint after two steps, unless the file exists."""

    def save(trainer: L.Trainer, _: L.LightningModule) -> None:
        if trainer.global_step == 2 and not file.exists():
            trainer.save_checkpoint(file)

    return after_batch(save)


def quiet_trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(accelerator="cpu", default_root_dir=folder, **(quiet | options))
