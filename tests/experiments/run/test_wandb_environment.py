"""Environment variables of W&B: a mistake is found before anything runs."""

import os

import pytest
import wandb

from datamodules.records import UserError
from experiments.agent import check_login
from experiments.config.experiment import load_config
from experiments.run.wandb_logger import build_loggers
from experiments.sweep import main as sweep
from experiments.sync import check_server


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    wandb.teardown()  # it reads the environment once
    yield
    wandb.teardown()


COMMANDS = {
    "train": lambda folder: build_loggers(load_config("moe"), folder),
    "sweep": lambda folder: sweep(["moe", "sweep=lr", "wandb.mode=online"]),
    "sync": lambda folder: check_server(),
    "agent": lambda folder: check_login(),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("variable", "value"), [("WANDB_MODE", "ONLINE"), ("WANDB_MODE", ""), ("WANDB_BASE_URL", "api.wandb.ai")]
)
def test_a_wrong_variable_is_named_before_anything_runs(name, variable, value, monkeypatch, tmp_path):
    """Training logged offline, and lost W&B's log after the first step. The others ended with a traceback."""
    monkeypatch.setenv(variable, value)
    key = variable.removeprefix("WANDB_").lower()
    with pytest.raises(UserError, match=f"environment: .*({variable}|{key}): .*{value!r}.*change or unset it"):
        COMMANDS[name](tmp_path)
