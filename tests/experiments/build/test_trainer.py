"""The trainer: its device and the number of ranks."""

import os
import platform

import pytest
import torch
from lightning.fabric import accelerators as fabric
from lightning.pytorch.accelerators import CPUAccelerator, MPSAccelerator

from datamodules.records import UserError
from experiments.build.data import batch_options
from experiments.build.trainer import build_trainer, check_ranks
from experiments.config.experiment import load_config
from tests.lightning_modules.distributed.test_signals import LAUNCH

SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("environment", "overrides", "message"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, [], "needs 1 rank, but the environment is that of rank 1 of 2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, [], "needs 1 rank, but the environment is that of rank 0 of 2"),
        ({"LOCAL_RANK": "1"}, [], "needs 1 rank, but the environment is that of rank 1"),
        ({"NODE_RANK": "1"}, ["trainer.devices=2"], "needs 2 ranks, but the environment is that of rank 2"),
        (SRUN | {"SLURM_NTASKS": "2"}, [], "needs 1 rank, but the environment is that of rank 0 of 2"),
        ({"MASTER_PORT": "abc"}, [], "environment: MASTER_PORT is 'abc', expected a whole number"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, ["trainer.devices=2"], ""),
        ({"NODE_RANK": "1", "LOCAL_RANK": "1"}, ["trainer.devices=2", "trainer.num_nodes=2"], ""),
        (SRUN | {"SLURM_NTASKS": "1"}, ["trainer.devices=2"], ""),  # a shell, where Lightning starts the ranks
        ({"WORLD_SIZE": "2"}, [], ""),
    ],
)
def test_ranks_must_be_as_many_as_the_configuration_needs(environment, overrides, message, monkeypatch):
    """With variables left over from a launcher, a training was a rank above 0: it ended well, but wrote no run."""
    for key in [*LAUNCH, *(key for key in os.environ if key.startswith("SLURM_"))]:
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    config = load_config("vanilla", overrides)
    if not message:
        check_ranks(config)
        return
    with pytest.raises(UserError, match=message):
        check_ranks(config)


@pytest.fixture
def mac(monkeypatch):
    """A machine on which Lightning finds Apple's GPU. Lightning keeps its first answer, whatever test asked."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    fabric.MPSAccelerator.is_available.cache_clear()
    yield
    fabric.MPSAccelerator.is_available.cache_clear()


def test_the_gpu_of_a_mac_is_not_used(mac, make_encoder, tmp_path):
    """Lightning would choose it, but everything else is on the CPU there, and diagnostics need float64."""
    assert MPSAccelerator.is_available()
    trainer = build_trainer(load_config("moe", ["scale=sample"]), make_encoder(), [], [], tmp_path, "fp32")
    assert isinstance(trainer.accelerator, CPUAccelerator)


@pytest.mark.parametrize(("settings", "cpu", "cuda"), [([], 2048, 32768), (["data.token_budget=4096"], 4096, 4096)])
def test_chunks_suit_the_device_unless_their_size_is_set(settings, cpu, cuda, monkeypatch):
    """Chunks of the size that suits a CPU left a GPU idle most of the time."""
    for scale in ("sample", "small", "paper"):
        config = load_config("moe", [f"scale={scale}", *settings])
        for device, tokens in (("cpu", cpu), ("cuda", cuda)):
            monkeypatch.setattr("experiments.build.data.device_of", lambda _, device=device: torch.device(device))
            assert batch_options(config).token_budget == tokens
