"""Signals are noted and not lost, and a process finds its rank in the environment."""

import os
import signal
import subprocess
import sys
import time

import pytest

from lightning_modules.distributed import launch, signals

LAUNCH = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID")


@pytest.fixture(autouse=True)
def restored_handlers(monkeypatch):
    for name in [*LAUNCH, *(key for key in os.environ if key.startswith("SLURM_"))]:
        monkeypatch.delenv(name, raising=False)
    handlers = {number: signal.getsignal(number) for number in signals.ASKING}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background processes without it
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)
    signals._noted, signals._owner = None, 0


def send(number):
    os.kill(os.getpid(), number)


def test_signals_are_noted_and_the_strongest_counts():
    signals.catch()
    assert signals.noted() is None
    signals.leave_if_asked()
    send(signal.SIGTERM)
    assert signals.noted() == signal.SIGTERM
    send(signal.SIGUSR1)
    send(signal.SIGTERM)
    assert signals.noted() == signal.SIGUSR1
    with pytest.raises(signals.Preempted, match="SIGUSR1"):
        signals.leave_if_asked()


def test_second_interrupt_ends_at_once():
    signals.catch()
    with pytest.raises(KeyboardInterrupt):  # outside training there is nothing to save
        send(signal.SIGINT)
    signals.catch_interrupt()
    send(signal.SIGINT)
    assert signals.noted() == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


@pytest.mark.parametrize("is_connected", [True, False])
@pytest.mark.parametrize("is_early", [True, False])
def test_a_signal_ends_a_process_that_waits_for_other_ranks(monkeypatch, is_connected, is_early):
    """Neither Ctrl-C nor SIGTERM ended a training whose second node never started."""
    statuses = []
    monkeypatch.setattr(signals, "PATIENCE", 0.2)
    monkeypatch.setattr(signals.os, "_exit", statuses.append)
    signals.catch()
    steps = [send, lambda _: signals.connecting()]
    for step in steps if is_early else reversed(steps):
        step(signal.SIGTERM)
    if is_connected:
        signals.connected()
    time.sleep(0.5)
    assert statuses == ([] if is_connected else [signals.PREEMPTED])


def test_a_rank_ends_if_the_first_one_ends_before_they_are_connected(monkeypatch):
    """It waited for half an hour, and ignored SIGTERM."""
    statuses = []
    monkeypatch.setattr(signals.os, "_exit", lambda status: (statuses.append(status), signals.connected()))
    signals.catch()
    signals.connecting(launcher="1")
    time.sleep(1.5)
    assert statuses == [1]


def test_without_catch_no_handler_changes():
    before = [signal.getsignal(number) for number in signals.ASKING]
    signals.catch_interrupt()
    signals.ignore()
    assert before == [signal.getsignal(number) for number in signals.ASKING]


def test_forked_process_ignores_signals():
    signals.catch()
    pid = os.fork()
    if pid == 0:
        send(signal.SIGUSR1)
        os._exit(3 if signals.noted() else 0)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.slow
def test_late_signals_do_not_change_the_exit_status():
    code = "from lightning_modules.distributed import signals; import os, signal; signals.catch(); signals.ignore(); "
    code += "[os.kill(os.getpid(), n) for n in signals.ASKING]; print('done')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "done\n"


@pytest.mark.slow
def test_signals_module_imports_nothing_heavy():
    code = "import sys, lightning_modules.distributed.signals; print(*(m in sys.modules for m in ('torch', 'numpy')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("environment", "rank", "alone"),
    [
        ({}, 0, True),
        ({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "x"}, 5, False),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "4"}, 1, False),  # started by Lightning
        ({"NODE_RANK": "1"}, 2, False),  # started by hand: the first process of the second node
        ({"NODE_RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, 3, False),
        (SRUN, 3, False),
        (SRUN | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, 0, True),
        (SRUN | {"SLURM_PROCID": "0", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 1, False),  # in a shell under srun --pty
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, 0, True),  # an sbatch script without srun
    ],
)
def test_rank_from_the_environment(monkeypatch, environment, rank, alone):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert launch.rank(devices=2) == rank
    assert launch.alone() == alone


def test_slurm_job_id(monkeypatch):
    assert launch.slurm_job() is None
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert launch.slurm_job() == "12"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "10")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert launch.slurm_job() == "10_3"
