"""The losses of a row against a few lines of numpy. (The whole objective: test_objective.py.)"""

import numpy as np
import pytest
import torch

from lightning_modules.losses import FORMS, comparable, info_nce, kl_divergence, margin_mse
from tests.lightning_modules.objective_reference import row_loss


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("in_denominator", [False, True])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_info_nce_equals_numpy(form, in_denominator, scale):
    rng = np.random.default_rng(0)
    scores = scale * rng.normal(size=(20, 9))
    positives = np.stack([rng.permutation(9)[:3] for _ in range(20)])
    positives[5:10, 2] = positives[10:, 1:] = -1
    forbidden = [{c for c in range(9) if rng.random() < 0.3} for _ in range(20)]
    masked = torch.tensor(scores)
    for b, columns in enumerate(forbidden):
        masked[b, [c for c in columns if c not in positives[b]]] = -torch.inf
    found = info_nce(masked, torch.tensor(positives), form, in_denominator)
    for b in range(20):
        wanted = row_loss(scores[b], [p for p in positives[b] if p >= 0], forbidden[b], form, in_denominator)
        assert found[b].item() == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def test_one_positive_is_cross_entropy_in_every_form():
    torch.manual_seed(0)
    scores, positives = torch.randn(4, 7), torch.tensor([[3], [0], [6], [6]])
    wanted = torch.nn.functional.cross_entropy(scores, positives[:, 0], reduction="none")
    for form in FORMS:
        for in_denominator in (False, True):
            assert torch.equal(info_nce(scores, positives, form, in_denominator), wanted)
    padded = torch.cat([positives, torch.full((4, 2), -1)], 1)
    for form in FORMS:
        torch.testing.assert_close(info_nce(scores, padded, form), wanted)


def test_the_teachers_own_scores_have_no_divergence_and_no_error():
    torch.manual_seed(0)
    scores, candidates = torch.randn(4, 7), torch.rand(4, 7) < 0.6
    positives = torch.tensor([[0, 2], [1, -1], [2, 5], [3, -1]])
    candidates.scatter_(1, positives.clamp(min=0), True)
    assert kl_divergence(scores, scores, candidates).abs().max() < 1e-6
    assert margin_mse(scores, scores + 3.0, positives, candidates).abs().max() < 1e-10
    assert (kl_divergence(scores, -scores, candidates) > 1e-3).all()


def test_a_query_without_negatives_has_no_margins():
    student = torch.randn(1, 3, requires_grad=True)
    loss = margin_mse(student, torch.randn(1, 3), torch.tensor([[1]]), torch.tensor([[False, True, False]]))
    loss.sum().backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros(1, 3))


def test_half_precision_is_made_float32():
    vectors = torch.randn(2, 768) * 10
    assert comparable(vectors.bfloat16()).dtype == torch.float32
    assert comparable(vectors.double()).dtype == torch.float64
    torch.testing.assert_close(comparable(vectors, "cosine").norm(dim=1), torch.ones(2))


def test_unknown_similarity_is_refused():
    with pytest.raises(ValueError, match="'l2', allowed are dot, cosine"):
        comparable(torch.ones(1, 2), "l2")
