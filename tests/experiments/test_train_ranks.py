"""Whole runs on two ranks: idle parameters do not change, and GradCache trains like the plain pass."""

import json
import shutil

import pytest
import torch

from tests import forked
from tests.experiments.test_train import command

QUICK = ["evaluation.every_n_steps=0", "evaluation.baselines=false", "trainer.precision=fp32"]


def run(folder, *overrides, ranks=2):
    """Train, and return the state of the last checkpoint."""
    forked.run_ranks(command(folder, *QUICK, f"trainer.devices={ranks}", *overrides), ranks, check=True)
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def of_expert(state, name):
    return {key.replace(name, "EXPERT"): value for key, value in state.items() if f".experts.{name}." in key}


def equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.slow
@pytest.mark.parametrize("cache", [False, True])
def test_idle_experts_do_not_move_on_two_ranks(tmp_path, cache):
    """Weight decay does not move an unused expert, and momentum does not move one that was used before."""
    overrides = [
        f"trainer.grad_cache={cache}",
        "data.token_budget=256",
        "optim.weight_decay=0.5",
        "data.schedule=weights",
        "data.weights={classification: 1, link_prediction: 1, search: 998}",
        "data.curriculum=[{from_step: 2, weights: {classification: 998, link_prediction: 1, search: 1}}]",
        "trainer.log_every_n_steps=1",
    ]
    before = run(tmp_path, *overrides, "trainer.max_steps=2")
    after = run(tmp_path, *overrides, "trainer.max_steps=4")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    tasks = [key.split("/")[1] for line in lines for key in line if key.startswith("train/") and key.endswith("/loss")]
    assert tasks == ["search", "search", "classification", "classification"]
    unused = of_expert(before, "link_prediction")
    assert unused
    assert equal(unused, of_expert(before, "classification"))  # both still have their initial weights
    assert not equal(unused, of_expert(before, "search"))
    assert equal(unused, of_expert(after, "link_prediction"))
    assert equal(of_expert(before, "search"), of_expert(after, "search"))
    assert not equal(unused, of_expert(after, "classification"))


@pytest.mark.slow
def test_an_added_task_trains_with_the_old_ones_on_two_ranks(tmp_path):
    """DDP ended the training, because it expected gradients for the experts of the old tasks."""
    old = run(tmp_path / "old", "tasks=[classification]", "trainer.max_steps=1", ranks=1)
    extension = [f"extend.model={tmp_path / 'old'}", "extend.freeze=false", "trainer.max_steps=3"]
    new = run(tmp_path / "new", "tasks=[search]", *extension)
    assert equal(of_expert(old, "classification"), of_expert(new, "classification"))
    assert not equal(of_expert(new, "search"), of_expert(new, "classification"))
    shared = "encoder.backbone.encoder.layer.0.output.dense.weight"
    assert not torch.equal(old[shared], new[shared])


@pytest.mark.slow
def test_grad_cache_trains_like_the_plain_pass_on_two_ranks(tmp_path):
    """With dropout, every task in each step, accumulation and clipping."""
    overrides = [
        "trainer.max_steps=3",
        "data.schedule=together",
        "trainer.accumulate_grad_batches=2",
        "data.token_budget=256",
        "backbone.dropout=0.3",
        "trainer.gradient_clip_val=0.1",
        "optim.eps=1e-4",
    ]
    plain, cached = (run(tmp_path / str(cache), *overrides, f"trainer.grad_cache={cache}") for cache in (False, True))
    torch.testing.assert_close(cached, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_task_weights_of_one_change_nothing_on_two_ranks(tmp_path):
    """GradNorm starts with weights of 1. It averages gradients over ranks like DDP, including those of experts."""
    overrides = ["trainer.max_steps=1", "data.schedule=together", "trainer.accumulate_grad_batches=2", "optim.eps=1e-4"]
    plain, balanced = (run(tmp_path / name, *overrides, f"objective.balance={name}") for name in ("none", "gradnorm"))
    torch.testing.assert_close({name: balanced[name] for name in plain}, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_learned_weights_train_on_two_ranks_with_tasks_in_turns(tmp_path):
    """Three tasks in two steps: the third task's weight has no gradient and does not change. Diagnostics work too."""
    overrides = ["trainer.max_steps=2", "objective.balance=uncertainty", "diagnostics.every_n_steps=2"]
    state = run(tmp_path, *overrides)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (row,) = [line for line in lines if "diag/seconds" in line]
    assert -1 <= row["diag/link_prediction/gradient_cosine/classification"] <= 1
    assert row["diag/link_prediction/effective_negatives"] > 1
    moved = {key.split(".")[-1]: bool(value) for key, value in state.items() if key.startswith("uncertainty.")}
    assert moved == {"classification": True, "link_prediction": True, "search": False}

    (attempt,) = json.loads((tmp_path / "manifest.json").read_text())["attempts"]
    assert attempt["devices"] == 2
    benchmarks = json.loads((tmp_path / "results.json").read_text())["benchmarks"].values()
    for benchmark in benchmarks:
        cost, seconds = (benchmark["measured"]["trained"][key] for key in ("cost", "seconds"))
        sizes = (0, benchmark["queries"], benchmark["queries"] + benchmark["documents"])
        assert cost["texts"] in sizes, "the shares of both ranks"
        assert cost["device_seconds"] == pytest.approx(2 * sum(seconds.values()), abs=0.1)
    assert max(benchmark["measured"]["trained"]["cost"]["tokens"] for benchmark in benchmarks) > 0


@pytest.mark.slow
def test_a_run_of_two_ranks_resumes_on_one_with_the_same_global_batches(tmp_path):
    """Without dropout, which differs between ranks, the weights are the same. test_batches.py tests four ranks."""
    overrides = ["data.schedule=proportional", "backbone.dropout=0", "optim.eps=1e-4", "checkpoint.every_n_steps=3"]
    before = run(tmp_path / "two", *overrides, "trainer.max_steps=3")
    states = {}
    for ranks in (1, 2):
        folder = shutil.copytree(tmp_path / "two", tmp_path / str(ranks))
        arguments = [*overrides, f"data.batch_size={16 // ranks}", "trainer.max_steps=6"]
        states[ranks] = run(folder, *arguments, ranks=ranks)
    torch.testing.assert_close(states[2], states[1], atol=1e-5, rtol=1e-5)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in states[1].items())
