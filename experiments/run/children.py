"""Processes that an entry point starts beside itself: none outlives it, however it ends.

python -m experiments.run.children PARENT MODULE [ARGUMENT ...]     what is started: MODULE, bound to its parent
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

PR_SET_PDEATHSIG = 1  # of Linux's prctl
LOOKS_EVERY = 1.0  # seconds, where there is no prctl
ENDING = (signal.SIGTERM, signal.SIGHUP)
Handler = Callable[..., Any] | int | None


class Children:
    """The processes that are started within. On leaving they are ended, and so they are by SIGTERM and SIGHUP."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen] = []
        self.over = False  # whether they end because they are to
        self._leaving = threading.Lock()
        self._handlers: dict[signal.Signals, Handler] = {}
        self._pipe: tuple[int, int] | None = None

    def __enter__(self) -> Children:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._pipe:
            signal.set_wakeup_fd(-1)
            os.close(self._pipe[1])  # which ends the thread

    def start(
        self, module: str, arguments: Sequence[str], environment: Mapping[str, str], **how: Any
    ) -> subprocess.Popen:
        """Start python -m module arguments. how: for subprocess.Popen."""
        if not self._pipe:
            self._catch()
        command = [sys.executable, "-m", __name__, str(os.getpid()), module, *arguments]
        process = subprocess.Popen(command, env=environment, **how)
        self.processes.append(process)
        return process

    def end(self) -> None:
        self._kill()
        for process in self.processes:
            process.wait()

    def _kill(self) -> None:
        self.over = True
        for process in self.processes:
            process.kill()

    def _catch(self) -> None:
        """Answer signals in a thread of its own, for the first one may be waiting for the others in C++."""
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in ENDING:
            if signal.getsignal(number) == signal.SIG_DFL:  # under nohup it stays ignored
                self._handlers[number] = signal.signal(number, self._leave)
        threading.Thread(target=self._answer, args=(self._pipe[0],), daemon=True).start()

    def _answer(self, pipe: int) -> None:
        while read := os.read(pipe, 1):
            if read[0] in self._handlers:
                self._leave(read[0])
        os.close(pipe)

    def _leave(self, number: int, _frame: object = None) -> None:
        self._leaving.acquire()  # for good: the main thread must not go on with what its children's end looks like
        self._kill()
        os.write(2, f"ended by {signal.Signals(number).name}, with the processes beside it\n".encode())
        os._exit(128 + number)


def end_with(parent: int) -> None:
    """End this process, by SIGKILL, as soon as its parent has ended."""
    try:
        bound = ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) == 0
    except (AttributeError, OSError, TypeError):  # not Linux
        bound = False
    if os.getppid() != parent:  # it ended before
        os.kill(os.getpid(), signal.SIGKILL)
    if not bound:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOKS_EVERY)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
