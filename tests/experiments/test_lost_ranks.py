"""Ranks on several nodes, and lost ranks. LONG_TESTS=1 also kills the first rank, and stops another one."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.experiments.test_train import LONG, command, rows
from tests.forked import Forked, run

LONGER = [(signal.SIGKILL, 0), (signal.SIGSTOP, 1)] if "LONG_TESTS" in os.environ else []
SETTINGS = [*LONG, "evaluation.every_n_steps=0", "trainer.timeout=20"]


def children(pid):
    return [int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def started(folder, *overrides, **environment):
    return Forked(command(folder, *SETTINGS, *overrides), env=os.environ | environment, merged=True)


def wait_for_step(folder, step, process):
    while not (folder / "metrics.jsonl").is_file() or rows(folder)[-1]["step"] < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.slow
def test_two_nodes_with_one_rank_train_like_one_node_with_two(tmp_path, free_port):
    """The weights are bit-equal. Both nodes run the same command, and only the first one writes."""
    steps = "trainer.max_steps=6"
    one, two = tmp_path / "one", tmp_path / "two"
    run(command(one, *SETTINGS, steps, "trainer.devices=2"), check=True)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    nodes = [started(two, steps, "trainer.num_nodes=2", NODE_RANK=str(node), **address) for node in range(2)]
    output = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], output
    assert "rank 1 (cpu on" in output[0]
    assert "a query has" in output[0]
    assert "negatives, from 2 ranks" in output[0]
    assert "step 6/6" in output[0]
    assert "step 6/6" not in output[1]  # only the first node reports
    states = [torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for f in (one, two)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert [row.get("train/batch") for row in rows(one)] == [row.get("train/batch") for row in rows(two)]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "lost"), [(signal.SIGKILL, 1), *LONGER])
def test_a_lost_rank_is_named_and_the_run_can_be_resumed(tmp_path, number, lost):
    """Other ranks notice a killed rank at once, and a stopped one after trainer.timeout."""
    process = started(tmp_path, "trainer.max_steps=100000", "trainer.devices=2")
    try:
        wait_for_step(tmp_path, 12, process)
        pids = [process.pid, next(pid for pid in children(process.pid) if b"experiments.train" in cmdline(pid))]
        start = time.monotonic()
        os.kill(pids[lost], number)
        output = process.communicate(timeout=120)[0]  # all ranks share the pipe
        assert time.monotonic() - start < 100
    finally:
        process.kill()
    match = re.search(
        rf"error: rank {lost}\b.* ended or no longer answers; the same command resumes from step (\d+)", output
    )
    assert match, output[-3000:]
    assert "Traceback" not in output
    step = int(match[1])
    process = started(tmp_path, f"trainer.max_steps={step + 2}", "trainer.devices=2")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-3000:]
    assert f"from {tmp_path}/checkpoints/last.ckpt" in output
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step + 2


def cmdline(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes()
