"""Save checkpoints at regular intervals, and keep the last few."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.plugins.io import TorchCheckpointIO

from datamodules.records import UserError
from lightning_modules.checkpoint_files import first_not_finite, write_checkpoint
from lightning_modules.distributed.collectives import from_first_rank

log = logging.getLogger(__name__)


class Failure(NamedTuple):
    """The reason why a checkpoint was not written. diverged: whether it has numbers that are not finite."""

    reason: str
    diverged: bool = False


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically. When loading, all ranks read the checkpoint that the first rank chose.

    Training continues if a checkpoint cannot be written. `failure` then has the reason; it is None if the last save
    succeeded. Checkpoints with non-finite numbers are not written, because they would replace good ones.

    last: path of the newest checkpoint. Earlier checkpoints are only kept for this path.
    keep: number of checkpoints to keep.
    """

    def __init__(self, last: Path, keep: int):
        self.last, self.keep = last, keep
        self.failure: Failure | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path, self.failure = Path(path), None
        if name := first_not_finite(checkpoint):
            self.failure = Failure(f"{name} contains non-finite numbers", diverged=True)
        else:
            try:
                write_checkpoint(checkpoint, path, self.keep if path == self.last else 1)
            except OSError as error:
                self.failure = Failure(error.strerror or str(error))
        if self.failure:
            step = checkpoint["global_step"]
            log.warning("%s: the checkpoint of step %d could not be written: %s", path, step, self.failure.reason)

    def load_checkpoint(self, path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        return super().load_checkpoint(from_first_rank(str(path)), *arguments, **options)


def save_checkpoint(trainer: L.Trainer, path: Path) -> Failure | None:
    """Save a checkpoint. Return the failure on all ranks, or None if it was written."""
    trainer.save_checkpoint(path)
    return from_first_rank(getattr(trainer.strategy.checkpoint_io, "failure", None))


class LastCheckpoint(L.Callback):
    """Saves a checkpoint every n optimizer steps and after the last step, even if training stops early.

    If writing fails, training continues, because the previous checkpoint still exists, but after the last step this is
    an error. If the weights are not finite, training ends, and the previous checkpoint is kept.
    """

    def __init__(self, path: Path, every_n_steps: int):
        self.path, self.every_n_steps = path, every_n_steps
        self.saved_at = 0
        self._step = 0  # optimizer step at the end of the previous batch

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.saved_at = self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step = trainer.global_step
        # A callback may stop training between the batches of an optimizer step. The unfinished step is not saved.
        is_last = step == trainer.max_steps or (trainer.should_stop and step > self._step)
        self._step = step
        if (is_last or step % self.every_n_steps == 0) and step > self.saved_at:
            self.save(trainer, must=is_last)

    def save(self, trainer: L.Trainer, must: bool) -> None:
        """Save the current step, unless it is already saved.

        must: whether a failed save raises UserError on all ranks. Non-finite weights always raise it.
        """
        step = trainer.global_step
        if step == self.saved_at:
            return
        failure = save_checkpoint(trainer, self.path)
        if failure is None:
            self.saved_at = step
            return
        last_good = (
            f"the last good checkpoint is step {self.saved_at}" if self.saved_at else "there is no checkpoint yet"
        )
        problem = f"{self.path}: the checkpoint of step {step} could not be written ({failure.reason}); {last_good}."
        if failure.diverged:
            raise UserError(
                f"{problem} The training has diverged, and the same command would diverge again. Start a new run with "
                "a lower learning rate, a longer warm-up or gradient clipping. It can start from the last checkpoint."
            )
        if must:
            raise UserError(f"{problem} Free some disk space, and run the same command again to resume.")
        log.warning("Training continues; %s. Free some disk space before the next checkpoint is due.", last_good)
