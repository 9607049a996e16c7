"""The objective equals the losses of sentence-transformers on the same vectors."""

import pytest
import torch
from torch import nn

from lightning_modules.frozen import FrozenVectors
from lightning_modules.objective import Objective
from lightning_modules.objective_options import GuideOptions, ObjectiveOptions, TeacherOptions
from tests.lightning_modules.objective_reference import batch_without_texts

losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

B, D, N = 6, 16, 2
COSINE = {"similarity": "cosine", "temperature": 0.05}


class Vectors(nn.Sequential):
    """A stand-in for a model that returns its input."""

    def __init__(self):
        super().__init__(nn.Identity())

    def forward(self, features):
        return dict(features)

    def get_embedding_dimension(self):
        return D


def features(*columns):
    return [{"sentence_embedding": column} for column in columns]


def world(seed, num_negatives=N):
    """Return vectors of queries, positives and N hard negatives per query, and the batch that they form."""
    torch.manual_seed(seed)
    columns = [torch.randn(B, D, dtype=torch.float64, requires_grad=True) for _ in range(2 + num_negatives)]
    documents = B * (1 + num_negatives)
    batch = batch_without_texts(
        queries=torch.arange(B),
        documents=torch.arange(B, B + documents),
        document_ids=torch.arange(documents),
        positives=torch.arange(B)[:, None],
        hard_negatives=torch.arange(B)[:, None] + B * torch.arange(1, 1 + num_negatives),
        known_positives=torch.arange(B)[:, None],
    )
    return columns, batch


def loss_of(columns, batch, frozen_models=None, **options):
    objective = Objective(ObjectiveOptions(**options), ["search"], D, **(frozen_models or {}))
    return objective(torch.cat(columns), batch)["loss"]


def check(columns, loss, expected):
    """Compare a loss and its gradients with those of sentence-transformers."""
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for one, other in zip(torch.autograd.grad(loss, columns), torch.autograd.grad(expected, columns), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("num_negatives", [0, 2])
def test_multiple_negatives_ranking(num_negatives):
    columns, batch = world(0, num_negatives)
    loss = losses.MultipleNegativesRankingLoss(Vectors(), scale=20.0)
    check(columns, loss_of(columns, batch, **COSINE), loss(features(*columns), None))


def test_multiple_negatives_ranking_with_both_directions():
    columns, batch = world(1)
    both = ("query_to_doc", "doc_to_query")
    loss = losses.MultipleNegativesRankingLoss(Vectors(), scale=20.0, directions=both, partition_mode="per_direction")
    check(columns, loss_of(columns, batch, symmetric=True, **COSINE), loss(features(*columns), None))


def test_multiple_negatives_symmetric_ranking():
    columns, batch = world(2, 0)
    loss = losses.MultipleNegativesSymmetricRankingLoss(Vectors(), scale=20.0)
    check(columns, loss_of(columns, batch, symmetric=True, **COSINE), loss(features(*columns), None))


def test_cached_multiple_negatives_ranking():
    columns, batch = world(3)
    loss = losses.CachedMultipleNegativesRankingLoss(Vectors(), scale=20.0, mini_batch_size=2)
    reps = [[c.detach().requires_grad_() for c in column.split(2)] for column in columns]
    expected = loss.calculate_loss(reps, with_backward=True)
    cached = [torch.cat([part.grad for part in column]) for column in reps]
    ours = loss_of(columns, batch, score_memory=1e-6, **COSINE)  # in blocks of a single row
    assert ours.item() == pytest.approx(expected.item(), abs=1e-6)
    for one, other in zip(torch.autograd.grad(ours, columns), cached, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_matryoshka():
    columns, batch = world(4)
    inner = losses.MultipleNegativesRankingLoss(Vectors(), scale=20.0)
    loss = losses.MatryoshkaLoss(inner.model, inner, [D, 8, 4], [1.0, 0.5, 2.0])
    options = COSINE | {"matryoshka": [8, 4], "matryoshka_weights": [0.5, 2.0]}
    check(columns, loss_of(columns, batch, **options), loss(features(*columns), None))


class FrozenModel:
    """The same vectors for every batch: queries (B, G) and documents (m, G)."""

    def __init__(self, queries, documents):
        self.vectors = FrozenVectors(queries, documents)

    def embed(self, batch):
        return self.vectors


@pytest.mark.parametrize(("kind", "margin"), [("absolute", 0.0), ("absolute", 0.1), ("relative", 0.2)])
def test_gist_embed(kind, margin):
    columns, batch = world(5, 1)
    guide = [torch.nn.functional.normalize(torch.randn(B, 4, dtype=torch.float64), dim=1) for _ in range(3)]
    options = {"margin_strategy": kind, "margin": margin, "contrast_anchors": False, "contrast_positives": False}
    loss = losses.GISTEmbedLoss.__new__(losses.GISTEmbedLoss)  # its constructor requires two tokenizers
    nn.Module.__init__(loss)
    loss.model, loss.guide, loss.temperature, loss.must_retokenize = Vectors(), Guide(guide), 0.05, False
    loss.similarity_fct, loss.cross_entropy_loss = nn.CosineSimilarity(dim=-1), nn.CrossEntropyLoss()
    loss.gather_across_devices = False
    for name, value in options.items():
        setattr(loss, name, value)
    models = {"guide": FrozenModel(guide[0], torch.cat(guide[1:]))}
    expected = loss(features(*columns), None)
    plain = losses.MultipleNegativesRankingLoss(Vectors(), scale=20.0)(features(*columns), None)
    assert abs(expected - plain) > 1e-3  # the guide masks something
    check(columns, loss_of(columns, batch, models, guide=GuideOptions("x", margin, kind), **COSINE), expected)


class Guide(Vectors):
    """A model that returns fixed vectors, one column per call, whatever its input."""

    def __init__(self, columns):
        super().__init__()
        self.columns, self.calls = columns, 0

    def forward(self, features):
        self.calls += 1
        return dict(features) | {"sentence_embedding": self.columns[(self.calls - 1) % len(self.columns)]}


def teacher_of(batch):
    """Return a teacher and its scores of each query's positive and hard negatives, (B, 1 + N)."""
    queries, documents = torch.randn(B, 4, dtype=torch.float64), torch.randn(len(batch.documents), 4).double()
    own = torch.cat([batch.positives, batch.hard_negatives], 1)
    return {"teacher": FrozenModel(queries, documents)}, (queries @ documents.T).gather(1, own)


def test_margin_mse():
    columns, batch = world(6)
    models, scores = teacher_of(batch)
    expected = losses.MarginMSELoss(Vectors())(features(*columns), scores)
    whole = loss_of(columns, batch, models, teacher=TeacherOptions("x", "margin_mse", "own"))
    check(columns, whole - loss_of(columns, batch), expected)


@pytest.mark.parametrize(("student", "teacher"), [(1.0, 1.0), (0.5, 2.0)])
def test_distillation_by_kl_divergence(student, teacher):
    columns, batch = world(7)
    models, scores = teacher_of(batch)
    loss = losses.DistillKLDivLoss(Vectors(), student_temperature=student, teacher_temperature=teacher)
    expected = loss(features(*columns), scores) / student**2  # our loss leaves this factor to the weight
    options = TeacherOptions("x", "kl", "own", temperature=teacher)
    whole = loss_of(columns, batch, models, temperature=student, teacher=options)
    check(columns, whole - loss_of(columns, batch, temperature=student), expected)
