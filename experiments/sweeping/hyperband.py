"""`early_terminate` of a sweep: which trials are given up early, by W&B's schema and rule.

W&B counts iterations as values of the metric, not as steps of the optimizer, and so it is here. A trial is looked at
whenever it has logged one. (Li et al., Hyperband, arXiv 1603.06560; as successive halving of trials that come one
after the other, arXiv 1810.05934.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datamodules.records import UserError
from experiments.config.schema import Config

KEYS = ("type", "min_iter", "max_iter", "s", "eta", "strict")
MOST = 100  # brackets after min_iter, as W&B has them
LARGEST = 10**9  # number of values: no run logs more


@dataclass(frozen=True)
class Hyperband:
    """brackets: numbers of values at which trials are compared, ascending. eta: one of so many goes on from each.

    strict: what counts of a trial is its value at the bracket, else its best until now.
    """

    brackets: tuple[int, ...]
    eta: float
    strict: bool

    def reason(self, own: Sequence[float], others: Sequence[Sequence[float]], maximize: bool) -> str:
        """Why a trial is to be stopped, or "". own, others: the values of the metric that each trial has logged.

        It is compared at the last bracket that it has reached, with all that have reached it, and must be among the
        best 1/eta of them, rounded up: so the first to come is never stopped. Of equals all go on.
        """
        reached = [bracket for bracket in self.brackets if bracket <= len(own)]
        if not reached:
            return ""
        number = reached[-1]
        costs = [[_cost(value, maximize) for value in values] for values in (own, *others)]
        there = sorted(values[number - 1] for values in costs if len(values) >= number)
        places = math.ceil(round(len(there) / self.eta, 9))
        cost = costs[0][number - 1] if self.strict else min(costs[0])
        if cost <= there[places - 1]:
            return ""
        shown, needed = (-x if maximize else x for x in (cost, there[places - 1]))
        return f"{shown:.4g} at value {number}; the best {places} of {len(there)} have {needed:.4g}"


def _cost(value: float, maximize: bool) -> float:
    """What is smaller for a better value, and infinite for one that is no number."""
    return math.inf if math.isnan(value) else -value if maximize else value


def check_reached(rule: Hyperband, metric: str, config: Config) -> None:
    """Raise UserError if the runs of a configuration end before any can be given up."""
    every = {
        config.evaluation.split: config.trainer.max_steps,
        "val": config.evaluation.every_n_steps,
        "train": config.trainer.log_every_n_steps,
        "diag": config.diagnostics.every_n_steps,
    }.get(metric.partition("/")[0])
    if every and (count := math.ceil(config.trainer.max_steps / every)) <= rule.brackets[0]:
        raise UserError(
            f"early_terminate: no trial would be stopped: they are compared from value {rule.brackets[0]} of {metric} "
            f"on, and a run logs {count}, the last at its end"
        )


def read_hyperband(node: Any) -> Hyperband:
    """The rule of an early_terminate block. Raises UserError naming the key."""
    if not isinstance(node, Mapping):
        raise UserError(f"early_terminate: expected type, and min_iter or max_iter with s, got {node!r}")
    for key in node:
        if key not in KEYS:
            raise UserError(f"early_terminate: unknown key {key!r}; allowed are {', '.join(KEYS)}")
    if node.get("type") != "hyperband":
        raise UserError(f"early_terminate.type: got {node.get('type')!r}, allowed is hyperband")
    eta, strict = node.get("eta", 3), node.get("strict", False)
    if isinstance(eta, bool) or not isinstance(eta, int | float) or not 1 < eta <= LARGEST:
        raise UserError(f"early_terminate.eta: got {_shown(eta)}, allowed are numbers above 1, up to {LARGEST}")
    if not isinstance(strict, bool):
        raise UserError(f"early_terminate.strict: got {strict!r}, allowed are true and false")
    return Hyperband(_brackets(node, eta), eta, strict)


def _brackets(node: Mapping[str, Any], eta: float) -> tuple[int, ...]:
    """min_iter, min_iter * eta, ...; or the s of max_iter / eta, max_iter / eta^2, ... that are 1 or more."""
    if ("min_iter" in node) == ("max_iter" in node) or ("max_iter" in node) != ("s" in node):
        raise UserError("early_terminate: give min_iter, or max_iter with s, not both")
    for key in ("min_iter", "max_iter", "s"):
        value = node.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
            allowed = f"whole numbers from 1 to {LARGEST}"
            raise UserError(f"early_terminate.{key}: got {_shown(value)}, allowed are {allowed}")
    found, number = set(), float(node.get("min_iter", node.get("max_iter")))
    if "min_iter" in node:
        for _ in range(MOST):
            if number <= LARGEST:
                found.add(int(number))
                number *= eta
    else:
        for _ in range(node["s"]):
            number /= eta
            if number < 1:
                break
            found.add(int(number))
    if not found:
        raise UserError(
            f"early_terminate: max_iter {node['max_iter']} over eta {eta} is below 1, so no trial is stopped"
        )
    return tuple(sorted(found))


def _shown(value: Any) -> str:
    """Of a number with thousands of digits, which Python refuses to write, that it is large."""
    large = isinstance(value, int) and abs(value) > 10**100
    return "a number of more than 100 digits" if large else repr(value)
