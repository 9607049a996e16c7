"""The suggestions at the end of a training, and its warning about too few cores."""

import shlex

import pytest

from experiments.build.trainer import warn_about_cores
from experiments.config.experiment import load_config
from experiments.config.paths import folder_of
from experiments.run.endings import next_steps


def suggestion(*overrides, experiment="moe"):
    config = load_config(experiment, overrides)
    return next_steps(config, overrides, folder_of(config))


def test_another_encoder_is_suggested_with_the_settings_of_the_command(tmp_path):
    settings = ["scale=small", "tasks=[search]", "data.root=/my data", "task.search.batch_size=4"]
    line = suggestion(*settings, f"run.dir={tmp_path}", "run.seed=3")
    words = shlex.split(line.partition("encoder: ")[2])
    assert words == ["make", "train", "EXP=vanilla", "SCALE=small", *settings[1:], "run.seed=3"]
    assert load_config("vanilla", [word for word in words if "." in word]).run.seed == 3
    assert suggestion(experiment="vanilla").endswith("encoder: make train EXP=moe")


@pytest.mark.parametrize("setting", ["encoder.layers=all", "extend.model=/x", "init_from=/x"])
def test_no_encoder_is_suggested_if_the_settings_are_specific_to_this_one(setting):
    assert suggestion(setting).startswith("Next: make report RUN=runs/moe-sample-seed0-")
    assert "make train" not in suggestion(setting)


def test_more_processes_than_cores_cause_a_warning(monkeypatch, caplog):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1}, raising=False)
    config = load_config("moe", ["trainer.devices=8", "trainer.accelerator=cpu"])
    warn_about_cores(config)
    assert "trainer.devices=8: without GPUs, that many processes share 2 cores" in caplog.text
    caplog.clear()
    config.trainer.devices = 2
    warn_about_cores(config)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    config.trainer.devices, config.trainer.accelerator = 8, "auto"
    warn_about_cores(config)
    assert not caplog.records
