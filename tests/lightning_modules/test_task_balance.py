"""Each method of balancing tasks equals a few lines of numpy, both alone and in training."""

import importlib.util

import lightning as L
import numpy as np
import pytest
import torch
from scipy.optimize import minimize, nnls

from datamodules.records import UserError
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.optim import OptimOptions
from lightning_modules.task_balance import (
    GradNorm,
    GramianBalance,
    PCGrad,
    TaskGradients,
    balanced_coefficients,
    gradnorm_weights,
    pcgrad_coefficients,
    torchjd_weighting,
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


def test_gradnorm_balances_the_other_tasks_if_one_has_no_loss():
    """The quotient of two losses of 0 turned GradNorm off. With no gradients at all, the weights became nan."""

    def weights_after(norms, losses, first, steps=30):
        weights = torch.ones(len(norms)).double()
        for _ in range(steps):
            values = (torch.tensor(x).double() for x in (norms, losses, first))
            weights = gradnorm_weights(weights, *values, alpha=1.5, lr=0.025)
        return weights.tolist()

    without, small, large = weights_after([0, 1, 4], [0, 1, 1], [0, 2, 2])
    assert 3 * large < without < 2 * small
    began = weights_after([1, 1, 4], [0.5, 2, 2], [0, 2, 2])  # as if its rate were that of the others
    assert began == weights_after([1, 1, 4], [2, 2, 2], [2, 2, 2])
    assert weights_after([0, 0], [0, 0], [1, 1]) == [1, 1]


def gradients_of_tasks(seed):
    """Return gradients (T, 8) of 2 to 5 tasks that differ in size by a factor of about 10, with conflicts."""
    rng = np.random.default_rng(seed)
    num_tasks = rng.integers(2, 6)
    return rng.normal(size=(num_tasks, 8)) * np.exp(rng.normal(size=(num_tasks, 1))) + 0.3 * rng.normal(size=8)


def combined(gradients, method):
    products = torch.from_numpy(gradients @ gradients.T)
    return balanced_coefficients(products, torchjd_weighting(method)).numpy() @ gradients


def test_mgda_descends_to_the_nearest_point_where_two_quadratics_cannot_both_fall():
    """The shortest combination of x - a and x - b points from x to the nearest point between a and b."""
    a, b = np.array([0.0, 0.0, 1.0]), np.array([4.0, 0.0, 1.0])
    for start, nearest in (([1.0, 3.0, 0.0], [1.0, 0.0, 1.0]), ([9.0, 2.0, 1.0], b), ([-1.0, 0.5, 2.0], a)):
        x = np.array(start)
        for _ in range(60):
            step = combined(np.stack([x - a, x - b]), "mgda") / 2
            x = x - 0.5 * step
        np.testing.assert_allclose(x, nearest, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_mgda_finds_the_shortest_convex_combination(seed):
    """SLSQP of SciPy solves the same problem."""
    gradients = gradients_of_tasks(seed)
    num_tasks = len(gradients)
    result = minimize(
        lambda weights: np.sum((weights @ gradients) ** 2),
        np.full(num_tasks, 1 / num_tasks),
        bounds=[(0, 1)] * num_tasks,
        constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1},
        options={"ftol": 1e-14},
    )
    shortest, largest = np.sqrt(result.fun), np.linalg.norm(gradients, axis=1).max()
    norm = np.linalg.norm(combined(gradients, "mgda")) / num_tasks
    assert shortest - 1e-6 * largest < norm < shortest + 0.01 * largest


@pytest.mark.parametrize("seed", range(20))
def test_upgrad_equals_projections_onto_the_dual_cone_and_opposes_no_task(seed):
    """The projection of g is g + J^T w, with the w >= 0 that makes it shortest: non-negative least squares."""
    gradients = gradients_of_tasks(seed)
    direction = combined(gradients, "upgrad")
    expected = sum(g + nnls(gradients.T, -g)[0] @ gradients for g in gradients)
    largest = np.linalg.norm(gradients, axis=1).max()
    np.testing.assert_allclose(direction, expected, atol=1e-5 * largest)
    assert (gradients @ direction > -1e-5 * largest * np.linalg.norm(gradients, axis=1)).all()
    assert not np.allclose(direction, gradients.sum(0), atol=1e-3) or (gradients @ gradients.T > 0).all()


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_upgrad_does_not_change_gradients_that_agree_at_any_scale(scale):
    products = scale * torch.tensor([[1.0, 0.5], [0.5, 2.0]])
    torch.testing.assert_close(
        balanced_coefficients(products, torchjd_weighting("upgrad")), torch.ones(2).double(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("method", ["mgda", "upgrad"])
@pytest.mark.parametrize("products", [torch.zeros(3, 3), torch.full((3, 3), torch.inf), torch.full((3, 3), torch.nan)])
def test_gradients_of_0_and_overflowed_ones_keep_their_weights(method, products):
    assert balanced_coefficients(products, torchjd_weighting(method)).tolist() == [1, 1, 1]


def test_upgrad_accepts_equal_gradients_that_rounding_makes_indefinite():
    products = torch.tensor([[1.0, 1.0000001], [1.0000001, 1.0]])
    assert torch.linalg.eigvalsh(products.double())[0] < 0
    torch.testing.assert_close(
        balanced_coefficients(products, torchjd_weighting("upgrad")), torch.ones(2).double(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(("method", "missing"), [("mgda", "torchjd"), ("upgrad", "qpsolvers and quadprog")])
def test_missing_packages_raise_user_error(monkeypatch, method, missing):
    find = importlib.util.find_spec
    hidden = missing.split(" and ")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else find(name))
    with pytest.raises(UserError, match=rf"balance: {method} needs {missing}; install torchjd"):
        GramianBalance(list(TASKS), method)


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


METHODS = {
    "pcgrad": (lambda: PCGrad(list(TASKS)), lambda gradients: projected(gradients, orders_of(0, 3))),
    "mgda": (lambda: GramianBalance(list(TASKS), "mgda"), lambda gradients: combined(gradients, "mgda")),
    "upgrad": (lambda: GramianBalance(list(TASKS), "upgrad"), lambda gradients: combined(gradients, "upgrad")),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cache", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_of_shared_parameters_are_combined_in_training(make_encoder, three_tasks, tmp_path, cache, method):
    make_balance, combine = METHODS[method]
    spy, module = Spy(), trained_on_classification(make_module(make_encoder, grad_cache=cache).train(), three_tasks)
    by_task = task_gradients(module, three_tasks)
    fitted(module, three_tasks, tmp_path, make_balance(), spy)
    shared = [name for name in spy.gradients if all(name in by_task[task] for task in TASKS)]
    assert shared
    assert len(shared) < len(spy.gradients)
    vectors = np.stack([np.concatenate([by_task[task][name].ravel() for name in shared]) for task in TASKS])
    assert (vectors @ vectors.T < 0).any()
    ours, expected = np.concatenate([spy.gradients[name].numpy().ravel() for name in shared]), combine(vectors)
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())
    assert not np.allclose(ours, vectors.sum(0), atol=1e-2 * np.abs(ours).max())
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
