"""The two directions in which a batch is compared: queries look for documents, and documents for queries.

Shapes: B queries and m documents of this rank, M documents of all ranks, R rows that look, C columns that are found,
P positives and N hard negatives of a row (padded with -1), D dimensions of the encoder, G of a guide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from datamodules.records import ContrastiveBatch
from lightning_modules.distributed.collectives import gather_documents, gather_lists, gather_rows, world_size
from lightning_modules.losses import guide_mask, known_positive_mask, padded_by_first, repeated
from lightning_modules.objective.options import GuideOptions, ObjectiveOptions

Mask = Callable[[slice], Tensor]  # rows -> (rows, C) bool: no negatives


@dataclass(frozen=True)
class Side:
    """rows: (R, D). columns: (C, D), of all ranks. positives: (R, P) columns. hard_negatives: (R, N) columns. shares:
    (R,), what a row's loss is divided by before they are summed. masks: of what may not serve as a negative; they are
    asked for some rows at a time, so that no matrix stands whole.
    """

    rows: Tensor
    columns: Tensor
    positives: Tensor
    hard_negatives: Tensor
    shares: Tensor
    masks: tuple[Mask, ...]


@dataclass(frozen=True)
class Judge:
    """A frozen encoder's vectors of the same batch. queries: (B, G). documents: (m, G), gathered: (M, G)."""

    queries: Tensor
    documents: Tensor
    gathered: Tensor


def shifted(columns: Tensor, offset: int) -> Tensor:
    """Columns on this rank as columns among all ranks'; -1 stays."""
    return torch.where(columns < 0, columns, columns + offset)


def reads_the_same(batch: ContrastiveBatch, document_keys: Tensor) -> Mask:
    """Documents, of whose texts the keys (C,) are, that read as one of a query's positives or as the query itself."""
    own = batch.text_keys[batch.documents][padded_by_first(batch.positives)]  # (B, P)
    own = torch.cat([own, batch.text_keys[batch.queries][:, None]], dim=1)
    return lambda part: known_positive_mask(own[part], document_keys)


def query_side(vectors: Tensor, batch: ContrastiveBatch, options: ObjectiveOptions, guide: Judge | None = None) -> Side:
    """Queries among the documents of all ranks.

    A document that several ranks drew counts once, as it would on one process: this rank's copy, else the first.
    """
    queries, documents = vectors[batch.queries], vectors[batch.documents]
    documents, ids, offset = gather_documents(documents, batch.document_ids)
    positives, masks = shifted(batch.positives, offset), []
    if options.mask_known_positives:
        masks.append(lambda part: known_positive_mask(batch.known_positives[part], ids))
    if options.mask_same_text and batch.text_keys is not None:
        masks.append(reads_the_same(batch, gather_rows(batch.text_keys[batch.documents])))
    if world_size() > 1:
        again = repeated(ids.roll(-offset)).roll(offset)  # this rank's own come first
        masks.append(lambda part: again.expand(len(positives[part]), -1))
    if guide is not None:
        margin = _margin(options.guide)
        masks.append(lambda part: guide_mask(guide.queries[part] @ guide.gathered.T, positives[part], **margin))
    shares = torch.full_like(batch.queries, len(queries))
    return Side(queries, documents, positives, shifted(batch.hard_negatives, offset), shares, tuple(masks))


def document_side(
    vectors: Tensor, batch: ContrastiveBatch, options: ObjectiveOptions, guide: Judge | None = None
) -> Side:
    """This rank's positives, each for the query that it is of, among the queries of all ranks.

    A query that knows the document as one of its positives is no negative.
    """
    query, place = (batch.positives >= 0).nonzero(as_tuple=True)  # (R,) pairs of a query and a positive
    document = batch.positives[query, place]
    queries, _, offset = gather_documents(vectors[batch.queries], batch.queries)
    positives, masks = (query + offset)[:, None], []
    if options.mask_known_positives:
        all_known, ids = gather_lists(batch.known_positives), batch.document_ids[document]
        masks.append(lambda part: known_positive_mask(all_known, ids[part]).T)
    if options.mask_same_text and batch.text_keys is not None:
        own = torch.stack([batch.text_keys[batch.queries[query]], batch.text_keys[batch.documents[document]]], dim=1)
        keys = gather_rows(batch.text_keys[batch.queries])
        masks.append(lambda part: known_positive_mask(own[part], keys))
    if guide is not None:
        margin = _margin(options.guide)
        rows, columns = guide.documents[document], gather_rows(guide.queries)
        masks.append(lambda part: guide_mask(rows[part] @ columns.T, positives[part], **margin))
    shares = len(batch.queries) * (batch.positives >= 0).sum(1)[query]  # a query counts once, whatever its positives
    return Side(vectors[batch.documents[document]], queries, positives, positives[:, :0], shares, tuple(masks))


def _margin(options: GuideOptions) -> dict[str, float | str]:
    return {"margin": options.margin, "kind": options.kind}
