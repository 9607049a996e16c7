"""The quadruplet ranking: its formula, which labels are known, and its errors."""

import math
import re

import numpy as np
import pytest
import torch

from datamodules.batches import MultiTaskDataModule
from datamodules.records import Collection, Document, UserError
from datamodules.tasks import ClassificationDataModule, LinkPredictionDataModule, SearchDataModule
from lightning_modules.auxiliary import quadruplets
from lightning_modules.auxiliary.quadruplets import QuadrupletRanking, label_table, quadruplet_loss
from lightning_modules.objective_options import ObjectiveOptions
from tests.lightning_modules.auxiliary.batches import batch_of

ORDER = [(1, 1), (1, 0), (0, 1), (0, 0)]  # labels of A and B, best first


def expected_loss(scores, label_a, label_b, known, beta1, beta2):
    """Return the loss of each query by loops."""
    losses = []
    for row, a, b, k in zip(scores, label_a, label_b, known, strict=True):
        groups = [[s for s, x, y, z in zip(row, a, b, k, strict=True) if z and (x, y) == pair] for pair in ORDER]
        loss = 0.0
        for above, below, beta in zip(groups, groups[1:], (beta1, beta1, beta2), strict=False):
            terms = [math.log(1 + math.exp(worse - better)) for better in above for worse in below]
            loss += beta * sum(terms) / max(1, len(terms))
        losses.append(loss)
    return losses


def random_case(queries=3, documents=9):
    rng = np.random.default_rng(0)
    labels = [torch.tensor(rng.random((queries, documents)) < share) for share in (0.4, 0.5, 0.8)]
    return torch.tensor(rng.normal(size=(queries, documents))), *labels


@pytest.mark.parametrize("block", [2**22, 1])
def test_loss_is_that_of_loops_and_passes_gradcheck(monkeypatch, block):
    monkeypatch.setattr(quadruplets, "MAX_COMPARISONS", block)
    scores, *labels = random_case()
    value = quadruplet_loss(scores, *labels, 0.7, 1.3)
    assert value.tolist() == pytest.approx(
        expected_loss(scores.tolist(), *(x.tolist() for x in labels), 0.7, 1.3), rel=1e-12
    )
    assert torch.autograd.gradcheck(lambda x: quadruplet_loss(x, *labels, 0.7, 1.3), scores.requires_grad_())


def test_loss_of_three_documents_has_a_closed_form():
    """Documents ++, -+ and --: only the last two are neighbours in the order."""
    scores = torch.tensor([[0.3, 0.1, -0.2]], dtype=torch.float64)
    label_a, label_b = torch.tensor([[True, False, False]]), torch.tensor([[True, True, False]])
    value = quadruplet_loss(scores, label_a, label_b, torch.ones_like(label_a), 5.0, 2.0)
    assert value.item() == pytest.approx(2 * math.log(1 + math.exp(-0.3)), rel=1e-12)


def test_the_order_of_the_paper_has_the_least_loss():
    label_a, label_b = (torch.tensor([[bool(pair[i]) for pair in ORDER]]) for i in (0, 1))
    known = torch.ones_like(label_a)
    losses = {
        order: quadruplet_loss(torch.tensor([order], dtype=torch.float64), label_a, label_b, known, 1.0, 1.0).item()
        for order in [(3, 2, 1, 0), (2, 3, 1, 0), (3, 1, 2, 0), (3, 2, 0, 1), (0, 1, 2, 3)]
    }
    assert min(losses, key=losses.get) == (3, 2, 1, 0)
    assert max(losses, key=losses.get) == (0, 1, 2, 3)


def test_pairs_with_an_unknown_label_have_no_gradient():
    scores, label_a, label_b, known = random_case()
    scores.requires_grad_()
    quadruplet_loss(scores, label_a, label_b, known, 1.0, 1.0).sum().backward()
    assert not scores.grad[~known].any()
    assert scores.grad[known].any()


# The labels of task B


def papers(*numbers):
    return {f"p{n}": Document(f"p{n}", f"The study of the subject number {n}", "text") for n in numbers}


def prepared(kind, collection, name="b"):
    task = kind(name, {name: collection})
    task.setup()
    return task


@pytest.fixture
def links():
    """Papers 0 to 5; 0 cites 1 and 2 cites 3."""
    texts = papers(*range(6))
    qrels = {"train": {"p0": {"p1": 1}, "p2": {"p3": 1}}}
    return prepared(LinkPredictionDataModule, Collection(texts, texts, qrels), "links")


@pytest.fixture
def fields():
    """Papers 0 and 1 have field x, paper 2 has y, paper 3 has both; paper 4 is only in the test split."""
    labels = {f"l{name}": Document(f"l{name}", name) for name in "xy"}
    train = {"p0": {"lx": 1}, "p1": {"lx": 1}, "p2": {"ly": 1}, "p3": {"lx": 1, "ly": 1}}
    return prepared(
        ClassificationDataModule, Collection(labels, papers(*range(6)), {"train": train, "test": {"p4": {"lx": 1}}})
    )


@pytest.fixture
def searches():
    """The query q has papers 0 and 3, and the query r has paper 1."""
    queries = {name: Document(name, "", name) for name in "qr"}
    return prepared(
        SearchDataModule,
        Collection(papers(*range(5)), queries, {"train": {"q": {"p0": 1, "p3": 2, "p4": 0}, "r": {"p1": 1}}}),
    )


@pytest.fixture
def citations():
    """Other citations: paper 0 cites 2 and 3, and paper 5 is not in the corpus."""
    qrels = {"train": {"p0": {"p2": 1, "p3": 1}}}
    return prepared(LinkPredictionDataModule, Collection(papers(*range(5)), papers(0, 5), qrels))


SHARED = {(0, 0), (0, 1), (0, 3), (1, 0), (1, 1), (1, 3), (2, 2), (2, 3), (3, 0), (3, 1), (3, 2), (3, 3)}


@pytest.mark.parametrize(
    ("other", "labelled", "queries", "documents"),
    [
        ("fields", SHARED, {0, 1, 2, 3}, {0, 1, 2, 3}),
        ("searches", {(0, 0), (0, 3), (3, 0), (3, 3), (1, 1)}, {0, 1, 3}, {0, 1, 3}),
        ("citations", {(0, 2), (0, 3)}, {0}, {0, 1, 2, 3, 4, 5}),
    ],
)
def test_labels_of_papers_are_those_of_the_other_tasks_training_data(
    request, links, other, labelled, queries, documents
):
    related, keys = label_table(links, request.getfixturevalue(other), "title")
    shared = {(q, d) for q in range(6) for d in range(6) if set(related[q]) & set(keys[d])}
    assert shared == labelled
    assert {q for q in range(6) if (related[q] >= 0).any()} == queries
    assert {d for d in range(6) if (keys[d] >= 0).any()} == documents


@pytest.mark.parametrize("own", [{"temperature": 0.5}, {}])
@pytest.mark.parametrize("temperature", [0.5, {"links": 0.5, "b": 3.0}])
def test_loss_of_a_batch_uses_the_labels_of_both_tasks(links, fields, own, temperature):
    objective = ObjectiveOptions(similarity="cosine", temperature=7.0 if own else temperature)
    loss = QuadrupletRanking({"links": "b"}, ["links", "b"], objective=objective, **own)
    loss.prepare(MultiTaskDataModule([links, fields]))
    batch = batch_of([[1], [3]], 6)  # rows of the documents are those of the papers
    batch.rows = torch.tensor([0, 2, *range(6)])
    vectors = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = torch.nn.functional.normalize(vectors, dim=1)
    scores = (unit[:2] @ unit[2:].T / 0.5).tolist()
    cites = [[d == positive for d in range(6)] for positive in (1, 3)]
    shares = [[(q, d) in SHARED for d in range(6)] for q in (0, 2)]
    known = [[d < 4 and d != q for d in range(6)] for q in (0, 2)]
    expected = np.mean(expected_loss(scores, cites, shares, known, 1.0, 1.0))
    assert loss(batch, vectors, ()).item() == pytest.approx(expected, rel=1e-12)
    assert not list(loss.state_dict()), "tables are made again"


def test_loss_of_another_task_is_0_and_has_a_graph(links, fields):
    loss = QuadrupletRanking({"links": "b"}, ["links", "b"])
    vectors = torch.randn(5, 4).requires_grad_()
    value = loss(batch_of([[0], [1]], 3, task="b"), vectors, ())
    value.backward()
    assert value.item() == 0


@pytest.mark.parametrize(("task", "other", "what"), [("links", "b", "query"), ("b", "links", "document")])
def test_tasks_without_labels_in_common_raise_user_error(links, task, other, what):
    """Tasks without a common paper, and a classification, whose documents are not papers."""
    labels = {"lx": Document("lx", "x")}
    numbers = range(20, 23) if task == "links" else range(3)
    qrels = {"train": {f"p{n}": {"lx": 1} for n in numbers}}
    fields = prepared(ClassificationDataModule, Collection(labels, papers(*numbers), qrels))
    loss = QuadrupletRanking({task: other}, ["links", "b"])
    message = f"labels.{task}: {other} has no training label for any {what} of {task}; the two tasks must share"
    with pytest.raises(UserError, match=message):
        loss.prepare(MultiTaskDataModule([links, fields]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": {}}, "labels: got none; expected task: task with the second label"),
        ({"labels": {"links": "field"}}, "labels.links: unknown task 'field'; the tasks in training are links, fields"),
        ({"labels": {"link": "fields"}}, "labels.link: unknown task 'link'; the tasks in training are links, fields"),
        ({"labels": {"links": "links"}}, "labels.links: got the task itself; expected one of fields"),
        ({"beta1": -1.0}, "beta1: expected a number of at least 0"),
        ({"beta2": math.nan}, "beta2: expected a number of at least 0"),
        ({"temperature": 0.0}, "temperature: expected a number of at least 1e-06"),
        ({"match": "name"}, "match: expected one of title, text, id, got 'name'"),
    ],
)
def test_impossible_options_raise_user_error(options, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        QuadrupletRanking(**{"labels": {"links": "fields"}, "tasks": ["links", "fields"]} | options)
