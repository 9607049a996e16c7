"""One buffer for all tensors of a batch, so that the batch moves between processes and devices in one copy.

The tensors may be in tuples and dataclasses. Moving them copies the buffer, and makes the same views of the copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; every tensor starts at a multiple of it
Value = TypeVar("Value")


class View(NamedTuple):
    """Position of a tensor in a buffer. strides, offset: numbers of elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


def moved(value: Value, move: Callable[[Tensor], Tensor]) -> Value:
    """Return a value whose tensors are views of one moved buffer. move: function that moves the buffer, uint8."""
    buffer, views = pack(value)
    return unpack(move(buffer), views)


def pack(value: Value) -> tuple[Tensor, Value]:
    """Return the tensors of a value as one buffer, uint8, and the value with each tensor replaced by a View.

    If the tensors already are views of one buffer, nothing is copied.
    """
    tensors: list[Tensor] = []
    _replace(value, Tensor, tensors.append)
    buffer = _shared_memory(tensors)
    if buffer is None:
        buffer, tensors = _copy(tensors)
    views = iter([View(x.dtype, tuple(x.shape), x.stride(), int(x.storage_offset())) for x in tensors])
    return buffer, _replace(value, Tensor, lambda _: next(views))


def unpack(buffer: Tensor, value: Value) -> Value:
    """Return the value with each View replaced by its tensor."""
    return _replace(value, View, lambda view: buffer.view(view.dtype).as_strided(view.shape, view.strides, view.offset))


def _shared_memory(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return the memory that all tensors share, as bytes, or None if they do not share one block."""
    storage = tensors[0].untyped_storage()
    if storage.nbytes() % ALIGNMENT or any(x.untyped_storage()._cdata != storage._cdata for x in tensors):
        return None
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _copy(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return a new buffer with copies of tensors, and the copies."""
    sizes = [x.numel() * x.element_size() for x in tensors]
    aligned = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    buffer = torch.zeros(sum(aligned), dtype=torch.uint8, device=tensors[0].device)
    spaces = zip(tensors, sizes, buffer.split(aligned), strict=True)
    return buffer, [space[:size].view(x.dtype).view(x.shape).copy_(x) for x, size, space in spaces]


def _replace(value: Any, kind: type, replacement: Callable[[Any], Any]) -> Any:
    """Replace everything of one kind inside a value. A replacement of None leaves it unchanged."""
    if isinstance(value, kind):
        new = replacement(value)
        return value if new is None else new
    if isinstance(value, tuple) and not (value and isinstance(value[0], int | str)):
        items = [_replace(item, kind, replacement) for item in value]
        changed = any(new is not old for new, old in zip(items, value, strict=True))
        return (type(value)(*items) if hasattr(value, "_fields") else tuple(items)) if changed else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        old = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        new = {name: _replace(field, kind, replacement) for name, field in old.items()}
        changes = {name: field for name, field in new.items() if field is not old[name]}
        return dataclasses.replace(value, **changes) if changes else value
    return value
