"""Small YAML files that would expand, nest or block without end are refused at once."""

import os

import pytest
import yaml

from datamodules.records import UserError
from experiments.build.suite import load_suite
from experiments.config import experiment
from experiments.config.experiment import as_dict, load_config, read_config
from experiments.config.structured import LOADER, MAX_DEPTH, read_yaml, yaml_text
from experiments.config.sweep_file import read_sweep
from experiments.download.recipe import load_recipe

# Without the checks, these files hang the process or fill the memory.
pytestmark = pytest.mark.usefixtures("time_limit")


def aliases(count: int) -> str:
    """Return a list of lists in which each level contains the level below nine times."""
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, count)]
    return "\n".join(levels)


def pipe(path):
    os.mkfifo(path)


def link_to_zeros(path):
    path.symlink_to("/dev/zero")


def text(content):
    return lambda path: path.write_text(content)


BOMBS = {
    "aliases": (text(aliases(12)), "more than 100,000 values"),
    "aliases in keys": (text(aliases(12) + "\nencoder: *a11"), "more than 100,000 values"),
    "merged aliases": (text("a: &a {x: 1}\n" + "b: &b {<<: *a, y: *b}"), "contains itself"),
    "itself": (text("a: &a [*a]"), "contains itself"),
    "deep lists": (text("a: " + "[" * 100_000), "nested deeper than 50 levels"),
    "deep mappings": (text("a: " + "{b: " * 100_000), "nested deeper than 50 levels"),
    "deep blocks": (text("".join(f"{' ' * i}a:\n" for i in range(1000))), "nested deeper than 50 levels"),
    "pipe": (pipe, "expected a regular file"),
    "device": (link_to_zeros, "expected a regular file"),
    "large": (text("a: " + "x" * 20_000_000), "expected at most 10,000,000 bytes"),
    "many values": (text("a: [" + "1, " * 200_000 + "1]"), "more than 100,000 values"),
}


def read_task(path, monkeypatch):
    monkeypatch.setattr(experiment, "FOLDER", path.parent)
    return experiment._read_task(path, "sample")


# Every place that reads a YAML file: a call with its path.
PLACES = {
    "any file": lambda path, _: read_yaml(path),
    "task": read_task,
    "run": lambda path, _: read_config(path.parent),
    "sweep": lambda path, _: read_sweep(str(path), "moe"),
    "recipe": lambda path, _: load_recipe(str(path)),
    "suite": lambda path, _: load_suite([path]),
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("place", PLACES)
def test_files_that_would_not_end_raise_user_error(tmp_path, monkeypatch, place, bomb):
    make, message = BOMBS[bomb]
    path = tmp_path / "config.yaml"
    make(path)
    monkeypatch.setattr(experiment, "_display_path", str)
    with pytest.raises(UserError, match=message):
        PLACES[place](path, monkeypatch)


def test_references_in_the_configuration_of_a_run_are_refused(tmp_path):
    """Twenty references that double each other are a million words, and the environment is nobody's business."""
    settings = as_dict(load_config("vanilla", []))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert read_config(tmp_path) == settings
    for value in ("${run.seed}${run.seed}", "${oc.env:HOME}"):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings | {"experiment": value}))
        with pytest.raises(UserError, match=r"config.yaml: cannot be read \(contains a reference"):
            read_config(tmp_path)


def test_ordinary_files_are_read_as_before(tmp_path):
    depth = "a: " + "[" * (MAX_DEPTH - 3) + "1" + "]" * (MAX_DEPTH - 3)
    for content in ("a: &a {x: 1e-3}\nb: *a\nc: {<<: *a, y: [*a, *a]}", depth, "# nothing\n{}", "a: ü"):
        path = tmp_path / "file.yaml"
        path.write_text(content)
        assert yaml.load(yaml_text(path), Loader=LOADER) == yaml.safe_load(content)


def test_deeply_nested_values_on_the_command_line_raise_user_error():
    for value in ("[" * 3000 + "]" * 3000, "{a: " * 3000 + "}" * 3000):
        with pytest.raises(UserError, match="command line"):
            load_config("moe", [f"optim.lr={value}"])
