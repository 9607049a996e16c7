"""Probes: linear models that predict a paper's class, labels or a number from its vector.

They follow the programs of SciDocs and SciRepEval: no intercept, and C chosen by three-fold cross-validation.
SciRepEval's solver (sklearn-contrib-lightning) minimises the same objectives as scikit-learn's.

Sources: allenai/scidocs, scidocs/classification.py; allenai/scirepeval, evaluation/evaluator.py and
evaluation/few_shot_evaluator.py.

Shapes: n training papers, q queries, D dimensions, L documents of the corpus (classes, labels, or the one number).
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from datamodules.records import Benchmark, Probe, Qrels, UserError
from lightning_modules.retrieval.metrics import Run, positions_of

log = logging.getLogger(__name__)

FOLDS = 3
SEED = 42
MAX_ITER = {"class": 1000, "labels": 10_000, "number": 1000}
PARALLEL_FROM = 2**19  # with fewer values, one process would finish before others have even started


def probe_runs(benchmark: Benchmark, query_ids: Sequence[str], queries: np.ndarray, train: np.ndarray) -> Iterator[Run]:
    """Predict the class, labels or number of each query: once, or for each draw in few-shot learning.

    queries: vectors of query_ids, (q, D).
    train: vectors of benchmark.training's papers, in their order, (n, D).

    Yields runs. The documents of a query are its class, or its labels, most certain first. For numbers, the
    corpus has a single document, and its score is the prediction.

    Raises UserError if a paper does not have exactly one class, if a class or label has too few papers, or if
    scikit-learn is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise UserError("probes need scikit-learn (pip install scikit-learn)")
    probe, names = benchmark.probe, list(benchmark.corpus)
    targets = {"class": _class_targets, "labels": _label_targets, "number": _number_targets}[probe.learns](
        benchmark, names
    )
    if not probe.samples:
        log.info("%s: %d training papers, %d values of C", benchmark.name, len(train), len(probe.costs))
        yield _predict(benchmark, query_ids, names, queries, train, targets)
        return
    for number, rows in enumerate(_draws(benchmark, targets, names), start=1):
        if probe.learns == "class":
            _check_classes(benchmark, names, targets[rows], f"draw {number}: ")
        elif number == 1:
            _warn_about_fixed_costs(benchmark, names, targets[rows])
        yield _predict(benchmark, query_ids, names, queries, train[rows], targets[rows])


def _predict(
    benchmark: Benchmark,
    query_ids: Sequence[str],
    names: list[str],
    queries: np.ndarray,
    train: np.ndarray,
    targets: np.ndarray,
) -> Run:
    """Fit a model to the training papers and predict the queries."""
    probe = benchmark.probe
    if not len(query_ids):  # this rank has no queries
        width = len(names) if probe.learns == "labels" else 1
        return Run(query_ids, names, np.full((0, width), -1), np.zeros((0, width)))
    if probe.learns == "labels":
        margins = predict_labels(train, targets, queries, probe)
        order = np.argsort(-margins, axis=1, kind="stable")
        scores = np.take_along_axis(margins, order, axis=1)
        return Run(query_ids, names, np.where(scores > 0, order, -1), scores)
    predict = predict_classes if probe.learns == "class" else predict_numbers
    predictions, cost = predict(train, targets, queries, probe)
    if not probe.samples:
        log.info("%s: C = %g", benchmark.name, cost)
    if probe.learns == "class":
        return Run(query_ids, names, predictions[:, None], np.ones((len(query_ids), 1), dtype=np.float32))
    return Run(query_ids, names, np.zeros((len(query_ids), 1), dtype=np.int64), predictions[:, None])


def _draws(benchmark: Benchmark, targets: np.ndarray, names: list[str]) -> Iterator[np.ndarray]:
    """Yield the rows of the training papers of each draw.

    For classes, papers are split in order into stratified parts of the requested size. Each part is a draw. For labels,
    each draw takes random papers of each label.
    """
    if benchmark.probe.learns == "labels":
        yield from _label_draws(benchmark, targets, names)
        return
    from sklearn.model_selection import StratifiedKFold

    probe = benchmark.probe
    num_parts = -(-len(targets) // probe.samples)
    if num_parts < 2 or np.bincount(targets).max() < num_parts:
        raise UserError(
            f"{benchmark.name}: {len(targets)} training papers cannot be divided into parts of {probe.samples}"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # as in SciRepEval, some parts may lack a class
        splits = list(StratifiedKFold(num_parts).split(targets, targets))
    size = len(targets) // num_parts
    if size < 0.9 * probe.samples:  # slightly smaller parts are expected
        log.warning(
            "%s: %d training papers are divided into parts of %d, not %d; set samples=%d to match",
            *(benchmark.name, len(targets), size, probe.samples, size),
        )
    if num_parts < probe.draws:
        log.info("%s: only %d draws, because there are no more training papers", benchmark.name, num_parts)
    yield from (rows for _, rows in splits[: probe.draws])


def _label_draws(benchmark: Benchmark, labels: np.ndarray, names: list[str]) -> Iterator[np.ndarray]:
    probe, counts = benchmark.probe, labels.sum(0)
    if counts.min() < probe.samples:
        rarest = names[counts.argmin()]
        raise UserError(
            f"{benchmark.name}: {counts.min()} training papers of {rarest!r}, expected at least {probe.samples} of "
            "each label"
        )
    for draw in range(probe.draws):
        random, rows = np.random.RandomState(SEED + draw), set()
        for label in range(len(names)):
            rows.update(random.choice(np.flatnonzero(labels[:, label]), probe.samples, replace=False).tolist())
        yield np.array(list(rows))  # in the set's order, which determines the folds, as in SciRepEval


def _training_grades(benchmark: Benchmark) -> Qrels:
    """Return the judgements of the training papers, in the order of their vectors."""
    assert benchmark.training is not None
    papers, grades = benchmark.training
    if missing := next((paper for paper in papers if paper not in grades), None):
        raise UserError(f"{benchmark.name}: training paper {missing!r} has no judgements")
    return {paper: grades[paper] for paper in papers}


def _class_targets(benchmark: Benchmark, names: Sequence[str]) -> np.ndarray:
    """Return the position of each training paper's class, (n,)."""
    positions, classes = positions_of(names), []
    for paper, grades in _training_grades(benchmark).items():
        relevant = [name for name, grade in grades.items() if grade > 0]
        if len(relevant) != 1:
            raise UserError(
                f"{benchmark.name}: training paper {paper!r} has {len(relevant)} classes, expected exactly one"
            )
        classes.append(positions[relevant[0]])
    _check_classes(benchmark, names, classes)
    return np.array(classes)


def _check_classes(benchmark: Benchmark, names: Sequence[str], classes: Sequence[int], prefix: str = "") -> None:
    """Raise UserError if the training papers have only one class, or if a class has too few of them for the folds."""
    present, counts = np.unique(classes, return_counts=True)
    least = FOLDS if len(benchmark.probe.costs) > 1 else 1
    if len(present) < 2 or counts.min() < least:
        raise UserError(
            f"{benchmark.name}: {prefix}expected at least two classes with at least {least} training papers each, got "
            f"{len(present)} class(es), the smallest ({names[present[counts.argmin()]]!r}) with {counts.min()}"
        )


def _label_targets(benchmark: Benchmark, names: Sequence[str]) -> np.ndarray:
    """Return a matrix of papers and labels, (n, L): 1 where the paper has the label, else 0."""
    if len(names) < 2:
        raise UserError(f"{benchmark.name}: expected at least two labels, got {len(names)}")
    rows = [[grades.get(name, 0) > 0 for name in names] for grades in _training_grades(benchmark).values()]
    labels = np.array(rows, dtype=np.int64)
    if constant := [name for name, share in zip(names, labels.mean(0), strict=True) if share in (0, 1)]:
        log.warning(
            "%s: %d labels, such as %s, cannot be learned, because all training papers have them, or none",
            *(benchmark.name, len(constant), constant[0]),
        )
    if not benchmark.probe.samples:
        _warn_about_fixed_costs(benchmark, names, labels)
    return labels


def _warn_about_fixed_costs(benchmark: Benchmark, names: Sequence[str], labels: np.ndarray) -> None:
    """Warn about labels for which C cannot be chosen. labels: (n, L)."""
    varies, costs = labels.min(0) < labels.max(0), benchmark.probe.costs
    fixed = np.flatnonzero(varies & ~can_choose_cost(labels))
    if len(costs) > 1 and len(fixed):
        log.warning(
            "%s: C is %g for %d labels, such as %s, because too few training papers are with or without them",
            *(benchmark.name, costs[0], len(fixed), names[fixed[0]]),
        )


def _number_targets(benchmark: Benchmark, names: Sequence[str]) -> np.ndarray:
    """Return the number of each training paper, (n,)."""
    if len(names) != 1:
        raise UserError(f"{benchmark.name}: expected a corpus of one document, whose grades are the numbers")
    return np.array([grades[names[0]] for grades in _training_grades(benchmark).values()], dtype=np.float64)


def predict_classes(
    train: np.ndarray, classes: np.ndarray, queries: np.ndarray, probe: Probe
) -> tuple[np.ndarray, float]:
    """Predict the class of each query, (q,), with one-vs-rest models. Also return C, chosen by accuracy.

    train: (n, D). classes: (n,). queries: (q, D).
    """
    model = _fit(train, classes, probe, parallel=train.size > PARALLEL_FROM)
    margins = _products(queries, _weights(model))
    predictions = margins.argmax(1) if margins.shape[1] > 1 else (margins[:, 0] > 0).astype(int)
    return model.classes_[predictions], _chosen_cost(model)


def predict_labels(train: np.ndarray, labels: np.ndarray, queries: np.ndarray, probe: Probe) -> np.ndarray:
    """Return the margin of each query for each label, (q, L). A query gets the labels whose margin is above 0.

    Each label has its own model and its own C. If can_choose_cost is False, C is the first of the costs. A label that
    all training papers have is predicted for all queries, and a label that none of them has is never predicted.

    labels: (n, L), 1 or 0.
    """
    from joblib import Parallel, delayed

    train, constant = train.astype(np.float64), labels.min(0) == labels.max(0)
    num_jobs = -1 if train.size * labels.shape[1] > PARALLEL_FROM else 1
    weights = Parallel(n_jobs=num_jobs)(
        delayed(_label_weights)(train, label, probe) for label in labels[:, ~constant].T
    )
    margins = np.repeat(labels[:1].astype(np.float64), len(queries), axis=0)
    if weights:
        margins[:, ~constant] = _products(queries, np.stack(weights))
    return margins


def _label_weights(train: np.ndarray, label: np.ndarray, probe: Probe) -> np.ndarray:
    """Fit a model to one label (n,), and return its weights (D,)."""
    return _weights(_fit(train, label, probe, choose_cost=bool(can_choose_cost(label))))[0]


def predict_numbers(
    train: np.ndarray, numbers: np.ndarray, queries: np.ndarray, probe: Probe
) -> tuple[np.ndarray, float]:
    """Predict the number of each query, (q,). Also return C, chosen by R^2. numbers: training targets, (n,)."""
    model = _fit(train, numbers, probe, parallel=train.size > PARALLEL_FROM)
    return _products(queries, _weights(model))[:, 0], _chosen_cost(model)


def can_choose_cost(labels: np.ndarray) -> np.ndarray:
    """Return whether every fold can learn each label. labels: (n, ...), 1 or 0."""
    num_with, num_without = labels.sum(0), (1 - labels).sum(0)
    return (np.minimum(num_with, num_without) > 1) & (np.maximum(num_with, num_without) >= FOLDS)


def _weights(model: Any) -> np.ndarray:
    """Return the weights of a fitted model, one row per class, (k, D)."""
    return np.atleast_2d(getattr(model, "best_estimator_", model).coef_)


def _products(queries: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Multiply queries (q, D) by weights (k, D) to (q, k), row by row.

    The last bits of a matrix product depend on its number of rows, so equal papers could get different results, and
    results would depend on the number of ranks.
    """
    queries = np.ascontiguousarray(queries, dtype=np.float64)
    return np.stack([(queries * row).sum(1) for row in weights], axis=1)


def _fit(train: np.ndarray, targets: np.ndarray, probe: Probe, choose_cost: bool = True, parallel: bool = False) -> Any:
    """Return a model fitted to the targets, with C chosen by cross-validation if probe.costs has several.

    parallel: whether to use one process per core.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import LinearSVC, LinearSVR

    common = {"fit_intercept": False, "random_state": SEED, "max_iter": MAX_ITER[probe.learns], "C": probe.costs[0]}
    model = LinearSVR(epsilon=0.0, **common) if probe.learns == "number" else LinearSVC(loss=probe.loss, **common)
    if choose_cost and len(probe.costs) > 1:
        model = GridSearchCV(model, {"C": probe.costs}, cv=FOLDS, n_jobs=-1 if parallel else 1)
    with warnings.catch_warnings():
        # With a large C, models reach the iteration limit, as in the authors' programs.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The least populated class")  # _warn_about_fixed_costs reports it
        return model.fit(np.asarray(train, dtype=np.float64), targets)


def _chosen_cost(model: Any) -> float:
    return float(model.best_params_["C"] if hasattr(model, "best_params_") else model.C)
