"""Training examples as arrays, from a collection in memory and from a stored one."""

import numpy as np
import pytest

from datamodules.conversion import stored
from datamodules.examples import ExampleTable, in_memory
from datamodules.readers.beir import BeirReader, write_beir
from datamodules.records import Collection, Document, UserError


def test_examples_keep_the_order_of_queries_and_need_a_positive():
    judgements = np.array([[2, 5, 1], [0, 1, 0], [2, 6, 0], [1, 3, 2], [0, 4, 0], [1, 2, 1], [2, 7, 3]]).T
    rows, own = np.array([10, 11, 12]), np.array([-1, 4, -1])
    table = ExampleTable.from_judgements(*judgements, rows, own)
    assert [example.query for example in table] == [12, 11]
    first, second = table
    assert (first.positives, first.grades, first.hard_negatives, first.not_negatives) == ((5, 7), (1, 3), (6,), (5, 7))
    assert (second.positives, second.grades, second.not_negatives) == ((3, 2), (2, 1), (3, 2, 4))
    moved = table.example(1, offset=100)
    assert (moved.query, moved.positives, moved.not_negatives) == (111, (103, 102), (103, 102, 104))
    assert table[-1] == second
    assert table[:1] == [first]


@pytest.mark.parametrize("grade", [float("nan"), float("inf"), 2**32, -(2**31), 0.5])
def test_grade_other_than_a_whole_number_of_32_bits_raises_user_error(grade):
    """A grade of 2**32 became 0, so the positive was a hard negative."""
    texts = {"a": Document("a", "", "one"), "b": Document("b", "", "two")}
    collection = Collection(texts, {"q": Document("q", "", "asks")}, {"train": {"q": {"a": grade, "b": 1}}})
    with pytest.raises(UserError, match=f"split train: query 'q' and document 'a': grades must be .*, got {grade}"):
        in_memory(collection, False)


@pytest.mark.parametrize("split", ["train", "dev"])
@pytest.mark.parametrize("grades", [{"a": 1}, {}])
def test_judged_query_outside_the_collection_raises_user_error(split, grades):
    """Only the train split was checked; the evaluation of another split raised KeyError."""
    texts = {"a": Document("a", "", "one")}
    collection = Collection(texts, {"q": Document("q", "", "asks")}, {split: {"q": {"a": 1}, "q9": grades}})
    with pytest.raises(UserError, match=f"split {split}: the judgements contain query 'q9', which is not in the coll"):
        collection.judged(split)


@pytest.mark.parametrize("queries_are_documents", [False, True])
def test_documents_of_equal_text_count_as_one_in_training(tmp_path, queries_are_documents):
    texts = {"a": "one", "b": "two", "c": "one", "d": "three", "e": "two"}
    corpus = {id: Document(id, "", text) for id, text in texts.items()}
    queries = {"q": Document("q", "", "asks"), "e": corpus["e"]}
    qrels = {"train": {"q": {"c": 1, "a": 0, "d": 0, "e": 2, "b": 1}, "e": {"d": 1, "c": 0}}}
    collection = Collection(corpus, queries, qrels)
    write_beir(collection, tmp_path / "data")
    converted = stored(BeirReader(str(tmp_path / "data")), tmp_path / "cache")
    for _, examples in (in_memory(collection, queries_are_documents), converted.table(queries_are_documents)):
        q, e = examples
        assert dict(zip(q.positives, q.grades, strict=True)) == {0: 1, 1: 2}
        assert (q.hard_negatives, set(q.not_negatives)) == ((3,), {0, 1})
        assert (e.positives, e.hard_negatives) == ((3,), (0,))
        assert (e.query, set(e.not_negatives)) == ((1, {1, 3}) if queries_are_documents else (6, {3}))
    assert converted.judged("train")[1] == qrels["train"]  # evaluation uses ids


def test_queries_of_equal_text_count_as_one_in_training(tmp_path):
    """So that a positive of one is not a negative of the other, neither by chance, nor mined, nor judged."""
    corpus = {id: Document(id, "", f"text {id}") for id in "abcd"}
    queries = {id: Document(id, "", text) for id, text in {"p": "asks", "q": "other", "r": "asks", "s": "asks"}.items()}
    qrels = {"train": {"p": {"a": 0, "b": 1}, "q": {"d": 1}, "r": {"a": 2, "c": 0}}, "dev": {"s": {"d": 1}}}
    collection = Collection(corpus, queries, qrels)
    write_beir(collection, tmp_path / "data")
    converted = stored(BeirReader(str(tmp_path / "data")), tmp_path / "cache")
    for _, examples in (in_memory(collection, False), converted.table(False)):
        asks, other = examples
        assert dict(zip(asks.positives, asks.grades, strict=True)) == {0: 2, 1: 1}
        assert (asks.query, asks.hard_negatives) == (4, (2,))
        assert (other.query, other.positives) == (5, (3,))
    assert converted.judged("train")[1] == qrels["train"]  # evaluation uses ids


@pytest.mark.parametrize("queries_are_documents", [False, True])
def test_judgements_of_a_paper_with_itself_are_ignored(tmp_path, queries_are_documents, caplog):
    """It applies where queries are documents: paper a cites itself, and b cites its own preprint c."""
    texts = {"a": "one", "b": "two", "c": "two", "d": "three"}
    corpus = {id: Document(id, "", text) for id, text in texts.items()}
    queries = {id: corpus[id] for id in "abd"}
    qrels = {"train": {"a": {"a": 1, "d": 1}, "b": {"c": 1}, "d": {"a": 1, "d": 0}}}
    collection = Collection(corpus, queries, qrels)
    write_beir(collection, tmp_path / "data")
    converted = stored(BeirReader(str(tmp_path / "data")), tmp_path / "cache")
    for _, examples in (in_memory(collection, queries_are_documents), converted.table(queries_are_documents)):
        pairs = [(example.positives, example.hard_negatives) for example in examples]
        if queries_are_documents:
            assert pairs == [((3,), ()), ((0,), ())]
            assert [example.query for example in examples] == [0, 3]
        else:
            assert pairs == [((0, 3), ()), ((1,), ()), ((0,), (3,))]
    assert caplog.text.count("ignored 3 of 5 judgements, which relate a paper to itself") == (
        2 if queries_are_documents else 0
    )


def test_large_grades_are_kept(tmp_path):
    corpus = {id: Document(id, "", f"text of {id}") for id in "ab"}
    qrels = {"train": {"q": {"a": 65536, "b": 10**9}}}
    collection = Collection(corpus, {"q": Document("q", "", "asks")}, qrels)
    write_beir(collection, tmp_path / "data")
    converted = stored(BeirReader(str(tmp_path / "data")), tmp_path / "cache")
    for _, (example,) in (in_memory(collection, False), converted.table(False)):
        assert (example.positives, example.grades, example.hard_negatives) == ((0, 1), (65536, 10**9), ())
