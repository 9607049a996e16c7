"""Runs with LoRA: resumed, loaded, continued, extended, and refused without peft."""

import sys

import pytest
import torch

from datamodules.records import UserError
from experiments.build.data import build_data
from experiments.build.module import build_encoder, build_module
from experiments.config.experiment import load_config
from experiments.dry_run import dry_run
from experiments.export import main as export
from experiments.train import train
from lightning_modules.callbacks.diagnostics import expert_distances
from lightning_modules.encoders.loading import load_encoder
from tests.experiments.test_train import TINY, check_same_state, rows
from tests.lightning_modules.encoders.test_lora import is_matrix

TEXTS = ["protein folding", "graphs of citations"]
QUICK = [*TINY, "data.schedule=together", "evaluation.every_n_steps=0", "evaluation.baselines=false"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    settings = ["trainer.max_steps=4", "checkpoint.every_n_steps=2", "diagnostics.every_n_steps=2"]
    train("lora", [*QUICK, f"run.dir={folder}", *settings])
    return folder


def trained(encoder):
    return [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]


@pytest.mark.slow
def test_resumed_run_ends_with_the_same_bits(run, tmp_path):
    settings = [*QUICK, f"run.dir={tmp_path}", "trainer.max_steps=4", "checkpoint.every_n_steps=2"]
    checkpoint = torch.load(run / "checkpoints" / "last.1.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    (tmp_path / "checkpoints").mkdir()
    torch.save(checkpoint, tmp_path / "checkpoints" / "last.ckpt")
    train("lora", settings)
    check_same_state(run, tmp_path)


@pytest.mark.slow
def test_diagnostics_compare_the_merged_weights_of_experts(run):
    logged = {key: value for row in rows(run) for key, value in row.items() if key.startswith("diag/experts/")}
    expected = {f"diag/experts/{name}": value for name, value in expert_distances(load_encoder(run)).items()}
    assert logged == pytest.approx(expected, abs=1e-5)
    assert len(logged) == 2 * 3


@pytest.mark.slow
def test_run_is_loaded_and_exported_with_merged_weights(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    encoder = load_encoder(run)
    assert not any(map(is_matrix, encoder.state_dict()))
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    matrices = {name: tensor for name, tensor in checkpoint.items() if is_matrix(name)}
    layer = "encoder.backbone.encoder.layer.0.attention.self.query"
    up, down = (matrices[f"{layer}.lora_{letter}.default.weight"].double() for letter in "BA")
    expected = checkpoint[f"{layer}.base_layer.weight"].double() + 16 / 8 * up @ down
    ours = encoder.state_dict()["backbone.encoder.layer.0.attention.self.query.weight"]
    torch.testing.assert_close(ours.double(), expected, atol=1e-7, rtol=0)
    assert float(up.abs().max()) > 0
    export([f"model={run}", "task=search", f"output={tmp_path / 'plain'}"])
    plain = load_encoder(tmp_path / "plain")
    torch.testing.assert_close(plain.encode(TEXTS, "search"), encoder.encode(TEXTS, "search"), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_new_stages_start_from_the_merged_weights(run):
    """init_from and extend.model merge the matrices of the run, and then add new ones if asked to."""
    merged = load_encoder(run)
    for rank in (0, 4):
        config = load_config("lora", [*QUICK, f"init_from={run}", f"backbone.lora.rank={rank}"])
        encoder = build_encoder(config, [])
        assert all(map(is_matrix, trained(encoder))) == (rank > 0)
        for task in merged.tasks:
            assert torch.equal(encoder.encode(TEXTS, task), merged.encode(TEXTS, task))
        extended = [*QUICK, f"extend.model={run}", f"backbone.lora.rank={rank}", "tasks=[search]"]
        extended = [text for text in extended if not text.startswith(("task.cl", "task.li"))]
        config = load_config("lora", [*extended, "task.search.expert=new", "extend.like=link_prediction"])
        config.task["reviews"] = config.task.pop("search")
        config.tasks = ["reviews"]
        encoder = build_module(config, build_data(config, training=True)).encoder
        assert trained(encoder)
        assert all(".experts.new." in name and is_matrix(name) == (rank > 0) for name in trained(encoder))
        for task, like in {**dict.fromkeys(merged.tasks), "reviews": "link_prediction"}.items():
            assert torch.equal(encoder.encode(TEXTS, task), merged.encode(TEXTS, like or task))


@pytest.mark.slow
def test_dry_run_counts_the_trained_parameters(caplog):
    """Each of four layers has 4 * 2 * 8 * 32 numbers in matrices, and every second one has them three times."""
    caplog.set_level("INFO")
    dry_run("lora", [*QUICK, "backbone.config.num_hidden_layers=4"])
    assert f"{2 * (1 + 3) * 4 * 2 * 8 * 32:,} of " in caplog.text


def test_settings_of_lora_are_checked_before_the_data_are_read(monkeypatch):
    for value, message in (("rank=-1", "at least 0"), ("alpha=0", "above 0"), ("dropout=1", "below 1")):
        with pytest.raises(UserError, match=f"backbone.lora.{value.partition('=')[0]}: expected a number.* {message}"):
            load_config("lora", [f"backbone.lora.{value}"])
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"backbone\.lora: the package peft is not installed \(pip install peft\)"):
        load_config("lora", [])
    assert load_config("lora", ["backbone.lora.rank=0"]).backbone.lora.rank == 0
