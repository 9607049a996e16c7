"""Gains of one arm over another, with 95 % intervals, from runs that share seeds and test queries.

With LONG_TESTS=1, worlds have all seeds and arms of the table in docs/neighbours.md, else those that their assertions
need.
"""

import os
from dataclasses import dataclass

import numpy as np
from scipy import stats

LONG = "LONG_TESTS" in os.environ


@dataclass(frozen=True)
class Gain:
    """A mean difference, and half of its interval.

    of_seeds: half of the interval over seeds (paired t test), which covers other worlds and other trainings.
    of_queries: half of the interval over all test queries of these seeds. It is narrower, because it treats the
        queries of a seed as independent.
    """

    mean: float
    of_seeds: float
    of_queries: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.of_seeds:.3f} over seeds, ± {self.of_queries:.3f} over queries"


def gain_of(after, before) -> Gain:
    """Return the gain of one arm over another. after, before: values (S, Q) of S seeds, or (S,) without queries."""
    differences = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    seeds = differences.reshape(len(differences), -1).mean(1)
    return Gain(float(seeds.mean()), half_interval(seeds), half_interval(differences.ravel()))


def half_interval(values: np.ndarray) -> float:
    return float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
