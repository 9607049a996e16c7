"""trainer.strategy=fsdp trains as ddp does, and either goes on with the other's checkpoints, or one process's."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from experiments.train import train
from lightning_modules.callbacks.checkpoint import SafeCheckpointIO
from lightning_modules.checkpoint_files import write_checkpoint
from tests.experiments.test_train import ROOT, TINY, command, rows

STEPS = 8
SETTINGS = [
    "tasks=[classification,search]",
    f"trainer.max_steps={STEPS}",
    "trainer.precision=fp32",
    "trainer.log_every_n_steps=1",
    "data.schedule=proportional",
    "data.token_budget=256",
    "backbone.dropout=0",  # differs by rank
    "optim.eps=1e-4",
    f"evaluation.every_n_steps={STEPS}",
    "evaluation.baselines=false",
    "checkpoint.every_n_steps=2",
    f"diagnostics.every_n_steps={STEPS}",
    "trainer.grad_cache=true",
]
ON_TWO = [*SETTINGS, "trainer.devices=2"]
ON_ONE = [*TINY, *SETTINGS, "data.batch_size=16"]


def last(folder):
    return folder / "checkpoints" / "last.ckpt"


def killed(folder):
    """A run of two ranks under fsdp that is killed, all ranks at once, after its first checkpoint."""
    run = subprocess.Popen(
        command(folder, *ON_TWO, "trainer.strategy=fsdp"),
        **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": ROOT, "start_new_session": True},
    )
    deadline = time.monotonic() + 120
    while not last(folder).is_file():
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert torch.load(last(folder), weights_only=True)["global_step"] < STEPS


def ended(folder, monkeypatch):
    """A run of one process that ends in an error after its second checkpoint."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        write_checkpoint(checkpoint, path)
        if checkpoint["global_step"] == 4:
            raise RuntimeError("ends here")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="ends here"):
        patch.setattr(SafeCheckpointIO, "save_checkpoint", save_checkpoint)
        train("moe", [f"run.dir={folder}", *ON_ONE])


def weights(folder):
    checkpoint = torch.load(last(folder), weights_only=True)
    assert checkpoint["global_step"] == STEPS
    return checkpoint["state_dict"]


def check_near(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.slow
def test_sharded_runs_are_those_of_ddp_and_go_on_as_any(tmp_path, free_port, monkeypatch):
    killed(tmp_path / "killed")
    ended(tmp_path / "one", monkeypatch)
    script = [sys.executable, "-m", "tests.experiments.sharded_runs"]
    ranks = [
        subprocess.Popen([*script, str(rank), str(free_port), str(tmp_path), *TINY, *ON_TWO], cwd=ROOT)
        for rank in range(2)
    ]
    try:
        for process in ranks:
            assert process.wait(timeout=180) == 0
    finally:
        for process in ranks:
            process.kill()
    shutil.copytree(tmp_path / "killed", tmp_path / "killed_then_one")
    train("moe", [f"run.dir={tmp_path / 'killed_then_one'}", *ON_ONE])

    whole = weights(tmp_path / "fsdp")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(tmp_path / "killed_then_fsdp").items())
    for other in ("ddp", "killed_then_ddp", "killed_then_one", "one_then_fsdp"):
        check_near(weights(tmp_path / other), whole)
    same = [[row for row in rows(tmp_path / name)] for name in ("ddp", "fsdp")]
    assert len(same[0]) == len(same[1]) > STEPS
    for ours, theirs in zip(*same, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            if "seconds" not in key and "second" not in key:
                assert ours[key] == theirs[key] or math.isclose(ours[key], theirs[key], rel_tol=1e-3, abs_tol=1e-4), key
