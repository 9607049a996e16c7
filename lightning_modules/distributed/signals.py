"""Signals that ask a run to end. They are noted at once, and answered where the run can be left without loss.

Imports nothing heavy: an entry point catches signals before it spends ten seconds on its other imports.

    SIGUSR1    the time is nearly up: save, end, and run again (SLURM's --signal)
    SIGTERM    save and end (Kubernetes, spot machines, scancel)
    SIGINT     Ctrl-C: in training save and end, elsewhere Python's KeyboardInterrupt; the second one ends at once
"""

from __future__ import annotations

import os
import signal

from lightning_modules.distributed import launch

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # of several the last in this order is answered
_noted: signal.Signals | None = None
_owner = 0


class Preempted(Exception):
    """The run ends here and goes on later. signal: that asked for it, None where another rank knows."""

    def __init__(self, asked: signal.Signals | None):
        super().__init__(asked.name if asked else "another rank was asked")
        self.signal = asked


def catch() -> None:
    """Note SIGUSR1 and SIGTERM from now on, instead of dying of them."""
    global _noted, _owner
    _noted, _owner = None, os.getpid()
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, _note)


def catch_interrupt() -> None:
    """Note Ctrl-C too, if other signals are caught."""
    if _owner == os.getpid():
        signal.signal(signal.SIGINT, _note)


def ignore() -> None:
    """What asks a run to end that has ended changes nothing now, its exit status least of all. If they were caught."""
    for number in ASKING if _owner == os.getpid() else ():
        signal.signal(number, signal.SIG_IGN)


def _note(number: int, _frame: object) -> None:
    global _noted
    if os.getpid() != _owner:  # forked: its parent decides
        return
    again = _noted == number == signal.SIGINT
    _noted = max(_noted, signal.Signals(number), key=ASKING.index) if _noted else signal.Signals(number)
    if again:
        raise KeyboardInterrupt
    if number == signal.SIGINT and launch.rank() == 0:
        os.write(2, b"\nsaving after this step (Ctrl-C again ends at once)\n")


def noted() -> signal.Signals | None:
    """The signal that asked this process to end, if any."""
    return _noted


def leave_if_asked(*_: object) -> None:
    """Raise Preempted if a signal came, where this process may leave by itself and nothing is lost by it.

    So may one that has no others, and the first of a SLURM job, which ends with it; others wait for a common step.
    """
    if _noted and (launch.alone() or (launch.under_srun() and launch.rank() == 0)):
        raise Preempted(_noted)
