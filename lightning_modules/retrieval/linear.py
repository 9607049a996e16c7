"""Linear models over vectors, as the programs of SciDocs and SciRepEval fit them: without intercept, C by three folds.

Source: allenai/scidocs, scidocs/classification.py; allenai/scirepeval, evaluation/evaluator.py, whose solver
(sklearn-contrib-lightning) minimises the same objectives as scikit-learn's.

Shapes: n training papers, q queries, D dimensions, L labels.
"""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from datamodules.records import Probe, UserError

FOLDS = 3
SEED = 42
MAX_ITER = {"class": 1000, "labels": 10_000, "number": 1000}
ALONE = 2**19  # values that one process has done with before others have started


def check_installed() -> None:
    """Raise UserError if scikit-learn is not there, which all below needs."""
    if importlib.util.find_spec("sklearn") is None:
        raise UserError("a linear model needs scikit-learn (make install EXTRAS=cpu,svm)")


def predict_classes(train: np.ndarray, classes: np.ndarray, queries: np.ndarray, probe: Probe):
    """The class (q,) of each query, and C. train: (n, D) vectors of classes (n,). queries: (q, D).

    One class against the others. C is the one of the best accuracy.
    """
    model = _with_best_c(_estimator(probe), probe, processes=train.size > ALONE)
    with _quiet():
        model.fit(train.astype(np.float64), classes)
    sides = _products(queries, _weights(model))
    found = sides.argmax(1) if sides.shape[1] > 1 else (sides[:, 0] > 0).astype(int)
    return model.classes_[found], _chosen(model)


def predict_labels(train: np.ndarray, labels: np.ndarray, queries: np.ndarray, probe: Probe) -> np.ndarray:
    """(q, L): how far each query is on the side of each label; it has those above 0. labels: (n, L), 1 or 0.

    Each label has a model and a C of its own: the first where can_choose denies a choice. A label that all training
    papers have, or none, all queries have, or none.
    """
    from joblib import Parallel, delayed

    train, constant = train.astype(np.float64), labels.min(0) == labels.max(0)
    processes = -1 if train.size * labels.shape[1] > ALONE else 1
    weights = Parallel(n_jobs=processes)(delayed(_of_label)(train, own, probe) for own in labels[:, ~constant].T)
    sides = np.repeat(labels[:1].astype(np.float64), len(queries), axis=0)
    if weights:
        sides[:, ~constant] = _products(queries, np.stack(weights))
    return sides


def _of_label(train: np.ndarray, label: np.ndarray, probe: Probe) -> np.ndarray:
    """(D,) weights of the model of one label (n,)."""
    model = _estimator(probe)
    if can_choose(label):
        model = _with_best_c(model, probe, processes=False)
    with _quiet():
        model.fit(train, label)
    return _weights(model)[0]


def can_choose(labels: np.ndarray) -> np.ndarray:
    """Whether all folds can learn each label and one of them has three papers at all. labels: (n, ...), 1 or 0."""
    with_it, without = labels.sum(0), (1 - labels).sum(0)
    return (np.minimum(with_it, without) > 1) & (np.maximum(with_it, without) >= FOLDS)


def predict_numbers(train: np.ndarray, numbers: np.ndarray, queries: np.ndarray, probe: Probe):
    """The number (q,) of each query, and C, the one of the best R^2. numbers: (n,) of the training papers."""
    model = _with_best_c(_estimator(probe), probe, processes=train.size > ALONE)
    with _quiet():
        model.fit(train.astype(np.float64), numbers)
    return _products(queries, _weights(model))[:, 0], _chosen(model)


def _weights(model: Any) -> np.ndarray:
    """(k, D)."""
    return np.atleast_2d(getattr(model, "best_estimator_", model).coef_)


def _products(queries: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(q, k) products of queries (q, D) and weights (k, D).

    Each by itself: the last bits of a matrix product depend on how many rows it has, so that equal papers, or those of
    another share of the queries, would get other numbers.
    """
    queries = np.ascontiguousarray(queries, dtype=np.float64)
    return np.stack([(queries * own).sum(1) for own in weights], axis=1)


def _estimator(probe: Probe) -> Any:
    from sklearn.svm import LinearSVC, LinearSVR

    more = {"fit_intercept": False, "random_state": SEED, "max_iter": MAX_ITER[probe.learns], "C": probe.costs[0]}
    return LinearSVR(epsilon=0.0, **more) if probe.learns == "number" else LinearSVC(loss=probe.loss, **more)


def _with_best_c(estimator: Any, probe: Probe, processes: bool) -> Any:
    """With the C that cross-validation chooses, where there is a choice. Processes: one a core."""
    from sklearn.model_selection import GridSearchCV

    if len(probe.costs) == 1:
        return estimator
    return GridSearchCV(estimator, {"C": probe.costs}, cv=FOLDS, n_jobs=-1 if processes else 1)


def _chosen(model: Any) -> float:
    return float(model.best_params_["C"] if hasattr(model, "best_params_") else model.C)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The largest Cs end at the limit of iterations, in the programs of the authors too; probing.py tells of labels."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The least populated class")  # of labels that few papers have or lack
        yield
