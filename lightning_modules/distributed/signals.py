"""Signals that ask a run to end. They are recorded immediately, and handled where the run can stop without loss.

This module has no heavy imports, so that an entry point can catch signals before its other imports, which take ten
seconds.

    SIGUSR1    the time limit is near: save, end, and requeue (SLURM's --signal)
    SIGTERM    save and end (Kubernetes, spot instances, scancel)
    SIGINT     Ctrl-C: save and end during training, KeyboardInterrupt elsewhere; a second one ends at once
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from lightning_modules.distributed import launch

PREEMPTED = 75  # exit status: the same command resumes the run (EX_TEMPFAIL of sysexits.h)
ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # from weakest to strongest; the strongest signal counts
PATIENCE = 10.0  # seconds that a signal waits for ranks to connect
_connected = threading.Event()
_noted: signal.Signals | None = None
_owner = 0  # id of the process that catches signals, 0 if none


class Preempted(Exception):
    """The run ends here and can be resumed. signal: the signal, or None if another rank received it."""

    def __init__(self, asked: signal.Signals | None):
        super().__init__(asked.name if asked else "another rank received a signal")
        self.signal = asked

    @property
    def status(self) -> int:
        """Exit status of the command: 130 after Ctrl-C, else PREEMPTED."""
        return 128 + signal.SIGINT if self.signal == signal.SIGINT else PREEMPTED


def catch() -> None:
    """Record SIGUSR1 and SIGTERM from now on, instead of terminating."""
    global _noted, _owner
    _noted, _owner = None, os.getpid()
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, _note)


def catch_interrupt() -> None:
    """Also record Ctrl-C, if this process catches signals."""
    if _owner == os.getpid():
        signal.signal(signal.SIGINT, _note)


def connecting(launcher: str | None = None) -> None:
    """Until connected() is called, let a signal end this process, and also the end of the process that launched it.

    It waits for other ranks in C++, where Python runs no handlers, so threads watch. There is nothing to save yet.

    launcher: id of the process that launched this one, None to outlive it.
    """
    if _owner != os.getpid():
        return
    _connected.clear()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)

    def watch() -> None:
        number = signal.Signals(_noted or os.read(reader, 1)[0])
        if not _connected.wait(PATIENCE):
            print(f"ended by {number.name} while waiting for the other ranks", file=sys.stderr, flush=True)
            os._exit(Preempted(number).status)

    def watch_launcher() -> None:
        while not _connected.wait(1):
            if launcher and os.getppid() != int(launcher):
                os._exit(1)

    for target in (watch, watch_launcher):
        threading.Thread(target=target, daemon=True).start()


def connected() -> None:
    """All ranks are connected, so that they end together from now on."""
    _connected.set()


def ignore() -> None:
    """Ignore all later signals, so that they do not change the exit status. Has no effect without catch()."""
    for number in ASKING if _owner == os.getpid() else ():
        signal.signal(number, signal.SIG_IGN)


def _note(number: int, _frame: object) -> None:
    global _noted
    if os.getpid() != _owner:  # a forked process leaves signals to the parent
        return
    is_second_interrupt = _noted == number == signal.SIGINT
    _noted = max(_noted, signal.Signals(number), key=ASKING.index) if _noted else signal.Signals(number)
    if is_second_interrupt:
        raise KeyboardInterrupt
    if number == signal.SIGINT and launch.rank() == 0:
        os.write(2, b"\nsaving after this step (press Ctrl-C again to end at once)\n")


def noted() -> signal.Signals | None:
    """Return the signal that asked this process to end, if any."""
    return _noted


def leave_if_asked(*_: object) -> None:
    """Raise Preempted if a signal was received, and this process may end on its own.

    It may if it is the only rank, or the first rank of a SLURM job (the job then ends with it). Otherwise, all ranks
    end together after a step.
    """
    if _noted and (launch.alone() or (launch.under_srun() and launch.rank() == 0)):
        raise Preempted(_noted)
