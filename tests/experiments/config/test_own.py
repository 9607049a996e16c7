"""Experiments, tasks, scales and sweeps in a folder of the user, and classes of another package."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml

from datamodules import Document, UserError
from experiments.build.models import ModelOptions
from experiments.compare import main as compare
from experiments.config.arguments import parse
from experiments.config.experiment import FOLDER, as_dict, digest, folder_of, from_dict, load_config, read_config
from experiments.config.sweep_file import read_sweep
from experiments.report import main as report
from experiments.results.comparison import benchmark_of, open_systems
from experiments.train import main as train
from lightning_modules import SharedEncoder, load_encoder

EXPERIMENT = """
tasks: [mine]
encoder: {_target_: mylab.models.MyEncoder}
mining:
  {miner: {_target_: mylab.models.MyMiner, words: 3}, first_step: 0, every_n_steps: 1, k: 10, relative_margin: null}
callbacks:
  counter: {_target_: mylab.models.Counter, file: FILE}
  lr: {_target_: lightning.pytorch.callbacks.LearningRateMonitor, logging_interval: step}
  timer: {_target_: lightning.pytorch.callbacks.Timer, duration: {hours: 1}}
"""
TASK = """
kind: search
expert: mine
data: {tiny: {toy: {_target_: mylab.readers.MyReader, size: 12}}}
"""
SCALE = """
data: {batch_size: 4, cache: null}
backbone: {config: {hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 32}}
trainer: {max_steps: 2}
evaluation: {every_n_steps: 1, baselines: false}
"""
MODELS = """
from __future__ import annotations
from pathlib import Path
from typing import TYPE_CHECKING
from lightning import Callback
from lightning_modules.encoders.shared import SharedEncoder
from lightning_modules.mining.miners import RandomMiner
if TYPE_CHECKING:
    from nowhere import Unknown

class MyEncoder(SharedEncoder): ...

class MyMiner(RandomMiner):
    def __init__(self, words: int, unknown: Unknown = None):
        super().__init__()
        self.words = words

class Counter(Callback):
    def __init__(self, file: str):
        self.file, self.steps = Path(file), 0

    def on_train_batch_end(self, *arguments):
        self.steps += 1
        self.file.write_text(str(self.steps))
"""
READERS = """
from datamodules import Collection, Document

class MyReader:
    def __init__(self, size: int):
        self.size = size

    def sources(self):
        return []

    def read(self):
        words = ["alpha", "beta", "gamma", "delta", "omega", "kappa"]
        texts = [f"{words[i % 5]} {words[i % 4]} {i}" for i in range(self.size)]
        corpus = {f"d{i}": Document(f"d{i}", words[i % 6], text) for i, text in enumerate(texts)}
        queries = {f"q{i}": Document(f"q{i}", "", words[i % 6] + f" {i}") for i in range(self.size)}
        qrels = {}
        for i in range(self.size):
            split = "train" if i < 8 else "dev" if i < 10 else "test"
            qrels.setdefault(split, {})[f"q{i}"] = {f"d{i}": 1}
        return Collection(corpus, queries, qrels)
"""
CALLBACKS = "lightning.pytorch.callbacks"
ALLOWED = f"extend.packages=[mylab,{CALLBACKS}]"


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Make an importable package, and a folder with an experiment of it."""
    for name, text in {
        "site/mylab/__init__.py": "",
        "site/mylab/models.py": MODELS,
        "site/mylab/readers.py": READERS,
        "lab/own.yaml": EXPERIMENT.replace("FILE", str(tmp_path / "steps")),
        "lab/tasks/mine.yaml": TASK,
        "lab/scale/tiny.yaml": SCALE,
        "lab/sweeps/two.yaml": (FOLDER / "sweeps" / "seeds.yaml").read_text(encoding="utf-8"),
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "lab"
    for name in [name for name in sys.modules if name.partition(".")[0] == "mylab"]:
        del sys.modules[name]


def test_own_experiment_with_classes_of_another_package(lab, tmp_path):
    run = tmp_path / "run"
    train(["lab/own.yaml", "scale=tiny", ALLOWED, f"run.dir={run}"])
    assert (tmp_path / "steps").read_text() == "2"
    encoder = load_encoder(run, packages=["mylab"])
    assert type(encoder).__module__ == "mylab.models"
    with pytest.raises(UserError, match=r"'mylab.models.MyEncoder': only classes of .* packages that you allow"):
        load_encoder(run)
    folder = encoder.save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="packages that you allow"):
        load_encoder(folder)
    again = load_encoder(folder, packages="mylab.models")
    text = [Document("d", "", "alpha beta")]
    assert torch.equal(again.encode(text, "mine"), encoder.encode(text, "mine"))
    assert type(type(encoder).from_pretrained(folder)) is type(encoder)
    with pytest.raises(UserError, match="packages that you allow"):
        SharedEncoder.from_pretrained(folder)
    options = parse(ModelOptions, [f"model={run}", ALLOWED])
    assert options.run_config().encoder["_target_"] == "mylab.models.MyEncoder"
    assert type(options.load()) is type(encoder)
    with pytest.raises(UserError, match=r"extend.packages=\[mylab\]"):
        parse(ModelOptions, [f"model={run}"]).run_config()
    with pytest.raises(UserError, match=r"extend.packages=\[mylab\]"):
        from_dict(read_config(run), "config.yaml")  # although it names the packages of its training
    compare([f"A={run}", f"B={run}", "draws=10", f"output={tmp_path / 'compared'}", ALLOWED])
    benchmarks = [
        benchmark_of(*open_systems("A", [str(run)], allowed), "toy") for allowed in ((), ("mylab", CALLBACKS))
    ]
    assert benchmarks[0] is None
    assert benchmarks[1].queries
    for arguments, has_texts in (([], False), ([ALLOWED], True)):
        report([f"RUN={run}", "map=4", *arguments])
        query = json.loads((run / "report.json").read_text())["queries"]["toy"]["typical"][0]
        assert (query["text"] != query["query"]) == has_texts


@pytest.mark.parametrize(
    "text",
    [
        "extend: {packages: [mylab, lightning.pytorch.callbacks]}",
        "extend: {packages: ['${data.root}']}\ndata: {root: mylab}",
    ],
)
def test_files_cannot_allow_packages(lab, text):
    (lab / "tasks" / "mine.yaml").write_text(TASK)
    (lab / "own.yaml").write_text((lab / "own.yaml").read_text() + text)
    with pytest.raises(UserError, match="only the command line may allow packages"):
        load_config("lab/own.yaml", ["scale=tiny"])
    assert "mylab" not in sys.modules


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"got 'mylab.models.MyEncoder'; if you trust .* extend.packages=\[mylab\]"),
        (["extend.packages=[my]"], "got 'mylab.models.MyEncoder'"),  # not by a prefix of the name
        (["extend.packages=[mylab.readers]"], "got 'mylab.models.MyEncoder'"),
        (["extend.packages=[mylab]"], r"callbacks.lr._target_: .* extend.packages=\[lightning\]"),
        ([ALLOWED, "encoder._target_=mylab.models.Counter"], "encoder._target_: expected a subclass of Encoder"),
        ([ALLOWED, "encoder._target_=mylab.nothing.X"], "cannot import 'mylab.nothing' .*PYTHONPATH"),
        ([ALLOWED, "mining.miner.words=many"], "mining.miner.words"),
        ([ALLOWED, "callbacks.timer.durations=1"], "Timer has no argument 'durations'"),
        (["extend.packages=mylab"], r"write extend.packages=\[mylab\]"),
    ],
)
def test_classes_must_be_allowed_by_name(lab, overrides, message):
    with pytest.raises(UserError, match=message):
        load_config("lab/own.yaml", ["scale=tiny", *overrides])


def test_allowed_packages_do_not_change_the_run(lab):
    some, more = load_config("moe"), load_config("moe", ["extend.packages=[mylab]", "extend.like=nearest"])
    assert more.extend.packages == ["mylab"]
    assert digest(some) == digest(more)
    assert from_dict(as_dict(more), "config.yaml") == some


def test_files_next_to_an_own_experiment(lab):
    config = load_config(str(lab / "own.yaml"), ["scale=tiny", ALLOWED])
    assert (config.experiment, config.scale, config.trainer.max_steps) == ("own", "tiny", 2)
    assert folder_of(config).name.startswith("own-tiny-seed0-")
    (lab / "scale" / "sample.yaml").write_text("trainer: {max_steps: 7}")  # on top of ours
    (lab / "plain.yaml").write_text("encoder: {_target_: lightning_modules.encoders.shared.SharedEncoder}")
    plain, ours = load_config("lab/plain.yaml"), load_config("vanilla")
    assert plain.trainer.max_steps == 7
    assert plain.data == ours.data
    sweep = read_sweep("two", "lab/plain.yaml")
    assert sweep.command(["x=1"])[-2:] == [f"EXP={os.path.abspath('lab/plain.yaml')}", "x=1"]
    with pytest.raises(UserError, match="unknown sweep 'two'"):
        read_sweep("two", "moe")
    with pytest.raises(UserError, match="unknown scale 'tiny'"):
        load_config("moe", ["scale=tiny"])


@pytest.mark.parametrize(
    ("path", "message"),
    [("none.yaml", "none.yaml does not exist"), ("lab", "unknown experiment 'lab'"), ("lab/a\tb.yaml", "experiment")],
)
def test_wrong_paths_raise_user_errors(lab, path, message):
    (lab / "a\tb.yaml").write_text(yaml.safe_dump({}))
    assert Path("lab").is_dir()
    with pytest.raises(UserError, match=message):
        load_config(path)
