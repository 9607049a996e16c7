"""The training objective: InfoNCE over the documents of all ranks (paper, section 3.4), and its extensions.

A batch is compared in one or two directions: query to document and, if `symmetric` is set, document to query. A
Direction holds the vectors, the positives and the masks. Its loss is computed from blocks of the score matrix
(chunked.py) with the formulas of losses.py. The options are in objective_options.py.

Shapes
    U   distinct texts of a batch on this rank
    B   queries on this rank
    m   documents on this rank, M on all ranks
    D   dimensions of a vector, G of a frozen model's vector
    R   queries of a direction: the queries of this rank, or its positive documents
    C   candidates of a direction: the documents of all ranks, or the queries of all ranks
    P   positives of a query, N hard negatives: columns of the score matrix, padded with -1
    r   rows of a block of the score matrix (R, C)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from datamodules.packed import ContrastiveBatch
from datamodules.records import UserError
from lightning_modules.chunked import LossTerms, rows_per_block, sum_over_blocks
from lightning_modules.distributed.collectives import gather_documents, gather_lists, gather_rows, world_size
from lightning_modules.frozen import FrozenEncoder, FrozenScores, FrozenVectors
from lightning_modules.losses import (
    comparable,
    fill_padding,
    guide_mask,
    info_nce,
    kl_divergence,
    margin_mse,
    mean_over_texts,
    membership_mask,
    other_copies,
    unmask_positives,
    vector_distance,
)
from lightning_modules.objective_options import ObjectiveOptions, TeacherOptions, check_objective
from lightning_modules.parts import check_task_names

# rows of a block -> True where a candidate must not be a negative of the query, (r, C)
Mask = Callable[[slice], Tensor]


class Supervision(NamedTuple):
    """The frozen models' vectors for a batch's texts, or None for a model that the batch does not need."""

    guide: FrozenVectors | None
    teacher: FrozenVectors | None
    vector_teacher: FrozenVectors | None


class Objective(nn.Module):
    """The loss of a batch, as a function of its vectors.

    Its only parameters are a learned temperature, and a projection (G, D) for a vector teacher whose vectors have a
    different size.

    tasks: names of the tasks in training.
    dimension: size of the vectors, D.
    guide, teacher, vector_teacher: frozen models, if the options use them.
    """

    def __init__(
        self,
        options: ObjectiveOptions,
        tasks: Sequence[str],
        dimension: int,
        guide: FrozenEncoder | None = None,
        teacher: FrozenEncoder | None = None,
        vector_teacher: FrozenEncoder | None = None,
    ):
        super().__init__()
        check_objective(options, tasks, dimension=dimension)
        self.options, self.guide, self.teacher = options, guide, teacher
        self.vector_teacher = vector_teacher if any(map(options.vector_teacher.is_used_for, tasks)) else None
        self.projection: nn.Parameter | None = None
        if self.vector_teacher is not None and self.vector_teacher.dimension != dimension:
            self.projection = _projection(dimension, self.vector_teacher.dimension, options.vector_teacher.asymmetric)
        self.temperature = Temperature(options, tasks)

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of each frozen model by its role."""
        models = {"guide": self.guide, "teacher": self.teacher, "vector_teacher": self.vector_teacher}
        return {role: model.fingerprint for role, model in models.items() if model is not None}

    def forward(
        self, vectors: Tensor, batch: ContrastiveBatch, supervision: Supervision | None = None
    ) -> dict[str, Tensor]:
        """Return the loss of a batch and the values to log with it. Draws no random numbers.

        vectors: vectors of the distinct texts of the batch, (U, D).
        supervision: supervise(batch), computed here by default.
        """
        options, temperature = self.options, self.temperature(batch.task)
        weights = options.matryoshka_weights or [1.0] * len(options.matryoshka)
        supervision = supervision or self.supervise(batch)
        directions = self.directions(vectors, batch, supervision)
        with torch.autocast(vectors.device.type, enabled=False):
            terms = self._terms(directions, temperature)
            loss = terms.loss
            for prefix, weight in zip(options.matryoshka, weights, strict=True):
                loss = loss + weight * self._terms(directions, temperature, prefix).loss
            if distance_weight := options.vector_teacher.weight_of(batch.task):
                assert supervision.vector_teacher is not None
                distance = self._vector_distance(vectors, supervision.vector_teacher, batch)
                loss = loss + distance_weight * distance
            elif self.projection is not None:  # DDP needs a gradient for each parameter
                loss = loss + 0.0 * self.projection.sum()
        outputs = {"loss": options.task_weights.get(batch.task, 1.0) * loss * batch.weight, "accuracy": terms.accuracy}
        if self.teacher is not None:
            outputs |= {"contrastive": terms.contrastive, "distillation": terms.distillation}
        if distance_weight:
            outputs |= {"contrastive": terms.contrastive, "vector_distance": distance.detach()}
        if isinstance(temperature, Tensor):
            outputs["temperature"] = temperature.detach()
        return outputs

    def directions(self, vectors: Tensor, batch: ContrastiveBatch, supervision: Supervision) -> list[Direction]:
        """Return the directions in which a batch is compared. The first is query to document.

        vectors: vectors of the distinct texts of the batch, (U, D).
        """
        guide, teacher, vector_teacher = supervision
        queries, documents = vectors[batch.queries], vectors[batch.documents]
        if vector_teacher is not None and self.options.vector_teacher.asymmetric:
            documents = vector_teacher.documents.to(queries.dtype)
        directions = [query_to_document(queries, documents, batch, self.options, guide, teacher)]
        if self.options.symmetric:
            directions.append(document_to_query(queries, documents, batch, self.options, guide))
        return directions

    def supervise(self, batch: ContrastiveBatch) -> Supervision:
        """Encode a batch with the frozen models. Vectors of the vector teacher may be stored in the batch."""
        guide = None if self.guide is None else self.guide.embed(batch)
        teacher = None if self.teacher is None else self.teacher.embed(batch)
        if self.vector_teacher is None or not self.options.vector_teacher.is_used_for(batch.task):
            return Supervision(guide, teacher, None)
        if batch.teacher_vectors is None:
            return Supervision(guide, teacher, self.vector_teacher.embed(batch))
        stored = FrozenVectors(batch.teacher_vectors[batch.queries], batch.teacher_vectors[batch.documents])
        return Supervision(guide, teacher, stored)

    def _vector_distance(self, vectors: Tensor, targets: FrozenVectors, batch: ContrastiveBatch) -> Tensor:
        """Return the mean distance from the teacher's vectors, of queries and their documents or of queries alone.

        vectors: (U, D).
        """

        def distance(vectors: Tensor, target: Tensor) -> Tensor:
            vectors = comparable(vectors, self.options.similarity)
            if self.projection is not None:
                vectors = vectors @ self.projection.T  # (n, G)
            return vector_distance(vectors, target.to(vectors.dtype), self.options.vector_teacher.loss)

        query_distances = distance(vectors[batch.queries], targets.queries)
        if self.options.vector_teacher.asymmetric:
            return query_distances.mean()
        columns = torch.cat([batch.positives, batch.hard_negatives], dim=1)
        return mean_over_texts(query_distances, distance(vectors[batch.documents], targets.documents), columns)

    def _terms(
        self, directions: Sequence[Direction], temperature: float | Tensor, prefix: int | None = None
    ) -> LossTerms:
        """Average the loss over directions. Accuracy and distillation use only query to document."""
        weight = 1 / len(directions)
        terms = [direction_loss(direction, self.options, temperature, prefix, weight) for direction in directions]
        loss = reduce(torch.add, (x.loss for x in terms))
        contrastive = reduce(torch.add, (x.contrastive for x in terms))
        return LossTerms(loss, terms[0].accuracy, contrastive, terms[0].distillation)


# Directions: which vectors are compared, and which pairs are positives or masked


@dataclass(frozen=True)
class Direction:
    """Queries of this rank, the candidates of all ranks, and how they relate."""

    queries: Tensor  # (R, D)
    candidates: Tensor  # (C, D)
    positives: Tensor  # (R, P)
    hard_negatives: Tensor  # (R, N)
    divisors: Tensor  # (R,) the loss is the sum of each query's loss divided by its entry
    masks: Sequence[Mask]
    teacher: FrozenScores | None = None


def query_to_document(
    queries: Tensor,
    documents: Tensor,
    batch: ContrastiveBatch,
    options: ObjectiveOptions,
    guide: FrozenVectors | None = None,
    teacher: FrozenVectors | None = None,
) -> Direction:
    """Return the direction from queries (B, D) to the documents of all ranks. documents: this rank's, (m, D).

    If several ranks drew the same document, only one copy counts: this rank's copy, or else the first one.
    """
    documents, ids, offset = gather_documents(documents, batch.document_ids)  # (M, D), (M,)
    positives = _shift_columns(batch.positives, offset)
    masks: list[Mask] = []
    margin, kind = options.guide.margin, options.guide.kind
    if options.mask_known_positives:
        masks.append(lambda rows: membership_mask(batch.known_positives[rows], ids))
    if options.mask_same_text and batch.text_keys is not None:
        keys, document_keys = text_keys_of_queries(batch), gather_rows(batch.text_keys[batch.documents])
        masks.append(lambda rows: membership_mask(keys[rows], document_keys))
    if world_size() > 1:
        is_duplicate = other_copies(ids, offset)
        masks.append(lambda rows: is_duplicate.expand(rows.stop - rows.start, -1))
    if guide is not None:
        scores = FrozenScores(guide.queries, gather_rows(guide.documents))
        masks.append(lambda rows: guide_mask(scores.block(rows), positives[rows], margin, kind))
    return Direction(
        queries,
        documents,
        positives,
        hard_negatives=_shift_columns(batch.hard_negatives, offset),
        divisors=torch.full_like(batch.queries, len(queries)),
        masks=masks,
        teacher=None if teacher is None else FrozenScores(teacher.queries, gather_rows(teacher.documents)),
    )


def document_to_query(
    queries: Tensor,
    documents: Tensor,
    batch: ContrastiveBatch,
    options: ObjectiveOptions,
    guide: FrozenVectors | None = None,
) -> Direction:
    """Return the direction from each positive among this rank's documents (m, D) to the queries of all ranks.

    A query is not a negative if the document is one of its known positives.
    """
    query, document = batch.pairs.unbind(1)  # (R,)
    queries, _, offset = gather_documents(queries, batch.queries)
    positives = (query + offset)[:, None]
    masks: list[Mask] = []
    margin, kind = options.guide.margin, options.guide.kind
    if options.mask_known_positives:
        known_positives, ids = gather_lists(batch.known_positives), batch.document_ids[document]  # (C, K), (R,)
        masks.append(lambda rows: membership_mask(known_positives, ids[rows]).T)
    if options.mask_same_text and batch.text_keys is not None:
        keys = [batch.text_keys[batch.queries[query]], batch.text_keys[batch.documents[document]]]
        pair_keys, query_keys = torch.stack(keys, dim=1), gather_rows(batch.text_keys[batch.queries])  # (R, 2), (C,)
        masks.append(lambda rows: membership_mask(pair_keys[rows], query_keys))
    if guide is not None:
        scores = FrozenScores(guide.documents[document], gather_rows(guide.queries))
        masks.append(lambda rows: guide_mask(scores.block(rows), positives[rows], margin, kind))
    positives_of_query = (batch.positives >= 0).sum(1)[query]
    return Direction(
        documents[document],
        queries,
        positives,
        hard_negatives=positives[:, :0],
        divisors=len(batch.queries) * positives_of_query,  # every query counts once, for any number of positives
        masks=masks,
    )


def text_keys_of_queries(batch: ContrastiveBatch) -> Tensor:
    """Return the hashes of the texts of each query and its positives, (B, P + 1)."""
    assert batch.text_keys is not None
    positive_keys = batch.text_keys[batch.documents][fill_padding(batch.positives)]
    return torch.cat([positive_keys, batch.text_keys[batch.queries][:, None]], dim=1)


def _shift_columns(columns: Tensor, offset: int) -> Tensor:
    """Shift columns of this rank's documents to their positions among all ranks' documents. Padding stays -1."""
    return torch.where(columns < 0, columns, columns + offset)


# The loss of a direction


def direction_loss(
    direction: Direction, options: ObjectiveOptions, temperature: float | Tensor, prefix: int | None, weight: float
) -> LossTerms:
    """Return the mean loss over the queries of a direction.

    prefix: number of leading dimensions to compare; None for all.
    weight: weight of InfoNCE; the weight of distillation is in the options.
    """
    queries = comparable(direction.queries[:, :prefix], options.similarity)
    candidates = comparable(direction.candidates[:, :prefix], options.similarity)
    block_size = rows_per_block(options.score_memory, candidates, direction.positives.shape[1])
    block_loss = partial(_block_loss, direction, options, weight)
    return sum_over_blocks(block_loss, block_size, queries, candidates, temperature)


def _block_loss(
    direction: Direction,
    options: ObjectiveOptions,
    weight: float,
    queries: Tensor,
    candidates: Tensor,
    temperature: float | Tensor,
    rows: slice,
) -> LossTerms:
    """Return the contribution of a block of rows. queries: (r, D). candidates: (C, D)."""
    positives, divisors = direction.positives[rows], direction.divisors[rows]
    scores = queries @ candidates.T  # (r, C)
    logits = scores / temperature
    if direction.masks:
        masked = reduce(torch.logical_or, (mask(rows) for mask in direction.masks))
        logits = logits.masked_fill(unmask_positives(masked, positives), -math.inf)
    losses = weight * info_nce(logits, positives, options.positives, options.positives_in_denominator)  # (r,)
    hits = (logits.detach().argmax(1, keepdim=True) == positives).any(1).to(losses.dtype)
    contrastive, distillation = losses.detach(), torch.zeros_like(hits)
    if direction.teacher is not None:
        distillation = _distillation(direction, options.teacher, scores, logits, rows)
        losses = losses + options.teacher.weight * distillation
    return LossTerms(*((x / divisors).sum() for x in (losses, hits, contrastive, distillation.detach())))


def _distillation(direction: Direction, options: TeacherOptions, scores: Tensor, logits: Tensor, rows: slice) -> Tensor:
    """Return the distillation loss of each row of a block, (r,).

    scores: similarities, (r, C).
    logits: scores divided by the temperature, with -inf for masked candidates, (r, C).
    """
    assert direction.teacher is not None
    positives = direction.positives[rows]
    if options.candidates == "batch":
        teacher_scores, candidates = direction.teacher.block(rows), logits > -math.inf
    else:
        padded = torch.cat([positives, direction.hard_negatives[rows]], dim=1)  # (r, P + N)
        columns = padded.clamp(min=0)
        scores, logits = scores.gather(1, columns), logits.gather(1, columns)
        candidates = (padded >= 0) & (logits > -math.inf)
        teacher_scores = direction.teacher.of_columns(rows, columns)
        positives = torch.where(positives < 0, positives, torch.arange(positives.shape[1], device=padded.device))
    teacher_scores = teacher_scores.to(scores.dtype)
    if options.loss == "kl":
        return kl_divergence(logits, teacher_scores / options.temperature, candidates)
    return margin_mse(scores, teacher_scores, positives, candidates)


def _projection(dimension: int, teacher_dimension: int, asymmetric: bool) -> nn.Parameter:
    """Return a projection (G, D) that starts orthogonal. It uses a separate random generator."""
    if asymmetric:
        raise UserError(
            f"vector_teacher.asymmetric: expected a teacher with {dimension} dimensions, as in the encoder, got "
            f"{teacher_dimension}; the encoder's queries are compared with the teacher's documents"
        )
    weight = torch.empty(teacher_dimension, dimension)
    return nn.Parameter(nn.init.orthogonal_(weight, generator=torch.Generator().manual_seed(0)))


class Temperature(nn.Module):
    """The divisor of the scores: constant or learned.

    A learned temperature is stored as its logarithm, so that optimizer steps are relative (CLIP, arXiv 2103.00020).

    tasks: names of the tasks in training.
    """

    def __init__(self, options: ObjectiveOptions, tasks: Sequence[str]):
        super().__init__()
        self.options = options
        names = {"no": (), "one": ("all",), "per_task": tasks}[options.learn_temperature]
        check_task_names("learn_temperature", names)
        initial = {name: torch.tensor(math.log(options.temperature_of(name))) for name in names}
        self.log = nn.ParameterDict({name: nn.Parameter(value) for name, value in initial.items()})

    def forward(self, task: str) -> float | Tensor:
        """Return the temperature of a task: a number, or a scalar tensor with a gradient if it is learned."""
        if not self.log:
            return self.options.temperature_of(task)
        return self.log[task if task in self.log else "all"].exp()

    @torch.no_grad()
    def clamp(self) -> None:
        """Move the temperature back into its bounds, after an optimizer step.

        Clamping in forward instead would leave a temperature at a bound without a gradient.
        """
        lowest, highest = map(math.log, self.options.temperature_range)
        for parameter in self.log.values():
            parameter.clamp_(lowest, highest)
