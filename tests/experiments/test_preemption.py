"""A run that is told to end in the middle of something saves, and the one that goes on makes up for what was left."""

import json
import os
import signal

import pytest
import torch

from experiments.results import results as final_results
from experiments.train import train
from lightning_modules.callbacks import evaluation
from lightning_modules.distributed import signals
from lightning_modules.encoders.base import Encoder
from tests.experiments.kills import figures
from tests.experiments.test_train import TINY, rows

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


@pytest.fixture(autouse=True)
def as_before():
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


def told_in(monkeypatch, place, name, number=signal.SIGUSR1):
    """The signal comes when a function is called for the first time."""
    original, left = getattr(place, name), [1]

    def called(*arguments, **options):
        if left and left.pop():
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    monkeypatch.setattr(place, name, called)


def preempted(folder):
    """The step that is saved by a run that is told to end."""
    signals.catch()
    with pytest.raises(SystemExit) as leaving:
        train("moe", [f"run.dir={folder}", *SETTINGS])
    assert leaving.value.code == 75
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


def ends_as(folder, whole):
    """Let the run go on to its end: all is as in the one that was not disturbed, and nothing is logged twice."""
    signals.catch()
    train("moe", [f"run.dir={folder}", *SETTINGS])

    def logged(place):
        return [
            {k: v for k, v in row.items() if "seconds" not in k and "per_second" not in k and k != "time"}
            for row in rows(place)
        ]

    assert sorted(map(json.dumps, logged(folder))) == sorted(map(json.dumps, logged(whole)))
    one, two = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for f in (whole, folder))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert figures(folder) == figures(whole)


def test_an_evaluation_is_left_and_made_up_for(tmp_path, whole, monkeypatch):
    told_in(monkeypatch, evaluation, "evaluate")
    assert preempted(tmp_path) == 4
    assert not any("val/mean/ndcg@10" in row for row in rows(tmp_path))
    ends_as(tmp_path, whole)


def test_a_mining_is_left_and_made_up_for(tmp_path, whole, monkeypatch):
    from lightning_modules.callbacks import hard_negatives

    told_in(monkeypatch, hard_negatives.Mining, "cache")
    assert preempted(tmp_path) == 6
    assert not any("mine/seconds" in row for row in rows(tmp_path))
    ends_as(tmp_path, whole)


def test_the_final_table_is_left_and_made_anew(tmp_path, whole, monkeypatch):
    told_in(monkeypatch, final_results, "evaluate", signal.SIGTERM)
    assert preempted(tmp_path) == 9
    assert not (tmp_path / "results.json").exists()
    signals.catch()
    train("moe", [f"run.dir={tmp_path}", *SETTINGS])
    assert figures(tmp_path) == figures(whole)


def test_before_the_first_step_nothing_is_made(tmp_path, monkeypatch):
    told_in(monkeypatch, Encoder, "__init__")
    signals.catch()
    os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(SystemExit, match="75"):
        train("moe", [f"run.dir={tmp_path / 'run'}", *SETTINGS])
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_falls_back_with_its_mined_negatives(tmp_path, whole, caplog):
    """The newest two, from after the mining, are damaged: the one before knows no mining, which is found on disk."""
    saving = ["checkpoint.every_n_steps=3", "checkpoint.keep=3"]
    train("moe", [f"run.dir={tmp_path}", *SETTINGS, *saving])  # saved at 3, 6 (when it had mined) and 9
    (tmp_path / "results.json").unlink()
    for name in ("last.ckpt", "last.1.ckpt"):
        path = tmp_path / "checkpoints" / name
        path.write_bytes(path.read_bytes()[:-200])
    caplog.set_level("INFO")
    train("moe", [f"run.dir={tmp_path}", *SETTINGS, *saving])
    assert "is damaged (File is not a zip file); resuming from the checkpoint before it, last.2.ckpt" in caplog.text
    assert "step 6: these hard negatives were mined already" in caplog.text
    batches = {row["step"]: row["train/batch"] for row in rows(whole) if "train/batch" in row}
    assert all(row["train/batch"] == batches[row["step"]] for row in rows(tmp_path) if "train/batch" in row)
    assert figures(tmp_path) == figures(whole)
