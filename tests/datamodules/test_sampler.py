import subprocess
import sys
from collections import Counter

import pytest

from datamodules.sampler import RoundRobinSchedule, mix

SIZES = {"classification": 50, "link_prediction": 23, "search": 7}


@pytest.fixture
def schedule():
    return RoundRobinSchedule(SIZES, batch_size=4, seed=1)


def test_tasks_take_turns(schedule):
    assert [schedule.task(step) for step in range(4)] == [
        "classification",
        "link_prediction",
        "search",
        "classification",
    ]


def test_pure_in_seed_and_step(schedule):
    steps = [5, 0, 300, 17, 5]
    again = RoundRobinSchedule(SIZES, batch_size=4, seed=1)
    assert [schedule.draws(s) for s in steps] == [again.draws(s) for s in steps]
    other = RoundRobinSchedule(SIZES, batch_size=4, seed=2)
    assert [schedule.draws(s) for s in range(9)] != [other.draws(s) for s in range(9)]


def test_the_same_in_every_process(schedule):
    command = (
        f"from datamodules.sampler import RoundRobinSchedule as S;print(S({SIZES!r}, batch_size=4, seed=1).draws(100))"
    )
    elsewhere = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert elsewhere.stdout.strip() == str(schedule.draws(100))


def test_every_pass_takes_every_example_once(schedule):
    drawn = {task: Counter() for task in SIZES}
    for step in range(3 * 100):
        drawn[schedule.task(step)].update(schedule.draws(step))
    for task, size in SIZES.items():
        complete = 400 // size  # passes that 100 batches of 4 finish
        for epoch in range(complete):
            assert [drawn[task][example, epoch] for example in range(size)] == [1] * size


def test_passes_differ(schedule):
    order = [example for step in range(2, 3 * 60, 3) for example, _ in schedule.draws(step)]
    first, second = order[:7], order[7:14]
    assert sorted(first) == sorted(second)
    assert first != second


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_divide_the_global_batch(world_size):
    one = RoundRobinSchedule(SIZES, batch_size=8 * world_size, seed=1)
    each = RoundRobinSchedule(SIZES, batch_size=8, seed=1)
    for step in (0, 1, 2, 50, 1001):
        parts = [each.draws(step, rank, world_size) for rank in range(world_size)]
        assert one.task(step) == each.task(step)
        assert [draw for part in parts for draw in part] == one.draws(step)


def test_mix_tells_keys_apart():
    assert len({mix(a, b) for a in range(20) for b in ("x", "y", 1)}) == 60
