"""Turn texts into vectors: tokenise, copy and compute at the same time.

Threads tokenise ahead (datamodules/tokens.py). The ids of a block are copied to the device in one piece, and its
vectors are copied back in one piece, while the device computes the next block. The host waits for a block only when its
vectors are needed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from datamodules.packed import Tokens, token_hash
from datamodules.records import Document
from datamodules.text import length_sorted_chunks
from datamodules.tokens import Encoding, TokenTable, tokenise_ahead
from lightning_modules.retrieval.compute import default_token_budget
from lightning_modules.throughput import forward_flops

if TYPE_CHECKING:
    from lightning_modules.encoders.base import Encoder

BLOCK = 8192  # number of texts that are sorted by length and copied together; a whole corpus may not fit in memory


@dataclass(frozen=True)
class PassShape:
    """Limits of a forward pass, and its exact shape if vectors must not depend on the other texts.

    Kernels for matrix products, and the last bits of their results, depend on the number of rows. So on a GPU, all
    batch-invariant passes are filled up to the same numbers of tokens and texts, and the same maximum length. On a CPU,
    threads divide the rows, so the bits depend on the position of a text. Therefore, each text gets its own pass.

    token_budget, most_texts: maximum numbers of tokens and texts.
    filled: numbers of texts and tokens, and maximum length, after adding fillers.
    """

    token_budget: int
    most_texts: int | None = None
    filled: tuple[int, int, int] | None = None

    @classmethod
    def invariant(cls, token_budget: int, max_length: int, device: torch.device) -> PassShape:
        """Return a shape that makes vectors independent of other texts."""
        if device.type == "cpu":
            return cls(token_budget, most_texts=1)
        token_budget = max(token_budget, max_length)
        most_texts = max(token_budget // 8, 1)
        num_texts = most_texts + -(-(token_budget + max_length + most_texts) // (max_length - 1))
        return cls(token_budget, most_texts, (num_texts, token_budget + max_length + num_texts, max_length))

    def fill(self, tokens: Tokens) -> Tokens:
        return tokens.fill(*self.filled) if self.filled else tokens


def encode_units(
    encoder: Encoder,
    units: Iterable[Sequence[Document]],
    tasks: Sequence[str],
    token_budget: int,
    advance: Callable[[int], None] | None,
    batch_invariant: bool = False,
) -> Generator[dict[str, Tensor]]:
    """Yield for each unit: task -> vectors (n, D) of its texts, in float32 on the CPU. Units are encoded separately.

    batch_invariant: whether the bits of a vector must not depend on the other texts.
    advance: function called after each forward pass is launched, with its number of texts.
    """
    shape = PassShape(token_budget)
    if batch_invariant:
        shape = PassShape.invariant(token_budget, encoder.max_length, encoder.device)
    blocks: deque[_Block] = deque()
    launched: deque[_Block] = deque()
    most = 1 if is_asynchronous(encoder.device) else 0  # number of blocks that the device may still be computing
    with closing(tokenise_ahead(_jobs(encoder, units, tasks, blocks))) as tables:
        for table in tables:
            launched.append(blocks.popleft())
            launched[-1].launch(table, shape, advance)
            yield from _finished(launched, most)
    yield from _finished(launched, 0)


def encode_on_device(encoder: Encoder, documents: Sequence[Document], tasks: Sequence[str]) -> dict[str, Tensor]:
    """Return task -> vectors (n, D) of texts, in float32 on the encoder's device. The host does not wait for them."""
    vectors: dict[str, Tensor] = {}
    tasks_of, shape = _tasks_by_prompt(encoder, tasks), PassShape(default_token_budget(encoder.device))
    jobs = ((Encoding(encoder.tokenizer, prompt, encoder.max_length), documents) for prompt in tasks_of)
    with closing(tokenise_ahead(jobs)) as tables:
        for same_prompt, table in zip(tasks_of.values(), tables, strict=True):
            rows, computed = _compute(encoder, table, same_prompt, shape, None)
            position = torch.from_numpy(np.argsort(rows)).to(encoder.device, non_blocking=True)
            vectors |= {task: in_chunks[position] for task, in_chunks in computed.items()}
    return vectors


def vectors_of_task(results: Generator[dict[str, Tensor]], task: str) -> Generator[Tensor]:
    """Yield the vectors of one task."""
    with closing(results):
        for vectors in results:
            yield vectors[task]


def _jobs(
    encoder: Encoder, units: Iterable[Sequence[Document]], tasks: Sequence[str], blocks: deque[_Block]
) -> Iterator[tuple[Encoding, Sequence[Document]]]:
    """Yield the texts of each block, once for each prompt, and append the block to `blocks`."""
    tasks_of = _tasks_by_prompt(encoder, tasks)
    for documents in units:
        vectors = {task: torch.empty(len(documents), encoder.dimension) for task in tasks}
        starts = range(0, max(len(documents), 1), BLOCK)
        for prompt, same_prompt in tasks_of.items():
            encoding = Encoding(encoder.tokenizer, prompt, encoder.max_length)
            for start in starts:
                blocks.append(_Block(encoder, {task: vectors[task][start : start + BLOCK] for task in same_prompt}))
                yield encoding, documents[start : start + BLOCK]
        blocks[-1].unit = vectors


def _tasks_by_prompt(encoder: Encoder, tasks: Sequence[str]) -> dict[str, list[str]]:
    """Return prompt -> the tasks whose texts start with it."""
    tasks_of: dict[str, list[str]] = {}
    for task in dict.fromkeys(tasks):
        tasks_of.setdefault(encoder.prompts.get(task, ""), []).append(task)
    return tasks_of


def _compute(
    encoder: Encoder,
    table: TokenTable,
    tasks: Sequence[str],
    shape: PassShape,
    advance: Callable[[int], None] | None,
) -> tuple[np.ndarray, dict[str, Tensor]]:
    """Return the texts' rows in the table, shortest text first, and task -> vectors in this order, on the device."""
    chunks = list(length_sorted_chunks(table.lengths().tolist(), shape.token_budget, shape.most_texts))
    rows = np.concatenate(chunks)
    computed: dict[str, list[Tensor]] = {task: [] for task in tasks}
    with encoder.inferring():
        conditions = {task: encoder.condition(task) for task in tasks}
        counts = [len(chunk) for chunk in chunks]
        for tokens in copied_to(encoder.device, table.take(rows), counts, encoder.reads_keys):
            for task, vectors in encoder.forward_tasks(shape.fill(tokens), tasks, conditions).items():
                computed[task].append(vectors[: len(tokens)].float())
            encoder.encoded["texts"] += len(tokens)
            encoder.encoded["tokens"] += tokens.num_tokens
            if advance is not None:
                advance(len(tokens))
        encoder.encoded["flops"] += forward_flops(encoder, table.lengths(), *tasks)
        return rows, {task: torch.cat(vectors) for task, vectors in computed.items()}


def _finished(launched: deque[_Block], most: int) -> Iterator[dict[str, Tensor]]:
    """Wait for the first blocks until `most` are left, and yield the vectors of complete units."""
    while len(launched) > most:
        block = launched.popleft()
        block.finish()
        if block.unit is not None:
            yield block.unit


class _Block:
    """Texts that are encoded together.

    vectors: task -> tensor (n, D) to fill.
    unit: vectors of the unit, if this is the unit's last block.
    """

    def __init__(self, encoder: Encoder, vectors: dict[str, Tensor]):
        self.encoder, self.vectors = encoder, vectors
        self.unit: dict[str, Tensor] | None = None
        self.order = torch.zeros(0, dtype=torch.int64)
        self.computed: dict[str, HostCopy] = {}

    def launch(self, table: TokenTable, shape: PassShape, advance: Callable[[int], None] | None) -> None:
        """Compute the vectors, and start to copy them to the host."""
        if not len(table):
            return
        rows, computed = _compute(self.encoder, table, list(self.vectors), shape, advance)
        self.order = torch.from_numpy(rows)
        self.computed = {task: HostCopy(vectors) for task, vectors in computed.items()}

    def finish(self) -> None:
        """Wait for the copies, and put the vectors into the order of the texts."""
        for task, copy in self.computed.items():
            self.vectors[task][self.order] = copy.wait()
        self.computed = {}


def is_asynchronous(device: torch.device) -> bool:
    """Return whether the host can prepare the next block while the device computes."""
    return device.type == "cuda"


def copied_to(device: torch.device, table: TokenTable, counts: Sequence[int], has_keys: bool) -> Iterator[Tokens]:
    """Copy the ids of consecutive texts to the device at once, and yield them in batches of `counts` texts.

    has_keys: whether to compute the keys of the texts; otherwise, they are 0.
    """
    ends = np.cumsum(counts)
    all_lengths = table.lengths()
    lengths = [all_lengths[end - count : end] for count, end in zip(counts, ends, strict=True)]
    offsets = [np.cumsum([0, *batch]) for batch in lengths]
    keys = tuple(map(token_hash, table)) if has_keys else (0,) * len(table)
    host = host_buffer(sum(map(len, offsets)) + len(table.ids), torch.int32, device)
    np.concatenate([*offsets, table.ids], out=host.numpy(), casting="same_kind")
    moved = host.to(device, non_blocking=True)
    first, text, token = 0, 0, len(moved) - len(table.ids)
    for batch, count in zip(lengths, counts, strict=True):
        size = int(batch.sum())
        # Copies, because kernels assume the alignment of a newly allocated tensor.
        ids, starts = moved[token : token + size].long(), moved[first : first + count + 1].clone()
        yield Tokens(ids, starts, tuple(batch.tolist()), keys[text : text + count])
        first, text, token = first + count + 1, text + count, token + size


class HostCopy:
    """A copy of a tensor on the host, which is complete after wait()."""

    def __init__(self, tensor: Tensor):
        if not is_asynchronous(tensor.device):
            self.copy, self.event = tensor.cpu(), None
            return
        self.copy = host_buffer(tensor.shape, tensor.dtype, tensor.device)
        self.copy.copy_(tensor, non_blocking=True)
        self.event = torch.cuda.Event()
        self.event.record()

    def wait(self) -> Tensor:
        if self.event is not None:
            self.event.synchronize()
        return self.copy


def host_buffer(shape: Sequence[int] | int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised tensor on the host, in pinned memory if it is exchanged with a GPU."""
    return torch.empty(shape, dtype=dtype, pin_memory=is_asynchronous(device))
