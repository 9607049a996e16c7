"""Labels and scores of the pairs of a query and a document in a batch."""

import torch

from lightning_modules.auxiliary.pairs import in_batch_pairs, sum_over_pairs
from tests.lightning_modules.auxiliary.batches import batch_of


def test_positives_that_were_not_sampled_are_positives_and_the_query_and_texts_like_it_are_unknown():
    batch = batch_of([[0, 3], [1]], 6)
    batch.rows = torch.tensor([4, 9, *range(6)])  # query 0 is document 4
    batch.known_positives = torch.tensor([[0, 3, 4], [1, -1, -1]])
    batch.text_keys = torch.tensor([50, 51, 10, 11, 12, 10, 50, 11])  # document 3 reads as 0, 4 as query 0, 5 as 1
    pairs = in_batch_pairs(batch, torch.eye(8), "dot")
    assert [row.nonzero().flatten().tolist() for row in pairs.positive] == [[0, 3], [1]]
    assert [row.nonzero().flatten().tolist() for row in pairs.known] == [[0, 1, 2, 3, 5], [0, 1, 2, 3, 4]]
    assert pairs.query_rows.tolist() == [4, 9]
    assert pairs.document_rows.tolist() == list(range(6))


def test_scores_are_those_of_the_similarity():
    batch, vectors = batch_of([[0], [1]], 3), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    dot, cosine = (in_batch_pairs(batch, vectors, similarity).scores for similarity in ("dot", "cosine"))
    torch.testing.assert_close(dot, vectors[:2] @ vectors[2:].T)
    norms = vectors.norm(dim=1)
    torch.testing.assert_close(cosine, dot / norms[:2, None] / norms[2:])


def test_sum_over_pairs_is_the_mean_over_queries_and_ignores_what_is_not_chosen():
    values = torch.tensor([[1.0, torch.nan], [2.0, 3.0], [torch.inf, 7.0]])
    assert sum_over_pairs(values, torch.tensor([[True, False], [True, True], [False, False]])).item() == 2.0
