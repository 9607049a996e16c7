"""Sweeps led by W&B: registered there, and run by agents in one process or on the ranks of a SLURM job."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import wandb
import yaml

from datamodules.records import UserError
from experiments import agent
from experiments.config.experiment import folder_of, load_config
from experiments.run.agent_trials import publish_trial
from experiments.sweep import main as sweep
from tests.experiments.test_train import ROOT, TINY
from tests.experiments.wandb_server import wandb_server


@pytest.fixture
def server(monkeypatch):
    with wandb_server() as stub:
        for name in ("MODE", "ENTITY", "PROJECT"):
            monkeypatch.setenv(f"WANDB_{name}", "")
            monkeypatch.delenv(f"WANDB_{name}")  # so that variables set by W&B meanwhile are removed too
        monkeypatch.setenv("WANDB_BASE_URL", stub.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        wandb.teardown()
        yield stub
        wandb.teardown()


def test_a_sweep_is_registered_with_its_experiment_and_settings(server, caplog, tmp_path):
    caplog.set_level("INFO")
    early, path = {"type": "hyperband", "min_iter": 1}, tmp_path / "mine.yaml"
    content = yaml.safe_load((ROOT / "experiments" / "sweeps" / "lr_temperature.yaml").read_text())
    path.write_text(yaml.safe_dump(content | {"early_terminate": early}))
    sweep(["moe", f"sweep={path}", "scale=sample", "wandb.mode=online", "run_cap=5"])
    registered = yaml.safe_load(server.sweeps["s1"])
    shared = ["EXP=moe", "SCALE=sample", "wandb.mode=online"]
    assert registered["command"] == ["make", "train", *shared, "${args_no_hyphens}"]
    assert registered["parameters"]["objective.temperature"]["values"] == [0.02, 0.05, 0.1]
    assert registered["run_cap"] == 5
    assert registered["early_terminate"] == early
    assert "make agent SWEEP_ID=me/p/s1" in caplog.text


def test_an_agent_without_login_explains_how_to_log_in(server, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("machine elsewhere login user password " + "0" * 40 + "\n")
    wandb.teardown()
    started = []
    monkeypatch.setattr(agent, "run_agent", lambda *arguments: started.append(arguments) or 0)
    with pytest.raises(UserError, match=f"{server.url}, where you are not logged in; run .venv/bin/wandb login"):
        agent.main(["sweep_id=a/b/c"])
    assert started == []
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password " + "0" * 40 + "\n")
    with pytest.raises(SystemExit):
        agent.main(["sweep_id=a/b/c"])
    assert started == [("a/b/c", None)]


def test_the_folder_of_a_wandb_trial_has_its_id(monkeypatch):
    config = load_config("moe")
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    assert folder_of(config) == Path("runs/sweep-s1/r1")


def test_only_the_first_rank_publishes_its_trial(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("SCIMULT_TRIALS", str(tmp_path))
    publish_trial("moe", ["a=1"], tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("RANK", "0")
    publish_trial("moe", ["a=1"], tmp_path / "run")
    assert json.loads((tmp_path / "0.json").read_text()) == ["moe", "a=1", f"run.dir={tmp_path / 'run'}"]


def test_each_agent_of_a_job_has_its_own_folder_of_trials(monkeypatch):
    """The ranks of a job's second agent trained the trials of the first one."""
    folders = []
    monkeypatch.setattr(agent, "published_trials", lambda folder: folders.append(folder) or [])
    for step in ("0", "1"):
        job = {"JOB_ID": "7", "STEP_ID": step, "PROCID": "1", "STEP_NUM_TASKS": "2"}
        for key, value in job.items():
            monkeypatch.setenv(f"SLURM_{key}", value)
        assert agent.run_agent("a/b/c", None) == 0
    assert [folder.name for folder in folders] == ["7-0-0", "7-0-1"]


@pytest.mark.slow
def test_the_ranks_of_a_job_train_the_trial_of_the_first_rank(server, tmp_path, free_port):
    """Two ranks start as srun would start them. W&B's server has one trial for both."""
    run = tmp_path / "run"
    quick = ["trainer.max_steps=2", "evaluation.every_n_steps=0", "evaluation.baselines=false", "tasks=[search]"]
    training = [*TINY[2:], *quick, "trainer.devices=2", f"run.dir={run}", "wandb.mode=online"]
    command = [sys.executable, "-m", "experiments.train", "moe", *training, "${args_no_hyphens}"]
    server.sweeps["s1"] = yaml.safe_dump({"method": "random", "parameters": {}, "command": command})
    parameters = {"optim.lr": {"value": 0.0125}, "wandb.entity": {"value": None}, "encoder.layers": {"value": [0, 1]}}
    server.commands = [{"type": "run", "run_id": "trial001", "args": parameters, "program": None}]
    job = {
        "SLURM_JOB_ID": f"{os.getpid()}",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NAME": "trial",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port),
    }
    agent = [sys.executable, "-m", "experiments.agent", "sweep_id=me/p/s1", "count=1"]
    ranks = []
    for rank in range(2):
        environment = os.environ | job | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        out = open(tmp_path / f"{rank}.log", "w")  # noqa: SIM115
        ranks.append(
            subprocess.Popen(agent, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, process_group=0)
        )
    try:
        statuses = [process.wait(300) for process in ranks]
    finally:
        for process in ranks:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    logs = "".join((tmp_path / f"{rank}.log").read_text() for rank in range(2))
    assert statuses == [0, 0], logs
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["optim"]["lr"], config["wandb"]["entity"], config["encoder"]["layers"]) == (0.0125, None, [0, 1])
    assert json.loads((run / "results.json").read_text())["steps"] == 2
    assert list(server.runs) == ["trial001"]  # both ranks log to the run of the trial
    assert server.runs["trial001"]["sweep"] == "s1"
    assert server.exits["trial001"] == 0
