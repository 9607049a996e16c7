"""Matching of distributions over the labels of two tasks: its formulas, the labels it encodes, and what it teaches."""

import random

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from datamodules.ragged import Ragged
from datamodules.records import UserError
from lightning_modules.auxiliary.distribution_matching import (
    FLOOR,
    DistributionMatching,
    Labels,
    LabelSample,
    matching_loss,
)
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.backbone import set_dropout
from lightning_modules.encoders.moe import MoEEncoder
from lightning_modules.objective_options import ObjectiveOptions
from lightning_modules.optim import OptimOptions
from lightning_modules.retrieval.evaluation import evaluate
from tests.conftest import separate
from tests.lightning_modules.auxiliary.worlds import partial_world
from tests.lightning_modules.paired import LONG, gain_of
from tests.lightning_modules.quiet_trainer import quiet_trainer

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
    encoder = separate(MoEEncoder(backbone, tokenizer, tasks, pooling="mean", max_length=32))
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


def test_all_labels_or_a_sample_with_the_related_ones_are_encoded():
    known, related = Ragged.of([[], [0], [1, 2]]), Ragged.of([[3], [4, 5], []])
    rows = np.arange(10, 30)
    assert LabelSample(rows, 20, known, related)(np.array([0]), np.array([1]), random.Random(0)).tolist() == [*rows]
    sample = LabelSample(rows, 6, known, related)
    samples = [sample(np.array([query]), np.array([1]), random.Random(5)).tolist() for query in (0, 2)]
    drawn = {10 + position for position in random.Random(5).sample(range(20), 6)}
    assert samples == [sorted(drawn | {13}), sorted(drawn | {13, 14, 15})], "the draw does not depend on the batch"


ERRORS = [
    ({"source": "filds"}, "source: unknown task 'filds'; expected one of fields, topics"),
    ({"target": "serach"}, "target: unknown task 'serach'"),
    ({"source": "topics"}, "source: every training query of topics has labels of topics"),
    ({"relation": "estimated"}, "relation: cannot be estimated, because no paper has labels of both"),
    ({"relation": "same"}, "relation: no label of fields has the same name as a label of topics"),
    ({"match": "name"}, "match: expected one of title, text, id, got 'name'"),
]


@pytest.mark.parametrize(("options", "message"), ERRORS)
def test_mistakes_raise_user_error_before_training(write_relation, options, message):
    world = partial_world(0, num_papers=32)
    arguments = {"source": "fields", "target": "topics", "relation": write_relation(np.eye(8))} | options
    with pytest.raises(UserError) as error:
        module_of(world, world.data(batch_size=4), DistributionMatching(**arguments))
    assert str(error.value).startswith(f"losses.match: {message}")


def test_target_that_is_not_a_classification_raises_user_error():
    world = partial_world(0, tasks=("links", "topics"), num_papers=32)
    with pytest.raises(UserError, match="losses.match: task links has no labels; expected a task of kind classificat"):
        module_of(world, world.data(batch_size=4), DistributionMatching("topics", "links"))


def test_file_with_an_unknown_label_raises_user_error_with_its_line(tmp_path):
    world, path = partial_world(0, num_papers=32), tmp_path / "relation.tsv"
    path.write_text("fields0\ttopics0\t1\nfields1\ttopic1\t1\n")
    with pytest.raises(UserError, match=r"relation\.tsv, line 2: 'topic1' is not a label of topics; did you mean 'top"):
        module_of(world, world.data(batch_size=4), DistributionMatching("fields", "topics", str(path)))


@pytest.mark.parametrize("options", [{"teacher": "x"}, {"smoothing": -1.0}, {"max_labels": 0}, {"certain": 0.0}])
def test_impossible_options_raise_user_error(options):
    with pytest.raises(UserError, match=f"{next(iter(options))}: expected"):
        DistributionMatching("fields", "topics", **options)


def test_relation_estimated_in_training_is_close_to_the_true_one():
    true = 0.75 * np.eye(8) + 0.25 * np.roll(np.eye(8), 1, 1)
    world = partial_world(0, true, num_papers=800, share_of_both=0.7)
    loss = DistributionMatching("fields", "topics")
    loss.prepare(world.data(batch_size=4))
    assert np.abs(loss.relation.numpy() - true).max() < 0.12
    assert np.abs(1 / 8 - true).max() > 0.5


def trained(world, folder, seed, weight, relation):
    """Train for 60 steps, and return the module and its data."""
    data = world.data(batch_size=8, seed=seed)
    backbone, tokenizer = world.backbone(seed, num_hidden_layers=1, initializer_range=0.02)
    tasks = {name: name for name in world.collections}
    encoder = MoEEncoder(backbone, tokenizer, tasks, layers="all", pooling="mean", max_length=32)
    objective = {"similarity": "cosine", "temperature": 0.1}
    arguments = {"weight": weight, "objective": ObjectiveOptions(**objective)}
    losses = {"match": DistributionMatching("fields", "topics", relation, **arguments)}
    optim = OptimOptions(lr=5e-3, schedule="constant")
    module = ContrastiveModule(encoder, **objective, total_steps=60, optim=optim, losses=losses)
    quiet_trainer(folder, max_steps=60).fit(module, data)
    return module, data


SEEDS = range(100, 105)  # none of them took part in the choice of this world


def outcome(folder, seed, truth, weight, path):
    """Return nDCG@10 of each test paper, and the mean cosine of two of them. truth: relation of the world."""
    world = partial_world(seed, truth, num_papers=48, words_per_value=32)
    module, data = trained(world, folder, seed, weight, path)
    (benchmark,) = [each for each in data.benchmarks("test") if each.task == "topics"]
    encoder = module.encoder.eval()
    result = evaluate(encoder, benchmark, ["ndcg@10"], similarity="cosine")
    vectors = normalize(encoder.encode(list(benchmark.queries.values()), "topics"), dim=-1)
    return result.query_values.values[:, 0], (vectors @ vectors.T)[~torch.eye(len(vectors), dtype=torch.bool)].mean()


@pytest.mark.slow
@pytest.mark.parametrize("related", [True, False])
def test_papers_without_topics_learn_them_from_their_fields_if_these_are_related(tmp_path, write_relation, related):
    """No paper has both labels. Unrelated labels are independent, so the uniform relation is the true one."""
    cyclic, uniform = 0.75 * np.eye(8) + 0.25 * np.roll(np.eye(8), 1, 1), np.full((8, 8), 1 / 8)
    truth, values = cyclic if related else uniform, {}
    seeds = SEEDS if related or LONG else SEEDS[:3]
    for name, weight, relation in (("none", 0.0, cyclic), ("cyclic", 1.0, cyclic), ("uniform", 1.0, uniform)):
        path = write_relation(relation)
        arms = [outcome(tmp_path, seed, truth, weight, path) for seed in seeds]
        values[name], cosines = zip(*arms, strict=True)
        print(f"{name}: {np.mean(values[name]):.3f}, mean cosine {np.mean(cosines):.2f}")
        assert max(cosines) < 0.95, "no collapse"
    pairs = (("cyclic", "none"), ("uniform", "none"), ("cyclic", "uniform"))
    gains = [gain_of(values[after], values[before]) for after, before in pairs]
    for (after, before), gain in zip(pairs, gains, strict=True):
        print(f"{after} over {before}: {gain}")
    of_relation, of_uniform, of_knowledge = gains
    if related:
        assert of_relation.mean > of_relation.of_seeds
        assert of_knowledge.mean > of_knowledge.of_seeds
        assert of_uniform.mean < of_uniform.of_seeds
    else:
        assert of_relation.mean < of_relation.of_seeds
