"""The processes of a command give the result of one process, fail together, and never outlive the command."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from datamodules.readers.beir import write_beir
from datamodules.records import Collection, Document, UserError
from experiments.evaluate import main
from experiments.run import processes
from experiments.run.processes import connection_explained, run_on_ranks, share_of
from lightning_modules.distributed import launch
from tests.conftest import text_of
from tests.experiments.test_train import ROOT
from tests.forked import Forked, run

ZOMBIE = "Z"  # state in /proc of a process that has ended, but whose parent has not waited for it
COMMAND = """
import os, sys, time
import torch.distributed as dist
from datamodules.records import UserError
from experiments.run.processes import end_with_launcher, launch_processes, run_on_ranks
from experiments.shared.console import entry_point

def note(rank):
    with open(f"pid-{rank}.part", "w") as file:
        file.write(str(os.getpid()))
    os.rename(f"pid-{rank}.part", f"pid-{rank}")

def work(what):
    rank = dist.get_rank()
    note(rank)
    dist.barrier()
    if what == "nap":
        time.sleep(60)
    if what == "all" or (what in ("one", "killed", "crash") and rank == 1):
        if what == "killed":
            os.kill(os.getpid(), 9)
        if what == "crash":
            raise KeyError("crash")
        raise UserError(f"{what} of us cannot continue")
    dist.barrier()

def main(arguments):
    if arguments[0] == "independent":
        if "LOCAL_RANK" not in os.environ:
            return launch_processes("command", arguments, 2)
        end_with_launcher()
        note(os.environ["LOCAL_RANK"])
        time.sleep(60)
    run_on_ranks(lambda: work(arguments[0]), "command", arguments, 2)

if __name__ == "__main__":
    entry_point(main)
"""


def start(folder, what):
    """Start a command with two processes, wait until they run, and return the command and their ids."""
    (folder / "command.py").write_text(COMMAND)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    process = Forked([sys.executable, "-m", "command", what], cwd=folder, env=environment)
    paths = [folder / f"pid-{rank}" for rank in range(2)]
    assert wait_until(lambda: all(path.exists() for path in paths) or process.poll() is not None, 90)
    return process, [int(path.read_text()) for path in paths]


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != ZOMBIE
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not (result := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return result


def results_of(folder):
    """Return the results of an evaluation without its cost, and the content of its run files."""
    benchmarks = json.loads((folder / "results.json").read_text())["benchmarks"]
    for key in ("seconds", "cost"):
        del benchmarks["toy"]["measured"]["encoder"][key]
    return benchmarks, {path.name: path.read_bytes() for path in folder.glob("runs/*")}


@pytest.mark.slow
def test_two_ranks_write_the_bytes_of_one_process(make_encoder, tmp_path):
    """Many documents are equal, and there are enough of them for both ranks to encode some.

    The command runs in a SLURM step with one task, whose variables must not be mistaken for those of its ranks.
    """
    make_encoder("attention").save_pretrained(tmp_path / "model")
    corpus = {f"d{i}": Document(f"d{i}", "", text_of(i % 700, i % 37)) for i in range(1500)}
    queries = {f"q{i}": Document(f"q{i}", "", text_of(i, i + 7)) for i in range(25)}
    qrels = {"test": {query: {f"d{i * 3}": 1, f"d{i * 3 + 1}": 2} for i, query in enumerate(queries)}}
    write_beir(Collection(corpus, queries, qrels), tmp_path / "toy")
    options = [f"model={tmp_path / 'model'}", f"beir={tmp_path / 'toy'}", "task=search", "metrics=ndcg@10,recall@100"]
    command = [sys.executable, "-m", "experiments.evaluate", *options, f"output={tmp_path / 'two'}", "devices=2"]
    step = {f"SLURM_{key}": value for key, value in {"STEP_ID": "0", "PROCID": "0", "STEP_NUM_TASKS": "1"}.items()}
    done = run(command, env=os.environ | step)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(str(tmp_path / "two")) == 1  # only the first rank logs
    assert done.stderr == ""
    main([*options, f"output={tmp_path / 'one'}"])
    expected = results_of(tmp_path / "one")
    assert len(expected[1]) == 3
    assert results_of(tmp_path / "two") == expected


@pytest.mark.parametrize(
    ("level", "flags"), [(logging.INFO, []), (logging.WARNING, ["-q"]), (logging.DEBUG, ["-v"])], ids=["", "-q", "-v"]
)
def test_ranks_show_the_messages_that_their_command_shows(monkeypatch, level, flags):
    calls = []
    for name in (processes.LAUNCHER, "OMP_NUM_THREADS"):  # restored at the end
        monkeypatch.setenv(name, "1")
    launcher = "torch.distributed.launcher.api.elastic_launch"
    monkeypatch.setattr(launcher, lambda *_: lambda *arguments: calls.append(list(arguments)))
    monkeypatch.setattr(logging.getLogger(), "level", level)
    processes.launch_processes("experiments.mine", ["moe", "devices=2"], 2)
    assert calls == [["-m", "experiments.mine", "moe", "devices=2", *flags]]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("what", "errors"),
    [
        ("one", ["error: one of us cannot continue"]),
        ("all", ["error: all of us cannot continue"]),
        ("killed", ["error: process 2 of 2 ended with SIGKILL; the same command continues where this one ended"]),
        ("crash", ["error: process 2 of 2 ended with status 1; the same command continues where this one ended"]),
    ],
)
def test_an_error_of_one_rank_ends_all_and_is_printed_once(tmp_path, what, errors):
    process, pids = start(tmp_path, what)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert [line for line in stderr.splitlines() if line.startswith("error:")] == errors
    assert ("KeyError: 'crash'" in stderr) == (what == "crash")
    assert not any(map(is_running, pids))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("what", "number", "status", "message"),
    [
        ("nap", signal.SIGKILL, -signal.SIGKILL, ""),
        ("nap", signal.SIGTERM, 128 + signal.SIGTERM, "ended by SIGTERM\n"),
        ("nap", signal.SIGHUP, -signal.SIGHUP, ""),
        ("nap", signal.SIGINT, 130, "interrupted\n"),
        ("independent", signal.SIGKILL, -signal.SIGKILL, ""),
    ],
)
def test_no_process_outlives_a_command_that_is_ended(tmp_path, what, number, status, message):
    process, pids = start(tmp_path, what)
    try:
        assert all(map(is_running, pids))
        process.send_signal(number)
        assert process.wait(40) == status  # processes have 30 seconds to end by themselves
        assert wait_until(lambda: not any(map(is_running, pids)), 3)
        assert process.communicate()[1] == message
    finally:
        process.kill()
        for pid in filter(is_running, pids):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_process_ends_if_its_launcher_has_already_ended():
    code = "from experiments.run.processes import end_with_launcher; end_with_launcher(); print('still here')"
    environment = os.environ | {"SCIMULT_LAUNCHER": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"")


@pytest.mark.slow
def test_without_prctl_a_process_watches_its_launcher(tmp_path):
    child = (
        "import ctypes, os, time; from experiments.run.processes import end_with_launcher; ctypes.CDLL = None; "
        f"end_with_launcher(); open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    )
    parent = (
        "import os, subprocess, sys; os.environ['SCIMULT_LAUNCHER'] = str(os.getpid()); "
        f"subprocess.run([sys.executable, '-c', {child!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT)
    assert wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), 60)
    process.kill()
    process.wait()
    pid = int((tmp_path / "pid").read_text())
    assert wait_until(lambda: not is_running(pid), 5)


def test_devices_must_match_the_processes_of_a_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert launch.num_ranks() == 1
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert launch.num_ranks() == 4
    monkeypatch.setenv("WORLD_SIZE", "2")  # launched by one of our commands inside a job
    assert launch.num_ranks() == 2
    with pytest.raises(UserError, match="devices: got 3, but the launcher started 2 processes"):
        run_on_ranks(print, "x", [], 3)
    monkeypatch.setenv("WORLD_SIZE", "abc")
    with pytest.raises(UserError, match="WORLD_SIZE is 'abc', expected a whole number"):
        run_on_ranks(print, "x", [], 2)
    with pytest.raises(UserError, match="RANK is 'x'"):
        share_of("", {"RANK": "x", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("part", "environment", "expected"),
    [
        ("", {}, (0, 1, 0)),
        ("3/8", {}, (2, 8, 0)),
        ("", {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (5, 8, 1)),
        ("", {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}, (3, 4, 1)),
        ("", {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, (0, 1, 0)),
        ("2/2", {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1"}, (4, 6, 1)),
    ],
)
def test_a_share_is_a_part_divided_among_the_ranks_of_a_launcher(part, environment, expected):
    share = share_of(part, environment)
    assert (share.index, share.count, share.local_rank) == expected


def test_invalid_parts_raise_user_errors():
    with pytest.raises(UserError, match="part: expected I/N with I from 1 to N, such as 3/8, got '9/8'"):
        share_of("9/8", {})
    array = {f"SLURM_ARRAY_TASK_{k}": v for k, v in {"ID": "4", "MIN": "0", "MAX": "8", "COUNT": "3"}.items()}
    with pytest.raises(UserError, match="without gaps, got 3 tasks from 0 to 8"):
        share_of("", array)
    for wrong in (array | {"SLURM_ARRAY_TASK_ID": "x"}, {"SLURM_ARRAY_TASK_COUNT": "3"}):
        with pytest.raises(UserError, match="environment: SLURM_ARRAY_TASK_ID is '.?', expected a whole number"):
            share_of("", wrong)


def test_ranks_that_cannot_connect_raise_user_error(free_port):
    with socket.socket() as other:
        other.bind(("0.0.0.0", free_port))
        other.listen()
        with pytest.raises(UserError, match="the ranks cannot connect .*in use.*MASTER_PORT"), connection_explained():
            dist.TCPStore("127.0.0.1", free_port, 2, True)
