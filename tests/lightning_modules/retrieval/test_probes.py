"""Probes, against their objectives minimised by another solver."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import kendalltau
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC

from datamodules.records import Benchmark, Document, Probe, UserError
from lightning_modules.retrieval.evaluation import mean_metrics, measure_queries
from lightning_modules.retrieval.metrics import Run
from lightning_modules.retrieval.probes import predict_classes, predict_labels, predict_numbers, probe_runs
from lightning_modules.retrieval.trec import write_trec

COSTS = Probe().costs


def three_classes(seed=0, per_class=12, spread=1.2):
    """Return training vectors from three overlapping clouds, their classes, and queries."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(3, 5))
    classes = np.repeat([0, 1, 2], per_class)
    vectors = centres[classes] + spread * rng.normal(size=(len(classes), 5))
    return vectors.astype(np.float32), classes, rng.normal(size=(40, 5)).astype(np.float32)


def by_hand(train, classes, queries, c):
    """Separate each class from the others: |w|^2 / 2 + C sum(max(0, 1 - y w.x)^2)."""

    def weights(signs):
        def loss(w):
            slack = np.maximum(0, 1 - signs * (train @ w))
            return w @ w / 2 + c * (slack**2).sum(), w - 2 * c * train.T @ (signs * slack)

        return minimize(loss, np.zeros(train.shape[1]), jac=True, tol=1e-12).x

    all_weights = np.stack([weights(np.where(classes == one, 1.0, -1.0)) for one in np.unique(classes)])
    return (queries @ all_weights.T).argmax(1)


def test_predictions_and_chosen_cost_follow_from_the_objective():
    train, classes, queries = three_classes()
    train, queries = train.astype(np.float64), queries.astype(np.float64)
    folds = list(StratifiedKFold(3).split(train, classes))
    accuracy = [
        np.mean([np.mean(by_hand(train[a], classes[a], train[b], c) == classes[b]) for a, b in folds]) for c in COSTS
    ]
    assert len(set(accuracy)) > 2, "the values of C differ in accuracy"
    best = COSTS[int(np.argmax(accuracy))]
    predictions, chosen = predict_classes(*three_classes(), Probe())
    assert chosen == best
    assert (predictions == by_hand(train, classes, queries, best)).all()
    assert (predictions != by_hand(train, classes, queries, COSTS[0])).any(), "C matters here"


def benchmark(classes, **probe):
    labels = {name: Document(name, name) for name in "abc"}
    papers = {f"t{i}": Document(f"t{i}", "x") for i in range(len(classes))}
    qrels = {f"t{i}": dict.fromkeys(labels_of_paper, 1) for i, labels_of_paper in enumerate(classes)}
    queries = {f"q{i}": Document(f"q{i}", "x") for i in range(40)}
    return Benchmark(
        "toy", "classification", "test", labels, queries, {}, training=(papers, qrels), probe=Probe(**probe)
    )


def test_run_has_the_class_of_each_query():
    train, classes, queries = three_classes()
    (run,) = probe_runs(benchmark(["abc"[c] for c in classes]), list(range(40)), queries, train)
    assert run.indices[:, 0].tolist() == predict_classes(train, classes, queries, Probe())[0].tolist()
    assert run.documents == ["a", "b", "c"]
    assert run.indices.shape == (40, 1)


@pytest.mark.parametrize("learns", ["class", "labels"])
def test_judgements_may_have_another_order_than_the_papers(learns):
    """The vectors of the papers were paired with the judgements of other papers."""
    train, classes, queries = three_classes()
    toy = benchmark(["abc"[c] for c in classes], learns=learns)
    papers, grades = toy.training
    shuffled = {paper: grades[paper] for paper in np.random.default_rng(0).permutation(list(grades))}
    (expected,) = probe_runs(toy, list(range(40)), queries, train)
    (run,) = probe_runs(replace(toy, training=(papers, shuffled)), list(range(40)), queries, train)
    assert (run.indices == expected.indices).all()


def test_training_paper_without_judgements_raises_user_error():
    papers, grades = benchmark(["a", "b"] * 3).training
    toy = replace(benchmark([]), training=(papers, {paper: grades[paper] for paper in grades if paper != "t2"}))
    with pytest.raises(UserError, match="toy: training paper 't2' has no judgements"):
        list(probe_runs(toy, ["q0"], np.zeros((1, 4)), np.ones((6, 4))))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["a"] * 4 + ["b"] * 2, r"2 class\(es\), the smallest \('b'\) with 2"),
        (["a"] * 6, r"1 class\(es\)"),
        (["a"] * 5 + ["ab"], "training paper 't5' has 2 classes"),
        (["a"] * 5 + [""], "training paper 't5' has 0 classes"),
    ],
)
def test_classes_that_cannot_be_learned_raise_user_error(classes, message):
    with pytest.raises(UserError, match=message):
        list(probe_runs(benchmark(classes), ["q0"], np.zeros((1, 4)), np.ones((len(classes), 4))))


def test_label_that_no_training_paper_has_is_reported(caplog):
    train, classes, queries = three_classes()
    (run,) = probe_runs(benchmark(["ac"[c % 2] for c in classes], learns="labels"), list(range(40)), queries, train)
    assert set(run.indices.ravel()) == {-1, 0, 2}
    assert "toy: 1 labels, such as b, cannot be learned, because all training papers have them" in caplog.text


def test_missing_scikit_learn_raises_user_error(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="probes need scikit-learn .pip install scikit-learn"):
        next(probe_runs(benchmark(["a"] * 3 + ["b"] * 3), ["q0"], np.zeros((1, 4)), np.ones((6, 4))))


def test_rank_without_queries_has_an_empty_run():
    train, classes, _ = three_classes()
    for probe in ({}, {"learns": "labels"}, {"samples": 12, "costs": [1], "draws": 2}):
        for run in probe_runs(benchmark(["abc"[c] for c in classes], **probe), [], np.zeros((0, 5)), train):
            assert run.indices.shape == (0, 3 if probe.get("learns") == "labels" else 1)


def test_predicted_numbers_follow_from_the_objective():
    """In one dimension, |w|^2 / 2 + C sum |y - w.x| is minimised on a grid."""
    rng = np.random.default_rng(2)
    train, queries = rng.normal(size=(30, 1)), rng.normal(size=(5, 1))
    numbers = 3 * train[:, 0] + rng.normal(size=30)
    predictions, cost = predict_numbers(train, numbers, queries, Probe("number", costs=[0.05]))
    assert cost == 0.05
    grid = np.linspace(-5, 5, 200_001)
    loss = grid**2 / 2 + 0.05 * np.abs(numbers[:, None] - train * grid).sum(0)
    np.testing.assert_allclose(predictions, queries[:, 0] * grid[loss.argmin()], atol=2e-3)
    assert abs(grid[loss.argmin()]) < 2.5, "C matters here"


@pytest.mark.parametrize(
    ("classes", "probe", "message"),
    [
        (["a"] * 4 + ["b"] * 4, {"samples": 8, "costs": [1]}, "8 training papers cannot be divided into parts of 8"),
        (["a"] * 9 + ["b"], {"samples": 2, "costs": [1]}, r"draw 1: .*got 1 class\(es\), the smallest \('a'\) with 2"),
        (
            ["a", "b", "c"] * 12,
            {"samples": 6, "costs": [0.1, 1]},
            r"draw 1: .*at least 3 training papers each, got .* \('a'\) with 2",
        ),
        (
            ["ab", "a", "c"],
            {"learns": "labels", "samples": 2},
            "1 training papers of 'b', expected at least 2 of each label",
        ),
        (["a", "b"], {"learns": "number"}, "expected a corpus of one document"),
    ],
)
def test_too_few_papers_for_few_shot_learning_raise_user_error(classes, probe, message):
    train = np.random.default_rng(0).normal(size=(len(classes), 4))
    with pytest.raises(UserError, match=message):
        list(probe_runs(benchmark(classes, **probe), ["q0"], np.zeros((1, 4)), train))


@pytest.mark.parametrize("learns", ["labels", "number"])
def test_predictions_do_not_depend_on_the_share_of_queries(learns):
    """They are equal bit for bit, also for equal vectors, at a width where matrix products would differ."""
    rng = np.random.default_rng(3)
    train, queries = (rng.normal(size=(size, 300)).astype(np.float32) for size in (60, 101))
    queries[51:] = queries[:50]
    predict = {"labels": predict_labels, "number": predict_numbers}[learns]
    targets = {"labels": rng.integers(0, 2, (60, 3)), "number": rng.normal(size=60)}[learns]

    def predicted(part):
        predictions = predict(train, targets, part, Probe(learns, costs=[0.01]))
        return predictions if learns == "labels" else predictions[0]

    whole = predicted(queries)
    assert len(np.unique(whole)) > 2
    assert (whole[51:] == whole[:50]).all()
    for size in (2, 3):
        for rank in range(size):
            assert (predicted(queries[rank::size]) == whole[rank::size]).all()


def test_tau_follows_from_the_numbers_in_the_run_file(tmp_path):
    """The predicted numbers differ only in their last digits, which the file must keep."""
    rng = np.random.default_rng(4)
    predicted, true = 1 + rng.integers(0, 9, 60) * 2.0**-52, rng.normal(size=60)
    run = Run([f"q{i}" for i in range(60)], ["number"], np.zeros((60, 1), int), predicted[:, None])
    papers = {query: Document(query) for query in run.queries}
    qrels = {query: {"number": number} for query, number in zip(run.queries, true, strict=True)}
    numbers = Benchmark("toy", "t", "test", {"number": Document("n")}, papers, qrels, training=({}, {}))
    write_trec(run, tmp_path / "run.trec", "model")
    written = [float(line.split()[4]) for line in (tmp_path / "run.trec").read_text().splitlines()]
    values = measure_queries(run, numbers, ["kendall_tau"])
    assert mean_metrics(values, numbers, ["kendall_tau"])["kendall_tau"] == kendalltau(written, true).statistic != 0


@pytest.mark.parametrize("probe", [{}, {"samples": 1, "draws": 2}])
@pytest.mark.filterwarnings("error")
def test_label_with_too_few_papers_gets_the_first_cost_and_a_warning(probe, caplog):
    """A fold without the only paper of a label cannot learn it."""
    train, _, queries = three_classes()
    classes = ["a"] * 17 + ["c"] * 18 + ["bc"]
    labels = benchmark(classes, learns="labels", costs=[0.02, 1], **probe)
    runs = list(probe_runs(labels, list(range(40)), queries, train))
    count = 3 if probe else 1
    warning = f"toy: C is 0.02 for {count} labels, such as "
    assert caplog.text.count(warning) == 1
    if not probe:
        model = LinearSVC(C=0.02, fit_intercept=False, random_state=42).fit(train.astype(float), np.arange(36) == 35)
        assert (
            np.isclose(runs[0].scores, model.decision_function(queries.astype(float))[:, None], atol=1e-12).any(1).all()
        )


def test_parts_smaller_than_requested_are_reported(caplog):
    classes = ["a", "b"] * 50
    train = np.random.default_rng(0).normal(size=(100, 4))
    for samples in (99, 50):
        list(probe_runs(benchmark(classes, samples=samples, costs=[1]), ["q0"], np.zeros((1, 4)), train))
        assert caplog.text.count("toy: 100 training papers are divided into parts of 50, not 99") == 1
