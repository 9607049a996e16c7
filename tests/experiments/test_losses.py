"""Experiments with losses that are added to InfoNCE: killed runs resume, and the dry run counts the losses' texts."""

import multiprocessing
import os
import signal

import pytest
import torch

from experiments.config.experiment import experiments, load_config
from experiments.dry_run import dry_run
from experiments.train import train
from lightning_modules.contrastive import ContrastiveModule
from tests.experiments.test_train import TINY, check_same_state
from tests.lightning_modules.auxiliary.cases import all_losses

LOSSES = {name: losses for name in experiments() if (losses := load_config(name).losses)}
STEPS, KILLED = 7, 5  # steps of a whole run, and the one in which another is killed


def test_every_loss_has_an_experiment():
    targets = {node["_target_"] for losses in LOSSES.values() for node in losses.values()}
    assert targets == {f"{kind.__module__}.{kind.__name__}" for kind in all_losses()}


def run(folder, experiment):
    settings = ["checkpoint.every_n_steps=2", "evaluation.every_n_steps=0", "evaluation.baselines=false"]
    steps = [f"trainer.max_steps={STEPS}", "backbone.dropout=0.3"]
    train(experiment, [f"run.dir={folder}", *TINY, *settings, *steps])


def killed(folder, experiment):
    """Start a run in another process, which dies in the middle of a step."""
    pid = os.fork()
    if not pid:
        step = ContrastiveModule.training_step

        def die(module, batch, index):
            if batch.step == KILLED:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(module, batch, index)

        ContrastiveModule.training_step = die
        try:
            run(folder, experiment)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("experiment", LOSSES)
def test_killed_run_resumes_to_the_same_bits(tmp_path, experiment):
    run(tmp_path / "whole", experiment)
    assert killed(tmp_path / "killed", experiment)
    saved = torch.load(tmp_path / "killed" / "checkpoints" / "last.ckpt", weights_only=True)
    assert 0 < saved["global_step"] <= KILLED
    run(tmp_path / "killed", experiment)
    check_same_state(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_spawned_workers_prepare_the_same_training(tmp_path, monkeypatch, make_encoder):
    """Also with what else they get: cached data and the vectors of a teacher."""
    spawn = multiprocessing.get_context("spawn")
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", spawn)
    settings = ["evaluation.every_n_steps=0", "evaluation.baselines=false", "trainer.max_steps=2"]
    teacher = make_encoder("shared").save_pretrained(tmp_path / "teacher")
    settings += [f"objective.vector_teacher.model={teacher}", f"data.cache={tmp_path}/cache"]
    for workers in (0, 1):
        run = [f"run.dir={tmp_path}/{workers}", f"data.num_workers={workers}"]
        train("consistency", [*run, *TINY, *settings])
    check_same_state(tmp_path / "0", tmp_path / "1")


@pytest.mark.slow
@pytest.mark.parametrize("experiment", LOSSES)
def test_dry_run_counts_the_texts_of_the_losses(tmp_path, monkeypatch, experiment):
    monkeypatch.chdir(tmp_path)
    companions = {}
    prepare = ContrastiveModule.prepare_losses

    def recorded(module, data):
        prepare(module, data)
        companions.update({task: sum(counts) for task, counts in module.num_companions.items()})

    settings = [*TINY, "evaluation.every_n_steps=0", "trainer.max_steps=6"]
    without = dry_run(experiment, [*settings, *(f"losses.{name}.weight=0" for name in LOSSES[experiment])])
    monkeypatch.setattr(ContrastiveModule, "prepare_losses", recorded)
    prediction = dry_run(experiment, settings)
    for task, cost in prediction.tasks.items():
        other = without.tasks[task]
        if companions[task]:
            assert cost.tokens > other.tokens, task
            assert cost.flops > other.flops, task
        else:
            assert (cost.tokens, cost.flops) == (other.tokens, other.flops), task
