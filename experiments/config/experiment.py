"""Load an experiment: a closed schema, filled from files in a fixed order.

    schema <- base.yaml <- scale/<SCALE>.yaml <- tasks/*.yaml <- <EXPERIMENT>.yaml <- key=value

Closed settings are fields in schema.py. What users extend is a node with `_target_` (targets.py): the encoder,
callbacks, miners and readers. Everything is checked here, at load; the result is plain dataclasses.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lightning import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from datamodules.options import check_options, option
from datamodules.records import UserError
from datamodules.tasks import Reader
from experiments.config.arguments import command_of, option_keys, parse_known
from experiments.config.constraints import check_constraints
from experiments.config.merging import check_override, merge, merge_overrides
from experiments.config.moved import with_first_paths
from experiments.config.schema import Config, TaskConfig
from experiments.config.structured import describe, read_yaml, refuse_unknown_keys
from experiments.config.suggest import MAKE_VARIABLES, unknown
from experiments.config.targets import READERS, check_target, with_reader
from lightning_modules.encoders.base import Encoder
from lightning_modules.mining.miners import Miner

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parents[1]
RESERVED = ("base",)  # YAML files in the folder of the experiments that are not experiments
ENCODER_ARGUMENTS = ("backbone", "tokenizer", "tasks", "instructions", "max_length")  # given by build_encoder


@dataclass(kw_only=True)
class ExperimentOptions:
    """Options of a command that takes an experiment."""

    experiment: str = option(help="name of a file in experiments/, such as moe", positional=True)


T = TypeVar("T", bound=ExperimentOptions)


def parse_experiment(options: type[T], arguments: Sequence[str]) -> tuple[T, Config]:
    """Return a command's options, and the configuration that the experiment and the other arguments ask for."""
    parsed, overrides = parse_overrides(options, arguments)
    return parsed, load_config(parsed.experiment, overrides, option_keys(options))


def parse_overrides(options: type[T], arguments: Sequence[str]) -> tuple[T, list[str]]:
    """Return a command's options, and the other arguments: keys of the experiment, not checked yet."""
    if not {"--help", "-h"}.intersection(arguments) and (not arguments or "=" in arguments[0]):
        example = f"{command_of(options)} moe"
        raise UserError(f"experiment: expected one of {', '.join(experiments())} as first argument ({example})")
    return parse_known(options, arguments)


def load_config(experiment: str, overrides: Sequence[str] = (), others: Sequence[str] = ()) -> Config:
    """Load the configuration of an experiment.

    overrides: key=value, for instance the scale. others: keys that the command itself takes, for suggestions.
    Raises UserError that names file and key, what is wrong, and what is expected.
    """
    overrides = [check_override(text) for text in overrides]
    scale = ([Config.scale] + [text.partition("=")[2] for text in overrides if text.startswith("scale=")])[-1]
    _check_name("experiment", experiment, experiments())
    _check_name("scale", scale, scales())

    config = OmegaConf.structured(Config)
    config = merge(config, OmegaConf.create({"experiment": experiment, "scale": scale}), "schema")
    for path in (FOLDER / "base.yaml", FOLDER / "scale" / f"{scale}.yaml"):
        config = merge(config, read_yaml(path, _shown(path)), _shown(path))
    tasks, broken = _read_tasks(scale)
    for source, layer in tasks:
        config = merge(config, layer, source)
    path = FOLDER / f"{experiment}.yaml"
    config = merge(config, read_yaml(path, _shown(path)), _shown(path))
    known_tasks = sorted(config.task)
    config = merge_overrides(config, overrides, (*others, *MAKE_VARIABLES))

    for name, error in broken.items():
        if OmegaConf.is_missing(config, "tasks") or name in config.tasks:
            raise error
        log.warning("task %s is ignored: %s", name, error)
    new_tasks = set(config.task) - {*known_tasks, *broken}
    finished = _finish(config)
    for name in new_tasks - set(finished.tasks):  # a misspelt task in task.NAME.key=value
        _check_name("task", name, known_tasks)
    return finished


def from_dict(settings: Mapping[str, Any], source: str) -> Config:
    """Return the configuration that as_dict wrote, for instance a run's config.yaml. source: its name, for errors."""
    return _finish(merge(OmegaConf.structured(Config), OmegaConf.create(dict(settings)), source))


def as_dict(config: Config) -> dict[str, Any]:
    """Return the configuration in plain containers."""
    return dataclasses.asdict(config)


def digest(config: Config) -> str:
    """Return six characters that differ between experiments. The run's folder and W&B settings do not count."""
    settings = as_dict(config)
    settings["run"].pop("dir"), settings["run"].pop("resume"), settings.pop("wandb")
    text = with_first_paths(json.dumps(settings, sort_keys=True))
    return hashlib.blake2b(text.encode(), digest_size=3).hexdigest()


def names(folder: Path, reserved: Sequence[str] = ()) -> list[str]:
    """Return the names of a folder's YAML files, without ending."""
    return sorted(path.stem for path in folder.glob("*.yaml") if path.stem not in reserved)


def experiments() -> list[str]:
    return names(FOLDER, RESERVED)


def scales() -> list[str]:
    return names(FOLDER / "scale")


def _shown(path: Path) -> str:
    return str(path.relative_to(FOLDER.parent))


def _check_name(what: str, name: str, expected: Sequence[str]) -> None:
    if name not in expected:
        raise unknown(what, name, expected)


def _read_tasks(scale: str) -> tuple[list[tuple[str, DictConfig]], dict[str, UserError]]:
    """Read all task files. Return (file, layer) of each, and the errors of broken files by task.

    A broken file is an error only for experiments that name its task.
    """
    layers, broken = [], {}
    for name in names(FOLDER / "tasks"):
        path = FOLDER / "tasks" / f"{name}.yaml"
        try:
            layers.append((_shown(path), OmegaConf.create({"task": {name: _read_task(path, scale)}})))
        except UserError as error:
            broken[name] = error
    return layers, broken


def _read_task(path: Path, scale: str) -> DictConfig:
    """Read a task's file, with the data of one scale. A scale that the file does not have may bring its own data."""
    source, prefix = _shown(path), f"task.{path.stem}."
    task = read_yaml(path, source)
    blocks = task.pop("data", None) or {}
    if not isinstance(blocks, DictConfig | dict):
        raise UserError(f"{source}: {prefix}data: expected a block for each scale, got {blocks!r}")
    if scale in blocks:
        task["data"] = blocks[scale]
    refuse_unknown_keys(TaskConfig, task, source, prefix)
    try:
        OmegaConf.merge(OmegaConf.structured(TaskConfig), task)
    except OmegaConfBaseException as error:
        raise UserError(f"{source}: {prefix}{describe(error)}") from error
    return task


def _finish(config: DictConfig) -> Config:
    """Resolve and check the configuration. Tasks that it does not name are dropped unchecked."""
    known_tasks = sorted(config.task)
    try:
        for name in [] if OmegaConf.is_missing(config, "tasks") else set(known_tasks) - set(config.tasks):
            del config.task[name]
        OmegaConf.resolve(config)
        if missing := OmegaConf.missing_keys(config):
            raise UserError(f"no value for {', '.join(sorted(missing))}")
        finished: Config = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(describe(error)) from error
    _check_tasks(finished, known_tasks)
    finished.task = {name: finished.task[name] for name in finished.tasks}
    check_options(finished)
    check_constraints(finished)
    _check_targets(finished)
    return finished


def _check_tasks(config: Config, known_tasks: Sequence[str]) -> None:
    """Check that the named tasks exist and have data. Collections set to null are removed."""
    if not config.tasks:
        raise UserError("tasks: name at least one")
    if len(set(config.tasks)) < len(config.tasks):
        raise UserError(f"tasks: each may be named once, got {', '.join(config.tasks)}")
    for name in config.tasks:
        _check_name("task", name, known_tasks)
        task = config.task[name]
        task.data = {key: node for key, node in task.data.items() if node is not None}
        if not task.data:
            raise UserError(
                f"task {name} has no data at scale {config.scale}: "
                f"add a block data.{config.scale} to experiments/tasks/{name}.yaml, or set task.{name}.data=FOLDER"
            )


def _check_targets(config: Config) -> None:
    """Check all `_target_` nodes against the signatures of their classes, and convert their arguments."""
    config.encoder = check_target("encoder", config.encoder, Encoder, ENCODER_ARGUMENTS)
    for name, node in config.callbacks.items():
        config.callbacks[name] = check_target(f"callbacks.{name}", node, Callback)
    config.mining.miner = check_target("mining.miner", config.mining.miner, Miner)
    for name, node in config.mining.miners.items():
        _check_name("task in mining.miners", name, config.tasks)
        config.mining.miners[name] = check_target(f"mining.miners.{name}", node, Miner) if node else None
    for task, settings in config.task.items():
        for name, node in settings.data.items():
            key = f"task.{task}.data.{name}"
            settings.data[name] = check_target(key, with_reader(key, node), Reader, package=READERS)
