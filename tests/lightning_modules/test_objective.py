"""The objective against loops of numpy, its gradients against finite differences, and parts against the whole."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from datamodules.records import UserError
from lightning_modules.objective import Objective
from lightning_modules.objective.options import GuideOptions, ObjectiveOptions, TeacherOptions
from lightning_modules.objective.parts import in_parts, rows_at_once
from lightning_modules.objective.temperature import Temperature
from tests.lightning_modules.objective_reference import normalized, random_batch, reference

COSINE = {"similarity": "cosine", "temperature": 0.1}
TEACHER = TeacherOptions(model="x", weight=0.7, temperature=0.3)
CASES = {
    "default": {},
    "cosine": COSINE,
    "unmasked": {"mask_known_positives": False},
    "texts_unmasked": {"symmetric": True, "mask_same_text": False},
    "log_mean": COSINE | {"positives": "log_mean"},
    "supcon_out": COSINE | {"positives_in_denominator": True},
    "supcon_in": COSINE | {"positives": "log_mean", "positives_in_denominator": True},
    "symmetric": COSINE | {"symmetric": True},
    "symmetric_unmasked": {"symmetric": True, "mask_known_positives": False},
    "matryoshka": COSINE | {"matryoshka": [2, 5], "matryoshka_weights": [0.5, 2.0], "symmetric": True},
    "guide": COSINE | {"guide": GuideOptions("x", 0.05), "symmetric": True},
    "guide_relative": COSINE | {"guide": GuideOptions("x", 0.1, "relative"), "mask_known_positives": False},
    "kl": COSINE | {"teacher": TEACHER},
    "kl_own": COSINE | {"teacher": dataclasses.replace(TEACHER, candidates="own")},
    "margin_mse": COSINE | {"teacher": dataclasses.replace(TEACHER, loss="margin_mse")},
    "margin_mse_own": {"teacher": dataclasses.replace(TEACHER, loss="margin_mse", candidates="own")},
    "guided_kl_own": COSINE
    | {"guide": GuideOptions("x", 0.3), "teacher": dataclasses.replace(TEACHER, candidates="own")},
    "weighted": COSINE | {"task_weights": {"search": 3.0}},
}


class Fixed:
    """A judge whose vectors are given."""

    def __init__(self, rng, batch):
        sizes = (len(batch.queries), len(batch.documents))
        self.arrays = tuple(normalized(rng.normal(size=(size, 5))) for size in sizes)

    def vectors(self, batch):
        return tuple(torch.tensor(array) for array in self.arrays)


def world(seed, case, num_positives=3, **more):
    """An objective with its batch, vectors (U, 8) in float64, and the judges that its options name."""
    rng = np.random.default_rng(seed)
    batch = random_batch(rng, num_positives=num_positives)
    options = ObjectiveOptions(**(CASES[case] | more))
    named = {"guide": options.guide.model, "teacher": options.teacher.model}
    judges = {name: Fixed(rng, batch) for name, model in named.items() if model}
    vectors = torch.tensor(rng.normal(size=(17, 8)), requires_grad=True)
    return Objective(options, ["search"], 8, judges).double(), vectors, batch


@pytest.mark.parametrize("num_positives", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_equals_numpy(case, num_positives):
    for seed in range(5):
        objective, vectors, batch = world(seed, case, num_positives)
        arrays = {name: judge.arrays for name, judge in objective.judges.items()}
        wanted = reference(vectors.detach().numpy(), batch, objective.options, objective.options.temperature, **arrays)
        assert abs(objective(vectors, batch)["loss"].item() - wanted) < 1e-12 * max(1, abs(wanted))
        objective = objective.float()
        for judge in objective.judges.values():
            judge.arrays = tuple(array.astype(np.float32) for array in judge.arrays)
        assert objective(vectors.float(), batch)["loss"].item() == pytest.approx(wanted, rel=2e-6, abs=1e-6)


def test_every_option_matters():
    losses = {case: world(1, case)[0](*world(1, case)[1:])["loss"].item() for case in CASES}
    assert len({round(loss, 6) for loss in losses.values()}) == len(CASES)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("memory", [1e-6, 512])
def test_gradients_equal_finite_differences(case, memory):
    objective, vectors, batch = world(2, case, score_memory=memory)
    assert torch.autograd.gradcheck(lambda x: objective(x, batch)["loss"], (vectors,))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("memory", [1e-6, 2.2e-3])
def test_parts_equal_the_whole(case, memory, monkeypatch):
    """Scores of one row, or a few rows, at a time: loss, gradients of vectors and temperature, and accuracy."""
    found, sizes = [], []

    def spied(function, at_once, rows, *rest):
        sizes.append((len(rows), at_once))
        return in_parts(function, at_once, rows, *rest)

    monkeypatch.setattr("lightning_modules.objective.comparison.in_parts", spied)
    for limit in (512, memory):
        objective, vectors, batch = world(3, case, score_memory=limit, learn_temperature="one")
        outputs = objective(vectors, batch)
        outputs["loss"].backward()
        temperature = objective.temperature.log["all"]
        found.append([outputs["loss"].detach(), vectors.grad, temperature.grad, outputs["accuracy"]])
    assert any(at_once < num_rows for num_rows, at_once in sizes)
    for whole, parts in zip(*found, strict=True):
        assert (whole - parts).abs().max() <= 1e-12 * whole.abs().max()


class Largest(TorchDispatchMode):
    """The most bytes of a tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and not function._schema.name.startswith("aten::expand"):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return found


@pytest.mark.parametrize("case", CASES)
def test_no_matrix_of_all_scores_ever_stands(case):
    """256 queries, 512 documents: nothing that is made, scores, masks or gradients, is larger than a part's budget."""
    rng = np.random.default_rng(0)
    batch = random_batch(rng, num_queries=256, num_documents=512, num_ids=2000)
    options = ObjectiveOptions(**(CASES[case] | {"score_memory": 0.25}))
    named = {"guide": options.guide.model, "teacher": options.teacher.model}
    judges = {name: Fixed(rng, batch) for name, model in named.items() if model}
    vectors = torch.tensor(rng.normal(size=(768, 8)), requires_grad=True)
    with Largest() as largest:
        Objective(options, ["search"], 8, judges).double()(vectors, batch)["loss"].backward()
    assert largest.bytes <= 2**18 < 256 * 512 * 8


def test_parts_without_gradients():
    objective, vectors, batch = world(3, "symmetric", score_memory=1e-6)
    wanted = objective(vectors, batch)["loss"].item()
    with torch.no_grad():
        assert objective(vectors, batch)["loss"].item() == wanted


def test_the_budget_sets_the_rows_of_a_part():
    columns = torch.zeros(1024, 3)
    assert rows_at_once(1, columns) == 2**20 // (1024 * 4 * 4)
    assert rows_at_once(512, torch.zeros(2**26, 1)) == 1


def test_masked_documents_get_no_gradient():
    objective, vectors, batch = world(0, "default", num_positives=1)
    ids, known = batch.document_ids.tolist(), [set(row) for row in batch.known_positives.tolist()]
    batch.known_positives = torch.cat([batch.known_positives, torch.full((6, 1), ids[4])], 1)  # of every query
    batch.positives[batch.positives == 4] = 3
    objective(vectors, batch)["loss"].backward()
    grads = vectors.grad[batch.documents]
    assert torch.equal(grads[4], torch.zeros(8, dtype=torch.float64))
    others = [c for c in range(11) if c != 4 and not all(ids[c] in row for row in known)]
    assert (grads[others].abs().sum(1) > 0).all()


def test_a_query_without_negatives_has_no_loss_and_no_gradient():
    for case in ("cosine", "log_mean", "supcon_out"):
        objective, vectors, batch = world(0, case)
        batch.known_positives = batch.document_ids.repeat(6, 1)
        loss = objective(vectors, batch)["loss"]
        loss.backward()
        assert torch.isfinite(vectors.grad).all()
        if case != "supcon_out":
            assert loss.item() == pytest.approx(0, abs=1e-12)
            assert vectors.grad.abs().max() < 1e-12


def test_half_precision_is_compared_in_float32():
    objective, vectors, batch = world(0, "default")
    half = vectors.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective(half, batch)["loss"]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(objective(half.double(), batch)["loss"].item(), rel=1e-5)


def test_is_a_function_of_its_arguments():
    objective, vectors, batch = world(0, "guided_kl_own", symmetric=True)
    state = torch.get_rng_state()
    one, two = objective(vectors, batch), objective(vectors, batch)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), state)


def test_distillation_is_logged_apart():
    objective, vectors, batch = world(0, "kl")
    found = objective(vectors, batch)
    assert set(found) == {"loss", "accuracy", "contrastive", "distillation"}
    assert found["loss"].item() == pytest.approx((found["contrastive"] + 0.7 * found["distillation"]).item())


def test_a_learned_temperature_has_a_gradient_and_stays_in_its_range():
    objective, vectors, batch = world(0, "cosine", learn_temperature="one", temperature_range=[0.05, 0.2])
    assert objective(vectors, batch)["temperature"].item() == pytest.approx(0.1)
    parameter = objective.temperature.log["all"]

    def loss(logarithm):
        with torch.no_grad():
            parameter.copy_(logarithm)
        return objective(vectors, batch)["loss"].item()

    start = math.log(0.1)
    objective(vectors, batch)["loss"].backward()
    assert parameter.grad.item() == pytest.approx((loss(start + 1e-5) - loss(start - 1e-5)) / 2e-5, rel=1e-6)
    for value, wanted in ((math.log(0.01), 0.05), (math.log(7.0), 0.2), (math.log(0.12), 0.12)):
        loss(value)
        objective.temperature.clamp()
        assert objective.temperature("search").item() == pytest.approx(wanted)


def test_temperatures_by_task():
    fixed = Temperature({"search": 0.05, "links": 2.0})
    assert (fixed("search"), fixed("links"), list(fixed.parameters())) == (0.05, 2.0, [])
    learned = Temperature({"search": 0.05, "links": 2.0}, "per_task", ["search", "links"])
    assert learned("links").item() == pytest.approx(2.0)
    learned("search").backward()
    assert learned.log["links"].grad is None  # an optimizer leaves it where it is
    same = Temperature(0.3, "per_task", ["search", "links"])
    assert {round(p.exp().item(), 6) for p in same.parameters()} == {0.3}


def test_a_prefix_as_long_as_the_vectors_is_refused():
    with pytest.raises(UserError, match="objective.matryoshka: got 8, allowed are numbers below 8"):
        Objective(ObjectiveOptions(matryoshka=[4, 8]), ["search"], 8, {})
