"""The best checkpoint is the best of those that could be saved."""

import errno
from types import SimpleNamespace

import pytest
import torch

from datamodules.tasks import ClassificationDataModule
from lightning_modules.callbacks import checkpoint, evaluation
from lightning_modules.callbacks.checkpoint import SafeCheckpointIO
from lightning_modules.callbacks.evaluation import Evaluation
from lightning_modules.contrastive import ContrastiveModule
from tests.lightning_modules.quiet_trainer import quiet_trainer


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

    def fit(*full_at):
        write = checkpoint.write_checkpoint

        def write_if_there_is_room(content, path, keep):
            if content["global_step"] in full_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            write(content, path, keep)

        data = make_task(ClassificationDataModule, "classification", num_batches=3)
        callback = Scripted(data.benchmarks("dev"), ["ndcg@10"], 1, 1000, tmp_path / "best.ckpt")
        monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: scripted_result(callback.step))
        monkeypatch.setattr(checkpoint, "write_checkpoint", write_if_there_is_room)
        plugins = [SafeCheckpointIO(tmp_path / "last.ckpt", 1)]
        trainer = quiet_trainer(tmp_path, max_steps=3, callbacks=[callback], plugins=plugins)
        trainer.fit(ContrastiveModule(make_encoder("shared"), total_steps=3), data)
        return callback

    return fit


@pytest.mark.parametrize(("full_at", "best_step", "best"), [((), 1, 0.9), ((1,), 2, 0.5), ((1, 2), 3, 0.4)])
def test_checkpoint_that_could_not_be_saved_is_not_the_best(fitted, tmp_path, full_at, best_step, best):
    callback = fitted(*full_at)
    assert (callback.best_step, callback.best) == (best_step, best)
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert saved["global_step"] == best_step
    (state,) = (state for name, state in saved["callbacks"].items() if name == "Scripted")
    assert (state["best_step"], state["best"]) == (best_step, best)  # for a run that resumes from it
