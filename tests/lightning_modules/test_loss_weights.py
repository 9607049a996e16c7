"""The weights of losses equal a few lines of numpy, alone and in training."""

import json
import math
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch

from datamodules.records import UserError
from lightning_modules.callbacks.training_log import TrainingLog
from lightning_modules.loggers import JsonlLogger
from lightning_modules.loss_weights import DynamicWeights, UncertaintyWeights, dwa_weights
from lightning_modules.objective import Temperature
from lightning_modules.objective_options import ObjectiveOptions
from lightning_modules.task_balance import GradNorm, GramianBalance, PCGrad
from tests.conftest import TASKS
from tests.lightning_modules.quiet_trainer import quiet_trainer, save_once
from tests.lightning_modules.test_task_balance import fitted, make_module

NAMES = list(TASKS)
BALANCES = {  # a callback, and the number of batches in a step
    "dwa": (lambda: DynamicWeights(NAMES, temperature=0.2, window=1), 1),
    "gradnorm": (lambda: GradNorm(NAMES), 3),
    "pcgrad": (lambda: PCGrad(NAMES), 3),
    "mgda": (lambda: GramianBalance(NAMES, "mgda"), 3),
    "upgrad": (lambda: GramianBalance(NAMES, "upgrad"), 3),
}


def test_uncertainty_equals_its_formula_and_learns_the_scale_of_losses():
    weights = UncertaintyWeights(["easy", "hard"]).double()
    scales = {"easy": 0.1, "hard": 3.0}
    optimizer = torch.optim.SGD(weights.parameters(), lr=0.5)
    for _ in range(200):
        for task, scale in scales.items():
            s = weights.log_variance[task].item()
            balanced, weight = weights(torch.tensor(scale, dtype=torch.float64), task)
            assert balanced.item() == pytest.approx(math.exp(-s) * scale + s / 2)
            assert weight.item() == pytest.approx(math.exp(-s))
            optimizer.zero_grad()
            balanced.backward()
            optimizer.step()
    for task, scale in scales.items():  # where the derivative -exp(-s) L + 1/2 is 0
        assert weights.log_variance[task].item() == pytest.approx(math.log(2 * scale), abs=1e-6)


@pytest.mark.parametrize("task", ["keys", "training", "a.b"])
def test_task_that_cannot_name_a_parameter_raises_user_error(task):
    with pytest.raises(UserError, match=f"balance=uncertainty: task '{task}' cannot have a parameter of its own"):
        UncertaintyWeights(["search", task])
    with pytest.raises(UserError, match=f"learn_temperature: task '{task}' cannot have a parameter of its own"):
        Temperature(ObjectiveOptions(learn_temperature="per_task"), [task])
    assert Temperature(ObjectiveOptions(learn_temperature="one"), [task])(task) == 1.0


def test_uncertainty_is_trained_with_the_encoder_at_its_own_rate(make_encoder, three_tasks, tmp_path):
    module = make_module(make_encoder, balance="uncertainty", uncertainty_lr=0.3, total_steps=2)
    learned = list(module.uncertainty.parameters())
    (group,) = [g for g in module.configure_optimizers()["optimizer"].param_groups if g["params"] == learned]
    assert (group["initial_lr"], group["weight_decay"]) == (0.3, 0.0)
    fitted(module, three_tasks, tmp_path)
    values = [p.item() for p in module.uncertainty.parameters()]
    assert len(values) == 3
    assert all(value != 0 for value in values)


def expected_weights(steps, window, temperature):
    """Return the weights of dynamic weight average in each step, (steps, T). steps: (task, loss) of its batches."""
    weights, previous, losses, by_step = np.ones(len(NAMES)), None, {task: [] for task in NAMES}, []
    for batches in steps:
        by_step.append(weights)
        for task, loss in batches:
            losses[task].append(loss)
        if min(map(len, losses.values())) >= window:
            means = np.array([np.mean(losses[task]) for task in NAMES])
            if previous is not None:
                powers = np.exp(means / previous / temperature)
                weights = len(NAMES) * powers / powers.sum()
            previous, losses = means, {task: [] for task in NAMES}
    return np.array(by_step)


def scripted_steps(order):
    """Return the batches of each step: a loss that falls fast, one that falls slowly, and one that rises."""
    curves = (lambda i: 4 * 0.9**i, lambda i: 3 * 0.99**i, lambda i: 1 + 0.05 * i)
    rng = np.random.default_rng(0)
    if order == "turns":
        tasks = [[NAMES[i % 3]] for i in range(60)]
    elif order == "together":
        tasks = [[*NAMES, *NAMES] for _ in range(20)]
    else:
        tasks = [list(rng.choice(NAMES, size=2, p=[0.7, 0.2, 0.1])) for _ in range(150)]
    counts = dict.fromkeys(NAMES, 0)
    steps = []
    for names in tasks:
        steps.append([])
        for name in names:
            steps[-1].append((str(name), curves[NAMES.index(name)](counts[name])))
            counts[name] += 1
    return steps


def fake_trainer(**options):
    defaults = {
        "global_step": 0,
        "loggers": [],
        "precision_plugin": None,
        "max_steps": -1,
        "accumulate_grad_batches": 1,
    }
    return SimpleNamespace(**(defaults | options))


@pytest.mark.parametrize("order", ["turns", "together", "uneven"])
def test_dynamic_weights_of_scripted_losses_equal_numpy(order):
    steps, window, temperature = scripted_steps(order), 3, 0.5
    expected = expected_weights(steps, window, temperature)
    balance = DynamicWeights(NAMES, temperature, window)
    balance.on_train_start(fake_trainer(), SimpleNamespace(device=torch.device("cpu")))
    for number, batches in enumerate(steps):
        np.testing.assert_allclose(balance.weights.numpy(), expected[number], rtol=1e-12)
        for task, value in batches:
            balance.on_train_batch_start(fake_trainer(), None, SimpleNamespace(task=task), 0)
            parameter = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
            loss = parameter * value
            balance.on_before_backward(fake_trainer(), None, loss)
            loss.backward()
            assert parameter.grad.item() == pytest.approx(expected[number][NAMES.index(task)] * value, rel=1e-12)
            # The loss is twice the value, which the ratios of windows do not show.
        balance.on_before_optimizer_step(fake_trainer())
    assert (expected[0] == 1).all()
    fast, slow, rising = expected[-1]
    assert fast < 0.95 < slow < rising
    np.testing.assert_allclose(expected.sum(1), 3, rtol=1e-12)


@pytest.mark.parametrize(
    ("max_steps", "accumulated", "warns"), [(18, 1, True), (19, 1, False), (9, 2, True), (-1, 1, False)]
)
def test_training_too_short_for_dynamic_weights_says_so(max_steps, accumulated, warns, caplog):
    trainer = fake_trainer(max_steps=max_steps, accumulate_grad_batches=accumulated)
    DynamicWeights(NAMES, window=3).on_train_start(trainer, SimpleNamespace(device=torch.device("cpu")))
    assert ("6 batches per task; lower dwa_window" in caplog.text) is warns


def test_a_loss_that_was_0_neither_gets_all_the_weight_nor_changes_the_others():
    """A task without negatives has the loss 0. Its first loss above 0 got the weights of all tasks."""
    weights = dwa_weights(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 0.0, 2.0]), 2.0)
    assert weights.tolist() == pytest.approx([1, 1, 1])


class Watch(L.Callback):
    """Records loss and weights of each step, and compares the gradients with the weighted ones of the loss."""

    def __init__(self, balance):
        self.balance, self.steps, self.weights = balance, [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batch = batch

    def on_before_optimizer_step(self, trainer, module, optimizer):
        trained = [p for p in module.parameters() if p.requires_grad]
        loss = module.training_step(self.batch, 0)["loss"]
        self.steps.append([(self.batch.task, loss.item())])
        self.weights.append(self.balance.weights.numpy().copy())
        weight = self.weights[-1][NAMES.index(self.batch.task)]
        for p, gradient in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True):
            assert (p.grad is None) == (gradient is None)
            if gradient is not None:
                torch.testing.assert_close(p.grad, weight.item() * gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad_cache", [False, True])
def test_dynamic_weights_scale_the_gradients_in_training(make_encoder, three_tasks, tmp_path, grad_cache):
    balance = DynamicWeights(NAMES, temperature=0.2, window=1)
    watch = Watch(balance)
    trainer = quiet_trainer(tmp_path, max_steps=12, callbacks=[watch, balance])
    trainer.fit(make_module(make_encoder, grad_cache=grad_cache), three_tasks)
    np.testing.assert_allclose(watch.weights, expected_weights(watch.steps, 1, 0.2), rtol=1e-5)
    assert np.abs(watch.weights[-1] - 1).max() > 0.01


def test_dynamic_weights_change_nothing_in_the_first_two_windows(make_encoder, three_tasks, tmp_path):
    modules = [make_module(make_encoder) for _ in range(3)]
    settings = ([], [DynamicWeights(NAMES, window=2)], [DynamicWeights(NAMES, window=1)])
    for module, callbacks in zip(modules, settings, strict=True):
        quiet_trainer(tmp_path, max_steps=12, callbacks=callbacks).fit(module, three_tasks)
    without, equal, other = (torch.cat([p.flatten() for p in module.parameters()]) for module in modules)
    assert torch.equal(without, equal)
    assert not torch.equal(without, other)


@pytest.mark.parametrize("name", BALANCES)
def test_resumed_training_continues_bit_for_bit(make_encoder, three_tasks, tmp_path, name):
    """The checkpoint is from the middle of a window."""
    make, accumulate = BALANCES[name]
    file, results = tmp_path / "two.ckpt", []
    for checkpoint in (None, file):
        module = make_module(make_encoder, total_steps=12)
        options = {"accumulate_grad_batches": accumulate, "callbacks": [make(), save_once(file)]}
        trainer = quiet_trainer(tmp_path, max_steps=12 // accumulate, **options)
        trainer.fit(module, three_tasks, ckpt_path=checkpoint)
        results.append(torch.cat([p.flatten() for p in module.parameters()]))
    assert torch.equal(*results)


def test_weights_are_logged_and_losses_are_not_weighted(make_encoder, three_tasks, tmp_path):
    balance = DynamicWeights(NAMES, temperature=0.2, window=1, every_n_steps=1)
    watch, logger = Watch(balance), JsonlLogger(tmp_path / "metrics.jsonl")
    log = TrainingLog(1, plain=True, peak_tflops=1.0)
    quiet_trainer(tmp_path, max_steps=12, callbacks=[log, watch, balance], logger=logger).fit(
        make_module(make_encoder), three_tasks
    )
    logger.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for number, [(task, loss)] in enumerate(watch.steps):
        values = {key: value for line in lines if line["step"] == number + 1 for key, value in line.items()}
        assert values[f"train/{task}/loss"] == pytest.approx(loss, rel=1e-5)
        assert values[f"train/{task}/weight"] == pytest.approx(watch.weights[number][NAMES.index(task)], rel=1e-5)
