"""A run that is asked to end saves first, at an optimizer step that all ranks agree on."""

from __future__ import annotations

from signal import Signals
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from lightning_modules.callbacks.checkpoint import LastCheckpoint
from lightning_modules.distributed import signals
from lightning_modules.distributed.collectives import world_size


class Preemption(L.Callback):
    """Answers what lightning_modules.distributed.signals noted on any rank: saves and stops the training.

    Stands after all callbacks with a state, which then is that after the step. asked: the signal that was answered.
    """

    def __init__(self, last: LastCheckpoint):
        self.last = last
        self.asked: Signals | None = None
        self._group: dist.ProcessGroup | None = None
        self._step = 0

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        # Lightning's own answers to SIGTERM: a broadcast inside the handler, and leaving in the middle of a step.
        trainer._signal_connector.register_signal_handlers = lambda: None
        if world_size() > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")  # does not wait for what the GPU still has to do

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        signals.catch_interrupt()
        self._step = trainer.global_step
        self._answer(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step > self._step:  # not between the batches that one step accumulates
            self._step = trainer.global_step
            self._answer(trainer)

    def _answer(self, trainer: L.Trainer) -> None:
        asked = self._agreed()
        if asked is not None:
            self.asked, trainer.should_stop = asked, True
            self.last.save(trainer, must=True)

    def _agreed(self) -> Signals | None:
        """What any rank was asked, on all of them."""
        mine = signals.noted()
        if world_size() == 1:
            return mine
        number = torch.tensor(signals.ASKING.index(mine) if mine else -1)
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self._group)
        return signals.ASKING[int(number)] if number >= 0 else None
