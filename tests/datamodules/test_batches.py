"""Collation, the resumable loader, and several tasks together."""

import dataclasses
import itertools
import math
import os
import random
import time

import numpy as np
import pytest
import torch

from datamodules.batches import BatchOptions, MultiTaskDataModule, sampled_by_grade
from datamodules.buffers import pack
from datamodules.loader import ResumableLoader
from datamodules.records import Collection, Document, Task, UserError
from datamodules.schedule import mix
from datamodules.tasks import KINDS, ClassificationDataModule, LinkPredictionDataModule, SearchDataModule
from datamodules.text import input_text
from tests.conftest import text_of, toy_collection, trainer_on
from tests.lightning_modules.quiet_trainer import quiet_trainer


def batches(data, steps=3):
    loader = data.train_dataloader()
    return [loader.batches[step] for step in range(steps)]


def texts_of(batch, tokenizer):
    """Decode the U texts of a batch."""
    rows = [ids for chunk in batch.chunks for ids in chunk.input_ids.split(chunk.lengths)]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in rows]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_positives_of_a_batch_are_relevant_to_their_queries(kind, make_task):
    papers = kind is LinkPredictionDataModule
    collection = toy_collection(10, 10, papers=papers)
    data = make_task(kind, collection=collection)
    for batch in batches(data, 6):
        texts = texts_of(batch, data.tokenizer)
        for b in range(4):
            query = texts[batch.queries[b]]
            positive = texts[batch.documents[batch.positives[b]]]
            (query_id,) = [q for q, d in collection.queries.items() if input_text(d, " ").split() == query.split()]
            grades = collection.qrels["train"][query_id]
            wanted = [input_text(collection.corpus[d], " ").split() for d, grade in grades.items() if grade > 0]
            assert positive.split() in wanted


def test_batch_has_each_distinct_text_once(make_task):
    data = make_task(LinkPredictionDataModule, collection=toy_collection(10, 10, papers=True), batch_size=8)
    for batch in batches(data):
        texts = texts_of(batch, data.tokenizer)
        assert len(texts) == len(set(texts)) <= 10
        assert len(set(batch.document_ids.tolist())) == len(batch.document_ids)


def test_hard_negatives_are_documents_of_the_batch(make_task):
    with_them = make_task(SearchDataModule, num_hard_negatives=1, batch_size=1)
    without = make_task(SearchDataModule, num_hard_negatives=0, batch_size=1)
    assert {len(batch.documents) for batch in batches(with_them, 8)} == {2}
    assert {len(batch.documents) for batch in batches(without, 8)} == {1}


def test_known_positives_include_the_paper_itself(make_task):
    data = make_task(LinkPredictionDataModule, collection=toy_collection(6, 10, papers=True), batch_size=6)
    rows = {document: row for row, document in enumerate(data.collections["toy"].corpus)}
    (batch,) = batches(data, 1)
    draws = data.schedule().draws(0)
    for b, (index, _) in enumerate(draws):
        query = data.documents[data.examples[index].query].id
        relevant = {d for d, grade in data.collections["toy"].qrels["train"][query].items() if grade > 0}
        assert set(batch.known_positives[b].tolist()) - {-1} == {rows[d] for d in relevant | {query}}


def test_positives_are_sampled_in_proportion_to_grade(make_task):
    collection = Collection(
        {"a": Document("a", "", "bara"), "b": Document("b", "", "beli")},
        {"q": Document("q", "", "bomu")},
        {"train": {"q": {"a": 1, "b": 9}}},
    )
    data = make_task(SearchDataModule, collection=collection, batch_size=200, num_batches=2)
    (batch,) = batches(data, 1)
    share = (batch.document_ids[batch.positives] == 1).float().mean()
    assert 0.8 < share < 0.97


def test_first_positive_does_not_depend_on_num_positives(make_task):
    """With several positives, the first one and the hard negatives are those sampled for one positive."""
    data = make_task(SearchDataModule, collection=many_positives(), num_hard_negatives=2)
    collator = data.train_dataloader().batches.collators["search"]
    for epoch in range(20):
        batch = collator([(0, epoch)], step=0)
        example, rng = data.examples[0], random.Random(mix(0, "draw", "search", 0, epoch))
        (positive,) = rng.choices(example.positives, weights=example.grades)
        assert batch.document_ids[batch.positives].tolist() == [[positive]]
        assert batch.document_ids[batch.hard_negatives].tolist() == [rng.sample(example.hard_negatives, 2)]
        assert sampled_by_grade(example, 3, random.Random(epoch))[:1] == random.Random(epoch).choices(
            example.positives, weights=example.grades
        )


def many_positives():
    corpus = {f"d{i}": Document(f"d{i}", "", text_of(i)) for i in range(12)}
    queries = {name: Document(name, "", text_of(i + 30)) for i, name in enumerate("ab")}
    a = {f"d{i}": grade for i, grade in enumerate((1, 2, 9, 1, 0, 0, 0))}
    return Collection(corpus, queries, {"train": {"a": a, "b": {"d7": 1, "d8": 0}}})


def test_several_positives_are_sampled_by_grade_without_replacement(make_task):
    data = make_task(SearchDataModule, collection=many_positives(), num_positives=3, num_hard_negatives=2)
    collator = data.train_dataloader().batches.collators["search"]
    firsts, left_out = [], []
    for epoch in range(300):
        batch = collator([(0, epoch), (1, epoch)], step=0)
        again = collator([(0, epoch), (1, epoch)], step=7)
        assert torch.equal(batch.positives, again.positives)
        drawn = batch.document_ids[batch.positives[0]].tolist()
        assert len(set(drawn)) == 3
        assert set(drawn) < {0, 1, 2, 3}
        assert batch.positives[1, 1:].tolist() == [-1, -1]
        assert batch.document_ids[batch.positives[1, 0]] == 7
        assert batch.hard_negatives[1, 1] == -1
        assert batch.document_ids[batch.hard_negatives[1, 0]] == 8
        assert {4, 5, 6} > set(batch.document_ids[batch.hard_negatives[0]].tolist())
        firsts.append(drawn[0])
        left_out += {0, 1, 2, 3} - set(drawn)
    assert firsts.count(2) / 300 == pytest.approx(9 / 13, abs=0.08)
    # Grades 1, 2, 9, 1, without replacement: the probability that a document is the one left out.
    grades = {0: 1, 1: 2, 2: 9, 3: 1}
    for row in grades:
        others = [r for r in grades if r != row]
        chance = sum(order_chance(order, grades) for order in itertools.permutations(others))
        assert left_out.count(row) / 300 == pytest.approx(chance, abs=0.08)


def order_chance(order, grades):
    left, chance = sum(grades.values()), 1.0
    for row in order:
        chance *= grades[row] / left
        left -= grades[row]
    return chance


def test_batches_contain_their_texts_only_with_carry_texts(make_task):
    data = make_task(SearchDataModule, carry_texts=True, token_budget=32)
    for batch in batches(data):
        read = texts_of(batch, data.tokenizer)
        assert [input_text(d, " ").split() for d in batch.texts] == [text.split() for text in read]
    assert batches(make_task(SearchDataModule))[0].texts == ()


def test_texts_with_equal_tokens_have_equal_keys(make_task):
    """The texts differ only in case and id."""
    collection = toy_collection()
    shouted = {f"x{i}": Document(f"x{i}", d.title.upper(), d.text) for i, d in enumerate(collection.corpus.values())}
    judged = {q: dict(own) | {f"x{i % 10}": 1} for i, (q, own) in enumerate(collection.qrels["train"].items())}
    corpus = dict(collection.corpus) | shouted
    data = make_task(
        SearchDataModule,
        collection=Collection(corpus, collection.queries, {"train": judged}),
        batch_size=12,
        num_positives=3,
        carry_texts=True,
    )
    batch = data.train_dataloader().batches[0]
    texts, keys = [(d.title.lower(), d.text) for d in batch.texts], batch.text_keys.tolist()
    assert 12 < len(set(texts)) < len(texts)
    assert len(set(keys)) == len(set(texts)) == len(set(zip(texts, keys, strict=True)))
    assert torch.equal(batch.to("cpu").text_keys, batch.text_keys)


def test_batches_are_reproducible(make_task):
    one, other = batches(make_task(SearchDataModule), 5), batches(make_task(SearchDataModule), 5)
    assert [b.fingerprint for b in one] == [b.fingerprint for b in other]
    assert len({b.fingerprint for b in one}) == 5
    assert [b.seed for b in one] == [b.seed for b in other]
    assert torch.equal(one[3].chunks[0].input_ids, other[3].chunks[0].input_ids)


def test_tasks_take_turns_and_need_different_collection_names(make_task):
    tasks = [
        make_task(ClassificationDataModule, "classification"),
        make_task(LinkPredictionDataModule, "link_prediction", toy_collection(6, 10, papers=True)),
        make_task(SearchDataModule, "search"),
    ]
    with pytest.raises(UserError, match="two tasks have a collection named toy"):
        MultiTaskDataModule(tasks).setup()
    for task in tasks:
        task.readers = {task.task.name: task.readers["toy"]}
    data = MultiTaskDataModule(tasks, BatchOptions(batch_size=4, num_batches=6, max_length=32), tasks[0].tokenizer)
    data.setup()
    assert [b.task for b in data.train_dataloader()] == ["classification", "link_prediction", "search"] * 2
    assert len(data.benchmarks("dev")) == 3


def test_no_tasks_or_duplicate_tasks_raise_user_error(make_task):
    with pytest.raises(UserError, match="expected at least one task"):
        MultiTaskDataModule([])
    with pytest.raises(UserError, match="expected different names, got search, search"):
        MultiTaskDataModule([make_task(SearchDataModule), make_task(SearchDataModule)])


def test_cost_of_an_example_counts_query_positives_and_hard_negatives(make_task):
    data = make_task(SearchDataModule, batch_tokens=60, num_hard_negatives=1, num_batches=6)
    length = {row: len(data.tokenizer(text_of_row(data, row))["input_ids"]) for row in range(len(data.documents))}
    costs = data.schedule().costs["search"]
    for example, cost in zip(data.examples, costs, strict=True):
        positives, (negative,) = [length[row] for row in example.positives], example.hard_negatives
        assert cost == math.ceil(length[example.query] + sum(positives) / len(positives) + length[negative])
    sizes = [len(batch.queries) for batch in data.train_dataloader()]
    assert len(set(sizes)) > 1
    assert sum(sizes) == pytest.approx(6 * 60 / costs.mean(), abs=2)


def text_of_row(data, row):
    document = data.documents[row]
    return f"{document.title} {data.tokenizer.sep_token} {document.text}" if document.title else document.text


@pytest.fixture
def make_two_collections(make_backbone):
    """Make the data of a task with two collections, of 12 and 5 examples."""

    def make(**options):
        readers = {"one": toy_collection(), "two": toy_collection(num_queries=5)}
        settings = BatchOptions(batch_size=3, num_batches=12, max_length=32, **options)
        data = SearchDataModule(Task("search", "search"), readers, settings, make_backbone()[1])
        data.setup()
        return data

    return make


def test_documents_of_a_batch_are_from_one_collection(make_two_collections):
    data = make_two_collections()
    assert data.examples_by_collection() == {"one": 12, "two": 5}
    boundary = len(toy_collection().corpus) + len(toy_collection().queries)
    sides = [set((batch.document_ids < boundary).tolist()) for batch in data.train_dataloader()]
    assert all(len(side) == 1 for side in sides)
    assert {True} in sides
    assert {False} in sides


def test_batches_mix_collections_in_shares_that_follow_the_temperature(make_two_collections):
    """With a high temperature, both collections have the same share of the queries."""
    data = make_two_collections(mixed_batches=True, collection_temperature=1e6)
    schedule = data.schedule()
    from_two = [draw.example >= 12 for step in range(400) for draw in schedule.draws(step)]
    assert np.mean(from_two) == pytest.approx(0.5, abs=0.05)
    boundary = len(toy_collection().corpus) + len(toy_collection().queries)
    mixed = [len(set((batch.document_ids < boundary).tolist())) == 2 for batch in data.train_dataloader()]
    assert np.mean(mixed) > 0.5


@pytest.mark.parametrize("options", [{"mixed_batches": True}, {"collection_temperature": 2.0}])
def test_state_of_other_shares_of_collections_raises_user_error(make_two_collections, options):
    state = make_two_collections().train_dataloader().state_dict()
    make_two_collections().train_dataloader().load_state_dict(state)
    with pytest.raises(UserError, match="schedule differs from the checkpoint's .collections: "):
        make_two_collections(**options).train_dataloader().load_state_dict(state)
    state = make_two_collections(**options).train_dataloader().state_dict()
    with pytest.raises(UserError, match="schedule differs from the checkpoint's .collections: "):
        make_two_collections().train_dataloader().load_state_dict(state)


def fingerprints(batches):
    return [batch.fingerprint for batch in batches]


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_loader_resumes_at_the_exact_batch(make_task, num_workers):
    def loader():
        return make_task(SearchDataModule, num_batches=10, num_workers=num_workers).train_dataloader()

    whole = fingerprints(loader())
    assert len(whole) == 10
    first = loader()
    seen = []
    for batch in first:
        seen.append(batch.fingerprint)
        if len(seen) == 4:
            state = first.state_dict()  # workers have already prepared further batches
            break
    second = loader()
    second.load_state_dict(state)
    assert seen + fingerprints(second) == whole


@pytest.mark.slow
def test_workers_do_not_change_the_batches(make_task):
    alone, prepared = (
        list(make_task(SearchDataModule, num_batches=6, num_workers=workers).train_dataloader()) for workers in (0, 2)
    )
    for ours, theirs in zip(alone, prepared, strict=True):
        assert ours.fingerprint == theirs.fingerprint
        buffers = [pack(dataclasses.replace(batch))[0] for batch in (ours, theirs)]
        assert torch.equal(*buffers)


class SlowBatches(torch.utils.data.Dataset):
    """Batches whose weight is the time at which their preparation starts."""

    def __init__(self, batch):
        self.batch = batch

    def __getitem__(self, step):
        started = time.monotonic()
        time.sleep(0.05)
        return dataclasses.replace(self.batch, step=step, weight=started)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_workers_prepare_batches_during_the_steps(make_task, workers):
    """The times of events are compared, because durations depend on the load of the machine."""
    batch, started, ended = make_task(SearchDataModule).train_dataloader().batches[0], [], []
    for prepared in ResumableLoader(SlowBatches(batch), 20, {}, num_workers=workers):
        time.sleep(0.05)  # the step
        started.append(prepared.weight)
        ended.append(time.monotonic())
    early = [start < end for start, end in zip(started[1:], ended, strict=False)]  # before the last step ended
    assert sum(early) > 10 if workers else not any(early)


@pytest.mark.parametrize(
    ("device", "ranks", "cores", "workers"),
    [("cuda", 1, 16, 4), ("cuda", 8, 24, 2), ("cuda", 1, 1, 0), ("cpu", 1, 16, 0)],
)
def test_workers_and_pinned_memory_are_for_gpus(make_task, monkeypatch, caplog, device, ranks, cores, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    task = make_task(SearchDataModule)
    task.trainer = trainer_on(device, world_size=ranks)
    with caplog.at_level("INFO"):
        loader = task.train_dataloader()
    assert (loader.num_workers, loader.pin_memory) == (workers, device == "cuda")
    assert ("worker processes" in caplog.text) == (workers > 0)
    task.options = task.options.override(num_workers=3)
    assert task.train_dataloader().num_workers == 3


def test_loader_state_is_a_position_and_a_signature(make_task):
    state = make_task(SearchDataModule).train_dataloader().state_dict()
    assert state["position"] == 0
    assert set(state["signature"]) == {"seed", "batch_size", "schedule", "examples", "data"}


def test_state_with_another_batch_size_raises_user_error(make_task):
    state = make_task(SearchDataModule, batch_size=4).train_dataloader().state_dict()
    with pytest.raises(UserError, match="batch_size: {'search': 4} then, {'search': 2} now"):
        make_task(SearchDataModule, batch_size=2).train_dataloader().load_state_dict(state)


def test_state_of_changed_data_raises_user_error(make_task):
    state = make_task(SearchDataModule).train_dataloader().state_dict()
    collection = toy_collection()
    corpus = dict(collection.corpus) | {"d0": Document("d0", "another", "text")}
    changed = make_task(SearchDataModule, collection=Collection(corpus, collection.queries, collection.qrels))
    with pytest.raises(UserError, match="the schedule differs from the checkpoint's .data: "):
        changed.train_dataloader().load_state_dict(state)


def test_state_with_another_set_of_removed_documents_raises_user_error(make_task):
    """A state was accepted if only the checkpoint's training had removed evaluation texts from its examples."""
    stripped = make_task(SearchDataModule)
    with_several = next(example for example in stripped.examples if len(example.positives) > 1)
    stripped.strip(np.zeros(0, dtype=np.int64), np.array(with_several.positives[:1]))
    state = stripped.train_dataloader().state_dict()
    whole = make_task(SearchDataModule)
    assert len(whole.examples) == len(stripped.examples)
    with pytest.raises(UserError, match="examples that are left: .* then, None now"):
        whole.train_dataloader().load_state_dict(state)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"max_steps": 5}, "num_batches: expected at least 10, as many as the trainer needs for max_steps=5, got 8"),
        ({"max_epochs": 2}, "max_epochs: expected 1, because the batches of a training are one epoch, got 2; set max_"),
        ({}, "max_epochs: expected 1, because the batches of a training are one epoch, got None"),
    ],
)
def test_trainer_that_runs_out_of_batches_raises_user_error(make_task, tmp_path, trainer, message):
    """With too few batches for max_steps, empty epochs followed each other forever."""
    data = make_task(SearchDataModule)
    data.trainer = quiet_trainer(tmp_path, **{"accumulate_grad_batches": 2, **trainer})
    with pytest.raises(UserError, match=message):
        data.train_dataloader()


def test_loader_length_is_the_number_of_batches(make_task):
    assert len(make_task(SearchDataModule, num_batches=8).train_dataloader()) == 8


def test_another_number_of_ranks_resumes_with_the_same_global_batches(make_task):
    def loaders(world_size):
        rank_loaders = []
        for rank in range(world_size):
            task = make_task(SearchDataModule, batch_size=8 // world_size, num_batches=9)
            task.trainer = trainer_on(global_rank=rank, world_size=world_size)
            rank_loaders.append(task.train_dataloader())
        return rank_loaders

    def queries(batches):
        """Return the texts of the queries of one step, over all ranks in order."""
        rows = []
        for batch in batches:
            ids = [text.tolist() for chunk in batch.chunks for text in chunk.input_ids.split(chunk.lengths)]
            rows += [tuple(ids[i]) for i in batch.queries.tolist()]
        return rows

    whole = [queries(batches) for batches in zip(*loaders(2), strict=True)]
    first = loaders(2)
    for _, batches in zip(range(4), zip(*first, strict=True), strict=False):
        assert queries(batches)
    state = first[0].state_dict()
    for world_size in (1, 2, 4):
        rest = loaders(world_size)
        for loader in rest:
            loader.load_state_dict(state)
        assert [queries(batches) for batches in zip(*rest, strict=True)] == whole[state["position"] :]
