"""InfoNCE against a few lines of numpy, and masks against sets."""

import numpy as np
import pytest
import torch

from lightning_modules.losses import info_nce, known_positive_mask, mask_scores, similarity_scores


def numpy_loss(queries, documents, positives, forbidden, temperature, cosine):
    if cosine:
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        documents = documents / np.linalg.norm(documents, axis=1, keepdims=True)
    losses = []
    for b, query in enumerate(queries):
        allowed = [m for m in range(len(documents)) if m == positives[b] or m not in forbidden[b]]
        scores = np.array([query @ documents[m] for m in allowed]) / temperature
        losses.append(np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[allowed.index(positives[b])])
    return np.mean(losses)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("temperature", [1.0, 0.05])
@pytest.mark.parametrize("seed", range(3))
def test_equals_numpy(similarity, temperature, seed):
    rng = np.random.default_rng(seed)
    queries, documents = rng.normal(size=(5, 8)), rng.normal(size=(11, 8))
    ids = rng.permutation(50)[:11]
    positives = rng.integers(0, 11, 5)
    known = [{int(ids[positives[b]]), *rng.choice(ids, 3).tolist(), 777} for b in range(5)]
    forbidden = [{m for m in range(11) if ids[m] in known[b]} for b in range(5)]
    padded = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(sorted(k)) for k in known], batch_first=True, padding_value=-1
    )
    scores = similarity_scores(torch.tensor(queries), torch.tensor(documents), similarity)
    mask = known_positive_mask(padded, torch.tensor(ids))
    scores = mask_scores(scores, torch.tensor(positives), mask)
    loss = info_nce(scores, torch.tensor(positives), temperature)
    wanted = numpy_loss(queries, documents, positives, forbidden, temperature, similarity == "cosine")
    assert abs(loss.item() - wanted) < 1e-9


def test_mask_is_membership():
    known = torch.tensor([[3, 9, -1], [-1, -1, -1], [7, 7, 100]])
    ids = torch.tensor([9, 7, 3, 7, 8])
    wanted = [[True, False, True, False, False], [False] * 5, [False, True, False, True, False]]
    assert known_positive_mask(known, ids).tolist() == wanted


def test_mask_with_ids_beyond_all_documents():
    assert known_positive_mask(torch.tensor([[10**15, 0]]), torch.tensor([5])).tolist() == [[False]]


def test_the_sampled_positive_is_never_masked():
    scores = mask_scores(torch.zeros(2, 3), torch.tensor([0, 2]), torch.ones(2, 3, dtype=torch.bool))
    assert torch.isfinite(scores).tolist() == [[True, False, False], [False, False, True]]
    assert info_nce(scores, torch.tensor([0, 2])).item() == 0


def test_masked_documents_get_no_gradient():
    queries, documents = torch.randn(2, 4), torch.randn(3, 4, requires_grad=True)
    mask = torch.tensor([[False, True, False], [False, True, False]])
    positives = torch.tensor([0, 2])
    info_nce(mask_scores(similarity_scores(queries, documents), positives, mask), positives).backward()
    assert torch.equal(documents.grad[1], torch.zeros(4))
    assert (documents.grad[[0, 2]] != 0).all()


def test_gradients_in_float64():
    torch.manual_seed(0)
    inputs = (
        torch.randn(3, 4, dtype=torch.float64, requires_grad=True),
        torch.randn(5, 4, dtype=torch.float64, requires_grad=True),
    )
    positives, mask = torch.tensor([0, 1, 4]), torch.rand(3, 5) < 0.4

    def loss(queries, documents):
        return info_nce(mask_scores(similarity_scores(queries, documents, "cosine"), positives, mask), positives, 0.5)

    assert torch.autograd.gradcheck(loss, inputs)


def test_half_precision_is_scored_in_float32():
    queries, documents = torch.randn(2, 768) * 10, torch.randn(3, 768) * 10
    scores = similarity_scores(queries.bfloat16(), documents.bfloat16())
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, queries.bfloat16().float() @ documents.bfloat16().float().T)
    assert similarity_scores(queries.double(), documents.double()).dtype == torch.float64


def test_unknown_similarity_is_refused():
    with pytest.raises(ValueError, match="'l2', allowed are dot, cosine"):
        similarity_scores(torch.ones(1, 2), torch.ones(1, 2), "l2")
