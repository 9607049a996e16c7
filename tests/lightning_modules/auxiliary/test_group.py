"""The group loss: against loops, the papers that it draws, and worlds in which it helps and does not."""

import random

import numpy as np
import pytest
import torch

from datamodules.batches import BatchOptions
from datamodules.citation_graph import CitationGraph
from datamodules.records import Collection, Document, UserError
from datamodules.tasks import LinkPredictionDataModule, SearchDataModule
from lightning_modules.auxiliary import group as module
from lightning_modules.auxiliary.group import GroupLoss, GroupSampler, group_loss
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.optim import OptimOptions
from lightning_modules.retrieval.evaluation import evaluate
from tests.conftest import text_of, toy_collection
from tests.lightning_modules.paired import gain_of
from tests.lightning_modules.quiet_trainer import quiet_trainer


def unit(vector):
    return vector / np.sqrt((vector**2).sum())


def expected_loss(head, positives, negatives, margin, share):
    """Return the loss of one group, with loops over its papers."""
    members = [unit(vector) for vector in (head, *positives)]
    anchor = unit(sum(members))
    near = [1 - anchor @ member for member in members]
    far = [1 - anchor @ unit(vector) for vector in negatives]
    pull, push = sum(np.exp(near)), sum(np.exp(margin - d) for d in far)
    return share * np.mean(np.square(near)) + (1 - share) * max(np.log(pull) + np.log(push), 0) ** 2


def vectors(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def test_loss_of_three_papers_in_closed_form():
    """Head and positive at 90 degrees, with the anchor between them, and a negative opposite to the anchor."""
    head, positive, negative = (torch.tensor([v], dtype=torch.float64) for v in ([3.0, 0], [0, 2.0], [-1.0, -1]))
    near, far = 1 - 0.5**0.5, 2.0
    for margin, separation in ((1.5, np.log(2) + near + 1.5 - far), (1.0, 0)):  # with a margin of 1, it is far enough
        loss = group_loss(head, positive[None], negative[None], margin).item()
        assert loss == pytest.approx(0.5 * near**2 + 0.5 * separation**2, rel=1e-14)


@pytest.mark.parametrize(("positives", "negatives", "margin", "share"), [(1, 1, 1.0, 0.5), (3, 4, 0.7, 0.2)])
def test_loss_equals_loops_and_its_gradient_differences(positives, negatives, margin, share):
    groups = vectors(5, 7), vectors(5, positives, 7, seed=1), vectors(5, negatives, 7, seed=2)
    losses = group_loss(*groups, margin, share)
    expected = [expected_loss(*(part.numpy() for part in group), margin, share) for group in zip(*groups, strict=True)]
    torch.testing.assert_close(losses, torch.tensor(expected), rtol=1e-12, atol=0)
    inputs = [part[:2].requires_grad_() for part in groups]
    assert torch.autograd.gradcheck(lambda *parts: group_loss(*parts, margin, share), inputs)


# A ring of eight papers with a tail 7 - 8 - 9, and the pair 10 - 11.
LINKS = np.array([*((i, (i + 1) % 8) for i in range(8)), (7, 8), (8, 9), (10, 11)])


def transitions():
    links = np.zeros((12, 12))
    links[LINKS[:, 0], LINKS[:, 1]] = links[LINKS[:, 1], LINKS[:, 0]] = 1
    return links / links.sum(1, keepdims=True)


def sampler(steps=4, positives=1, negatives=1):
    return GroupSampler(CitationGraph(LINKS, 12), steps, positives, negatives)


def test_papers_are_drawn_by_the_probabilities_of_walks(monkeypatch):
    """The positive by that of a walk at a random step, the negative by the inverse of that at the last step."""
    monkeypatch.setattr(module, "WALKS", 1000)
    head, steps, count = 6, 4, 1000
    groups = np.array([sampler(steps).group(head, np.random.default_rng(i)) for i in range(count)])
    powers = [np.linalg.matrix_power(transitions(), step)[head] for step in range(1, steps + 1)]
    positive, allowed = np.zeros(12), []
    for power in powers:
        power = np.where(np.arange(12) == head, 0, power)
        positive += power / power.sum() / steps
    bound = 5 * np.sqrt(0.25 / count)  # standard deviations of a share of `count` draws
    np.testing.assert_allclose(np.bincount(groups[:, 0], minlength=12) / count, positive, atol=bound)
    negative = np.zeros(12)
    for drawn in range(12):  # the drawn positive and the linked papers are not negatives
        allowed = [row for row in np.flatnonzero(powers[-1]) if row not in (head, drawn, 5, 7)]
        inverse = np.zeros(12)
        inverse[allowed] = 1 / powers[-1][allowed]
        negative += positive[drawn] * inverse / inverse.sum()
    np.testing.assert_allclose(np.bincount(groups[:, 1], minlength=12) / count, negative, atol=bound)


def test_groups_have_distinct_papers_apart_from_the_head_and_no_linked_negatives():
    graph = CitationGraph(np.random.default_rng(0).integers(0, 20, size=(40, 2)), 20)
    for row in np.flatnonzero(graph.degrees).tolist():
        group = GroupSampler(graph, 5, 2, 3).group(row, np.random.default_rng(row))
        assert len({row, *group}) == 1 + 2 + 3
        assert not set(graph.neighbours_of(row).tolist()) & set(group[2:].tolist())
    few = sampler(3, 12, 12).group(9, np.random.default_rng(0))  # more than there are: papers repeat
    assert few.shape == (24,)
    assert not set(few[:12]) & set(few[12:])


def test_groups_depend_on_query_and_step_only():
    """Ranks have parts of a batch, in the same order or another."""
    sample = sampler(5, 2, 3)

    def drawn(rows, seed=0):
        return sample(np.array(rows), np.array([3]), random.Random(seed)).reshape(len(rows), 5).tolist()

    whole = drawn([4, 8, 1, 6])
    assert drawn([4, 8]) + drawn([1, 6]) == whole
    assert drawn([6, 1]) == whole[:1:-1]
    assert drawn([4, 8, 1, 6], seed=1) != whole


def test_query_without_a_group_has_no_loss(make_encoder, make_task):
    """Papers d8 and d9 cite each other only, so nobody is far from them."""
    collection = toy_collection(8, 8, papers=True)
    corpus = collection.corpus | {f"d{i}": Document(f"d{i}", text_of(i), text_of(i, i + 3)) for i in (8, 9)}
    judged = {"train": collection.qrels["train"] | {"d8": {"d9": 1}}}
    papers = Collection(corpus, collection.queries | {"d8": corpus["d8"]}, judged)
    assert sampler().group(10, np.random.default_rng(0)).tolist() == [10, 10]
    unlinked = GroupSampler(CitationGraph(LINKS, 14), 4, 1, 1)  # a file may lack links of a query
    assert [unlinked.group(row, np.random.default_rng(0)).tolist() for row in (12, 13)] == [[12, 12], [13, 13]]
    data = make_task(LinkPredictionDataModule, collection=papers, batch_size=9, num_hard_negatives=0)
    loss = GroupLoss(steps=4)
    ContrastiveModule(make_encoder(), losses={"group": loss}).prepare_losses(data)
    batch = data.train_dataloader().batches[0]
    heads, parts = vectors(len(batch.rows), 6).requires_grad_(), vectors(9 * 4, 6, seed=1).requires_grad_()
    loss(batch, heads, [parts]).backward()
    alone = int((batch.rows[batch.queries] == 8).nonzero())
    has_loss = parts.grad.view(9, 4, 6).abs().sum((1, 2)) > 0
    assert has_loss.tolist() == [query != alone for query in range(9)]
    assert (heads.grad[batch.queries[alone]] == 0).all()


def test_impossible_options_and_tasks_raise_user_errors(make_encoder, make_task, tmp_path):
    for options, message in (
        ({"steps": 1}, "steps: expected a number of at least 2"),
        ({"positives": 0}, "positives: expected a number of at least 1"),
        ({"negatives": 0}, "negatives: expected a number of at least 1"),
        ({"margin": float("nan")}, "margin: expected a number of at least -1e.06"),
        ({"share": 1.5}, "share: expected a number of at least 0 and at most 1, got 1.5"),
        ({"weight": -1}, "weight: expected a number of at least 0"),
    ):
        with pytest.raises(UserError, match=message):
            GroupLoss(**options)
    with pytest.raises(UserError, match="needs a task of kind link_prediction; the tasks are search"):
        GroupLoss().prepare(make_task(SearchDataModule))
    data = make_task(LinkPredictionDataModule, collection=toy_collection(10, 10, papers=True))
    (tmp_path / "graph.tsv").write_text("d1 d2\nd1 stranger\n")
    fitted = ContrastiveModule(make_encoder(), losses={"group": GroupLoss(graph=str(tmp_path / "graph.tsv"))})
    with pytest.raises(UserError, match=r"losses.group: .*graph.tsv, line 2: paper 'stranger' is not in the corpus"):
        quiet_trainer(tmp_path, max_steps=1).fit(fitted, data)


def communities(seed, count=6, size=10):
    """Return papers in communities, each a word of its own. A paper cites two of its community, some one of another.

    All papers of a community are relevant, but those linked in train are not part of the test. Most are two steps away.
    """
    rng = np.random.default_rng(seed)
    community = rng.permutation(count * size) % count
    corpus = {f"d{i}": Document(f"d{i}", "", text_of(*[i] * 6)) for i in range(count * size)}
    links: list[tuple[int, int]] = []
    for paper in range(count * size):
        same = [p for p in np.flatnonzero(community == community[paper]).tolist() if p != paper]
        links += [(paper, int(p)) for p in rng.choice(same, 2, replace=False)]
        if rng.random() < 0.3:
            links.append((paper, int(rng.choice(np.flatnonzero(community != community[paper])))))
    train: dict[str, dict[str, int]] = {}
    for paper, cited in links:
        train.setdefault(f"d{paper}", {})[f"d{cited}"] = 1
    known = {frozenset(link) for link in links}
    test = {
        f"d{a}": {
            f"d{b}": 1
            for b in np.flatnonzero(community == community[a]).tolist()
            if a != b and frozenset((a, b)) not in known
        }
        for a in range(count * size)
    }
    return Collection(corpus, dict(corpus), {"train": train, "test": test}), links


def figures_of_arm(make_encoder, folder, seed, weight, shuffled=False):
    """Train, and return nDCG@10 of the test links and the mean cosine of random pairs."""
    collection, links = communities(seed)
    graph = ""
    if shuffled:  # the same graph with its papers exchanged
        other = np.random.default_rng(seed).permutation(len(collection.corpus))
        graph = folder / "graph.tsv"
        graph.write_text("".join(f"d{other[a]} d{other[b]}\n" for a, b in links))
    config = {"num_layers": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    encoder = make_encoder("shared", seed=seed, tasks={"links": "links"}, config=config, pooling="mean")
    options = BatchOptions(batch_size=30, num_batches=60, max_length=16, num_hard_negatives=0, seed=seed)
    data = LinkPredictionDataModule("links", collection, options, encoder.tokenizer)
    data.setup()
    trained = ContrastiveModule(
        encoder,
        similarity="cosine",
        temperature=0.1,
        optim=OptimOptions(lr=3e-3, schedule="constant", warmup=0.3),
        losses={"group": GroupLoss(weight, graph=str(graph))},
    )
    quiet_trainer(folder, max_steps=60).fit(trained, data)
    ndcg = evaluate(encoder.eval(), data.benchmarks("test")[0], ["ndcg@10"], similarity="cosine").metrics["ndcg@10"]
    with torch.no_grad():
        units = torch.nn.functional.normalize(encoder.encode(list(collection.corpus.values()), "links"), dim=-1)
    return ndcg, (units @ units.T)[~torch.eye(len(units), dtype=bool)].mean().item()


@pytest.mark.slow
def test_papers_two_steps_away_are_found_better_unless_the_graph_is_shuffled(make_encoder, tmp_path):
    arms = {"without": {"weight": 0.0}, "with": {"weight": 1.0}, "shuffled": {"weight": 1.0, "shuffled": True}}
    figures = {
        name: [figures_of_arm(make_encoder, tmp_path, seed, **arm) for seed in range(3)] for name, arm in arms.items()
    }
    ndcg = {name: [figure[0] for figure in arm] for name, arm in figures.items()}
    cosine = {name: np.mean([figure[1] for figure in arm]) for name, arm in figures.items()}
    gain, shuffled = (gain_of(ndcg[name], ndcg["without"]) for name in ("with", "shuffled"))
    print(f"gain {gain}, shuffled {shuffled}, {ndcg}, {cosine}")
    assert gain.mean > gain.of_seeds
    assert shuffled.mean < shuffled.of_seeds
    assert cosine["with"] < cosine["without"] + 0.05  # no collapse
