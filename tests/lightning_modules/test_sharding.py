"""A sharded encoder trains as DDP's copies do."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.lightning_modules.sharded_on_ranks import CASES

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_optimizer_steps_of_a_sharded_encoder_are_those_of_ddp(free_port):
    """Losses, gradients, weights, the optimizer's state and the replica's vectors: see sharded_on_ranks.py."""
    script = [sys.executable, "-m", "tests.lightning_modules.sharded_on_ranks"]
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
