"""Sweep files, in W&B's format: both W&B's server and `make sweep` can run them."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from datamodules.options import option
from datamodules.records import UserError, prefixed
from experiments.config.experiment import FOLDER, experiment_file, folders_of, load_config, names
from experiments.config.hyperband import Hyperband
from experiments.config.schema import Config
from experiments.config.structured import did_you_mean, expected_one_of, read_yaml, structured, unknown
from experiments.config.sweep_parameters import Parameter, fixed_trials, read_parameters
from lightning_modules.mining.report import FIGURES

ARGUMENTS = "${args_no_hyphens}"
MAX_CHECKED = 12  # trials whose configurations are loaded before the first one runs
EXPERT_DISTANCE = re.compile(r"diag/experts/.+-.+/(distance|cosine)")


@dataclass
class Metric:
    """The metric that ranks the trials."""

    name: str = option(help="name under which runs log it, such as val/mean/ndcg@10")
    goal: Literal["minimize", "maximize"] = option("minimize", "whether higher or lower values are better")


@dataclass
class SweepSettings:
    """A sweep's file. The keys are those of W&B: https://docs.wandb.ai/models/sweeps/sweep-config-keys"""

    method: Literal["grid", "random", "bayes"] = option(help="how the values of a trial are chosen")
    metric: Metric = option(help="metric that ranks the trials")
    parameters: Any = option(help="dotted keys of the configuration with their values or ranges")
    command: Any = option(help=f"command of a trial, with {ARGUMENTS} where its arguments go")
    run_cap: int | None = option(None, "maximum number of trials", minimum=1)
    early_terminate: Any = option(None, "rule that stops trials early: see Hyperband")
    name: str | None = option(None, "name in W&B")
    description: str | None = option(None, "description in W&B")
    program: str | None = option(None, "unused: command names the program")


@dataclass(frozen=True)
class Sweep:
    """A sweep of an experiment.

    name: name of the file. content: the file as W&B reads it. overrides: key=value arguments of all trials.
    """

    name: str
    content: Mapping[str, Any]
    settings: SweepSettings
    parameters: list[Parameter]
    early_terminate: Hyperband | None
    experiment: str
    overrides: tuple[str, ...]
    run_cap: int | None

    @property
    def method(self) -> str:
        return self.settings.method

    @property
    def metric(self) -> str:
        return self.settings.metric.name

    @property
    def maximize(self) -> bool:
        return self.settings.metric.goal == "maximize"

    @property
    def folder(self) -> Path:
        """Folder of the trials' runs. The same file, experiment, overrides and run_cap always give the same folder."""
        key = json.dumps([self.content, self.experiment, self.overrides, self.run_cap], sort_keys=True)
        return Path("runs", f"sweep-{self.name}-{hashlib.blake2b(key.encode(), digest_size=3).hexdigest()}").absolute()

    def trials(self) -> list[dict[str, Any]]:
        """Return the parameters of each trial; {} with `method: bayes`. Raises UserError if run_cap is missing."""
        if self.method != "grid" and not self.run_cap:
            raise UserError(f"{self.name}: run_cap, the number of trials, is missing; set it here or with run_cap=N")
        if self.method == "bayes":
            for parameter in self.parameters:
                parameter.optuna_range()
            return [{}] * self.run_cap
        return list(fixed_trials(self.method, self.parameters, self.run_cap))

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Return the command of a trial. The experiment and the shared overrides precede the trial's arguments."""
        shared = [re.sub("^scale=", "SCALE=", text) for text in self.overrides]
        inserted = [f"EXP={self.experiment}", *shared, *arguments]
        words = map(str, self.content["command"])
        return [word for each in words for word in (inserted if each == ARGUMENTS else [each])]


def sweeps() -> list[str]:
    """Return the names of the files in experiments/sweeps."""
    return names(FOLDER / "sweeps")


def read_sweep(name: str, experiment: str, overrides: Sequence[str] = (), run_cap: int | None = None) -> Sweep:
    """Read a sweep file. Raises UserError naming file and key.

    name: name of a file in experiments/sweeps or in sweeps/ next to your own experiment, or a path."""
    is_path = name.endswith((".yaml", ".yml"))
    files = [folder / "sweeps" / f"{name}.yaml" for folder in reversed(folders_of(experiment))]
    path = Path(name) if is_path else next((file for file in files if file.is_file()), None)
    if path is None:
        raise unknown("sweep", name, [*sweeps(), "a path"])
    if Path(experiment).suffix:  # trials may run in another folder
        experiment = str(experiment_file(experiment).absolute())
    content = OmegaConf.to_container(read_yaml(path), resolve=False)
    with prefixed(f"{path}: "):
        _check_types(content)
        parameters = read_parameters(content["parameters"])
    # These two keys are replaced because OmegaConf must not resolve a ${...} in them.
    settings = structured(SweepSettings, [OmegaConf.create(content | {"parameters": {}, "command": []})], str(path))
    return Sweep(
        path.stem,
        content,
        settings,
        parameters,
        _read_hyperband(content["early_terminate"], str(path)) if "early_terminate" in content else None,
        experiment,
        tuple(overrides),
        run_cap or settings.run_cap,
    )


def _read_hyperband(node: Mapping[str, Any], source: str) -> Hyperband:
    rule = structured(Hyperband, [OmegaConf.create(dict(node))], source, "early_terminate.")
    if not rule.brackets():
        raise UserError(f"{source}: early_terminate: expected min_iter, or s and a max_iter above eta, not both")
    return rule


def _check_types(content: Mapping[str, Any]) -> None:
    """Raise UserError for wrong types that OmegaConf reports without a key, and for numbers that overflow."""
    for key in ("parameters", "command"):
        if not content.get(key):
            raise UserError(f"{key}: missing")
    for key in ("metric", "parameters", "early_terminate"):
        if key in content and not isinstance(content[key], Mapping):
            raise UserError(f"{key}: expected keys with values, got {content[key]!r}")
    if not isinstance(content["command"], list) or ARGUMENTS not in content["command"]:
        raise UserError(f'command: expected a list of words, one of them "{ARGUMENTS}", where the parameters go')
    for key, value in {"run_cap": content.get("run_cap"), **content.get("early_terminate", {})}.items():
        if isinstance(value, int) and abs(value) > 1 << 62:
            raise UserError(f"{key}: the number is too large")


def as_override(key: str, value: Any) -> str:
    """Return key=value so that the configuration reads the same value: None as null, and a string as a string."""
    if not isinstance(value, str):
        text = yaml.safe_dump(value, default_flow_style=True, width=1 << 30).removesuffix("...\n").strip()
    elif _reads_as_itself(value):
        text = value
    else:
        text = "'" + value.replace("'", "''") + "'"
    return f"{key}={text}"


def _reads_as_itself(text: str) -> bool:
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"x={text}"]), resolve=False) == {"x": text}
    except (OmegaConfBaseException, yaml.YAMLError):
        return False


def check_trials(sweep: Sweep) -> Config:
    """Load the configurations of the first trials, so that a wrong key or type is found before the sweep starts.

    Returns the configuration of the first trial. Raises UserError naming trial and key.
    """
    is_bayes = sweep.method == "bayes"
    trials = fixed_trials("random", sweep.parameters, MAX_CHECKED) if is_bayes else sweep.trials()
    first: Config | None = None
    for number, values in itertools.islice(_with_new_values(trials), MAX_CHECKED):
        with prefixed(f"sweep {sweep.name}, trial {number}: "):
            config = load_config(sweep.experiment, [*sweep.overrides, *starmap(as_override, values.items())])
            if first is None:
                first = config
                check_metric(sweep.metric, config)
                if sweep.early_terminate:
                    sweep.early_terminate.check_reached(sweep.metric, config)
    return first


def _with_new_values(trials: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield number and parameters of each trial that has a value not used by any earlier trial."""
    seen: set[str] = set()
    for number, values in enumerate(trials):
        overrides = {as_override(key, value) for key, value in values.items()}
        if overrides - seen:
            seen |= overrides
            yield number, values


def check_metric(name: str, config: Config) -> None:
    """Raise UserError if runs with this configuration do not log a metric."""
    evaluation, benchmarks = config.evaluation, [key for task in config.task.values() for key in task.data]
    splits = dict.fromkeys([evaluation.split, *(["val"] if evaluation.every_n_steps else [])])
    splits.pop("none", None)
    known = [f"train/{task}/loss" for task in config.tasks]
    known += [f"{split}/mean/{evaluation.metrics[0]}" for split in splits]
    known += [f"{split}/{name}/{metric}" for split in splits for name in benchmarks for metric in evaluation.metrics]
    known += _callback_metrics(config)
    if name not in known and not (config.diagnostics.every_n_steps and EXPERT_DISTANCE.fullmatch(name)):
        hint = did_you_mean(name, known)
        raise UserError(f"metric.name: no run logs {name!r}; {hint}{expected_one_of(known[:12], hint)}, ...")


def _callback_metrics(config: Config) -> Iterator[str]:
    """Yield the metrics of diagnostics and mining, except distances of experts, which only the encoder knows."""
    if config.diagnostics.every_n_steps:
        from lightning_modules.callbacks.diagnostics import OF_TASK  # only here: Lightning takes seconds to import

        yield "diag/seconds"
        for task in config.tasks:
            yield from (f"diag/{task}/{name}" for name in OF_TASK)
            for pair in ("gradient_cosine", "transplant"):
                yield from (f"diag/{task}/{pair}/{other}" for other in config.tasks)
    if config.mining.every_n_steps:
        yield "mine/seconds"
        yield from (f"mine/{task}/{name}" for task in config.tasks for name in FIGURES)
