"""A trainer on the CPU that logs, prints and saves nothing unless asked to."""

from pathlib import Path
from typing import Any

import lightning as L


class SaveOnce(L.Callback):
    """Saves a checkpoint after two steps, unless the file exists."""

    def __init__(self, file: Path):
        self.file = file

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2 and not self.file.exists():
            trainer.save_checkpoint(self.file)


def quiet_trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(accelerator="cpu", default_root_dir=folder, **(quiet | options))
