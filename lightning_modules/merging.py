"""Merge encoders: weighted averages of their parameters.

Fine-tuning forgets. Averaging a fine-tuned encoder with the model it started from keeps what the start knew
(WiSE-FT, arXiv 2109.01903). The average of several encoders that were fine-tuned from one start, a soup, often beats
the best of them (arXiv 2203.05482).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from datamodules.records import UserError
from lightning_modules.checkpoint_files import read_checkpoint, write_checkpoint
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.loading import load_weights, weights_for
from lightning_modules.encoders.shared import SharedEncoder
from lightning_modules.parts import check_parts, parts_of, value_of
from lightning_modules.retrieval.vector_cache import backbone_settings, tokenization

Method = Literal["linear", "slerp"]
NEARLY_PARALLEL = 1e-3  # radians; below, slerp and linear differ by less than the resolution of float32
TRAINING_ONLY = ("current_model_state", "averaging_state")  # entries that trainer.ema adds to a checkpoint
USE_ONLY = ("tasks", "normalize", "max_length")  # arguments of an encoder that do not affect its weights


@dataclass(frozen=True)
class Weights:
    """Weights of the members of a merge. They are scaled to the sum 1.

    members: one weight per member.
    parts: part of the encoder (parts.py) -> weights of the members for the parameters of this part.
    """

    members: tuple[float, ...]
    parts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{part} {_format(weights)}" for part, weights in self.parts.items()]
        return "; ".join([_format(self.members), *parts])


def _format(weights: Sequence[float]) -> str:
    return " ".join(format(weight, "g") for weight in weights)


def merge(members: Mapping[str, Encoder], weights: Weights, method: Method = "linear") -> Encoder:
    """Return the weighted average of encoders, as an encoder in eval mode.

    members: name -> encoder; names are used in error messages. The first one determines the class, the tasks and the
        arguments of the result. A SharedEncoder, such as a pretrained model, can be merged with an encoder that has
        experts; its weights then serve as each expert's.
    method: "linear", or "slerp" for two members: along the arc between each pair of tensors.

    Averages are computed in float64, and stored in the dtype of the first member. If only one member has a weight above
    0, its parameters are copied bit for bit. Raises UserError if the members differ in architecture, tokenizer or
    tasks, or if the weights do not fit them.
    """
    merged = copy.deepcopy(next(iter(members.values())))
    merged.origin = ""
    check_members(members)
    _check_weights(weights, len(members), method, merged)
    states = [weights_for(encoder, merged) for encoder in members.values()]
    average = _slerp if method == "slerp" else _linear
    averages = {}
    for name in merged.state_dict():
        shares = value_of(name, weights.parts, weights.members)
        used = [(state[name], share / sum(shares)) for state, share in zip(states, shares, strict=True) if share > 0]
        is_averaged = used[1:] and used[0][0].is_floating_point()  # keys of features are equal (check_members)
        averages[name] = average(*zip(*used, strict=True)) if is_averaged else used[0][0]
    load_weights(merged, averages, "the merged encoder")
    return merged.eval()


def merge_with_start(checkpoint: Path, start: Path, share: float, merged: Path) -> None:
    """Write a checkpoint with the weighted average of a run's encoder and the encoder before training (WiSE-FT).

    checkpoint: checkpoint of the run. start: checkpoint of the encoder before training, whose weight is `share`.
    merged: file to write. It has no optimizer states, so training cannot resume from it.
    """
    content = read_checkpoint(checkpoint)
    state = dict(content["state_dict"])
    for name, before in read_checkpoint(start)["state_dict"].items():
        if before.is_floating_point():
            state[name] = _linear((state[name], before), (1 - share, share)).to(state[name].dtype)
    kept = {key: content[key] for key in content if key not in TRAINING_ONLY}
    write_checkpoint(kept | {"state_dict": state, "optimizer_states": []}, merged)


def _linear(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return reduce(torch.add, (share * tensor.double() for tensor, share in zip(tensors, shares, strict=True)))


def _slerp(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Interpolate two tensors along the arc between them (Shoemake 1985, section 3.3).

    Zero tensors have no direction, and nearly parallel tensors have no unique arc, so both are interpolated linearly.
    """
    a, b = (tensor.double() for tensor in tensors)
    cosine = (a * b).sum() / (a.norm() * b.norm())  # nan for zeros
    angle = torch.acos(cosine.clamp(-1, 1))
    if not NEARLY_PARALLEL < angle < torch.pi - NEARLY_PARALLEL:
        return _linear(tensors, shares)
    return (torch.sin(shares[0] * angle) * a + torch.sin(shares[1] * angle) * b) / torch.sin(angle)


def check_members(members: Mapping[str, Encoder]) -> None:
    """Raise UserError if encoders cannot be merged. The message says how they differ."""
    if len(members) < 2:
        raise UserError(f"expected at least two models to merge, got {len(members)}")
    (first_name, first), *others = members.items()
    for name, other in others:
        if problem := _difference(first, other):
            raise UserError(f"{name} cannot be merged with {first_name}: {problem}")


def _difference(first: Encoder, other: Encoder) -> str:
    """Return a difference that prevents merging two encoders, or "" if there is none."""
    kind, first_kind = type(other).__name__, type(first).__name__
    if type(first) is not type(other) and not isinstance(other, SharedEncoder):
        advice = f"; name the {kind} first, because it has experts" if isinstance(first, SharedEncoder) else ""
        return f"it is a {kind}, not a {first_kind}{advice}"
    if problem := _different_settings(first, other) or _different_parameters(first, other):
        return problem
    return "" if tokenization(first.tokenizer) == tokenization(other.tokenizer) else "it has another tokenizer"


def _different_settings(first: Encoder, other: Encoder) -> str:
    # A SharedEncoder's experts are only names.
    with_experts = type(first) is type(other) and not isinstance(first, SharedEncoder)
    tasks = [sorted(encoder.tasks.items() if with_experts else encoder.tasks) for encoder in (first, other)]
    differing = {"tasks": tasks} if tasks[0] != tasks[1] else {}
    settings = [backbone_settings(e) | {k: v for k, v in e.config.items() if k not in USE_ONLY} for e in (first, other)]
    for key in settings[0].keys() & settings[1].keys():
        if settings[0][key] != settings[1][key]:
            differing[key] = [s[key] for s in settings]
    return "; ".join(f"{key} is {b}, not {a}" for key, (a, b) in sorted(differing.items()))


def _different_parameters(first: Encoder, other: Encoder) -> str:
    expected, weights = first.state_dict(), weights_for(other, first)
    for name, tensor in expected.items():
        if name not in weights:
            return f"it has no parameter {name}"
        if weights[name].shape != tensor.shape:
            return f"its parameter {name} has the shape {tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
        if not tensor.is_floating_point() and not torch.equal(weights[name].cpu(), tensor.cpu()):
            return f"its {name} belong to other texts"
    added = [name for name in weights if name not in expected]
    return f"it also has the parameter {added[0]}" if added else ""


def _check_weights(weights: Weights, num_members: int, method: str, encoder: Encoder) -> None:
    check_parts("parts", weights.parts, encoder.state_dict())
    for name, values in {"weights": weights.members, **weights.parts}.items():
        if len(values) != num_members:
            raise UserError(f"{name}: expected {num_members} weights, one per model, got {len(values)}")
        if min(values) < 0 or not 0 < sum(values) < float("inf"):
            raise UserError(f"{name}: expected weights of at least 0, and one above 0, got {_format(values)}")
    if method == "slerp" and num_members != 2:
        raise UserError(f"slerp merges two models, got {num_members}; merge them in pairs, or use linear")


def greedy_soup(num_members: int, score: Callable[[Weights], float]) -> Weights:
    """Return the weights of a greedy soup (arXiv 2203.05482, recipe 1).

    Start with the best member. Add the others in order of their own scores, with equal weights, and keep each one
    unless the score falls.
    """

    def soup(members: Sequence[int]) -> Weights:
        return Weights(tuple(float(member in members) for member in range(num_members)))

    scores = [score(soup([member])) for member in range(num_members)]
    order = sorted(range(num_members), key=lambda member: -scores[member])
    chosen, best = order[:1], scores[order[0]]
    for member in order[1:]:
        if (value := score(soup([*chosen, member]))) >= best:
            chosen, best = [*chosen, member], value
    return soup(chosen)


def sweep(values: Sequence[float], score: Callable[[Weights], float], parts: Sequence[str] = ()) -> Weights:
    """Return the best weights of two members. The first member tries all `values`, and the second gets the rest up to
    1.

    parts: parts whose weights are then chosen one by one, while all other parts have their best weights so far. A part
        keeps its weights unless others score higher.
    """
    pairs = [(value, 1 - value) for value in values]
    best = max((Weights(pair) for pair in pairs), key=score)
    for part in parts:
        others = [Weights(best.members, {**best.parts, part: pair}) for pair in pairs if pair != best.members]
        best = max((best, *others), key=score)  # ties go to the first
    return best


def narrowest_parts(encoder: Encoder) -> list[str]:
    """Return the parts of an encoder, with each expert on its own, in the order of its parameters."""
    return list(dict.fromkeys(parts_of(name)[0] for name in encoder.state_dict()))
