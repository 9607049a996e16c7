"""Retrieval on the dev splits during training, and the best checkpoint by it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L

from datamodules.records import Benchmark
from lightning_modules.callbacks.checkpoint import save_checkpoint
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.distributed.collectives import on_any_rank, world_size
from lightning_modules.distributed.sharding import replica
from lightning_modules.distributed.signals import Preempted, leave_if_asked, noted
from lightning_modules.retrieval.evaluation import rank_benchmark
from lightning_modules.retrieval.measure import depth, measure

log = logging.getLogger(__name__)


class Evaluation(L.Callback):
    """Ranks all benchmarks every n optimizer steps and after the last; saves the best checkpoint.

    The best is that with the highest mean over benchmarks of the first metric.
    """

    def __init__(
        self, benchmarks: Sequence[Benchmark], metrics: Sequence[str], every_n_steps: int, token_budget: int, path: Path
    ):
        self.benchmarks, self.metrics = list(benchmarks), list(metrics)
        self.every_n_steps, self.token_budget, self.path = every_n_steps, token_budget, path
        self.best, self.best_step = float("-inf"), 0
        self.evaluated_at: int | None = None  # the last step at which nothing is left to evaluate

    def state_dict(self) -> dict[str, Any]:
        state = {"best": self.best, "best_step": self.best_step, "measure": self._measure()}
        return state | {"evaluated_at": self.evaluated_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.evaluated_at = state.get("evaluated_at")
        if state["measure"] == self._measure():
            self.best, self.best_step = state["best"], state["best_step"]
        else:
            log.warning("the best checkpoint was chosen by another measure: the next evaluation chooses anew")

    def _measure(self) -> list[str]:
        """What the best is chosen by; bests by different measures cannot be compared."""
        return [self.metrics[0], *(benchmark.name for benchmark in self.benchmarks)]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.evaluated_at is None:
            self.evaluated_at = trainer.global_step
        self._evaluate_if_due(trainer, module)  # a preempted run left it to this one

    def on_train_batch_end(self, trainer: L.Trainer, module: ContrastiveModule, *_: Any) -> None:
        self._evaluate_if_due(trainer, module)

    def _evaluate_if_due(self, trainer: L.Trainer, module: ContrastiveModule) -> None:
        step = trainer.global_step
        due = step % self.every_n_steps == 0 or step == trainer.max_steps
        if due and step > self.evaluated_at and self.benchmarks:
            with contextlib.suppress(Preempted):
                self._evaluate(trainer, module, step)
                self.evaluated_at = step

    def _evaluate(self, trainer: L.Trainer, module: ContrastiveModule, step: int) -> None:
        """Raises Preempted if the run is asked to end before it is done, but not after the last step."""
        values: dict[str, float] = {}
        may_leave, encoder = step < trainer.max_steps, replica(module.encoder)
        with trainer.precision_plugin.forward_context():
            for benchmark in self.benchmarks:
                asked = noted()
                if may_leave and on_any_rank(asked is not None, module.device):
                    raise Preempted(asked)
                run = rank_benchmark(
                    encoder,
                    benchmark,
                    depth(self.metrics, benchmark),
                    similarity=module.objective.options.similarity,
                    token_budget=self.token_budget,
                    advance=leave_if_asked if may_leave and world_size() == 1 else None,
                )
                for name, value in measure(run, benchmark, self.metrics).items():
                    values[f"val/{benchmark.name}/{name}"] = value
        first = self.metrics[0]
        mean = sum(values[f"val/{b.name}/{first}"] for b in self.benchmarks) / len(self.benchmarks)
        values[f"val/mean/{first}"] = mean
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        if trainer.is_global_zero:
            parts = "  ".join(f"{b.name} {values[f'val/{b.name}/{first}']:.4f}" for b in self.benchmarks)
            log.info("step %d/%d  dev %s: %s  mean %.4f", step, trainer.max_steps, first, parts, mean)
        if mean > self.best:
            former = self.best, self.best_step
            self.best, self.best_step = mean, step  # before saving, because the checkpoint contains them
            if save_checkpoint(trainer, self.path):
                self.best, self.best_step = former  # not written: a later step may still become the best
