"""Each method of balancing tasks equals a few lines of numpy, both alone and in training."""

import math

import lightning as L
import numpy as np
import pytest
import torch

from datamodules.records import UserError
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.optim import OptimOptions
from lightning_modules.task_balance import (
    GradNorm,
    PCGrad,
    TaskGradients,
    UncertaintyWeights,
    gradnorm_weights,
    pcgrad_coefficients,
)
from tests.conftest import TASKS
from tests.lightning_modules.quiet_trainer import quiet_trainer


def projected(gradients, orders):
    """Apply algorithm 1 of PCGrad to the gradients themselves."""
    total = np.zeros_like(gradients[0])
    for i, row in enumerate(gradients.copy()):
        for j in orders[i]:
            if j != i and row @ gradients[j] < 0:
                row = row - (row @ gradients[j]) / (gradients[j] @ gradients[j]) * gradients[j]
        total += row
    return total


def orders_of(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(count, generator=generator).tolist() for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_pcgrad_equals_projecting_the_gradients(seed):
    gradients = np.random.default_rng(seed).normal(size=(4, 6)) + np.array([[2], [-2], [1], [-1]])
    products = gradients @ gradients.T
    assert (products < 0).any()
    coefficients = pcgrad_coefficients(torch.from_numpy(products), seed).numpy()
    np.testing.assert_allclose(coefficients @ gradients, projected(gradients, orders_of(seed, 4)), atol=1e-12)
    assert not np.allclose(coefficients, 1)


def test_pcgrad_does_not_change_gradients_that_agree():
    assert pcgrad_coefficients(torch.tensor([[1.0, 0.5], [0.5, 2.0]]), 0).tolist() == [1.0, 1.0]


def test_gradnorm_equals_numpy_and_equalises_the_norms():
    norms, losses, first = np.array([4.0, 1.0, 0.5]), np.array([2.0, 1.0, 3.0]), np.array([2.0, 2.0, 3.0])
    weights, reference = torch.ones(3).double(), np.ones(3)
    for _ in range(300):
        weights = gradnorm_weights(weights, *map(torch.from_numpy, (norms, losses, first)), alpha=0.5, lr=0.01)
        rate = losses / first / np.mean(losses / first)
        target = np.mean(reference * norms) * rate**0.5
        reference = reference - 0.01 * np.sign(reference * norms - target) * norms / norms.mean()
        reference *= 3 / reference.sum()
        np.testing.assert_allclose(weights.numpy(), reference, rtol=1e-12)
    assert weights.sum().item() == pytest.approx(3)
    relative = reference * norms / rate**0.5
    np.testing.assert_allclose(relative / relative.mean(), 1, atol=0.15)


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


def test_balancing_without_shared_parameters_raises_user_error():
    parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))]
    gradients = TaskGradients(parameters, ["a", "b"])
    for parameter, task in zip(parameters, ("a", "b"), strict=True):
        parameter.sum().backward()
        gradients.take(task)
    with pytest.raises(UserError, match="the tasks share no trained parameter"):
        gradients.products()


class Spy(L.Callback):
    """Records the gradients that the optimizer receives at its first step."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == 0:
            self.gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
            self.gradients = {name: gradient.clone() for name, gradient in self.gradients.items()}


def fitted(module, three_tasks, tmp_path, *callbacks, steps=2):
    trainer = quiet_trainer(tmp_path, max_steps=steps, accumulate_grad_batches=12 // steps, callbacks=list(callbacks))
    trainer.fit(module, three_tasks)
    assert trainer.global_step == steps


def task_gradients(module, three_tasks):
    """Return task -> parameter name -> gradient, accumulated over the first six batches."""
    by_task = {}
    for batch in [three_tasks.train_dataloader().batches[step] for step in range(6)]:
        module.zero_grad(set_to_none=True)
        (module.training_step(batch, 0)["loss"] / 6).backward()
        gradients = by_task.setdefault(batch.task, {})
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                gradients[name] = gradients.get(name, 0) + parameter.grad.double().numpy()
    return by_task


def make_module(make_encoder, kind="both", **options):
    return ContrastiveModule(
        make_encoder(kind, pooling="mean"),
        similarity="cosine",
        temperature=0.05,
        optim=OptimOptions(lr=1e-3),
        **options,
    )


def trained_on_classification(module, three_tasks):
    """Train on one task, so that the gradients of the tasks conflict."""
    batch = three_tasks.train_dataloader().batches[0]
    assert batch.task == "classification"
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        module.training_step(batch, 0)["loss"].backward()
        optimizer.step()
    return module


@pytest.mark.parametrize("cache", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_pcgrad_in_training_projects_shared_parameters(make_encoder, three_tasks, tmp_path, cache):
    spy, module = Spy(), trained_on_classification(make_module(make_encoder, grad_cache=cache).train(), three_tasks)
    by_task = task_gradients(module, three_tasks)
    fitted(module, three_tasks, tmp_path, PCGrad(list(TASKS)), spy)
    shared = [name for name in spy.gradients if all(name in by_task[task] for task in TASKS)]
    assert shared
    assert len(shared) < len(spy.gradients)
    vectors = np.stack([np.concatenate([by_task[task][name].ravel() for name in shared]) for task in TASKS])
    assert (vectors @ vectors.T < 0).any()
    ours = np.concatenate([spy.gradients[name].numpy().ravel() for name in shared])
    np.testing.assert_allclose(ours, projected(vectors, orders_of(0, 3)), atol=1e-5 * np.abs(ours).max())
    for name in set(spy.gradients) - set(shared):
        (alone,) = [by_task[task][name] for task in TASKS if name in by_task[task]]
        np.testing.assert_allclose(spy.gradients[name].numpy(), alone, atol=1e-5 * np.abs(ours).max())


def test_gradnorm_in_training_weights_all_gradients_of_a_task(make_encoder, three_tasks, tmp_path):
    """All weights are 1 in the first step, and follow the norms afterwards."""
    spy, balance = Spy(), GradNorm(list(TASKS), alpha=0.0, lr=0.1)
    fitted(make_module(make_encoder, "shared"), three_tasks, tmp_path, balance, spy, steps=1)
    assert balance.weights.sum().item() == pytest.approx(3)
    module = make_module(make_encoder, "shared").train()
    by_task = {}
    for batch in [three_tasks.train_dataloader().batches[step] for step in range(12)]:
        module.zero_grad(set_to_none=True)
        (module.training_step(batch, 0)["loss"] / 12).backward()
        flat = np.concatenate([p.grad.double().numpy().ravel() for p in module.parameters() if p.grad is not None])
        by_task[batch.task] = by_task.get(batch.task, 0) + flat
    total = sum(by_task.values())
    ours = np.concatenate([gradient.numpy().ravel() for gradient in spy.gradients.values()])
    np.testing.assert_allclose(ours, total, atol=1e-5 * np.abs(total).max())
    norms = np.array([np.linalg.norm(by_task[task]) for task in TASKS])
    updated = 1 - 0.1 * np.sign(norms - norms.mean()) * norms / norms.mean()
    np.testing.assert_allclose(balance.weights.numpy(), updated * 3 / updated.sum(), rtol=1e-5)
    restored = GradNorm(list(TASKS))
    restored.load_state_dict(balance.state_dict())
    assert torch.equal(restored.weights, balance.weights)


def test_uncertainty_is_trained_with_the_encoder(make_encoder, three_tasks, tmp_path):
    module = make_module(make_encoder, balance="uncertainty")
    fitted(module, three_tasks, tmp_path)
    values = [p.item() for p in module.uncertainty.parameters()]
    assert len(values) == 3
    assert all(value != 0 for value in values)
