"""Losses give the same gradients on several ranks, with GradCache and with accumulation as in one process."""

import pytest

from tests.lightning_modules.auxiliary.losses_on_ranks import LOSSES
from tests.lightning_modules.distributed.test_ranks import run


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_of_two_ranks_equals_that_of_one_process(name, free_port):
    assert run("auxiliary.losses_on_ranks", 2, free_port, name) == [["equal"] * 4] * 2
