"""Training on several ranks. Each test starts the ranks of a script, which prints "equal" after each comparison."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.lightning_modules.auxiliary.cases import CASES as LOSSES
from tests.lightning_modules.distributed.sharded_on_ranks import CASES

ROOT = Path(__file__).parents[3]


def run(script, world_size, port, *arguments, timeout=240):
    """Run all ranks, and return the words that each has printed."""
    command = [sys.executable, "-m", f"tests.lightning_modules.distributed.{script}"]
    ranks = [
        subprocess.Popen(
            [*command, *map(str, (rank, world_size, port)), *arguments], stdout=subprocess.PIPE, cwd=ROOT, text=True
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0].split() for process in ranks]
        assert [process.returncode for process in ranks] == [0] * world_size
        return outputs
    finally:
        for process in ranks:
            process.kill()


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
    assert run("losses_on_ranks", 2, free_port, timeout=600) == [["equal"] * 2 * len(LOSSES)] * 2


@pytest.mark.slow
def test_optimizer_steps_of_a_sharded_encoder_equal_those_of_ddp(free_port):
    """Losses, gradients, weights, optimizer state, and the vectors of the replica."""
    assert run("sharded_on_ranks", 2, free_port) == [["equal"] * len(CASES)] * 2
