"""What an experiment is made of: a closed schema, filled from files in a fixed order.

    schema <- base.yaml <- scale/<SCALE>.yaml <- tasks/*.yaml <- <EXPERIMENT>.yaml <- key=value

What the project closes is a field of a dataclass below. What users extend is a node with `_target_`: the encoder,
callbacks and readers of data. Both are checked here, at load, and after load there are plain dataclasses.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import inspect
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from datamodules.records import UserError
from lightning_modules.encoders.backbone import BackboneOptions
from lightning_modules.optim import OptimOptions

FOLDER = Path(__file__).parent
PACKAGES = ("datamodules.", "lightning_modules.")
RESERVED = ("base",)  # YAML files beside the experiments that are none


@dataclass
class RunConfig:
    """dir: by default runs/<experiment>-<scale>-seed<seed>-<hash of the configuration>, so that the same command finds
    its run again. resume: "auto" (from the run's last checkpoint, if it has one) or "never" (start over, the old run is
    kept beside).
    """

    dir: str = ""
    seed: int = 0
    resume: Literal["auto", "never"] = "auto"


@dataclass
class DataConfig:
    """root: folder of the data, for `${data.root}` in tasks. batch_size: queries on each rank. max_length: tokens of a
    text, special tokens included. token_budget: padded tokens of one forward. num_hard_negatives: for each query, where
    it has them. num_workers: processes that prepare batches.
    """

    root: str = "data"
    batch_size: int = 32
    max_length: int = 256
    token_budget: int = 16384
    num_hard_negatives: int = 1
    num_workers: int = 0


@dataclass
class ObjectiveConfig:
    """similarity and temperature of InfoNCE; the paper's are dot and 1. mask_known_positives: a document that is a
    known positive of a query is never its negative.
    """

    similarity: Literal["dot", "cosine"] = "dot"
    temperature: float = 1.0
    mask_known_positives: bool = True


@dataclass
class TrainerConfig:
    """max_steps: optimizer steps. precision: "auto" is bf16 where the hardware computes in it. devices: a number, or -1
    for all. gradient_clip_val: largest norm of the gradient, 0 for none.
    """

    max_steps: int = 1000
    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    precision: Literal["auto", "32", "bf16"] = "auto"
    gradient_clip_val: float = 1.0
    accumulate_grad_batches: int = 1
    gradient_checkpointing: bool = False
    log_every_n_steps: int = 20


@dataclass
class CheckpointConfig:
    """every_n_steps: the last checkpoint is renewed that often."""

    every_n_steps: int = 200


@dataclass
class EvaluationConfig:
    """every_n_steps: on the dev splits during training, 0 for never. split: of the final table. metrics: the first one
    chooses the best checkpoint. baselines: put BM25 and the untrained encoder beside the trained one.
    """

    every_n_steps: int = 200
    split: Literal["train", "dev", "test"] = "test"
    metrics: list[str] = field(default_factory=lambda: ["ndcg@10", "recall@20", "recall@100", "mrr@10", "map@100"])
    baselines: bool = True


@dataclass
class WandbConfig:
    """mode: "online" needs an account; when its server cannot be reached the run goes on offline. Offline runs are sent
    later by `wandb sync`. dir of the files is the run's.
    """

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "scimult"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    init_timeout: int = 20


@dataclass
class TaskConfig:
    """expert: that serves the task. data: name -> node of a reader; in tasks/*.yaml, one block for each scale."""

    kind: Literal["classification", "link_prediction", "search"] = MISSING
    expert: str = MISSING
    instruction: str = ""
    data: dict[str, Any] = field(default_factory=dict)


@dataclass
class Config:
    """The whole experiment. init_from: a run, checkpoint or exported encoder whose weights it starts from."""

    experiment: str = MISSING
    scale: str = "sample"
    tasks: list[str] = MISSING
    init_from: str | None = None
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    encoder: dict[str, Any] = MISSING
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimOptions = field(default_factory=OptimOptions)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    callbacks: dict[str, Any] = field(default_factory=dict)
    task: dict[str, TaskConfig] = field(default_factory=dict)


def names(folder: Path, reserved: Sequence[str] = ()) -> list[str]:
    """The YAML files of a folder by name, without ending."""
    return sorted(path.stem for path in folder.glob("*.yaml") if path.stem not in reserved)


def experiments() -> list[str]:
    return names(FOLDER, RESERVED)


def scales() -> list[str]:
    return names(FOLDER / "scale")


def load_config(experiment: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration of an experiment.

    overrides: "key=value", the scale among them. Raises UserError naming file and key, what came and what is allowed.
    """
    overrides = [_checked_override(text) for text in overrides]
    chosen = [text.partition("=")[2] for text in overrides if text.startswith("scale=")]
    scale = chosen[-1] if chosen else Config.scale
    _one_of("experiment", experiment, experiments())
    _one_of("scale", scale, scales())

    layers = [("the schema", OmegaConf.create({"experiment": experiment, "scale": scale}))]
    for path in (FOLDER / "base.yaml", FOLDER / "scale" / f"{scale}.yaml"):
        layers.append((_shown(path), _read(path)))
    for name in names(FOLDER / "tasks"):
        path = FOLDER / "tasks" / f"{name}.yaml"
        layers.append((_shown(path), OmegaConf.create({"task": {name: _data_at(scale, _read(path))}})))
    path = FOLDER / f"{experiment}.yaml"
    layers.append((_shown(path), _read(path)))
    layers += [(f"the command line ({text})", _parsed(text)) for text in overrides]

    config = OmegaConf.structured(Config)
    for source, layer in layers:
        config = _merge(config, layer, source)
    return _finish(config)


def as_dict(config: Config) -> dict[str, Any]:
    """The configuration in plain containers."""
    return dataclasses.asdict(config)


def from_dict(settings: Mapping[str, Any], source: str) -> Config:
    """A configuration that as_dict wrote, for instance a run's config.yaml. source: its name in errors."""
    return _finish(_merge(OmegaConf.structured(Config), OmegaConf.create(dict(settings)), source))


def digest(config: Config) -> str:
    """Six characters that differ for different experiments; where a run lies and how it logs does not count."""
    settings = as_dict(config)
    settings["run"].pop("dir"), settings["run"].pop("resume"), settings.pop("wandb")
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=3).hexdigest()


def _shown(path: Path) -> str:
    return str(path.relative_to(FOLDER.parent))


def _one_of(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        close = difflib.get_close_matches(value, allowed, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"unknown {what} {value!r}: {hint}there are {', '.join(allowed)}")


def _checked_override(text: str) -> str:
    key, equals, _ = text.partition("=")
    if not equals or not key:
        raise UserError(f"the command line: expected key=value, got {text!r}")
    return text


def _parsed(text: str) -> DictConfig:
    try:
        return OmegaConf.from_dotlist([text])
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"the command line: {text!r} is not readable ({_first_line(error)})") from error


def _read(path: Path) -> DictConfig:
    try:
        node = OmegaConf.load(path)
    except (OmegaConfBaseException, yaml.YAMLError, OSError) as error:
        raise UserError(f"{_shown(path)}: {' '.join(str(error).split())}") from error
    if not isinstance(node, DictConfig):
        raise UserError(f"{_shown(path)}: expected keys with values")
    return node


def _data_at(scale: str, task: DictConfig) -> DictConfig:
    """A task's file with the data of one scale; a scale that the file does not know may bring its own."""
    blocks = task.pop("data", None) or {}
    if scale in blocks:
        task["data"] = blocks[scale]
    return task


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _merge(config: DictConfig, layer: DictConfig, source: str) -> DictConfig:
    """layer over config. A node with another `_target_` replaces the old one: their arguments are not mixed."""
    _refuse_unknown_keys(Config, layer, "", source)
    _forget_replaced_targets(config, layer)
    try:
        return OmegaConf.merge(config, layer)
    except OmegaConfBaseException as error:
        raise UserError(f"{source}: {error.full_key}: {_first_line(error)}") from error


def _refuse_unknown_keys(schema: type, node: Any, prefix: str, source: str) -> None:
    if not isinstance(node, DictConfig):
        return
    hints = typing.get_type_hints(schema)
    for key in node:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {prefix}{close[0]}? " if close else ""
            raise UserError(f"{source}: unknown key {prefix}{key}; {hint}allowed here: {', '.join(hints)}")
        if OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key):
            continue
        if dataclasses.is_dataclass(hints[key]):
            _refuse_unknown_keys(hints[key], node[key], f"{prefix}{key}.", source)
        elif hints[key] == dict[str, TaskConfig] and isinstance(node[key], DictConfig):
            for name in node[key]:
                _refuse_unknown_keys(TaskConfig, node[key][name], f"{prefix}{key}.{name}.", source)


def _forget_replaced_targets(config: DictConfig, layer: DictConfig) -> None:
    for key in layer:
        if key not in config or OmegaConf.is_missing(config, key) or OmegaConf.is_interpolation(layer, key):
            continue
        old, new = config[key], layer[key]
        if isinstance(old, DictConfig) and isinstance(new, DictConfig):
            if "_target_" in new and "_target_" in old and new["_target_"] != old["_target_"]:
                config[key] = {}
            else:
                _forget_replaced_targets(old, new)


def _finish(config: DictConfig) -> Config:
    """Resolved and checked, as dataclasses."""
    try:
        OmegaConf.resolve(config)
        missing = OmegaConf.missing_keys(config)
        if missing:
            raise UserError(f"no value for {', '.join(sorted(missing))}")
        done: Config = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {_first_line(error)}") from error
    if not done.tasks:
        raise UserError("tasks: name at least one")
    for name in done.tasks:
        _one_of("task", name, sorted(done.task))
        if not done.task[name].data:
            raise UserError(
                f"task {name} has no data at scale {done.scale}: "
                f"add a block data.{done.scale} to experiments/tasks/{name}.yaml, or set task.{name}.data.NAME"
            )
    done.task = {name: done.task[name] for name in done.tasks}
    _check_ranges(done)
    check_target("encoder", done.encoder, given=("backbone", "tokenizer", "tasks", "max_length"))
    for name, node in done.callbacks.items():
        check_target(f"callbacks.{name}", node)
    for task, settings in done.task.items():
        for name, node in settings.data.items():
            check_target(f"task.{task}.data.{name}", node)
    return done


def _check_ranges(config: Config) -> None:
    positive = {
        "data.batch_size": config.data.batch_size,
        "data.max_length": config.data.max_length,
        "data.token_budget": config.data.token_budget,
        "objective.temperature": config.objective.temperature,
        "optim.lr": config.optim.lr,
        "optim.layer_decay": config.optim.layer_decay,
        "trainer.max_steps": config.trainer.max_steps,
        "trainer.accumulate_grad_batches": config.trainer.accumulate_grad_batches,
        "trainer.log_every_n_steps": config.trainer.log_every_n_steps,
        "checkpoint.every_n_steps": config.checkpoint.every_n_steps,
        "backbone.vocab_size": config.backbone.vocab_size,
    }
    not_negative = {
        "data.num_hard_negatives": config.data.num_hard_negatives,
        "data.num_workers": config.data.num_workers,
        "optim.weight_decay": config.optim.weight_decay,
        "evaluation.every_n_steps": config.evaluation.every_n_steps,
        "trainer.gradient_clip_val": config.trainer.gradient_clip_val,
    }
    for key, value in positive.items():
        if not value > 0:
            raise UserError(f"{key}: got {value}, allowed are numbers above 0")
    for key, value in not_negative.items():
        if not value >= 0:
            raise UserError(f"{key}: got {value}, allowed are numbers from 0")
    if not 0 <= config.optim.warmup < 1:
        raise UserError(f"optim.warmup: got {config.optim.warmup}, allowed is a share of the steps, from 0 to below 1")


def check_target(key: str, node: Any, given: Sequence[str] = ()) -> type:
    """The class that a `_target_` node names, its arguments checked against the signature.

    given: arguments that the project provides. Raises UserError.
    """
    if not isinstance(node, Mapping) or not isinstance(node.get("_target_"), str):
        raise UserError(f"{key}: expected a node with _target_, got {node!r}")
    target = node["_target_"]
    if not target.startswith(PACKAGES):
        raise UserError(f"{key}._target_: got {target!r}, allowed are classes of {' and '.join(PACKAGES)}*")
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"{key}._target_: there is no module {module_name!r} ({error})") from error
    if not inspect.isclass(getattr(module, name, None)):
        classes = [n for n, o in inspect.getmembers(module, inspect.isclass) if o.__module__ == module_name]
        raise UserError(f"{key}._target_: {module_name} has no class {name!r}, it has {', '.join(classes)}")
    cls = getattr(module, name)
    _check_arguments(key, cls, {k: v for k, v in node.items() if k != "_target_"}, given)
    return cls


def _check_arguments(key: str, cls: type, arguments: Mapping[str, Any], given: Sequence[str]) -> None:
    """Names and types of a class's arguments, by a dataclass made from its signature."""
    hints = typing.get_type_hints(cls.__init__)
    parameters = [p for p in list(inspect.signature(cls.__init__).parameters.values())[1:] if p.name not in given]
    allowed = [p.name for p in parameters]
    for name in arguments:
        if name not in allowed:
            close = difflib.get_close_matches(str(name), allowed, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(f"{key}: {cls.__name__} has no argument {name!r}; {hint}it has {', '.join(allowed)}")
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in arguments:
            raise UserError(f"{key}: {cls.__name__} needs the argument {parameter.name!r}")
    fields = [(p.name, hints.get(p.name, Any), field(default=MISSING)) for p in parameters]
    try:
        OmegaConf.merge(OmegaConf.structured(dataclasses.make_dataclass(cls.__name__, fields)), dict(arguments))
    except OmegaConfBaseException as error:
        raise UserError(f"{key}.{error.full_key}: {_first_line(error)}") from error


def instantiate(node: Mapping[str, Any], **given: Any) -> Any:
    """The object that a checked `_target_` node describes."""
    module, _, name = node["_target_"].rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    return cls(**{key: value for key, value in node.items() if key != "_target_"}, **given)
