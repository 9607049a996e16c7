"""The settings of the objective, and what they may be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from datamodules.records import UserError


@dataclass
class GuideOptions:
    """model: an encoder, of any kind that is read, that marks false negatives: documents that it scores above the
    query's positive less a margin are no negatives. kind: the margin is "absolute" or a share of the positive's score.
    similarity: of its vectors.
    """

    model: str | None = None
    margin: float = 0.0
    kind: Literal["absolute", "relative"] = "absolute"
    similarity: Literal["cosine", "dot"] = "cosine"


@dataclass
class TeacherOptions:
    """model: an encoder, of any kind that is read, whose scores are learned beside the data. loss: "kl" of softmaxes,
    or "margin_mse" of score differences. candidates: of a query, "batch" (all documents but those masked) or "own" (its
    positives and hard negatives). temperature: of the teacher's softmax. similarity: of its vectors. weight: of this
    loss, beside 1 of InfoNCE.
    """

    model: str | None = None
    loss: Literal["kl", "margin_mse"] = "kl"
    candidates: Literal["batch", "own"] = "batch"
    temperature: float = 0.05
    similarity: Literal["cosine", "dot"] = "cosine"
    weight: float = 1.0


@dataclass
class ObjectiveOptions:
    """similarity and temperature of InfoNCE; the paper's are dot and 1. mask_known_positives: a document that is a
    known positive of a query is never its negative. mask_same_text: nor is what reads as its positive or as itself,
    whatever its id. symmetric: documents find their queries too, with half of the weight.

    temperature: a number, or task -> number; where it is learned, the first value. learn_temperature: "one" for all
    tasks, or "per_task". temperature_range: that it stays in. temperature_lr: its peak learning rate, by default
    optim.lr.

    positives: of several (data.num_positives), the mean of their losses ("mean_log") or the loss of their mean
    probability ("log_mean"). positives_in_denominator: they compete with one another, as in SupCon.

    matryoshka: shorter dimensions, whose prefixes of the vectors are trained beside the whole. matryoshka_weights: of
    their losses, by default 1, as the whole has.

    balance: of the tasks. "uncertainty": learned weights of their losses; "gradnorm": weights that bring their
    gradients to one norm, where gradnorm_alpha is how strongly tasks that are behind are favoured and gradnorm_lr the
    step of the weights; "pcgrad": gradients lose what conflicts with others. The last two take data.schedule=together.

    task_weights: task -> factor of its loss, by default 1. score_memory: MiB for scores; larger matrices are computed
    in parts, with the same result.
    """

    similarity: Literal["dot", "cosine"] = "dot"
    temperature: Any = 1.0
    learn_temperature: Literal["no", "one", "per_task"] = "no"
    temperature_range: list[float] = field(default_factory=lambda: [0.01, 100.0])
    temperature_lr: float | None = None
    mask_known_positives: bool = True
    mask_same_text: bool = True
    positives: Literal["mean_log", "log_mean"] = "mean_log"
    positives_in_denominator: bool = False
    symmetric: bool = False
    matryoshka: list[int] = field(default_factory=list)
    matryoshka_weights: list[float] = field(default_factory=list)
    guide: GuideOptions = field(default_factory=GuideOptions)
    teacher: TeacherOptions = field(default_factory=TeacherOptions)
    balance: Literal["none", "uncertainty", "gradnorm", "pcgrad"] = "none"
    gradnorm_alpha: float = 1.5
    gradnorm_lr: float = 0.025
    task_weights: dict[str, float] = field(default_factory=dict)
    score_memory: int = 512


def check_objective(options: ObjectiveOptions, tasks: Sequence[str]) -> None:
    """Raise UserError for a value that is out of its range, or names other tasks than those of the run."""
    _check_temperature(options, tasks)
    guide, teacher = options.guide, options.teacher
    largest = 1.0 if guide.kind == "relative" else 2.0
    if not 0 <= guide.margin < largest:
        raise UserError(f"objective.guide.margin: got {guide.margin}, allowed are numbers from 0 to below {largest:g}")
    _above_0("objective.teacher.temperature", teacher.temperature)
    _above_0("objective.teacher.weight", teacher.weight)
    _above_0("objective.score_memory", options.score_memory)
    for i, dimension in enumerate(options.matryoshka):
        _above_0(f"objective.matryoshka[{i}]", dimension)
    if len(set(options.matryoshka)) < len(options.matryoshka):
        raise UserError(f"objective.matryoshka: each may be named once, got {options.matryoshka}")
    if len(options.matryoshka_weights) not in (0, len(options.matryoshka)):
        wanted, got = len(options.matryoshka), len(options.matryoshka_weights)
        raise UserError(f"objective.matryoshka_weights: expected {wanted}, one for each of matryoshka, got {got}")
    for i, weight in enumerate(options.matryoshka_weights):
        _above_0(f"objective.matryoshka_weights[{i}]", weight)
    for task, weight in options.task_weights.items():
        _above_0(f"objective.task_weights.{task}", weight)
        if task not in tasks:
            raise UserError(f"objective.task_weights: the run has no task {task!r}, there are {', '.join(tasks)}")


def _check_temperature(options: ObjectiveOptions, tasks: Sequence[str]) -> None:
    given = options.temperature
    values = {"objective.temperature": given}
    if isinstance(given, Mapping):
        if set(given) != set(tasks):
            raise UserError(
                f"objective.temperature: got one for {', '.join(map(str, given)) or 'no task'}, expected a number, or "
                f"one for each of {', '.join(tasks)}"
            )
        if options.learn_temperature == "one":
            raise UserError("objective.learn_temperature: got one, but objective.temperature has a value for each task")
        values = {f"objective.temperature.{task}": value for task, value in given.items()}
    for key, value in values.items():
        _above_0(key, value)
    if options.temperature_lr is not None:
        _above_0("objective.temperature_lr", options.temperature_lr)
    bounds = options.temperature_range
    if len(bounds) != 2 or not 0 < bounds[0] < bounds[1] < math.inf:
        raise UserError(f"objective.temperature_range: got {bounds}, allowed are two rising numbers above 0")
    for key, value in values.items():
        if options.learn_temperature != "no" and not bounds[0] <= value <= bounds[1]:
            raise UserError(f"{key}: got {value}, which is out of objective.temperature_range {bounds}")


def _above_0(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{key}: got {value!r}, allowed are numbers above 0")
