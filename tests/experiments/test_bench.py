"""The programs of `make bench`: each runs on a few tiny inputs, on the device that is asked for."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch

import experiments.bench
from datamodules.readers.beir import write_beir
from datamodules.records import Collection, Document, UserError
from datamodules.text import input_text
from experiments.__main__ import benches
from experiments.bench import grad_cache, sharding
from experiments.bench.peer_training import pairs_of
from experiments.bench.timing import backbone_of
from experiments.build.data import build_data
from experiments.build.module import build_module
from experiments.config.experiment import load_config
from experiments.reference import options_of
from lightning_modules.encoders.loading import load_encoder
from tests.experiments.test_train import TINY

ENCODER = ["layers=2", "hidden=64"]
SMALL = {
    "encoder_cost": [*ENCODER, "texts=2", "tokens=16", "instruction=6", "rounds=1"],
    "grad_cache": [*ENCODER, "pairs=8", "small=4", "tokens=16"],
    "mining": ["documents=2000", "queries=40", "clusters=200", "dimension=64", "k=200"],
    "evaluation": [*ENCODER, "queries=4", "documents=40", "sample=2"],
    "sharding": [*ENCODER, "pairs=2", "tokens=8", "rounds=1"],
    "tracking": ["rounds=1", "steps=4", "every=2"],
    "data_scale": ["documents=300", "pairs=200", "step=3", "batches=3"],
    "gpu": ["small=yes", "parts=gemm"],
    "peer_training": ["vanilla", *TINY, "trainer.max_steps=3"],
}


PRINTED = {"encoder_cost": "32 experts", "data_scale": "step 3: first batch, s"}


def programs() -> list[str]:
    names = [module.name for module in pkgutil.iter_modules(experiments.bench.__path__)]
    return [name for name in names if options_of(importlib.import_module(f"experiments.bench.{name}"))]


def test_every_program_has_a_small_run_and_is_named_in_the_makefile():
    assert set(programs()) == set(SMALL) == set(benches())
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    (line,) = (line for line in makefile.splitlines() if line.startswith("bench: ##"))
    assert set(line.partition("BENCH=")[2].split("|")) == set(SMALL)


def arguments_of(name: str, folder: Path) -> list[str]:
    extra = {
        "data_scale": [f"folder={folder}"],
        "gpu": [f"output={folder}"],
        "peer_training": [f"output={folder / 'st'}"],
    }
    return [*SMALL[name], *extra.get(name, [])]


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_small_run_on_the_cpu(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sharding, "STRATEGIES", ("ddp",))  # each one starts two processes
    monkeypatch.setattr(grad_cache, "in_new_process", lambda function, *rest: function(*rest))  # data_scale starts some
    if name == "peer_training":
        pytest.importorskip("sentence_transformers")
    importlib.import_module(f"experiments.bench.{name}").main([*arguments_of(name, tmp_path), "device=cpu"])
    assert PRINTED.get(name, "") in capsys.readouterr().out


@pytest.mark.parametrize("hidden", [100, 128, 200, 384])
def test_backbone_of_any_width_has_heads_that_divide_it(hidden):
    """hidden=200 was refused, because three heads of about 64 do not divide it."""
    backbone, _ = backbone_of({"layers": 1, "hidden": hidden})
    assert backbone.config.hidden_size == hidden


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", [name for name in SMALL if name != "sharding"])
def test_device_that_is_missing_raises_user_error(name, tmp_path):
    with pytest.raises(UserError, match="no GPUs"):
        importlib.import_module(f"experiments.bench.{name}").main([*arguments_of(name, tmp_path), "device=cuda"])


def test_the_peer_trains_on_the_pairs_of_the_batches():
    """Every pair is a judgement of the data, and each batch adds one row per query."""
    config = load_config("vanilla", [*TINY, "trainer.max_steps=6"])
    data = build_data(config, training=True)
    data.options = dataclasses.replace(data.options, carry_texts=True, num_workers=0)
    module = build_module(config, data)
    separator = module.encoder.tokenizer.sep_token
    pairs = pairs_of(config, data)
    assert {task: len(columns["anchor"]) for task, columns in pairs.items()} == dict.fromkeys(config.tasks, 2 * 8)
    for task in data.tasks:
        texts = [input_text(document, separator) for document in task.documents]
        judged = {(texts[e.query], texts[row]) for e in task.examples for row in e.positives}
        columns = pairs[task.task.name]
        assert set(zip(columns["anchor"], columns["positive"], strict=True)) <= judged
        assert ("negative" in columns) == all(example.hard_negatives for example in task.examples)


def test_the_peer_may_have_a_data_set_per_collection(tmp_path):
    for name, first in (("a", 0), ("b", 20)):
        corpus = {f"{name}{i}": Document(f"{name}{i}", f"paper {first + i}", "") for i in range(20)}
        queries = {f"q{i}": Document(f"q{i}", "", f"query {first + i}") for i in range(20)}
        write_beir(
            Collection(corpus, queries, {"train": {f"q{i}": {f"{name}{i}": 1} for i in range(20)}}), tmp_path / name
        )
    settings = ["tasks=[search]", f"task.search.data=[{tmp_path / 'a'}, {tmp_path / 'b'}]", "data.cache=null"]
    small = [setting for setting in TINY if "num_papers" not in setting]
    config = load_config("vanilla", [*small, *settings, "trainer.max_steps=5"])
    data = build_data(config, training=True)
    data.options = dataclasses.replace(data.options, carry_texts=True, num_workers=0)
    build_module(config, data)
    pairs = pairs_of(config, data, by_collection=True)
    assert {name: len(columns["anchor"]) for name, columns in pairs.items()} == {"search.a": 24, "search.b": 16}
    for name, columns in pairs.items():
        papers = {columns["positive"][i].removeprefix("paper ") for i in range(len(columns["positive"]))}
        assert papers <= set(map(str, range(20) if name == "search.a" else range(20, 40)))


@pytest.mark.slow
def test_the_trained_peer_is_a_model_like_any_other(tmp_path):
    pytest.importorskip("sentence_transformers")
    folders = []
    for steps in (1, 3):
        folders.append(tmp_path / f"steps{steps}")
        settings = ["vanilla", *TINY, f"trainer.max_steps={steps}", f"output={folders[-1]}", "device=cpu"]
        settings.append(f"batches={'task' if steps == 1 else 'collection'}")
        importlib.import_module("experiments.bench.peer_training").main(settings)
    vectors = [load_encoder(folder).encode(["one text"], "search") for folder in folders]
    assert torch.isfinite(vectors[1]).all()
    assert not torch.equal(*vectors)
