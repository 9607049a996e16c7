"""Masks against sets and loops."""

import numpy as np
import pytest
import torch

from lightning_modules.losses import guide_mask, keep_own, known_positive_mask, repeated
from tests.lightning_modules.objective_reference import guided


def test_known_positives_are_membership():
    known = torch.tensor([[3, 9, -1], [-1, -1, -1], [7, 7, 100]])
    ids = torch.tensor([9, 7, 3, 7, 8])
    wanted = [[True, False, True, False, False], [False] * 5, [False, True, False, True, False]]
    assert known_positive_mask(known, ids).tolist() == wanted


def test_known_positives_beyond_all_documents():
    assert known_positive_mask(torch.tensor([[10**15, 0]]), torch.tensor([5])).tolist() == [[False]]


@pytest.mark.parametrize("seed", range(5))
def test_known_positives_are_membership_at_random(seed):
    rng = np.random.default_rng(seed)
    known, ids = rng.integers(-1, 30, (7, 6)), rng.integers(0, 30, 50)
    wanted = [[bool(i in row) for i in ids] for row in known]
    assert known_positive_mask(torch.tensor(known), torch.tensor(ids)).tolist() == wanted


def test_repeated():
    assert repeated(torch.tensor([4, 7, 4, 4, 1, 7])).tolist() == [False, False, True, True, False, True]


def test_own_positives_are_kept_and_padding_keeps_nothing():
    kept = keep_own(torch.ones(2, 4, dtype=torch.bool), torch.tensor([[1, 3], [2, -1]]))
    assert kept.tolist() == [[True, False, True, False], [True, True, False, True]]


@pytest.mark.parametrize("kind", ["absolute", "relative"])
@pytest.mark.parametrize("margin", [0.0, 0.4])
def test_guide(kind, margin):
    rng = np.random.default_rng(0)
    scores, positives = rng.normal(size=(8, 10)), rng.integers(0, 10, (8, 2))
    positives[4:, 1] = -1
    found = guide_mask(torch.tensor(scores), torch.tensor(positives), margin, kind)
    for b in range(8):
        wanted = guided(scores[b], [p for p in positives[b] if p >= 0], margin, kind)
        assert set(found[b].nonzero()[:, 0].tolist()) == wanted
