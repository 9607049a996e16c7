"""What an experiment is made of: a closed schema, filled from files in a fixed order.

    schema <- base.yaml <- scale/<SCALE>.yaml <- tasks/*.yaml <- <EXPERIMENT>.yaml <- key=value

What the project closes is a field in schema.py. What users extend is a node with `_target_` (targets.py): the encoder,
callbacks and readers of data. Both are checked here, at load, and after load there are plain dataclasses.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from datamodules.records import UserError
from datamodules.tasks import Reader
from experiments.config.merging import first_line, merge, refuse_unknown_keys
from experiments.config.moved import with_first_paths
from experiments.config.own_data import replaced, with_reader
from experiments.config.ranges import check_ranges
from experiments.config.schema import Config, TaskConfig
from experiments.config.suggest import OF_MAKE, did_you_mean
from experiments.config.targets import READERS, check_target
from lightning_modules.encoders.base import Encoder
from lightning_modules.mining.miners import Miner

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parents[1]
RESERVED = ("base",)  # YAML files beside the experiments that are none


def names(folder: Path, reserved: Sequence[str] = ()) -> list[str]:
    """The YAML files of a folder by name, without ending."""
    return sorted(path.stem for path in folder.glob("*.yaml") if path.stem not in reserved)


def experiments() -> list[str]:
    return names(FOLDER, RESERVED)


def scales() -> list[str]:
    return names(FOLDER / "scale")


def load_config(experiment: str, overrides: Sequence[str] = (), own: Sequence[str] = ()) -> Config:
    """The configuration of an experiment.

    overrides: "key=value", the scale among them. own: further keys that the caller takes, for whoever misspells them.
    Raises UserError naming file and key, what came and what is allowed.
    """
    overrides = [_checked_override(text) for text in overrides]
    chosen = [text.partition("=")[2] for text in overrides if text.startswith("scale=")]
    scale = chosen[-1] if chosen else Config.scale
    _one_of("experiment", experiment, experiments())
    _one_of("scale", scale, scales())

    layers, broken = _layers(experiment, scale)
    config = OmegaConf.structured(Config)
    for source, layer in layers:
        config = merge(config, layer, source)
    known = sorted(config.task)
    config = _with_command_line(config, overrides, (*own, *OF_MAKE))
    for name, error in broken.items():
        if OmegaConf.is_missing(config, "tasks") or name in config.tasks:
            raise error
        log.warning("task %s is left out: %s", name, error)
    strange = set(config.task) - {*known, *broken}
    done = _finish(config)
    for name in strange - set(done.tasks):
        _one_of("task", name, known)
    return done


def _layers(experiment: str, scale: str) -> tuple[list[tuple[str, DictConfig]], dict[str, UserError]]:
    """The files' settings with their names, in their order; and what is wrong with the files of some tasks.

    A task's file that cannot be used matters to who names the task alone.
    """
    layers = [("the schema", OmegaConf.create({"experiment": experiment, "scale": scale}))]
    for path in (FOLDER / "base.yaml", FOLDER / "scale" / f"{scale}.yaml"):
        layers.append((_shown(path), _read(path)))
    broken: dict[str, UserError] = {}
    for name in names(FOLDER / "tasks"):
        path = FOLDER / "tasks" / f"{name}.yaml"
        try:
            layers.append((_shown(path), OmegaConf.create({"task": {name: _task(path, scale)}})))
        except UserError as error:
            broken[name] = error
    path = FOLDER / f"{experiment}.yaml"
    layers.append((_shown(path), _read(path)))
    return layers, broken


def _with_command_line(config: DictConfig, overrides: Sequence[str], beside: Sequence[str]) -> DictConfig:
    """The overrides over config. make gives them in any order, so what replaces data goes first, and the whole data of
    a task before single collections. beside: as for merge."""
    known = set(config.task)
    given = [(text, layer := _parsed(text), replaced(text, layer)) for text in overrides]

    def turn(one: tuple[str, DictConfig, tuple[str, str | None] | None]) -> int:
        place = one[2]
        return 2 if place is None else 0 if place[1] is None else 1

    for text, layer, place in sorted(given, key=turn):
        if place and place[0] in known:
            task, name = place
            data = config.task[task].data
            data.clear() if name is None else data.pop(name, None)
        config = merge(config, layer, f"the command line ({text})", beside)
    return config


def as_dict(config: Config) -> dict[str, Any]:
    """The configuration in plain containers."""
    return dataclasses.asdict(config)


def from_dict(settings: Mapping[str, Any], source: str) -> Config:
    """A configuration that as_dict wrote, for instance a run's config.yaml. source: its name in errors."""
    return _finish(merge(OmegaConf.structured(Config), OmegaConf.create(dict(settings)), source))


def digest(config: Config) -> str:
    """Six characters that differ for different experiments; where a run lies and how it logs does not count."""
    settings = as_dict(config)
    settings["run"].pop("dir"), settings["run"].pop("resume"), settings.pop("wandb")
    text = with_first_paths(json.dumps(settings, sort_keys=True))
    return hashlib.blake2b(text.encode(), digest_size=3).hexdigest()


def _shown(path: Path) -> str:
    return str(path.relative_to(FOLDER.parent))


def _one_of(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UserError(f"unknown {what} {value!r}: {did_you_mean(value, allowed)}there are {', '.join(allowed)}")


def _checked_override(text: str) -> str:
    key, equals, _ = text.partition("=")
    if not equals or not key:
        raise UserError(f"the command line: expected key=value, got {text!r}")
    if key == "experiment":
        raise UserError("the command line: the experiment is the first argument, and no key (make train EXP=...)")
    return text


def _parsed(text: str) -> DictConfig:
    try:
        return OmegaConf.create(_without_none(OmegaConf.to_container(OmegaConf.from_dotlist([text]))))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"the command line: {text!r} is not readable ({first_line(error)})") from error


def _without_none(node: Any) -> Any:
    """None means null: W&B's agent writes values as Python prints them."""
    if isinstance(node, dict):
        return {key: _without_none(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_without_none(value) for value in node]
    return None if node == "None" else node


def _read(path: Path) -> DictConfig:
    try:
        node = OmegaConf.load(path)
    except (OmegaConfBaseException, yaml.YAMLError, OSError) as error:
        raise UserError(f"{_shown(path)}: {' '.join(str(error).split())}") from error
    if not isinstance(node, DictConfig):
        raise UserError(f"{_shown(path)}: expected keys with values")
    return node


def _task(path: Path, scale: str) -> DictConfig:
    """A task's file with the data of one scale; a scale that the file does not know may bring its own."""
    task, source, prefix = _read(path), _shown(path), f"task.{path.stem}."
    blocks = task.pop("data", None) or {}
    if not isinstance(blocks, DictConfig | dict):
        raise UserError(f"{source}: {prefix}data: expected a block for each scale, got {blocks!r}")
    if scale in blocks:
        task["data"] = blocks[scale]
    refuse_unknown_keys(TaskConfig, task, prefix, source)
    try:
        OmegaConf.merge(OmegaConf.structured(TaskConfig), task)
    except OmegaConfBaseException as error:
        raise UserError(f"{source}: {prefix}{error.full_key}: {first_line(error)}") from error
    return task


def _finish(config: DictConfig) -> Config:
    """Resolved and checked, as dataclasses. Of tasks that are not named nothing is wanted, so nothing may be wrong."""
    known = sorted(config.task)
    try:
        for name in [] if OmegaConf.is_missing(config, "tasks") else set(known) - set(config.tasks):
            del config.task[name]
        OmegaConf.resolve(config)
        missing = OmegaConf.missing_keys(config)
        if missing:
            raise UserError(f"no value for {', '.join(sorted(missing))}")
        done: Config = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise UserError(f"{where}{first_line(error)}") from error
    if not done.tasks:
        raise UserError("tasks: name at least one")
    if len(set(done.tasks)) < len(done.tasks):
        raise UserError(f"tasks: each may be named once, got {', '.join(done.tasks)}")
    for name in done.tasks:
        _one_of("task", name, known)
        done.task[name].data = {key: node for key, node in done.task[name].data.items() if node is not None}
        if not done.task[name].data:
            raise UserError(
                f"task {name} has no data at scale {done.scale}: "
                f"add a block data.{done.scale} to experiments/tasks/{name}.yaml, or set task.{name}.data=FOLDER"
            )
    done.task = {name: done.task[name] for name in done.tasks}
    check_ranges(done)
    given = ("backbone", "tokenizer", "tasks", "instructions", "max_length")
    done.encoder = check_target("encoder", done.encoder, Encoder, given)
    done.callbacks = {name: check_target(f"callbacks.{name}", node, Callback) for name, node in done.callbacks.items()}
    done.mining.miner = check_target("mining.miner", done.mining.miner, Miner)
    for name, node in done.mining.miners.items():
        _one_of("task in mining.miners", name, done.tasks)
        done.mining.miners[name] = check_target(f"mining.miners.{name}", node, Miner) if node else None
    for task, settings in done.task.items():
        for name, node in settings.data.items():
            key = f"task.{task}.data.{name}"
            settings.data[name] = check_target(key, with_reader(key, node), Reader, home=READERS)
    return done
