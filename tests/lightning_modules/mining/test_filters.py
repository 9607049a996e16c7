"""Every filter against a loop."""

import numpy as np
import pytest

from datamodules.examples import ragged
from lightning_modules.mining.filters import (
    Sieve,
    absolute_margin,
    originals,
    other_text,
    positive_score,
    rank_window,
    relative_margin,
    sample,
    unknown,
)

rng = np.random.default_rng(0)
NUM_QUERIES, K, NUM_DOCUMENTS = 40, 12, 30
ROWS = np.stack([rng.permutation(NUM_DOCUMENTS)[:K] for _ in range(NUM_QUERIES)])
ROWS[rng.random(ROWS.shape) < 0.1] = -1
SCORES = -np.sort(-rng.standard_normal(ROWS.shape), axis=1)
LISTS = [rng.permutation(NUM_DOCUMENTS)[: rng.integers(1, 5)].tolist() for _ in range(NUM_QUERIES)]
OWN = rng.integers(-1, NUM_DOCUMENTS, NUM_QUERIES)
TEXTS = rng.integers(0, 20, NUM_DOCUMENTS)
TEXT_OF_QUERY = rng.integers(0, 25, NUM_QUERIES)
POSITIVE = rng.standard_normal(NUM_QUERIES)


def each(keeps):
    """(Q, k) of a function of query and candidate; places without a document do not count."""
    return np.array([[row >= 0 and keeps(q, j, row) for j, row in enumerate(ROWS[q])] for q in range(NUM_QUERIES)])


def same(found, wanted):
    assert ((found & (ROWS >= 0)) == wanted).all()
    assert 0 < wanted.sum() < (ROWS >= 0).sum()  # it takes some, and not all


def test_known_positives_and_the_query_itself():
    same(unknown(ROWS, ragged(LISTS), OWN), each(lambda q, j, row: row not in LISTS[q] and row != OWN[q]))


def test_what_reads_as_a_positive_or_as_the_query():
    def keeps(q, j, row):
        return TEXTS[row] not in {TEXTS[p] for p in LISTS[q]} | {TEXT_OF_QUERY[q]}

    same(other_text(ROWS, ragged(LISTS), TEXTS, TEXT_OF_QUERY), each(keeps))


def test_copies():
    same(originals(TEXTS)[ROWS], each(lambda q, j, row: TEXTS[row] not in TEXTS[:row]))


def test_first_ranks():
    same(rank_window(ROWS, 5), each(lambda q, j, row: j >= 5))


@pytest.mark.parametrize("margin", [0.0, 0.05, 0.5])
def test_margins(margin):
    def below(q, j, row):
        return SCORES[q, j] < POSITIVE[q] - margin * abs(POSITIVE[q])

    same(relative_margin(SCORES, POSITIVE, margin), each(below))
    same(absolute_margin(SCORES, POSITIVE, margin), each(lambda q, j, row: SCORES[q, j] < POSITIVE[q] - margin))
    assert relative_margin(np.array([[0.94, 0.96]]), np.array([1.0]), 0.05).tolist() == [[True, False]]


@pytest.mark.parametrize(("which", "function"), [("mean", np.mean), ("lowest", min), ("highest", max)])
def test_the_positives_score(which, function):
    lists = ragged(LISTS)
    scores = rng.standard_normal(lists[0][-1])
    wanted = [function(scores[a:b]) for a, b in zip(lists[0], lists[0][1:], strict=False)]
    np.testing.assert_allclose(positive_score(scores, lists, which), wanted)


def test_filters_say_how_many_they_took():
    sieve = Sieve(ROWS)
    first, second = rank_window(ROWS, 3), SCORES < 0
    sieve.apply("first", first)
    sieve.apply("second", second)
    there = ROWS >= 0
    assert sieve.taken == {"first": int((there & ~first).sum()), "second": int((there & first & ~second).sum())}
    assert (sieve.kept == (there & first & second)).all()


@pytest.mark.parametrize("how", ["top", "random", "softmax"])
@pytest.mark.parametrize("count", [1, 4, 50])
def test_a_sample_has_what_was_kept_and_no_more_than_asked(how, count):
    kept = (ROWS >= 0) & (SCORES < 0.5)
    chosen = sample(SCORES, kept, count, how, (1, 2))
    assert (kept | ~chosen).all()
    assert (chosen.sum(1) == np.minimum(kept.sum(1), count)).all()
    assert (sample(SCORES, kept, count, how, (1, 2)) == chosen).all()
    if count == 4:
        assert (sample(SCORES, kept, count, how, (1, 3)) == chosen).all() == (how == "top")


def test_the_top_is_the_first_that_are_kept():
    kept = (ROWS >= 0) & (rng.random(ROWS.shape) < 0.7)
    chosen = sample(SCORES, kept, 3, "top")
    for q in range(NUM_QUERIES):
        assert np.flatnonzero(chosen[q]).tolist() == np.flatnonzero(kept[q])[:3].tolist()


def test_softmax_draws_by_its_probabilities():
    scores = np.tile(np.array([[0.3, 0.2, 0.0, 0.9]]), (40_000, 1))
    kept = np.tile(np.array([[True, True, True, False]]), (40_000, 1))
    share = sample(scores, kept, 1, "softmax", (0,), temperature=0.1).mean(0)
    weights = np.exp(np.array([3.0, 2.0, 0.0]))
    np.testing.assert_allclose(share, [*(weights / weights.sum()), 0], atol=0.01)
    even = sample(scores, kept, 1, "random", (0,)).mean(0)
    np.testing.assert_allclose(even, [1 / 3, 1 / 3, 1 / 3, 0], atol=0.01)
