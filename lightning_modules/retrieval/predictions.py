"""Metrics of what is predicted, as pure functions of arrays: F1 of classes or labels, and the order of numbers.

Shapes: Q queries. Counts are (3, number of classes): how often each is predicted rightly, is predicted, and is true.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from datamodules.records import UserError


def macro_f1(counts: np.ndarray) -> float:
    """Mean of the F1 of all classes that are predicted or true of some query."""
    hits, both = counts[0], counts[1] + counts[2]
    return float((2 * hits[both > 0] / both[both > 0]).mean()) if both.any() else 0.0


def macro_f1_of_labels(counts: np.ndarray) -> float:
    """The same where a query may have any number of labels: over all, 0 of one that is neither predicted nor true."""
    return float((2 * counts[0] / np.maximum(1, counts[1] + counts[2])).mean())


def micro_f1(counts: np.ndarray) -> float:
    """F1 of all decisions together; where each query has one class, the share that is right."""
    return float(2 * counts[0].sum() / max(1, (counts[1] + counts[2]).sum()))


def binary_f1(counts: np.ndarray) -> float:
    """F1 of the second of two classes. Raises UserError for another number of them."""
    if counts.shape[1] != 2:
        raise UserError(
            f"metric f1: there are {counts.shape[1]} classes, it is of the second of two (macro_f1 is of all)"
        )
    return float(2 * counts[0, 1] / max(1, counts[1, 1] + counts[2, 1]))


AGGREGATES: dict[str, Callable[[np.ndarray], float]] = {"macro_f1": macro_f1, "micro_f1": micro_f1, "f1": binary_f1}
OF_LABELS = AGGREGATES | {"macro_f1": macro_f1_of_labels}


def class_counts(predicted: np.ndarray, queries: np.ndarray, classes: np.ndarray, num_classes: int) -> np.ndarray:
    """(3, num_classes): how often each class is predicted rightly, is predicted, and is true.

    predicted: (Q, p) the classes of each query, each once, padded with -1. queries, classes: (n,) pairs that are true.
    """
    right = classes[(predicted[queries] == classes[:, None]).any(1)]
    made = predicted[predicted >= 0]
    return np.stack([np.bincount(part, minlength=num_classes) for part in (right, made, classes)])


def kendall_tau(predicted: np.ndarray, true: np.ndarray) -> float:
    """Kendall's tau-b of two orders (Q,); 0 where all of one are equal. Raises UserError without SciPy."""
    try:
        from scipy.stats import kendalltau
    except ImportError as error:
        raise UserError(
            "kendall_tau needs SciPy, which comes with scikit-learn (make install EXTRAS=cpu,svm)"
        ) from error
    found = float(kendalltau(predicted, true).statistic)
    return 0.0 if np.isnan(found) else found


CORRELATIONS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {"kendall_tau": kendall_tau}
