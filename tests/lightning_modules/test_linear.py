"""A linear SVM over vectors, against its objective minimised by another solver."""

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.model_selection import StratifiedKFold

from datamodules.records import Benchmark, Document, UserError
from lightning_modules.linear import CS, classify, predict


def drawn(seed=0, per_class=12, spread=1.2):
    """Three overlapping clouds: train, their classes, queries."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(3, 5))
    classes = np.repeat([0, 1, 2], per_class)
    vectors = centres[classes] + spread * rng.normal(size=(len(classes), 5))
    return vectors.astype(np.float32), classes, rng.normal(size=(40, 5)).astype(np.float32)


def by_hand(train, classes, queries, c):
    """One class against the others: |w|^2 / 2 + C sum(max(0, 1 - y w.x)^2)."""

    def weights(signs):
        def loss(w):
            slack = np.maximum(0, 1 - signs * (train @ w))
            return w @ w / 2 + c * (slack**2).sum(), w - 2 * c * train.T @ (signs * slack)

        return minimize(loss, np.zeros(train.shape[1]), jac=True, tol=1e-12).x

    every = np.stack([weights(np.where(classes == one, 1.0, -1.0)) for one in np.unique(classes)])
    return (queries @ every.T).argmax(1)


def test_predictions_and_the_chosen_c_are_those_of_the_objective():
    train, classes, queries = (part.astype(np.float64) if part.dtype == np.float32 else part for part in drawn())
    folds = list(StratifiedKFold(3).split(train, classes))
    accuracy = [
        np.mean([np.mean(by_hand(train[a], classes[a], train[b], c) == classes[b]) for a, b in folds]) for c in CS
    ]
    assert len(set(accuracy)) > 2, "the folds tell the values of C apart"
    best = CS[int(np.argmax(accuracy))]
    found, chosen = predict(*drawn())
    assert chosen == best
    assert (found == by_hand(train, classes, queries, best)).all()
    assert (found != by_hand(train, classes, queries, CS[0])).any(), "C matters here"


def benchmark(classes):
    labels = {name: Document(name, name) for name in "abc"}
    papers = {f"t{i}": Document(f"t{i}", "x") for i in range(len(classes))}
    qrels = {f"t{i}": dict.fromkeys(own, 1) for i, own in enumerate(classes)}
    queries = {f"q{i}": Document(f"q{i}", "x") for i in range(40)}
    return Benchmark("toy", "classification", "test", labels, queries, {}, training=(papers, qrels))


def test_a_run_has_each_querys_class():
    train, classes, queries = drawn()
    run = classify(benchmark(["abc"[c] for c in classes]), list(range(40)), queries, train)
    assert run.indices[:, 0].tolist() == predict(train, classes, queries)[0].tolist()
    assert run.documents == ["a", "b", "c"]
    assert run.indices.shape == (40, 1)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["a"] * 4 + ["b"] * 2, "2 training papers of 'b', and 2 classes"),
        (["a"] * 6, "1 classes"),
        (["a"] * 5 + ["ab"], "training paper 't5' has 2 classes"),
        (["a"] * 5 + [""], "training paper 't5' has 0 classes"),
    ],
)
def test_what_an_svm_cannot_learn_is_refused(classes, message):
    with pytest.raises(UserError, match=message):
        classify(benchmark(classes), ["q0"], np.zeros((1, 4)), np.ones((len(classes), 4)))
