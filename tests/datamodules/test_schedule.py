"""The schedule: a pure function of seed and step, with exact shares, passes and ranks."""

import itertools
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

from datamodules.records import UserError
from datamodules.schedule import Phase, Schedule, mix, task_weights

SIZES = {"classification": 50, "link_prediction": 23, "search": 7}


WEIGHTS = {"classification": 5, "link_prediction": 3, "search": 2}
PHASES = {
    "round_robin": (Phase(0),),
    "weights": (Phase(0, WEIGHTS),),
    "proportional": (Phase(0, task_weights("proportional", SIZES)),),
    "curriculum": (
        Phase(0),
        Phase(101, WEIGHTS),
        Phase(2500, {"classification": 1, "link_prediction": 1, "search": 900}),
    ),
}


def make(batch_size=4, seed=1, phases="round_robin", sizes=SIZES):
    return Schedule(sizes, dict.fromkeys(sizes, batch_size), seed, PHASES[phases])


@pytest.fixture
def schedule():
    return make()


def test_tasks_take_turns(schedule):
    assert [schedule.task(step) for step in range(4)] == [
        "classification",
        "link_prediction",
        "search",
        "classification",
    ]


def test_draws_depend_only_on_seed_and_step(schedule):
    steps = [5, 0, 300, 17, 5]
    again = make()
    assert [schedule.draws(s) for s in steps] == [again.draws(s) for s in steps]
    other = make(seed=2)
    assert [schedule.draws(s) for s in range(9)] != [other.draws(s) for s in range(9)]


@pytest.mark.slow
def test_schedule_is_the_same_in_every_process():
    command = "from tests.datamodules.test_schedule import make; s = make(phases='curriculum'); "
    command += "print(s.task(400), s.draws(400))"
    elsewhere = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    schedule = make(phases="curriculum")
    assert elsewhere.stdout.strip() == f"{schedule.task(400)} {schedule.draws(400)}"


@pytest.mark.parametrize("phases", PHASES)
def test_every_pass_has_every_example_once(phases):
    schedule = make(phases=phases)
    drawn = {task: Counter() for task in SIZES}
    for step in range(3000):
        drawn[schedule.task(step)].update(schedule.draws(step))
    for task, size in SIZES.items():
        complete = 4 * schedule.turns(3000, task) // size
        assert complete > 0
        for epoch in range(complete):
            assert [drawn[task][example, epoch] for example in range(size)] == [1] * size


def test_passes_have_different_orders(schedule):
    order = [example for step in range(2, 3 * 60, 3) for example, _ in schedule.draws(step)]
    first, second = order[:7], order[7:14]
    assert sorted(first) == sorted(second)
    assert first != second


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("phases", PHASES)
def test_ranks_divide_the_global_batch(world_size, phases):
    one, each = make(8 * world_size, phases=phases), make(8, phases=phases)
    for step in (0, 1, 2, 50, 1001):
        parts = [each.draws(step, rank, world_size) for rank in range(world_size)]
        assert one.task(step) == each.task(step)
        assert [draw for part in parts for draw in part] == one.draws(step)


def test_mix_distinguishes_keys():
    assert len({mix(a, b) for a in range(20) for b in ("x", "y", 1)}) == 60


@pytest.mark.parametrize("phases", PHASES)
def test_turns_counts_earlier_steps_of_a_task(phases):
    schedule, counts = make(phases=phases), Counter()
    for step in range(4200):
        if step % 7 == 0:
            assert {task: schedule.turns(step, task) for task in SIZES} == {task: counts[task] for task in SIZES}
        counts[schedule.task(step)] += 1


def test_shares_are_exact_after_every_block():
    schedule = make(phases="weights")
    for block in (1, 2, 7):
        turns = {task: schedule.turns(1000 * block, task) for task in SIZES}
        assert turns == {"classification": 500 * block, "link_prediction": 300 * block, "search": 200 * block}
    first, second = ([schedule.task(step) for step in range(start, start + 1000)] for start in (0, 1000))
    assert first != second  # each block has its own order
    longest = max(len(list(group)) for _, group in itertools.groupby(first))
    assert longest < 40


def test_tiny_share_gets_one_step_per_block():
    schedule = Schedule(
        SIZES, dict.fromkeys(SIZES, 4), 1, [Phase(0, {"classification": 1e6, "link_prediction": 1e6, "search": 1})]
    )
    assert schedule.turns(1000, "search") == 1
    assert sum(schedule.turns(1000, task) for task in SIZES) == 1000


def test_phase_starts_at_its_step():
    schedule = make(phases="curriculum")
    turns = ["classification", "link_prediction", "search"]
    assert [schedule.task(step) for step in range(101)] == (turns * 34)[:101]
    late = Counter(schedule.task(step) for step in range(2500, 3500))
    assert late["search"] > 990


def test_task_weights_of_each_schedule():
    assert task_weights("round_robin", SIZES) is None
    assert task_weights("together", SIZES) is None
    assert task_weights("proportional", SIZES) == SIZES
    assert task_weights("temperature", SIZES, 2.0) == {task: size**0.5 for task, size in SIZES.items()}
    assert task_weights("weights", SIZES, weights=WEIGHTS) == WEIGHTS


@pytest.mark.parametrize(
    ("strategy", "weights", "message"),
    [
        ("randomly", None, "schedule: expected one of round_robin, .*, got 'randomly'"),
        ("proportional", WEIGHTS, "weights: only the schedule 'weights' uses them"),
        ("weights", None, "expected a weight for each of classification, link_prediction, search"),
        ("weights", WEIGHTS | {"serach": 1}, "serach unknown"),
        ("weights", WEIGHTS | {"search": 0}, "expected numbers above 0"),
        ("weights", WEIGHTS | {"search": float("nan")}, "expected numbers above 0"),
    ],
)
def test_wrong_weights_raise_user_error(strategy, weights, message):
    with pytest.raises(UserError, match=message):
        task_weights(strategy, SIZES, weights=weights)


def test_phases_that_do_not_start_at_0_and_increase_raise_user_error():
    for firsts in ([1], [0, 5, 5], [0, 9, 3], []):
        with pytest.raises(UserError, match="the first must start at step 0 and the others at increasing steps"):
            Schedule(SIZES, dict.fromkeys(SIZES, 4), 1, [Phase(first) for first in firsts])


def test_late_steps_are_as_fast_as_early_ones():
    sizes = {"a": 1000, "b": 1000}
    schedule = Schedule(sizes, dict.fromkeys(sizes, 4), 1, [Phase(0, {"a": 3, "b": 1})])
    started = time.perf_counter()
    for step in range(10**9, 10**9 + 50):
        schedule.draws(step)
    assert time.perf_counter() - started < 5


def by_tokens(batch_tokens=100):
    costs = {task: np.random.default_rng(i).integers(5, 40, size) for i, (task, size) in enumerate(SIZES.items())}
    return Schedule(SIZES, dict.fromkeys(SIZES, batch_tokens), 1, PHASES["curriculum"], costs), costs


def test_batches_by_tokens_have_every_example_and_about_their_size():
    schedule, costs = by_tokens()
    drawn, sizes = {task: [] for task in SIZES}, []
    for step in range(200):
        task, draws = schedule.task(step), schedule.draws(step)
        drawn[task] += draws
        sizes.append(sum(costs[task][index] for index, _ in draws))
        assert abs(sizes[-1] - 100) < 40
    assert abs(np.mean(sizes) - 100) < 1
    for task, draws in drawn.items():
        last = draws[-1][1]
        for epoch in range(last):
            assert sorted(index for index, e in draws if e == epoch) == list(range(SIZES[task]))
        assert [e for _, e in draws] == sorted(e for _, e in draws)
        assert last <= schedule.passes(200, task) <= last + 1
    assert by_tokens()[0].draws(180) == schedule.draws(180)  # no step needs the earlier ones


@pytest.mark.parametrize("ranks", [2, 4])
def test_weights_of_ranks_give_the_mean_over_a_batch_by_tokens(ranks):
    whole, _ = by_tokens(400)
    parts, _ = by_tokens(400 // ranks)
    unequal = 0
    for step in range(50):
        shares = [parts.draws(step, rank, ranks) for rank in range(ranks)]
        assert [draw for share in shares for draw in share] == whole.draws(step)
        unequal += len({len(share) for share in shares}) > 1
        means = [np.mean([index for index, _ in share]) for share in shares]
        weighted = [mean * parts.share(step, rank, ranks) for rank, mean in enumerate(means)]
        assert np.mean(weighted) == pytest.approx(np.mean([index for index, _ in whole.draws(step)]))
    assert unequal > 25


def test_example_longer_than_a_batch_raises_user_error():
    with pytest.raises(UserError, match=r"batch_tokens: got 30, but an example of classification has 38 tokens"):
        by_tokens(30)


@pytest.mark.parametrize("tokens", [False, True])
def test_batches_are_from_one_collection_and_passes_cover_all(tokens):
    parts = {"first": 30, "second": 12, "third": 8}
    costs = {"classification": np.random.default_rng(0).integers(5, 40, 50)} if tokens else None
    sizes = {"classification": 50, "search": 7}
    batch_sizes = {"classification": 100 if tokens else 4, "search": 4}
    schedule = Schedule(sizes, batch_sizes, 1, costs=costs, collections={"classification": parts})
    ends = np.cumsum(list(parts.values()))
    drawn, of_collections = [], Counter()
    for step in range(4000):
        draws = schedule.draws(step)
        if schedule.task(step) == "classification":
            (collection,) = {int(np.searchsorted(ends, index, side="right")) for index, _ in draws}
            of_collections[collection] += 1
            drawn += draws
            ranks = [schedule.draws(step, rank, 2) for rank in range(2)]
            (_one,) = {int(np.searchsorted(ends, index, side="right")) for draws in ranks for index, _ in draws}
            weights = [schedule.share(step, rank, 2) for rank in range(2)]
            assert np.mean(weights) == pytest.approx(1)
        else:
            assert all(index < 7 for index, _ in draws)
    share = np.array([of_collections[i] for i in range(3)]) / 2000
    assert np.allclose(share, [0.6, 0.24, 0.16], atol=2e-3)
    for begin, end in zip(ends - list(parts.values()), ends, strict=True):
        its = [(index, epoch) for index, epoch in drawn if begin <= index < end]
        for epoch in range(max(epoch for _, epoch in its)):
            assert sorted(index for index, e in its if e == epoch) == list(range(begin, end))


PARTS = {"first": 5000, "second": 60, "third": 2}


def parts_of_batches(steps, batch_size=4, ranks=1, **options):
    """Return the draws of each global batch of one task with three collections, and the names of their collections."""
    size = sum(PARTS.values())
    schedule = Schedule({"task": size}, {"task": batch_size // ranks}, 1, collections={"task": PARTS}, **options)
    batches = [[d for rank in range(ranks) for d in schedule.draws(step, rank, ranks)] for step in steps]
    ends = np.cumsum(list(PARTS.values()))
    return batches, [[list(PARTS)[np.searchsorted(ends, d.example, side="right")] for d in batch] for batch in batches]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1e9])
def test_shares_of_collections_follow_the_temperature(temperature):
    _, names = parts_of_batches(range(1000), temperatures={"task": temperature})
    counts = Counter(name for batch in names for name in set(batch))
    weights = np.array(list(PARTS.values())) ** (1 / temperature)
    assert [counts[name] for name in PARTS] == pytest.approx(1000 * weights / weights.sum(), abs=1.5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_mixed_batches_have_all_collections_in_their_shares(temperature):
    """1000 queries have exact shares, each collection is drawn in passes, and a batch can be found by its step."""
    options = {"mixed": ["task"], "temperatures": {"task": temperature}}
    batches, names = parts_of_batches(range(250), **options)
    counts = Counter(name for batch in names for name in batch)
    weights = np.array(list(PARTS.values())) ** (1 / temperature)
    assert [counts[name] for name in PARTS] == pytest.approx(1000 * weights / weights.sum(), abs=1.5)
    if temperature == 3:
        assert np.mean([len(set(batch)) for batch in names]) > 1.5
    draws = [draw for batch in batches for draw in batch]
    assert len(set(draws)) == len(draws)  # no example twice in a pass
    for epoch in range(max(draw.epoch for draw in draws if draw.example >= 5060)):  # the smallest has several passes
        assert sorted(d.example for d in draws if d.example >= 5060 and d.epoch == epoch) == [5060, 5061]
    assert parts_of_batches([123], **options)[0] == [batches[123]]
    assert parts_of_batches(range(250), ranks=2, **options)[0] == batches


def test_mixed_batches_in_tokens_are_refused():
    costs = {"task": np.ones(5062, dtype=np.int64)}
    with pytest.raises(UserError, match="mixed_batches: the batches of task are sized in tokens"):
        parts_of_batches([0], costs=costs, mixed=["task"])


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_batches_of_a_pass_are_the_fewest_that_draw_every_example(world_size):
    num_batches = 0
    for task, size in SIZES.items():
        alone, seen, step = make(sizes={task: size}), set(), 0
        while len(seen) < size:
            draws = (draw for rank in range(world_size) for draw in alone.draws(step, rank, world_size))
            seen |= {draw.example for draw in draws}
            step += 1
        num_batches += step
    assert make().batches_per_pass(world_size) == num_batches


def test_the_batches_of_a_pass_in_tokens_cover_all_tokens():
    costs = {"search": np.array([3, 9, 4, 7, 2])}
    schedule = Schedule({"search": 5}, {"search": 10}, 0, costs=costs)
    assert schedule.batches_per_pass() == 3  # 25 tokens
    assert {draw.example for step in range(3) for draw in schedule.draws(step)} == set(range(5))


def test_orders_are_computed_once_per_pass_and_forgotten(monkeypatch):
    """Even if a batch has queries of many collections, and if a run has many passes."""
    computed, permutation = Counter(), np.random.default_rng

    def counted(seed):
        computed[seed] += 1
        return permutation(seed)

    monkeypatch.setattr(np.random, "default_rng", counted)
    collections = {f"collection {i}": 12 for i in range(100)}
    schedule = Schedule({"task": 1200}, {"task": 50}, 0, collections={"task": collections}, mixed=["task"])
    examples = Counter(draw.example for step in range(120) for draw in schedule.draws(step))  # 5 passes
    assert set(examples.values()) == {5}
    assert set(computed.values()) == {1}
    inner, _ = schedule._inner["task"]
    assert len(inner._orders) <= 300
