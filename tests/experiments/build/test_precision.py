"""fp32 or bf16: auto chooses, resumed runs keep the choice, and final results are always computed in fp32."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datamodules.records import UserError
from experiments import doctor
from experiments.build import trainer
from experiments.build.trainer import precision_of
from experiments.config.experiment import load_config
from experiments.evaluate import main as evaluate
from experiments.train import train
from lightning_modules.callbacks import training_log
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.retrieval import compute
from tests.experiments.test_train import TINY

SETTINGS = [*TINY, "tasks=[search]", "trainer.precision=auto", "evaluation.every_n_steps=0"]


@pytest.fixture
def amx(monkeypatch):
    """Return a function that pretends that the CPU has AMX or not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return lambda has_amx: monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)


def test_auto_is_bf16_only_on_cpus_with_amx(amx, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for has_amx, expected in ((True, "bf16"), (False, "fp32")):
        amx(has_amx)
        assert precision_of(load_config("moe", ["trainer.precision=auto"])) == expected
        assert next(doctor.devices()).finding.endswith(f"training in {expected}")


@pytest.mark.slow
def test_resumed_run_keeps_its_precision(tmp_path, amx, monkeypatch, caplog):
    caplog.set_level("INFO")
    original, computed = ContrastiveModule.training_step, []

    def record(module, *arguments):
        computed.append(compute.active_precision(torch.device("cpu")))
        return original(module, *arguments)

    monkeypatch.setattr(ContrastiveModule, "training_step", record)
    amx(True)
    train("moe", [f"run.dir={tmp_path}", *SETTINGS, "trainer.max_steps=1"])
    assert "1 steps, in bf16\n" in caplog.text
    amx(False)
    train("moe", [f"run.dir={tmp_path}", *SETTINGS, "trainer.max_steps=2"])
    assert computed == ["bf16", "bf16"]
    assert "in bf16, as the run began" in caplog.text
    assert json.loads((tmp_path / "manifest.json").read_text())["precision"] == "bf16"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_training_computes_in_the_precision_asked_for(tmp_path, monkeypatch, precision):
    original, computed = ContrastiveModule.training_step, set()

    def record(module, *arguments):
        computed.add((torch.get_float32_matmul_precision(), compute.active_precision(torch.device("cpu"))))
        return original(module, *arguments)

    monkeypatch.setattr(ContrastiveModule, "training_step", record)
    monkeypatch.setattr(trainer, "resolve_precision", lambda name, device: name)  # as if the CPU had TF32
    train("moe", [f"run.dir={tmp_path}", *SETTINGS, f"trainer.precision={precision}", "trainer.max_steps=1"])
    assert computed == {("high" if precision == "tf32" else "highest", precision)}
    assert json.loads((tmp_path / "manifest.json").read_text())["precision"] == precision
    final = json.loads((tmp_path / "results.json").read_text())["benchmarks"]["searches"]
    assert {system["precision"] for system in final["measured"].values()} == {"fp32"}
    assert torch.get_float32_matmul_precision() == "highest"


def scores(path):
    lines = [line.split() for line in path.read_text().splitlines()]
    return {(line[0], line[2]): float(line[4]) for line in lines}


@pytest.mark.slow
def test_final_table_of_bf16_training_equals_evaluation_in_fp32(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    train("moe", [f"run.dir={run}", *SETTINGS, "trainer.precision=bf16", "trainer.max_steps=2"])
    final = json.loads((run / "results.json").read_text())["benchmarks"]["searches"]
    assert {system["precision"] for system in final["measured"].values()} == {"fp32"}
    for kind in ("fp32", "bf16", "fp16"):
        evaluate([f"model={run}", f"precision={kind}", "metrics=ndcg@10,recall@20", f"output={out / kind}"])
        assert (f"measured in {kind}" in capsys.readouterr().out) == (kind != "fp32")
    measured = json.loads((out / "fp32" / "results.json").read_text())["benchmarks"]["searches"]
    assert measured["systems"]["encoder"] == final["systems"]["trained"]
    expected = scores(run / "runs" / "searches.trained.trec")
    evaluated = [scores(out / kind / "runs" / "searches.encoder.trec") for kind in ("fp32", "bf16", "fp16")]
    errors = [max(abs(run[pair] - expected[pair]) for pair in run.keys() & expected.keys()) for run in evaluated]
    assert errors[0] < 1e-6
    assert errors[1] > errors[2] > 1e-5  # scores in bf16 differ, and those in fp16 less
    assert np.isfinite(errors).all()


def test_ranks_with_different_precision_raise_user_error(monkeypatch):
    fake = SimpleNamespace(precision="32-true")
    monkeypatch.setattr(training_log, "gather_objects", lambda own: [own, own])
    training_log.RankReport().on_train_start(fake, None)
    monkeypatch.setattr(training_log, "gather_objects", lambda own: [own, "bf16-mixed"])
    with pytest.raises(UserError, match=r"rank 0 32-true, rank 1 bf16-mixed; set fp32 or bf16"):
        training_log.RankReport().on_train_start(fake, None)


def test_doctor_measures_the_speed_of_bf16(amx, monkeypatch):
    amx(False)
    for speed, state in ((2.5, "note"), (0.6, "ok"), (1.1, "ok")):
        monkeypatch.setattr(compute, "bf16_speed", lambda speed=speed: speed)
        line = doctor.bf16()
        assert line.state == state
        assert f"{speed:.1f} times as fast as in fp32; trainer.precision=auto is fp32" in line.finding
    monkeypatch.undo()
    assert 0.05 < compute.bf16_speed() < 50
