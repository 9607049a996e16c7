"""Sends a run to W&B while it trains, as a process of its own: python -m experiments.sender FILE.wandb

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


def is_sent(file: Path) -> bool:
    """Whether W&B has noted that the whole file was sent."""
    return file.with_name(f"{file.name}.synced").exists()


def send(file: Path) -> None:
    """Send what is written to the file until its run is over, whatever the server does."""
    told = threading.Event()
    late = threading.Timer(PATIENCE, lambda: say("is not reached; the run is logged offline meanwhile", told))
    late.daemon = True
    late.start()
    while not is_sent(file):
        _attempt(file, told)
        if not is_sent(file):
            time.sleep(PAUSE)


def say(what: str, told: threading.Event) -> None:
    if not told.is_set():
        told.set()
        print(f"W&B {what}", flush=True)


def _attempt(file: Path, told: threading.Event) -> None:
    """One `wandb sync`, which reads on as the file grows."""
    command = [sys.executable, "-m", "wandb", "beta", "sync", "--live", "--yes", str(file)]
    environment = {key: value for key, value in os.environ.items() if key != "WANDB_SILENT"} | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    threading.Thread(target=_end_with_parent, args=(process, os.getppid()), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: _leave(process))
    last = ""
    for line in process.stdout:
        last = line.strip() or last
        if "View run" in line:
            say(f"shows the run at {line.split(' at ')[-1].strip()}", told)
    if process.wait() != 0:
        say(f"cannot be sent to ({last}); the run is logged offline meanwhile", told)


def _end_with_parent(process: subprocess.Popen, parent: int) -> None:
    while process.poll() is None:
        if os.getppid() != parent:
            _leave(process)
        time.sleep(1)


def _leave(process: subprocess.Popen) -> None:
    process.kill()  # its own process, wandb-core, ends with it
    os._exit(1)


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGUSR1):  # they are meant for the training, which ends this process
        signal.signal(ignored, signal.SIG_IGN)
    send(Path(sys.argv[1]))
