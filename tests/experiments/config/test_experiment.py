"""Configurations that load, and the errors of those that do not."""

import dataclasses
import importlib
import json
import sys
import typing
from typing import get_type_hints

import pytest
import torch
import yaml

from datamodules.records import UserError
from experiments.config import experiment as module
from experiments.config.experiment import as_dict, digest, experiments, from_dict, load_config, scales
from experiments.config.schema import Config, settings_by_task
from experiments.config.study_file import read_study
from experiments.config.targets import MOVED, check_target, instantiate, with_first_paths


def error_of(*arguments):
    with pytest.raises(UserError) as caught:
        load_config(arguments[0], arguments[1:])
    return str(caught.value)


def test_every_experiment_loads_at_every_scale():
    assert {"vanilla", "moe", "moe_ffn"} <= set(experiments())
    assert {"sample", "small", "paper"} <= set(scales())
    for experiment in experiments():
        for scale in scales():
            config = load_config(experiment, [f"scale={scale}"])
            assert config.experiment == experiment
            assert config.scale == scale
            own = {"mmsci": ["caption", "subject", "reference"]}
            assert config.tasks == own.get(experiment, ["classification", "link_prediction", "search"])


@pytest.mark.parametrize(
    ("study", "arm", "options"),
    [
        ("papers", "mined_anchored_lightly", []),
        ("papers", "mined_anchored_positives", ["objective.vector_teacher.weight=1"]),
        ("transfer_back", "mined_anchored_lightly", ["data.num_positives=1"]),
        ("transfer_back", "mined_anchored", ["data.num_positives=1", "objective.vector_teacher.weight=1"]),
    ],
)
def test_best_is_the_recipe_that_the_studies_measured(study, arm, options):
    """options: those that earlier forms of the recipe had."""
    job = next(job for job in read_study(study).jobs if job.arm == arm)
    (_, experiment, *settings), _ = job.commands
    settings = [setting for setting in settings if not setting.startswith("task.")]  # their folders do not exist here
    shared = [
        setting for setting in settings if not setting.startswith(("mining.", "objective.", "data.num_positives"))
    ]
    recipes = (("best", [*shared, *options]), (experiment, settings))
    best, measured = (as_dict(load_config(*recipe)) for recipe in recipes)
    assert best | {"experiment": experiment} == measured


def test_later_layers_override_earlier_ones():
    config = load_config("moe", ["optim.lr=0.5", "optim.lr=0.25", "encoder.layers=[0, 1]", "wandb.entity=null"])
    assert config.optim.lr == 0.25
    assert config.encoder["layers"] == [0, 1]
    assert config.encoder["pooling"] == "mean"  # set by the scale
    assert config.wandb.entity is None


def test_tasks_use_the_data_of_their_scale_below_the_root():
    assert set(load_config("moe").task["search"].data) == {"searches"}
    small = load_config("moe", ["scale=small", "data.root=/somewhere"])
    assert small.task["search"].data["scitldr"]["folder"] == "/somewhere/scitldr"


BY_TASK = {  # settings with an entry per task -> an entry
    "data.weights": "2.0",
    "data.curriculum.weights": "2.0",
    "mining.miners": "null",
    "mining.judges": "null",
    "objective.task_weights": "2.0",
    "objective.temperature": "2.0",
    "objective.vector_teacher.weight": "2.0",
}
OTHER_MAPPINGS = {
    *("encoder", "losses", "callbacks", "mining.miner", "mining.judge"),  # nodes
    *("task", "task.data", "backbone.config", "optim.lr_scale"),
}


def mapping_keys(kind, prefix=""):
    """Yield the key of each option that can be a mapping with free names, in a dataclass and those inside it."""
    for name, hint in get_type_hints(kind).items():
        inner = next((each for each in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(each)), None)
        if inner:
            yield from mapping_keys(inner, f"{prefix}{name}.")
        if hint is typing.Any or typing.get_origin(hint) is dict:
            yield prefix + name


def settings_of(key, names):
    """Return settings in which `key` has an entry for each of the tasks."""
    mapping = "{" + ", ".join(f"{name}: {BY_TASK[key]}" for name in names) + "}"
    if key == "data.curriculum.weights":
        return [f"data.curriculum=[{{from_step: 2, weights: {mapping}}}]"]
    return [f"{key}={mapping}"]


@pytest.mark.parametrize("key", sorted({*mapping_keys(Config)} - OTHER_MAPPINGS))
def test_only_named_tasks_are_kept_with_their_settings(key):
    config = load_config("moe", ["tasks=[search]", *settings_of(key, ["classification", "search"])])
    assert list(config.task) == ["search"]
    assert [set(each) for each in settings_by_task(config) if each] == [{"search"}]
    if not key.startswith("data."):  # those are checked with the data
        assert "serach" in error_of("moe", "tasks=[search]", *settings_of(key, ["search", "serach"]))


def test_node_with_another_target_does_not_inherit_arguments():
    target = "datamodules.readers.beir.BeirReader"
    node = "task.search.data.searches={_target_: " + target + ", folder: /x}"
    config = load_config("moe", [node])
    assert config.task["search"].data["searches"] == {"_target_": target, "folder": "/x"}


def float_keys(kind, prefix=""):
    """Yield the key of each option with floats in a dataclass and those inside it, as one of the tasks or for one."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, key = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(hint):
            yield from float_keys(hint, f"{key}.")
        elif "float" in str(hint):
            mapping = typing.get_origin(hint) is dict
            yield f"{key}.search" if mapping else key, typing.get_origin(hint) is list


def test_every_option_with_floats_has_an_upper_bound():
    keys = dict(float_keys(Config))
    assert {"optim.lr", "trainer.gradient_clip_val", "objective.task_weights.search", "data.weights.search"} <= set(
        keys
    )
    for key, is_list in keys.items():
        number = "[1, 1e30]" if is_list else "1e30"
        assert "expected a number" in error_of("moe", f"{key}={number}"), key


@pytest.mark.parametrize(
    ("key", "mistake", "unusual"),
    [
        ("objective.temperature", "1e-320", "1e-4"),
        ("objective.temperature.search", "1e30", "50"),
        ("objective.teacher.temperature", "1e-30", "1e-4"),
        ("objective.vector_teacher.weight", "1e300", "1e4"),
        ("mining.sampling_temperature", "1e-320", "1e-4"),
        ("data.schedule_temperature", "1e-3", "0.5"),
        ("data.num_positives", "1000000000", "500"),
        ("task.search.num_hard_negatives", "1000000000", "500"),
        ("data.batch_size", "1000000000", "65536"),
        ("data.num_workers", "1000000", "64"),
        ("trainer.devices", "1000000", "64"),
        ("checkpoint.keep", "1000000000000", "100"),
        ("backbone.lora.rank", "1000000000", "256"),
        ("optim.eps", "1e-320", "1e-15"),
        ("optim.lr", "1e6", "0.5"),
    ],
)
def test_numbers_that_are_surely_mistakes_are_refused(key, mistake, unusual):
    more = ["tasks=[search]"] if key.startswith("objective.temperature.") else []
    assert f"{key}: expected a number" in error_of("moe", *more, f"{key}={mistake}")
    load_config("moe", [*more, f"{key}={unusual}"])


def test_saved_configuration_is_read_back_unchanged():
    config = load_config("moe_ffn", ["scale=small", "optim.lr=1e-5"])
    text = yaml.safe_dump(as_dict(config))
    assert from_dict(yaml.safe_load(text), "config.yaml") == config


def test_digest_depends_on_the_experiment_and_not_on_its_folder():
    plain = digest(load_config("moe"))
    assert plain == digest(load_config("moe", ["run.dir=/x", "wandb.project=y"]))
    assert plain != digest(load_config("moe", ["optim.lr=0.5"]))
    assert plain != digest(load_config("vanilla"))


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["moo"], ["unknown experiment 'moo'", "did you mean moe?", "vanilla"]),
        (["moe", "scale=smal"], ["unknown scale 'smal'", "did you mean small?"]),
        (
            ["moe", "optim.lrr=1"],
            ["command line (optim.lrr=1)", "unknown key optim.lrr", "optim.lr?", "weight_decay"],
        ),
        (["moe", "optm.lr=1"], ["unknown key optm", "did you mean optim?"]),
        (["moe", "seed=1"], ["unknown key seed; did you mean run.seed?"]),
        (["moe", "SEED=1"], ["did you mean run.seed?"]),
        (["moe", "max_steps=40"], ["did you mean trainer.max_steps?"]),
        (["moe", "trainer.seed=1"], ["unknown key trainer.seed; did you mean run.seed?"]),
        (["moe", "exp=vanilla"], ["did you mean EXP?", "EXP, SCALE, EXTRAS"]),
        (["moe", "loggers=[[[]]]"], ["loggers: expected a list of texts, but it contains [[]]"]),
        (["moe", "evaluation.metrics={a: 1}"], ["evaluation.metrics: expected a list, got {'a': 1}"]),
        (["moe", "objective.task_weights=[1]"], ["objective.task_weights: expected a mapping, got [1]"]),
        (["moe", "objective.task_weights=2"], ["objective.task_weights: expected a mapping, got 2"]),
        (["moe", "mining.miners=BM25Miner"], ["mining.miners: expected a mapping, got 'BM25Miner'"]),
        (["moe", "mining.miners=null"], ["mining.miners: expected a value, got null"]),
        (["moe", "mining.miners={search: {}}"], ["mining.miners.search: expected a node with _target_, got {}"]),
        (
            ["moe", "mining.miners={search: {_target_: lightning_modules.mining.miners.BM25Miner, k: 1}}"],
            ["mining.miners.search: BM25Miner has no argument 'k'; expected no arguments"],
        ),
        (
            ["best", "objective.vector_teacher.weight=[1]"],
            ["objective.vector_teacher.weight: expected a number of at least 0 and at most 1e6, got [1]"],
        ),
        (
            ["moe", "data.curriculum={from_step: 1}"],
            ["data.curriculum: expected a list, write data.curriculum=[{'from_step': 1}]"],
        ),
        (["moe", "data.curriculum=3"], ["data.curriculum: expected a list, got 3"]),
        (["moe", "data.curriculum=[null]"], ["data.curriculum[0]: expected a value, got null"]),
        (["moe", "data.curriculum=[{from_step: 0}]"], ["from_step: expected a number of at least 1"]),
        (
            ["moe", "data.curriculum=[{from_step: 2}, {from_step: 2}]"],
            ["data.curriculum: expected phases with increasing from_step, got 2, 2"],
        ),
        (["moe", "tasks=[[search]]"], ["tasks: expected a list of texts, but it contains ['search']"]),
        (["moe", "tasks=search,x"], ["(tasks=search,x): tasks: expected a list, write tasks=[search,x]"]),
        (["moe", "xyzzy=1"], ["unknown key xyzzy; expected one of experiment, scale"]),
        (["moe", "optim.lr=fast"], ["optim.lr", "'fast'"]),
        (["moe", "data.batch_size=2.5"], ["data.batch_size", "2.5"]),
        (["moe", "data.batch_size=0"], ["data.batch_size: expected a number of at least 1"]),
        (["moe", "data.num_workers=-1"], ["data.num_workers: expected a number of at least 0"]),
        (["moe", "optim.warmup=1.5"], ["optim.warmup: expected a number of at least 0 and below 1, got 1.5"]),
        (["moe", "objective.similarity=l2"], ["objective.similarity", "'l2'", "dot", "cosine"]),
        (
            ["moe", "objective.temperature=0"],
            ["objective.temperature: expected a number of at least 1e-06 and at most 1e6, got 0"],
        ),
        (
            ["moe", "objective.temperature=true"],
            ["objective.temperature: expected a number of at least 1e-06 and at most 1e6, got True"],
        ),
        (
            ["moe", "objective.temperature=warm"],
            ["objective.temperature: expected a number of at least 1e-06 and at most 1e6, got 'warm'"],
        ),
        (
            ["moe", "objective.temperature={search: 1}"],
            [
                "objective.temperature: expected a number, or one for each task",
                "there is none for classification, link_prediction",
            ],
        ),
        (
            ["moe", "tasks=[search]", "objective.temperature={search: -1}"],
            ["objective.temperature.search: expected a number of at least 1e-06 and at most 1e6, got -1"],
        ),
        (
            ["moe", "tasks=[search]", "objective.temperature={search: 1}", "objective.learn_temperature=one"],
            ["objective.learn_temperature: expected per_task", "got one"],
        ),
        (["moe", "objective.learn_temperature=yes"], ["objective.learn_temperature", "one"]),
        (
            ["moe", "objective.learn_temperature=one", "objective.temperature_range=[0.1, 1]"],
            ["objective.temperature: expected a number in objective.temperature_range [0.1, 1.0], got 0.05"],
        ),
        (
            ["moe", "objective.temperature_range=[1]"],
            ["objective.temperature_range: expected a lower and a higher number, got [1.0]"],
        ),
        (
            ["moe", "objective.temperature_range=[1, 0.5]"],
            ["objective.temperature_range: expected a lower and a higher number, got [1.0, 0.5]"],
        ),
        (["moe", "objective.temperature_lr=0"], ["objective.temperature_lr: expected a number above 0"]),
        (["moe", "objective.positives=sum"], ["objective.positives", "'sum'", "log_mean"]),
        (["moe", "objective.matryoshka=[0]"], ["objective.matryoshka: expected a number above 0, got 0"]),
        (["moe", "objective.matryoshka=[8, 8]"], ["objective.matryoshka: expected different numbers, got [8, 8]"]),
        (
            ["moe", "objective.matryoshka=[8, 16]", "objective.matryoshka_weights=[1]"],
            ["objective.matryoshka_weights: expected one per entry of matryoshka, got 1"],
        ),
        (
            ["moe", "objective.matryoshka=[8]", "objective.matryoshka_weights=[-1]"],
            ["objective.matryoshka_weights: expected a number above 0"],
        ),
        (["moe", "objective.guide.margin=-0.1"], ["objective.guide.margin: expected a number of at least 0, got -0.1"]),
        (
            ["moe", "objective.guide.margin=1", "objective.guide.kind=relative"],
            ["objective.guide.margin: expected a number below 1 (relative), got 1.0"],
        ),
        (["moe", "objective.guide.modle=x"], ["unknown key objective.guide.modle", "objective.guide.model?"]),
        (["moe", "objective.teacher.weight=0"], ["objective.teacher.weight: expected a number above 0"]),
        (
            ["moe", "objective.teacher.temperature=.nan"],
            ["objective.teacher.temperature: expected a number of at least 1e-06"],
        ),
        (["moe", "objective.teacher.loss=mse"], ["objective.teacher.loss", "'mse'", "margin_mse"]),
        (
            ["moe", "objective.task_weights.search=0"],
            ["objective.task_weights.search: expected a number above 0"],
        ),
        (
            ["moe", "objective.task_weights.serach=1"],
            ["objective.task_weights: expected one of classification, link_prediction, search, got 'serach'"],
        ),
        (["moe", "objective.score_memory=0"], ["objective.score_memory: expected a number above 0, got 0"]),
        (["moe", "data.num_positives=0"], ["data.num_positives: expected a number of at least 1"]),
        (["moe", "task.search.num_positives=0"], ["task.search.num_positives: expected a number of at least 1"]),
        (["moe", "optim.lr"], ["expected key=value, got 'optim.lr'"]),
        (["moe", "=3"], ["expected key=value"]),
        (["moe", "tasks=[serach]"], ["unknown task 'serach'", "did you mean search?"]),
        (["moe", "tasks=[]"], ["tasks: name at least one"]),
        (["moe", "tasks=search"], ["tasks"]),
        (["moe", "task.search.expret=x"], ["unknown key task.search.expret", "did you mean task.search.expert?"]),
        (["moe", "task.search.kind=ranking"], ["task.search.kind", "'ranking'", "link_prediction"]),
        (["moe", "encoder.layer=mod2"], ["encoder: MoEEncoder has no argument 'layer'", "did you mean layers?"]),
        (["moe", "encoder.attention=maybe"], ["encoder.attention", "'maybe'"]),
        (
            ["moe", "encoder._target_=os.system"],
            ["encoder._target_: expected a class from datamodules or lightning_modules, got 'os.system'"],
        ),
        (["moe", "encoder._target_=lightning_modules.encoders.moe.MOE"], ["has no class 'MOE'", "MoEEncoder"]),
        (["moe", "encoder._target_=lightning_modules.mo.X"], ["cannot import 'lightning_modules.mo'"]),
        (["moe", "encoder=moe"], ["encoder"]),
        (
            ["moe", "encoder._target_=lightning_modules.optim.OptimOptions"],
            ["expected a subclass of Encoder", "OptimOptions"],
        ),
        (
            ["moe", "callbacks.x._target_=lightning_modules.optim.OptimOptions"],
            ["callbacks.x._target_: expected a subclass of Callback"],
        ),
        (
            ["moe", "losses={a: {_target_: lightning_modules.auxiliary.auxiliary_loss.AuxiliaryLoss}}"],
            ["losses.a._target_: expected a concrete class, got the abstract class"],
        ),
        (["moe", "experiment=vanilla"], ["the experiment is the first argument"]),
        (["moe", "tasks=[search,search]"], ["tasks: each task may be named only once"]),
        (["moe", "run.seed=-1"], ["run.seed: expected a number of at least 0 and at most 4294967295, got -1"]),
        (["moe", "data.max_length=2"], ["data.max_length: expected a number of at least 3, got 2"]),
        (["moe", "evaluation.metrics=[]"], ["evaluation.metrics: name at least one"]),
        (["moe", "evaluation.metrics=[ndgc@10]"], ["evaluation.metrics: metric 'ndgc@10'"]),
        (["moe", "optim.beta1=2"], ["optim.beta1: expected a number of at least 0 and below 1, got 2"]),
        (["moe", "optim.lr=.inf"], ["optim.lr: expected a number above 0"]),
        (["moe", "backbone.dropout=2"], ["backbone.dropout: expected a number of at least 0 and below 1, got 2"]),
        (["moe", "trainer.accelerator=nope"], ["trainer.accelerator", "'nope'", "cpu"]),
        (["moe", "trainer.devices=0"], ["trainer.devices: expected a number above 0, or -1 for all GPUs, got 0"]),
        (["moe", "trainer.num_nodes=0"], ["trainer.num_nodes: expected a number of at least 1"]),
        (["moe", "trainer.strategy=deepspeed"], ["trainer.strategy", "'deepspeed'", "fsdp"]),
        (["moe", "trainer.strategy=fsdp"], ["trainer.strategy: fsdp shards weights over ranks, but there is only one"]),
        (
            ["moe", "trainer.strategy=fsdp", "trainer.devices=2", "objective.learn_temperature=one"],
            ["fsdp does not support objective.learn_temperature=one; set ddp, or objective.learn_temperature=no"],
        ),
        (
            ["moe", "trainer.strategy=fsdp", "trainer.num_nodes=2", "objective.balance=uncertainty"],
            ["fsdp does not support objective.balance=uncertainty"],
        ),
        (
            ["moe", "trainer.strategy=fsdp", "trainer.devices=2", "trainer.precision=fp16"],
            ["fsdp does not support trainer.precision=fp16; set ddp, or bf16"],
        ),
        (["moe", "callbacks.mine.x=1"], ["callbacks.mine: expected a node with _target_"]),
        (["moe", "task.search.data.searches.view=[a]"], ["task.search.data.searches.view"]),
        (
            ["moe", "task.search.data.mine._target_=datamodules.readers.beir.BeirReader"],
            ["needs the argument 'folder'"],
        ),
        (["moe", "data.root=${nowhere}"], ["nowhere"]),
        (
            ["moe", "objective.vector_teacher=start"],
            ["objective.vector_teacher: expected keys below it (model, weight, loss", "got 'start'"],
        ),
        (["moe", "optim=[1]"], ["command line (optim=[1]): optim: expected keys below it (lr, "]),
        (
            [
                "moe_mined",
                "mining.judge={_target_: lightning_modules.mining.relabel.FileJudge, path: x, drop_above: .nan}",
            ],
            ["mining.judge.drop_above: expected a number, got nan"],
        ),
        (["moe", "optim.lr={"], ["command line: 'optim.lr={' cannot be read"]),
        (
            ["moe", "wandb.name=run #3"],
            ["the value of 'wandb.name=run #3' is read as 'run'; put it in quotes"],
        ),
        (["moe", "run.dir=a\nb"], ["is read as 'a b'; put it in quotes"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_name_the_key_the_value_and_what_is_expected(arguments, messages):
    error = error_of(*arguments)
    for message in messages:
        assert message in error


@pytest.fixture
def experiments_folder(tmp_path, monkeypatch):
    """A copy of experiments/ that a test may break."""
    for path in module.FOLDER.rglob("*.yaml"):
        copy = tmp_path / "experiments" / path.relative_to(module.FOLDER)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    monkeypatch.setattr(module, "FOLDER", tmp_path / "experiments")
    return tmp_path / "experiments"


def test_errors_in_files_name_the_file(experiments_folder):
    (experiments_folder / "mine.yaml").write_text("encoder:\n  _target_: x\nobjective: {guide: bert}\n")
    assert "objective.guide: expected keys below it (model, margin, kind, similarity), got 'bert'" in error_of("mine")
    (experiments_folder / "mine.yaml").write_text("encoder:\n  _target_: x\noptim: {lrr: 1}\n")
    assert "experiments/mine.yaml: unknown key optim.lrr" in error_of("mine")
    (experiments_folder / "mine.yaml").write_text("encoder: {a: [}\n")
    assert "experiments/mine.yaml" in error_of("mine")
    (experiments_folder / "mine.yaml").write_text("- a\n")
    assert "experiments/mine.yaml: expected a YAML mapping" in error_of("mine")
    (experiments_folder / "mine.yaml").write_text("tasks: [search]\n")
    assert "encoder" in error_of("mine")
    (experiments_folder / "scale" / "sample.yaml").write_text("data: {batch_size: many}\n")
    assert "experiments/scale/sample.yaml: data.batch_size" in error_of("moe")


def test_new_task_and_new_scale_need_one_file_each(experiments_folder):
    reader = "{_target_: datamodules.sample.SampleReader, view: searches}"
    task = f"kind: search\nexpert: review\ndata:\n  sample:\n    r: {reader}\n"
    (experiments_folder / "tasks" / "review.yaml").write_text(task)
    config = load_config("moe", ["tasks=[search,review]"])
    assert config.task["review"].expert == "review"
    (experiments_folder / "scale" / "mine.yaml").write_text("optim: {lr: 0.125}\n")
    assert "task classification has no data at scale mine" in error_of("moe", "scale=mine")
    (experiments_folder / "scale" / "mine.yaml").write_text(
        "task: {search: {data: {own: {_target_: datamodules.readers.beir.BeirReader, folder: x}}}}\ntasks: [search]\n"
    )
    assert load_config("moe", ["scale=mine"]).task["search"].data["own"]["folder"] == "x"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("kind: [", "tasks/mine.yaml"),
        ("kidn: search\n", "tasks/mine.yaml: unknown key task.mine.kidn"),
        ("kind: ranking\n", "tasks/mine.yaml: task.mine.kind"),
        ("- search\n", "tasks/mine.yaml: expected a YAML mapping"),
        ("data: [search]\n", "tasks/mine.yaml: task.mine.data: expected a block for each scale"),
        ("expert: ${nowhere}\n", "nowhere"),
        ("kind: search\n", "no value for task.mine.expert"),
    ],
)
def test_broken_task_file_is_an_error_only_for_experiments_that_name_the_task(
    experiments_folder, content, reason, caplog
):
    (experiments_folder / "tasks" / "mine.yaml").write_text(content)
    assert list(load_config("moe").task) == ["classification", "link_prediction", "search"]
    if "tasks/mine.yaml" in reason:
        assert "task mine is ignored: " in caplog.text
    assert reason in error_of("moe", "tasks=[search,mine]")


def test_targets_are_checked_converted_and_built():
    node = {"_target_": "datamodules.sample.SampleReader", "view": "topics", "num_papers": "500"}
    checked = check_target("here", node)
    assert checked == node | {"num_papers": 500}
    assert instantiate(checked, "here").num_papers == 500
    folder = {"_target_": "datamodules.readers.beir.BeirReader", "folder": 2024}
    assert check_target("here", folder)["folder"] == "2024"
    encoder = {"_target_": "lightning_modules.encoders.moe.MoEEncoder", "layers": [1], "normalize": "no"}
    provided = ("backbone", "tokenizer", "tasks")
    assert check_target("encoder", encoder, provided=provided) == encoder | {"normalize": False}
    with pytest.raises(UserError, match=r"here\.num_papers"):
        check_target("here", node | {"num_papers": "many"})


def test_errors_about_arguments_of_a_node_name_its_key():
    miner = check_target("here", {"_target_": "lightning_modules.mining.miners.RandomWalkMiner", "steps": 1})
    with pytest.raises(UserError, match=r"^mining\.miner\.steps: expected a number of at least 2, got 1$"):
        instantiate(miner, "mining.miner")
    reader = check_target(
        "here", {"_target_": "datamodules.readers.jsonl.JsonlReader", "dev_percent": 100}, provided=["folder"]
    )
    with pytest.raises(UserError, match=r"^task\.search\.data\.mine\.dev_percent: expected"):
        instantiate(reader, "task.search.data.mine", folder="mine")
    reader = check_target("here", {"_target_": "datamodules.readers.dpr.DprReader"})
    with pytest.raises(UserError, match=r"^task\.search\.data\.mine: DprReader: expected a file"):
        instantiate(reader, "task.search.data.mine")
    loss = check_target("here", {"_target_": "lightning_modules.auxiliary.group.GroupLoss", "weight": 0.5})
    with pytest.raises(UserError, match=r"^weight: expected"):  # an argument of the project's own
        instantiate({"_target_": loss["_target_"]}, "losses.group", weight=-1)


def test_moved_class_loads_under_its_old_path_and_keeps_the_run_folder(monkeypatch):
    old, new = "lightning_modules.encoders.former.MoEEncoder", "lightning_modules.encoders.moe.MoEEncoder"
    before = load_config("moe")
    monkeypatch.setitem(MOVED, old, new)
    settings = as_dict(before)
    settings["encoder"] |= {"_target_": old}
    loaded = from_dict(settings, "config.yaml")
    assert loaded == before  # including the arguments, which another class would not inherit
    assert load_config("moe", [f"encoder._target_={old}"]) == before
    text = json.dumps(as_dict(before))
    assert with_first_paths(text) == text.replace(new, old)  # this text is hashed for the run's folder


def test_every_moved_class_is_at_its_new_path():
    for path in MOVED.values():
        module_name, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module_name), name)


@pytest.mark.parametrize("order", [1, -1])
def test_mapping_replaces_the_old_one(order):
    """Also if single keys, which add to it, come first. Settings and arguments of a class keep their other values."""
    overrides = [
        "losses.cross_task.teachers={search: [classification]}",
        "losses.cross_task.teachers.link_prediction=[search]",
        "optim.lr_scale={}",
        "trainer={max_steps: 7}",
        "losses.cross_task={temperature: 2.0}",
    ]
    config = load_config("cross_distillation", overrides[::order])
    loss = config.losses["cross_task"]
    assert loss["teachers"] == {"search": ["classification"], "link_prediction": ["search"]}
    assert (loss["temperature"], loss["weight"], config.trainer.max_steps) == (2.0, 1.0, 7)
    assert config.trainer.log_every_n_steps == load_config("moe").trainer.log_every_n_steps
    assert load_config("graph_prompt").optim.lr_scale == {"features": 10}
    assert load_config("graph_prompt", ["optim.lr_scale={}"]).optim.lr_scale == {}


def test_null_removes_a_collection():
    nodes = "task.search.data.mine={_target_: datamodules.sample.SampleReader, view: searches}"
    config = load_config("moe", ["tasks=[search]", nodes, "task.search.data.searches=null"])
    assert list(config.task["search"].data) == ["mine"]
    with pytest.raises(UserError, match="task search has no data at scale sample"):
        load_config("moe", ["task.search.data.searches=null"])


@pytest.mark.parametrize(
    ("word", "ours"),
    [
        ("optim.learning_rate", "optim.lr"),
        ("learning_rate", "optim.lr"),
        ("trainer.gradient_accumulation_steps", "trainer.accumulate_grad_batches"),
        ("trainer.gpus", "trainer.devices"),
        ("data.max_seq_length", "data.max_length"),
    ],
)
def test_names_of_other_trainers_are_translated(word, ours):
    assert f"did you mean {ours}?" in error_of("moe", f"{word}=1")


def test_runs_of_machines_with_more_hardware_and_packages_are_read(monkeypatch):
    settings = as_dict(load_config("moe"))
    settings["trainer"]["accelerator"], settings["backbone"]["lora"]["rank"] = "gpu", 8
    settings["loggers"] = ["tensorboard"]
    for package in ("peft", "tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert as_dict(from_dict(settings, "config.yaml")) == settings
    for override in ("trainer.accelerator=gpu", "trainer.devices=-1", "loggers=[tensorboard]", "backbone.lora.rank=8"):
        with pytest.raises(UserError, match=r"there is no GPU|is not installed \(pip install"):
            load_config("moe", [override])
