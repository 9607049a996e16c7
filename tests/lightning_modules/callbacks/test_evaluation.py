"""Evaluation during training."""

import dataclasses

import pytest

from datamodules.tasks import SearchDataModule
from lightning_modules.callbacks.evaluation import Evaluation
from lightning_modules.contrastive import ContrastiveModule
from tests.lightning_modules.quiet_trainer import quiet_trainer


def test_benchmarks_with_metrics_of_their_own_get_those_of_the_evaluation(make_encoder, make_task, tmp_path):
    """The mean of the first metric raised KeyError at the first evaluation."""
    data = make_task(SearchDataModule)
    (benchmark,) = data.benchmarks("test")
    benchmarks = [benchmark, dataclasses.replace(benchmark, name="other", metrics=("map@3",))]
    evaluation = Evaluation(benchmarks, ["ndcg@5"], 1, None, tmp_path / "best.ckpt")
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[evaluation])
    trainer.fit(ContrastiveModule(make_encoder("shared"), total_steps=1), data)
    values = {name: float(trainer.callback_metrics[name]) for name in evaluation.names}
    assert set(values) == {"val/toy/ndcg@5", "val/other/ndcg@5", "val/mean/ndcg@5"}
    assert values["val/toy/ndcg@5"] == values["val/other/ndcg@5"] == pytest.approx(values["val/mean/ndcg@5"])
