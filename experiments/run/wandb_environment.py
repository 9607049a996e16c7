"""The environment variables of W&B that our commands read, or that W&B would refuse after hours."""

from __future__ import annotations

import os

from datamodules.records import UserError

MODES = ("offline", "online", "disabled")


def wandb_mode(configured: str) -> str:
    """Return WANDB_MODE, or the configured mode if it is not set. Raises UserError for an unknown mode."""
    mode = os.environ.get("WANDB_MODE", configured)
    if mode not in MODES:
        raise UserError(f"environment: WANDB_MODE: expected {', '.join(MODES)}, got {mode!r}; change or unset it")
    return mode


def check_environment() -> None:
    """Raise UserError if W&B refuses one of its environment variables."""
    import wandb

    try:
        wandb.Settings().update_from_env_vars(os.environ)
    except (ValueError, wandb.Error) as error:
        # pydantic's errors have many lines: key, problem and value are on the second and third.
        lines = str(error).splitlines()
        problem = ": ".join(line.strip() for line in lines[1:3]) or lines[0]
        raise UserError(f"environment: W&B refuses a variable WANDB_... ({problem}); change or unset it") from error
