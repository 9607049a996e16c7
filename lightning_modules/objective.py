"""The training objective: InfoNCE over the documents of all ranks (paper, section 3.4), and what its options add.

Read it from top to bottom. The Objective adds up the two directions in which a batch is compared: queries look for
documents and, if the options ask for it, documents look for queries. A Direction has the vectors, the positives and the
masks. Its loss is computed from scores block by block. The last sections are details: masks, frozen models, and the
temperature. The options are in objective_options.py, the formulas in losses.py, and the blocks in chunked.py.

Shapes
    U   distinct texts of a batch on this rank
    B   queries on this rank
    m   documents on this rank, M on all ranks
    D   dimensions of a vector, G of a frozen model's vector
    R   queries of a direction: the queries of this rank, or its positive documents
    C   candidates of a direction: the documents of all ranks, or their queries
    P   positives of a query, N hard negatives: columns of the score matrix, padded with -1
    r   rows of a block of the score matrix (R, C)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor, nn

from datamodules.records import ContrastiveBatch
from lightning_modules.chunked import LossTerms, rows_per_block, sum_over_blocks
from lightning_modules.distributed.collectives import gather_documents, gather_lists, gather_rows, world_size
from lightning_modules.encoders.base import Encoder
from lightning_modules.losses import (
    comparable,
    duplicate_mask,
    fill_padding,
    guide_mask,
    info_nce,
    kl_divergence,
    margin_mse,
    membership_mask,
    unmask_positives,
)
from lightning_modules.objective_options import GuideOptions, ObjectiveOptions, TeacherOptions, check_objective

Mask = Callable[[slice], Tensor]  # rows -> whether a candidate is excluded as a negative of a query, (r, C) bool


class Objective(nn.Module):
    """The loss of a batch, as a function of its vectors and of the temperature's parameters.

    tasks: tasks of the batches.
    dimension: size of the vectors, D.
    guide, teacher: frozen models, if the options use them.
    """

    def __init__(
        self,
        options: ObjectiveOptions,
        tasks: Sequence[str],
        dimension: int,
        guide: FrozenEncoder | None = None,
        teacher: FrozenEncoder | None = None,
    ):
        super().__init__()
        check_objective(options, tasks, dimension=dimension)
        self.options, self.guide, self.teacher = options, guide, teacher
        self.temperature = Temperature(options.temperature, options.learn_temperature, tasks, options.temperature_range)

    def forward(self, vectors: Tensor, batch: ContrastiveBatch) -> dict[str, Tensor]:
        """Return the loss of a batch, and the values to log with it.

        There is no randomness and no state but the parameters, so the vectors may be leaves whose gradient is
        propagated elsewhere.

        vectors: vectors of the distinct texts of the batch, (U, D).
        """
        options, temperature = self.options, self.temperature(batch.task)
        guide = None if self.guide is None else self.guide.embed(batch)
        teacher = None if self.teacher is None else self.teacher.embed(batch)
        with torch.autocast(vectors.device.type, enabled=False):
            directions = [query_to_document(vectors, batch, options, guide, teacher)]
            if options.symmetric:
                directions.append(document_to_query(vectors, batch, options, guide))
            terms = [self._terms(directions, temperature)]
            terms += [self._terms(directions, temperature, prefix) for prefix in options.matryoshka]
            weights = options.matryoshka_weights or [1.0] * len(options.matryoshka)
            loss = terms[0].loss
            for shorter, weight in zip(terms[1:], weights, strict=True):
                loss = loss + weight * shorter.loss
        outputs = {"loss": options.task_weights.get(batch.task, 1.0) * loss * batch.weight}
        outputs["accuracy"] = terms[0].accuracy
        if teacher is not None:
            outputs |= {"contrastive": terms[0].contrastive, "distillation": terms[0].distillation}
        if isinstance(temperature, Tensor):
            outputs["temperature"] = temperature.detach()
        return outputs

    def _terms(
        self, directions: Sequence[Direction], temperature: float | Tensor, prefix: int | None = None
    ) -> LossTerms:
        """Add up the directions, with equal weights. Accuracy and distillation are those of the first one."""
        weight = 1 / len(directions)
        terms = [direction_loss(direction, self.options, temperature, prefix, weight) for direction in directions]
        loss, contrastive = sum(x.loss for x in terms), sum(x.contrastive for x in terms)
        return LossTerms(loss, terms[0].accuracy, contrastive, terms[0].distillation)


# Directions: which vectors are compared, which are positives, and which must not be negatives


@dataclass(frozen=True)
class Direction:
    """Queries that look for their positives among candidates of all ranks."""

    queries: Tensor  # (R, D)
    candidates: Tensor  # (C, D)
    positives: Tensor  # (R, P)
    hard_negatives: Tensor  # (R, N)
    divisors: Tensor  # (R,) the loss is the sum over queries of their losses divided by these
    masks: Sequence[Mask]
    teacher: FrozenScores | None = None


def query_to_document(
    vectors: Tensor,
    batch: ContrastiveBatch,
    options: ObjectiveOptions,
    guide: FrozenVectors | None = None,
    teacher: FrozenVectors | None = None,
) -> Direction:
    """Return the direction in which queries look for documents of all ranks.

    A document that several ranks drew counts once, as it would in one process: the copy of this rank, else the first.
    """
    queries, documents = vectors[batch.queries], vectors[batch.documents]
    documents, ids, offset = gather_documents(documents, batch.document_ids)  # (M, D), (M,)
    positives = _shift(batch.positives, offset)
    masks: list[Mask] = []
    if options.mask_known_positives:
        masks.append(partial(_mask_by_keys, batch.known_positives, ids))
    if options.mask_same_text and batch.text_keys is not None:
        document_keys = gather_rows(batch.text_keys[batch.documents])  # (M,)
        masks.append(partial(_mask_by_keys, text_keys_of_queries(batch), document_keys))
    if world_size() > 1:
        is_duplicate = duplicate_mask(ids.roll(-offset)).roll(offset)  # this rank's copies come first
        masks.append(partial(_mask_duplicates, is_duplicate))
    if guide is not None:
        scores = FrozenScores(guide.queries, gather_rows(guide.documents))
        masks.append(partial(_mask_by_guide, scores, positives, options.guide))
    return Direction(
        queries,
        documents,
        positives,
        hard_negatives=_shift(batch.hard_negatives, offset),
        divisors=torch.full_like(batch.queries, len(queries)),
        masks=masks,
        teacher=None if teacher is None else FrozenScores(teacher.queries, gather_rows(teacher.documents)),
    )


def document_to_query(
    vectors: Tensor, batch: ContrastiveBatch, options: ObjectiveOptions, guide: FrozenVectors | None = None
) -> Direction:
    """Return the direction in which each positive of this rank looks for its query among the queries of all ranks.

    Queries that know the document as a positive are not negatives.
    """
    query, position = (batch.positives >= 0).nonzero(as_tuple=True)  # (R,) pairs of a query and a positive
    document = batch.positives[query, position]  # (R,)
    queries, _, offset = gather_documents(vectors[batch.queries], batch.queries)
    positives = (query + offset)[:, None]
    masks: list[Mask] = []
    if options.mask_known_positives:
        known_positives, ids = gather_lists(batch.known_positives), batch.document_ids[document]
        masks.append(partial(_mask_by_known_positives_of_candidates, known_positives, ids))
    if options.mask_same_text and batch.text_keys is not None:
        keys = [batch.text_keys[batch.queries[query]], batch.text_keys[batch.documents[document]]]
        query_keys = gather_rows(batch.text_keys[batch.queries])  # (C,)
        masks.append(partial(_mask_by_keys, torch.stack(keys, dim=1), query_keys))
    if guide is not None:
        scores = FrozenScores(guide.documents[document], gather_rows(guide.queries))
        masks.append(partial(_mask_by_guide, scores, positives, options.guide))
    positives_of_query = (batch.positives >= 0).sum(1)[query]
    return Direction(
        vectors[batch.documents[document]],
        queries,
        positives,
        hard_negatives=positives[:, :0],
        divisors=len(batch.queries) * positives_of_query,  # every query counts once, whatever its number of positives
        masks=masks,
    )


def _shift(columns: Tensor, offset: int) -> Tensor:
    """Turn columns among this rank's documents into columns among those of all ranks; -1 stays."""
    return torch.where(columns < 0, columns, columns + offset)


# The loss of a direction


def direction_loss(
    direction: Direction, options: ObjectiveOptions, temperature: float | Tensor, prefix: int | None, weight: float
) -> LossTerms:
    """Return the means over the queries of a direction.

    prefix: number of leading dimensions to compare; None for all.
    weight: factor of InfoNCE. Distillation has that of its options.
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
    """Return what some rows of the score matrix contribute to the loss. queries: (r, D). candidates: (C, D)."""
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
    """Return the distillation loss of some rows, (r,).

    scores: similarities, (r, C).
    logits: scores divided by the temperature, with -inf for masked candidates, (r, C).
    """
    positives = direction.positives[rows]
    if options.candidates == "batch":
        teacher_scores, candidates = direction.teacher.block(rows), logits > -math.inf
    else:
        own = torch.cat([positives, direction.hard_negatives[rows]], dim=1)  # (r, P + N)
        columns = own.clamp(min=0)
        scores, logits = scores.gather(1, columns), logits.gather(1, columns)
        candidates = (own >= 0) & (logits > -math.inf)
        teacher_scores = direction.teacher.of_columns(rows, columns)
        positives = torch.where(positives < 0, positives, torch.arange(positives.shape[1], device=own.device))
    teacher_scores = teacher_scores.to(scores.dtype)
    if options.loss == "kl":
        return kl_divergence(logits, teacher_scores / options.temperature, candidates)
    return margin_mse(scores, teacher_scores, positives, candidates)


# Masks: candidates that must not serve as negatives. Like the scores, they are computed for a block of rows at a time.


def _mask_by_keys(keys: Tensor, candidate_keys: Tensor, rows: slice) -> Tensor:
    """Exclude candidates whose key is among the query's. keys: (R, K). candidate_keys: (C,)."""
    return membership_mask(keys[rows], candidate_keys)  # (r, C)


def _mask_by_known_positives_of_candidates(known_positives: Tensor, ids: Tensor, rows: slice) -> Tensor:
    """Exclude candidates that know the query as a positive. known_positives: (C, K) ids. ids: of the queries, (R,)."""
    return membership_mask(known_positives, ids[rows]).T  # (r, C)


def _mask_duplicates(is_duplicate: Tensor, rows: slice) -> Tensor:
    """Exclude all copies of a candidate but one. is_duplicate: (C,) bool."""
    return is_duplicate.expand(rows.stop - rows.start, -1)  # (r, C)


def _mask_by_guide(scores: FrozenScores, positives: Tensor, options: GuideOptions, rows: slice) -> Tensor:
    """Exclude candidates that the guide finds as good as the positives. positives: (R, P)."""
    return guide_mask(scores.block(rows), positives[rows], options.margin, options.kind)  # (r, C)


def text_keys_of_queries(batch: ContrastiveBatch) -> Tensor:
    """Return hashes of the texts that a query must not meet as negatives: its positives' and its own, (B, P + 1)."""
    positive_keys = batch.text_keys[batch.documents][fill_padding(batch.positives)]
    return torch.cat([positive_keys, batch.text_keys[batch.queries][:, None]], dim=1)


# Frozen models: the guide, which finds false negatives, and the teacher, whose scores are distilled


@dataclass(frozen=True)
class FrozenVectors:
    """Vectors of a batch by a frozen model. Their dot products are its scores."""

    queries: Tensor  # (B, G)
    documents: Tensor  # (m, G)


class FrozenEncoder:
    """An encoder that is not trained. It reads the texts of each batch with its own tokenizer.

    It is not an nn.Module, so that its weights stay out of the trained module's parameters and checkpoints.
    """

    def __init__(self, encoder: Encoder, similarity: str = "cosine"):
        self.encoder, self.similarity = encoder.eval().requires_grad_(False), similarity

    def embed(self, batch: ContrastiveBatch) -> FrozenVectors:
        assert batch.texts, "the batch carries no texts: set BatchOptions.carry_texts"
        device = batch.queries.device
        if self.encoder.device != device:
            self.encoder.to(device)
        query_task, document_task = batch.task, self.encoder.document_task(batch.task)
        vectors = self.encoder.encode(batch.texts, tasks=(query_task, document_task))
        # Clones, because tensors made in inference mode cannot be saved for a backward pass.
        queries = vectors[query_task].clone().to(device)[batch.queries]
        documents = vectors[document_task].clone().to(device)[batch.documents]
        return FrozenVectors(comparable(queries, self.similarity), comparable(documents, self.similarity))


@dataclass(frozen=True)
class FrozenScores:
    """Scores of a frozen model in one direction."""

    queries: Tensor  # (R, G)
    candidates: Tensor  # (C, G)

    def block(self, rows: slice) -> Tensor:
        return self.queries[rows] @ self.candidates.T  # (r, C)

    def of_columns(self, rows: slice, columns: Tensor) -> Tensor:
        """Return the scores of a few candidates of each query. columns: (r, k)."""
        return torch.einsum("rg,rcg->rc", self.queries[rows], self.candidates[columns])  # (r, k)


# Temperature


class Temperature(nn.Module):
    """The divisor of the scores: a constant, or learned.

    A learned temperature is stored as its logarithm, so that optimizer steps are relative (CLIP, arXiv 2103.00020).

    initial: a number, or one per task.
    learn: "no", "one" for all tasks, or "per_task".
    bounds: lowest and highest value, restored by clamp after each optimizer step.
    """

    def __init__(
        self,
        initial: float | Mapping[str, float],
        learn: str = "no",
        tasks: Sequence[str] = (),
        bounds: Sequence[float] = (0.01, 100.0),
    ):
        super().__init__()
        self.initial, self.bounds = initial, tuple(bounds)
        names = {"no": (), "one": ("all",), "per_task": tasks}[learn]
        self.log = nn.ParameterDict({name: nn.Parameter(torch.tensor(math.log(self._initial(name)))) for name in names})

    def _initial(self, task: str) -> float:
        return self.initial[task] if isinstance(self.initial, Mapping) else self.initial

    def forward(self, task: str) -> float | Tensor:
        """Return the temperature of a task: a number, or a scalar with a gradient if it is learned."""
        if not self.log:
            return self._initial(task)
        return self.log[task if task in self.log else "all"].exp()

    @torch.no_grad()
    def clamp(self) -> None:
        """Move the temperature back into its bounds. Clamping in forward would leave it without a gradient."""
        lowest, highest = map(math.log, self.bounds)
        for parameter in self.log.values():
            parameter.clamp_(lowest, highest)
