"""Mine hard negatives with the current model at regular intervals, so that they stay hard (ANCE, arXiv 2007.00808)."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from typing import Any

import lightning as L

from datamodules.records import MiningPool, UserError
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.distributed.collectives import from_first_rank
from lightning_modules.distributed.sharding import replica
from lightning_modules.distributed.signals import Preempted
from lightning_modules.loggers import log_histograms, log_picture
from lightning_modules.mining.mine import Mining, without_negatives
from lightning_modules.mining.report import (
    check_false_negatives,
    histograms,
    metrics,
    read_values,
    reports_of,
    table,
    write_report,
)
from lightning_modules.retrieval.vector_cache import VectorCache

log = logging.getLogger(__name__)

NOTICEABLE = 60  # seconds; a shorter mining is never called slow


class HardNegativeMining(L.Callback):
    """Mines at optimizer steps first_step, first_step + every_n_steps, and so on. The next batch uses the result.

    Each round of mining has a folder with report.json and report.svg. Earlier folders are kept, because checkpoints may
    need them.

    stop_at: maximum share of likely false negatives; above it, training stops (see check_false_negatives).
    """

    def __init__(self, mining: Mining, first_step: int, every_n_steps: int, stop_at: float | None = None):
        self.mining, self.first_step, self.every_n_steps, self.stop_at = mining, first_step, every_n_steps, stop_at
        self._pools: list[MiningPool] = []
        self._ended: float | None = None  # time of the last mining's end

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        batches = trainer.accumulate_grad_batches
        trainer.datamodule.rounds.plan(self.first_step * batches, self.every_n_steps * batches)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, module: ContrastiveModule) -> None:
        if self.mining.judges:
            self._pools = trainer.datamodule.pools()  # type: ignore[attr-defined]
            self.mining.check_judges(self._pools)  # before hours of training
        self._mine_if_due(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: ContrastiveModule, *_: Any) -> None:
        self._mine_if_due(trainer, module)

    def _mine_if_due(self, trainer: L.Trainer, module: ContrastiveModule) -> None:
        step = trainer.global_step
        batch = step * trainer.accumulate_grad_batches
        rounds = trainer.datamodule.rounds  # type: ignore[attr-defined]
        if step < trainer.max_steps and rounds.is_planned(batch) and not rounds.has(batch):
            # If this is preempted, the resumed run mines again, and reuses the vectors that are already on disk.
            with contextlib.suppress(Preempted), trainer.precision_plugin.forward_context():
                self._mine(trainer, module, step, batch)

    def _mine(self, trainer: L.Trainer, module: ContrastiveModule, step: int, batch: int) -> None:
        data, started = trainer.datamodule, time.perf_counter()  # type: ignore[attr-defined]
        cache = self.mining.cache(replica(module.encoder))
        name = f"step-{step:08d}"
        meta = {"miner": self.mining.description, "model": cache.fingerprint, "data": data.fingerprints(), "step": step}
        documents = module.document_vectors
        meta |= {"document_model": documents.fingerprint if documents else None} | self.mining.judging
        # The run may have been killed between this mining and the next checkpoint. One rank decides for all.
        values = from_first_rank(_read_finished(data.rounds, name, meta) if trainer.is_global_zero else None)
        if values is not None:
            log.info("step %d: these hard negatives have already been mined", step)
        else:
            values = self._mine_now(trainer, cache, documents, name, meta)
        cache.remove()
        ended = time.perf_counter()
        for logger in trainer.loggers:
            logger.log_metrics(metrics(values) | {"mine/seconds": ended - started}, step=step)
        if self._ended is not None and ended - started > max(started - self._ended, NOTICEABLE):
            log.warning(
                "step %d: mining took %d s, but the steps since the last mining only %d s; consider a higher "
                "mining.every_n_steps (now %d)",
                *(step, ended - started, started - self._ended, self.every_n_steps),
            )
        self._ended = ended
        check_false_negatives(values, self.stop_at)
        data.rounds.begin(batch, name)

    def _mine_now(
        self, trainer: L.Trainer, cache: VectorCache, documents: VectorCache | None, name: str, meta: Mapping[str, Any]
    ) -> dict[str, Mapping[str, float]]:
        """Mine, write the store and its report, and return the figures of each task.

        All ranks return together, so that the vectors can then be removed.
        """
        data, step = trainer.datamodule, trainer.global_step  # type: ignore[attr-defined]
        self._pools = self._pools or data.pools()
        previous = data.rounds.at(step * trainer.accumulate_grad_batches)
        mined = self.mining.run(cache, self._pools, step, documents)
        for problem in without_negatives(mined):  # early in training, all candidates may score above the positives
            log.warning("%s. Until the next mining, the task uses the hard negatives in its data", problem)
        reports = reports_of(mined, step, previous)
        for line in table(reports):
            log.info("%s", line)
        log_histograms(trainer.loggers, histograms(reports), step)
        if trainer.is_global_zero:
            path = data.rounds.write(name, {task: result.negatives for task, result in mined.items()}, meta)
            write_report(path, reports, f"hard negatives mined at step {step}")
            log_picture(trainer.loggers, "mine/report", path / "report.svg", step)
        trainer.strategy.barrier()
        return {task: each.values for task, each in reports.items()}


def _read_finished(rounds: Any, name: str, meta: Mapping[str, Any]) -> dict[str, dict[str, float]] | None:
    """Return the figures of an earlier mining with these settings, or None if it is missing, incomplete or damaged."""
    if rounds.has_store(name, meta):
        with contextlib.suppress(UserError):
            return read_values(rounds.folder / name / "report.json")
    return None
