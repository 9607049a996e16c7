"""Papers into classes by a linear SVM over their vectors, as the program of SciDocs measures it.

Source: allenai/scidocs, scidocs/classification.py: one class against the others, squared hinge loss, no intercept, and
the C of the best accuracy in three-fold cross-validation of the training papers, which are the only ones trained on.

Shapes: n training papers, q queries, D dimensions.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

import numpy as np

from datamodules.records import Benchmark, UserError
from lightning_modules.metrics import Run

log = logging.getLogger(__name__)

CS = np.logspace(-4, 2, 7)
FOLDS = 3
ALONE = 2**19  # values that one process has done with before others have started


def predict(train: np.ndarray, classes: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, float]:
    """The class (q,) of each query, and the C that was chosen. train: (n, D) vectors of classes (n,). queries: (q, D).

    Raises UserError if scikit-learn is not there.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.model_selection import GridSearchCV
        from sklearn.svm import LinearSVC
    except ImportError as error:
        raise UserError("a linear SVM needs scikit-learn (make install EXTRAS=cpu,svm)") from error
    svm = LinearSVC(loss="squared_hinge", fit_intercept=False, random_state=42)
    jobs = -1 if train.size > ALONE else 1  # processes, one a core
    search = GridSearchCV(svm, {"C": CS}, cv=FOLDS, n_jobs=jobs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the largest Cs end at the limit of iterations, there too
        search.fit(train.astype(np.float64), classes)
    return search.predict(queries.astype(np.float64)), float(search.best_params_["C"])


def classify(benchmark: Benchmark, ids: Sequence[str], queries: np.ndarray, train: np.ndarray) -> Run:
    """The run of some queries, each with the one class that an SVM puts it into.

    ids: of the queries (q, D). train: (n, D) vectors of the papers of benchmark.training, in their order. Raises
    UserError for a paper without or with several classes, or too few papers of a class.
    """
    names = list(benchmark.corpus)
    classes = _classes(benchmark, names)
    present, counts = np.unique(classes, return_counts=True)
    if len(present) < 2 or counts.min() < FOLDS:
        raise UserError(
            f"{benchmark.name}: {counts.min()} training papers of {names[present[counts.argmin()]]!r}, and "
            f"{len(present)} classes; needed are two classes and {FOLDS} papers of each"
        )
    log.info("%s: an SVM of %d papers, for %d values of C in %d folds", benchmark.name, len(train), len(CS), FOLDS)
    found, c = predict(train, classes, queries)
    log.info("%s: C = %g", benchmark.name, c)
    return Run(ids, names, found[:, None], np.ones((len(ids), 1), dtype=np.float32))


def _classes(benchmark: Benchmark, names: Sequence[str]) -> np.ndarray:
    """(n,) position of each training paper's class."""
    place, found = {name: position for position, name in enumerate(names)}, []
    for paper, grades in benchmark.training[1].items():
        own = [name for name, grade in grades.items() if grade > 0]
        if len(own) != 1:
            raise UserError(f"{benchmark.name}: training paper {paper!r} has {len(own)} classes, an SVM needs one")
        found.append(place[own[0]])
    return np.array(found)
