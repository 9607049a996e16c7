"""From collections to batches: rows, positives, masks, and the modules of the three kinds."""

import itertools
import math
import random

import pytest
import torch

from datamodules.batches import BatchOptions, MultiTaskDataModule, sampled_by_grade
from datamodules.records import Collection, Document, Task, UserError
from datamodules.schedule import mix
from datamodules.tasks import KINDS, ClassificationDataModule, LinkPredictionDataModule, SearchDataModule
from datamodules.text import input_text
from tests.conftest import InMemory, text_of, toy_collection


def batches(data, steps=3):
    loader = data.train_dataloader()
    return [loader.batches[step] for step in range(steps)]


def texts_of(batch, tokenizer):
    """The U texts of a batch, decoded."""
    rows = [ids for chunk in batch.chunks for ids in chunk.input_ids]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in rows]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_batches_say_who_is_positive_for_whom(kind, make_task):
    papers = kind is LinkPredictionDataModule
    collection = toy_collection(10, 10, papers=papers)
    data = make_task(kind, collection=collection)
    for batch in batches(data, 6):
        texts = texts_of(batch, data.tokenizer)
        for b in range(4):
            query = texts[batch.queries[b]]
            positive = texts[batch.documents[batch.positives[b]]]
            (query_id,) = [
                q
                for q, d in collection.queries.items()
                if input_text(d, " ").replace("  ", " ").split() == query.split()
            ]
            grades = collection.qrels["train"][query_id]
            wanted = [input_text(collection.corpus[d], " ").split() for d, grade in grades.items() if grade > 0]
            assert positive.split() in wanted


def test_each_distinct_text_stands_once(make_task):
    data = make_task(LinkPredictionDataModule, collection=toy_collection(10, 10, papers=True), batch_size=8)
    for batch in batches(data):
        texts = texts_of(batch, data.tokenizer)
        assert len(texts) == len(set(texts)) <= 10
        assert len(set(batch.document_ids.tolist())) == len(batch.document_ids)


def test_hard_negatives_are_among_the_documents(make_task):
    with_them = make_task(SearchDataModule, num_hard_negatives=1, batch_size=1)
    without = make_task(SearchDataModule, num_hard_negatives=0, batch_size=1)
    assert {len(batch.documents) for batch in batches(with_them, 8)} == {2}
    assert {len(batch.documents) for batch in batches(without, 8)} == {1}


def test_known_positives_are_all_positives_and_the_paper_itself(make_task):
    data = make_task(LinkPredictionDataModule, collection=toy_collection(6, 10, papers=True), batch_size=6)
    rows = {document: row for row, document in enumerate(data.collections["toy"].corpus)}
    (batch,) = batches(data, 1)
    draws = data.schedule().draws(0)
    for b, (index, _) in enumerate(draws):
        query = data.documents[data.examples[index].query].id
        relevant = {d for d, grade in data.collections["toy"].qrels["train"][query].items() if grade > 0}
        assert set(batch.known_positives[b].tolist()) - {-1} == {rows[d] for d in relevant | {query}}


def test_a_query_is_the_document_only_where_queries_are_documents(make_task):
    collection = toy_collection(6, 10, papers=True)
    links, searches = (make_task(k, collection=collection) for k in (LinkPredictionDataModule, SearchDataModule))
    assert [example.query for example in links.examples] == [0, 1, 2, 3, 4, 5]
    assert [example.query for example in searches.examples] == [10, 11, 12, 13, 14, 15]
    assert len(list(links.texts())) == 10
    assert len(list(searches.texts())) == 16


def test_positives_are_drawn_by_grade(make_task):
    collection = Collection(
        {"a": Document("a", "", "bara"), "b": Document("b", "", "beli")},
        {"q": Document("q", "", "bomu")},
        {"train": {"q": {"a": 1, "b": 9}}},
    )
    data = make_task(SearchDataModule, collection=collection, batch_size=200, num_batches=2)
    (batch,) = batches(data, 1)
    share = (batch.document_ids[batch.positives] == 1).float().mean()
    assert 0.8 < share < 0.97


def test_one_positive_is_drawn_as_ever(make_task):
    """However many are asked for, the first is the one that is drawn alone; so are a lone one's hard negatives."""
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


def test_several_positives_are_drawn_by_grade_and_none_twice(make_task):
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
    # Grades 1, 2, 9, 1, without replacement: the chance that a document is the one that is left.
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


def test_batches_carry_their_texts_where_they_are_asked_to(make_task):
    data = make_task(SearchDataModule, carry_texts=True, token_budget=32)
    for batch in batches(data):
        read = texts_of(batch, data.tokenizer)
        assert [input_text(d, " ").split() for d in batch.texts] == [text.split() for text in read]
    assert batches(make_task(SearchDataModule))[0].texts == ()


def test_texts_that_the_encoder_reads_alike_have_one_key(make_task):
    """Though they stand in another case, under another id."""
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


def test_batches_are_equal_when_made_again_and_carry_a_fingerprint(make_task):
    one, other = batches(make_task(SearchDataModule), 5), batches(make_task(SearchDataModule), 5)
    assert [b.fingerprint for b in one] == [b.fingerprint for b in other]
    assert len({b.fingerprint for b in one}) == 5
    assert [b.seed for b in one] == [b.seed for b in other]
    assert torch.equal(one[3].chunks[0].input_ids, other[3].chunks[0].input_ids)


def test_only_the_train_split_is_trained_on(make_task):
    collection = toy_collection()
    split = Collection(
        collection.corpus,
        collection.queries,
        {"train": {"q1": {"d1": 1}}, "test": {"q2": {"d2": 1}}},
    )
    data = make_task(SearchDataModule, collection=split)
    assert len(data.examples) == 1
    assert data.documents[data.examples[0].query].id == "q1"
    assert [list(b.queries) for b in data.benchmarks("test")] == [["q2"]]
    assert data.benchmarks("dev") == []


def test_papers_are_left_out_of_their_own_ranking_in_link_prediction_alone(make_task):
    for kind in KINDS.values():
        (benchmark,) = make_task(kind).benchmarks("test")
        assert benchmark.exclude_query == (kind is LinkPredictionDataModule)


def test_multitask_takes_turns_and_masks_do_not_mix(make_task):
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


def test_several_collections_of_one_task_share_no_identity(make_backbone):
    _, tokenizer = make_backbone()
    readers = {"one": InMemory(toy_collection()), "two": InMemory(toy_collection())}
    data = SearchDataModule(Task("search", "search"), readers, BatchOptions(batch_size=24, max_length=32), tokenizer)
    data.setup()
    assert len(data.examples) == 24
    first, second = data.examples[0], data.examples[12]
    assert not set(first.not_negatives) & set(second.not_negatives)
    assert [b.name for b in data.benchmarks("test")] == ["one", "two"]


def test_a_task_without_positives_is_refused(make_task):
    collection = toy_collection()
    nothing = {query: dict.fromkeys(grades, 0) for query, grades in collection.qrels["train"].items()}
    with pytest.raises(UserError, match="task search: no query of a train split has a positive, in toy .train."):
        make_task(SearchDataModule, collection=Collection(collection.corpus, collection.queries, {"train": nothing}))


def test_multitask_refuses_none_and_doubles(make_task):
    with pytest.raises(UserError, match="expected at least one task"):
        MultiTaskDataModule([])
    with pytest.raises(UserError, match="expected different names, got search, search"):
        MultiTaskDataModule([make_task(SearchDataModule), make_task(SearchDataModule)])


def test_batches_by_tokens_count_query_positive_and_hard_negatives(make_task):
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


def test_a_batch_has_documents_of_one_collection(make_backbone):
    readers = {"one": InMemory(toy_collection()), "two": InMemory(toy_collection(num_queries=5))}
    options = BatchOptions(batch_size=3, num_batches=12, max_length=32)
    data = SearchDataModule(Task("search", "search"), readers, options, make_backbone()[1])
    data.setup()
    assert data.examples_by_collection() == {"one": 12, "two": 5}
    boundary = len(toy_collection().corpus) + len(toy_collection().queries)
    sides = [set((batch.document_ids < boundary).tolist()) for batch in data.train_dataloader()]
    assert all(len(side) == 1 for side in sides)
    assert {True} in sides
    assert {False} in sides
