"""Run commands in processes forked from one that has imported them: a start takes 0.1 s in place of 5 s.

The forked process differs from `python -m MODULE` in its imports alone: it has its own arguments, environment, folder
and session, and ends as any interpreter does. Tests of imports, of the environment variables that they read, and of
signals before their end start real processes.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import random
import resource
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.conftest import unused_port

ROOT = Path(__file__).parents[1]
# The last ones are imported when a training starts.
IMPORTED = (
    *(f"experiments.{name}" for name in ("train", "evaluate", "mine", "embed", "compare", "export")),
    *("torch._dynamo", "torch.distributed.fsdp", "tests.conftest"),
)


class Forked:
    """A command in a process of its own, with the methods of subprocess.Popen. Its output goes to files."""

    def __init__(
        self,
        arguments: list[str],
        cwd: Path = ROOT,
        env: dict[str, str] | None = None,
        merged: bool = False,
        max_file: int | None = None,
    ):
        """Start `python -m` with the arguments.

        merged: whether stderr goes where stdout does.
        max_file: limit on the size of files, in bytes.
        """
        assert arguments[:2] == [sys.executable, "-m"]
        self.arguments, self.returncode = arguments, None
        self.stdout = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.stderr = self.stdout if merged else tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(_template())
        request = {"arguments": list(map(str, arguments[2:])), "cwd": str(cwd), "max_file": max_file}
        request["env"] = env or dict(os.environ)
        files = [self.stdout.fileno(), self.stderr.fileno()]
        socket.send_fds(self.connection, [json.dumps(request).encode() + b"\n"], files)
        self.pid = self._number()

    def _number(self) -> int:
        """Read a line of the connection. A buffer would hide the next line from select."""
        line = b""
        while not line.endswith(b"\n"):
            line += (byte := self.connection.recv(1))
            assert byte, "the process that forks commands has ended"
        return int(line)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.arguments, timeout)
            self.returncode = self._number()
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process and its children."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Return the whole output, after the end of the process."""
        self.wait(timeout)
        return _content(self.stdout), _content(self.stderr)


def _content(file: Any) -> str:
    file.seek(0)
    return file.read()


def run(arguments: list[str], check: bool = False, **options: Any) -> subprocess.CompletedProcess:
    """Run `python -m` with the arguments to its end."""
    return run_all([Forked(arguments, **options)], check)[0]


def start_ranks(arguments: list[str], world_size: int = 2) -> list[Forked]:
    """Start the ranks of a command, as torchrun would."""
    same = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "test"}
    same |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": unused_port()}
    ranks = [same | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(world_size)]
    environments = [os.environ | {key: str(value) for key, value in rank.items()} for rank in ranks]
    return [Forked(arguments, env=environment) for environment in environments]


def run_ranks(arguments: list[str], world_size: int = 2, check: bool = False) -> list[subprocess.CompletedProcess]:
    """Run the ranks of a command to their end."""
    return run_all(start_ranks(arguments, world_size), check)


def run_all(processes: list[Forked], check: bool = False, timeout: float = 600) -> list[subprocess.CompletedProcess]:
    """Wait for processes that were started together, and kill those that remain after an error."""
    results, deadline = [], time.monotonic() + timeout
    try:
        for each in processes:
            output = each.communicate(max(0.0, deadline - time.monotonic()))
            results.append(subprocess.CompletedProcess(each.arguments, each.returncode, *output))
    finally:
        for each in processes:
            each.kill()
    for result in results if check else ():
        assert result.returncode == 0, (result.args, result.stderr[-3000:])
    return results


@functools.cache
def _template() -> str:
    """Start the process that imports everything, and return the address of its socket."""
    folder = tempfile.mkdtemp(prefix="forked-")
    address = os.path.join(folder, "socket")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.forked", address],
        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": ROOT, "start_new_session": True},
    )
    assert process.stdout.readline() == b"ready\n"

    @atexit.register
    def end() -> None:
        process.communicate()
        shutil.rmtree(folder)

    return address


def _serve(address: str) -> dict[str, Any]:
    """Fork a process for each request, until stdin is closed. Returns the request, in the forked process."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        with suppress(ChildProcessError):  # before the first one
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return _mind(connection)
        connection.close()
    os._exit(0)


def _mind(connection: socket.socket) -> dict[str, Any]:
    """Fork the process of a request, send its id and its status, and kill it if the test ends before it."""
    text, files, *_ = socket.recv_fds(connection, 1 << 20, 2)
    while not text.endswith(b"\n"):
        text += connection.recv(1 << 20)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        connection.close()
        for number, file in enumerate(files, 1):
            os.dup2(file, number)
            os.close(file)
        return json.loads(text)
    connection.sendall(f"{pid}\n".encode())
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if select.select([connection], [], [], 0.01)[0]:
            os.killpg(pid, signal.SIGKILL)
            os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    connection.sendall(f"{status}\n".encode())
    os._exit(0)


def main(address: str) -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    request = _serve(address)
    gc.unfreeze()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run in the background
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup
    if request["max_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["max_file"],) * 2)
    random.seed()
    sys.path[0] = request["cwd"]
    module, *sys.argv[1:] = request["arguments"]
    sys.modules.pop(module, None)  # runpy warns of modules that have been imported
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1])
