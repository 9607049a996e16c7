"""Load an experiment. Files set its keys in a fixed order, then the command line, and then all are checked.

    schema <- base.yaml <- scale/<SCALE>.yaml <- tasks/*.yaml <- <EXPERIMENT>.yaml <- key=value

Fixed keys are fields in schema.py. Encoders, callbacks, miners and readers are nodes with `_target_` (targets.py), so
users can add their own. The result is plain dataclasses. A run saves it as config.yaml in its folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from datamodules.options import check_items, check_options, option
from datamodules.records import UserError, check_name
from experiments.config.arguments import command_of, option_keys, parse_known
from experiments.config.overrides import check_override, packages_in, parse_override, replaced_data
from experiments.config.schema import Config, TaskConfig, check_constraints, check_machine, settings_by_task
from experiments.config.structured import (
    LOADER,
    MERGE_ERRORS,
    describe,
    read_yaml,
    refuse_unknown_keys,
    restore_yes_and_no,
    unknown,
    yaml_text,
)
from experiments.config.targets import check_readers, check_targets, current_path, with_first_paths
from experiments.shared.plain import say

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parents[1]
# The folder with the Makefile. Outside the source tree, commands work in the current folder instead.
ROOT = FOLDER.parent if (FOLDER.parent / "Makefile").is_file() else Path.cwd()
RESERVED = ("base",)  # YAML files in this folder that are not experiments
EXPERIMENT_VARIABLES = ("EXP", "SCALE", "EXTRAS")  # variables of all make targets that take an experiment

# Files of a run, relative to its folder.
LAST = Path("checkpoints", "last.ckpt")
BEST = Path("checkpoints", "best.ckpt")
START, MERGED = Path("checkpoints", "start.ckpt"), Path("checkpoints", "merged.ckpt")
EXPERTS = "experts.svg"  # latest plot of tasks and experts
NEGATIVES = "negatives"  # mined hard negatives


@dataclass(kw_only=True)
class ExperimentOptions:
    """Options of a command that takes an experiment."""

    experiment: str = option(
        help="name of a file in experiments/, such as moe, or the path of your own file", positional=True
    )


T = TypeVar("T", bound=ExperimentOptions)


def parse_experiment(options: type[T], arguments: Sequence[str]) -> tuple[T, Config]:
    """Return a command's options and the configuration. All other arguments are keys of the experiment."""
    parsed, overrides = parse_overrides(options, arguments)
    return parsed, load_config(parsed.experiment, overrides, option_keys(options))


def parse_overrides(options: type[T], arguments: Sequence[str]) -> tuple[T, list[str]]:
    """Return a command's options, and the other arguments, which set keys of the experiment and are not checked yet.

    With --cfg, print the resolved configuration and exit.
    """
    only_shows, arguments = "--cfg" in arguments, [argument for argument in arguments if argument != "--cfg"]
    if not {"--help", "-h"}.intersection(arguments) and (not arguments or "=" in arguments[0]):
        example = f"{command_of(options)} moe"
        raise UserError(f"experiment: expected one of {', '.join(experiments())} as first argument ({example})")
    parsed, overrides = parse_known(options, arguments, Config)
    if packages := getattr(parsed, "packages", ()):  # both an option of commands that load a model, and a key
        overrides.append(f"extend.packages=[{','.join(packages)}]")
    if only_shows:
        config = load_config(parsed.experiment, overrides, option_keys(options))
        say(yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True).rstrip())
        sys.exit(0)
    return parsed, overrides


def load_config(
    experiment: str, overrides: Sequence[str] = (), others: Sequence[str] = (), *, checks_classes: bool = True
) -> Config:
    """Load the configuration of an experiment.

    overrides: key=value arguments. others: options of the command, to suggest if a key is misspelt.
    checks_classes: whether to check this machine and all `_target_` classes, which imports torch. The checks do not
        change settings, so commands that only show settings skip them.
    Raises UserError with the file, the key, what is wrong, and what is expected.
    """
    for text in overrides:
        check_override(text)
    path, folders = experiment_file(experiment), folders_of(experiment)
    scale = ([Config.scale] + [text.partition("=")[2] for text in overrides if text.startswith("scale=")])[-1]
    _check_known("scale", scale, scales(folders))

    config = OmegaConf.structured(Config)
    config = _merge(config, OmegaConf.create({"experiment": path.stem, "scale": scale}), "schema")
    scale_files = [file for each in folders if (file := each / "scale" / f"{scale}.yaml").exists()]
    for file in (FOLDER / "base.yaml", *scale_files):
        config = _merge(config, read_yaml(file, _display_path(file)), _display_path(file))
    tasks, broken = _read_tasks(scale, folders)
    for source, layer in tasks:
        config = _merge(config, layer, source)
    config = _merge(config, read_yaml(path, _display_path(path)), _display_path(path))
    known_tasks = sorted(config.task)
    config = _merge_overrides(config, overrides, (*others, *EXPERIMENT_VARIABLES))

    for name, error in broken.items():
        if OmegaConf.is_missing(config, "tasks") or name in config.tasks:
            raise error
        log.warning("task %s is ignored: %s", name, error)
    new_tasks = set(config.task) - {*known_tasks, *broken}
    finished = _finish(config, packages_in(overrides), checks_classes)
    if checks_classes:
        check_machine(finished)
    for name in new_tasks - set(finished.tasks):  # a misspelt task in task.NAME.key=value
        _check_known("task", name, known_tasks)
    return finished


def from_dict(settings: Mapping[str, Any], source: str, packages: Sequence[str] = ()) -> Config:
    """Rebuild a configuration from the output of as_dict.

    source: file name, for errors. packages: packages that the user allows now; those in the file do not count.
    """
    extend = settings.get("extend", {})
    if isinstance(extend, Mapping):
        settings = dict(settings) | {"extend": dict(extend) | {"packages": list(packages)}}
    return _finish(_merge(OmegaConf.structured(Config), OmegaConf.create(dict(settings)), source), packages)


def as_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as plain dicts and lists."""
    return dataclasses.asdict(config)


def digest(config: Config) -> str:
    """Return a hash of the configuration, six characters long. It ignores the run's folder and loggers."""
    settings = as_dict(config)
    settings["extend"].pop("packages")  # permission, not a setting
    settings["run"].pop("dir"), settings["run"].pop("resume"), settings.pop("wandb"), settings.pop("loggers")
    if settings["trainer"]["max_epochs"]:
        del settings["trainer"]["max_steps"]  # follows from the data
    text = with_first_paths(json.dumps(settings, sort_keys=True))
    return hashlib.blake2b(text.encode(), digest_size=3).hexdigest()


def folder_of(config: Config) -> Path:
    """Return the folder of a run: run.dir, the folder of a W&B trial, or one named by a hash of the configuration."""
    if config.run.dir:
        return Path(config.run.dir)
    if "WANDB_SWEEP_ID" in os.environ and "WANDB_RUN_ID" in os.environ:
        sweep, run = os.environ["WANDB_SWEEP_ID"], os.environ["WANDB_RUN_ID"]
        check_name("WANDB_SWEEP_ID", sweep)
        check_name("WANDB_RUN_ID", run)
        return Path("runs") / f"sweep-{sweep}" / run
    return Path("runs") / f"{config.experiment}-{config.scale}-seed{config.run.seed}-{digest(config)}"


def read_config(path: Path) -> dict[str, Any]:
    """Return a run's config.yaml as plain dicts and lists. Classes that have moved get their new paths."""
    file = path / "config.yaml"
    try:
        text = yaml_text(file)
        if "${" in text:  # a saved configuration has no references, which could expand forever
            raise yaml.YAMLError("contains a reference, ${...}")
        settings = yaml.load(text, Loader=LOADER)
        if not isinstance(settings, dict):
            raise yaml.YAMLError("it has no keys")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        advice = "To get this file again, add --cfg to the command that trained the run (python -m experiments.train)."
        raise UserError(f"{file}: cannot be read ({error}). {advice}") from error
    return _with_current_paths(settings)


def _with_current_paths(node: Any) -> Any:
    if isinstance(node, dict):
        return {
            key: current_path(value) if key == "_target_" and isinstance(value, str) else _with_current_paths(value)
            for key, value in node.items()
        }
    return [_with_current_paths(item) for item in node] if isinstance(node, list) else node


def yaml_names(folder: Path, reserved: Sequence[str] = ()) -> list[str]:
    """Return the names of a folder's YAML files without .yaml."""
    return sorted(path.stem for path in folder.glob("*.yaml") if path.stem not in reserved)


def experiments() -> list[str]:
    return yaml_names(FOLDER, RESERVED)


def scales(folders: Sequence[Path] = (FOLDER,)) -> list[str]:
    return sorted({name for folder in folders for name in yaml_names(folder / "scale")})


def experiment_file(experiment: str) -> Path:
    """Return the file of an experiment, which is a name or a path. Raises UserError if the file does not exist."""
    path = Path(experiment)
    if path.suffix in (".yaml", ".yml"):
        if not path.exists():
            raise UserError(f"experiment: {experiment} does not exist")
        check_name("experiment", path.stem)
        return path
    _check_known("experiment", experiment, experiments())
    return FOLDER / f"{experiment}.yaml"


def folders_of(experiment: str) -> list[Path]:
    """Return the folders with scale/, tasks/ and sweeps/: ours, then the folder of the user's own experiment."""
    folder = experiment_file(experiment).parent
    return list(dict.fromkeys([FOLDER, folder]))


def _display_path(path: Path) -> str:
    return str(path.relative_to(FOLDER.parent) if path.is_relative_to(FOLDER) else path)


def _check_known(what: str, name: str, expected: Sequence[str]) -> None:
    if name not in expected:
        raise unknown(what, name, expected)


def _read_tasks(scale: str, folders: Sequence[Path]) -> tuple[list[tuple[str, DictConfig]], dict[str, UserError]]:
    """Read all task files. Return (file, layer) of each, and the errors of broken files by task name.

    A broken file only stops experiments that name its task.
    """
    layers, broken = [], {}
    for path in [folder / "tasks" / f"{name}.yaml" for folder in folders for name in yaml_names(folder / "tasks")]:
        name = path.stem
        try:
            layers.append((_display_path(path), OmegaConf.create({"task": {name: _read_task(path, scale)}})))
        except UserError as error:
            broken[name] = error
    return layers, broken


def _read_task(path: Path, scale: str) -> DictConfig:
    """Read a task's file, with the data of one scale. If the file has none, the scale's own file must set them."""
    source, prefix = _display_path(path), f"task.{path.stem}."
    task = read_yaml(path, source)
    blocks = task.pop("data", None) or {}
    if not isinstance(blocks, DictConfig | dict):
        raise UserError(f"{source}: {prefix}data: expected a block for each scale, got {blocks!r}")
    if scale in blocks:
        task["data"] = blocks[scale]
    refuse_unknown_keys(TaskConfig, task, source, prefix)
    try:
        OmegaConf.merge(OmegaConf.structured(TaskConfig), task)
    except MERGE_ERRORS as error:
        raise UserError(f"{source}: {prefix}{describe(error)}") from error
    return task


def _finish(config: DictConfig, packages: Sequence[str], checks_classes: bool = True) -> Config:
    """Resolve and check the configuration. Tasks that `tasks` does not name are dropped without a check, with all
    their settings, so that an experiment with settings for three tasks can train two of them.

    packages: packages that the user allows. checks_classes: as for load_config; readers are always checked.
    """
    known_tasks = sorted(config.task)
    try:
        if not OmegaConf.is_missing(config, "tasks"):
            tasks = OmegaConf.to_container(config.tasks)
            check_items("tasks", tasks, list[str])
            for name in set(known_tasks) - set(tasks):
                del config.task[name]
        OmegaConf.resolve(config)
        if missing := OmegaConf.missing_keys(config):
            raise UserError(f"no value for {', '.join(sorted(missing))}")
        finished: Config = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(describe(error)) from error
    if sorted(finished.extend.packages) != sorted(packages):
        raise UserError(
            f"extend.packages: got {finished.extend.packages}; only the command line may allow packages, because "
            "importing them runs their code"
        )
    _check_tasks(finished, known_tasks)
    finished.task = {name: finished.task[name] for name in finished.tasks}
    for settings in settings_by_task(finished):
        for name in set(known_tasks) - set(finished.tasks):
            settings.pop(name, None)
    check_options(finished)
    check_constraints(finished)
    (check_targets if checks_classes else check_readers)(finished)
    return finished


def _check_tasks(config: Config, known_tasks: Sequence[str]) -> None:
    """Check that the named tasks exist and have data. Removes collections that are null."""
    if not config.tasks:
        raise UserError("tasks: name at least one")
    if len(set(config.tasks)) < len(config.tasks):
        raise UserError(f"tasks: each task may be named only once, got {', '.join(config.tasks)}")
    for name in config.tasks:
        _check_known("task", name, known_tasks)
        check_name("task", name)
        task = config.task[name]
        task.data = {key: node for key, node in task.data.items() if node is not None}
        for key in task.data:
            check_name(f"task.{name}.data: collection", key)
        if not task.data:
            raise UserError(
                f"task {name} has no data at scale {config.scale}: "
                f"add a block data.{config.scale} to experiments/tasks/{name}.yaml, or set task.{name}.data=FOLDER"
            )
    _check_names_of_collections(config)


def _check_names_of_collections(config: Config) -> None:
    """Raise UserError if two tasks have a collection of the same name, because results are stored by name."""
    tasks: dict[str, str] = {}
    for task in config.tasks:
        for name in config.task[task].data:
            if (other := tasks.setdefault(name, task)) != task:
                example = f"task.{task}.data={{{name}_{task}: FOLDER}}"
                raise UserError(
                    f"task.{task}.data: {other} also has a collection called {name}; rename one, as in {example}"
                )


def _merge(config: DictConfig, layer: DictConfig, source: str, others: Sequence[str] = ()) -> DictConfig:
    """Merge a layer over the configuration. A node with another `_target_` replaces the old node and its arguments.

    source: name of the layer, for errors. others: further words to suggest if a key is unknown. Raises UserError.
    """
    refuse_unknown_keys(Config, layer, source, others=others)
    restore_yes_and_no(Config, layer)
    _clear_replaced_targets(config, layer)
    try:
        config.merge_with(layer)  # in place, because OmegaConf.merge copies the whole configuration
        return config
    except MERGE_ERRORS as error:
        raise UserError(f"{source}: {describe(error)}") from error


def _merge_overrides(config: DictConfig, overrides: Sequence[str], others: Sequence[str]) -> DictConfig:
    """Merge overrides such as "optim.lr=1e-4". others: as for _merge.

    A mapping with free names, such as lr_scale={experts: 2}, replaces the old one. make passes overrides in any order,
    so they are sorted: first overrides that replace all data of a task, then single collections, other mappings, and
    the rest.
    """
    parsed = [(text, layer := parse_override(text), replaced_data(text, layer)) for text in overrides]
    parsed.sort(key=lambda each: _rank(*each))
    tasks = set(config.task)
    for text, layer, replaced in parsed:
        if not replaced:
            _clear_mapping(config, layer, text.partition("=")[0])
        elif (task := replaced.split(".")[1]) in tasks:
            data = config.task[task].data
            for name in replaced.split(".")[3:] or list(data):
                data.pop(name, None)
        config = _merge(config, layer, f"command line ({text})", others)
    return config


def _rank(text: str, layer: DictConfig, replaced: str | None) -> int:
    if replaced:
        return replaced.count(".") - 2  # 0: all data of a task, 1: one collection
    return 2 if _mapping(layer, text.partition("=")[0]) is not None else 3


def _mapping(config: DictConfig, key: str) -> DictConfig | None:
    node = OmegaConf.select(config, key, throw_on_resolution_failure=False)
    return node if isinstance(node, DictConfig) else None


def _clear_mapping(config: DictConfig, layer: DictConfig, key: str) -> None:
    """Clear a mapping that another one replaces. Dataclasses and arguments of a `_target_` are merged instead."""
    old, new = _mapping(config, key), _mapping(layer, key)
    if old is None or new is None or "_target_" in {*old, *new} or key == "task":
        return
    if not dataclasses.is_dataclass(OmegaConf.get_type(old)):
        old.clear()


def _clear_replaced_targets(config: DictConfig, layer: DictConfig) -> None:
    for key in layer:
        has_no_value = OmegaConf.is_missing(layer, key) or OmegaConf.is_interpolation(layer, key)
        if has_no_value or key not in config or OmegaConf.is_missing(config, key):
            continue
        old, new = config[key], layer[key]
        if isinstance(old, DictConfig) and isinstance(new, DictConfig):
            classes = [current_path(str(node["_target_"])) for node in (old, new) if "_target_" in node]
            if len(set(classes)) == 2:
                config[key] = {}
            else:
                _clear_replaced_targets(old, new)
        elif isinstance(old, Container) and isinstance(new, Container) and type(old) is not type(new):
            config[key] = new  # a list and a mapping cannot be merged
