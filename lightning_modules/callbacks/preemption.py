"""Save and end a run after a signal, at an optimizer step that all ranks agree on."""

from __future__ import annotations

from signal import Signals
from typing import Any

import lightning as L

from lightning_modules.callbacks.checkpoint import LastCheckpoint
from lightning_modules.distributed import signals
from lightning_modules.distributed.collectives import largest


class Preemption(L.Callback):
    """Saves a checkpoint and stops training if any rank has received a signal (distributed/signals.py).

    It must come after all stateful callbacks, so that the checkpoint contains their state after the step. `asked` is
    the signal that ended training, or None.
    """

    def __init__(self, last: LastCheckpoint):
        self.last = last
        self.asked: Signals | None = None
        self._step = 0

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        # Lightning's handler of SIGTERM runs a collective operation inside the handler, and exits in mid-step.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        signals.catch_interrupt()
        self._step = trainer.global_step
        self._stop_if_asked(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step > self._step:  # only after whole optimizer steps
            self._step = trainer.global_step
            self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        asked = self._signal_of_any_rank()
        if asked is not None:
            self.asked, trainer.should_stop = asked, True
            self.last.save(trainer, must=True)

    def _signal_of_any_rank(self) -> Signals | None:
        noted = signals.noted()
        number = largest(signals.ASKING.index(noted) if noted else -1)
        return signals.ASKING[number] if number >= 0 else None
