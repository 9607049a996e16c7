"""Names that files are called after are checked where they enter, so nothing is read or written outside its folder."""

import json

import numpy as np
import pytest
import torch
import yaml

from datamodules.conversion import write
from datamodules.hard_negatives import HardNegativeStore, write_store
from datamodules.readers.beir import write_beir
from datamodules.readers.collecting import check_collection
from datamodules.records import Benchmark, Collection, Document, MinedNegatives, Task, UserError, check_name
from datamodules.tasks import SearchDataModule
from experiments import evaluate, export
from experiments.build.models import System, short_name, stem
from experiments.config.experiment import as_dict, folder_of, from_dict, load_config
from experiments.config.run_config import config_of_run
from experiments.config.schema import DataConfig
from experiments.download.recipe import load_recipe
from experiments.results.results import tables_from_json
from lightning_modules.encoders.loading import describe, load_encoder
from tests.conftest import toy_collection

OUTSIDE = ("../victim", "../../victim", "/tmp/victim", "a/../../victim", "..", "victim/../../x", "a\\..\\victim")
BAD = (
    *OUTSIDE,
    "",
    ".",
    ".git",
    "a/b",
    "x\n",
    "x\0y",
    "\x1b[31m",
    "a\u2028b",
    "a\u202eb",
    " x",
    "x ",
    "con",
    "NUL.txt",
)
BAD += ("x" * 121, "é" * 61, "\udc80", "\x85")
GOOD = ("search", "link_prediction", "[v2]", "CORE17", "my set", "日本語", "a.b", "x-y", "c", "console", "1")


@pytest.mark.parametrize("name", [*BAD, None, 3, ["a"]])
def test_bad_names_are_refused(name):
    with pytest.raises(UserError, match="cannot be part of a file's name"):
        check_name("task", name)


@pytest.mark.parametrize("name", GOOD)
def test_good_names_can_be_file_names(name, tmp_path):
    check_name("task", name)
    (tmp_path / f"{name}.{name}.queries.tsv").touch()


def saved(make_encoder, tmp_path, name):
    """Save a checkpoint, and rename one of its tasks."""
    encoder = make_encoder("shared", tasks={"search": "search"})
    description = describe(encoder)
    description["arguments"] = description["arguments"] | {"tasks": {name: "search"}}
    path = tmp_path / "inner" / "model.ckpt"
    path.parent.mkdir(exist_ok=True)
    torch.save({"encoder": description, "state_dict": {}, "global_step": 1}, path)
    return path


def exported(make_encoder, tmp_path, name):
    """Save an encoder as a folder like those on the hub, and rename one of its tasks."""
    encoder = make_encoder("shared", tasks={"search": "search"})
    folder = encoder.save_pretrained(tmp_path / "inner" / "hub")
    config = json.loads((folder / "config.json").read_text())
    config["arguments"]["tasks"] = {name: "search"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def config_with(change):
    settings = as_dict(load_config("vanilla", ["tasks=[search]"]))
    change(settings)
    return from_dict(settings, "config.yaml")


def rename_task(settings, name):
    settings["task"][name] = settings["task"].pop("search")
    settings["tasks"] = [name]


def rename_collection(settings, name):
    data = settings["task"]["search"]["data"]
    data[name] = data.pop("searches")


def negatives_of(folder, name):
    mined = MinedNegatives(np.zeros(1, dtype=np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0))
    store = write_store(folder / "inner" / "store", {"search": mined}, {})
    meta = json.loads((store.path / "meta.json").read_text())
    meta["tasks"][name] = meta["tasks"].pop("search")
    (store.path / "meta.json").write_text(json.dumps(meta))
    return HardNegativeStore(store.path)


def stream_with_split(name):
    def stream(sink):
        sink.add_document(Document("d", "a"))
        sink.add_query(Document("q", "a"))
        sink.add_judgement(name, "q", "d", 1)

    return stream


def recipe_with_file(folder, name):
    path = folder / "inner" / "recipe.yaml"
    source = {"page": "p", "terms": "t", "url": "https://x", "files": {name: {"sha256": None}}}
    output = {"reader": {"_target_": "datamodules.readers.beir.BeirReader", "folder": "s:"}}
    path.write_text(json.dumps({"sources": {"s": source}, "outputs": {"o": output}}))
    return load_recipe(str(path))


def with_split(name):
    toy = toy_collection()
    return Collection(toy.corpus, toy.queries, {name: toy.qrels["train"]})


def converted(folder, name):
    folder = folder / "inner" / "converted"
    folder.mkdir()
    return write(stream_with_split(name), folder)


# Each place where a name enters: a call with the name, and a folder to work in.
PLACES = {
    "task": lambda name, _: Task(name),
    "collection": lambda name, _: SearchDataModule("search", {name: toy_collection()}),
    "benchmark": lambda name, _: Benchmark(name, "search", "test", {}, {}, {}),
    "system": lambda name, _: System(name, "bm25", None, "bm25"),
    "benchmark in results.json": lambda name, _: tables_from_json({name: {"systems": {}}}),
    "system in results.json": lambda name, _: tables_from_json({"search": {"systems": {name: {}}}}),
    "split that is read": lambda name, _: check_collection(with_split(name), "source"),
    "split that is written": lambda name, folder: write_beir(with_split(name), folder / "inner" / "beir"),
    "split that is converted": lambda name, folder: converted(folder, name),
    "mined negatives": lambda name, folder: negatives_of(folder, name),
    "task of a configuration": lambda name, _: config_with(lambda settings: rename_task(settings, name)),
    "collection of a configuration": lambda name, _: config_with(lambda settings: rename_collection(settings, name)),
    "file of a recipe": lambda name, folder: recipe_with_file(folder, name),
    "evaluate task=": lambda name, _: evaluate.main(["model=bm25", "beir=x", f"task={name}"]),
    "evaluate split=": lambda name, _: evaluate.main(["model=bm25", "beir=x", "task=a", f"split={name}"]),
    "export task=": lambda name, folder: export.main([f"model={folder}", f"task={name}"]),
}
NEEDS_ENCODER = {"checkpoint": saved, "hub folder": exported}
# An empty option is the same as none, and a recipe's file may be in a subfolder.
REFUSAL = r"cannot be part of a file's name|expected the name of a file|invalid Unicode"  # the last one by YAML
HARMLESS = {("evaluate task=", ""), ("evaluate split=", ""), ("file of a recipe", "a/b")}


def tree(folder):
    return {
        path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*") if "inner" not in path.parts
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Work two folders below a file that nothing may touch."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "README.md").write_text("mine")
    (tmp_path / "work" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "inner")
    return tmp_path / "work"


@pytest.mark.parametrize("place", PLACES)
def test_every_place_refuses_bad_names_and_writes_nothing(place, folder):
    before = tree(folder.parent)
    for name in BAD:
        if (place, name) not in HARMLESS:
            with pytest.raises(UserError, match=REFUSAL):
                PLACES[place](name, folder)
            for path in (folder / "inner").rglob("*"):
                assert path.resolve().is_relative_to(folder / "inner")
            for made in ("converted", "store"):
                if (folder / "inner" / made).exists():
                    (folder / "inner" / made).rename(folder / "inner" / f"{made}-{BAD.index(name)}")
    assert tree(folder.parent) == before


@pytest.mark.parametrize("place", NEEDS_ENCODER)
def test_models_with_bad_names_are_refused(place, folder, make_encoder):
    before = tree(folder.parent)
    for name in BAD:
        path = NEEDS_ENCODER[place](make_encoder, folder, name)
        with pytest.raises(UserError, match="cannot be part of a file's name"):
            load_encoder(path)
    for name in OUTSIDE:
        path = NEEDS_ENCODER[place](make_encoder, folder, name)
        with pytest.raises(UserError, match="cannot be part of a file's name"):
            export.main([f"model={path}", "task=all", f"output={folder / 'inner' / 'out'}"])
    assert tree(folder.parent) == before


def test_names_of_trials_are_checked(monkeypatch):
    config = load_config("vanilla", [])
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    for name in OUTSIDE:
        monkeypatch.setenv("WANDB_RUN_ID", name)
        with pytest.raises(UserError, match="WANDB_RUN_ID"):
            folder_of(config)


def test_models_are_named_after_their_folder(folder, monkeypatch):
    """`model=..` was called "..", and `model=.` had no name."""
    assert stem(".") == stem("../inner") == "inner"
    assert stem("..") == "work"
    for model in (".", "..", "hub/name", "x" * 200, str(folder)):
        check_name("system", short_name(model))
        check_name("system", stem(model))


@pytest.mark.parametrize("exists", [False, True])
def test_reading_a_run_creates_no_cache_where_its_file_says(tmp_path, exists):
    """The run may come from somebody else."""
    cache, run = tmp_path / "elsewhere", tmp_path / "run"
    run.mkdir()
    if exists:
        cache.mkdir()
    config = as_dict(load_config("vanilla", [f"data.cache={cache}"]))
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert config_of_run(run).data.cache == (str(cache) if exists else DataConfig.cache)
