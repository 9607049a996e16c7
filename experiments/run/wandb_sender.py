"""Send a run to W&B while it trains: python -m experiments.run.wandb_sender FILE.wandb

Training only writes W&B's file, so no server can slow it down. This process reads the file and sends it. It imports
little, and ends when everything is sent or the training process has ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from experiments.shared.plain import say

PATIENCE = 20  # after this many seconds without an answer, log that W&B cannot be reached
PAUSE = 30  # seconds until the next attempt
# Variables of the training. The first one would make W&B's command join the training's service process.
TRAINING_VARIABLES = ("WANDB_SERVICE", "WANDB_SILENT", "WANDB_MODE")


def environment() -> dict[str, str]:
    """Return the environment of the W&B command that sends files."""
    variables = {key: value for key, value in os.environ.items() if key not in TRAINING_VARIABLES}
    return variables | {"PYTHONUNBUFFERED": "1"}


def is_sent(file: Path) -> bool:
    """Return whether W&B has recorded that the whole file was sent."""
    return file.with_name(f"{file.name}.synced").exists()


class Sender:
    """Sends a growing file until the run has ended, and tries again if the server fails."""

    def __init__(self, file: Path):
        self.file, self.parent = file, os.getppid()
        self._has_spoken = threading.Event()
        self._process: subprocess.Popen | None = None

    def run(self) -> None:
        signal.signal(signal.SIGTERM, lambda *_: self._exit())
        threading.Thread(target=self._watch, daemon=True).start()
        while not is_sent(self.file):
            self._send()
            if not is_sent(self.file):
                time.sleep(PAUSE)

    def _watch(self) -> None:
        """Exit when the parent ends, and report a server that does not answer."""
        start = time.monotonic()
        while os.getppid() == self.parent:
            if time.monotonic() - start > PATIENCE:
                self._print_once("W&B cannot be reached; the run is logged offline meanwhile")
            time.sleep(1)
        self._exit()

    def _send(self) -> None:
        """Run `wandb sync` once. It follows the file as it grows."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "wandb", "beta", "sync", "--live", "--yes", str(self.file)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )
        last = ""
        for line in self._process.stdout:
            last = line.strip() or last
            if "View run" in line:
                self._print_once(f"W&B shows the run at {line.split(' at ')[-1].strip()}")
        if self._process.wait() != 0:
            self._print_once(f"W&B refused the run ({last}); it is logged offline meanwhile")

    def _print_once(self, message: str) -> None:
        """Print only the first message, because one line about W&B is enough in a training log."""
        if not self._has_spoken.is_set():
            self._has_spoken.set()
            say(message)

    def _exit(self) -> None:
        if self._process:
            self._process.kill()  # also ends its child, wandb-core
        os._exit(1)


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGUSR1):  # these signals are for the training process, which ends this one
        signal.signal(ignored, signal.SIG_IGN)
    Sender(Path(sys.argv[1])).run()
