"""Early termination of trials, with W&B's keys and W&B's rule (`early_terminate`).

As on W&B's server, an iteration is a logged value of the metric, not an optimizer step. A trial is compared whenever
it has logged a value: asynchronous successive halving (Li et al., arXiv 1810.05934, section 3.2).

Optuna's HyperbandPruner is not used. It assigns trials to brackets by a hash, must know how many values a run logs,
only accepts integers for eta, rounds down the number of trials that continue, and gives no reason. The same file would
stop other trials here than on W&B's server.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat, takewhile
from typing import Literal

from datamodules.options import option
from datamodules.records import UserError
from experiments.config.schema import Config

LARGEST = 10**9  # maximum number of values; no run logs more
MAX_BRACKETS = 100  # after min_iter, as on W&B's server


@dataclass
class Hyperband:
    """Stop trials that are behind. A bracket is the number of logged values at which trials are compared."""

    type: Literal["hyperband"] = option(help="rule; W&B has no other")
    min_iter: int | None = option(
        None, "first bracket; the others are min_iter * eta, min_iter * eta^2, ...", minimum=1, maximum=LARGEST
    )
    max_iter: int | None = option(
        None, "with s, instead of min_iter: brackets max_iter / eta, max_iter / eta^2, ...", minimum=1, maximum=LARGEST
    )
    s: int | None = option(None, "number of brackets, with max_iter", minimum=1, maximum=LARGEST)
    eta: float = option(3.0, "one trial in eta continues after each bracket", above=1, maximum=LARGEST)
    strict: bool = option(False, "compare a trial by its value at the bracket, not by its best value so far")

    def brackets(self) -> list[int]:
        """Return after how many logged values trials are compared, in ascending order; [] if the keys define none."""
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

        The trial is compared at the last bracket that it has reached, with all trials that have reached it. It
        continues if it is among the best 1/eta of them, rounded up, or ties with one of these; so the first trial to
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
        return f"{shown:.4g} at value {bracket}; the best {num_continue} of {len(ranking)} have reached {needed:.4g}"

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
