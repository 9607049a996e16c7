"""Matching of distributions over the labels of two tasks: its formulas, the labels it encodes, and what it teaches."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from lightning_modules.auxiliary.distribution_matching import (
    FLOOR,
    DistributionMatching,
    Labels,
    matching_loss,
)
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.backbone import set_dropout
from lightning_modules.encoders.moe import MoEEncoder
from lightning_modules.objective_options import ObjectiveOptions
from tests.lightning_modules.auxiliary.worlds import partial_world

TEMPERATURES = {"fields": 0.3, "topics": 0.2, "links": 0.4}
OBJECTIVE = ObjectiveOptions(similarity="cosine", temperature=TEMPERATURES)


@pytest.mark.parametrize("teacher", ["relation", "prediction"])
def test_loss_of_three_papers_by_explicit_loops(teacher):
    p = [[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [1 / 3, 1 / 3, 1 / 3]]
    q = [[0.2, 0.8, 0.0], [0.1, 0.1, 0.2], [0.0, 0.0, 0.0]]
    expected = []
    for of_paper, sums in zip(p, q, strict=True):
        coverage, total = sum(sums), 0.0
        for probability, value in zip(of_paper, sums, strict=True):
            transferred = value / max(coverage, FLOOR)
            if teacher == "relation":
                total -= transferred * np.log(probability)
            else:
                total -= probability * np.log(max(transferred, FLOOR))
        expected.append(coverage * total)
    losses = matching_loss(torch.tensor(p, dtype=torch.float64).log(), torch.tensor(q, dtype=torch.float64), teacher)
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("teacher", ["relation", "prediction"])
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_gradients_of_the_loss_reach_the_sides_that_are_not_the_teacher(teacher, stop_gradient):
    torch.manual_seed(0)
    logits, scores = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    relation = torch.rand(4, 4, dtype=torch.float64).softmax(1)

    def loss(logits, scores):
        return matching_loss(logits.log_softmax(1), scores.softmax(1) @ relation, teacher, stop_gradient).sum()

    student, other = (logits, scores) if teacher == "relation" else (scores, logits)
    gradients = torch.autograd.grad(loss(logits, scores), (student, other), allow_unused=True)
    assert gradients[0].abs().max() > 1e-3
    assert (gradients[1] is None) == stop_gradient
    if stop_gradient:
        constant = other.detach()
        arguments = (logits, constant) if teacher == "relation" else (constant, scores)
        assert torch.autograd.gradcheck(loss, arguments)
    else:
        assert torch.autograd.gradcheck(loss, (logits, scores))


@pytest.fixture
def write_relation(tmp_path):
    """Write a relation from fields to topics, or among topics, to a file."""

    def write(weights, first="fields", second="topics"):
        path = tmp_path / "relation.tsv"
        pairs = np.ndindex(*weights.shape)
        path.write_text("".join(f"{first}{a}\t{second}{b}\t{weights[a, b]:.6f}\n" for a, b in pairs))
        return str(path)

    return write


def module_of(world, data, loss, **options):
    """Return a module in float64 without dropout, with experts, whose loss is prepared."""
    backbone, tokenizer = world.backbone(3)
    set_dropout(backbone, 0.0, 0.0)
    tasks = {name: name for name in world.collections}
    encoder = MoEEncoder(backbone, tokenizer, tasks, pooling="mean", max_length=32)
    with torch.no_grad():  # experts start equal
        torch.manual_seed(4)
        for name, parameter in encoder.named_parameters():
            if ".experts." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    module = ContrastiveModule(encoder, similarity="cosine", temperature=0.1, losses={"match": loss}, **options)
    module.prepare_losses(data)
    return module.double()


def batch_of(data, task, first=0):
    batches = data.train_dataloader().batches
    return next(batch for step in range(first, first + 9) if (batch := batches[step]).task == task)


def value_of(module, batch):
    vectors = module.embed(batch).vectors
    return module._additional_losses(vectors, batch)["match"]


def probabilities(first, second, task):
    scores = normalize(first, dim=-1) @ normalize(second, dim=-1).T / TEMPERATURES[task]
    return scores.softmax(1).detach().numpy()


def cross_entropy(p, q):
    return [-sum(q[i][b] * np.log(p[i][b]) for b in range(p.shape[1])) for i in range(len(p))]


@pytest.mark.parametrize("known", [False, True])
def test_labels_are_transferred_through_the_relation_by_explicit_loops(write_relation, known):
    """Papers with fields learn topics; some of them have topics already, and count 0."""
    world = partial_world(0, num_papers=32, share_of_both=0.3)
    data = world.data(batch_size=6)
    weights = np.random.default_rng(1).random((8, 8)).round(3) * 0.9
    loss = DistributionMatching("fields", "topics", write_relation(weights), known, objective=OBJECTIVE)
    module, fields = module_of(world, data, loss), data.tasks[0]
    relation = weights / weights.sum(1, keepdims=True)
    batch = batch_of(data, "fields")
    papers = [fields.documents[row] for row in batch.rows[batch.queries].tolist()]

    def encode(texts, task):
        return module.encoder.encode(texts, task)

    labels = [list(task.collections[task.task.name].corpus.values()) for task in data.tasks]
    p = probabilities(encode(papers, "topics"), encode(labels[1], "topics"), "topics")
    of_fields = probabilities(encode(papers, "fields"), encode(labels[0], "fields"), "fields")
    if known:
        judged = world.collections["fields"].qrels["train"]
        of_fields = np.array([[float(label.id in judged[paper.id]) for label in labels[0]] for paper in papers])
    q = [[sum(of_fields[i, a] * relation[a, b] for a in range(8)) for b in range(8)] for i in range(6)]
    unlabelled = [paper.id not in world.collections["topics"].qrels["train"] for paper in papers]
    assert 0 < sum(unlabelled) < 6
    expected = np.mean(np.array(cross_entropy(p, q)) * unlabelled)
    assert value_of(module, batch).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("known", [False, True])
def test_links_are_transferred_to_labels_by_explicit_loops(write_relation, known):
    """Papers with links learn the topics of the documents that they probably cite, some of which are annotated."""
    world = partial_world(0, tasks=("links", "topics"), num_papers=40, share_of_both=0.5)
    data = world.data(batch_size=16)
    weights = np.random.default_rng(1).random((8, 8)).round(3)
    loss = DistributionMatching("links", "topics", write_relation(weights, "topics"), known, objective=OBJECTIVE)
    module, links = module_of(world, data, loss), data.tasks[0]
    relation = weights / weights.sum(1, keepdims=True)
    batch = batch_of(data, "links")
    papers, documents = (
        [links.documents[row] for row in batch.rows[index].tolist()] for index in (batch.queries, batch.documents)
    )
    labels = list(world.collections["topics"].corpus.values())
    encode = module.encoder.encode
    p = probabilities(encode(papers, "topics"), encode(labels, "topics"), "topics")
    of_labels = probabilities(encode(documents, "topics"), encode(labels, "topics"), "topics")
    annotated = world.collections["topics"].qrels["train"]
    for i, document in enumerate(documents):
        if document.id in annotated:
            of_labels[i] = [label.id in annotated[document.id] for label in labels]
        elif known:
            of_labels[i] = 0.0
    assert 0 < sum(document.id in annotated for document in documents) < len(documents)
    scores = normalize(encode(papers, "links"), dim=-1) @ normalize(encode(documents, "links"), dim=-1).T / 0.4
    is_self = torch.tensor([[document.id == paper.id for document in documents] for paper in papers])
    of_documents = scores.masked_fill(is_self, -torch.inf).softmax(1).detach().numpy()
    if known:
        of_documents = np.zeros_like(of_documents)
        for i, columns in enumerate(batch.positives.tolist()):
            columns = [column for column in columns if column >= 0]
            of_documents[i, columns] = 1 / len(columns)
    q = of_documents @ (of_labels @ relation)
    unlabelled = [paper.id not in annotated for paper in papers]
    expected = np.mean(np.array(cross_entropy(p, q)) * unlabelled)
    assert 0 < sum(unlabelled) < len(papers)
    assert expected > 0
    assert value_of(module, batch).item() == pytest.approx(expected, rel=1e-5)


def test_certain_relations_give_hard_labels(write_relation):
    """Fields 0 to 3 have one or two certain topics, the others have probable ones."""
    world = partial_world(0, num_papers=32)
    data = world.data(batch_size=16)
    weights = np.full((8, 8), 0.5)
    weights[:4] = 0.1
    weights[range(4), range(4)], weights[0, 7] = 1.0, 0.95
    loss = DistributionMatching("fields", "topics", write_relation(weights), known=True, objective=OBJECTIVE)
    loss.prepare(data)
    rows = batch_of(data, "fields").rows
    labels = Labels(torch.zeros(8, 1), torch.arange(8), torch.zeros(8, dtype=torch.bool))
    for row, known in zip(rows.tolist(), loss.lists[rows], strict=True):
        paper = data.tasks[0].documents[row].id
        if not paper.startswith("paper"):
            continue
        field = world.fields[int(paper.removeprefix("paper"))]
        expected = np.full(8, 1 / 8)
        if field < 4:
            expected = np.eye(8)[field] if field else (np.eye(8)[0] + np.eye(8)[7]) / 2
        assert loss._annotated(known[None], labels, hard=True)[0].tolist() == pytest.approx(expected.tolist())
