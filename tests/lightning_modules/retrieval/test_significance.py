"""Significance tests against SciPy, and on values with a known difference."""

import numpy as np
import pytest
from scipy import stats

from lightning_modules.retrieval.significance import (
    bootstrap_interval,
    compare,
    holm,
    mean_difference_p,
    sign_flip_p,
)


def values(num_queries: int, better: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of two systems, (1, Q) each, like nDCG; the first is better by about that much."""
    rng = np.random.default_rng(seed)
    queries = rng.beta(0.6, 0.8, num_queries)
    a, b = (np.clip(queries + shift + rng.normal(0, 0.2, num_queries), 0, 1) for shift in (better, 0.0))
    return a[None], b[None]


def test_p_equals_scipy_if_all_assignments_are_counted():
    for seed in range(20):
        a, b = values(9, 0.05, seed)
        b[0, :2] = a[0, :2]  # ties
        scipy = stats.permutation_test(
            (a[0], b[0]), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples", n_resamples=np.inf
        )
        assert sign_flip_p((a - b)[0]) == pytest.approx(scipy.pvalue, abs=1e-12)


@pytest.mark.parametrize("better", [0.0, 0.02, 0.05])
def test_p_and_interval_equal_scipy_up_to_chance(better):
    a, b = values(300, better, seed=3)
    comparison = compare(a, b)
    scipy = stats.permutation_test(
        (a[0], b[0]), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples", n_resamples=10_000, rng=1
    )
    deviation = np.sqrt(2 * max(scipy.pvalue, 1e-4) / 10_000)  # of the difference of two such estimates
    assert comparison.p == pytest.approx(scipy.pvalue, abs=4 * deviation)
    differences = (a - b)[0]
    theirs = stats.bootstrap((differences,), np.mean, method="percentile", n_resamples=10_000, rng=1)
    error = differences.std() / np.sqrt(len(differences))
    assert comparison.low == pytest.approx(theirs.confidence_interval.low, abs=0.1 * error)
    assert comparison.high == pytest.approx(theirs.confidence_interval.high, abs=0.1 * error)


def test_false_alarms_stay_within_the_level_and_power_equals_that_of_the_t_test():
    """At a level of 5 %, more than 20 false alarms in 200 draws have a chance of 0.1 %."""

    def significant(better: float) -> tuple[int, int]:
        pairs = [values(150, better, seed) for seed in range(200)]
        ours = sum(compare(a, b, draws=499, seed=i).p < 0.05 for i, (a, b) in enumerate(pairs))
        return ours, sum(stats.ttest_rel(a[0], b[0]).pvalue < 0.05 for a, b in pairs)

    assert significant(0.0)[0] <= 20
    ours, theirs = significant(0.1)
    assert ours >= 180
    assert abs(ours - theirs) <= 4


def test_intervals_contain_the_truth_at_their_level():
    inside = 0
    for seed in range(200):
        a = np.random.default_rng(seed).normal(0.3, 1.0, (1, 100))
        low, high = bootstrap_interval([(a, np.zeros((1, 100)))], draws=1000, seed=seed)
        inside += low <= 0.3 <= high
    assert 180 <= inside <= 199  # 190 are expected, and 99.9 % of all sets of 200 are in this range


def test_seeds_that_disagree_widen_the_interval_and_average_in_p():
    a, b = values(200, 0.0, seed=5)
    agreeing = np.repeat(a, 3, axis=0)
    disagreeing = agreeing + np.array([[-0.1], [0.0], [0.1]])
    one, other = compare(agreeing, b), compare(disagreeing, b)
    assert other.high - other.low > 1.5 * (one.high - one.low)
    assert other.mean_a == pytest.approx(one.mean_a)
    assert other.p == one.p
    assert one.spread_a == pytest.approx(0.0)
    assert other.spread_a == pytest.approx(0.1)
    assert one.spread_b is None


def test_what_a_seed_does_to_both_systems_cancels_if_seeds_are_paired():
    a, b = values(200, 0.0, seed=5)
    shift = np.array([[-0.2], [0.0], [0.2]])
    of_seeds = a + shift, b + shift
    assert bootstrap_interval([of_seeds], paired_seeds=True) == pytest.approx(bootstrap_interval([(a, b)]), abs=0.003)
    low, high = bootstrap_interval([of_seeds])
    assert high - low > 0.4
    assert bootstrap_interval([(of_seeds[0], of_seeds[0])], paired_seeds=True) == pytest.approx((0, 0), abs=1e-15)
    opposed = bootstrap_interval([(a + shift, b - shift)], paired_seeds=True)
    assert opposed[1] - opposed[0] > 1.3 * (high - low)


def test_the_mean_over_benchmarks_weighs_each_benchmark_equally():
    """Against SciPy, whose statistic is the mean of the benchmarks' means."""
    pairs = [values(count, better, seed=count) for count, better in ((4, 0.1), (7, 0.02))]
    ends = np.cumsum([a.shape[1] for a, _ in pairs])[:-1]

    def mean_of_means(x, y, axis):
        return np.mean([part.mean(axis) for part in np.split(x - y, ends, axis)], axis=0)

    a, b = (np.concatenate([pair[side][0] for pair in pairs]) for side in (0, 1))
    scipy = stats.permutation_test((a, b), mean_of_means, permutation_type="samples", n_resamples=np.inf)
    assert mean_difference_p(pairs) == pytest.approx(scipy.pvalue, abs=1e-12)


def test_the_interval_of_a_mean_over_benchmarks_has_the_variance_of_a_mean():
    pairs = [values(count, 0.05, seed=count) for count in (300, 500)]
    low, high = bootstrap_interval(pairs)
    errors = [(a - b).std() / np.sqrt(a.shape[1]) for a, b in pairs]
    expected = 2 * 1.96 * np.sqrt(np.square(errors).sum()) / 2
    assert high - low == pytest.approx(expected, rel=0.06)
    assert (low + high) / 2 == pytest.approx(np.mean([(a - b).mean() for a, b in pairs]), abs=0.1 * expected)
    # Seeds of one training go up and down together on all benchmarks, so their spread does not average out.
    shift = np.array([[-0.2], [0.0], [0.2]])
    apart = [(a + shift, b) for a, b in pairs]
    low, high = bootstrap_interval(apart)
    assert high - low == pytest.approx(2 * 1.96 * shift.std() / np.sqrt(3), rel=0.1)


def test_wins_ties_and_losses_are_counted():
    a, b = np.array([[1.0, 0.5, 0.1 + 0.2, 0.0]]), np.array([[0.0, 0.7, 0.3, 0.0]])
    comparison = compare(a, b)
    assert (comparison.wins, comparison.ties, comparison.losses) == (1, 2, 1)
    same = compare(a, a)
    assert (same.p, same.difference, same.low, same.high) == (1.0, 0.0, 0.0, 0.0)


def test_holm_correction():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # by hand
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
