"""What a linear model tells of papers by their vectors, as runs: their class, their labels, or a number.

Source: allenai/scirepeval, evaluation/evaluator.py and evaluation/few_shot_evaluator.py.

Shapes: n training papers, q queries, D dimensions, L documents of the corpus (classes, labels, or the one number).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from datamodules.records import Benchmark, UserError
from lightning_modules.retrieval.linear import (
    FOLDS,
    SEED,
    can_choose,
    check_installed,
    predict_classes,
    predict_labels,
    predict_numbers,
)
from lightning_modules.retrieval.metrics import Run

log = logging.getLogger(__name__)


def probe_runs(benchmark: Benchmark, ids: Sequence[str], queries: np.ndarray, train: np.ndarray) -> Iterator[Run]:
    """The run of some queries, or in few-shot learning one for each draw of training papers.

    ids: of the queries (q, D). train: (n, D) vectors of the papers of benchmark.training, in their order. A run has
    each query's class; or its labels, surest first; or its number, as the score of the corpus's one document. Raises
    UserError for a paper without or with several classes, too few papers of a class or label, or without scikit-learn.
    """
    check_installed()
    probe, names = benchmark.probe, list(benchmark.corpus)
    wanted = {"class": _classes, "labels": _labels, "number": _numbers}[probe.learns](benchmark, names)
    if not probe.samples:
        log.info("%s: %d papers, %d values of C", benchmark.name, len(train), len(probe.costs))
        yield _run(benchmark, ids, names, queries, train, wanted)
        return
    for number, rows in enumerate(_draws(benchmark, wanted, names), start=1):
        if probe.learns == "class":
            _check_classes(benchmark, names, wanted[rows], f"draw {number}: ")
        elif number == 1:
            _tell_fixed(benchmark, names, wanted[rows])
        yield _run(benchmark, ids, names, queries, train[rows], wanted[rows])


def _run(benchmark: Benchmark, ids, names: list[str], queries: np.ndarray, train: np.ndarray, wanted: np.ndarray):
    probe = benchmark.probe
    if not len(ids):  # a rank without queries
        width = len(names) if probe.learns == "labels" else 1
        return Run(ids, names, np.full((0, width), -1), np.zeros((0, width)))
    if probe.learns == "labels":
        sure = predict_labels(train, wanted, queries, probe)
        order = np.argsort(-sure, axis=1, kind="stable")
        scores = np.take_along_axis(sure, order, axis=1)
        return Run(ids, names, np.where(scores > 0, order, -1), scores)
    predict = predict_classes if probe.learns == "class" else predict_numbers
    found, c = predict(train, wanted, queries, probe)
    if not probe.samples:
        log.info("%s: C = %g", benchmark.name, c)
    if probe.learns == "class":
        return Run(ids, names, found[:, None], np.ones((len(ids), 1), dtype=np.float32))
    return Run(ids, names, np.zeros((len(ids), 1), dtype=np.int64), found[:, None])


def _draws(benchmark: Benchmark, wanted: np.ndarray, names: list[str]) -> Iterator[np.ndarray]:
    """Rows of the training papers of each draw.

    Of classes, the papers are dealt into parts of the wanted size that have the classes' shares, in their order, and
    each part is a draw. Of labels, each draw takes papers of each label at random.
    """
    from sklearn.model_selection import StratifiedKFold

    probe = benchmark.probe
    if probe.learns == "labels":
        counts = wanted.sum(0)
        if counts.min() < probe.samples:
            few = f"{counts.min()} training papers of {names[counts.argmin()]!r}"
            raise UserError(f"{benchmark.name}: {few}, needed are {probe.samples} of each label")
        for draw in range(probe.draws):
            random, rows = np.random.RandomState(SEED + draw), set()
            for label in range(len(names)):
                rows.update(random.choice(np.flatnonzero(wanted[:, label]), probe.samples, replace=False).tolist())
            yield np.array(list(rows))  # in the set's order, as there: the folds of cross-validation follow from it
        return
    parts = -(-len(wanted) // probe.samples)
    if parts < 2 or np.bincount(wanted).max() < parts:
        raise UserError(f"{benchmark.name}: {len(wanted)} training papers do not make parts of {probe.samples}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # some parts are without it, as there
        splits = list(StratifiedKFold(parts).split(wanted, wanted))
    size = len(wanted) // parts
    if size < 0.9 * probe.samples:  # of many parts, a paper less in some is what the procedure means
        few = "%s: %d training papers make parts of %d, not of %d: samples=%d says what is measured"
        log.warning(few, benchmark.name, len(wanted), size, probe.samples, size)
    if parts < probe.draws:
        log.info("%s: %d draws, as the training papers make no more", benchmark.name, parts)
    yield from (rows for _, rows in splits[: probe.draws])


def _classes(benchmark: Benchmark, names: Sequence[str]) -> np.ndarray:
    """(n,) position of each training paper's class."""
    place, found = {name: position for position, name in enumerate(names)}, []
    for paper, grades in benchmark.training[1].items():
        own = [name for name, grade in grades.items() if grade > 0]
        if len(own) != 1:
            raise UserError(f"{benchmark.name}: training paper {paper!r} has {len(own)} classes, an SVM needs one")
        found.append(place[own[0]])
    _check_classes(benchmark, names, found)
    return np.array(found)


def _check_classes(benchmark: Benchmark, names: Sequence[str], classes: Sequence[int], whose: str = "") -> None:
    """Raise UserError if training papers of these classes are of one, or too few of one for the folds."""
    present, counts = np.unique(classes, return_counts=True)
    least = FOLDS if len(benchmark.probe.costs) > 1 else 1
    if len(present) < 2 or counts.min() < least:
        raise UserError(
            f"{benchmark.name}: {whose}{counts.min()} training papers of {names[present[counts.argmin()]]!r}, and "
            f"{len(present)} classes; needed are two classes and {least} papers of each"
        )


def _labels(benchmark: Benchmark, names: Sequence[str]) -> np.ndarray:
    """(n, L), 1 where a training paper has a label."""
    if len(names) < 2:
        raise UserError(f"{benchmark.name}: has {len(names)} labels, needed are two")
    rows = [[grades.get(name, 0) > 0 for name in names] for grades in benchmark.training[1].values()]
    labels = np.array(rows, dtype=np.int64)
    if alike := [name for name, share in zip(names, labels.mean(0), strict=True) if share in (0, 1)]:
        log.warning(
            "%s: no training papers tell %d labels apart, the first is %s", benchmark.name, len(alike), alike[0]
        )
    if not benchmark.probe.samples:
        _tell_fixed(benchmark, names, labels)
    return labels


def _tell_fixed(benchmark: Benchmark, names: Sequence[str], labels: np.ndarray) -> None:
    """Warn of labels (n, L) for which no C is chosen."""
    told_apart, costs = labels.min(0) < labels.max(0), benchmark.probe.costs
    fixed = np.flatnonzero(told_apart & ~can_choose(labels)) if len(costs) > 1 else ()
    if len(fixed):
        log.warning(
            "%s: too few training papers have or lack %d labels to choose their C, which is %g; the first is %s",
            *(benchmark.name, len(fixed), costs[0], names[fixed[0]]),
        )


def _numbers(benchmark: Benchmark, names: Sequence[str]) -> np.ndarray:
    """(n,) the number of each training paper."""
    if len(names) != 1:
        raise UserError(f"{benchmark.name}: expected a corpus of one document, whose grades are the numbers")
    return np.array([grades[names[0]] for grades in benchmark.training[1].values()], dtype=np.float64)
