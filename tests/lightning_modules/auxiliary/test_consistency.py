"""Consistency between tasks: its formula, its companions, its errors, and worlds in which it helps or not."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from datamodules.records import UserError
from lightning_modules.auxiliary.consistency import (
    CrossTaskConsistency,
    JointSpace,
    consistency,
    ordered_pairs,
    predicted,
)
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.moe import MoEEncoder
from lightning_modules.optim import OptimOptions
from lightning_modules.retrieval.evaluation import evaluate
from tests.conftest import TASKS
from tests.lightning_modules.auxiliary.worlds import partial_world
from tests.lightning_modules.paired import LONG, gain_of
from tests.lightning_modules.quiet_trainer import quiet_trainer

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
UNRELATED = np.full((8, 8), 1 / 8)


# The formula


def small_case(step=5):
    """Return a loss with random parameters, a batch of three queries, their vectors, and those of the companions."""
    loss = CrossTaskConsistency(["a", "b", "c"], 4, pairs=[["a", "b"], ["b", "c"]], hidden=6).double()
    loss.warmup_batches = 5
    generator = torch.Generator().manual_seed(0)
    for parameter in loss.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    batch = SimpleNamespace(
        task="a",
        step=step,
        queries=torch.tensor([4, 0, 2]),
        documents=torch.tensor([1, 3]),
        positives=torch.tensor([[0, 1], [1, -1], [0, -1]]),
    )
    vectors, queries, candidates = (
        torch.randn(count, 4, generator=generator, dtype=torch.float64, requires_grad=True) for count in (5, 3, 5)
    )
    return loss, batch, vectors, [queries, candidates]


def by_hand(loss, batch, vectors, queries, candidates):
    """Return the loss of three queries of task "a" with the prediction of "b", in numpy and loops."""
    parameters = {name: p.detach().numpy() for name, p in loss.network.named_parameters()}

    def cosine(x, y):
        return x @ y / np.sqrt((x @ x) * (y @ y))

    def mapped(x, pair):
        row, h = loss.network.index[pair], parameters["enter.weight"] @ x
        h = (h - h.mean()) / np.sqrt(h.var() + 1e-5)
        h = np.maximum(parameters["scale"][row] * h + parameters["shift"][row], 0)
        return parameters["leave.weight"] @ h + parameters["leave.bias"]

    total = 0.0
    for number, positives in enumerate([[1, 3], [3], [1]]):  # texts of the positives
        f = vectors[batch.queries[number]]
        label = mapped(np.mean([vectors[text] for text in positives], axis=0), ("a", "b"))
        weights = np.exp([cosine(queries[number], candidate) / 0.1 for candidate in candidates])
        prediction = mapped(weights @ candidates / weights.sum(), ("b", "a"))
        trunk = (1 - cosine(prediction, f)) + (1 - cosine(label, f))
        total += (1 - cosine(prediction, label) + 0.5 * trunk) / 3
    return total


def test_loss_equals_the_formula_in_loops():
    loss, batch, vectors, companions = small_case()
    expected = by_hand(loss, batch, *(x.detach().numpy() for x in (vectors, *companions)))
    torch.testing.assert_close(loss(batch, vectors, companions).item(), expected, rtol=1e-12, atol=0)


def test_gradients_equal_differences_of_the_loss():
    loss, batch, _, (queries, _) = small_case()
    _, _, vectors, (_, candidates) = small_case()
    parameters = dict(loss.named_parameters())

    def value(queries, *values):
        given = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(loss, given, (batch, vectors, [queries, candidates]))

    assert torch.autograd.gradcheck(value, (queries, *parameters.values()))
    inputs = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    trunk = torch.randn(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, y: consistency(x, y, trunk, 0.7), inputs)


@pytest.mark.parametrize("step", [4, 5])
def test_gradients_reach_the_prediction_after_the_warmup_and_labels_never(step):
    loss, batch, vectors, (queries, candidates) = small_case(step)
    value = loss(batch, vectors, [queries, candidates])
    parameters = list(loss.parameters())
    gradients = torch.autograd.grad(value, [*parameters, vectors, queries, candidates], allow_unused=True)
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients[: len(parameters)])
    of_vectors, of_queries, of_candidates = gradients[len(parameters) :]
    assert of_vectors is None
    if step < 5:
        assert of_queries is None
        assert of_candidates is None
    else:
        assert (of_queries.norm(dim=1) > 1e-6).all()
        assert (of_candidates.norm(dim=1) > 0).all()


def test_network_treats_all_pairs_alike_at_first_and_does_not_touch_random_numbers():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    network = JointSpace([("a", "b"), ("b", "a")], 4, 8)
    assert torch.equal(torch.rand(2), expected)
    vectors = torch.randn(3, 4)
    assert torch.equal(network(vectors, ("a", "b")), network(vectors, ("b", "a")))


# Companions and errors


def test_warmup_is_a_share_of_the_training(make_encoder, three_tasks):
    """It was a number of batches, 1000 by default: a shorter training trained the network alone."""
    loss = CrossTaskConsistency(list(TASKS), 32, warmup=0.4)
    module = ContrastiveModule(make_encoder(), losses={"consistency": loss})
    module.prepare_losses(three_tasks)
    assert loss.warmup_batches == round(0.4 * 12)
    three_tasks.options, three_tasks.prepared_by = three_tasks.options.override(num_batches=0), None
    with pytest.raises(UserError, match="losses.consistency: warmup: the length of the training is unknown"):
        module.prepare_losses(three_tasks)


def batches(make_encoder, data):
    """Return the batches of training, with companions."""
    loss = CrossTaskConsistency(list(TASKS), 32, candidates=5)
    ContrastiveModule(make_encoder(), losses={"consistency": loss}).prepare_losses(data)
    return data.train_dataloader().batches


def test_companions_are_the_queries_and_few_candidates_of_the_other_tasks(make_encoder, three_tasks):
    batch = batches(make_encoder, three_tasks)[0]
    others = [task for task in TASKS if task != batch.task]
    assert [companion.task for companion in batch.companions] == [others[0], others[0], others[1], others[1]]
    tables = three_tasks.by_name
    for other, queries, candidates in zip(others, batch.companions[::2], batch.companions[1::2], strict=True):
        assert torch.equal(queries.rows, batch.rows[batch.queries])
        assert len(set(candidates.rows.tolist())) == 5
        assert tables[other].corpus_rows()[candidates.rows].all()


def test_candidates_are_the_same_on_all_ranks_and_differ_by_step(make_encoder, three_tasks):
    source = batches(make_encoder, three_tasks)

    def candidates(step, rank):
        batch = dataclasses.replace(source, rank=rank, world_size=2)[step]
        return [companion.rows.tolist() for companion in batch.companions[1::2]]

    assert candidates(0, 0) == candidates(0, 1)
    assert candidates(0, 0) != candidates(3, 0)
    assert source[0].task == source[3].task


def test_documents_left_out_of_training_are_not_candidates(make_encoder, three_tasks):
    stripped = np.arange(7)
    for table in three_tasks.tasks:
        table.stripped = stripped
    for companion in batches(make_encoder, three_tasks)[0].companions[1::2]:
        assert companion.rows.tolist() == [7, 8, 9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": [["search", "clicks"]]}, "pairs: expected tasks among .*, got 'clicks'"),
        ({"pairs": [["search", "search"]]}, "pairs: expected pairs of two tasks"),
        ({"pairs": ["search"]}, "pairs: expected pairs of two tasks"),
        ({"pairs": []}, "pairs: expected at least one pair"),
        ({"tasks": ["search"]}, "expected at least two tasks in training, got search"),
        ({"candidates": 1}, "candidates: expected a number of at least 2"),
        ({"hidden": 0}, "hidden: expected"),
        ({"warmup": -0.1}, "warmup: expected"),
        ({"warmup": 400}, "warmup: expected a number of at least 0 and below 1, got 400"),
        ({"temperature": 0.0}, "temperature: expected a number of at least 1e-06"),
        ({"trunk_weight": -0.5}, "trunk_weight: expected"),
    ],
)
def test_impossible_options_raise_user_error(options, message):
    with pytest.raises(UserError, match=message):
        CrossTaskConsistency(**({"tasks": list(TASKS), "dimension": 32} | options))


def test_task_without_data_and_corpus_without_documents_raise_user_error(three_tasks):
    loss = CrossTaskConsistency([*TASKS, "clicks"], 32, pairs=[["search", "clicks"]])
    with pytest.raises(UserError, match="pairs: task 'clicks' has no data; expected one of classification"):
        loss.prepare(three_tasks)
    three_tasks.tasks[0].stripped = np.arange(9)
    with pytest.raises(UserError, match="needs two documents, but task classification has only 1 to train on"):
        CrossTaskConsistency(list(TASKS), 32).prepare(three_tasks)


def test_pairs_have_both_directions_once():
    assert ordered_pairs(["a", "b", "c"], [["b", "a"], ["a", "b"]]) == [("b", "a"), ("a", "b")]
    assert len(ordered_pairs(["a", "b", "c"])) == 6


# Worlds


@dataclasses.dataclass
class Outcome:
    """ndcg: nDCG@10 on test papers, by task. cosine: mean of random pairs of predictions in the joint space."""

    ndcg: dict[str, float]
    cosine: float


def outcome(seed, folder, relation=None, steps=300, weight=2.0, second="topics", **options):
    """Train two tasks with an expert each. Half of the papers have only a field, and half only topics, or links."""
    world = partial_world(seed, relation, ("fields", second), num_papers=192, num_test=192, words_per_value=40)
    tasks = {task: task for task in world.collections}
    encoder = MoEEncoder(
        *world.backbone(seed, **NO_DROPOUT), tasks, ffn=True, layers="all", pooling="mean", max_length=32
    )
    options = {"lr": 3e-3, "hidden": 64, "warmup": 0.5} | options
    loss = CrossTaskConsistency(list(tasks), 32, weight, **options)
    module = ContrastiveModule(
        encoder,
        similarity="cosine",
        temperature=0.1,
        total_steps=steps,
        optim=OptimOptions(lr=3e-3, schedule="constant"),
        losses={"consistency": loss},
    )
    data = world.data(batch_size=16, num_batches=steps)
    quiet_trainer(folder, max_steps=steps, gradient_clip_val=1.0).fit(module, data)
    encoder.eval()
    benchmarks = {benchmark.task: benchmark for benchmark in data.benchmarks("test")}
    results = {task: evaluate(encoder, each, ["ndcg@10"], similarity="cosine") for task, each in benchmarks.items()}
    with torch.no_grad():
        papers, documents = (list(getattr(benchmarks[second], name).values()) for name in ("queries", "corpus"))
        predictions = predicted(*(encoder.encode(texts, second) for texts in (papers, documents)), 0.1)
        joint = F.normalize(loss.network(predictions, (second, "fields")), dim=-1)
    count = len(papers)
    cosine = ((joint @ joint.T).sum().item() - count) / (count * (count - 1))
    return Outcome({task: result.metrics["ndcg@10"] for task, result in results.items()}, cosine)


def gains(folder, seeds=range(3), **options):
    """Return the gain in nDCG@10 over weight 0, by task."""
    arms = [[outcome(seed, folder, weight=weight, **options) for seed in seeds] for weight in (0.0, 2.0)]
    before, after = ({task: [each.ndcg[task] for each in arm] for task in arm[0].ndcg} for arm in arms)
    result = {task: gain_of(after[task], before[task]) for task in after}
    for task, gain in result.items():
        print(f"{task}: {np.mean(before[task]):.3f}, {gain}, mean cosine {np.mean([x.cosine for x in arms[1]]):.2f}")
    return result


@pytest.mark.slow
@pytest.mark.parametrize("second", ["topics", "links"] if LONG else ["topics"])
def test_papers_annotated_for_one_task_teach_the_other(tmp_path, second):
    seeds = range(5) if second == "topics" else range(100, 105)
    for task, gain in gains(tmp_path, seeds, second=second).items():
        assert gain.mean > max(0.04, gain.of_seeds), task


@pytest.mark.slow
def test_unrelated_tasks_gain_nothing(tmp_path):
    for task, gain in gains(tmp_path, range(3 if LONG else 2), relation=UNRELATED).items():
        assert gain.mean < min(0.01, gain.of_seeds), task


@pytest.mark.slow
def test_joint_space_collapses_without_the_trunk(tmp_path):
    with_trunk, without = (outcome(0, tmp_path, steps=150, trunk_weight=weight).cosine for weight in (0.5, 0.0))
    assert without > 0.95
    assert with_trunk < 0.3
