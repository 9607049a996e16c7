"""Exchange values between ranks. With a single process, functions return their input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather as all_gather_with_gradient

from datamodules.records import UserError
from lightning_modules.distributed.signals import Preempted

Result = TypeVar("Result")


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


_host_groups: WeakKeyDictionary[Any, dist.ProcessGroup | None] = WeakKeyDictionary()


def host_group() -> dist.ProcessGroup | None:
    """Return a group of all ranks that exchanges tensors in host memory, or None for the default group.

    Exchanging such tensors does not wait for pending work on the GPU. All ranks must make the first call.
    """
    default = dist.group.WORLD
    if default not in _host_groups:
        _host_groups[default] = None if "cpu:" in dist.get_backend_config() else dist.new_group(backend="gloo")
    return _host_groups[default]


def from_first_rank(value: Any) -> Any:
    """Return the first rank's value on all ranks."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather_objects(value: Result) -> list[Result]:
    """Return the values of all ranks, in rank order."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Replace a tensor by its mean over ranks, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


def largest(number: int) -> int:
    """Return the largest number of any rank."""
    if world_size() == 1:
        return number
    maximum = torch.tensor(number)
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=host_group())
    return int(maximum)


def on_any_rank(flag: bool) -> bool:
    """Return whether the flag is set on any rank."""
    return bool(largest(int(flag)))


def together(work: Callable[[], Result]) -> Result:
    """Call a function on all ranks, wait for all of them, and return this rank's result.

    If one rank raises an error, all ranks raise one, so that no rank waits forever: the same UserError, or a
    RuntimeError that names the rank and its error. Preempted ends the rank at once.
    """
    if world_size() == 1:
        return work()
    result: Any = None
    error: Exception | None = None
    try:
        result = work()
    except Preempted:
        raise
    except Exception as raised:
        error = raised
    is_mistake = isinstance(error, UserError)
    messages = gather_objects(None if error is None else (is_mistake, str(error) if is_mistake else repr(error)))
    if error is not None and not is_mistake:
        raise error
    for number, message in enumerate(messages):
        if message is not None:
            raise UserError(message[1]) if message[0] else RuntimeError(f"rank {number} failed: {message[1]}")
    return result


def _num_rows(rows: Tensor) -> list[int]:
    """Return the number of rows of each rank."""
    counts = torch.empty(world_size(), dtype=torch.int64)
    dist.all_gather_into_tensor(counts, torch.tensor([len(rows)]), group=host_group())
    return counts.tolist()


def _pad(rows: Tensor, count: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows (n, ...) of all ranks, in rank order, without gradients. n may differ by rank."""
    if world_size() == 1:
        return rows
    counts = _num_rows(rows)
    padded = _pad(rows, max(counts)).contiguous()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gather_lists(lists: Tensor) -> Tensor:
    """Return the lists (n, k) of all ranks, padded with -1 to the longest. n and k may differ by rank."""
    if world_size() == 1:
        return lists
    missing = largest(lists.shape[1]) - lists.shape[1]
    return gather_rows(torch.nn.functional.pad(lists, (0, missing), value=-1))


class GatheredDocuments(NamedTuple):
    """Documents of all ranks. offset: row of the first document of this rank."""

    vectors: Tensor  # (M, D)
    ids: Tensor  # (M,)
    offset: int


def gather_documents(documents: Tensor, document_ids: Tensor) -> GatheredDocuments:
    """Return the documents of all ranks, with gradients.

    The loss of a rank is the mean over its own queries. DDP averages gradients over ranks, which gives the gradient of
    a single process with the whole batch.

    documents: vectors of this rank's documents, (m, D).
    document_ids: ids of the documents, (m,).
    """
    if world_size() == 1:
        return GatheredDocuments(documents, document_ids, 0)
    counts = _num_rows(documents)
    parts = all_gather_with_gradient(_pad(documents, max(counts)))
    gathered = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return GatheredDocuments(gathered, gather_rows(document_ids), sum(counts[: rank()]))
