"""Run the trials of a sweep or the jobs of a study in parallel processes, possibly on several machines."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Generic, TypeVar

from datamodules.files import open_new
from datamodules.locks import lock_file
from lightning_modules.distributed.signals import ASKING, Preempted

log = logging.getLogger(__name__)

LOG_TAIL = 15  # number of lines of a failed command's log to show in the error message
Item = TypeVar("Item")


class Runner(ABC, Generic[Item]):
    """Runs items, such as the trials of a sweep, in parallel processes.

    The process of an item holds the item's lock, even if the runner is killed, so several runners can share a folder.

    parallel: number of items to run at a time. minutes: time after which to stop.
    """

    def __init__(self, parallel: int = 1, minutes: float | None = None):
        self.parallel = parallel
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.signal: signal.Signals | None = None  # signal that asked this runner to end
        self._processes: set[subprocess.Popen] = set()
        self._slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(parallel):
            self._slots.put(slot)

    @abstractmethod
    def lock_of(self, item: Item) -> Path:
        """Return the file that a process locks while it runs an item."""

    @abstractmethod
    def may_start(self, item: Item) -> bool:
        """Return whether an item may start now. Items for which this stays false are never run."""

    @abstractmethod
    def run_item(self, item: Item, lock: IO[str]) -> None:
        """Run the rest of an item. Called in a thread that holds the item's lock."""

    def run_all(self, items: Sequence[Item]) -> None:
        """Run items in order. If another process is running an item, try again until it is free.

        Raises Preempted after a signal, or when the time is up and all processes that can resume have saved.
        """
        for number in ASKING:
            signal.signal(number, lambda received, _frame: self.stop(signal.Signals(received)))
        waiting, running, announced = list(items), set(), False
        with ThreadPoolExecutor(self.parallel) as pool:
            while True:
                ready = [item for item in waiting if self.signal is None and self.may_start(item)]
                for item in ready:
                    if len(running) < self.parallel and (lock := lock_file(self.lock_of(item), wait=False)):
                        waiting.remove(item)
                        running.add(pool.submit(self._run_locked, item, lock))
                if running:
                    ended, running = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                    for future in ended:
                        future.result()
                elif ready:
                    if not announced:
                        log.info("other processes are running the remaining %d; waiting for them", len(ready))
                    announced = True
                    time.sleep(1)
                else:
                    break
                if self.signal is None and self.deadline is not None and time.monotonic() > self.deadline:
                    log.info("the time is up, so running commands save and end")
                    self.stop(signal.SIGTERM)
        if self.signal is not None:
            raise Preempted(self.signal)

    def _run_locked(self, item: Item, lock: IO[str]) -> None:
        with lock:
            self.run_item(item, lock)

    def stop(self, number: signal.Signals) -> None:
        """Start nothing more, and pass a signal on to all processes."""
        self.signal = number
        for process in list(self._processes):
            send(process, number)

    @contextmanager
    def process(
        self, command: Sequence[str], output: Path, lock: IO[str], folder: Path | None = None
    ) -> Iterator[subprocess.Popen]:
        """Start a command, and pass signals on to it. The caller waits until it ends.

        output: file to append the command's output to. folder: working directory, by default the current one.
        lock: lock that is held until the command ends, even if this process is killed.
        """
        slot = self._slots.get()
        try:
            with open_new(output, keep=True) as file:
                process = subprocess.Popen(
                    command,
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment(slot, self.parallel),
                    process_group=0,  # so that only this process passes signals on to it
                    pass_fds=[lock.fileno()],
                )
            self._processes.add(process)
            if self.signal is not None:  # a signal came before the process was registered
                send(process, self.signal)
            yield process
            self._processes.remove(process)
        finally:
            self._slots.put(slot)


def send(process: subprocess.Popen, number: signal.Signals) -> None:
    """Send a signal to a process and all its descendants, unless it has ended."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def log_tail(path: Path) -> str:
    """Return the last lines of a log."""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL:])


def environment(slot: int, parallel: int) -> dict[str, str]:
    """Return the environment of a command, without variables of an outer make, and with its own GPU if several run.

    slot: index of the command among the `parallel` commands that run at the same time.
    """
    variables = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    variables["PYTHONUNBUFFERED"] = "1"
    if parallel > 1:
        import torch

        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
        if gpus:
            variables["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return variables
