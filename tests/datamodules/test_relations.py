"""Relations between label spaces: estimated from papers with both kinds of labels, by name, and from files."""

import numpy as np
import pytest

from datamodules.batches import MultiTaskDataModule
from datamodules.ragged import Ragged
from datamodules.records import Collection, Document, UserError
from datamodules.relations import (
    LabelSpace,
    PartialAnnotation,
    distributions,
    estimated,
    find_collection,
    most_related,
    read_relation,
    relation_of,
    same_names,
)
from datamodules.tasks import ClassificationDataModule, LinkPredictionDataModule, SearchDataModule


def space(name, *titles):
    return LabelSpace(name, np.arange(5, 5 + len(titles)), [Document(f"{name}{i}", t) for i, t in enumerate(titles)])


FIRST, SECOND = space("f", "Algebra", "Biology", "Chemistry"), space("s", "algebra", "Life: science")


def test_estimate_is_the_smoothed_share_of_papers_by_explicit_loops():
    rng = np.random.default_rng(0)
    papers = [
        ([a for a in range(4) if rng.random() < 0.4], [b for b in range(3) if rng.random() < 0.5]) for _ in range(30)
    ]
    first, second = (Ragged.of(lists) for lists in zip(*papers, strict=True))
    for smoothing in (0.0, 1.0, 2.5):
        weights = estimated(first, second, (5, 3), smoothing)
        for a in range(4):
            of_label = [bs for as_, bs in papers if a in as_]
            for b in range(3):
                average = sum(b in bs for _, bs in papers) / len(papers)
                expected = (sum(b in bs for bs in of_label) + smoothing * average) / (len(of_label) + smoothing)
                assert weights[a, b] == pytest.approx(expected)
        average = [sum(b in bs for _, bs in papers) / len(papers) for b in range(3)]
        assert weights[4] == pytest.approx(average if smoothing else [0] * 3), "a label without papers"


def test_estimate_comes_close_to_the_true_relation():
    rng = np.random.default_rng(1)
    true = rng.dirichlet(np.full(6, 0.3), size=4)
    first = rng.integers(4, size=4000)
    second = [rng.choice(6, p=true[a]) for a in first]
    weights = estimated(Ragged.of(first[:, None]), Ragged.of(np.array(second)[:, None]), (4, 6))
    assert np.abs(distributions(weights) - true).max() < 0.05
    assert np.abs(distributions(np.ones_like(weights)) - true).max() > 0.2


def test_distributions_sum_to_one_or_are_empty():
    weights = np.array([[0.5, 0.5, 1.0], [0, 0, 0], [0, 0.2, 0]], dtype=np.float32)
    assert distributions(weights) == pytest.approx(np.array([[0.25, 0.25, 0.5], [0, 0, 0], [0, 1, 0]]))


def test_labels_with_equal_names_relate():
    assert same_names(FIRST, SECOND).tolist() == [[1, 0], [0, 0], [0, 0]]
    with pytest.raises(UserError, match="no label of f has the same name as a label of o"):
        same_names(FIRST, space("o", "Physics"))


def test_file_names_labels_by_name_or_id(tmp_path):
    path = tmp_path / "relation.tsv"
    path.write_text("from\tto\tweight\nAlgebra\talgebra\t1\nf1\tLife: science\t7.5e-1\n\nf1\ts0\t0\n")
    assert read_relation(path, FIRST, SECOND).tolist() == [[1, 0], [0, 0.75], [0, 0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Algebra\talgebra\t1\nAlgbra\talgebra\t1\n", "line 2: 'Algbra' is not a label of f; did you mean 'Algebra'?"),
        ("Algebra\tzzz\t1\n", "line 1: 'zzz' is not a label of s; expected the id or the name of a label"),
        ("algebra\tAlgebra\t1\n", "line 1: 'algebra' is not a label of f"),
        ("Algebra\talgebra\t1.5\n", "line 1: expected a weight from 0 to 1, got '1.5'"),
        ("Algebra\talgebra\t0,5\n", "line 1: expected a weight from 0 to 1, got '0,5'"),
        ("Algebra\talgebra\tnan\n", "line 1: expected a weight from 0 to 1, got 'nan'"),
        ("Algebra\talgebra\t1\nBiology\talgebra\thigh\n", "line 2: expected a weight from 0 to 1, got 'high'"),
        ("Algebra\talgebra\n", "line 1: expected two labels and a weight, separated by tabs, got 'Algebra"),
        ("Algebra\talgebra\t1\nf0\ts0\t1\n", "line 2: the pair 'f0' and 's0' is in the file twice"),
        ("a\tb\tweight\n", "contains no pair of labels with a weight above 0"),
    ],
)
def test_mistakes_in_a_file_name_file_and_line(tmp_path, text, message):
    path = tmp_path / "relation.tsv"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_relation(path, FIRST, SECOND)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_name_of_several_labels_needs_an_id(tmp_path):
    """A weight went to the last label of the name. A blank cell was the last label without a name."""
    path = tmp_path / "relation.tsv"
    target = space("t", "Mercury", "Mercury", "")
    for label, message in (
        ("Mercury", "is the name of several labels of t; use an id"),
        ("", "is not a label"),
    ):
        path.write_text(f"Algebra\t{label}\t1\n")
        with pytest.raises(UserError, match=f"line 1: '{label}' {message}"):
            read_relation(path, FIRST, target)
    path.write_text("Algebra\tt0\t1\n")
    assert read_relation(path, FIRST, target).tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_missing_file_raises_user_error(tmp_path):
    with pytest.raises(UserError, match=r"none\.tsv: cannot be opened"):
        read_relation(tmp_path / "none.tsv", FIRST, SECOND)


def test_label_space_of_a_collection_has_the_rows_of_its_corpus():
    labels = {f"l{i}": Document(f"l{i}", f"label {i}") for i in range(3)}
    papers = {"p": Document("p", "A title of a paper", "text")}
    collection = Collection(labels, papers, {"train": {"p": {"l1": 1}}})
    task = ClassificationDataModule("topics", {"one": collection, "two": collection})
    task.setup()
    two = LabelSpace.of(task, "two")
    assert (two.name, two.rows.tolist()) == ("topics/two", [4, 5, 6])
    assert [task.documents[row] for row in two.rows] == two.labels == list(labels.values())
    assert two.positions(np.array([3, 4, 6, 7])).tolist() == [-1, 0, 2, -1]
    search = SearchDataModule("search", collection)
    search.setup()
    with pytest.raises(UserError, match="task search has no labels; expected a task of kind classification"):
        LabelSpace.of(search, "search")


PAPERS = {f"p{i}": Document(f"p{i}", f"The title of paper {i}", f"text {i}") for i in range(6)}
FIELDS = {f"f{i}": Document(f"f{i}", f"field {i}") for i in range(2)}
TOPICS = {f"t{i}": Document(f"t{i}", f"topic {i}") for i in range(3)}


@pytest.fixture
def partly_annotated():
    """Papers 0 to 3 have fields, 2 and 3 have topics (4 does in the test split), and 5 cites 2, which cites 3 and 4."""

    def qrels(positives):
        return {paper: dict.fromkeys(documents.split(), 1) for paper, documents in positives.items()}

    def collection(corpus, train, test):
        return Collection(corpus, PAPERS, {"train": qrels(train), "test": qrels(test)})

    fields = collection(FIELDS, {"p0": "f0", "p1": "f1", "p2": "f0 f1", "p3": "f1"}, {"p4": "f0"})
    topics = collection(TOPICS, {"p2": "t0 t2", "p3": "t1"}, {"p4": "t0"})
    links = collection(PAPERS, {"p5": "p2", "p2": "p3 p4"}, {})
    tasks = [
        ClassificationDataModule("fields", fields),
        ClassificationDataModule("topics", {"first": topics, "second": fields}),
        LinkPredictionDataModule("links", links),
    ]
    data = MultiTaskDataModule(tasks)
    for task in tasks:
        task.setup()
    return data


def lists(values):
    return [values.values[a:b].tolist() for a, b in zip(values.starts, values.starts[1:], strict=False)]


def test_papers_of_a_classification_are_compared_with_those_of_another(partly_annotated):
    source, target = (find_collection(partly_annotated, "key", name) for name in ("fields", "topics/first"))
    papers = PartialAnnotation.of(source, target, "title")
    assert (papers.source.name, papers.target.name) == ("fields", "topics/first")
    assert lists(papers.known) == [[], [], [0], [1], [0, 1], [1], [], []]
    assert papers.unlabelled.nonzero()[0].tolist() == [2, 3], "papers 0 and 1"
    assert [lists(each) for each in papers.pairs] == [[[0, 1], [1]], [[0, 2], [1]]]
    expected = np.array([[1, 0, 1], [0.5, 0.5, 0.5]])
    assert relation_of(papers, "estimated", 0.0) == pytest.approx(expected)


def test_documents_and_their_queries_are_compared_by_the_labels_of_the_target(partly_annotated):
    source, target = (find_collection(partly_annotated, "key", name) for name in ("links", "topics/first"))
    papers = PartialAnnotation.of(source, target, "id")
    assert papers.source == papers.target
    assert lists(papers.known) == [[], [], [0, 2], [1], [], []] * 2, "as documents, and as queries"
    assert papers.unlabelled.nonzero()[0].tolist() == [5]
    assert [lists(each) for each in papers.pairs] == [[[1]], [[0, 2]]], "paper 3 is cited by 2"
    assert relation_of(papers, "same").tolist() == np.eye(3).tolist()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("serach", "source: unknown task 'serach'; expected one of fields, topics, links"),
        ("topics", "source: task topics has several collections; expected one of topics/first, topics/second"),
        ("fields/x", "source: unknown collection 'x'; expected one of fields/fields"),
    ],
)
def test_unknown_task_or_collection_raises_user_error(partly_annotated, name, message):
    with pytest.raises(UserError) as error:
        find_collection(partly_annotated, "source", name)
    assert str(error.value) == message


def test_relation_without_papers_of_both_or_of_too_many_labels_raises_user_error():
    nothing = Ragged.of([])
    papers = PartialAnnotation(FIRST, SECOND, nothing, np.zeros(0, dtype=bool), (nothing, nothing))
    with pytest.raises(UserError, match="relation: cannot be estimated, because no paper has labels of both"):
        relation_of(papers, "estimated")
    large = LabelSpace("large", np.arange(1), [Document("x")] * 20_000)
    papers = PartialAnnotation(large, large, nothing, np.zeros(0, dtype=bool), (nothing, nothing))
    with pytest.raises(UserError, match="large has 20,000 labels and large has 20,000; .* at most 268,435,456"):
        relation_of(papers, "same")


def test_most_related_labels_come_first_and_weights_of_0_are_left_out():
    weights = np.array([[0.2, 0.9, 0.5], [0, 0, 0.1], [0, 0, 0]])
    assert lists(most_related(weights, 2)) == [[1, 2], [2], []]
