"""Significance tests for the difference between two systems, as pure functions of per-query values.

Shapes: Q queries, S seeds of a system. Values are (S, Q): one row per seed, with the same queries in all rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

BLOCK = 1 << 22  # number of random numbers to draw at a time
ROUNDING = 1e-12  # sums of the same numbers in different orders differ by less


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two systems A and B on one benchmark.

    queries: number of queries.
    mean_a, mean_b: means over seeds and queries.
    spread_a, spread_b: standard deviation of the seeds' means (n - 1), or None for a single seed.
    difference: mean_a - mean_b. low, high: confidence interval of the difference.
    p: two-sided p-value of "no difference".
    wins, ties, losses: numbers of queries on which A is better, equal, worse.
    """

    queries: int
    mean_a: float
    mean_b: float
    spread_a: float | None
    spread_b: float | None
    difference: float
    low: float
    high: float
    p: float
    wins: int
    ties: int
    losses: int


def compare(
    a: np.ndarray,
    b: np.ndarray,
    *,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
    paired_seeds: bool = False,
) -> Comparison:
    """Compare two systems on the same queries. a: (S, Q), b: (S', Q). paired_seeds: as in bootstrap_interval."""
    differences = _differences(a, b)
    low, high = bootstrap_interval([(a, b)], level=level, draws=draws, seed=seed, paired_seeds=paired_seeds)
    return Comparison(
        queries=len(differences),
        mean_a=float(a.mean()),
        mean_b=float(b.mean()),
        spread_a=spread(a),
        spread_b=spread(b),
        difference=float(a.mean() - b.mean()),
        low=low,
        high=high,
        p=sign_flip_p(differences, draws=draws, seed=seed),
        wins=int((differences > 0).sum()),
        ties=int((differences == 0).sum()),
        losses=int((differences < 0).sum()),
    )


def spread(values: np.ndarray) -> float | None:
    """Return the standard deviation of the seeds' means, or None for a single seed. values: (S, Q)."""
    return float(values.mean(1).std(ddof=1)) if len(values) > 1 else None


def bootstrap_interval(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
    paired_seeds: bool = False,
) -> tuple[float, float]:
    """Return the percentile interval of mean(a) - mean(b) when the same queries are resampled for both systems.

    Paired bootstrap (Efron and Tibshirani 1993, chapter 13; Sakai 2006 for retrieval). With several seeds, the seeds of
    each system are resampled too, as the upper level of a hierarchy: the interval then covers both new queries and new
    training runs. With two or three seeds, it is still too narrow.

    pairs: values of A, (S, Q), and of B, (S', Q), on each of several benchmarks. The interval is for the mean over
        benchmarks. A draw uses the same seeds on all benchmarks, because each training run has a value on every
        benchmark.
    paired_seeds: whether A and B have the same seeds, in the same order. Such runs share batches and random initial
        weights. Both then get the same draws of seeds, so that effects of a seed on both cancel.
    """
    rng = np.random.default_rng([seed, 1])
    shares = [resampled_seeds(len(side), draws, rng) for side in pairs[0]]
    if paired_seeds:
        shares[1] = shares[0]
    differences = np.zeros(draws)
    for pair in pairs:
        means_a, means_b = resampled_means(pair, shares, rng)
        differences += means_a - means_b
    return percentile_interval(differences / len(pairs), level)


def resampled_seeds(num_seeds: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Return the share of each seed when the seeds are resampled, (draws, S)."""
    return rng.multinomial(num_seeds, [1 / num_seeds] * num_seeds, size=draws) / num_seeds


def resampled_means(
    tables: Sequence[np.ndarray], shares: Sequence[np.ndarray], rng: np.random.Generator
) -> list[np.ndarray]:
    """Return the mean of each system when the same queries are resampled for all systems, (draws,) each.

    tables: values of each system on the same queries, (S, Q).
    shares: share of each seed of the system in each draw, (draws, S).
    """
    rows, num_queries, draws = np.concatenate(tables), tables[0].shape[1], len(shares[0])
    means, done = np.empty((draws, len(rows))), 0
    for size in _blocks(draws, num_queries):
        chosen = rng.integers(num_queries, size=(size, num_queries), dtype=np.int32)
        chosen += np.arange(size, dtype=np.int32)[:, None] * num_queries
        times = np.bincount(chosen.ravel(), minlength=size * num_queries).reshape(size, num_queries)
        means[done : done + size] = times @ rows.T / num_queries  # (size, S of all systems)
        done += size
    by_system = np.split(means, np.cumsum([len(table) for table in tables])[:-1], axis=1)
    return [(values * share).sum(1) for values, share in zip(by_system, shares, strict=True)]


def percentile_interval(draws: np.ndarray, level: float) -> tuple[float, float]:
    """Return the confidence interval from the quantiles of a bootstrap's draws, (draws,)."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_difference_p(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Return sign_flip_p for the mean of mean(a) - mean(b) over benchmarks. pairs: as for bootstrap_interval."""
    return sign_flip_p(np.concatenate([_differences(a, b) / a.shape[1] for a, b in pairs]))


def _differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the difference of each query, (Q,). Differences that are only rounding errors become 0."""
    differences = a.mean(0) - b.mean(0)
    differences[np.abs(differences) < ROUNDING] = 0.0
    return differences


def sign_flip_p(differences: np.ndarray, *, draws: int = 10_000, seed: int = 0) -> float:
    """Return the two-sided p-value of the mean difference, under the null hypothesis that A and B are interchangeable.

    Fisher's paired randomisation test (Smucker et al., CIKM 2007). It uses all 2^n assignments if there are at most
    `draws`. Otherwise it uses `draws` random ones plus the observed one, so that p is at least 1 / (draws + 1).

    differences: (Q,).
    """
    nonzero = differences[differences != 0]  # swapping zeros has no effect
    if not len(nonzero):
        return 1.0
    observed = abs(nonzero.sum()) - ROUNDING * len(nonzero)
    if len(nonzero) <= np.log2(draws):
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(nonzero))))
        return float((np.abs(signs @ nonzero) >= observed).mean())
    rng, as_large = np.random.default_rng([seed, 2]), 0
    for size in _blocks(draws, len(nonzero)):
        swapped = rng.integers(2, size=(size, len(nonzero)), dtype=np.int8).astype(np.float64)
        as_large += int((np.abs(nonzero.sum() - 2 * (swapped @ nonzero)) >= observed).sum())
    return (as_large + 1) / (draws + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of several tests to control the family-wise error rate (Holm, 1979)."""
    order = np.argsort(p_values, kind="stable")
    raised = np.asarray(p_values, dtype=float)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(raised), 1.0)
    return adjusted.tolist()


def _blocks(draws: int, width: int) -> Iterator[int]:
    """Yield the number of draws in each block of about BLOCK random numbers. width: numbers per draw."""
    size = max(1, BLOCK // max(1, width))
    for start in range(0, draws, size):
        yield min(size, draws - start)
