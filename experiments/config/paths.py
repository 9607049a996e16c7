"""Where a run's files are, and the configuration that it was started with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from datamodules.records import UserError
from experiments.config.experiment import digest
from experiments.config.moved import current_path
from experiments.config.schema import Config

LAST = Path("checkpoints", "last.ckpt")
BEST = Path("checkpoints", "best.ckpt")
EXPERTS = "experts.svg"  # the last picture of tasks and experts
NEGATIVES = "negatives"  # mined hard negatives


def folder_of(config: Config) -> Path:
    """Return the folder of a run: run.dir, that of a W&B trial, or a name that the same configuration finds again."""
    if config.run.dir:
        return Path(config.run.dir)
    if "WANDB_SWEEP_ID" in os.environ and "WANDB_RUN_ID" in os.environ:
        return Path("runs") / f"sweep-{os.environ['WANDB_SWEEP_ID']}" / os.environ["WANDB_RUN_ID"]
    return Path("runs") / f"{config.experiment}-{config.scale}-seed{config.run.seed}-{digest(config)}"


def read_config(path: Path) -> dict[str, Any]:
    """Return a run's config.yaml in plain containers. Classes that have moved get their present paths."""
    try:
        settings = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path / 'config.yaml'}: cannot be read ({error})") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path / 'config.yaml'}: is empty or damaged")
    return _with_current_paths(settings)


def runs_there() -> str:
    """List the runs in runs/, for error messages."""
    runs = sorted(str(path.parent) for path in Path("runs").glob("*/config.yaml"))
    return f"In runs/ there are: {', '.join(runs) or 'none'}"


def _with_current_paths(node: Any) -> Any:
    if isinstance(node, dict):
        return {
            key: current_path(value) if key == "_target_" and isinstance(value, str) else _with_current_paths(value)
            for key, value in node.items()
        }
    return [_with_current_paths(item) for item in node] if isinstance(node, list) else node
