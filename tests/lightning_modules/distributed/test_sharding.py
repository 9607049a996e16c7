"""A sharded encoder trains as copies under DDP do."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.lightning_modules.distributed.sharded_on_ranks import CASES

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_optimizer_steps_of_a_sharded_encoder_equal_those_of_ddp(free_port):
    """Losses, gradients, weights, optimizer state, and the vectors of the replica: see sharded_on_ranks.py."""
    script = [sys.executable, "-m", "tests.lightning_modules.distributed.sharded_on_ranks"]
    ranks = [
        subprocess.Popen([*script, str(rank), "2", str(free_port)], stdout=subprocess.PIPE, cwd=ROOT)
        for rank in range(2)
    ]
    try:
        for process in ranks:
            out, _ = process.communicate(timeout=240)
            assert process.returncode == 0
            assert out.split() == [b"equal"] * len(CASES)
    finally:
        for process in ranks:
            process.kill()
