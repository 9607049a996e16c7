"""fp32 or bf16: what auto takes, that a run keeps to it, and that it does not reach what is reported."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from datamodules.records import UserError
from experiments import doctor
from experiments.build.trainer import precision_of
from experiments.config.experiment import load_config
from experiments.evaluate import main as evaluate
from experiments.train import train
from lightning_modules.callbacks import training_log
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.retrieval import compute as precision
from tests.experiments.test_train import TINY

SETTINGS = [*TINY, "tasks=[search]", "trainer.precision=auto", "evaluation.every_n_steps=0"]


@pytest.fixture
def amx(monkeypatch):
    """Says whether the CPU has AMX, to whoever asks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return lambda there: monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: there)


def test_auto_is_bf16_on_cpus_with_amx_alone(amx, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for there, expected in ((True, "bf16"), (False, "fp32")):
        amx(there)
        assert precision_of(load_config("moe", ["trainer.precision=auto"])) == expected
        assert next(doctor.where()).found.endswith(f"training in {expected}")


def test_a_run_keeps_to_the_precision_that_it_began_with(tmp_path, amx, monkeypatch, caplog):
    caplog.set_level("INFO")
    original, computed = ContrastiveModule.training_step, []

    def noting(module, *given):
        computed.append(precision.current(torch.device("cpu")))
        return original(module, *given)

    monkeypatch.setattr(ContrastiveModule, "training_step", noting)
    amx(True)
    train("moe", [f"run.dir={tmp_path}", *SETTINGS, "trainer.max_steps=1"])
    assert "1 steps, in bf16\n" in caplog.text
    amx(False)
    train("moe", [f"run.dir={tmp_path}", *SETTINGS, "trainer.max_steps=2"])
    assert computed == ["bf16", "bf16"]
    assert "in bf16, as the run began" in caplog.text
    assert json.loads((tmp_path / "manifest.json").read_text())["precision"] == "bf16"


def scores(path):
    lines = [line.split() for line in path.read_text().splitlines()]
    return {(line[0], line[2]): float(line[4]) for line in lines}


def test_the_final_table_of_a_bf16_training_is_what_eval_measures(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    train("moe", [f"run.dir={run}", *SETTINGS, "trainer.precision=bf16", "trainer.max_steps=2"])
    final = json.loads((run / "results.json").read_text())["benchmarks"]["searches"]
    assert {of["precision"] for of in final["measured"].values()} == {"fp32"}
    for kind in ("fp32", "bf16"):
        chosen = [f"precision={kind}", "metrics=ndcg@10,recall@20", f"output={out / kind}"]
        evaluate([f"model={run}", *chosen])
        assert ("measured in bf16" in capsys.readouterr().out) == (kind == "bf16")
    measured = json.loads((out / "fp32" / "results.json").read_text())["benchmarks"]["searches"]
    assert measured["systems"]["encoder"] == final["systems"]["trained"]
    of_training = scores(run / "runs" / "searches.trained.trec")
    of_eval = [scores(out / kind / "runs" / "searches.encoder.trec") for kind in ("fp32", "bf16")]
    far = [max(abs(of[pair] - of_training[pair]) for pair in of.keys() & of_training.keys()) for of in of_eval]
    assert far[0] < 1e-6
    assert far[1] > 1e-5  # so bf16 would have been seen
    assert np.isfinite(far).all()


def test_ranks_that_would_compute_differently_end(monkeypatch):
    monkeypatch.setattr(training_log, "world_size", lambda: 2)
    trainer = SimpleNamespace(precision="32-true")
    monkeypatch.setattr(dist, "all_gather_object", lambda found, own: found.__setitem__(slice(None), [own, own]))
    training_log.RankReport().on_train_start(trainer, None)
    others = ["32-true", "bf16-mixed"]
    monkeypatch.setattr(dist, "all_gather_object", lambda found, own: found.__setitem__(slice(None), others))
    with pytest.raises(UserError, match=r"rank 0 32-true, rank 1 bf16-mixed\); set fp32 or bf16"):
        training_log.RankReport().on_train_start(trainer, None)


def test_the_doctor_measures_what_auto_does_not(amx, monkeypatch):
    amx(False)
    for speed, state in ((2.5, "note"), (0.6, "ok"), (1.1, "ok")):
        monkeypatch.setattr(precision, "bf16_speed", lambda speed=speed: speed)
        line = doctor.bf16()
        assert line.state == state
        assert f"{speed:.1f} times as fast as in fp32; trainer.precision=auto is fp32" in line.found
    monkeypatch.undo()
    assert 0.05 < precision.bf16_speed() < 50
