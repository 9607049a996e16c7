"""Labels and scores of the pairs of a query and a document in a batch."""

import numpy as np
import torch

from datamodules.hard_negatives import Rounds, write_store
from datamodules.records import DROP, Collection, Document, MinedNegatives
from datamodules.tasks import LinkPredictionDataModule, SearchDataModule
from lightning_modules.auxiliary.pairs import in_batch_pairs, sum_over_pairs
from tests.conftest import toy_collection
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


def labelled(data):
    """Return, for each query of the first batch, its id, and the ids of its positives and of unlabelled documents."""
    batch = data.train_dataloader().batches[0]
    pairs = in_batch_pairs(batch, torch.zeros(len(batch.rows), 2), "dot")
    for row, positive, known in zip(pairs.query_rows.tolist(), pairs.positive, pairs.known, strict=True):
        chosen = (pairs.document_rows[mask].tolist() for mask in (positive, ~known))
        yield data.documents[row].id, *({data.documents[document].id for document in each} for each in chosen)


def test_a_query_whose_text_differs_from_its_documents_is_not_a_positive_of_itself(make_task):
    """It was one, because such a query has a row of its own. In BEIR's SciDocs, queries have only the title."""
    collection = toy_collection(6, 10, papers=True)
    titles = {id: Document(id, paper.title) for id, paper in collection.queries.items()}
    data = make_task(
        LinkPredictionDataModule, collection=Collection(collection.corpus, titles, collection.qrels), batch_size=6
    )
    own = 0
    for query, positives, unlabelled in labelled(data):
        assert positives <= {id for id, grade in collection.qrels["train"][query].items() if grade > 0}
        assert unlabelled <= {query}
        own += len(unlabelled)
    assert own > 3


def test_documents_that_a_judge_dropped_have_no_label(make_task, tmp_path):
    """They were positives, because the loss must not use them as negatives."""
    data = make_task(SearchDataModule, batch_size=12, num_positives=2)
    rows = [min(set(range(10)) - {*each.not_negatives, *each.hard_negatives}) for each in data.examples]
    zeros, count = np.zeros(len(rows)), len(rows)
    dropped = MinedNegatives(
        np.arange(count + 1), np.array(rows, dtype=np.int32), zeros, zeros, labels=np.full(count, DROP, dtype=np.int8)
    )
    data.rounds = Rounds(tmp_path, data=data.fingerprints())
    write_store(tmp_path / "store", {"search": dropped}, {"data": data.fingerprints()})
    data.rounds.begin(0, "store")
    by_query = {data.documents[each.query].id: f"d{row}" for each, row in zip(data.examples, rows, strict=True)}
    for query, positives, unlabelled in labelled(data):
        grades = data.collections["toy"].qrels["train"][query]
        assert positives == {id for id, grade in grades.items() if grade > 0}
        assert unlabelled == {by_query[query]}


def test_scores_are_those_of_the_similarity():
    batch, vectors = batch_of([[0], [1]], 3), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    dot, cosine = (in_batch_pairs(batch, vectors, similarity).scores for similarity in ("dot", "cosine"))
    torch.testing.assert_close(dot, vectors[:2] @ vectors[2:].T)
    norms = vectors.norm(dim=1)
    torch.testing.assert_close(cosine, dot / norms[:2, None] / norms[2:])


def test_sum_over_pairs_is_the_mean_over_queries_and_ignores_what_is_not_chosen():
    values = torch.tensor([[1.0, torch.nan], [2.0, 3.0], [torch.inf, 7.0]])
    assert sum_over_pairs(values, torch.tensor([[True, False], [True, True], [False, False]])).item() == 2.0
