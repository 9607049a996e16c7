"""Training on several ranks. Each test starts the ranks of a script, which prints "equal" after each comparison."""

import sys

import pytest

from tests.forked import Forked, run_all
from tests.lightning_modules.auxiliary.cases import CASES as LOSSES
from tests.lightning_modules.distributed.sharded_on_ranks import CASES


def run(script, world_size, port, *arguments):
    """Run all ranks, and return the words that each has printed."""
    command = [sys.executable, "-m", f"tests.lightning_modules.distributed.{script}"]
    ranks = [Forked([*command, rank, world_size, port, *arguments]) for rank in range(world_size)]
    return [done.stdout.split() for done in run_all(ranks, check=True)]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_objective_of_ranks_equals_that_of_one_process(world_size, free_port):
    assert run("objective_on_ranks", world_size, free_port) == [["equal"]] * world_size


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "kind"), [(2, "moe"), (4, "moe"), (2, "stitched"), (2, "control")])
def test_gradient_of_ranks_equals_that_of_one_process(world_size, kind, free_port):
    """Plain and with GradCache, with and without accumulation over tasks."""
    assert run("gradient_on_ranks", world_size, free_port, kind) == [["equal"] * 6] * world_size


@pytest.mark.slow
def test_gradient_with_each_added_loss_on_two_ranks_equals_that_of_one_process(free_port):
    """Accumulated over tasks, plain and with GradCache."""
    assert run("losses_on_ranks", 2, free_port) == [["equal"] * 2 * len(LOSSES)] * 2


@pytest.mark.slow
def test_optimizer_steps_of_a_sharded_encoder_equal_those_of_ddp(free_port):
    """Losses, gradients, weights, optimizer state, and the vectors of the replica."""
    assert run("sharded_on_ranks", 2, free_port) == [["equal"] * len(CASES)] * 2
