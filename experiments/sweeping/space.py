"""The values that the trials of a sweep have, as W&B's format describes them.

Trial i of a sweep is a function of its file, the seed and i: any machine, or rank, can compute it by itself.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datamodules.records import UserError


@dataclass(frozen=True)
class Parameter:
    """name: a key of the configuration, with dots. distribution: of DISTRIBUTIONS. node: as it stands in the file."""

    name: str
    distribution: str
    node: Mapping[str, Any]

    def draw(self, random: random.Random) -> Any:
        return _rounded(DISTRIBUTIONS[self.distribution].draw(random, self.node), self.node.get("q"))

    def grid(self) -> list[Any]:
        """All values. Raises UserError if they are infinitely many."""
        node = self.node
        if self.distribution in ("constant", "categorical"):
            return list(node.get("values", [node.get("value")]))
        if self.distribution == "int_uniform":
            return list(range(node["min"], node["max"] + 1))
        if self.distribution == "q_uniform":
            q = node.get("q", 1)
            steps = range(math.ceil(node["min"] / q - 1e-9), math.floor(node["max"] / q + 1e-9) + 1)
            return [_rounded(step * q, q) for step in steps]
        raise UserError(f"parameters.{self.name}: {self.distribution} has no grid; give values, or method: random")


@dataclass(frozen=True)
class Distribution:
    """draw: of a random.Random and the node; needs, may: its keys."""

    draw: Callable[[random.Random, Mapping[str, Any]], Any]
    needs: tuple[str, ...]
    may: tuple[str, ...] = ()


def _uniform(draw: random.Random, node: Mapping[str, Any]) -> float:
    return draw.uniform(node["min"], node["max"])


def _log_uniform(draw: random.Random, node: Mapping[str, Any]) -> float:
    value = math.exp(draw.uniform(math.log(node["min"]), math.log(node["max"])))
    return min(max(value, node["min"]), node["max"])  # exp(log(x)) may be a last digit more


def _normal(draw: random.Random, node: Mapping[str, Any]) -> float:
    return draw.normalvariate(node.get("mu", 0.0), node.get("sigma", 1.0))


def _log_normal(draw: random.Random, node: Mapping[str, Any]) -> float:
    return math.exp(_normal(draw, node))


RANGE = ("min", "max")
DISTRIBUTIONS = {
    "constant": Distribution(lambda draw, node: node["value"], ("value",)),
    "categorical": Distribution(
        lambda draw, node: draw.choices(node["values"], node.get("probabilities"))[0], ("values",), ("probabilities",)
    ),
    "int_uniform": Distribution(lambda draw, node: draw.randint(node["min"], node["max"]), RANGE),
    "uniform": Distribution(_uniform, RANGE),
    "q_uniform": Distribution(_uniform, RANGE, ("q",)),
    "log_uniform_values": Distribution(_log_uniform, RANGE),
    "q_log_uniform_values": Distribution(_log_uniform, RANGE, ("q",)),
    "normal": Distribution(_normal, (), ("mu", "sigma")),
    "q_normal": Distribution(_normal, (), ("mu", "sigma", "q")),
    "log_normal": Distribution(_log_normal, (), ("mu", "sigma")),
    "q_log_normal": Distribution(_log_normal, (), ("mu", "sigma", "q")),
}
INSTEAD = {  # of W&B's others
    "log_uniform": "log_uniform_values, whose min and max are the values and not their logarithms",
    "q_log_uniform": "q_log_uniform_values, whose min and max are the values and not their logarithms",
    "inv_log_uniform": "log_uniform_values",
    "inv_log_uniform_values": "log_uniform_values, which is the same",
    "categorical_w_probabilities": "categorical with probabilities",
}


def _rounded(value: Any, q: float | None) -> Any:
    """The nearest multiple of q, a whole number if q is one."""
    if q is None:
        return value
    steps = round(value / q)
    return steps * q if isinstance(q, int) else float(f"{steps * q:.12g}")


def read_parameters(node: Mapping[str, Any], prefix: str = "") -> list[Parameter]:
    """The parameters of a sweep's file, those nested in others too. Raises UserError naming key and value."""
    found: list[Parameter] = []
    for key, inner in node.items():
        name = f"{prefix}{key}"
        if not isinstance(inner, Mapping):
            raise UserError(f"parameters.{name}: expected value, values, or min and max; got {inner!r}")
        if "parameters" in inner:
            found += read_parameters(inner["parameters"], f"{name}.")
        else:
            found.append(_parameter(name, inner))
    return found


def _parameter(name: str, node: Mapping[str, Any]) -> Parameter:
    distribution = node.get("distribution") or _understood(name, node)
    if distribution not in DISTRIBUTIONS:
        instead = INSTEAD.get(distribution, ", ".join(DISTRIBUTIONS))
        raise UserError(f"parameters.{name}.distribution: got {distribution!r}, take {instead}")
    kind, given = DISTRIBUTIONS[distribution], node.keys() - {"distribution"}
    if missing := [key for key in kind.needs if key not in given]:
        raise UserError(f"parameters.{name}: {distribution} needs {' and '.join(missing)}")
    if unknown := sorted(given - {*kind.needs, *kind.may}):
        raise UserError(
            f"parameters.{name}: unknown key {unknown[0]!r}; {distribution} has {', '.join((*kind.needs, *kind.may))}"
        )
    _check_numbers(name, distribution, node)
    return Parameter(name, distribution, node)


def _understood(name: str, node: Mapping[str, Any]) -> str:
    """The distribution of a parameter that names none."""
    if "values" in node:
        return "categorical"
    if "value" in node:
        return "constant"
    if "min" in node and "max" in node:
        types = {type(node["min"]), type(node["max"])}
        if types == {int}:
            return "int_uniform"
        if types == {float}:
            return "uniform"
        raise UserError(f"parameters.{name}: min and max must both be whole numbers, or both have a point")
    raise UserError(f"parameters.{name}: expected value, values, min and max, or a distribution; got {', '.join(node)}")


def _check_numbers(name: str, distribution: str, node: Mapping[str, Any]) -> None:
    for key in ("min", "max", "mu", "sigma", "q"):
        allowed = int if distribution == "int_uniform" else (int, float)
        if key in node and (isinstance(node[key], bool) or not isinstance(node[key], allowed)):
            raise UserError(f"parameters.{name}.{key}: got {node[key]!r}, expected a number")
    if "min" in node and node["min"] > node["max"]:
        raise UserError(f"parameters.{name}: min {node['min']} is above max {node['max']}")
    if "log_uniform" in distribution and node["min"] <= 0:
        raise UserError(f"parameters.{name}.min: got {node['min']}, {distribution} needs a number above 0")
    for key in ("q", "sigma"):
        if node.get(key, 1) <= 0:
            raise UserError(f"parameters.{name}.{key}: got {node[key]}, allowed are numbers above 0")
    if distribution == "categorical":
        _check_values(name, node["values"], node.get("probabilities"))


def _check_values(name: str, values: Any, probabilities: Any) -> None:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise UserError(f"parameters.{name}.values: expected a list of at least one, got {values!r}")
    if probabilities is not None and (len(probabilities) != len(values) or not math.isclose(sum(probabilities), 1)):
        raise UserError(f"parameters.{name}.probabilities: expected {len(values)} that sum to 1, got {probabilities}")


def trials(method: str, parameters: Sequence[Parameter], run_cap: int | None, seed: int) -> Iterator[dict[str, Any]]:
    """The parameters of each trial: name -> value, of plain Python types. A grid's last parameter changes first."""
    names = [parameter.name for parameter in parameters]
    if method == "grid":
        combinations = itertools.product(*(parameter.grid() for parameter in parameters))
        for values in itertools.islice(combinations, run_cap):
            yield dict(zip(names, values, strict=True))
        return
    for number in range(run_cap or 0):
        yield {p.name: p.draw(random.Random(f"{seed}/{number}/{p.name}")) for p in parameters}
