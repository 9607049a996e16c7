"""Signals that ask a run to end. They are noted at once, and acted on where the run can stop without loss.

This module imports nothing heavy, so that an entry point can catch signals before its other imports, which take ten
seconds.

    SIGUSR1    the time limit is near: save, end, and run again (SLURM's --signal)
    SIGTERM    save and end (Kubernetes, spot instances, scancel)
    SIGINT     Ctrl-C: save and end during training, KeyboardInterrupt elsewhere; a second one ends at once
"""

from __future__ import annotations

import os
import signal

from lightning_modules.distributed import launch

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # if several arrive, the last in this order counts
_noted: signal.Signals | None = None
_owner = 0  # process that catches signals


class Preempted(Exception):
    """The run ends here and is resumed later. signal: the one that was received, or None if another rank knows."""

    def __init__(self, asked: signal.Signals | None):
        super().__init__(asked.name if asked else "another rank received a signal")
        self.signal = asked


def catch() -> None:
    """Note SIGUSR1 and SIGTERM from now on instead of terminating."""
    global _noted, _owner
    _noted, _owner = None, os.getpid()
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, _note)


def catch_interrupt() -> None:
    """Also note Ctrl-C, if this process catches signals."""
    if _owner == os.getpid():
        signal.signal(signal.SIGINT, _note)


def ignore() -> None:
    """Ignore signals once the run has ended, so that they do not change its exit status. No effect without catch."""
    for number in ASKING if _owner == os.getpid() else ():
        signal.signal(number, signal.SIG_IGN)


def _note(number: int, _frame: object) -> None:
    global _noted
    if os.getpid() != _owner:  # a forked process leaves the decision to its parent
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
    """Raise Preempted if a signal was received and this process may end on its own.

    It may if there are no other ranks, or if it is the first rank of a SLURM job, which ends with it. Other ranks end
    after a common step.
    """
    if _noted and (launch.alone() or (launch.under_srun() and launch.rank() == 0)):
        raise Preempted(_noted)
