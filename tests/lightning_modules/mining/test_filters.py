"""Every filter is compared with a loop."""

import numpy as np
import pytest

from datamodules.ragged import Ragged
from lightning_modules.mining.filters import (
    Sieve,
    absolute_margin,
    different_text,
    first_of_text,
    from_rank,
    not_known_positive,
    positive_score,
    relative_margin,
    sample,
)

rng = np.random.default_rng(0)
NUM_QUERIES, K, NUM_DOCUMENTS = 40, 12, 30
ROWS = np.stack([rng.permutation(NUM_DOCUMENTS)[:K] for _ in range(NUM_QUERIES)])
ROWS[rng.random(ROWS.shape) < 0.1] = -1
SCORES = -np.sort(-rng.standard_normal(ROWS.shape), axis=1)
LISTS = [rng.permutation(NUM_DOCUMENTS)[: rng.integers(1, 5)].tolist() for _ in range(NUM_QUERIES)]
QUERY_ROWS = rng.integers(-1, NUM_DOCUMENTS, NUM_QUERIES)
TEXTS = rng.integers(0, 20, NUM_DOCUMENTS)
TEXT_OF_QUERY = rng.integers(0, 25, NUM_QUERIES)
POSITIVE = rng.standard_normal(NUM_QUERIES)


def loop(keeps):
    """Return keeps(query, rank, row) for each candidate, (Q, k); False for row -1."""
    return np.array([[row >= 0 and keeps(q, j, row) for j, row in enumerate(ROWS[q])] for q in range(NUM_QUERIES)])


def check_same(keeps, expected):
    assert ((keeps & (ROWS >= 0)) == expected).all()
    assert 0 < expected.sum() < (ROWS >= 0).sum()  # the filter removes some candidates, but not all


def test_known_positives_and_the_query_itself_are_dropped():
    check_same(
        not_known_positive(ROWS, Ragged.of(LISTS), QUERY_ROWS),
        loop(lambda q, j, row: row not in LISTS[q] and row != QUERY_ROWS[q]),
    )


def test_texts_of_positives_and_of_the_query_are_dropped():
    def keeps(q, j, row):
        return TEXTS[row] not in {TEXTS[p] for p in LISTS[q]} | {TEXT_OF_QUERY[q]}

    check_same(different_text(ROWS, Ragged.of(LISTS), TEXTS, TEXT_OF_QUERY), loop(keeps))


def test_only_the_first_document_of_a_text_is_kept():
    check_same(first_of_text(TEXTS)[ROWS], loop(lambda q, j, row: TEXTS[row] not in TEXTS[:row]))


def test_nearest_ranks_are_dropped():
    check_same(from_rank(ROWS, 5), loop(lambda q, j, row: j >= 5))


@pytest.mark.parametrize("margin", [0.0, 0.05, 0.5])
def test_margins_match_a_loop(margin):
    def below(q, j, row):
        return SCORES[q, j] < POSITIVE[q] - margin * abs(POSITIVE[q])

    check_same(relative_margin(SCORES, POSITIVE, margin), loop(below))
    check_same(absolute_margin(SCORES, POSITIVE, margin), loop(lambda q, j, row: SCORES[q, j] < POSITIVE[q] - margin))
    assert relative_margin(np.array([[0.94, 0.96]]), np.array([1.0]), 0.05).tolist() == [[True, False]]


@pytest.mark.parametrize(("which", "function"), [("mean", np.mean), ("lowest", min), ("highest", max)])
def test_positive_score_is_the_mean_lowest_or_highest(which, function):
    lists = Ragged.of(LISTS)
    scores = rng.standard_normal(lists[0][-1])
    expected = [function(scores[a:b]) for a, b in zip(lists[0], lists[0][1:], strict=False)]
    np.testing.assert_allclose(positive_score(scores, lists, which), expected)


def test_sieve_counts_what_each_filter_removes():
    sieve = Sieve(ROWS)
    first, second = from_rank(ROWS, 3), SCORES < 0
    sieve.apply("first", first)
    sieve.apply("second", second)
    present = ROWS >= 0
    assert sieve.removed == {"first": int((present & ~first).sum()), "second": int((present & first & ~second).sum())}
    assert (sieve.kept == (present & first & second)).all()


@pytest.mark.parametrize("how", ["top", "random", "softmax"])
@pytest.mark.parametrize("count", [1, 4, 50])
def test_sample_takes_at_most_count_of_the_kept_candidates(how, count):
    kept = (ROWS >= 0) & (SCORES < 0.5)
    chosen = sample(SCORES, kept, count, how, (1, 2))
    assert (kept | ~chosen).all()
    assert (chosen.sum(1) == np.minimum(kept.sum(1), count)).all()
    assert (sample(SCORES, kept, count, how, (1, 2)) == chosen).all()
    if count == 4:
        assert (sample(SCORES, kept, count, how, (1, 3)) == chosen).all() == (how == "top")


def test_top_sample_takes_the_first_kept_candidates():
    kept = (ROWS >= 0) & (rng.random(ROWS.shape) < 0.7)
    chosen = sample(SCORES, kept, 3, "top")
    for q in range(NUM_QUERIES):
        assert np.flatnonzero(chosen[q]).tolist() == np.flatnonzero(kept[q])[:3].tolist()


def test_softmax_sample_follows_its_probabilities():
    scores = np.tile(np.array([[0.3, 0.2, 0.0, 0.9]]), (40_000, 1))
    kept = np.tile(np.array([[True, True, True, False]]), (40_000, 1))
    share = sample(scores, kept, 1, "softmax", (0,), temperature=0.1).mean(0)
    weights = np.exp(np.array([3.0, 2.0, 0.0]))
    np.testing.assert_allclose(share, [*(weights / weights.sum()), 0], atol=0.01)
    even = sample(scores, kept, 1, "random", (0,)).mean(0)
    np.testing.assert_allclose(even, [1 / 3, 1 / 3, 1 / 3, 0], atol=0.01)
