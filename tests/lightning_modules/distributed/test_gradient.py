"""The gradient on several ranks equals that of one process with the whole batch."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_gradient_of_ranks_equals_that_of_one_process(world_size, free_port):
    """Plain and with GradCache, with and without accumulation over tasks: see gradient_on_ranks.py."""
    script = [sys.executable, "-m", "tests.lightning_modules.distributed.gradient_on_ranks"]
    ranks = [
        subprocess.Popen([*script, str(rank), str(world_size), str(free_port)], stdout=subprocess.PIPE, cwd=ROOT)
        for rank in range(world_size)
    ]
    try:
        for process in ranks:
            out, _ = process.communicate(timeout=180)
            assert process.returncode == 0
            assert out.split() == [b"equal"] * 6
    finally:
        for process in ranks:
            process.kill()
