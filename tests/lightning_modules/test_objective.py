"""The objective equals numpy loops, its gradients equal finite differences, and blocks equal the whole."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from datamodules.records import UserError
from datamodules.tasks import SearchDataModule
from lightning_modules.chunked import rows_per_block, sum_over_blocks
from lightning_modules.encoders.adapters import AdapterEncoder
from lightning_modules.frozen import FrozenEncoder, FrozenVectors
from lightning_modules.objective import Objective, Temperature
from lightning_modules.objective_options import GuideOptions, ObjectiveOptions, TeacherOptions, VectorTeacherOptions
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
    "l2": COSINE | {"vector_teacher": VectorTeacherOptions("x", 0.7)},
    "l2_of_dot": {"vector_teacher": VectorTeacherOptions("x", 0.7), "task_weights": {"search": 3.0}},
    "cosine_distance": {"vector_teacher": VectorTeacherOptions("x", 0.7, "cosine"), "symmetric": True},
    "asymmetric": COSINE | {"vector_teacher": VectorTeacherOptions("same size", 0.7, asymmetric=True)},
    "asymmetric_both": COSINE
    | {"vector_teacher": VectorTeacherOptions("same size", 0.7, asymmetric=True), "symmetric": True, "matryoshka": [5]},
}


class FrozenModel:
    """A frozen model with random vectors."""

    def __init__(self, rng, batch, dimension=5):
        sizes, self.dimension = (len(batch.queries), len(batch.documents)), dimension
        self.arrays = tuple(normalized(rng.normal(size=(size, dimension))) for size in sizes)

    def embed(self, batch):
        return FrozenVectors(*(torch.tensor(array) for array in self.arrays))


def frozen_models(options, rng, batch):
    """Return a frozen model for each that the options name."""
    models = {name: getattr(options, name).model for name in ("guide", "teacher", "vector_teacher")}
    return {name: FrozenModel(rng, batch, 8 if model == "same size" else 5) for name, model in models.items() if model}


def world(seed, case, num_positives=3, **more):
    """Return an objective with its frozen models, vectors (U, 8) in float64, and a batch."""
    rng = np.random.default_rng(seed)
    batch = random_batch(rng, num_positives=num_positives)
    options = ObjectiveOptions(**(CASES[case] | more))
    models = frozen_models(options, rng, batch)
    vectors = torch.tensor(rng.normal(size=(17, 8)), requires_grad=True)
    return Objective(options, ["search"], 8, **models).double(), vectors, batch


@pytest.mark.parametrize("num_positives", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_equals_numpy(case, num_positives):
    for seed in range(5):
        objective, vectors, batch = world(seed, case, num_positives)
        models = {name: getattr(objective, name) for name in ("guide", "teacher", "vector_teacher")}
        arrays = {name: model.arrays for name, model in models.items() if model}
        if objective.projection is not None:
            arrays["projection"] = objective.projection.detach().numpy().copy()
        options = objective.options
        expected = reference(vectors.detach().numpy(), batch, options, options.temperature, **arrays)
        assert abs(objective(vectors, batch)["loss"].item() - expected) < 1e-12 * max(1, abs(expected))
        objective = objective.float()
        for model in filter(None, models.values()):
            model.arrays = tuple(array.astype(np.float32) for array in model.arrays)
        assert objective(vectors.float(), batch)["loss"].item() == pytest.approx(expected, rel=2e-6, abs=1e-6)


def test_every_option_changes_the_loss():
    losses = {case: world(1, case)[0](*world(1, case)[1:])["loss"].item() for case in CASES}
    assert len({round(loss, 6) for loss in losses.values()}) == len(CASES)


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_finite_differences(case):
    """Those of blocks equal those of the whole, as the next test shows."""
    objective, vectors, batch = world(2, case)
    assert torch.autograd.gradcheck(lambda x: objective(x, batch)["loss"], (vectors,))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("memory", [1e-6, 2.2e-3])
def test_blocks_equal_the_whole(case, memory, monkeypatch):
    """Compare loss, accuracy, and gradients of vectors and temperature, for blocks of one or a few rows."""
    results, sizes = [], []

    def spy(block_loss, block_size, queries, *rest):
        sizes.append((len(queries), block_size))
        return sum_over_blocks(block_loss, block_size, queries, *rest)

    monkeypatch.setattr("lightning_modules.objective.sum_over_blocks", spy)
    for limit in (512, memory):
        objective, vectors, batch = world(3, case, score_memory=limit, learn_temperature="one")
        outputs = objective(vectors, batch)
        outputs["loss"].backward()
        temperature = objective.temperature.log["all"]
        results.append([outputs["loss"].detach(), vectors.grad, temperature.grad, outputs["accuracy"]])
    assert any(block_size < num_queries for num_queries, block_size in sizes)
    for whole, blocks in zip(*results, strict=True):
        assert (whole - blocks).abs().max() <= 1e-12 * whole.abs().max()


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns, in bytes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and not function._schema.name.startswith("aten::expand"):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return outputs


@pytest.mark.parametrize("case", CASES)
def test_no_tensor_exceeds_the_memory_budget(case):
    """With 256 queries and 512 documents, no scores, masks or gradients are larger than score_memory."""
    rng = np.random.default_rng(0)
    batch = random_batch(rng, num_queries=256, num_documents=512, num_ids=2000)
    options = ObjectiveOptions(**(CASES[case] | {"score_memory": 0.25}))
    models = frozen_models(options, rng, batch)
    vectors = torch.tensor(rng.normal(size=(768, 8)), requires_grad=True)
    with LargestTensor() as largest:
        Objective(options, ["search"], 8, **models).double()(vectors, batch)["loss"].backward()
    assert largest.bytes <= 2**18 < 256 * 512 * 8


def test_blocks_work_without_gradients():
    objective, vectors, batch = world(3, "symmetric", score_memory=1e-6)
    expected = objective(vectors, batch)["loss"].item()
    with torch.no_grad():
        assert objective(vectors, batch)["loss"].item() == expected


def test_memory_budget_sets_the_size_of_blocks():
    assert rows_per_block(1, torch.zeros(1024, 3)) == 2**20 // (1024 * 4 * 4)
    assert rows_per_block(512, torch.zeros(2**26, 1)) == 1


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


def test_query_without_negatives_has_no_loss_and_no_gradient():
    for case in ("cosine", "log_mean", "supcon_out"):
        objective, vectors, batch = world(0, case)
        batch.known_positives = batch.document_ids.repeat(6, 1)
        loss = objective(vectors, batch)["loss"]
        loss.backward()
        assert torch.isfinite(vectors.grad).all()
        if case != "supcon_out":
            assert loss.item() == pytest.approx(0, abs=1e-12)
            assert vectors.grad.abs().max() < 1e-12


def test_half_precision_vectors_are_compared_in_float32():
    objective, vectors, batch = world(0, "default")
    half = vectors.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective(half, batch)["loss"]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(objective(half.double(), batch)["loss"].item(), rel=1e-5)


def test_objective_is_deterministic_and_draws_no_random_numbers():
    objective, vectors, batch = world(0, "guided_kl_own", symmetric=True)
    state = torch.get_rng_state()
    one, two = objective(vectors, batch), objective(vectors, batch)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), state)


def test_distillation_is_logged_separately():
    objective, vectors, batch = world(0, "kl")
    outputs = objective(vectors, batch)
    assert set(outputs) == {"loss", "accuracy", "contrastive", "distillation"}
    assert outputs["loss"].item() == pytest.approx((outputs["contrastive"] + 0.7 * outputs["distillation"]).item())


def test_vector_distance_of_three_texts_in_closed_form():
    """A query (3, 4), its positive (0, 1) and its negative (1, 0); the teacher has (1, 0), (0, 1) and (0, 1)."""
    batch = random_batch(np.random.default_rng(0), num_queries=1, num_documents=2, num_positives=1, num_negatives=0)
    batch = dataclasses.replace(
        batch,
        documents=torch.tensor([1, 2]),
        positives=torch.tensor([[0]]),
        hard_negatives=torch.tensor([[1]]),
        pairs=None,
        teacher_vectors=torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64),
    )
    vectors = torch.tensor([[3.0, 4.0], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    teacher = SimpleNamespace(dimension=2)  # not asked, because the batch has the vectors
    expected = {
        ("cosine", "l2"): ((0.6 - 1) ** 2 + 0.8**2 + 0 + 2) / 3,
        ("cosine", "cosine"): (1 - 0.6 + 0 + 1) / 3,
        ("dot", "l2"): (2**2 + 4**2 + 0 + 2) / 3,
        ("dot", "cosine"): (1 - 0.6 + 0 + 1) / 3,
    }
    for (similarity, loss), value in expected.items():
        options = ObjectiveOptions(similarity=similarity, vector_teacher=VectorTeacherOptions("x", 2.0, loss))
        objective = Objective(options, ["search"], 2, vector_teacher=teacher).double()
        assert objective.projection is None
        outputs = objective(vectors, batch)
        assert outputs["vector_distance"].item() == pytest.approx(value, rel=1e-15)
        assert outputs["loss"].item() == pytest.approx((outputs["contrastive"] + 2 * value).item(), rel=1e-15)
        plain = Objective(ObjectiveOptions(similarity=similarity), ["search"], 2).double()
        distance = (objective(vectors, batch)["loss"] - plain(vectors, batch)["loss"]) / 2
        (gradient,) = torch.autograd.grad(distance, vectors)
        if (similarity, loss) == ("dot", "l2"):  # 2 (v - t) / 3
            torch.testing.assert_close(gradient, torch.tensor([[4.0, 8], [0, 0], [2, -2]]).double() / 3)
        assert torch.autograd.gradcheck(lambda x, objective=objective: objective(x, batch)["loss"], (vectors,))


def test_projection_has_the_gradient_of_finite_differences():
    objective, vectors, batch = world(2, "l2")
    weight = objective.projection
    assert torch.allclose(weight @ weight.T, torch.eye(5).double(), atol=1e-6)  # it starts orthogonal

    def loss(projection):
        return torch.func.functional_call(objective, {"projection": projection}, (vectors, batch))["loss"]

    assert torch.autograd.gradcheck(loss, (weight,))


def test_weight_0_of_a_task_leaves_loss_and_gradient_unchanged_to_the_bit():
    for weight in (0.0, {"search": 0.0, "other": 1.0}):
        results = []
        for teacher in (None, "x"):
            options = ObjectiveOptions(**COSINE, vector_teacher=VectorTeacherOptions(teacher, weight))
            objective = Objective(options, ["search", "other"], 8, vector_teacher=SimpleNamespace(dimension=5))
            assert (objective.projection is not None) == (teacher is not None and weight != 0)
            _, vectors, batch = world(3, "cosine")
            outputs = objective(vectors, batch)
            outputs["loss"].backward()
            results.append((outputs, vectors.grad))
        assert results[0][0] == results[1][0]
        assert torch.equal(results[0][1], results[1][1])


def test_learned_temperature_has_a_gradient_and_stays_in_its_range():
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
    for value, expected in ((math.log(0.01), 0.05), (math.log(7.0), 0.2), (math.log(0.12), 0.12)):
        loss(value)
        objective.temperature.clamp()
        assert objective.temperature("search").item() == pytest.approx(expected)


def test_temperature_per_task():
    tasks, initial = ["search", "links"], {"search": 0.05, "links": 2.0}
    fixed = Temperature(ObjectiveOptions(temperature=initial), tasks)
    assert (fixed("search"), fixed("links"), list(fixed.parameters())) == (0.05, 2.0, [])
    learned = Temperature(ObjectiveOptions(temperature=initial, learn_temperature="per_task"), tasks)
    assert learned("links").item() == pytest.approx(2.0)
    learned("search").backward()
    assert learned.log["links"].grad is None  # so an optimizer does not change it
    same = Temperature(ObjectiveOptions(temperature=0.3, learn_temperature="per_task"), tasks)
    assert {round(p.exp().item(), 6) for p in same.parameters()} == {0.3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matryoshka": [4, 8]}, "matryoshka: expected numbers below 8, the vector size, got 8"),
        ({"matryoshka": [0]}, "matryoshka: expected a number above 0, got 0"),
        ({"matryoshka": [4, 4]}, r"matryoshka: expected different numbers, got \[4, 4\]"),
        ({"matryoshka": [4], "matryoshka_weights": [1, 2]}, "expected one per entry of matryoshka, got 2"),
        ({"temperature": "warm"}, "temperature: expected a number of at least 1e-06 and at most 1e6, got 'warm'"),
        ({"temperature": {"serach": 1}}, "temperature: expected one of search, got 'serach'"),
        ({"temperature": {}}, "temperature: expected a number, or one for each task; there is none for search"),
        (
            {"temperature": 0.2, "learn_temperature": "one", "temperature_range": [0.3, 1]},
            "number in temperature_range",
        ),
        ({"guide": GuideOptions("x", 1.5, "relative")}, "guide.margin: expected a number below 1"),
        ({"task_weights": {"serach": 2.0}}, "task_weights: expected one of search, got 'serach'"),
        (
            {"vector_teacher": VectorTeacherOptions("x", -1)},
            "vector_teacher.weight: expected a number of at least 0",
        ),
        (
            {"vector_teacher": VectorTeacherOptions("x", {"serach": 1})},
            "vector_teacher.weight: expected one of search, got 'serach'",
        ),
        (
            {"vector_teacher": VectorTeacherOptions("x", {"search": "much"})},
            "vector_teacher.weight.search: expected a number of at least 0",
        ),
        ({"vector_teacher": VectorTeacherOptions("x", asymmetric=True)}, "asymmetric: needs similarity=cosine"),
        ({"positives": "median"}, "positives: expected one of mean_log, log_mean, got 'median'"),
    ],
)
def test_invalid_options_raise_user_error(options, message):
    with pytest.raises(UserError, match=message):
        Objective(ObjectiveOptions(**options), ["search"], 8)


def test_frozen_encoder_without_texts_raises_user_error(make_encoder, make_task):
    batch = make_task(SearchDataModule).train_dataloader().batches[0]
    with pytest.raises(UserError, match="the batch has no texts.*carry_texts"):
        FrozenEncoder(make_encoder("shared")).embed(batch)


def test_frozen_encoder_gives_the_vectors_of_encode(make_backbone, make_task):
    """Queries and documents of one task may have different adapters."""
    tasks = {"search": "search", "documents": "documents"}
    encoder = AdapterEncoder(*make_backbone(), tasks, document_tasks={"search": "documents"}, max_length=32)
    torch.nn.init.normal_(encoder.adapters["documents"][0].up.weight)
    batch = make_task(SearchDataModule, carry_texts=True).train_dataloader().batches[0]
    frozen = FrozenEncoder(encoder, "dot").embed(batch)
    queries, documents = encoder.encode(batch.texts, "search"), encoder.encode(batch.texts, "documents")
    assert torch.equal(frozen.queries, queries[batch.queries])
    assert torch.equal(frozen.documents, documents[batch.documents])
    assert not torch.equal(queries, documents)
    assert not frozen.queries.is_inference()  # so that it can be saved for a backward pass
