"""SciMult-Vanilla: one backbone whose parameters all tasks share (paper, section 4.1)."""

from lightning_modules.encoders.base import Encoder


class SharedEncoder(Encoder):
    """An encoder that gives a text the same vector for each task. An unknown task is still an error."""
