"""SciMult-Vanilla: one backbone, all parameters shared by all tasks (paper, section 4.1)."""

from lightning_modules.encoders.base import Encoder


class SharedEncoder(Encoder):
    """Every task is served by the same parameters; the task is checked and has no other effect."""
