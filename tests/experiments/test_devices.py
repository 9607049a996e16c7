"""Every part of a run, and every command, computes on the device that trained, or that was asked for.

On a machine without a GPU, all tensors are on the CPU. So the tests record which device is requested: `cpu:0`, which is
the CPU, but unlike the device `cpu` that Lightning moves a module to after training.
"""

import json
import weakref

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from datamodules.records import UserError
from experiments import find
from experiments.build import models, trainer
from experiments.embed import main as embed
from experiments.evaluate import main as evaluate
from experiments.mine import main as mine
from experiments.report import main as report
from experiments.run import processes
from experiments.train import train
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.base import Encoder
from lightning_modules.retrieval import compute
from tests.experiments.test_train import TINY

REQUESTED = torch.device("cpu", 0)
TASK = "tasks=[search]"
SETTINGS = [*TINY, "trainer.max_steps=2", "evaluation.metrics=[ndcg@10]"]


@pytest.fixture
def computed(monkeypatch):
    """Pretend that the accelerator is REQUESTED. Return the set of devices of all encoders that have computed."""
    last, devices = weakref.WeakKeyDictionary(), set()
    move, to_cpu = torch.nn.Module.to, torch.nn.Module.cpu

    def record(module, device):
        for child in module.modules():
            last[child] = device

    def recording_to(module, *arguments, **options):
        device = torch._C._nn._parse_to(*arguments, **options)[0]
        if device is not None:
            record(module, device)
        return move(module, *arguments, **options)

    def recording_cpu(module):
        record(module, torch.device("cpu"))
        return to_cpu(module)

    def recording(method, encoder_of):
        def call(module, *arguments, **options):
            devices.add(last.get(encoder_of(module)))
            return method(module, *arguments, **options)

        return call

    monkeypatch.setattr(torch.nn.Module, "to", recording_to)
    monkeypatch.setattr(torch.nn.Module, "cpu", recording_cpu)
    monkeypatch.setattr(Encoder, "encode_each", recording(Encoder.encode_each, lambda encoder: encoder))
    monkeypatch.setattr(ContrastiveModule, "embed", recording(ContrastiveModule.embed, lambda module: module.encoder))
    monkeypatch.setattr(trainer, "_strategy", lambda *_: SingleDeviceStrategy(device=REQUESTED))
    for module in (compute, models, processes):
        monkeypatch.setattr(module, "default_device", lambda number=None: REQUESTED)
    return devices


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a trained run of two tasks. There is a file of papers next to it."""
    folder = tmp_path_factory.mktemp("trained")
    tasks = "tasks=[search,classification]"
    train(
        "moe",
        [f"run.dir={folder / 'run'}", *SETTINGS, tasks, "evaluation.baselines=false", "evaluation.every_n_steps=0"],
    )
    papers = [{"id": f"p{i}", "title": f"paper {i}", "text": "about retrieval"} for i in range(5)]
    (folder / "papers.jsonl").write_text("".join(json.dumps(paper) + "\n" for paper in papers))
    return folder / "run"


@pytest.mark.slow
def test_training_and_everything_after_it_use_the_device_of_the_trainer(computed, tmp_path, caplog):
    caplog.set_level("INFO")
    mining = [
        "mining.every_n_steps=1",
        "task.search.num_hard_negatives=1",
        "mining.k=20",
        "mining.relative_margin=null",
    ]
    train("moe", [f"run.dir={tmp_path}", *SETTINGS, TASK, *mining, "evaluation.every_n_steps=1"])
    assert computed == {REQUESTED}
    for part in ("training", "baselines", "final table"):
        assert f"{part} on cpu" in caplog.text
    assert "training on cpu:0: 2 steps" in caplog.text
    assert "mining on cpu" in caplog.text


@pytest.mark.slow
def test_guide_of_a_miner_without_encoder_uses_the_device_that_was_asked_for(computed, run, tmp_path):
    options = ["mining.miner._target_=lightning_modules.mining.miners.RandomMiner", "mining.relative_margin=null"]
    settings = [*(setting for setting in SETTINGS if not setting.startswith("trainer.")), TASK]
    mine(["moe", f"output={tmp_path / 'mined'}", *settings, *options, f"mining.guide={run}", "mining.k=20"])
    assert computed == {REQUESTED}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="Lightning would choose the GPU")
def test_choice_of_the_nearest_task_uses_the_device_of_the_training(computed, run, tmp_path, caplog):
    caplog.set_level("INFO")
    new = ["tasks=[link_prediction]", f"extend.model={run}", "extend.like=nearest", "trainer.accelerator=auto"]
    train("moe", [f"run.dir={tmp_path}", *SETTINGS, *new, "evaluation.every_n_steps=0"])
    assert computed == {REQUESTED}
    assert "finding the nearest tasks on cpu" in caplog.text


def _embed(run, folder):
    embed([f"model={run}", "task=search", f"input={run.parent / 'papers.jsonl'}", f"output={folder / 'vectors'}"])


def _find(run, folder):
    _embed(run, folder)
    find.main([f"embeddings={folder / 'vectors'}", "query=retrieval", f"model={run}"])


def _mine(run, folder):
    settings = [setting for setting in SETTINGS if not setting.startswith("trainer.")]
    mine(
        [
            "moe",
            f"model={run}",
            f"output={folder / 'mined'}",
            "mining.k=20",
            "mining.relative_margin=null",
            TASK,
            *settings,
        ]
    )


COMMANDS = {
    "evaluate": lambda run, folder: evaluate([f"model={run}", f"output={folder / 'out'}", "metrics=ndcg@10"]),
    "embed": _embed,
    "find": _find,
    "mine": _mine,
    "report": lambda run, folder: report([f"RUN={run}", f"output={folder / 'report.html'}", "map=20"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_command_uses_the_accelerator_and_says_so(computed, run, tmp_path, caplog, command):
    caplog.set_level("INFO")
    COMMANDS[command](run, tmp_path)
    assert computed == {REQUESTED}
    assert " on cpu:0" in caplog.text


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:99", "mps", "meta", ""])
def test_unknown_device_raises_user_error(name):
    with pytest.raises(UserError, match="device: "):
        compute.resolve_device(name)


def test_device_that_is_asked_for_is_used(make_encoder, tmp_path, computed):
    folder = make_encoder("shared").save_pretrained(tmp_path / "model")
    encoder = models.EncodingOptions(model=str(folder), device="cpu").load_on_device()
    encoder.encode(["bara"], "search")
    assert computed == {torch.device("cpu")}
    with pytest.raises(UserError, match=r"device: got cuda:7, but this machine has \w+ GPUs"):
        models.EncodingOptions(model=str(folder), device="cuda:7").load_on_device()
