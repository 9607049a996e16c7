"""experiments/sweeps/*.yaml: sweeps in W&B's format, which its server runs as well as the controller here."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from datamodules.records import UserError
from experiments.config.experiment import FOLDER, load_config, names
from experiments.config.schema import Config
from experiments.config.suggest import did_you_mean
from experiments.sweeping.hyperband import Hyperband, check_reached, read_hyperband
from experiments.sweeping.metric import check_metric
from experiments.sweeping.space import Parameter, read_parameters, trials

METHODS = ("grid", "random", "bayes")
KEYS = ("method", "metric", "parameters", "command", "run_cap", "name", "description", "early_terminate", "program")
ARGUMENTS = "${args_no_hyphens}"
CHECKED = 12  # trials at most whose configurations are loaded before the first one runs


@dataclass(frozen=True)
class Sweep:
    """content: the file. parameters, method, run_cap (None: all of a grid), metric and goal: what it says.

    experiment, overrides: that its trials share.
    """

    name: str
    content: Mapping[str, Any]
    parameters: list[Parameter]
    experiment: str
    overrides: tuple[str, ...]
    run_cap: int | None

    @property
    def method(self) -> str:
        return self.content["method"]

    @property
    def metric(self) -> str:
        return self.content["metric"]["name"]

    @property
    def maximize(self) -> bool:
        return self.content["metric"].get("goal", "minimize") == "maximize"

    @property
    def hyperband(self) -> Hyperband | None:
        """What gives trials up early, if the file asks for it."""
        return read_hyperband(self.content["early_terminate"]) if "early_terminate" in self.content else None

    @property
    def folder(self) -> Path:
        """Of its trials' runs: one that the same file, experiment and overrides find again."""
        said = json.dumps([self.content, self.experiment, self.overrides, self.run_cap], sort_keys=True)
        return Path("runs", f"sweep-{self.name}-{hashlib.blake2b(said.encode(), digest_size=3).hexdigest()}").absolute()

    def trials(self, seed: int = 0) -> list[dict[str, Any]]:
        if self.method == "bayes":
            raise UserError(
                f"{self.name}: method bayes needs W&B's server (wandb.mode=online); grid and random run here"
            )
        if self.method == "random" and not self.run_cap:
            raise UserError(f"{self.name}: how many random trials? Set run_cap in the file, or on the command line")
        return list(trials(self.method, self.parameters, self.run_cap, seed))

    def command(self, arguments: Sequence[str]) -> list[str]:
        """A trial's command, with the experiment and what all trials share before its own arguments."""
        shared = [f"EXP={self.experiment}", *(_for_make(text) for text in self.overrides)]
        command: list[str] = []
        for part in map(str, self.content["command"]):
            command += [*shared, *arguments] if part == ARGUMENTS else [part]
        return command


def _for_make(override: str) -> str:
    return override.replace("scale=", "SCALE=", 1) if override.startswith("scale=") else override


def sweeps() -> list[str]:
    return names(FOLDER / "sweeps")


def read_sweep(name: str, experiment: str, overrides: Sequence[str] = (), run_cap: int | None = None) -> Sweep:
    """The sweep of a file in experiments/sweeps, by name or path. Raises UserError naming file and key."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / "sweeps" / f"{name}.yaml"
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except FileNotFoundError:
        hint = did_you_mean(name, sweeps())
        raise UserError(f"unknown sweep {name!r}: {hint}there are {', '.join(sweeps())}, or give a path") from None
    except (OmegaConfBaseException, yaml.YAMLError, OSError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    try:
        parameters = _check(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return Sweep(path.stem, content, parameters, experiment, tuple(overrides), run_cap or content.get("run_cap"))


def _check(content: Any) -> list[Parameter]:
    if not isinstance(content, Mapping):
        raise UserError("expected keys with values")
    for key in content:
        if key not in KEYS:
            raise UserError(f"unknown key {key!r}; allowed are {', '.join(KEYS)}")
    for key in ("method", "metric", "parameters", "command"):
        if not content.get(key):
            raise UserError(f"{key} is missing")
    if content["method"] not in METHODS:
        raise UserError(f"method: got {content['method']!r}, allowed are {', '.join(METHODS)}")
    metric = content["metric"]
    if not isinstance(metric, Mapping) or "name" not in metric:
        raise UserError("metric: expected a name and a goal")
    if not isinstance(metric["name"], str):
        raise UserError(f"metric.name: got {metric['name']!r}, expected the name of what runs log")
    if metric.get("goal", "minimize") not in ("minimize", "maximize"):
        raise UserError(f"metric.goal: got {metric['goal']!r}, allowed are minimize, maximize")
    if not isinstance(content["parameters"], Mapping):
        raise UserError(f"parameters: got {content['parameters']!r}, expected keys of the configuration with values")
    if not isinstance(content["command"], list) or ARGUMENTS not in content["command"]:
        raise UserError(f'command: needs a list, with "{ARGUMENTS}" as an element of its own, where the parameters go')
    cap = content.get("run_cap", 1)
    if isinstance(cap, bool) or not isinstance(cap, int) or cap < 1:
        raise UserError(f"run_cap: got {cap!r}, allowed are whole numbers from 1")
    if "early_terminate" in content:
        read_hyperband(content["early_terminate"])
    _check_by_wandb(content)
    return read_parameters(content["parameters"])


def _check_by_wandb(content: Mapping[str, Any]) -> None:
    """By W&B's own schema, where its package `sweeps` is installed."""
    try:
        from jsonschema import ValidationError
        from sweeps.config import SweepConfig
    except ImportError:
        return
    try:
        SweepConfig(dict(content))
    except ValidationError as error:
        raise UserError(f"W&B's schema: {error.message}") from error


def as_override(key: str, value: Any) -> str:
    """key=value, which the configuration reads as just this value: None is null, and a string stays one."""
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


def check_trials(sweep: Sweep, seed: int = 0) -> Config:
    """Load the configurations of the trials, so that a wrong key or type ends the sweep before it starts.

    Returns that of the first one. Raises UserError naming trial and key.
    """
    bayes = sweep.method == "bayes"
    drawn = trials("random", sweep.parameters, CHECKED, seed) if bayes else sweep.trials(seed)
    first: Config | None = None
    for number, parameters in itertools.islice(_with_new_values(drawn), CHECKED):
        overrides = [*sweep.overrides, *(as_override(key, value) for key, value in parameters.items())]
        try:
            config = load_config(sweep.experiment, overrides)
            if first is None:
                first = config
                check_metric(sweep.metric, config)
                if sweep.hyperband:
                    check_reached(sweep.hyperband, sweep.metric, config)
        except UserError as error:
            raise UserError(f"sweep {sweep.name}, trial {number}: {error}") from error
    return first


def _with_new_values(drawn: Iterable[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers and parameters of those trials that have a value which no earlier one had."""
    seen: set[str] = set()
    for number, parameters in enumerate(drawn):
        values = {as_override(key, value) for key, value in parameters.items()}
        if values - seen:
            seen |= values
            yield number, parameters
