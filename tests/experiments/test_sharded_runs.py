"""trainer.strategy=fsdp gives the results of ddp. Either resumes from checkpoints of the other and of one process."""

import dataclasses
import math
import shutil
import sys
import time

import pytest
import torch

from experiments.train import train
from lightning_modules.callbacks.checkpoint import SafeCheckpointIO
from lightning_modules.throughput import Speed
from tests.experiments.test_train import TINY, command, rows
from tests.forked import Forked, run_all, start_ranks

STEPS = 8
SETTINGS = [
    "tasks=[classification,search]",
    f"trainer.max_steps={STEPS}",
    "trainer.precision=fp32",
    "trainer.grad_cache=true",
    "trainer.log_every_n_steps=1",
    "data.schedule=proportional",
    "data.token_budget=256",
    "backbone.dropout=0",  # dropout differs by rank
    "optim.eps=1e-4",
    "checkpoint.every_n_steps=2",
    f"evaluation.every_n_steps={STEPS}",
    "evaluation.baselines=false",
    f"diagnostics.every_n_steps={STEPS}",
    "wandb.mode=disabled",
]
MEASURED = {"time", *(f"train/{field.name}" for field in dataclasses.fields(Speed))}  # times, speeds and memory
ON_TWO = [*SETTINGS, "trainer.devices=2"]
ON_ONE = [*TINY, *SETTINGS, "data.batch_size=16"]


def last(folder):
    return folder / "checkpoints" / "last.ckpt"


def kill_a_sharded_run(folder):
    """Start a run on two ranks, and kill both with SIGKILL as soon as there is a checkpoint."""
    ranks = start_ranks(command(folder, *ON_TWO, "trainer.strategy=fsdp"))
    deadline = time.monotonic() + 120
    while not last(folder).is_file():
        assert ranks[0].poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for rank in ranks:
        rank.kill()
    assert 2 <= torch.load(last(folder), weights_only=True)["global_step"] < STEPS


def interrupt_a_run_of_one_process(folder, monkeypatch):
    """Start a run in this process, and raise after its second checkpoint."""
    original = SafeCheckpointIO.save_checkpoint

    def save_checkpoint(self, checkpoint, *arguments, **options):
        original(self, checkpoint, *arguments, **options)
        if checkpoint["global_step"] == 4:
            raise RuntimeError("interrupted")

    monkeypatch.setattr(SafeCheckpointIO, "save_checkpoint", save_checkpoint)
    with pytest.raises(RuntimeError, match="interrupted"):
        train("moe", [f"run.dir={folder}", *ON_ONE])
    monkeypatch.undo()


def run_on_two_ranks(folder, port):
    script = [sys.executable, "-m", "tests.experiments.sharded_runs"]
    run_all([Forked([*script, rank, port, folder, *TINY, *ON_TWO]) for rank in (0, 1)], check=True)


def weights(folder):
    checkpoint = torch.load(last(folder), weights_only=True)
    assert checkpoint["global_step"] == STEPS
    return checkpoint["state_dict"]


def check_near(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def check_same_metrics(ours, theirs):
    """Compare losses, dev metrics and diagnostics, but not times."""
    assert len(ours) == len(theirs) > STEPS
    for row, other in zip(ours, theirs, strict=True):
        assert row.keys() == other.keys()
        for key in (key for key in row.keys() - MEASURED if "seconds" not in key):
            assert row[key] == other[key] or math.isclose(row[key], other[key], rel_tol=1e-4, abs_tol=1e-5), key


@pytest.mark.slow
def test_sharded_runs_equal_those_of_ddp_and_can_be_resumed_by_any_strategy(tmp_path, free_port, monkeypatch):
    kill_a_sharded_run(tmp_path / "killed")
    interrupt_a_run_of_one_process(tmp_path / "one", monkeypatch)
    run_on_two_ranks(tmp_path, free_port)
    shutil.copytree(tmp_path / "killed", tmp_path / "killed_then_one")
    train("moe", [f"run.dir={tmp_path / 'killed_then_one'}", *ON_ONE])

    whole = weights(tmp_path / "fsdp")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(tmp_path / "killed_then_fsdp").items())
    for other in ("ddp", "killed_then_ddp", "killed_then_one", "one_then_fsdp"):
        check_near(weights(tmp_path / other), whole)
    check_same_metrics(rows(tmp_path / "fsdp"), rows(tmp_path / "ddp"))
