"""Papers of two tasks are matched by title, text or id, and their annotations are those of the train splits."""

import numpy as np
import pytest

from datamodules.co_annotation import MATCHES, known_annotations, paper_keys, train_positives
from datamodules.ragged import Ragged
from datamodules.records import Collection, Document, UserError
from datamodules.tasks import ClassificationDataModule, LinkPredictionDataModule, SearchDataModule

LABELS = {f"l{i}": Document(f"l{i}", f"label number {i}", "about it") for i in range(4)}


def title(number):
    return f"A study of subject number {number}"


def labelled(papers, train, test=None):
    qrels = {"train": {p: dict.fromkeys(labels, 1) for p, labels in train.items()}}
    if test:
        qrels["test"] = {p: dict.fromkeys(labels, 1) for p, labels in test.items()}
    return Collection(LABELS, papers, qrels)


@pytest.fixture
def classification():
    """Papers x0 to x4. Of these, x4 is annotated in the test split only, and x3 has a hard negative."""
    papers = {f"x{i}": Document(f"x{i}", title(i), f"text {i}") for i in range(5)}
    collection = labelled(papers, {"x0": ["l0", "l2"], "x1": ["l1"], "x3": ["l3"]}, {"x4": ["l0"]})
    collection.qrels["train"]["x3"]["l1"] = 0
    task = ClassificationDataModule("labels", collection)
    task.setup()
    return task


@pytest.fixture
def links():
    """Papers with the titles of x0 (other case and punctuation), x1, x2 and x4, and one with the id x3."""
    papers = {
        "y0": Document("y0", "a STUDY of Subject: number 0", "other text"),
        "y1": Document("y1", title(1), "text 1"),
        "y2": Document("y2", title(2), "text 2"),
        "x3": Document("x3", "Something entirely different here", "words"),
        "y4": Document("y4", title(4), "text 4"),
    }
    task = LinkPredictionDataModule("links", Collection(papers, {"y0": papers["y0"]}, {"train": {"y0": {"y1": 1}}}))
    task.setup()
    return task


def names(lists, papers, task):
    return {
        papers.documents[row].id: [task.documents[label].id for label in values]
        for row, values in enumerate(as_lists(lists))
        if len(values)
    }


def as_lists(lists):
    return [lists.values[a:b].tolist() for a, b in zip(lists.starts, lists.starts[1:], strict=False)]


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ("title", {"y0": ["l0", "l2"], "y1": ["l1"]}),
        ("text", {"y1": ["l1"]}),
        ("id", {"x3": ["l3"]}),
    ],
)
def test_annotations_are_train_positives_of_the_same_paper(links, classification, match, expected):
    assert names(known_annotations(links, classification, match), links, classification) == expected


def test_annotations_of_a_task_by_another_task_are_those_of_its_own_examples(classification):
    queries, positives = train_positives(classification)
    annotations = known_annotations(classification, classification)
    assert as_lists(annotations.take(queries)) == as_lists(positives)


def test_links_annotate_papers_of_a_classification(links, classification):
    assert names(known_annotations(classification, links), classification, links) == {"x0": ["y1"]}


def test_search_annotates_papers_with_the_queries_that_they_answer(links):
    corpus = {f"s{i}": Document(f"s{i}", title(i)) for i in range(3)}
    queries = {name: Document(name, "", name) for name in ("first", "second")}
    judged = {"first": {"s0": 1, "s1": 2, "s2": 0}, "second": {"s1": 1}}
    search = SearchDataModule("search", Collection(corpus, queries, {"train": judged}))
    search.setup()
    expected = {"y0": ["first"], "y1": ["first", "second"]}
    assert names(known_annotations(links, search), links, search) == expected


def test_papers_without_a_common_paper_have_no_annotations(classification):
    papers = {"z": Document("z", "Nothing that others have", "either")}
    other = ClassificationDataModule("other", labelled(papers, {"z": ["l0"]}))
    other.setup()
    assert as_lists(known_annotations(other, classification)) == [[]] * len(other.documents)


def test_short_titles_need_equal_texts():
    papers = {"a": Document("a", "Introduction", "one text"), "b": Document("b", "Introduction", "another text")}
    copy = {"c": Document("c", "introduction!", "One text.")}
    first = ClassificationDataModule("first", labelled(papers, {"a": ["l0"], "b": ["l1"]}))
    second = ClassificationDataModule("second", labelled(copy, {"c": ["l2"]}))
    for task in (first, second):
        task.setup()
    assert names(known_annotations(second, first), second, first) == {"c": ["l0"]}


@pytest.mark.parametrize("match", MATCHES)
def test_labels_queries_of_search_and_blank_texts_match_nothing(classification, match):
    queries = {"x0": Document("x0", "", title(0))}
    corpus = {"x1": Document("x1", title(1), "text 1"), "x2": Document("x2")}
    search = SearchDataModule("search", Collection(corpus, queries, {"train": {"x0": {"x1": 1}}}))
    search.setup()
    keys = paper_keys(search, match)
    assert (keys != 0).tolist() == [True, match == "id", False]
    assert not paper_keys(classification, match)[: len(LABELS)].any()


def test_annotations_of_several_collections_are_joined(classification, links):
    more = labelled({"m": Document("m", title(1), "again")}, {"m": ["l3", "l1"]})
    task = ClassificationDataModule("labels", {"first": classification.collections["labels"], "second": more})
    task.setup()
    annotations = names(known_annotations(links, task), links, task)
    assert annotations == {"y0": ["l0", "l2"], "y1": ["l1", "l1", "l3"]}, "each collection has its own label l1"
    assert len(train_positives(task, "second")[0]) == 1


def test_unknown_way_to_match_raises_user_error(classification):
    with pytest.raises(UserError, match="match: expected one of title, text, id, got 'name'"):
        paper_keys(classification, "name")


def test_taken_lists_are_in_the_order_of_the_indices():
    lists = Ragged(np.array([0, 2, 2, 5]), np.array([4, 5, 6, 7, 8]))
    assert as_lists(lists.take(np.array([2, -1, 0, 1, 2]))) == [[6, 7, 8], [], [4, 5], [], [6, 7, 8]]
