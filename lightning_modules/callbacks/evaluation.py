"""Evaluate on the dev splits during training, and save the best checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ProgressBar, WeightAveraging

from datamodules.records import Benchmark
from lightning_modules.callbacks.checkpoint import save_checkpoint
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.distributed.collectives import on_any_rank, world_size
from lightning_modules.distributed.sharding import replica
from lightning_modules.distributed.signals import Preempted, leave_if_asked, noted
from lightning_modules.encoders.base import Encoder
from lightning_modules.retrieval.evaluation import Stage, StageAdvance, evaluate, stage_lines

log = logging.getLogger(__name__)


class Evaluation(L.Callback):
    """Evaluate on all benchmarks every n optimizer steps and after the last step.

    The checkpoint with the highest mean of the first metric over the benchmarks is saved as the best one. Then
    on_validation_end of the other callbacks is called, with all metrics in trainer.callback_metrics.

    metrics: names of the metrics, instead of the benchmarks' own; the first one chooses the best checkpoint.
    every_n_steps: number of optimizer steps between evaluations.
    token_budget: maximum number of tokens per forward pass; None: what is fast on the device.
    path: file of the best checkpoint.
    patience: stop training after this many evaluations in a row without a new best mean; 0: never.
    """

    def __init__(
        self,
        benchmarks: Sequence[Benchmark],
        metrics: Sequence[str],
        every_n_steps: int,
        token_budget: int | None,
        path: Path,
        patience: int = 0,
    ):
        self.benchmarks = [dataclasses.replace(benchmark, metrics=()) for benchmark in benchmarks]
        self.metrics = list(metrics)
        self.every_n_steps, self.token_budget, self.path = every_n_steps, token_budget, path
        self.patience, self.num_without_best = patience, 0
        self.best, self.best_step = float("-inf"), 0
        self.not_written = float("-inf"), 0  # mean and step of the best checkpoint that could not be written
        self.evaluated_at: int | None = None  # all evaluations up to this step are done

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "best_step": self.best_step,
            "measure": self._criterion(),
            "not_written": list(self.not_written),
            "evaluated_at": self.evaluated_at,
            "num_without_best": self.num_without_best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.evaluated_at = state.get("evaluated_at")
        if state["measure"] == self._criterion():
            self.best, self.best_step = state["best"], state["best_step"]
            self.not_written = tuple(state.get("not_written", self.not_written))
            self.num_without_best = state.get("num_without_best", 0)
        else:
            log.warning("a different metric or benchmark chose the best checkpoint; the next evaluation replaces it")

    @property
    def names(self) -> list[str]:
        """Names of the metrics in logs and in trainer.callback_metrics."""
        names = [f"val/{benchmark.name}/{metric}" for benchmark in self.benchmarks for metric in self.metrics]
        return [*names, f"val/mean/{self.metrics[0]}"]

    def _criterion(self) -> list[str]:
        """Return the metric and benchmarks that choose the best checkpoint. Means of other ones are not comparable."""
        return [self.metrics[0], *(benchmark.name for benchmark in self.benchmarks)]

    def on_train_start(self, trainer: L.Trainer, module: ContrastiveModule) -> None:
        if self.evaluated_at is None:
            self.evaluated_at = trainer.global_step
        self._evaluate_if_due(trainer, module)  # a preempted run may have skipped it
        self._stop_if_out_of_patience(trainer)  # the run may have been killed when it was about to stop
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(each, EarlyStopping) and each.stopping_reason.value for each in callbacks):
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: L.Trainer, module: ContrastiveModule, *_: Any) -> None:
        self._evaluate_if_due(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: ContrastiveModule) -> None:
        mean, step = self.not_written
        if mean > self.best and trainer.is_global_zero:
            instead = f"{self.path.name} is from step {self.best_step}" if self.best_step else "none was written"
            log.warning("the best checkpoint (step %d, mean %.4f) could not be written; %s", step, mean, instead)

    def _evaluate_if_due(self, trainer: L.Trainer, module: ContrastiveModule) -> None:
        step = trainer.global_step
        due = step % self.every_n_steps == 0 or step == trainer.max_steps
        if due and step > (self.evaluated_at or 0) and self.benchmarks:
            with contextlib.suppress(Preempted):
                values = self._evaluate(trainer, module, may_leave=step < trainer.max_steps)
                self._report(trainer, values, step)
                self.evaluated_at = step
                self._stop_if_out_of_patience(trainer)
                trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
                for callback in trainer.callbacks:  # type: ignore[attr-defined]
                    if not isinstance(callback, ProgressBar):  # Lightning's bar expects a validation loop
                        callback.on_validation_end(trainer, module)

    def _stop_if_out_of_patience(self, trainer: L.Trainer) -> None:
        if 0 < self.patience <= self.num_without_best and trainer.global_step < trainer.max_steps:
            trainer.should_stop = True
            if trainer.is_global_zero:
                message = (
                    "training stops early: the last %d evaluations gave no new best mean (the best was at step %d)"
                )
                log.info(message, self.num_without_best, self.best_step)

    def _evaluate(self, trainer: L.Trainer, module: ContrastiveModule, may_leave: bool) -> dict[str, float]:
        """Return log name -> value: the metrics of all benchmarks, and the mean of the first metric.

        may_leave: whether to raise Preempted if a signal asks the run to end.
        """
        values: dict[str, float] = {}
        encoder = replica(module.encoder)
        with averaged_weights(trainer, module), trainer.precision_plugin.forward_context():
            for benchmark in self.benchmarks:
                signal = noted()
                if may_leave and on_any_rank(signal is not None):
                    raise Preempted(signal)
                result = evaluate(
                    encoder,
                    benchmark,
                    self.metrics,
                    similarity=module.objective.options.similarity,
                    token_budget=self.token_budget,
                    document_vectors=module.document_vectors,
                    advance=self._advance(benchmark.name, may_leave and world_size() == 1),
                )
                values |= {f"val/{benchmark.name}/{name}": value for name, value in result.metrics.items()}
        first = self.metrics[0]
        mean = sum(values[f"val/{benchmark.name}/{first}"] for benchmark in self.benchmarks) / len(self.benchmarks)
        return values | {f"val/mean/{first}": mean}

    @staticmethod
    def _advance(name: str, may_leave: bool) -> StageAdvance:
        """Return a function that logs the progress on a benchmark, and may raise Preempted."""
        log_progress = stage_lines(name)

        def advance(stage: Stage, count: int, total: int) -> None:
            log_progress(stage, count, total)
            if may_leave:
                leave_if_asked()

        return advance

    def _report(self, trainer: L.Trainer, values: dict[str, float], step: int) -> None:
        """Log the values, and save the checkpoint if it is the best one so far."""
        first = self.metrics[0]
        mean = values[f"val/mean/{first}"]
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        if trainer.is_global_zero:
            parts = "  ".join(f"{b.name} {values[f'val/{b.name}/{first}']:.4f}" for b in self.benchmarks)
            log.info("step %d/%d  dev %s: %s  mean %.4f", step, trainer.max_steps, first, parts, mean)
        self.num_without_best = 0 if mean > max(self.best, self.not_written[0]) else self.num_without_best + 1
        if mean > self.best:
            previous = self.best, self.best_step
            self.best, self.best_step = mean, step  # set before saving, because the checkpoint contains both
            if save_checkpoint(trainer, self.path):
                self.best, self.best_step = previous  # a later step can still become the best checkpoint
                self.not_written = max(self.not_written, (mean, step))


@contextlib.contextmanager
def averaged_weights(trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
    """Swap the weights for their average, if the trainer has a WeightAveraging callback.

    Lightning only does this in its validation loop, which is not used here. Without the swap, the current weights would
    decide which checkpoint is best, although checkpoints contain the average.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    averages = [callback for callback in callbacks if isinstance(callback, WeightAveraging)]
    for callback in averages:
        callback.on_validation_epoch_start(trainer, module)
    try:
        yield
    finally:
        for callback in averages:
            callback.on_validation_epoch_end(trainer, module)


class BeforeFirstStep(L.Callback):
    """Calls a function with the encoder, on every rank, when training starts but not when it resumes."""

    def __init__(self, function: Callable[[Encoder], None]):
        self.function = function

    def on_train_start(self, trainer: L.Trainer, module: ContrastiveModule) -> None:
        if trainer.global_step == 0:
            self.function(replica(module.encoder))
