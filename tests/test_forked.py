"""Commands forked from the server behave as those that are started."""

import os
import signal
import subprocess
import sys

import pytest

from experiments.run.processes import LAUNCHER
from tests import forked
from tests.forked import PARAMETERS, ROOT, ForkedPopen, can_fork

FIND = [sys.executable, "-m", "experiments.find"]


@pytest.mark.slow
def test_forked_commands_have_the_output_and_status_of_started_ones(tmp_path):
    def outcome(popen, *arguments, **options):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with popen([sys.executable, "-m", *arguments], **pipes, **options) as process:
            return process.communicate(timeout=300), process.returncode

    elsewhere = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    for arguments, options in (
        (["experiments.train", "moe", "optim.lrr=1"], {"cwd": ROOT}),
        (["experiments", "sync", "folder=."], elsewhere),
    ):
        assert outcome(ForkedPopen, *arguments, **options) == outcome(subprocess.Popen, *arguments, **options)


@pytest.mark.slow
def test_sessions_files_and_signals_reach_a_forked_command():
    reading, full = os.pipe()
    other, passed = os.pipe()
    os.set_blocking(full, False)
    try:
        while True:
            os.write(full, bytes(1 << 10))
    except BlockingIOError:
        os.set_blocking(full, True)  # the command waits when it writes
    with ForkedPopen([*FIND, "--help"], stdout=full, pass_fds=[passed], start_new_session=True, cwd=ROOT) as process:
        assert process.is_forked
        assert os.getsid(process.pid) == os.getpgid(process.pid) == process.pid
        assert process.poll() is None
        os.close(passed)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    assert os.read(other, 1) == b""  # it had the file, and nothing has it any more
    for file in (reading, full, other):
        os.close(file)


def test_only_commands_with_the_environment_of_the_imports_are_forked(monkeypatch):
    environment = {"OMP_NUM_THREADS": "1"}
    monkeypatch.setattr(forked, "ENVIRONMENT", environment)
    usual = dict.fromkeys(PARAMETERS) | {"env": environment}
    assert can_fork(FIND, usual)
    assert can_fork(FIND, usual | {"env": environment | {"HOME": "/", "PYTHONPATH": str(ROOT)}})
    for different in (
        {"preexec_fn": print},
        {"env": {}},
        {"env": environment | {"OMP_NUM_THREADS": "3"}},
        {"env": environment | {"PYTHONPATH": "/"}},
        {"env": environment | {LAUNCHER: "1"}},
    ):
        assert not can_fork(FIND, usual | different)
    for command in (
        "true",
        ["true"],
        [sys.executable, "-c", "pass"],
        [*FIND[:2], "pip"],
        [*FIND[:2], "experiments.run.x"],
    ):
        assert not can_fork(command, usual)
