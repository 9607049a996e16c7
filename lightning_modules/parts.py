"""Parts of an encoder, by names of parameters. Learning rates and merge weights can be set per part.

embeddings   the embeddings of the backbone
shared       all other parameters that serve every task
experts      the experts and adapters of all tasks; an expert's name selects only that expert
stitches     the weights with which a CrossStitchEncoder mixes its experts
features     the layers that read features of texts: positions in the citation graph, vectors of images
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import nn

from datamodules.records import UserError

T = TypeVar("T")


EXPERT = re.compile(r"(?:\.experts|^adapters)\.(\w+)")


def expert_in(name: str) -> str | None:
    """Return the expert that a parameter or module belongs to, or None if it serves every task."""
    return match[1] if (match := EXPERT.search(name)) else None


def without_expert(name: str) -> str:
    """Return a parameter's name without its expert, which the copies in all experts share."""
    return EXPERT.sub("", name)


def can_name_module(name: str) -> bool:
    """Return whether torch accepts a name for a submodule and for a parameter."""
    return bool(name) and "." not in name and not any(hasattr(x, name) for x in (nn.ModuleDict(), nn.ParameterDict()))


def check_task_names(key: str, tasks: Iterable[str]) -> None:
    """Raise UserError for a task whose name torch refuses for a parameter. key: argument that needs one per task."""
    for task in tasks:
        if not can_name_module(task):
            raise UserError(
                f"{key}: task {task!r} cannot have a parameter of its own, because torch refuses the name; expected a "
                "name without dots that is not an attribute of torch.nn.ModuleDict or torch.nn.ParameterDict"
            )


def parts_of(name: str) -> tuple[str, ...]:
    """Return the parts that a parameter of an encoder belongs to, the narrowest first."""
    if expert := expert_in(name):
        return expert, "experts"
    if (part := name.partition(".")[0]) in ("stitches", "features"):
        return (part,)
    return ("embeddings",) if ".embeddings." in name else ("shared",)


def value_of(name: str, values: Mapping[str, T], default: T) -> T:
    """Return the value of the narrowest part that a parameter belongs to. values: part -> value."""
    return next((values[part] for part in parts_of(name) if part in values), default)


def check_parts(key: str, parts: Iterable[str], names: Iterable[str]) -> None:
    """Raise UserError for a part that none of an encoder's parameters belongs to.

    key: argument with the parts, for the message. names: names of the parameters.
    """
    existing = sorted({part for name in names for part in parts_of(name)})
    if unknown := [part for part in parts if part not in existing]:
        raise UserError(f"{key}: unknown part {unknown[0]!r}; the parts of this encoder are {', '.join(existing)}")
