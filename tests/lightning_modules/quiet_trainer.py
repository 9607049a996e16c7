"""A trainer on the CPU that logs, prints and saves nothing unless asked to."""

from pathlib import Path
from typing import Any

import lightning as L


def quiet_trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(accelerator="cpu", default_root_dir=folder, **(quiet | options))
