"""A small batch of vectors, whose labels are given."""

import torch

from datamodules.batches import padded
from tests.lightning_modules.objective_reference import batch_without_texts


def batch_of(positives, num_documents, task="links"):
    """Return a batch of queries with the positives at these documents. Texts are the queries and then the documents.

    The row of document i in the document table is i, and that of query i is num_documents + i.
    """
    queries, total = len(positives), len(positives) + num_documents
    rows = torch.cat([torch.arange(num_documents, total), torch.arange(num_documents)])
    return batch_without_texts(
        task=task,
        queries=torch.arange(queries),
        documents=torch.arange(queries, total),
        document_ids=torch.arange(num_documents),
        positives=padded([each[:1] for each in positives]),
        hard_negatives=padded([[] for _ in positives]),
        known_positives=padded(positives),
        rows=rows,
    )
