"""Runs with all options of the objective, from configuration to checkpoint."""

import json
import sys
from pathlib import Path

import pytest
import torch

from datamodules.records import UserError
from experiments.config.experiment import load_config
from experiments.dry_run import dry_run
from experiments.evaluate import main as evaluate
from experiments.export import main as export
from experiments.results.results import read_results
from experiments.train import train
from lightning_modules.encoders.loading import load_encoder
from lightning_modules.retrieval.vector_cache import VectorCache
from tests.experiments.test_train import TINY
from tests.forked import run_ranks

QUICK = [
    *TINY,
    "trainer.accelerator=cpu",
    "evaluation.every_n_steps=0",
    "evaluation.baselines=false",
    "trainer.log_every_n_steps=3",
]
EVERYTHING = [
    "data.num_positives=3",
    "task.search.num_positives=1",
    "objective.positives=log_mean",
    "objective.symmetric=true",
    "objective.temperature={classification: 0.05, link_prediction: 0.1, search: 0.2}",
    "objective.learn_temperature=per_task",
    "objective.temperature_lr=0.1",
    "objective.matryoshka=[8, 16]",
    "objective.task_weights.search=2",
    "objective.guide.kind=relative",
    "objective.teacher.candidates=own",
    "objective.score_memory=1",
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A small run whose encoder can be a guide or teacher."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    train("vanilla", [f"run.dir={folder}", "trainer.max_steps=3", *QUICK])
    return folder


def logged(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "train/lr" in row]


def test_all_options_together(plain, tmp_path):
    frozen = [f"objective.guide.model={plain}", f"objective.teacher.model={plain}"]
    train("moe", [f"run.dir={tmp_path}", "trainer.max_steps=6", *QUICK, *EVERYTHING, *frozen])
    first, last = logged(tmp_path)
    for task, start in (("classification", 0.05), ("link_prediction", 0.1), ("search", 0.2)):
        assert first[f"train/{task}/temperature"] == pytest.approx(start)  # logged before the first update
        assert 1e-4 < abs(last[f"train/{task}/temperature"] - start) < 0.5 * start
        assert last[f"train/{task}/distillation"] > 0
        assert last[f"train/{task}/contrastive"] > 0
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    other_keys = {key for key in checkpoint["state_dict"] if not key.startswith("encoder.")}
    tasks = ("classification", "link_prediction", "search")
    assert other_keys == {f"objective.temperature.log.{task}" for task in tasks}
    (group,) = [g for g in checkpoint["optimizer_states"][0]["param_groups"] if g["initial_lr"] == 0.1]
    assert (len(group["params"]), group["weight_decay"]) == (3, 0.0)
    assert load_encoder(tmp_path).encode(["some words"], "search").shape == (1, 32)
    export([f"model={tmp_path}", "task=search"])
    card = (tmp_path / "export" / "search" / "README.md").read_text()
    assert "The first 8, 16 dimensions of a vector can be used alone" in card


@pytest.mark.slow
def test_vector_teacher_from_configuration_to_evaluation(plain, tmp_path):
    """An asymmetric student's tables use the teacher's documents, as make eval document_model= does."""
    folder, cache = tmp_path / "run", tmp_path / "cache"
    options = [f"objective.vector_teacher.model={plain}", "objective.vector_teacher.asymmetric=true"]
    options += ["objective.similarity=cosine", "objective.temperature=0.1", f"data.cache={cache}"]
    dry_run("vanilla", [*QUICK, *options, "trainer.max_steps=3"])
    train("vanilla", [f"run.dir={folder}", "trainer.max_steps=3", *QUICK, *options, "evaluation.every_n_steps=3"])
    assert logged(folder)[-1]["train/search/vector_distance"] > 0
    assert list(cache.glob("teacher-vectors/*/*.npy"))
    table = read_results(folder / "results.json").benchmarks["searches"].systems["trained"]
    fingerprint = VectorCache(load_encoder(plain)).fingerprint
    assert table.document_fingerprint == fingerprint
    command = [f"model={folder}", "metrics=ndcg@10,recall@20", "task=search"]
    evaluate([*command, f"document_model={plain}", f"output={tmp_path / 'with'}"])
    evaluate([*command, f"output={tmp_path / 'without'}"])
    again, without = (
        read_results(tmp_path / name / "results.json").benchmarks["searches"].systems["encoder"]
        for name in ("with", "without")
    )
    assert again.document_fingerprint == fingerprint
    assert again.metrics == pytest.approx(table.metrics, abs=1e-9)
    assert without.document_fingerprint is None
    with pytest.raises(UserError, match="document_model: none there, .*run now"):
        evaluate([*command, f"document_model={plain}", f"output={tmp_path / 'without'}"])


def test_start_is_the_encoder_before_training(plain, tmp_path, caplog):
    from experiments.build.data import build_data
    from experiments.build.module import build_module

    weight = "objective.vector_teacher.weight={classification: 1, link_prediction: 0, search: 2}"
    options = [f"init_from={plain}", "objective.vector_teacher.model=start", weight]
    config = load_config("vanilla", [f"run.dir={tmp_path}", *QUICK, *options])
    module = build_module(config, build_data(config))
    teacher, encoder = module.objective.vector_teacher.encoder, load_encoder(plain)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), encoder.parameters(), strict=True))
    assert [module.objective.options.vector_teacher.weight_of(task) for task in config.tasks] == [1, 0, 2]
    assert "random" not in caplog.text
    config = load_config("vanilla", [f"run.dir={tmp_path}", *QUICK, *options[1:]])
    assert build_module(config, build_data(config)).objective.vector_teacher is None
    assert "model=start has no effect: the weights before training are random" in caplog.text


def test_each_task_samples_its_number_of_positives(tmp_path):
    from experiments.build.data import build_data
    from experiments.build.module import build_module

    config = load_config("moe", [f"run.dir={tmp_path}", *QUICK, *EVERYTHING])
    data = build_data(config)
    build_module(config, data)
    widths = {batch.task: batch.positives.shape[1] for _, batch in zip(range(3), data.train_dataloader(), strict=False)}
    assert widths["search"] == 1
    assert 1 < widths["link_prediction"] <= 3


def test_frozen_models_must_know_the_tasks(plain, tmp_path, make_encoder):
    other = make_encoder("shared", tasks={"cite": "cite"}).save_pretrained(tmp_path / "other")
    for name in ("guide", "teacher"):
        with pytest.raises(UserError, match=rf"objective\.{name}\.model: has no task .*search .its tasks are cite"):
            train("moe", [f"run.dir={tmp_path / 'run'}", *QUICK, f"objective.{name}.model={other}"])
        with pytest.raises(UserError, match=rf"objective\.{name}\.model: '/no/where'"):
            train("moe", [f"run.dir={tmp_path / 'run'}", *QUICK, f"objective.{name}.model=/no/where"])
    with pytest.raises(UserError, match="objective.matryoshka: expected numbers below 32, the vector size, got 32"):
        train("moe", [f"run.dir={tmp_path / 'run'}", *QUICK, "objective.matryoshka=[32]"])


@pytest.mark.slow
def test_two_ranks_train_with_all_options(plain, tmp_path):
    """The temperature of each task is unused in the steps of the others, whatever the encoder."""
    frozen = [f"objective.guide.model={plain}", f"objective.teacher.model={plain}"]
    overrides = ["trainer.max_steps=3", "trainer.devices=2", *QUICK, *EVERYTHING, *frozen]
    command = [sys.executable, "-m", "experiments.train", "vanilla", f"run.dir={tmp_path}", *overrides]
    run_ranks(command, check=True)
    assert Path(tmp_path / "results.json").is_file()
