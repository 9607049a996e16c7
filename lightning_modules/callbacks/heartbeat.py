"""Find out which rank was lost, because the other ranks only see broken connections, or nothing at all."""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
from datetime import timedelta
from typing import Any

import lightning as L
import torch.distributed as dist

from lightning_modules.distributed.collectives import from_first_rank, rank, world_size
from lightning_modules.distributed.signals import connected

log = logging.getLogger(__name__)

INTERVAL = 0.5  # seconds between two beats
SILENCE = 3.0  # after a collective operation has failed, a rank counts as lost after this many seconds without a beat
WARNING = 60.0  # seconds without a beat after which a warning is logged, even if nothing has failed


class Heartbeat(L.Callback):
    """Counts each rank's beats in a store on the first rank. A thread sends the beats, so a killed rank stops counting.

    timeout: seconds that collective operations wait for a rank, once all ranks have started.
    """

    def __init__(self, timeout: float):
        self.timeout = timedelta(seconds=timeout)
        self._store: Any = None  # dist.TCPStore, if there are several ranks
        self._world, self._rank = 1, 0
        self._stop = threading.Event()

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if world_size() == 1:
            return
        self._world, self._rank = world_size(), rank()
        address = trainer.strategy.cluster_environment.main_address  # type: ignore[attr-defined]
        store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False) if self._rank == 0 else None
        port = from_first_rank(store.port if store else None)
        self._store = store or dist.TCPStore(address, port, is_master=False)
        self._store.set(f"name/{self._rank}", f"rank {self._rank} (process {os.getpid()} on {platform.node()})")
        self._store.add(f"beats/{self._rank}", 1)
        dist.barrier()
        connected()
        dist.distributed_c10d._set_pg_timeout(self.timeout)
        threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()

    def _beat(self) -> None:
        silent_since = {other: time.monotonic() for other in range(self._world)}
        beats: list[int] = []
        while not self._stop.wait(INTERVAL):
            try:
                self._store.add(f"beats/{self._rank}", 1)
                if self._rank > 0:
                    continue
                before, beats = beats or [0] * self._world, self._beats()
            except RuntimeError:  # the first rank is gone, or the process group ends
                return
            for other in range(self._world):
                if beats[other] != before[other]:
                    silent_since[other] = time.monotonic()
                elif time.monotonic() - silent_since[other] > WARNING:
                    log.warning("%s has not responded for %.0f seconds", self._name(other), WARNING)
                    silent_since[other] = float("inf")  # warn once

    def _beats(self) -> list[int]:
        return [self._store.add(f"beats/{other}", 0) for other in range(self._world)]

    def _name(self, other: int) -> str:
        return self._store.get(f"name/{other}").decode()

    def lost(self) -> list[str]:
        """Return the names of the lost ranks, after a collective operation has failed. This takes a few seconds."""
        if self._store is None:
            return []
        names: list[str] = []
        query = threading.Thread(target=lambda: names.extend(self._silent_ranks()), daemon=True)
        query.start()
        query.join(3 * SILENCE)
        return ["rank 0"] if query.is_alive() else names  # rank 0 holds the store

    def _silent_ranks(self) -> list[str]:
        try:
            before = self._beats()
            time.sleep(SILENCE)
            now = self._beats()
            silent = [self._name(other) for other in range(self._world) if before[other] == now[other]]
            # The first answer counts, because the rank that gives it then ends, and later answers would also list it as
            # lost.
            return self._store.compare_set("lost", "", "\n".join(silent)).decode().split("\n") if silent else []
        except RuntimeError:
            return ["rank 0"]

    def stop(self) -> None:
        self._stop.set()
