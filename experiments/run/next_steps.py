"""What a user may do next, told at the end of a training."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from experiments.config.schema import Config

OF_THIS_RUN = ("run.dir", "run.resume", "scale", "wandb.name")  # keys that are no setting of another run


def next_steps(config: Config, overrides: Sequence[str], folder: Path) -> str:
    """The report, and another encoder with the settings of this command, where these mean the same for it."""
    report = f"Next: make report RUN={shlex.quote(str(folder))}"
    keys = [text.partition("=")[0] for text in overrides]
    if config.extend.model or config.init_from or any(key.startswith(("encoder", "callbacks.")) for key in keys):
        return report
    other = "moe" if config.experiment == "vanilla" else "vanilla"
    kept = [text for text, key in zip(overrides, keys, strict=True) if key not in OF_THIS_RUN]
    scale = [] if config.scale == Config.scale else [f"SCALE={config.scale}"]
    return f"{report}, or the same with another encoder: {shlex.join(['make', 'train', f'EXP={other}', *scale, *kept])}"
