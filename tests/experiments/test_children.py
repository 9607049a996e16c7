"""Processes that end with the one that started them, whatever ends it: with real ones, which are really killed."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.experiments.test_train import ROOT

NAP = """
import os, time
open(f"child-{os.environ.get('LOCAL_RANK', 0)}", "w").write(str(os.getpid()))
time.sleep(60)
"""
PARENTS = {
    "workers": "from experiments.run.workers import *; run_processes('nap', [], Share(), 2)",
    "bare": "import os; from experiments.run.children import *; Children().start('nap', [], os.environ).wait()",
    "no prctl": """
import os, subprocess, sys
child = "import ctypes, os; ctypes.CDLL = None; from experiments.run.children import *; end_with(os.getppid())"
subprocess.run([sys.executable, "-c", child + "; import nap"])
""",
    # The first rank waits for the other in C++, where no handler of Python's is called.
    "ranks": """
import sys
from experiments.run.ranks import *
with ranks("nap", [], "2"):
    pass
""",
}


def is_there(pid):
    """Whether a process lives: one that nobody has waited for yet has ended."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(what, seconds):
    end = time.monotonic() + seconds
    while not (found := what()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("parent", "number", "children"),
    [
        ("bare", signal.SIGKILL, 1),
        ("bare", signal.SIGHUP, 1),
        ("no prctl", signal.SIGKILL, 1),
        ("workers", signal.SIGTERM, 2),
        ("ranks", signal.SIGTERM, 1),
        ("ranks", signal.SIGKILL, 1),
    ],
)
def test_no_process_outlives_the_one_that_started_it(tmp_path, parent, number, children):
    (tmp_path / "nap.py").write_text(NAP)
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    command, environment = [sys.executable, "-c", PARENTS[parent]], os.environ | {"PYTHONPATH": path}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)

    def started():
        found = [path.read_text() for path in tmp_path.glob("child-*")]
        return len(found) == children and all(found) and [int(pid) for pid in found]

    pids = until(started, 60)
    try:
        assert pids
        assert all(is_there(pid) for pid in pids)
        process.send_signal(number)
        status = process.wait(10)
        assert until(lambda: not any(is_there(pid) for pid in pids), 3)
        told = process.stderr.read().splitlines()
    finally:
        process.kill()
        for pid in filter(is_there, pids or []):
            os.kill(pid, signal.SIGKILL)
    if number == signal.SIGKILL:
        assert status == -number
    else:
        assert status == 128 + number
        assert told[-1:] == [f"ended by {number.name}, with the processes beside it"]


def test_a_child_whose_parent_is_gone_already_ends_at_once():
    command = [sys.executable, "-m", "experiments.run.children", "1", "this"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
