"""Sweep files in W&B's format. Both W&B's server and `make sweep` can run them."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat, starmap, takewhile
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from datamodules.options import option
from datamodules.records import UserError, explained, prefixed
from experiments.config.experiment import FOLDER, experiment_file, folders_of, load_config, yaml_names
from experiments.config.schema import Config
from experiments.config.structured import did_you_mean, expected_one_of, read_yaml, structured, unknown
from experiments.config.sweep_parameters import Parameter, fixed_trials, read_parameters
from lightning_modules.mining.report import FIGURES

ARGUMENTS = "${args_no_hyphens}"
MAX_CHECKED = 12  # trials whose configurations are loaded before the first one runs
LARGEST = 10**9  # maximum number of values; no run logs more
MAX_BRACKETS = 100  # number of brackets from min_iter on, as on W&B's server
EXPERT_DISTANCE = re.compile(r"diag/experts/.+-.+/(distance|cosine)")


@dataclass
class Metric:
    """The metric by which trials are ranked."""

    name: str = option(help="name in the runs' logs, such as val/mean/ndcg@10")
    goal: Literal["minimize", "maximize"] = option("minimize", "whether higher or lower values are better")


@dataclass
class SweepSettings:
    """A sweep's file. The keys are those of W&B: https://docs.wandb.ai/models/sweeps/sweep-config-keys"""

    method: Literal["grid", "random", "bayes"] = option(help="how to choose the values of a trial")
    metric: Metric = option(help="metric that ranks the trials")
    parameters: Any = option(help="values or ranges by dotted key of the configuration")
    command: Any = option(help=f"command of a trial, with {ARGUMENTS} where its arguments go")
    run_cap: int | None = option(None, "maximum number of trials", minimum=1)
    early_terminate: Any = option(None, "rule that stops trials early: see Hyperband")
    name: str | None = option(None, "name in W&B")
    description: str | None = option(None, "description in W&B")
    program: str | None = option(None, "unused, because command names the program")


@dataclass
class Hyperband:
    """Stop trials that fall behind. A bracket is a number of logged values at which trials are compared.

    The keys and the rule are those of W&B. As on its server, an iteration is a logged value of the metric, not an
    optimizer step. A trial is compared whenever it logs a value (asynchronous successive halving; Li et al., arXiv
    1810.05934, section 3.2).

    Optuna's HyperbandPruner would stop other trials than W&B's server does with the same file. It assigns trials to
    brackets by a hash, must know how many values a run logs, only accepts integers for eta, rounds down the number of
    trials that continue, and gives no reason.
    """

    type: Literal["hyperband"] = option(help="rule (W&B has only this one)")
    min_iter: int | None = option(
        None, "first bracket; the others are min_iter * eta, min_iter * eta^2, ...", minimum=1, maximum=LARGEST
    )
    max_iter: int | None = option(
        None,
        "replaces min_iter, together with s: brackets are max_iter / eta, max_iter / eta^2, ...",
        minimum=1,
        maximum=LARGEST,
    )
    s: int | None = option(None, "number of brackets if max_iter is set", minimum=1, maximum=LARGEST)
    eta: float = option(3.0, "one trial in eta continues after each bracket", above=1, maximum=LARGEST)
    strict: bool = option(False, "compare the trial's value at the bracket, not its best value so far")

    def brackets(self) -> list[int]:
        """Return the brackets in ascending order, or [] if the keys do not define any."""
        if self.min_iter is not None and self.max_iter is self.s is None:
            numbers = accumulate(repeat(self.eta, MAX_BRACKETS - 1), operator.mul, initial=self.min_iter)
        elif self.min_iter is None and self.max_iter is not None and self.s is not None:
            numbers = accumulate(repeat(self.eta, self.s), operator.truediv, initial=self.max_iter)
            next(numbers)  # max_iter itself is not a bracket
        else:
            return []
        return sorted({int(number) for number in takewhile(lambda number: 1 <= number <= LARGEST, numbers)})

    def reason(self, values: Sequence[float], others: Sequence[Sequence[float]], maximize: bool) -> str:
        """Return why a trial should be stopped, or "".

        values, others: values of the metric that this trial and each other trial have logged.

        The trial is compared with all trials that have reached the same bracket, the last one it has reached. It
        continues if it is among the best 1/eta of them (rounded up), or ties with one of those. So the first trial to
        reach a bracket always continues.
        """
        reached = [bracket for bracket in self.brackets() if bracket <= len(values)]
        if not reached:
            return ""
        bracket = reached[-1]
        costs, *other_costs = [[_cost(value, maximize) for value in each] for each in (values, *others)]
        ranking = sorted(each[bracket - 1] for each in (costs, *other_costs) if len(each) >= bracket)
        num_continue = math.ceil(round(len(ranking) / self.eta, 9))
        cost, limit = costs[bracket - 1] if self.strict else min(costs), ranking[num_continue - 1]
        if cost <= limit:
            return ""
        shown, needed = (-x if maximize else x for x in (cost, limit))
        return f"{shown:.4g} at value {bracket}; the best {num_continue} of {len(ranking)} trials reached {needed:.4g}"

    def check_reached(self, metric: str, config: Config) -> None:
        """Raise UserError if runs with this configuration end before the rule could stop them."""
        every_n_steps = {
            config.evaluation.split: config.trainer.max_steps,
            "val": config.evaluation.every_n_steps,
            "train": config.trainer.log_every_n_steps,
            "diag": config.diagnostics.every_n_steps,
        }.get(metric.partition("/")[0])
        first = self.brackets()[0]
        if config.trainer.max_epochs:  # the number of steps is known once the data are read
            return
        if every_n_steps and (count := math.ceil(config.trainer.max_steps / every_n_steps)) <= first:
            raise UserError(
                f"early_terminate: would never stop a trial: the first comparison is after {first} values of {metric}, "
                f"but a run logs only {count}, the last one at its end; lower min_iter, or log more often"
            )


def _cost(value: float, maximize: bool) -> float:
    """Return a number that is smaller for a better value, and infinite for NaN."""
    return math.inf if math.isnan(value) else -value if maximize else value


@dataclass(frozen=True)
class Sweep:
    """A sweep of an experiment.

    name: file name.
    content: the file as W&B reads it.
    overrides: key=value arguments for all trials.
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
        """Folder for the trials' runs. The same file, experiment, overrides and run_cap always give the same folder."""
        key = json.dumps([self.content, self.experiment, self.overrides, self.run_cap], sort_keys=True)
        return Path("runs", f"sweep-{self.name}-{hashlib.blake2b(key.encode(), digest_size=3).hexdigest()}").absolute()

    def trials(self) -> list[dict[str, Any]]:
        """Return the parameters of each trial, {} for `method: bayes`. Raises UserError if run_cap is missing."""
        if self.method != "grid" and not self.run_cap:
            raise UserError(
                f"{self.name}: run_cap (the number of trials) is missing; set it in the file, or with run_cap=N"
            )
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
    return yaml_names(FOLDER / "sweeps")


def read_sweep(name: str, experiment: str, overrides: Sequence[str] = (), run_cap: int | None = None) -> Sweep:
    """Read a sweep file. Raises UserError with file and key.

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
        if "run.dir" in (*(text.partition("=")[0] for text in overrides), *(each.name for each in parameters)):
            raise UserError("run.dir: cannot be set for a sweep, because each trial has its own folder; leave it out")
    # These two keys are left out, because OmegaConf must not resolve a ${...} in them.
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
        raise UserError(f"{source}: early_terminate: expected either min_iter, or s with a max_iter above eta")
    return rule


def _check_types(content: Mapping[str, Any]) -> None:
    """Raise UserError for wrong types, which OmegaConf reports without the key, and for numbers that overflow."""
    for key in ("parameters", "command"):
        if not content.get(key):
            raise UserError(f"{key}: missing")
    for key in ("metric", "parameters", "early_terminate"):
        if key in content and not isinstance(content[key], Mapping):
            raise UserError(f"{key}: expected keys with values, got {content[key]!r}")
    if not isinstance(content["command"], list) or ARGUMENTS not in content["command"][1:]:
        raise UserError(
            f'command: expected a list of a program and its arguments, one of them "{ARGUMENTS}" (the parameters)'
        )
    for key, value in {"run_cap": content.get("run_cap"), **content.get("early_terminate", {})}.items():
        if isinstance(value, int) and abs(value) > 1 << 62:
            raise UserError(f"{key}: the number is too large")
    with explained("the keys of a mapping must be all texts or all numbers", TypeError):
        json.dumps(content, sort_keys=True)  # as for the name of the folder


def as_override(key: str, value: Any) -> str:
    """Return key=value in a form that the configuration reads as the same value, such as null for None."""
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
    """Load the configurations of the first trials, to find a wrong key or type before the sweep starts.

    Returns the configuration of the first trial. Raises UserError with trial and key.
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
    """Yield the number and parameters of each trial with a value that no earlier trial has."""
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
    """Yield the metrics of diagnostics and mining, except distances of experts, whose names depend on the encoder."""
    if config.diagnostics.every_n_steps:
        from lightning_modules.callbacks.diagnostics import OF_TASK  # only here: Lightning takes seconds to import

        yield "diag/seconds"
        for task in config.tasks:
            yield from (f"diag/{task}/{name}" for name in OF_TASK)
            for pair in ("gradient_cosine", "transplant"):
                yield from (f"diag/{task}/{pair}/{other}" for other in config.tasks)
    if config.mining.every_n_steps or config.mining.every_n_epochs:
        yield "mine/seconds"
        yield from (f"mine/{task}/{name}" for task in config.tasks for name in FIGURES)
