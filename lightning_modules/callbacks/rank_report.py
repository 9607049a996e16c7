"""What each rank has to do, told after the first step."""

from __future__ import annotations

import logging
import os
import platform
import sys
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from datamodules.records import ContrastiveBatch, UserError
from lightning_modules.distributed.collectives import rank, world_size

log = logging.getLogger(__name__)
GIB = 1 << 30


class RankReport(L.Callback):
    """Tells, once, each rank's first batch and memory, and how many documents a query is compared with.

    Raises UserError before the first step if ranks, on machines of other kinds, took another precision each.
    """

    def __init__(self) -> None:
        self.told = False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        precisions = [str(trainer.precision)] * world_size()
        if world_size() > 1:
            dist.all_gather_object(precisions, str(trainer.precision))
        if len(set(precisions)) > 1:
            told = ", ".join(f"rank {i} {precision}" for i, precision in enumerate(precisions))
            raise UserError(f"trainer.precision: auto is not the same everywhere ({told}); set fp32 or bf16")

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: ContrastiveBatch, batch_idx: int
    ) -> None:
        if self.told:
            return
        self.told = True
        own = {
            "rank": f"rank {rank()} ({module.device} on {platform.node()})",
            "queries": len(batch.queries),
            "documents": len(batch.documents),
            "memory": memory(module.device),
        }
        reports = [own] * world_size()
        if world_size() > 1:
            dist.all_gather_object(reports, own)
        documents = sum(report["documents"] for report in reports)
        for report in reports:
            log.info("%s", "{rank}: {queries} queries, {documents} documents, {memory}".format(**report))
        log.info(
            "in this batch (%s) a query has up to %d negatives, from %d rank%s",
            *(batch.task, documents - 1, len(reports), "s" if len(reports) > 1 else ""),
        )


def memory(device: torch.device) -> str:
    """The most that this process has used until now, and what there is."""
    if device.type == "cuda":
        used, there = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        return f"{used / GIB:.1f} of {there / GIB:.1f} GiB of the GPU"
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{used / GIB:.1f} of {there / GIB:.1f} GiB"
