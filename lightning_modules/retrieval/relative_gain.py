"""Delta_MTL: the relative gain of a joint model over one model per task, averaged over tasks.

Delta_MTL = 1/T sum over tasks t of s (M_t - M_t,single) / M_t,single, where M is a metric, and s is -1 if lower values
are better, else 1 (Vandenhende et al., arXiv 2004.13379). The gain of a task with several benchmarks is the
mean over them.

Shapes: Q queries, S seeds of a system.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from datamodules.records import UserError
from lightning_modules.retrieval.significance import (
    ROUNDING,
    percentile_interval,
    resampled_means,
    resampled_seeds,
)

Pair = tuple[np.ndarray, np.ndarray]  # values of the joint model, (S, Q), and of the single-task model, (S', Q)


@dataclass(frozen=True, slots=True)
class Gain:
    """A relative gain: 0.1 is 10 % better. low, high: confidence interval."""

    gain: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class RelativeGains:
    """Gains by name, and Delta_MTL, their mean over tasks."""

    benchmarks: dict[str, Gain]
    tasks: dict[str, Gain]
    delta_mtl: Gain


def relative_gains(
    tasks: Mapping[str, Mapping[str, Pair]],
    *,
    lower_is_better: bool = False,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> RelativeGains:
    """Return the relative gains of a joint model over the single-task models.

    The intervals come from a paired bootstrap, which resamples the same queries for both models. With several seeds,
    the seeds of each model are resampled too. All benchmarks share the seeds of the joint model, and all benchmarks of
    a task share the seeds of its single-task model.

    tasks: task -> benchmark -> values of both models.

    Raises UserError if a single-task model's mean is 0, on all queries or on a resampled set.
    """
    rng, sign = np.random.default_rng([seed, 3]), -1 if lower_is_better else 1
    joint_seeds = len(next(iter(next(iter(tasks.values())).values()))[0])
    joint_shares = resampled_seeds(joint_seeds, draws, rng)
    gains: dict[str, dict[str, np.ndarray]] = {}  # (1 + draws,): the gain, then the gain in each draw
    for task, benchmarks in tasks.items():
        single_shares = resampled_seeds(len(next(iter(benchmarks.values()))[1]), draws, rng)
        gains[task] = {}
        for name, pair in benchmarks.items():
            means = resampled_means(pair, (joint_shares, single_shares), rng)
            joint, single = (np.append(x.mean(), resampled) for x, resampled in zip(pair, means, strict=True))
            if not single.all():
                raise UserError(
                    f"{name}: the single-task model scores 0 on all queries, or on all of a resampled set, so a gain "
                    "relative to it is undefined; choose another metric, or leave the benchmark out"
                )
            difference = joint - single
            difference[np.abs(difference) < ROUNDING] = 0.0
            gains[task][name] = sign * difference / single
    task_gains = {task: np.mean(list(by_benchmark.values()), axis=0) for task, by_benchmark in gains.items()}
    return RelativeGains(
        benchmarks={name: _gain(g, level) for by_name in gains.values() for name, g in by_name.items()},
        tasks={task: _gain(g, level) for task, g in task_gains.items()},
        delta_mtl=_gain(np.mean(list(task_gains.values()), axis=0), level),
    )


def _gain(gains: np.ndarray, level: float) -> Gain:
    return Gain(float(gains[0]), *percentile_interval(gains[1:], level))
