"""Commands of experiments as processes that are forked from a server, which has imported everything once.

A new Python process spends about six seconds of processor time on the imports of a command. While the fixture
`forked_commands` is used, subprocess starts `python -m experiments.NAME` in a fraction of a second instead, and so do
these commands with their ranks and trials. Everything else starts as usual: other programs, processes that end with
their parent, and commands with a preexec_fn or with other values of variables that packages read while they are
imported.

Each process of pytest has one server. It has a single thread, and no state but its imports.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import inspect
import json
import os
import random
import re
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAUNCHER = "SCIMULT_LAUNCHER"  # variable that experiments.run.processes sets
READ_BY_IMPORTS = ("CUDA", "HF_", "LANG", "LC_", "MKL_", "OMP_", "PYTHON", "TORCH", "TRANSFORMERS_")
LAZY = ("bm25s", "transformers.models.bert.modeling_bert", "transformers.models.bert.tokenization_bert")
STATUS = struct.Struct("i")
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)  # by servers, which end with their clients
PARAMETERS = tuple(inspect.signature(subprocess.Popen._execute_child).parameters)[2:]
ENVIRONMENT = dict(os.environ)  # of the imports
_server: socket.socket | None = None


class ForkedPopen(subprocess.Popen):
    """A process that the server forks, if it is a command of experiments, and otherwise one that starts as usual."""

    _statuses = None  # file from which the id of the forked process and then its exit status are read

    @property
    def is_forked(self) -> bool:
        return self._statuses is not None

    def _execute_child(self, args, *rest):
        options = dict(zip(PARAMETERS, rest, strict=True))
        if not can_fork(args, options):
            super()._execute_child(args, *rest)
            return
        reading, writing = os.pipe()
        pipes = [options[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        files = [number if file == -1 else file for number, file in enumerate(pipes)]
        request = {
            "arguments": [os.fspath(word) for word in args[2:]],
            "cwd": os.fspath(options["cwd"] or os.getcwd()),
            "environment": dict(os.environ if options["env"] is None else options["env"]),
            "new_session": options["start_new_session"],
            "group": options["process_group"],
            "files": [0, 1, 2, *options["pass_fds"]],
        }
        socket.send_fds(server(), [json.dumps(request).encode()], [writing, *files, *options["pass_fds"]])
        os.close(writing)
        self._statuses = reading
        self.pid = self._read()
        self._child_created = True
        self._close_pipe_fds(
            *(options[n] for n in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"))
        )

    def _read(self) -> int:
        received = os.read(self._statuses, STATUS.size)
        if len(received) < STATUS.size:
            raise ChildProcessError("the server of forked commands has ended")
        return STATUS.unpack(received)[0]

    def _try_wait(self, wait_flags):
        if not self.is_forked:
            return super()._try_wait(wait_flags)
        if wait_flags & os.WNOHANG and not select.select([self._statuses], [], [], 0)[0]:
            return 0, 0
        status = self._read()
        os.close(self._statuses)
        return self.pid, status

    def _internal_poll(self, *arguments, **options):
        if not self.is_forked:
            return super()._internal_poll(*arguments, **options)
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                if self.returncode is None:
                    pid, status = self._try_wait(os.WNOHANG)
                    if pid:
                        self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


def can_fork(args, options) -> bool:
    """Return whether the arguments of Popen are those of a command that the server can fork."""
    if isinstance(args, (str, bytes, os.PathLike)) or any(options[n] for n in ("executable", "preexec_fn", "shell")):
        return False
    words = [os.fspath(word) for word in args[:3]]
    if words[:2] != [sys.executable, "-m"] or not re.fullmatch(r"experiments(\.\w+)?", words[2]):
        return False
    environment = os.environ if options["env"] is None else options["env"]
    ends_with_parent = LAUNCHER in environment
    return not ends_with_parent and read_by_imports(environment) == read_by_imports(ENVIRONMENT)


def read_by_imports(environment) -> dict[str, str]:
    """Return the variables that packages read while they are imported. The server has ROOT in its path anyway."""
    names = {name for name in environment if name.startswith(READ_BY_IMPORTS)}
    if environment.get("PYTHONPATH") == str(ROOT):
        names.discard("PYTHONPATH")
    return {name: environment[name] for name in names}


def server() -> socket.socket:
    """Return the connection to this process's server, which is started by the first command."""
    global _server
    if _server is None:
        _server, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "tests.forked", str(other.fileno())]
        subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, pass_fds=[other.fileno()])
        other.close()
    return _server


def serve(connection: socket.socket) -> dict:
    """Fork a process for each request, until the client ends. Returns the request in the forked process."""
    global _server
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    while True:
        message, files, _, _ = socket.recv_fds(connection, 1 << 20, 16)
        if not message:
            os._exit(0)
        if not os.fork():
            break
        for file in files:
            os.close(file)
    connection.close()
    statuses, *files = files
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if pid := os.fork():  # this process waits for the command, as only its parent can
        for file in files:
            os.close(file)
        os.write(statuses, STATUS.pack(os.waitpid(pid, 0)[1]))
        os._exit(0)
    request = json.loads(message)
    if request["new_session"]:
        os.setsid()
    elif request["group"] not in (None, -1):
        os.setpgid(0, request["group"])
    _server, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if not os.fork():  # a server for the ranks and trials that this command starts
        for file in (statuses, *files):
            os.close(file)
        _server.close()
        return serve(other)
    other.close()
    for number in IGNORED:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.write(statuses, STATUS.pack(os.getpid()))
    os.close(statuses)
    # First away from the numbers that they get.
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, max(request["files"]) + 1) for file in files]
    for file in files:
        os.close(file)
    for file, number in zip(moved, request["files"], strict=True):
        os.dup2(file, number)
        os.close(file)
    return request


def run(request: dict) -> None:
    """Run the command in this process, which has just been forked."""
    import numpy as np

    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    random.seed()
    np.random.seed()
    subprocess.Popen = ForkedPopen
    module, *sys.argv[1:] = request["arguments"]
    sys.path[0] = request["cwd"]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def import_everything() -> None:
    """Import all commands, and forget the commands themselves, each of which runs as __main__."""
    import experiments

    commands = {path.stem for path in (ROOT / "experiments").glob("*.py")} - {"__init__"}
    for name in (*(f"experiments.{command}" for command in commands), *LAZY):
        importlib.import_module(name)
    for command in commands:
        del sys.modules[f"experiments.{command}"]
        delattr(experiments, command)
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    channel = socket.socket(fileno=int(sys.argv[1]))
    import_everything()
    run(serve(channel))
