"""The best checkpoint is the best of those that could be saved."""

import copy
import errno
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from datamodules.records import UserError
from datamodules.tasks import ClassificationDataModule
from lightning_modules.callbacks import checkpoint, evaluation
from lightning_modules.callbacks.checkpoint import LastCheckpoint, SafeCheckpointIO
from lightning_modules.callbacks.evaluation import Evaluation
from lightning_modules.checkpoint_files import newest_intact
from lightning_modules.contrastive import CheckpointMismatch, ContrastiveModule
from lightning_modules.encoders.loading import load_encoder
from tests.lightning_modules.quiet_trainer import after_batch, quiet_trainer


def scripted_result(step):
    return SimpleNamespace(metrics={"ndcg@10": {1: 0.9, 2: 0.5, 3: 0.4}[step]})


class Scripted(Evaluation):
    """An evaluation with fixed results for each step."""

    def on_train_batch_end(self, trainer, module, *_):
        self.step = trainer.global_step
        super().on_train_batch_end(trainer, module)


@pytest.fixture
def fitted(make_encoder, make_task, tmp_path, monkeypatch):
    """Train three steps with an evaluation after each, on a disk that is full at some of them."""

    def fit(*full_at, patience=0):
        write = checkpoint.write_checkpoint

        def write_if_there_is_room(content, path, keep):
            if content["global_step"] in full_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            write(content, path, keep)

        data = make_task(ClassificationDataModule, "classification", num_batches=3)
        callback = Scripted(data.benchmarks("dev"), ["ndcg@10"], 1, 1000, tmp_path / "best.ckpt", patience)
        monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: scripted_result(callback.step))
        monkeypatch.setattr(checkpoint, "write_checkpoint", write_if_there_is_room)
        plugins = [SafeCheckpointIO(tmp_path / "last.ckpt", 1)]
        trainer = quiet_trainer(tmp_path, max_steps=3, callbacks=[callback], plugins=plugins)
        trainer.fit(ContrastiveModule(make_encoder("shared"), total_steps=3), data)
        return callback

    return fit


@pytest.mark.parametrize(("full_at", "best_step", "best"), [((), 1, 0.9), ((1,), 2, 0.5), ((1, 2), 3, 0.4)])
def test_checkpoint_that_could_not_be_saved_is_not_the_best(fitted, tmp_path, full_at, best_step, best, caplog):
    callback = fitted(*full_at)
    ending = "the best checkpoint (step 1, mean 0.9000) could not be written; best.ckpt is from step"
    assert (f"{ending} {best_step}" in caplog.text) == (best_step != 1)
    assert (callback.best_step, callback.best) == (best_step, best)
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert saved["global_step"] == best_step
    (state,) = (state for name, state in saved["callbacks"].items() if name == "Scripted")
    assert (state["best_step"], state["best"]) == (best_step, best)  # for a run that resumes from it


@pytest.mark.parametrize(("full_at", "patience", "last_step"), [((), 1, 2), ((), 2, 3), ((1,), 1, 2), ((1, 2), 1, 2)])
def test_training_stops_after_evaluations_without_a_new_best(fitted, full_at, patience, last_step):
    """A new best mean whose checkpoint could not be saved is an improvement, too. Later ones are compared with it."""
    callback = fitted(*full_at, patience=patience)
    assert callback.step == last_step


def diverge(trainer, module):
    """Make a weight NaN after step 3."""
    if trainer.global_step == 3:
        with torch.no_grad():
            next(module.parameters()).view(-1)[0] = float("nan")


@pytest.fixture
def trained(make_encoder, make_task, tmp_path):
    """Train six steps with a checkpoint after every second one."""

    def fit(*callbacks, encoder=None, resume=None):
        data = make_task(ClassificationDataModule, "classification", num_batches=6)
        plugins = [SafeCheckpointIO(tmp_path / "last.ckpt", 2)]
        callbacks = [*callbacks, LastCheckpoint(tmp_path / "last.ckpt", 2)]
        trainer = quiet_trainer(tmp_path, max_steps=6, callbacks=callbacks, plugins=plugins)
        module = ContrastiveModule(encoder or make_encoder("shared"), total_steps=6)
        trainer.fit(module, data, ckpt_path=resume)

    return fit


def remember(weights):
    """Return a callback that stores the weights after each step."""

    def store(trainer, module):
        weights[trainer.global_step] = copy.deepcopy(module.state_dict())

    return after_batch(store)


def test_resumed_average_equals_an_undisturbed_one(trained, make_encoder, tmp_path):
    """A checkpoint has the average as its weights, equal to a few lines of torch, and training resumes from both."""
    dropout = {"hidden_dropout_prob": 0.3}
    weights = {}
    trained(EMAWeightAveraging(decay=0.75), remember(weights), encoder=make_encoder("shared", config=dropout))
    whole = torch.load(tmp_path / "last.ckpt", weights_only=True)
    average = weights[1]
    for step in range(2, 7):
        average = {name: 0.75 * average[name] + 0.25 * tensor for name, tensor in weights[step].items()}
    for name, tensor in average.items():
        torch.testing.assert_close(whole["state_dict"][name], tensor, atol=1e-6, rtol=1e-5)
        assert torch.equal(whole["current_model_state"][name], weights[6][name])
    encoder = load_encoder(tmp_path / "last.ckpt").state_dict()
    assert all(torch.equal(whole["state_dict"][f"encoder.{name}"], tensor) for name, tensor in encoder.items())

    (tmp_path / "last.1.ckpt").rename(tmp_path / "middle.ckpt")
    assert torch.load(tmp_path / "middle.ckpt", weights_only=True)["global_step"] == 4
    (tmp_path / "last.ckpt").unlink()
    other = make_encoder("shared", 1, config=dropout)  # its weights are replaced
    trained(EMAWeightAveraging(decay=0.75), encoder=other, resume=tmp_path / "middle.ckpt")
    resumed = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for key in ("state_dict", "current_model_state", "averaging_state"):
        assert whole[key].keys() == resumed[key].keys()
        assert all(torch.equal(tensor, resumed[key][name]) for name, tensor in whole[key].items())


def test_the_average_is_evaluated_and_the_training_is_the_same_as_without_it(
    make_encoder, make_task, tmp_path, monkeypatch
):
    def fit(*averages):
        evaluated, weights = {}, {}

        def evaluate(encoder, *_, **__):
            evaluated[callback.step] = copy.deepcopy(encoder.state_dict())
            return SimpleNamespace(metrics={"ndcg@10": callback.step})

        data = make_task(ClassificationDataModule, "classification", num_batches=3)
        callback = Scripted(data.benchmarks("dev"), ["ndcg@10"], 1, 1000, tmp_path / "best.ckpt")
        monkeypatch.setattr(evaluation, "evaluate", evaluate)
        trainer = quiet_trainer(tmp_path, max_steps=3, callbacks=[*averages, callback, remember(weights)])
        trainer.fit(ContrastiveModule(make_encoder("shared"), total_steps=3), data)
        return evaluated, weights

    evaluated, trained = fit(EMAWeightAveraging(decay=0.5))
    best = load_encoder(tmp_path / "best.ckpt").state_dict()
    assert all(torch.equal(tensor, best[name]) for name, tensor in evaluated[3].items())
    for name, tensor in evaluated[2].items():
        expected = (trained[1][f"encoder.{name}"] + trained[2][f"encoder.{name}"]) / 2
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-5)
    _, without = fit()
    for step in (1, 2, 3):
        assert all(torch.equal(tensor, trained[step][name]) for name, tensor in without[step].items())


def test_divergence_ends_the_training_and_keeps_the_last_good_checkpoint(trained, tmp_path):
    message = (
        "step 4 could not be written .*non-finite.*; the last good checkpoint is step 2. The training has diverged"
    )
    with pytest.raises(UserError, match=message):
        trained(after_batch(diverge))
    assert newest_intact(tmp_path / "last.ckpt") == tmp_path / "last.ckpt"
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


def test_checkpoint_of_another_shape_is_named(trained, make_encoder, tmp_path):
    trained()
    for other in (make_encoder("attention"), make_encoder("shared", config={"intermediate_size": 32})):
        with pytest.raises(
            CheckpointMismatch,
            match=r"does not fit the encoder: (\d+ missing|\d+ with the wrong shape) \(encoder.backbone",
        ):
            trained(encoder=other, resume=tmp_path / "last.ckpt")
