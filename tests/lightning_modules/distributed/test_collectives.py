"""If the work of one rank fails, no rank waits forever. Ranks are threads here."""

import threading

import pytest

from datamodules.records import UserError
from lightning_modules.distributed import collectives
from lightning_modules.distributed.collectives import together
from lightning_modules.distributed.signals import Preempted


@pytest.fixture
def on_two_ranks(monkeypatch):
    """Return a function that runs a function for each rank in `together`, and returns results or errors."""
    barrier, values, place = threading.Barrier(2), [None, None], threading.local()

    def all_gather_object(objects, value):
        values[place.rank] = value
        barrier.wait(timeout=5)
        objects[:] = values
        barrier.wait(timeout=5)

    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    monkeypatch.setattr(collectives.dist, "all_gather_object", all_gather_object)

    def run(*works):
        outcomes = [None, None]

        def call(rank):
            place.rank = rank
            try:
                outcomes[rank] = together(works[rank])
            except Exception as error:
                outcomes[rank] = error

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
        return outcomes

    return run


def failing(error):
    def work():
        raise error

    return work


def test_each_rank_gets_its_own_result(on_two_ranks):
    assert on_two_ranks(lambda: 3, lambda: None) == [3, None]


@pytest.mark.parametrize("rank", [0, 1])
def test_mistake_of_one_rank_is_raised_on_all(on_two_ranks, rank):
    works = [failing(UserError("corpus: empty")) if each == rank else int for each in range(2)]
    for outcome in on_two_ranks(*works):
        assert isinstance(outcome, UserError)
        assert str(outcome) == "corpus: empty"


@pytest.mark.parametrize("error", [ValueError("bad"), MemoryError("full"), OSError(28, "no space"), UserError("")])
def test_any_other_error_of_one_rank_ends_the_other(on_two_ranks, error):
    first, second = on_two_ranks(int, failing(error))
    assert type(second) is type(error)
    assert str(second) == str(error)
    if isinstance(error, UserError):
        assert isinstance(first, UserError)
    else:
        assert isinstance(first, RuntimeError)
        assert str(first) == f"rank 1 failed: {error!r}"


def test_mistake_comes_before_other_errors(on_two_ranks):
    first, second = on_two_ranks(failing(UserError("corpus: empty")), failing(ValueError("bad")))
    assert isinstance(first, UserError)
    assert isinstance(second, ValueError)


def test_preempted_rank_waits_for_no_other(monkeypatch):
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    monkeypatch.setattr(collectives.dist, "all_gather_object", lambda *_: pytest.fail("waits"))
    with pytest.raises(Preempted):
        together(failing(Preempted(None)))
