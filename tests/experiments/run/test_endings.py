"""The end of a training: exit status of a preempted run, and suggestions of a complete one."""

import os
import shlex
import signal

import pytest

from experiments.build.trainer import warn_about_cores
from experiments.config.experiment import folder_of, load_config
from experiments.run.endings import exit_status, next_steps
from lightning_modules.distributed.signals import Preempted


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """Return a function that installs a stub of scontrol with an exit status, and returns the file with its calls."""
    for key in [key for key in os.environ if key.startswith("SLURM_")]:
        monkeypatch.delenv(key)
    calls = tmp_path / "scontrol.txt"

    def install(status=0):
        program = tmp_path / "scontrol"
        program.write_text(
            f'#!/bin/sh\necho "$@" >> {calls}\n[ {status} = 0 ] || echo "not allowed" >&2\nexit {status}\n'
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return calls

    return install


def set_job(monkeypatch, **variables):
    for key, value in ({"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"} | variables).items():
        monkeypatch.setenv(key, value)


def test_sigusr1_requeues_the_job(tmp_path, monkeypatch, scontrol):
    calls = scontrol()
    set_job(monkeypatch)
    assert exit_status(Preempted(signal.SIGUSR1), tmp_path) == 0
    set_job(monkeypatch, SLURM_ARRAY_JOB_ID="10", SLURM_ARRAY_TASK_ID="3")
    assert exit_status(Preempted(signal.SIGUSR1), tmp_path) == 0
    assert calls.read_text() == "requeue 12\nrequeue 10_3\n"


def test_only_the_first_rank_requeues(tmp_path, monkeypatch, scontrol):
    calls = scontrol()
    set_job(monkeypatch, SLURM_PROCID="1")
    assert exit_status(Preempted(signal.SIGUSR1), tmp_path) == 0
    assert not calls.exists()


def test_a_failing_or_missing_scontrol_ends_with_status_75(tmp_path, monkeypatch, scontrol, caplog):
    scontrol(status=1)
    set_job(monkeypatch)
    assert exit_status(Preempted(signal.SIGUSR1), tmp_path) == 75
    assert "job 12: scontrol cannot requeue it from here (not allowed); exiting with status 75" in caplog.text
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert exit_status(Preempted(signal.SIGUSR1), tmp_path) == 75


def test_a_cancelled_job_is_not_requeued(tmp_path, monkeypatch, scontrol):
    calls = scontrol()
    set_job(monkeypatch)
    assert exit_status(Preempted(signal.SIGTERM), tmp_path) == 143
    assert not calls.exists()


def test_exit_status_without_slurm_depends_on_the_signal(tmp_path, scontrol, capsys):
    calls = scontrol()
    assert exit_status(Preempted(signal.SIGTERM), tmp_path) == 75
    assert exit_status(Preempted(signal.SIGUSR1), tmp_path) == 75
    assert exit_status(Preempted(signal.SIGINT), tmp_path) == 130
    assert capsys.readouterr().err == "interrupted: the same command starts from the beginning\n"
    assert not calls.exists()


def suggestion(*overrides, experiment="moe"):
    config = load_config(experiment, overrides)
    return next_steps(config, overrides, folder_of(config))


def test_another_encoder_is_suggested_with_the_settings_of_the_command(tmp_path):
    settings = ["scale=small", "tasks=[search]", "data.root=/my data", "task.search.batch_size=4"]
    line = suggestion(*settings, f"run.dir={tmp_path}", "run.seed=3")
    words = shlex.split(line.partition("encoder: ")[2])
    assert words == ["make", "train", "EXP=vanilla", "SCALE=small", *settings[1:], "run.seed=3"]
    assert load_config("vanilla", [word for word in words if "." in word]).run.seed == 3
    assert suggestion(experiment="vanilla").endswith("encoder: make train EXP=moe")


@pytest.mark.parametrize("setting", ["encoder.layers=all", "extend.model=/x", "init_from=/x"])
def test_no_encoder_is_suggested_if_the_settings_are_specific_to_this_one(setting):
    assert suggestion(setting).startswith("Next: make report RUN=runs/moe-sample-seed0-")
    assert "make train" not in suggestion(setting)


def test_more_processes_than_cores_cause_a_warning(monkeypatch, caplog):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1}, raising=False)
    config = load_config("moe", ["trainer.devices=8", "trainer.accelerator=cpu"])
    warn_about_cores(config)
    assert "trainer.devices=8: without GPUs, that many processes share 2 cores" in caplog.text
    caplog.clear()
    config.trainer.devices = 2
    warn_about_cores(config)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    config.trainer.devices, config.trainer.accelerator = 8, "auto"
    warn_about_cores(config)
    assert not caplog.records
