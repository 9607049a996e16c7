"""trainer.compile: which runs compile their layers, and that one can."""

import pytest
import torch

from datamodules.records import UserError
from experiments.build import trainer
from experiments.config.experiment import load_config
from experiments.train import train
from tests.experiments.test_train import TINY, two_steps

LONG = f"trainer.max_steps={trainer.COMPILE_STEPS}"


@pytest.mark.parametrize(
    ("device", "overrides", "expected"),
    [
        ("cpu", [LONG], False),
        ("cpu", ["trainer.compile=yes"], True),
        ("cuda", [LONG], True),
        ("cuda", ["trainer.max_steps=100"], False),
        ("cuda", ["trainer.max_steps=100", "trainer.compile=yes"], True),
        ("cuda", [LONG, "trainer.compile=no"], False),
        ("cuda", [LONG, "trainer.strategy=fsdp", "trainer.devices=2"], False),
    ],
)
def test_long_runs_on_a_gpu_are_compiled(monkeypatch, device, overrides, expected):
    monkeypatch.setattr(trainer, "device_of", lambda config: torch.device(device))
    assert trainer.compiles(load_config("moe", overrides)) is expected


def test_sharded_layers_cannot_be_compiled():
    with pytest.raises(UserError, match="fsdp does not support trainer.compile=yes"):
        load_config("moe", ["trainer.compile=yes", "trainer.strategy=fsdp", "trainer.devices=2"])


@pytest.mark.slow
def test_compiled_run_logs_its_choice_and_the_number_of_compilations(tmp_path, caplog):
    caplog.set_level("INFO")
    torch._dynamo.reset()
    train("moe", [*two_steps(tmp_path, *TINY), "trainer.compile=yes", "evaluation.baselines=false"])
    assert "with compiled layers" in caplog.text
    assert "the layers were compiled" in caplog.text
    torch._dynamo.reset()


@pytest.mark.parametrize("key", ["trainer.compile", "objective.learn_temperature"])
def test_no_is_a_word_where_it_is_a_choice(key):
    """YAML reads it as a boolean."""
    config = load_config("moe", [f"{key}=no", "run.dir=runs/NAME"])
    section, name = key.split(".")
    assert getattr(getattr(config, section), name) == "no"
