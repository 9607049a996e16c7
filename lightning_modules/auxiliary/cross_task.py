"""Cross-task distillation: the expert of one task teaches another task's ranking.

CrossDistil (Yang et al., arXiv 2202.09852). The expert of the teacher task scores the queries and documents of a batch
of the student task. Platt scaling turns its scores r into log-odds of the student's labels y, and the student learns
the teacher's probabilities:

    r~ = P r + Q                                        P and Q minimise the cross-entropy CE(y, sigmoid(r~))
    r~ <- max(r~, m) of a positive, and min(r~, -m) of a negative       error correction with a margin m
    L = CE(sigmoid(r~ / tau), sigmoid(s / tau))                         tau softens both

InfoNCE determines similarities only up to a constant, so the student's log-odds s are calibrated in the same way, with
their own P and Q. L has gradients only with respect to the student's vectors.

Shapes: T tasks in training, B queries on this rank, M documents on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from datamodules.batches import CompanionSource, ContrastiveDataModule
from datamodules.options import check_number
from datamodules.packed import ContrastiveBatch
from datamodules.records import UserError
from lightning_modules.auxiliary.auxiliary_loss import AuxiliaryLoss
from lightning_modules.auxiliary.pairs import check_other_task, fixed_scores, in_batch_pairs, sum_over_pairs
from lightning_modules.objective_options import ObjectiveOptions


def corrected(log_odds: Tensor, positive: Tensor, margin: float, negatives: bool = False) -> Tensor:
    """Move a teacher's log-odds to the correct side of the margin where they contradict the label.

    log_odds: (B, M). positive: labels, (B, M) bool. margin: at least 0.
    negatives: whether to correct documents that are not positives, too.
    """
    others = log_odds.clamp(max=-margin) if negatives else log_odds
    return torch.where(positive, log_odds.clamp(min=margin), others)


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy of the student's probabilities with the teacher's, (B, M).

    student, teacher: log-odds, (B, M). temperature: divisor of both.
    """
    return cross_entropy(student / temperature, torch.sigmoid(teacher / temperature), reduction="none")


def texts_of_batch(queries: np.ndarray, documents: np.ndarray, _: Random) -> np.ndarray:
    """Return the rows of a batch's queries (B,) and then of its documents (m,)."""
    return np.concatenate([queries, documents])


class CrossTaskDistillation(AuxiliaryLoss):
    """Distil the scores of other tasks' experts. The loss of a query is a sum over the documents of all ranks.

    teachers: student task -> the tasks whose experts teach it. Each teacher encodes the batches of its student.
    temperature: tau, the divisor of the log-odds of teacher and student.
    margin: m, the lowest log-odds that a teacher may give a positive; None: no correction.
    correct_negatives: whether a teacher's log-odds for documents that are not positives are limited to -m. Off by
        default, because these documents were not judged, so the teacher may well be right.
    slope, intercept: initial P and Q of all calibrations.
    lr: peak learning rate of P and Q.
    objective: options of the objective, which determine the similarity.
    """

    def __init__(
        self,
        teachers: dict[str, list[str]],
        tasks: list[str],
        temperature: float = 1.0,
        margin: float | None = 0.0,
        correct_negatives: bool = False,
        slope: float = 5.0,
        intercept: float = -5.0,
        weight: float = 1.0,
        lr: float | None = 0.1,
        objective: ObjectiveOptions | None = None,
    ):
        super().__init__(weight, lr)
        if not any(teachers.values()):
            raise UserError("teachers: got none; expected student: teachers, such as {search: [link_prediction]}")
        for student, names in teachers.items():
            for teacher in names:
                check_other_task(f"teachers.{student}", student, teacher, tasks)
            if len(set(names)) < len(names):
                raise UserError(f"teachers.{student}: expected each task once, got {', '.join(names)}")
        check_number("temperature", temperature, minimum=1e-6, maximum=1e6)
        if margin is not None:
            check_number("margin", margin, minimum=0, maximum=1e6)
        for name, value in (("slope", slope), ("intercept", intercept)):
            check_number(name, value, minimum=-1e6, maximum=1e6)
        self.teachers, self.tasks = teachers, list(tasks)
        self.temperature, self.margin, self.correct_negatives = temperature, margin, correct_negatives
        self.similarity = (objective or ObjectiveOptions()).similarity
        # Row: student. Column: task that scores; on the diagonal, the student itself.
        self.slopes = nn.Parameter(torch.full((len(self.tasks), len(self.tasks)), float(slope)))  # P
        self.intercepts = nn.Parameter(torch.full_like(self.slopes, float(intercept)))  # Q

    def companions(self, data: ContrastiveDataModule, task: str) -> Sequence[CompanionSource]:
        """Return the batch's own texts, to be encoded as each teacher of the task."""
        table, teachers = data.by_name[task], self.teachers.get(task, ())
        return [CompanionSource(table, teacher, texts_of_batch, detached=True) for teacher in teachers]

    def forward(self, batch: ContrastiveBatch, vectors: Tensor, companions: Sequence[Tensor]) -> Tensor:
        teachers = self.teachers.get(batch.task, ())
        if not teachers:
            return 0.0 * vectors.sum()
        pairs = in_batch_pairs(batch, vectors, self.similarity)
        labels = pairs.positive.to(pairs.scores.dtype)
        own, loss = self._log_odds(batch.task, batch.task, pairs.scores, labels)
        for teacher, texts in zip(teachers, companions, strict=True):
            queries, documents = texts.split([len(batch.queries), len(batch.documents)])
            scores = fixed_scores(queries, documents, self.similarity)
            log_odds, calibration = self._log_odds(batch.task, teacher, scores, labels)
            if self.margin is not None:
                log_odds = corrected(log_odds, pairs.positive, self.margin, self.correct_negatives)
            loss = loss + calibration + distillation(own, log_odds, self.temperature) / len(teachers)
        return sum_over_pairs(loss, pairs.known)

    def _log_odds(self, student: str, scorer: str, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the calibrated scores of a task, and the cross-entropy that trains its calibration, (B, M) each.

        The first has gradients only for the scores, and the second only for the calibration.
        """
        index = self.tasks.index(student), self.tasks.index(scorer)
        slope, intercept = self.slopes[index], self.intercepts[index]
        calibration = cross_entropy(slope * scores.detach() + intercept, labels, reduction="none")
        return slope.detach() * scores + intercept.detach(), calibration
