"""Sends a run to W&B while it trains, as a process of its own: python -m experiments.run.sender FILE.wandb

Training writes W&B's file and never speaks to the server: whether and how fast that answers is nothing to it. This
process imports the standard library alone. It ends when all is sent, or with the process that started it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

PATIENCE = 20  # seconds until a server that does not answer is spoken of
PAUSE = 30  # seconds until the next attempt
NOT_OURS = ("WANDB_SERVICE", "WANDB_SILENT", "WANDB_MODE")  # of the training: the first would join its own process


def environment() -> dict[str, str]:
    """In which W&B's command sends."""
    return {key: value for key, value in os.environ.items() if key not in NOT_OURS} | {"PYTHONUNBUFFERED": "1"}


def is_sent(file: Path) -> bool:
    """Whether W&B has noted that the whole file was sent."""
    return file.with_name(f"{file.name}.synced").exists()


class Sender:
    """Sends what is written to a file until its run is over, whatever the server does."""

    def __init__(self, file: Path):
        self.file, self.parent = file, os.getppid()
        self.told = threading.Event()
        self.process: subprocess.Popen | None = None

    def run(self) -> None:
        signal.signal(signal.SIGTERM, lambda *_: self.leave())
        threading.Thread(target=self._watch, daemon=True).start()
        while not is_sent(self.file):
            self._attempt()
            if not is_sent(self.file):
                time.sleep(PAUSE)

    def say(self, what: str) -> None:
        """One line, the first that there is reason for."""
        if not self.told.is_set():
            self.told.set()
            print(f"W&B {what}", flush=True)

    def leave(self) -> None:
        if self.process:
            self.process.kill()  # its own process, wandb-core, ends with it
        os._exit(1)

    def _watch(self) -> None:
        """Leave with the parent, and speak of a server that does not answer."""
        began = time.monotonic()
        while os.getppid() == self.parent:
            if time.monotonic() - began > PATIENCE:
                self.say("is not reached; the run is logged offline meanwhile")
            time.sleep(1)
        self.leave()

    def _attempt(self) -> None:
        """One `wandb sync`, which reads on as the file grows."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "wandb", "beta", "sync", "--live", "--yes", str(self.file)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )
        last = ""
        for line in self.process.stdout:
            last = line.strip() or last
            if "View run" in line:
                self.say(f"shows the run at {line.split(' at ')[-1].strip()}")
        if self.process.wait() != 0:
            self.say(f"cannot be sent to ({last}); the run is logged offline meanwhile")


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGUSR1):  # they are meant for the training, which ends this process
        signal.signal(ignored, signal.SIG_IGN)
    Sender(Path(sys.argv[1])).run()
