"""Which rank is lost, when one is: the others see broken connections alone, or nothing at all."""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
from datetime import timedelta

import lightning as L
import torch.distributed as dist

from lightning_modules.distributed.collectives import from_first_rank, rank, world_size

log = logging.getLogger(__name__)

INTERVAL = 0.5  # seconds between two beats
SILENCE = 3.0  # seconds without one, after which a rank counts as lost once something has failed
WARNING = 60.0  # seconds without one, after which it is told though nothing has failed


class Heartbeat(L.Callback):
    """Every rank beats in a thread, into a store of the first one; a rank that is killed or stopped does not.

    timeout: seconds that ranks wait for one that does not answer, once all of them are there.
    """

    def __init__(self, timeout: float):
        self.timeout = timedelta(seconds=timeout)
        self._store: dist.TCPStore | None = None
        self._world, self._rank = 1, 0
        self._stop = threading.Event()

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if world_size() == 1:
            return
        self._world, self._rank = world_size(), rank()
        address = trainer.strategy.cluster_environment.main_address
        store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False) if self._rank == 0 else None
        port = from_first_rank(store.port if store else None)
        self._store = store or dist.TCPStore(address, port, is_master=False)
        self._store.set(f"name/{self._rank}", f"rank {self._rank} (process {os.getpid()} on {platform.node()})")
        self._store.add(f"beats/{self._rank}", 1)
        dist.barrier()
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
            except RuntimeError:  # the first rank is gone, or the group ends
                return
            for other in range(self._world):
                if beats[other] != before[other]:
                    silent_since[other] = time.monotonic()
                elif time.monotonic() - silent_since[other] > WARNING:
                    log.warning("%s has given no sign of life for %.0f seconds", self._name(other), WARNING)
                    silent_since[other] = float("inf")  # told once

    def _beats(self) -> list[int]:
        return [self._store.add(f"beats/{other}", 0) for other in range(self._world)]

    def _name(self, other: int) -> str:
        return self._store.get(f"name/{other}").decode()

    def lost(self) -> list[str]:
        """The ranks that are lost, by name, after something has failed that ranks do together. Takes some seconds."""
        if self._store is None:
            return []
        found: list[str] = []
        asking = threading.Thread(target=lambda: found.extend(self._ask()), daemon=True)
        asking.start()
        asking.join(3 * SILENCE)
        return ["rank 0"] if asking.is_alive() else found  # it has the store, which does not answer

    def _ask(self) -> list[str]:
        try:
            before = self._beats()
            time.sleep(SILENCE)
            now = self._beats()
            found = [self._name(other) for other in range(self._world) if before[other] == now[other]]
            # Who finds out first is right: ranks end when they have, and are then missed by those who come later.
            return self._store.compare_set("lost", "", "\n".join(found)).decode().split("\n") if found else []
        except RuntimeError:
            return ["rank 0"]

    def stop(self) -> None:
        self._stop.set()
