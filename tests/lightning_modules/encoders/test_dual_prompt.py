"""Positions in the citation graph: where they come from, that they change nothing when off, and what they are for."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from datamodules.batches import BatchOptions, MultiTaskDataModule
from datamodules.citation_graph import CitationGraph, positions
from datamodules.records import Collection, Document, Task, UserError
from datamodules.tasks import LinkPredictionDataModule, SearchDataModule
from lightning_modules.callbacks.diagnostics import Diagnostics
from lightning_modules.chunked import embed
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.dual_prompt import DualPromptEncoder
from lightning_modules.encoders.instruct import InstructEncoder
from lightning_modules.encoders.loading import continue_from, load_encoder
from lightning_modules.encoders.shared import SharedEncoder
from lightning_modules.optim import OptimOptions, parameter_groups
from tests.conftest import TASKS, WORDS, toy_collection
from tests.lightning_modules.quiet_trainer import quiet_trainer

INSTRUCTIONS = {"classification": "tag bara beli", "link_prediction": "cite bomu", "search": "find bito buna"}
LINKS = toy_collection(10, 10, papers=True)


@pytest.fixture
def make(make_backbone):
    def make(kind=DualPromptEncoder, seed=0, **arguments):
        if kind is not SharedEncoder:
            arguments["instructions"] = INSTRUCTIONS
        return kind(*make_backbone(seed), TASKS, **({"max_length": 32} | arguments))

    return make


@pytest.fixture
def make_data(make_task):
    def make_data(links=LINKS):
        search = make_task(SearchDataModule, "search")
        search.readers = {"queries": search.readers["toy"]}
        options = BatchOptions(batch_size=4, num_batches=8, max_length=32, token_budget=64)
        data = MultiTaskDataModule([make_task(LinkPredictionDataModule, "link_prediction", links), search], options)
        data.setup()
        return data

    return make_data


def fit(encoder, data, folder, steps=6, resume=None):
    module = ContrastiveModule(
        encoder, similarity="cosine", temperature=0.1, total_steps=6, optim=OptimOptions(lr=3e-3, schedule="constant")
    )
    trainer = quiet_trainer(folder, max_steps=steps)
    trainer.fit(module, data, ckpt_path=resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module


def weights(module):
    return torch.cat([p.detach().flatten() for name, p in module.named_parameters() if ".features." not in name])


def test_position_is_the_reachability_of_the_anchors_divided_by_its_deviation():
    graph = CitationGraph(np.array([[0, 1], [1, 2], [2, 3], [1, 3]]), 5)
    transitions = np.zeros((4, 4))
    for i, j in ((0, 1), (1, 2), (2, 3), (1, 3)):
        transitions[i, j] = transitions[j, i] = 1
    transitions /= transitions.sum(1, keepdims=True)
    reached = (transitions + transitions @ transitions)[:, [1, 2, 3]] / 2
    rows, vectors = positions(graph, 3, 2)
    assert rows.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(vectors, reached / reached.std(1, keepdims=True), rtol=1e-6)
    padded = positions(graph, 6, 2)[1]
    assert not padded[:, 4:].any()
    alone = positions(CitationGraph(np.array([[0, 1]]), 2), 1, 2)[1]
    assert np.isfinite(alone).all()


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [(InstructEncoder, {}), (InstructEncoder, {"separate": True}), (SharedEncoder, {"prompt": False})],
)
def test_without_anchors_training_is_that_of_the_other_encoder_bit_for_bit(make, make_data, tmp_path, kind, arguments):
    theirs = {key: value for key, value in arguments.items() if key != "prompt"}
    without = fit(make(kind, **theirs), make_data(), tmp_path)
    ours = fit(make(num_anchors=0, **arguments), make_data(), tmp_path)
    positioned = fit(make(num_anchors=4, **arguments), make_data(), tmp_path)
    assert torch.equal(weights(ours), weights(without))
    assert not torch.equal(weights(positioned), weights(without))
    texts = list(LINKS.corpus.values())
    for task in TASKS:
        assert torch.equal(ours.encoder.encode(texts, task), without.encoder.encode(texts, task))
    assert ours.encoder.num_shared_layers == without.encoder.num_shared_layers


def test_queries_and_papers_outside_the_graph_have_the_vectors_of_a_prefix_encoder(make, make_data, tmp_path):
    encoder = fit(make(num_anchors=4), make_data(), tmp_path).encoder
    plain = make(InstructEncoder)
    plain.load_state_dict({k: v for k, v in encoder.state_dict().items() if not k.startswith("features.")})
    papers, others = list(LINKS.corpus.values()), ["bara beli", Document("new", "bomu", "cara celi")]
    for task in TASKS:
        assert torch.equal(encoder.encode(others, task), plain.encode(others, task))
        assert not torch.isclose(encoder.encode(papers, task), plain.encode(papers, task)).all(1).any()


def test_positions_know_the_training_links_only(make, make_data):
    """A link that only the evaluation has moves no position, one of the training does."""

    def prepared(*extra):
        qrels = {"train": {"d0": {"d1": 1}, "d1": {"d2": 1}, "d3": {"d4": 1}}, "test": {"d5": {"d6": 1}}}
        for split, query, document in extra:
            qrels[split].setdefault(query, {})[document] = 1
        encoder = make(num_anchors=4)
        encoder.prepare(make_data(Collection(LINKS.corpus, LINKS.queries, qrels)))
        return encoder.features["positions"]

    plain, held_out, trained = prepared(), prepared(("test", "d0", "d4")), prepared(("train", "d0", "d4"))
    assert len(plain) == 5
    assert torch.equal(held_out.keys, plain.keys)
    assert torch.equal(held_out.vectors, plain.vectors)
    assert not torch.equal(trained.vectors, plain.vectors)


def test_checkpoint_contains_the_positions(make, make_data, tmp_path):
    """A run evaluates, exports and continues without its graph."""
    file = tmp_path / "graph.tsv"
    file.write_text("d0 d1\nd1\td2\n")
    encoder = fit(make(num_anchors=3, graph=str(file)), make_data(), tmp_path).encoder.eval()
    file.unlink()
    texts, expected = list(LINKS.corpus.values()), encoder.encode(list(LINKS.corpus.values()), "search")
    for loaded in (load_encoder(tmp_path / "last.ckpt"), load_encoder(encoder.save_pretrained(tmp_path / "model"))):
        assert len(loaded.features["positions"]) == 3
        assert torch.equal(loaded.encode(texts, "search"), expected)
    continued = make(num_anchors=3, graph=str(file), seed=5)
    continue_from(encoder, continued, "run")
    continued.prepare(make_data())  # keeps its positions, and so needs no file
    assert torch.equal(continued.encode(texts, "search"), expected)


def test_a_new_encoder_starts_from_a_trained_vanilla(make, make_data):
    vanilla, encoder = make(SharedEncoder, seed=7), make(prompt=False)
    encoder.prepare(make_data())
    continue_from(vanilla, encoder, "vanilla")
    texts = list(LINKS.corpus.values())
    assert len(encoder.features["positions"]) == 10
    assert torch.equal(encoder.encode(texts, "search"), vanilla.encode(texts, "search"))


def test_resumed_training_equals_an_undisturbed_one_bit_for_bit(make, make_data, tmp_path):
    whole = fit(make(num_anchors=4), make_data(), tmp_path / "whole")
    fit(make(num_anchors=4), make_data(), tmp_path / "part", steps=3)
    resumed = fit(make(num_anchors=4, seed=9), make_data(), tmp_path / "rest", resume=tmp_path / "part" / "last.ckpt")
    assert whole.encoder.features["positions"].projection.weight.any()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_transplant_measures_the_transfer_of_prompts(make, make_data, tmp_path):
    """The loss of a task with the instruction of another; papers keep their positions."""
    data, callback = make_data(), Diagnostics(every_n_steps=6)
    module = ContrastiveModule(make(num_anchors=4), similarity="cosine", temperature=0.1, total_steps=6)
    quiet_trainer(tmp_path, max_steps=6, callbacks=[callback]).fit(module, data)
    module.eval()
    for task, other in (("search", "link_prediction"), ("link_prediction", "search"), ("search", "search")):
        batch = callback.batches[task]
        swapped = make(num_anchors=4)
        swapped.instructions = INSTRUCTIONS | {task: INSTRUCTIONS[other]}
        swapped.prepare(data)
        swapped.load_state_dict(module.encoder.state_dict())
        with torch.no_grad():
            expected = float(module.objective(embed(swapped.eval(), batch).vectors, batch)["loss"])
        assert callback.values[f"{task}/transplant/{other}"] == pytest.approx(expected, rel=1e-5)
    assert callback.values["search/transplant/search"] != callback.values["search/transplant/link_prediction"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_anchors": -1}, "num_anchors: expected a number of at least 0, got -1"),
        ({"steps": 0}, "steps: expected a number of at least 1, got 0"),
        ({"separate": True, "prompt": False}, "separate: cannot be combined with prompt=false"),
        ({"link_task": "search"}, "link_task: .* expected one of link_prediction, got 'search'"),
        ({"graph": "missing.tsv"}, "graph: missing.tsv: cannot be opened"),
        (
            {"graph": "FILE"},
            "graph: .*, line 2: paper 'd99' is not in the corpus of task link_p",
        ),
    ],
)
def test_wrong_arguments_raise_user_error_before_training(make, make_data, tmp_path, arguments, message):
    (tmp_path / "graph.tsv").write_text("d0 d1\nd0 d99\n")
    if arguments.get("graph") == "FILE":
        arguments = {"graph": str(tmp_path / "graph.tsv")}
    with pytest.raises(UserError, match=message):
        fit(make(**arguments), make_data(), tmp_path)


def test_training_without_a_citation_graph_raises_user_error(make, make_task, tmp_path):
    with pytest.raises(UserError, match="expected a task of kind link_prediction in the training, got 0 such tasks"):
        fit(make(), make_task(SearchDataModule), tmp_path)


def communities(seed, num_papers=160):
    """Return papers that cite by topic, which their texts show, and by community, which only the graph shows.

    A fifth of them has no training link. Of the other links, 30 % are for the test.
    """
    rng = random.Random(seed)
    topics = [[WORDS[4 * (i // 4 % 5) + j] for j in range(4)] for i in range(num_papers)]
    papers = {}
    for i in range(num_papers):
        words = [word for _ in range(3) for word in (rng.choice(topics[i]), rng.choice(WORDS[20:]))]
        papers[f"p{i}"] = Document(f"p{i}", " ".join(words[:2]), " ".join(words[2:]))
    new = {i for i in range(num_papers) if rng.random() < 0.2}
    qrels = {"train": {}, "test": {}}
    for i in range(num_papers):
        for j in range(num_papers):
            same_community, same_topic = i % 4 == j % 4, topics[i] == topics[j]
            share = 0.35 if same_community and same_topic else 0.04 if same_community else 0.002
            if i != j and rng.random() < share:
                split = "test" if i in new or j in new or rng.random() < 0.3 else "train"
                qrels[split].setdefault(f"p{i}", {})[f"p{j}"] = 1
    return Collection(papers, papers, qrels), {f"p{i}" for i in new}


def shuffled(collection, seed, file):
    """Write the training links between other papers, and return the path of the file."""
    others = random.Random(seed).sample(list(collection.corpus), len(collection.corpus))
    other = dict(zip(collection.corpus, others, strict=True))
    pairs = [(other[a], other[b]) for a, linked in collection.qrels["train"].items() for b in linked]
    file.write_text("".join(f"{a}\t{b}\n" for a, b in pairs))
    return str(file)


def ndcg(vectors, collection):
    """Return query -> nDCG@10 of its test links, without its training links; and the mean cosine of two papers."""
    ids = np.array(list(collection.corpus))
    cosines = (normalize(vectors, dim=1) @ normalize(vectors, dim=1).T).numpy()
    values = {}
    for row, query in enumerate(ids):
        relevant = collection.qrels["test"].get(query, {})
        known = {query, *collection.qrels["train"].get(query, {})}
        ranking = [id for id in ids[np.argsort(-cosines[row], kind="stable")] if id not in known][:10]
        if relevant:
            gain = sum(1 / np.log2(rank + 2) for rank, id in enumerate(ranking) if id in relevant)
            values[query] = 100 * gain / sum(1 / np.log2(rank + 2) for rank in range(min(10, len(relevant))))
    return values, (cosines.sum() - len(ids)) / (len(ids) * (len(ids) - 1))


def trained_arm(make_backbone, collection, seed, folder, num_anchors=16, graph=""):
    """Train on the links, and return the scores and the mean cosine of two papers."""
    data = LinkPredictionDataModule(
        Task("links"), {"toy": collection}, batch_size=16, num_hard_negatives=0, max_length=32
    )
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    backbone, tokenizer = make_backbone(seed, num_layers=1, **dropout)
    arguments = {"num_anchors": num_anchors, "graph": graph, "max_length": 32}
    encoder = DualPromptEncoder(backbone, tokenizer, {"links": "links"}, {"links": "title query"}, **arguments)
    optim = OptimOptions(lr=3e-3)
    module = ContrastiveModule(encoder, similarity="cosine", temperature=0.1, total_steps=100, optim=optim)
    quiet_trainer(folder, max_steps=100).fit(module, data)
    return ndcg(encoder.encode(list(collection.corpus.values()), "links"), collection)


def interval(differences):
    """Return the 99 % interval of a mean."""
    mean, error = np.mean(differences), np.std(differences, ddof=1) / len(differences) ** 0.5
    return mean - 2.58 * error, mean + 2.58 * error


@pytest.mark.slow
def test_positions_find_links_within_communities_that_texts_do_not_show(make_backbone, tmp_path):
    """Papers with a position gain, those without keep their score, and positions of a shuffled graph gain nothing."""
    differences = {"positions": [], "null": [], "shuffled": []}
    for seed in range(3):
        collection, new = communities(seed)
        arm = partial(trained_arm, make_backbone, collection, seed, tmp_path)
        (without, cosine), (ours, our_cosine) = arm(num_anchors=0), arm()
        others, _ = arm(graph=shuffled(collection, seed, tmp_path / "graph.tsv"))
        for query in without:
            kind = "null" if query in new else "positions"
            differences[kind].append(ours[query] - without[query])
            if query not in new:
                differences["shuffled"].append(others[query] - without[query])
        print(f"seed {seed}: mean cosine {cosine:.2f} without and {our_cosine:.2f} with positions")
        assert our_cosine < cosine + 0.1, "the vectors collapse"
    intervals = {name: interval(values) for name, values in differences.items()}
    print({name: (np.mean(values).round(1), *np.round(intervals[name], 1)) for name, values in differences.items()})
    assert intervals["positions"][0] > 3
    assert intervals["null"][0] < 0 < intervals["null"][1]
    assert intervals["shuffled"][0] < 0


def test_positions_have_a_learning_rate_of_their_own(make):
    encoder = make(num_anchors=3)
    groups = parameter_groups(encoder, OptimOptions(lr=2.0, lr_scale={"features": 10.0}), encoder.num_layers)
    lr = {id(p): group["lr"] for group in groups for p in group["params"]}
    by_name = {name: lr[id(p)] for name, p in encoder.named_parameters()}
    own = {name for name, value in by_name.items() if value == 20}
    assert own == {f"features.positions.projection.{name}" for name in ("weight", "bias")}
