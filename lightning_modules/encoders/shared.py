"""SciMult-Vanilla: one backbone whose parameters all tasks share (paper, section 4.1)."""

from lightning_modules.encoders.base import Encoder


class SharedEncoder(Encoder):
    """An encoder that treats all tasks alike. An unknown task is still an error."""
