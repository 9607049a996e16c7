"""Call a function with the encoder before its first step."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L

from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.distributed.sharding import replica
from lightning_modules.encoders.base import Encoder


class BeforeFirstStep(L.Callback):
    """Calls a function with the encoder on every rank when a training starts, but not when it is resumed."""

    def __init__(self, function: Callable[[Encoder], None]):
        self.function = function

    def on_train_start(self, trainer: L.Trainer, module: ContrastiveModule) -> None:
        if trainer.global_step == 0:
            self.function(replica(module.encoder))
