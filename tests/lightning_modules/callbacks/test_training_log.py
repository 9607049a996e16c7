"""The figures of the training log equal those of numpy and of a clock that only the test moves."""

import dataclasses
import json
import threading
import time

import numpy as np
import pytest
import torch

from datamodules.batches import MultiTaskBatches
from lightning_modules import throughput
from lightning_modules.callbacks.checkpoint import LastCheckpoint
from lightning_modules.callbacks.diagnostics import Diagnostics
from lightning_modules.callbacks.training_log import TrainingBar, TrainingLog
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.loggers import JsonlLogger, RunLogger
from lightning_modules.optim import OptimOptions
from lightning_modules.throughput import Speed, ThroughputMeter, training_flops
from tests.lightning_modules.quiet_trainer import after_batch, quiet_trainer

LOADING, STEP, EVALUATION = 3.0, 2.0, 100.0  # seconds
CEILING = 1e-3  # TFLOP/s


class Rows(RunLogger):
    name, version = "rows", ""

    def __init__(self):
        super().__init__()
        self.rows = {}

    def log_metrics(self, metrics, step=None):
        self.rows[step] = metrics

    def log_hyperparams(self, *_, **__): ...


class Clock:
    """Time that passes only while a batch is prepared or trained on. batches: those that were prepared."""

    def __init__(self, monkeypatch):
        self.now, self.batches = 50.0, []
        main, real = threading.main_thread(), time.perf_counter
        prepare, step = MultiTaskBatches.__getitem__, ContrastiveModule.training_step

        def slow_batch(*arguments):
            self.now += LOADING
            self.batches.append(prepare(*arguments))
            return self.batches[-1]

        def slow_step(*arguments):
            self.now += STEP
            return step(*arguments)

        monkeypatch.setattr(time, "perf_counter", lambda: self.now if threading.current_thread() is main else real())
        monkeypatch.setattr(MultiTaskBatches, "__getitem__", slow_batch)
        monkeypatch.setattr(ContrastiveModule, "training_step", slow_step)

    def evaluate(self, *_):
        self.now += EVALUATION


@pytest.fixture
def train(tmp_path, three_tasks, make_encoder, monkeypatch):
    def run(every, optim=None, **options):
        clock, rows = Clock(monkeypatch), Rows()
        callbacks = [TrainingLog(every, plain=True, peak_tflops=CEILING), after_batch(clock.evaluate)]
        steps = 12 // options.get("accumulate_grad_batches", 1)
        module = ContrastiveModule(make_encoder("attention"), optim=optim)
        trainer = quiet_trainer(tmp_path, max_steps=steps, callbacks=callbacks, logger=rows, **options)
        trainer.fit(module, three_tasks)
        return rows.rows, clock.batches, module.encoder

    return run


def test_learning_rates_of_parts_are_logged(train):
    """The rate rises in 6 of 12 steps, and then falls to 0 in the other 6. A part has its factor of it."""
    options = OptimOptions(lr=0.6, warmup=0.5, lr_scale={"embeddings": 0.0, "search": 2.0})
    logged, *_ = train(3, optim=options)
    for step, rate in {3: 0.4, 6: 0.6, 9: 0.3, 12: 0.0}.items():  # of the next step
        assert logged[step]["train/lr"] == pytest.approx(rate)
        assert logged[step]["train/lr/search"] == pytest.approx(2 * rate)
        assert logged[step]["train/lr/embeddings"] == 0


def test_speeds_equal_those_of_numpy_and_leave_out_evaluations(train, caplog):
    with caplog.at_level("INFO"):
        rows, prepared, encoder = train(every=4)
    assert list(rows) == [4, 8, 12]
    for last, row in rows.items():
        batches = prepared[last - 4 : last]
        texts = [(batch.task, np.diff(chunk.offsets.numpy())) for batch in batches for chunk in batch.chunks]
        tokens, flops = sum(x.sum() for _, x in texts), sum(training_flops(encoder, x, task) for task, x in texts)
        pairs = sum((batch.positives.numpy() >= 0).sum() for batch in batches)
        seconds = 4 * (LOADING + STEP)
        assert row["train/tokens_per_second"] == pytest.approx(tokens / seconds)
        assert row["train/pairs_per_second"] == pytest.approx(pairs / seconds)
        assert row["train/padding_share"] == 0
        assert row["train/data_seconds"] == pytest.approx(4 * LOADING)
        assert row["train/data_share"] == pytest.approx(LOADING / (LOADING + STEP))
        assert row["train/mfu"] == pytest.approx(flops / seconds / (CEILING * 1e12))
        assert 50 < row["train/memory_mb"] < 100_000
    assert f"{rows[12]['train/tokens_per_second']:,.0f} tokens/s" in caplog.text
    assert f"MFU {rows[12]['train/mfu']:.0%}  padding 0%  waiting 60%" in caplog.text


def test_accumulated_batches_all_count(train):
    rows, batches, _ = train(every=3, accumulate_grad_batches=2)
    assert list(rows) == [3, 6]
    tokens = sum(batch.num_tokens for batch in batches[:6])
    assert rows[3]["train/tokens_per_second"] == pytest.approx(tokens / 6 / (LOADING + STEP))
    assert rows[6]["train/data_seconds"] == pytest.approx(6 * LOADING)


def test_ranks_add_up_and_the_slowest_one_counts(make_encoder, three_tasks, monkeypatch):
    """One rank has batches of one task only, so the ranks have different numbers of tokens."""
    encoder, meters, rows = make_encoder("attention"), [], []
    batches = [three_tasks.train_dataloader().batches[step] for step in range(6)]
    for ceiling, own, seconds, waited in ((3e9, batches[:5], 2.0, 0.5), (1e9, batches[5:], 1.5, 1.0)):
        meters.append(ThroughputMeter(encoder, ceiling, padded=True))
        for batch in own:
            meters[-1].add(batch, seconds, waited)
    monkeypatch.setattr(throughput, "gather_rows", lambda row: rows.append(row) or torch.cat(rows))
    alone = [meters[0].read(), meters[1].read()]
    both, tokens = alone[1], sum(batch.num_tokens for batch in batches)
    assert both.tokens_per_second == pytest.approx(tokens / 10)
    assert both.pairs_per_second == pytest.approx(sum(len(batch.queries) for batch in batches) / 10)
    positions = sum(len(chunk) * max(chunk.lengths) for batch in batches for chunk in batch.chunks)
    assert both.padding_share == pytest.approx(1 - tokens / positions)
    assert (both.data_seconds, both.data_share) == (2.5, 0.25)
    lengths = [(batch.task, chunk.lengths) for batch in batches for chunk in batch.chunks]
    flops = sum(training_flops(encoder, x, task) for task, x in lengths)
    assert both.mfu == pytest.approx(flops / 10 / 4e9)
    assert both.tokens_per_second > alone[0].tokens_per_second


def test_the_bar_counts_all_steps_also_after_a_resume(tmp_path, three_tasks, make_encoder):
    """It counted absolute steps against the remaining ones: 12/7."""
    shown = []
    for steps in (5, 12):

        def record(trainer, module, steps=steps):
            task = trainer.progress_bar_callback.progress.tasks[0]
            shown.append((task.completed, task.total))
            trainer.should_stop = trainer.global_step >= steps

        callbacks = [TrainingBar(), after_batch(record)]
        trainer = quiet_trainer(tmp_path, max_steps=12, max_epochs=-1, callbacks=callbacks, enable_progress_bar=True)
        module = ContrastiveModule(make_encoder())
        checkpoint = tmp_path / "last.ckpt"
        trainer.fit(module, three_tasks, ckpt_path=checkpoint if checkpoint.exists() else None, weights_only=True)
        trainer.save_checkpoint(checkpoint)
    assert shown == [(i, 12) for i in range(1, 13)]


class Killed(BaseException): ...


def curve(path):
    """Return the rows of metrics.jsonl without times, speeds and memory."""
    measured = {"time", "diag/seconds", "mine/seconds", *(f"train/{field.name}" for field in dataclasses.fields(Speed))}
    rows = map(json.loads, path.read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in measured} for row in rows]


def test_the_curve_of_a_killed_run_equals_that_of_an_undisturbed_one(tmp_path, three_tasks, make_encoder):
    """The first row after a resume covered only the steps since the checkpoint, and diagnostics only their tasks."""

    def attempt(name, kill_at=0):
        def kill(trainer, _):
            if trainer.global_step == kill_at:
                raise Killed

        path, last = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.ckpt"
        callbacks = [TrainingLog(5, plain=False, peak_tflops=CEILING), Diagnostics(4), after_batch(kill)]
        callbacks.append(LastCheckpoint(last, every_n_steps=3))
        torch.manual_seed(0)
        trainer = quiet_trainer(tmp_path, max_steps=12, callbacks=callbacks, logger=JsonlLogger(path))
        module = ContrastiveModule(make_encoder("attention"))
        trainer.fit(module, three_tasks, ckpt_path=last if last.exists() else None, weights_only=True)
        return curve(path)

    undisturbed = attempt("whole")
    assert [row["step"] for row in undisturbed] == [4, 5, 8, 10, 12, 12]
    for step in range(1, 12):
        with pytest.raises(Killed):
            attempt(f"killed{step}", kill_at=step)
        assert attempt(f"killed{step}") == undisturbed
