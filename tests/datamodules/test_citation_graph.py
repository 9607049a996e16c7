"""The citation graph of a task, against walks computed with matrices, and its protection against leaks."""

from dataclasses import replace

import numpy as np
import pytest

from datamodules.citation_graph import CitationGraph, graph_of
from datamodules.readers.beir import BeirReader, write_beir
from datamodules.records import Collection, Document, UserError
from datamodules.tasks import LinkPredictionDataModule, SearchDataModule

#  0 - 1 - 2 - 3     and 4, which has no links
#      |___|         (1 - 3 closes a triangle)
PAIRS = np.array([[0, 1], [1, 2], [3, 2], [3, 1], [1, 0], [2, 2]])


@pytest.fixture
def graph():
    return CitationGraph(PAIRS, 5)


@pytest.fixture
def transitions():
    return np.array(
        [
            [0, 1, 0, 0, 0],
            [1 / 3, 0, 1 / 3, 1 / 3, 0],
            [0, 1 / 2, 0, 1 / 2, 0],
            [0, 1 / 2, 1 / 2, 0, 0],
            [0, 0, 0, 0, 0],
        ]
    )


def test_links_are_undirected_and_counted_once(graph):
    assert graph.num_links == 4
    assert [graph.neighbours_of(row).tolist() for row in range(5)] == [[1], [0, 2, 3], [1, 3], [1, 2], []]
    assert [row in graph for row in range(5)] == [True, True, True, True, False]


def test_visits_are_the_rows_of_powers_of_the_transition_matrix(graph, transitions):
    for start in range(5):
        for step, (rows, probabilities) in enumerate(graph.visits(start, 4), start=1):
            expected = np.linalg.matrix_power(transitions, step)[start]
            assert rows.tolist() == np.flatnonzero(expected).tolist()
            np.testing.assert_allclose(probabilities, expected[rows], atol=1e-15)


def test_walks_visit_papers_with_these_probabilities(graph, transitions):
    count = 20000
    for start in range(4):
        walks = graph.walks(start, 3, count, np.random.default_rng(start))
        for step, rows in enumerate(walks, start=1):
            expected = np.linalg.matrix_power(transitions, step)[start]
            assert set(rows.tolist()) == set(np.flatnonzero(expected).tolist())
            # Six standard deviations of a share of `count` draws.
            bound = 6 * np.sqrt(expected * (1 - expected) / count).max()
            assert np.abs(np.bincount(rows, minlength=5) / count - expected).max() < bound + 1e-12


def test_reachability_of_five_nodes_in_closed_form(graph, transitions):
    expected = np.mean([np.linalg.matrix_power(transitions, step) for step in (1, 2, 3)], axis=0)
    np.testing.assert_allclose(graph.reachability(np.array([1, 3, 4]), 3), expected[:, [1, 3, 4]], atol=1e-7)
    # By hand, with two steps: from 0, the walk is at 1 and then, with 1/3 each, at 0, 2 and 3.
    np.testing.assert_allclose(graph.reachability(np.arange(5), 2)[0], [1 / 6, 1 / 2, 1 / 6, 1 / 6, 0], atol=1e-7)


def test_anchors_are_the_papers_that_walks_visit_most(graph, transitions):
    totals = sum(np.linalg.matrix_power(transitions, step)[:4].sum(0) for step in range(1, 10))
    assert graph.most_reached(2, 9).tolist() == np.argsort(-totals, kind="stable")[:2].tolist() == [1, 2]
    assert graph.most_reached(5, 9).tolist() == [1, 2, 3, 0]  # 2 and 3 are equal; 4 has no links


def papers(count: int) -> dict[str, Document]:
    return {f"p{i}": Document(f"p{i}", f"title {i}", f"text {i}") for i in range(count)}


def linked(qrels, queries=("p0", "p1"), count=5) -> LinkPredictionDataModule:
    corpus = papers(count)
    data = LinkPredictionDataModule("links", Collection(corpus, {q: corpus[q] for q in queries}, qrels))
    data.setup()
    return data


TRAIN = {"p0": {"p1": 1, "p2": 0}, "p1": {"p2": 2}}


def test_graph_consists_of_the_training_links_only():
    without = graph_of(linked({"train": TRAIN}))
    data = linked({"train": TRAIN, "dev": {"p1": {"p3": 1}}, "test": {"p0": {"p3": 1, "p4": 1}}})
    graph = graph_of(data)
    assert [graph.neighbours_of(row).tolist() for row in range(5)] == [[1], [0, 2], [1], [], []]
    assert graph.neighbours.tolist() == without.neighbours.tolist()
    anchors = np.arange(5)
    np.testing.assert_array_equal(graph.reachability(anchors, 9)[:5], without.reachability(anchors, 9)[:5])


def test_links_removed_from_the_training_are_not_in_the_graph():
    data = linked({"train": TRAIN})
    data.strip(np.array([1]), np.zeros(0, dtype=np.int64))
    assert graph_of(data).neighbours_of(1).tolist() == [0]


def test_query_with_another_text_is_the_node_of_its_paper():
    corpus = papers(3)
    queries = {"p0": Document("p0", "", "another text"), "p1": corpus["p1"]}
    data = LinkPredictionDataModule("links", Collection(corpus, queries, {"train": {"p0": {"p1": 1}, "p1": {"p2": 1}}}))
    data.setup()
    graph = graph_of(data)
    assert data.documents[3].text == "another text"
    assert graph.neighbours_of(3).tolist() == graph.neighbours_of(0).tolist() == [1]
    reached = graph.reachability(np.array([1]), 3)
    assert reached[3] == reached[0] > 0


def test_links_of_each_collection_stay_in_its_rows():
    corpus = papers(3)
    collections = {
        name: Collection(corpus, {"p0": corpus["p0"]}, {"train": {"p0": {document: 1}}})
        for name, document in (("one", "p1"), ("two", "p2"))
    }
    data = LinkPredictionDataModule("links", collections)
    data.setup()
    assert graph_of(data).sources.tolist() == [0, 1, 4, 6]


def test_file_replaces_the_training_links(tmp_path):
    file = tmp_path / "graph.tsv"
    file.write_text("p0\tp4\n\np3 p4\n")
    graph = graph_of(linked({"train": TRAIN}), file)
    assert [graph.neighbours_of(row).tolist() for row in range(5)] == [[4], [], [], [4], [0, 3]]


@pytest.mark.parametrize("cached", [False, True])
def test_links_of_a_copy_in_a_file_belong_to_the_first_paper_with_its_text(tmp_path, cached):
    """Batches contain the first paper, but the links of its copy were those of another node."""
    corpus = papers(4)
    corpus["copy"] = replace(corpus["p1"], id="copy")
    collection = Collection(corpus, {"p0": corpus["p0"]}, {"train": {"p0": {"copy": 1}}})
    write_beir(collection, tmp_path / "data")
    reader = BeirReader(str(tmp_path / "data")) if cached else collection
    data = LinkPredictionDataModule("links", reader, cache=str(tmp_path / "cache") if cached else "")
    data.setup()
    file = tmp_path / "graph.tsv"
    file.write_text("p0 copy\ncopy p3\ncopy p1\n")
    for graph, linked_to_one in ((graph_of(data), [0]), (graph_of(data, file), [0, 3])):
        assert [graph.neighbours_of(row).tolist() for row in (1, 4)] == [linked_to_one, []]


def test_file_cannot_leak_links_of_the_evaluation(tmp_path, caplog):
    file = tmp_path / "graph.tsv"
    file.write_text("p0 p1\np4 p0\np1 p3\n")  # p0 p4 is a test link, in the other direction
    graph = graph_of(linked({"train": TRAIN, "test": {"p0": {"p4": 1, "p1": 1}}, "dev": {"p1": {"p3": 0}}}), file)
    assert [graph.neighbours_of(row).tolist() for row in range(5)] == [[1], [0, 3], [], [1], []]
    assert "left out 1 link" in caplog.text


def test_file_cannot_bring_back_papers_that_are_left_out_of_training(tmp_path, caplog):
    """The group loss trained on evaluation texts that were removed from the examples."""
    file = tmp_path / "graph.tsv"
    file.write_text("p0 p1\np1 p3\np3 p4\n")
    data = linked({"train": TRAIN})
    data.strip(np.zeros(0, dtype=np.int64), np.array([3]))
    assert [graph_of(data, file).neighbours_of(row).tolist() for row in range(5)] == [[1], [0], [], [], []]
    assert "left out 2 links of papers that are left out of training" in caplog.text


def test_links_between_collections_of_a_file_are_counted(tmp_path, caplog):
    """They were left out without a word."""
    corpus = papers(4)
    collections = {}
    for name, ids in (("one", ("p0", "p1", "p2")), ("two", ("p0", "p1", "p3"))):
        documents = {id: corpus[id] for id in ids}
        collections[name] = Collection(documents, {"p0": corpus["p0"]}, {"train": {"p0": {"p1": 1}}})
    data = LinkPredictionDataModule("links", collections)
    data.setup()
    file = tmp_path / "graph.tsv"
    file.write_text("p0 p1\np1 p3\np2 p3\n")
    assert graph_of(data, file).sources.tolist() == [0, 1, 4, 5, 5, 6]
    assert "left out 1 link between papers of different collections" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "p0 p1\np0 p9\np8 p9\n",
            r"graph.tsv, line 2: paper 'p9' is not in the corpus of task ",
        ),
        ("p0 p1\np0 p1 p2\n", "graph.tsv, line 2: expected two ids"),
        ("p0 p1\np0\n", "graph.tsv, line 2: expected two ids"),
        ("p0 p0\n", "has no links between papers"),
        ("", "has no links between papers"),
        (None, "graph.tsv: cannot be opened"),
    ],
)
def test_wrong_graph_file_raises_user_error(tmp_path, content, message):
    file = tmp_path / "graph.tsv"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message):
        graph_of(linked({"train": TRAIN}), file)


def test_task_without_links_raises_user_error():
    corpus = papers(3)
    data = SearchDataModule("search", Collection(corpus, {"q": Document("q", "", "q")}, {"train": {"q": {"p1": 1}}}))
    data.setup()
    with pytest.raises(UserError, match="task search: has no citation graph; expected a task of kind link_prediction"):
        graph_of(data)
