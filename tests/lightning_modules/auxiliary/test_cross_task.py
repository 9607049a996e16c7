"""Distillation from another task's expert: its formula, its calibration, its gradients and its errors."""

import math
import re

import numpy as np
import pytest
import torch

from datamodules.records import UserError
from lightning_modules.auxiliary.cross_task import CrossTaskDistillation, corrected, distillation
from lightning_modules.objective_options import ObjectiveOptions
from tests.lightning_modules.auxiliary.batches import batch_of

COSINE = ObjectiveOptions(similarity="cosine")
TASKS = ["links", "fields", "search"]


def loss_of(**options):
    return CrossTaskDistillation(
        **{"teachers": {"links": ["fields"]}, "tasks": TASKS, "objective": COSINE} | options
    ).double()


def random_vectors(count, dimension=4, seed=0):
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cross_entropy(target, log_odds):
    p = 1 / (1 + math.exp(-log_odds))
    return -target * math.log(p) - (1 - target) * math.log(1 - p)


def expected_loss(vectors, teachers, positives, loss, temperature, correct, calibration="with"):
    """Return the loss of cosines by loops over queries, documents and teachers.

    correct: log-odds, label -> log-odds. calibration: "with" its loss, "without" it, or "only" it.
    """
    number, slopes, intercepts = len(positives), loss.slopes.tolist(), loss.intercepts.tolist()
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (vectors, *teachers)]
    totals = []
    for query, own_positives in enumerate(positives):
        total = 0.0
        for document in range(len(vectors) - number):
            label = float(document in own_positives)
            own, *others = (float(x[query] @ x[number + document]) for x in unit)
            own = slopes[0][0] * own + intercepts[0][0]
            if calibration != "without":
                total += cross_entropy(label, own)
            for task, score in enumerate(others, start=1):
                log_odds = slopes[0][task] * score + intercepts[0][task]
                if calibration != "without":
                    total += cross_entropy(label, log_odds)
                if calibration != "only":
                    target = 1 / (1 + math.exp(-correct(log_odds, label) / temperature))
                    total += cross_entropy(target, own / temperature) / len(others)
        totals.append(total)
    return np.mean(totals)


@pytest.mark.parametrize("teachers", [["fields"], ["fields", "search"]])
@pytest.mark.parametrize(
    ("options", "correct"),
    [
        ({"margin": None}, lambda r, y: r),
        ({"margin": 0.5}, lambda r, y: max(r, 0.5) if y else r),
        (
            {"margin": 0.5, "correct_negatives": True, "temperature": 2.0},
            lambda r, y: max(r, 0.5) if y else min(r, -0.5),
        ),
    ],
)
def test_loss_of_three_documents_is_that_of_loops(teachers, options, correct):
    positives = [[0], [1, 2]]
    loss = loss_of(teachers={"links": teachers}, slope=2.0, intercept=0.3, **options)
    with torch.no_grad():
        loss.slopes += torch.arange(9).reshape(3, 3) / 5
        loss.intercepts -= torch.arange(9).reshape(3, 3) / 7
    vectors, batch = random_vectors(5).requires_grad_(), batch_of(positives, 3)
    others = [random_vectors(5, seed=seed) for seed in range(1, 1 + len(teachers))]
    value = loss(batch, vectors, others)
    numbers = [x.detach().numpy() for x in (vectors, *others)]
    expected = expected_loss(numbers[0], numbers[1:], positives, loss, options.get("temperature", 1.0), correct)
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_distillation_passes_gradcheck():
    student, teacher = random_vectors(3).requires_grad_(), random_vectors(3, seed=1)
    assert torch.autograd.gradcheck(lambda x: distillation(x, teacher, 1.7), student)


def test_vectors_learn_from_the_teacher_alone_and_calibrations_from_the_labels_alone():
    positives, eps = [[0], [1, 2]], 1e-6
    batch, loss = batch_of(positives, 3), loss_of(slope=2.0, intercept=-0.5)
    vectors, teacher = random_vectors(5).requires_grad_(), random_vectors(5, seed=1).requires_grad_()
    loss(batch, vectors, [teacher]).backward()

    def numerical(shift, calibration):
        moved = vectors.detach().numpy().copy()
        sides = []
        for sign in (1, -1):
            shift(moved, sign * eps)
            sides.append(
                expected_loss(moved, [teacher.detach().numpy()], positives, loss, 1.0, corrected_, calibration)
            )
            shift(moved, -sign * eps)
        return (sides[0] - sides[1]) / (2 * eps)

    def corrected_(log_odds, label):
        return max(log_odds, 0.0) if label else log_odds

    def coordinate(index):
        def shift(moved, amount):
            moved[index] += amount

        return shift

    def parameter(values, index):
        def shift(moved, amount):
            with torch.no_grad():
                values[index] += amount

        return shift

    for index in np.ndindex(5, 4):
        assert vectors.grad[index].item() == pytest.approx(numerical(coordinate(index), "without"), abs=1e-7)
    for values in (loss.slopes, loss.intercepts):
        for index in np.ndindex(3, 3):
            assert values.grad[index].item() == pytest.approx(numerical(parameter(values, index), "only"), abs=1e-7)
    assert teacher.grad is None


def test_calibration_recovers_the_affine_map_that_drew_the_labels():
    rng, shape = np.random.default_rng(0), (200, 150)
    vectors, teacher = random_vectors(sum(shape), 3), random_vectors(sum(shape), 3, seed=1)
    unit = torch.nn.functional.normalize(teacher, dim=1)
    log_odds = 3.0 * (unit[:200] @ unit[200:].T) - 1.0
    drawn = rng.random(shape) < torch.sigmoid(log_odds).numpy()
    batch = batch_of([np.flatnonzero(row).tolist() for row in drawn], shape[1])
    loss = loss_of(slope=-2.0, intercept=2.0)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        loss(batch, vectors, [teacher]).backward()
        optimizer.step()
    assert loss.slopes[0, 1].item() == pytest.approx(3.0, abs=0.1)
    assert loss.intercepts[0, 1].item() == pytest.approx(-1.0, abs=0.05)
    assert loss.slopes[0, 0].item() == pytest.approx(0.0, abs=0.1), "other vectors say nothing about the labels"
    assert (loss.slopes[1:] == -2.0).all(), "of tasks that are not in the batch"


def test_error_correction_moves_contradicting_log_odds_to_the_margin_and_no_others():
    log_odds = torch.tensor([[-3.0, 0.2, 2.0, -3.0, 0.2, 2.0]])
    positive = torch.tensor([[True, True, True, False, False, False]])
    assert corrected(log_odds, positive, 0.5).tolist() == [[0.5, 0.5, 2.0, -3.0, pytest.approx(0.2), 2.0]]
    assert corrected(log_odds, positive, 0.5, negatives=True).tolist() == [[0.5, 0.5, 2.0, -3.0, -0.5, -0.5]]


def test_loss_of_a_task_without_teachers_is_0_and_has_a_graph():
    vectors = random_vectors(5).requires_grad_()
    value = loss_of()(batch_of([[0], [1]], 3, task="search"), vectors, [])
    value.backward()
    assert value.item() == 0
    assert not vectors.grad.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"teachers": {"links": ["label"]}},
            "teachers.links: unknown task 'label'; the tasks in training are links, fi",
        ),
        ({"teachers": {"link": ["fields"]}}, "teachers.link: unknown task 'link'; the tasks in training are links, fi"),
        ({"teachers": {"links": ["links"]}}, "teachers.links: got the task itself; expected one of fields, search"),
        ({"teachers": {"links": ["fields", "fields"]}}, "teachers.links: expected each task once, got fields, fields"),
        ({"teachers": {}}, "teachers: got none; expected student: teachers"),
        ({"teachers": {"links": []}}, "teachers: got none; expected student: teachers"),
        ({"temperature": 0.0}, "temperature: expected a number of at least 1e-06"),
        ({"margin": -1.0}, "margin: expected a number of at least 0 and at most"),
        ({"margin": math.nan}, "margin: expected a number of at least 0 and at most"),
        ({"slope": math.inf}, "slope: expected a number of at least -1e+06"),
    ],
)
def test_impossible_options_raise_user_error(options, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        loss_of(**options)
