"""Parameters of a sweep: W&B's distributions, and the values of each trial.

A trial of a grid or random sweep depends only on the file and the trial's number, so each rank and each task of a SLURM
array can compute its own. Optuna only chooses the values of `method: bayes`: its samplers depend on earlier trials, and
it has no normal distributions and no probabilities.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from datamodules.records import UserError
from experiments.config.structured import expected_one_of

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


RANGE, NORMAL, OPTIONAL = ("min", "max"), ("mu", "sigma"), ("mu", "sigma", "q", "probabilities")
MAX_GRID = 100_000  # maximum number of values of a parameter
DISTRIBUTIONS = {  # distribution -> keys of its settings
    "constant": ("value",),
    "categorical": ("values", "probabilities"),
    "int_uniform": RANGE,
    "uniform": RANGE,
    "q_uniform": (*RANGE, "q"),
    "log_uniform_values": RANGE,
    "q_log_uniform_values": (*RANGE, "q"),
    "normal": NORMAL,
    "q_normal": (*NORMAL, "q"),
    "log_normal": NORMAL,
    "q_log_normal": (*NORMAL, "q"),
}
REPLACEMENTS = {  # for W&B's other distributions
    "log_uniform": "log_uniform_values, whose min and max are values, not logarithms",
    "q_log_uniform": "q_log_uniform_values, whose min and max are values, not logarithms",
    "inv_log_uniform": "log_uniform_values",
    "inv_log_uniform_values": "log_uniform_values, which means the same",
    "categorical_w_probabilities": "categorical with probabilities",
}


@dataclass(frozen=True)
class Parameter:
    """A parameter of a sweep.

    name: dotted key of the configuration.
    distribution: key of DISTRIBUTIONS.
    settings: the parameter's block in the file.
    """

    name: str
    distribution: str
    settings: Mapping[str, Any]

    def draw(self, generator: random.Random) -> Any:
        """Draw a value."""
        settings = self.settings
        match self.distribution.removeprefix("q_"):
            case "constant":
                return settings["value"]
            case "categorical":
                return generator.choices(settings["values"], settings.get("probabilities"))[0]
            case "int_uniform":
                return generator.randint(settings["min"], settings["max"])
            case "uniform":
                value = generator.uniform(settings["min"], settings["max"])
            case "log_uniform_values":
                value = math.exp(generator.uniform(math.log(settings["min"]), math.log(settings["max"])))
                value = self._clipped(value)  # exp(log(x)) may exceed x by rounding
            case "normal" | "log_normal" as kind:
                value = generator.normalvariate(settings.get("mu", 0.0), settings.get("sigma", 1.0))
                value = math.exp(value) if kind == "log_normal" else value
        return self._round(value)

    def grid(self) -> list[Any]:
        """Return all values. Raises UserError if there are too many, or infinitely many."""
        settings = self.settings
        if self._is_list():
            return list(settings.get("values", [settings.get("value")]))
        if self.distribution == "int_uniform":
            return list(self._limited(range(settings["min"], settings["max"] + 1)))
        if self.distribution == "q_uniform":
            q = settings.get("q", 1)
            multiples = range(math.ceil(settings["min"] / q - 1e-9), math.floor(settings["max"] / q + 1e-9) + 1)
            if not multiples:
                raise UserError(
                    f"parameters.{self.name}: no multiple of q={q} lies between min and max; change one of them"
                )
            return [_multiple(number, q) for number in self._limited(multiples)]
        raise UserError(f"parameters.{self.name}: {self.distribution} has no grid; use values, or method: random")

    def _limited(self, numbers: range) -> range:
        if (count := numbers.stop - numbers.start) > MAX_GRID:
            raise UserError(f"parameters.{self.name}: a grid would have {count:,} values; use method: random")
        return numbers

    def optuna_range(self) -> BaseDistribution:
        """Return the range for Optuna; for a list, the range of indices. Raises UserError if there is no range."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if "normal" in self.distribution or "probabilities" in self.settings:
            raise UserError(
                f"parameters.{self.name}: method bayes needs min and max, or values without probabilities; W&B's "
                "server supports more (wandb.mode=online)"
            )
        if self._is_list():
            return CategoricalDistribution(range(len(self.grid())))
        low, high = self.settings["min"], self.settings["max"]
        if self.distribution == "int_uniform":
            return IntDistribution(low, high)
        return FloatDistribution(low, high, log="log" in self.distribution)

    def to_optuna(self, value: Any) -> Any:
        if self._is_list():
            return self.grid().index(value)
        return self._clipped(value)  # the nearest multiple of q may be outside the range

    def from_optuna(self, value: Any) -> Any:
        return self.grid()[value] if self._is_list() else self._round(value)

    def _is_list(self) -> bool:
        return self.distribution in ("constant", "categorical")

    def _clipped(self, value: float) -> float:
        return min(max(value, self.settings["min"]), self.settings["max"])

    def _round(self, value: Any) -> Any:
        q = self.settings.get("q")
        return value if q is None else _multiple(round(value / q), q)


def _multiple(number: int, q: float) -> float:
    """Return number * q: an integer if q is an integer, else a float without rounding noise."""
    return number * q if isinstance(q, int) else float(f"{number * q:.12g}")


def fixed_trials(method: str, parameters: Sequence[Parameter], run_cap: int | None) -> Iterator[dict[str, Any]]:
    """Yield the values of each trial of a grid or random sweep. In a grid, the last parameter changes first.

    A random value depends only on the trial's number and the parameter's name. The leading 0 in the seed comes from
    older versions.
    """
    if method == "grid":
        names = [parameter.name for parameter in parameters]
        combinations = itertools.product(*(parameter.grid() for parameter in parameters))
        for values in itertools.islice(combinations, run_cap):
            yield dict(zip(names, values, strict=True))
        return
    for number in range(run_cap or 0):
        yield {p.name: p.draw(random.Random(f"0/{number}/{p.name}")) for p in parameters}


def suggest_trial(
    parameters: Sequence[Parameter],
    past: Sequence[tuple[Mapping[str, Any], float | None]],
    maximize: bool,
    number: int,
) -> dict[str, Any]:
    """Return the values of a trial of a `method: bayes` sweep, chosen by Optuna's TPE sampler.

    past: values and score of each earlier trial (None if the score is not known yet).
    number: number of the trial, which is also the seed.

    The study is rebuilt from the past trials each time. Optuna's journal (JournalFileBackend 5.0) is not used, because
    it cannot be read after a kill has cut a line short, and a failed trial could not run again.
    """
    import optuna
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # constant_liar counts running trials as bad, so that parallel trials differ.
    sampler = optuna.samplers.TPESampler(seed=number, constant_liar=True)
    study = optuna.create_study(direction="maximize" if maximize else "minimize", sampler=sampler)
    ranges = {parameter.name: parameter.optuna_range() for parameter in parameters}
    for values, score in past:
        chosen = {parameter.name: parameter.to_optuna(values[parameter.name]) for parameter in parameters}
        state = TrialState.RUNNING if score is None else TrialState.COMPLETE
        study.add_trial(create_trial(params=chosen, distributions=ranges, value=score, state=state))
    suggestion = study.ask(ranges).params
    return {parameter.name: parameter.from_optuna(suggestion[parameter.name]) for parameter in parameters}


def read_parameters(node: Any, prefix: str = "") -> list[Parameter]:
    """Return the parameters of a sweep file, including nested ones. Raises UserError with key and value."""
    if not isinstance(node, Mapping):
        raise UserError(f"parameters.{prefix}parameters: expected keys with values, got {node!r}")
    parameters: list[Parameter] = []
    for key, settings in node.items():
        name = f"{prefix}{key}"
        if not isinstance(settings, Mapping):
            raise UserError(f"parameters.{name}: expected value, values, or min and max; got {settings!r}")
        if "parameters" in settings:
            parameters += read_parameters(settings["parameters"], f"{name}.")
        else:
            parameters.append(_read_parameter(name, settings))
    return parameters


def _read_parameter(name: str, settings: Mapping[str, Any]) -> Parameter:
    distribution = settings.get("distribution") or _default_distribution(name, settings)
    if str(distribution) not in DISTRIBUTIONS:
        replacement = REPLACEMENTS.get(str(distribution))
        hint = f"use {replacement}" if replacement else expected_one_of(DISTRIBUTIONS)
        raise UserError(f"parameters.{name}.distribution: got {distribution!r}, {hint}")
    keys, names = DISTRIBUTIONS[distribution], settings.keys() - {"distribution"}
    if missing := [key for key in keys if key not in (*names, *OPTIONAL)]:
        raise UserError(f"parameters.{name}: {distribution} needs {' and '.join(missing)}")
    if unknown := sorted(names - {*keys}):
        raise UserError(f"parameters.{name}: unknown key {unknown[0]!r}; {distribution} has {', '.join(keys)}")
    _check_settings(name, distribution, settings)
    return Parameter(name, distribution, settings)


def _default_distribution(name: str, settings: Mapping[str, Any]) -> str:
    if "values" in settings:
        return "categorical"
    if "value" in settings:
        return "constant"
    if "min" in settings and "max" in settings:
        types = {type(settings["min"]), type(settings["max"])}
        if types not in ({int}, {float}):
            raise UserError(f"parameters.{name}: min and max must both be whole numbers, or both have a decimal point")
        return "int_uniform" if types == {int} else "uniform"
    keys = ", ".join(map(str, settings))
    raise UserError(f"parameters.{name}: expected value, values, min and max, or a distribution; got {keys}")


def _check_settings(name: str, distribution: str, settings: Mapping[str, Any]) -> None:
    numbers = int if distribution == "int_uniform" else (int, float)
    for key in settings.keys() & {*RANGE, *NORMAL, "q"}:
        if isinstance(settings[key], bool) or not (isinstance(settings[key], numbers) and math.isfinite(settings[key])):
            raise UserError(f"parameters.{name}.{key}: expected a number, got {settings[key]!r}")
        if key in ("q", "sigma") and settings[key] <= 0:
            raise UserError(f"parameters.{name}.{key}: expected a number above 0, got {settings[key]}")
    if "min" in settings and settings["min"] > settings["max"]:
        raise UserError(f"parameters.{name}: min {settings['min']} is above max {settings['max']}")
    if "log_uniform" in distribution and settings["min"] <= 0:
        raise UserError(f"parameters.{name}.min: {distribution} needs a number above 0, got {settings['min']}")
    if distribution == "categorical":
        values, probabilities = settings["values"], settings.get("probabilities")
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise UserError(f"parameters.{name}.values: expected a list of at least one value, got {values!r}")
        if probabilities and not _are_probabilities(probabilities, len(values)):
            expected = f"{len(values)} non-negative numbers with the sum 1"
            raise UserError(f"parameters.{name}.probabilities: expected {expected}, got {probabilities!r}")


def _are_probabilities(node: Any, count: int) -> bool:
    numbers = node if isinstance(node, Sequence) else ()
    are_numbers = all(isinstance(number, int | float) and number >= 0 for number in numbers)
    return are_numbers and len(numbers) == count and math.isclose(sum(numbers), 1)
