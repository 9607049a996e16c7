"""Losses and masks equal numpy loops. The whole objective is tested in test_objective.py."""

import numpy as np
import pytest
import torch

from lightning_modules.losses import (
    comparable,
    duplicate_mask,
    guide_mask,
    info_nce,
    kl_divergence,
    margin_mse,
    membership_mask,
    unmask_positives,
)
from tests.lightning_modules.objective_reference import above_guide, row_loss

FORMS = ("mean_log", "log_mean")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("in_denominator", [False, True])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_info_nce_equals_numpy(form, in_denominator, scale):
    rng = np.random.default_rng(0)
    scores = scale * rng.normal(size=(20, 9))
    positives = np.stack([rng.permutation(9)[:3] for _ in range(20)])
    positives[5:10, 2] = positives[10:, 1:] = -1
    masked = [{c for c in range(9) if rng.random() < 0.3} for _ in range(20)]
    masked_scores = torch.tensor(scores)
    for b, columns in enumerate(masked):
        masked_scores[b, [c for c in columns if c not in positives[b]]] = -torch.inf
    losses = info_nce(masked_scores, torch.tensor(positives), form, in_denominator)
    for b in range(20):
        expected = row_loss(scores[b], [p for p in positives[b] if p >= 0], masked[b], form, in_denominator)
        assert losses[b].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_with_one_positive_every_form_is_cross_entropy():
    torch.manual_seed(0)
    scores, positives = torch.randn(4, 7), torch.tensor([[3], [0], [6], [6]])
    expected = torch.nn.functional.cross_entropy(scores, positives[:, 0], reduction="none")
    for form in FORMS:
        for in_denominator in (False, True):
            assert torch.equal(info_nce(scores, positives, form, in_denominator), expected)
    padded = torch.cat([positives, torch.full((4, 2), -1)], 1)
    for form in FORMS:
        torch.testing.assert_close(info_nce(scores, padded, form), expected)


def test_distillation_loss_is_zero_for_the_scores_of_the_teacher():
    torch.manual_seed(0)
    scores, candidates = torch.randn(4, 7), torch.rand(4, 7) < 0.6
    positives = torch.tensor([[0, 2], [1, -1], [2, 5], [3, -1]])
    candidates.scatter_(1, positives.clamp(min=0), True)
    assert kl_divergence(scores, scores, candidates).abs().max() < 1e-6
    assert margin_mse(scores, scores + 3.0, positives, candidates).abs().max() < 1e-10
    assert (kl_divergence(scores, -scores, candidates) > 1e-3).all()


def test_margin_mse_is_zero_without_negatives():
    student = torch.randn(1, 3, requires_grad=True)
    loss = margin_mse(student, torch.randn(1, 3), torch.tensor([[1]]), torch.tensor([[False, True, False]]))
    loss.sum().backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros(1, 3))


def test_half_precision_is_compared_in_float32():
    vectors = torch.randn(2, 768) * 10
    assert comparable(vectors.bfloat16()).dtype == torch.float32
    assert comparable(vectors.double()).dtype == torch.float64
    torch.testing.assert_close(comparable(vectors, "cosine").norm(dim=1), torch.ones(2))


def test_unknown_similarity_raises_value_error():
    with pytest.raises(ValueError, match="one of dot, cosine, got 'l2'"):
        comparable(torch.ones(1, 2), "l2")


def test_membership_mask():
    known = torch.tensor([[3, 9, -1], [-1, -1, -1], [7, 7, 100]])
    ids = torch.tensor([9, 7, 3, 7, 8])
    expected = [[True, False, True, False, False], [False] * 5, [False, True, False, True, False]]
    assert membership_mask(known, ids).tolist() == expected


def test_membership_mask_of_keys_above_all_documents():
    assert membership_mask(torch.tensor([[10**15, 0]]), torch.tensor([5])).tolist() == [[False]]


@pytest.mark.parametrize("seed", range(5))
def test_membership_mask_equals_python_sets(seed):
    rng = np.random.default_rng(seed)
    known, ids = rng.integers(-1, 30, (7, 6)), rng.integers(0, 30, 50)
    expected = [[bool(i in row) for i in ids] for row in known]
    assert membership_mask(torch.tensor(known), torch.tensor(ids)).tolist() == expected


def test_duplicate_mask_spares_the_first_copy():
    assert duplicate_mask(torch.tensor([4, 7, 4, 4, 1, 7])).tolist() == [False, False, True, True, False, True]


def test_positives_are_unmasked_and_padding_unmasks_nothing():
    mask = unmask_positives(torch.ones(2, 4, dtype=torch.bool), torch.tensor([[1, 3], [2, -1]]))
    assert mask.tolist() == [[True, False, True, False], [True, True, False, True]]


@pytest.mark.parametrize("kind", ["absolute", "relative"])
@pytest.mark.parametrize("margin", [0.0, 0.4])
def test_guide_mask_equals_numpy(kind, margin):
    rng = np.random.default_rng(0)
    scores, positives = rng.normal(size=(8, 10)), rng.integers(0, 10, (8, 2))
    positives[4:, 1] = -1
    mask = guide_mask(torch.tensor(scores), torch.tensor(positives), margin, kind)
    for b in range(8):
        expected = above_guide(scores[b], [p for p in positives[b] if p >= 0], margin, kind)
        assert set(mask[b].nonzero()[:, 0].tolist()) == expected
