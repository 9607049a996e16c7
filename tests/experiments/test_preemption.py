"""A signal in the middle of an evaluation, a mining or the final table: the resumed run repeats it."""

import os
import signal

import pytest
import torch

from experiments.results import measuring
from experiments.train import train
from lightning_modules.callbacks import evaluation
from lightning_modules.distributed import signals
from lightning_modules.encoders.base import Encoder
from tests.experiments.kills import figures
from tests.experiments.test_train import TINY, rows
from tests.lightning_modules.callbacks.test_training_log import curve

SETTINGS = [
    *TINY,
    "trainer.max_steps=9",
    "trainer.log_every_n_steps=1",
    "evaluation.every_n_steps=4",
    "evaluation.baselines=false",
    "backbone.dropout=0.3",
    "mining.every_n_steps=6",
    "mining.relative_margin=null",
    "mining.k=20",
]


pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def signal_handlers_restored():
    handlers = {number: signal.getsignal(number) for number in signals.ASKING}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signals._noted, signals._owner = None, 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train("moe", [f"run.dir={folder}", *SETTINGS])
    return folder


def signal_in(monkeypatch, owner, name, number=signal.SIGUSR1):
    """Send a signal at the first call of a function."""
    original, pending = getattr(owner, name), [1]

    def called(*arguments, **options):
        if pending and pending.pop():
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, called)


def preempted(folder):
    """Train until the signal, and return the step that was saved."""
    signals.catch()
    with pytest.raises(SystemExit) as leaving:
        train("moe", [f"run.dir={folder}", *SETTINGS])
    assert leaving.value.code == 75
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


def finish_as(folder, whole):
    """Resume the run to its end. It must equal the undisturbed run, and log nothing twice."""
    signals.catch()
    train("moe", [f"run.dir={folder}", *SETTINGS])

    assert curve(folder / "metrics.jsonl") == curve(whole / "metrics.jsonl")
    one, two = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for f in (whole, folder))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert figures(folder) == figures(whole)


def test_an_interrupted_evaluation_is_repeated(tmp_path, whole, monkeypatch):
    signal_in(monkeypatch, evaluation, "evaluate")
    assert preempted(tmp_path) == 4
    assert not any("val/mean/ndcg@10" in row for row in rows(tmp_path))
    finish_as(tmp_path, whole)


def test_an_interrupted_mining_is_repeated(tmp_path, whole, monkeypatch):
    from lightning_modules.callbacks import hard_negatives

    signal_in(monkeypatch, hard_negatives.Mining, "cache")
    assert preempted(tmp_path) == 6
    assert not any("mine/seconds" in row for row in rows(tmp_path))
    finish_as(tmp_path, whole)


def test_an_interrupted_final_table_is_repeated(tmp_path, whole, monkeypatch):
    signal_in(monkeypatch, measuring, "evaluate", signal.SIGTERM)
    assert preempted(tmp_path) == 9
    assert not (tmp_path / "results.json").exists()
    signals.catch()
    train("moe", [f"run.dir={tmp_path}", *SETTINGS])
    assert figures(tmp_path) == figures(whole)


def test_a_signal_before_the_first_step_leaves_no_run(tmp_path, monkeypatch):
    signal_in(monkeypatch, Encoder, "__init__")
    signals.catch()
    os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(SystemExit, match="75"):
        train("moe", [f"run.dir={tmp_path / 'run'}", *SETTINGS])
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_falls_back_with_its_mined_negatives(tmp_path, whole, caplog):
    """The two newest are damaged. The third is older than the mining, whose negatives are read from disk."""
    saving = ["checkpoint.every_n_steps=3", "checkpoint.keep=3"]
    train("moe", [f"run.dir={tmp_path}", *SETTINGS, *saving])  # saved at 3, 6 (when it had mined) and 9
    (tmp_path / "results.json").unlink()
    for name in ("last.ckpt", "last.1.ckpt"):
        path = tmp_path / "checkpoints" / name
        path.write_bytes(path.read_bytes()[:-200])
    caplog.set_level("INFO")
    train("moe", [f"run.dir={tmp_path}", *SETTINGS, *saving])
    assert "is damaged (File is not a zip file); resuming from the checkpoint before it, last.2.ckpt" in caplog.text
    assert "step 6: these hard negatives have already been mined" in caplog.text
    assert curve(tmp_path / "metrics.jsonl") == curve(whole / "metrics.jsonl")
    assert figures(tmp_path) == figures(whole)
