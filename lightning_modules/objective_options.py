"""Options of the objective, and their validation."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from datamodules.options import check_options, option
from datamodules.records import UserError, check_choice


@dataclass
class GuideOptions:
    """A frozen model that finds false negatives (GISTEmbed, arXiv 2402.16829)."""

    model: str | None = option(None, "frozen model that finds false negatives: a run, checkpoint, folder or hub name")
    margin: float = option(
        0.0,
        "documents that the guide scores above the positives minus this margin are not negatives",
        minimum=0,
    )
    kind: Literal["absolute", "relative"] = option(
        "absolute", "whether the margin is a difference of scores, or a share of the positive's score"
    )
    similarity: Literal["cosine", "dot"] = option("cosine", "similarity of the guide's vectors")


@dataclass
class TeacherOptions:
    """A frozen model whose scores are distilled into the encoder."""

    model: str | None = option(
        None, "frozen model whose scores the encoder learns to reproduce: a run, checkpoint, folder or hub name"
    )
    loss: Literal["kl", "margin_mse"] = option(
        "kl", "KL divergence of softmaxes, or squared error of score differences"
    )
    candidates: Literal["batch", "own"] = option(
        "batch", "compare on all documents that are not masked, or on the query's own positives and hard negatives"
    )
    temperature: float = option(0.05, "temperature of the teacher's softmax", minimum=1e-6, maximum=1e6)
    similarity: Literal["cosine", "dot"] = option("cosine", "similarity of the teacher's vectors")
    weight: float = option(1.0, "weight of the distillation loss; InfoNCE has weight 1", above=0, maximum=1e6)


@dataclass
class VectorTeacherOptions:
    """A frozen model whose vectors the encoder learns to reproduce (LEAF, arXiv 2509.12539)."""

    model: str | None = option(
        None,
        "frozen model whose vectors the encoder learns to reproduce: start (the encoder before training, against "
        "forgetting), or a run, checkpoint, folder or hub name",
    )
    weight: Any = option(
        1.0,
        "weight of the distance from the teacher's vectors, or one per task (by default 1); InfoNCE has weight 1",
    )
    loss: Literal["l2", "cosine"] = option("l2", "distance: the squared L2 distance, or 1 - cosine")
    asymmetric: bool = option(
        False, "use the teacher's vectors of documents, and train the encoder only for queries, in the teacher's space"
    )
    cached: bool = option(
        True, "encode all texts once, before training, and keep the vectors in data.cache; false: encode each batch"
    )

    def weight_of(self, task: str) -> float:
        """Return the weight of a task, 0 without a teacher."""
        weight = self.weight.get(task, 1.0) if isinstance(self.weight, Mapping) else self.weight
        return weight if self.model else 0.0

    def is_used_for(self, task: str) -> bool:
        """Return whether batches of a task need the teacher's vectors."""
        return self.weight_of(task) > 0 or bool(self.model and self.asymmetric)


PACKAGES = {"mgda": ("torchjd",), "upgrad": ("torchjd", "qpsolvers", "quadprog")}  # balance -> packages that it needs
COMBINES_GRADIENTS = ("gradnorm", "pcgrad", "mgda", "upgrad")  # values of balance


@dataclass
class ObjectiveOptions:
    """The loss that the encoder is trained with."""

    similarity: Literal["dot", "cosine"] = option("dot", "similarity of two vectors")
    temperature: Any = option(1.0, "a number, or one per task; the initial value if it is learned")
    learn_temperature: Literal["no", "one", "per_task"] = option(
        "no", "learn one temperature for all tasks, or one per task"
    )
    temperature_range: list[float] = option(
        [0.01, 100.0], "lowest and highest value of a learned temperature", minimum=1e-6, maximum=1e6
    )
    temperature_lr: float | None = option(
        None, "peak learning rate of the temperature, by default optim.lr", above=0, maximum=10
    )
    mask_known_positives: bool = option(True, "never use a known positive of a query as its negative")
    mask_same_text: bool = option(True, "mask negatives whose text equals the query or one of its positives")
    positives: Literal["mean_log", "log_mean"] = option(
        "mean_log", "with several positives: the mean of their losses, or the loss of their mean probability"
    )
    positives_in_denominator: bool = option(False, "let the positives of a query compete with each other, as in SupCon")
    symmetric: bool = option(False, "also train from documents to queries; each direction has half the weight")
    matryoshka: list[int] = option(
        [],
        "sizes of shorter vectors (the first dimensions) to train together with the full vectors, such as [64, 128]",
        above=0,
    )
    matryoshka_weights: list[float] = option(
        [], "weight of the loss for each shorter size, by default 1", above=0, maximum=1e6
    )
    guide: GuideOptions = field(default_factory=GuideOptions)
    teacher: TeacherOptions = field(default_factory=TeacherOptions)
    vector_teacher: VectorTeacherOptions = field(default_factory=VectorTeacherOptions)
    balance: Literal["none", "uncertainty", "dwa", "gradnorm", "pcgrad", "mgda", "upgrad"] = option(
        "none",
        "balance tasks by weighting their losses (uncertainty: learned weights; dwa: weights from how fast losses "
        "fall), or by combining their gradients",
    )
    uncertainty_lr: float = option(
        0.01, "peak learning rate of the weights that balance=uncertainty learns", above=0, maximum=10
    )
    dwa_temperature: float = option(
        2.0, "DWA: higher values bring the weights of the tasks closer together", minimum=1e-3, maximum=1e6
    )
    dwa_window: int = option(
        50,
        "DWA: batches of each task in a window; the mean losses of the last two windows are compared",
        minimum=1,
        maximum=1_000_000,
    )
    gradnorm_alpha: float = option(1.5, "how strongly GradNorm favours tasks that learn slowly", minimum=0, maximum=100)
    gradnorm_lr: float = option(0.025, "step size of GradNorm's weights", above=0, maximum=10)
    task_weights: dict[str, float] = option({}, "factor of a task's loss, by default 1", above=0, maximum=1e6)
    score_memory: int = option(
        512, "memory for the scores of a batch, in MiB; larger matrices are computed in blocks", above=0
    )

    def temperature_of(self, task: str) -> float:
        """Return the temperature of a task, or its initial value."""
        return self.temperature[task] if isinstance(self.temperature, Mapping) else self.temperature


def check_balance_packages(method: str) -> None:
    """Raise UserError if a method needs packages that are not installed."""
    if missing := [name for name in PACKAGES.get(method, ()) if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"balance: {method} needs {' and '.join(missing)}; install torchjd (make install EXTRAS=cpu,torchjd, or "
            "pip install 'torchjd[quadprog-projector]')"
        )


def check_objective(
    options: ObjectiveOptions, tasks: Sequence[str], prefix: str = "", dimension: int | None = None
) -> None:
    """Raise UserError for invalid values, and for tasks that are not in `tasks`.

    prefix: prefix of the keys in error messages, such as "objective.".
    dimension: size of the encoder's vectors, if known.
    """
    check_options(options, prefix)
    _check_temperature(options, tasks, prefix)
    _check_vector_teacher(options, tasks, prefix)
    guide, limit = options.guide, 1.0 if options.guide.kind == "relative" else 2.0
    if guide.margin >= limit:
        raise UserError(f"{prefix}guide.margin: expected a number below {limit:g} ({guide.kind}), got {guide.margin}")
    prefixes, weights = options.matryoshka, options.matryoshka_weights
    if len(set(prefixes)) < len(prefixes):
        raise UserError(f"{prefix}matryoshka: expected different numbers, got {prefixes}")
    for shorter in prefixes:
        if dimension and shorter >= dimension:
            raise UserError(f"{prefix}matryoshka: expected numbers below {dimension}, the vector size, got {shorter}")
    if len(weights) not in (0, len(prefixes)):
        raise UserError(f"{prefix}matryoshka_weights: expected one per entry of matryoshka, got {len(weights)}")
    for task in options.task_weights:
        check_choice(f"{prefix}task_weights", task, tasks)


def _check_temperature(options: ObjectiveOptions, tasks: Sequence[str], prefix: str) -> None:
    key, temperature, bounds = f"{prefix}temperature", options.temperature, options.temperature_range
    values = _numbers_by_key(key, temperature, tasks, minimum=1e-6)
    if missing := [task for task in tasks if isinstance(temperature, Mapping) and task not in temperature]:
        raise UserError(f"{key}: expected a number, or one for each task; there is none for {', '.join(missing)}")
    if isinstance(temperature, Mapping) and options.learn_temperature == "one":
        raise UserError(f"{prefix}learn_temperature: expected per_task with a temperature per task, got one")
    if len(bounds) != 2 or not bounds[0] < bounds[1]:
        raise UserError(f"{key}_range: expected a lower and a higher number, got {bounds}")
    for key, value in values.items():
        if options.learn_temperature != "no" and not bounds[0] <= value <= bounds[1]:
            raise UserError(f"{key}: expected a number in {prefix}temperature_range {bounds}, got {value}")


def _check_vector_teacher(options: ObjectiveOptions, tasks: Sequence[str], prefix: str) -> None:
    teacher, prefix = options.vector_teacher, f"{prefix}vector_teacher."
    _numbers_by_key(f"{prefix}weight", teacher.weight, tasks, minimum=0)
    if teacher.model and teacher.asymmetric and options.similarity != "cosine":
        raise UserError(f"{prefix}asymmetric: needs similarity=cosine, because the teacher's vectors are normalised")


def _numbers_by_key(key: str, value: Any, tasks: Sequence[str], minimum: float) -> dict[str, float]:
    """Return key -> number of a setting that has one number, or one for some of the tasks, after checking them."""
    numbers = {key: value}
    if isinstance(value, Mapping):
        numbers = {f"{key}.{check_choice(key, task, tasks)}": number for task, number in value.items()}
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not minimum <= number <= 1e6:
            raise UserError(f"{name}: expected a number of at least {minimum:g} and at most 1e6, got {number!r}")
    return numbers
