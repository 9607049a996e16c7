"""What ranks exchange. On one process every function gives its input back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather as all_gather_with_gradient

from datamodules.records import UserError

Result = TypeVar("Result")


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def from_first_rank(value: Any) -> Any:
    """The first rank's value, on all ranks."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def largest(number: int, device: torch.device | str = "cpu") -> int:
    """The largest of the ranks' numbers."""
    if world_size() == 1:
        return number
    found = torch.tensor(number, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def on_any_rank(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Whether the flag is set on one of the ranks."""
    return bool(largest(int(flag), device))


def together(work: Callable[[], Result]) -> Result:
    """What work gives on this rank, once it is done on all.

    A UserError of one rank is raised on all of them: else the others would wait for one that is gone.
    """
    if world_size() == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except UserError as raised:
        error = str(raised)
    errors: list[str | None] = [None] * world_size()
    dist.all_gather_object(errors, error)
    for first in filter(None, errors):
        raise UserError(first)
    return result


def _counts(rows: Tensor) -> list[int]:
    """The number of rows on every rank."""
    counts = torch.empty(world_size(), dtype=torch.int64, device=rows.device)
    dist.all_gather_into_tensor(counts, torch.tensor([len(rows)], device=rows.device))
    return counts.tolist()


def _pad(rows: Tensor, count: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])


def gather_rows(rows: Tensor) -> Tensor:
    """Rows (n, ...) of all ranks, in the order of ranks, without gradient; n may differ between ranks."""
    if world_size() == 1:
        return rows
    counts = _counts(rows)
    padded = _pad(rows, max(counts)).contiguous()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gather_lists(lists: Tensor, padding: int = -1) -> Tensor:
    """Lists (n, k) of all ranks, whose lengths k may differ too, padded to the longest."""
    if world_size() == 1:
        return lists
    longest = torch.tensor(lists.shape[1], device=lists.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    missing = int(longest) - lists.shape[1]
    return gather_rows(torch.nn.functional.pad(lists, (0, missing), value=padding))


def gather_documents(documents: Tensor, document_ids: Tensor) -> tuple[Tensor, Tensor, int]:
    """Documents of all ranks with gradients, and their ids.

    documents: (m, D), document_ids: (m,) on this rank. Returns (M, D), (M,) and where this rank's own begin.
    Each rank's loss is the mean over its own queries; DDP's mean over ranks then makes the gradient that of one process
    with the whole batch.
    """
    if world_size() == 1:
        return documents, document_ids, 0
    counts = _counts(documents)
    parts = all_gather_with_gradient(_pad(documents, max(counts)))
    gathered = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return gathered, gather_rows(document_ids), sum(counts[: rank()])
