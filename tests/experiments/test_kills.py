"""A run that is killed in different ways loses nothing that was saved. More: python -m tests.experiments.kills 30"""

import sys

import pytest

from tests.forked import run


@pytest.mark.slow
def test_kills_neither_lose_saved_steps_nor_change_results(tmp_path):
    command = [sys.executable, "-m", "tests.experiments.kills", "4", str(tmp_path)]
    done = run(command)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "4 kills, {'anywhere': 1, 'writing': 1, 'full': 1, 'signal': 1}" in done.stdout
