"""Delta_MTL equals a few lines of numpy, and its intervals cover what they should."""

import numpy as np
import pytest

from datamodules.records import UserError
from lightning_modules.retrieval.relative_gain import relative_gains


def world(seed, queries=40, joint_seeds=2, single_seeds=3):
    """Return the values of a joint model and of single-task models on two tasks, one with two benchmarks."""
    rng = np.random.default_rng(seed)

    def pair(better):
        difficulty = rng.uniform(0.2, 0.6, size=queries)
        joint = difficulty + better + 0.05 * rng.normal(size=(joint_seeds, queries))
        return joint, difficulty + 0.05 * rng.normal(size=(single_seeds, queries))

    return {"search": {"first": pair(0.1), "second": pair(-0.02)}, "links": {"third": pair(0.05)}}


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_gains_are_means_over_benchmarks_and_then_over_tasks(lower_is_better):
    tasks, sign = world(0), -1 if lower_is_better else 1
    gains = relative_gains(tasks, lower_is_better=lower_is_better, draws=100)
    by_task = {}
    for task, benchmarks in tasks.items():
        values = []
        for name, (joint, single) in benchmarks.items():
            values.append(sign * (np.mean(joint) - np.mean(single)) / np.mean(single))
            assert gains.benchmarks[name].gain == pytest.approx(values[-1], rel=1e-12)
        by_task[task] = np.mean(values)
        assert gains.tasks[task].gain == pytest.approx(by_task[task], rel=1e-12)
    assert gains.delta_mtl.gain == pytest.approx(np.mean(list(by_task.values())), rel=1e-12)
    assert by_task["search"] != by_task["links"]


def resampled_delta(tasks, rng):
    """Draw queries, and the seeds of each model, and return Delta_MTL."""
    joint_seeds = rng.integers(2, size=2)
    of_tasks = []
    for benchmarks in tasks.values():
        single_seeds = rng.integers(3, size=3)
        of_benchmarks = []
        for joint, single in benchmarks.values():
            queries = rng.integers(joint.shape[1], size=joint.shape[1])
            m, s = joint[joint_seeds][:, queries].mean(), single[single_seeds][:, queries].mean()
            of_benchmarks.append((m - s) / s)
        of_tasks.append(np.mean(of_benchmarks))
    return np.mean(of_tasks)


def test_interval_equals_that_of_a_plain_loop():
    tasks = world(1)
    gains, rng = relative_gains(tasks, draws=20_000, level=0.9), np.random.default_rng(5)
    expected = np.quantile([resampled_delta(tasks, rng) for _ in range(20_000)], [0.05, 0.95])
    width = expected[1] - expected[0]
    assert [gains.delta_mtl.low, gains.delta_mtl.high] == pytest.approx(expected.tolist(), abs=0.03 * width)


def test_pairing_makes_the_interval_of_a_constant_gain_narrow():
    """The models differ by a factor on every query, so the gain does not depend on the queries."""
    single = np.random.default_rng(0).uniform(0.1, 1.0, size=(1, 30))
    gain = relative_gains({"search": {"first": (1.1 * single, single)}}, draws=1000).delta_mtl
    assert [gain.gain, gain.low, gain.high] == pytest.approx([0.1] * 3, abs=1e-12)


def test_equal_models_gain_exactly_0():
    tasks = {
        task: {name: (single[:1], single[:1].copy()) for name, (_, single) in benchmarks.items()}
        for task, benchmarks in world(2).items()
    }
    gains = relative_gains(tasks, draws=1000)
    for gain in (*gains.benchmarks.values(), *gains.tasks.values(), gains.delta_mtl):
        assert (gain.gain, gain.low, gain.high) == (0.0, 0.0, 0.0)


def test_interval_covers_the_true_gain_in_most_worlds():
    """The true gain of the population is 10 %; 95 of 100 intervals cover it, and fewer than 85 would be a surprise."""
    covered = 0
    for seed in range(100):
        rng = np.random.default_rng([9, seed])
        pairs = []
        for _ in range(2):
            single = rng.uniform(0.2, 0.8, size=(1, 80))
            pairs.append((1.1 * single + 0.1 * rng.normal(size=single.shape), single))
        gain = relative_gains({"a": {"x": pairs[0]}, "b": {"y": pairs[1]}}, draws=400).delta_mtl
        covered += gain.low < 0.1 < gain.high
    assert covered >= 85


@pytest.mark.parametrize("single", [np.zeros((1, 10)), np.eye(1, 10)])
def test_single_task_model_that_scores_0_raises_user_error(single):
    """The second is 0 except on one query, which many resampled sets lack."""
    with pytest.raises(UserError, match="first: the single-task model scores 0"):
        relative_gains({"search": {"first": (np.ones((1, 10)), single)}}, draws=200)
