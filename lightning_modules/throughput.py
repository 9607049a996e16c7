"""Model FLOPs utilisation (MFU): useful floating-point operations per second, relative to the device's speed.

Useful operations are those that the vectors of real tokens need, no matter how they are computed:

    products    2 per weight and token of each linear layer. With pooling "cls", the last layer needs queries, outputs
                and the feed-forward sub-layer of one token per text.
    attention   4 D per query and key: the scores, and the weighted sum of the values. A sliding window limits the keys,
                and the prefix of an instruction adds some.
    backward    once for the gradients of trained weights, once for the gradients of inputs. So a training step that
                trains everything has 3 times the operations of a forward pass.

Padding, the second forward pass of GradCache or of gradient checkpointing, further experts that routing tries in
training, embeddings, LayerNorm, activations, the encoding of an instruction and the loss do not count.
For BERT-base with mean pooling, a forward pass takes 170 MFLOP per token and 0.037 MFLOP per token and key; with "cls",
7 % less. The ceiling is the speed of one large matrix product of the encoder's own width.

Shapes: n texts, D hidden size.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datamodules.packed import Companion, ContrastiveBatch, Tokens
from lightning_modules.distributed.collectives import gather_rows, world_size
from lightning_modules.encoders.attention import AttentionContext, Settings, attend_padded, choose_kernel
from lightning_modules.memory import Memory
from lightning_modules.parts import expert_in
from lightning_modules.retrieval.compute import default_token_budget

if TYPE_CHECKING:
    from lightning_modules.encoders.base import Encoder

DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}  # start of a precision's name -> type
ROUNDS, MAX_SECONDS = 7, 0.4  # timings of the ceiling, and seconds after which three of them are enough


class LayerFlops(NamedTuple):
    """Useful operations (FLOPs) of one layer in a forward pass: matrix products, and attention."""

    products: float
    attention: float


def forward_flops(encoder: Encoder, lengths: Sequence[int] | np.ndarray, *tasks: str) -> float:
    """Return the useful operations of a forward pass.

    lengths: number of tokens of each text, with special tokens and prompt, (n,).
    tasks: tasks to encode each text for, by default any single task. Tasks with the same vectors count once, and so do
        layers that tasks share.
    """
    distinct = list({encoder.served_by(task): task for task in tasks}.values()) or [next(iter(encoder.tasks))]
    num_shared = encoder.num_shared_layers if len(distinct) > 1 else 0
    first, *others = ([layer.products + layer.attention for layer in _layers(encoder, lengths, t)] for t in distinct)
    return sum(first) + sum(sum(layers[num_shared:]) for layers in others)


def training_flops(encoder: Encoder, lengths: Sequence[int] | np.ndarray, task: str) -> float:
    """Return the useful operations of forward and backward pass for one task. lengths: as in forward_flops."""
    total, embeddings = 0.0, encoder.backbone.get_submodule("embeddings")
    has_gradient = any(p.requires_grad for p in embeddings.parameters())
    for index, (products, attention) in enumerate(_layers(encoder, lengths, task)):
        total += products * (1 + _trained_share(encoder, index, task)) + attention
        if has_gradient:
            total += products + 2 * attention
        layer = _serving(encoder, index, task, *encoder.layer_modules(index))
        has_gradient = has_gradient or any(p.requires_grad for p in layer)
    return total


def _layers(encoder: Encoder, lengths: Sequence[int] | np.ndarray, task: str) -> Iterator[LayerFlops]:
    """Yield the operations of each layer."""
    config, lengths = encoder.backbone.config, np.asarray(lengths, dtype=np.int64)
    size, is_gated = encoder.dimension, config.model_type == "modernbert"
    feed_forward = (3 if is_gated else 2) * size * config.intermediate_size
    kinds = getattr(config, "layer_types", ["full_attention"] * encoder.num_layers)
    prefix = _prefix_length(encoder, task)
    num_texts, num_tokens = len(lengths), int(lengths.sum())
    for index, kind in enumerate(kinds):
        window = config.sliding_window if kind == "sliding_attention" else None
        is_pooled = index == encoder.num_layers - 1 and encoder.pools_one_position
        computed = num_texts if is_pooled else num_tokens
        keys = _keys_of_first(lengths, window) if is_pooled else _keys_of_all(lengths, window)
        attentions, feed_forwards = _copies(encoder, index)
        weights = 2 * size**2 * attentions + feed_forward * feed_forwards
        adapters = _adapters(encoder, index, task)
        weights += sum(p.numel() for adapter in adapters for p in adapter.parameters() if p.ndim == 2)
        yield LayerFlops(
            products=2.0 * (computed * weights + num_tokens * 2 * size**2 * attentions),  # keys, values of all tokens
            attention=4.0 * size * (int(keys.sum()) + prefix * computed) * attentions,
        )


def _keys_of_all(lengths: np.ndarray, window: int | None) -> np.ndarray:
    """Return the number of pairs of tokens of each text that are at most `window` apart, (n,)."""
    if window is None:
        return lengths**2
    reach = np.minimum(window, lengths - 1)
    return lengths + 2 * reach * lengths - reach * (reach + 1)


def _keys_of_first(lengths: np.ndarray, window: int | None) -> np.ndarray:
    """Return the number of tokens that the first token of each text attends to, (n,)."""
    return lengths if window is None else np.minimum(lengths, window + 1)


def _prefix_length(encoder: Encoder, task: str) -> int:
    """Return the number of instruction tokens that texts attend to."""
    if getattr(encoder, "instruction_family", None) is None:
        return 0
    instructions: Any = encoder.instructions
    return len(encoder.tokenizer(instructions[task])["input_ids"])


def _copies(encoder: Encoder, index: int) -> tuple[int, int]:
    """Return how many experts of a layer compute each token: in attention, and in the feed-forward sub-layer."""
    if str(index) not in getattr(encoder, "stitches", ()):
        return 1, 1
    moe: Any = encoder
    return len(moe.experts) if moe.attention else 1, len(moe.experts) if moe.ffn else 1


def _adapters(encoder: Encoder, index: int, task: str) -> list[torch.nn.Module]:
    """Return a list with the task's adapter in a layer, or [] if the encoder has no adapters."""
    adapters = getattr(encoder, "adapters", None)
    return [] if adapters is None else [adapters[encoder.tasks[task]][index]]


def _serving(encoder: Encoder, index: int, task: str, *modules: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the parameters of a layer (and its adapter) that serve a task."""
    named = [(expert_in(name), p) for module in modules for name, p in module.named_parameters()]
    expert = encoder.tasks[task]
    # With stitches or gates, a text may use all experts.
    reads_all = max(_copies(encoder, index)) > 1 or expert not in {name for name, _ in named}
    parameters = [p for name, p in named if reads_all or name in (None, expert)]
    return parameters + [p for adapter in _adapters(encoder, index, task) for p in adapter.parameters()]


def _trained_share(encoder: Encoder, index: int, task: str) -> float:
    """Return the share of a layer's weights that are trained, among those that serve a task."""
    weights = [p for p in _serving(encoder, index, task, encoder.family.layers[index]) if p.ndim == 2]
    return sum(p.numel() for p in weights if p.requires_grad) / sum(p.numel() for p in weights)


def encoder_ceiling(encoder: Encoder, dtype: torch.dtype) -> float:
    """Return the speed of a matrix product on the encoder's device, with its hidden size, in FLOP/s."""
    device, size = encoder.device, encoder.dimension
    return gemm_ceiling(device, dtype, (default_token_budget(device), size, 4 * size))


@functools.cache
def gemm_ceiling(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> float:
    """Measure the speed of a matrix product in FLOP/s, once per process. Takes less than a second.

    shape: rows of the left factor, inner dimension, and columns of the right factor.
    """
    rows, inner, columns = shape
    generator = torch.Generator(device).manual_seed(0)  # the global generator belongs to the training
    left, right = (
        torch.randn(size, generator=generator, device=device).to(dtype) for size in ((rows, inner), (columns, inner))
    )
    product = left.new_empty(rows, columns)

    def seconds(repeats: int) -> float:
        started = time.perf_counter()
        for _ in range(repeats):
            torch.matmul(left, right.T, out=product)
        synchronize(device)
        return (time.perf_counter() - started) / repeats

    timings: list[float] = []
    repeats = 1 if device.type == "cpu" else 10  # one product is too short for the clock
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        synchronize(device)
        seconds(repeats)  # warms up
        while len(timings) < 3 or (len(timings) < ROUNDS and sum(timings) * repeats < MAX_SECONDS):
            timings.append(seconds(repeats))
    return 2.0 * rows * inner * columns / statistics.median(timings)


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished all its work. A CPU always has."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


class Group(NamedTuple):
    """Texts that are encoded in the same way: as a task, and with or without a backward pass."""

    task: str
    has_backward: bool

    def flops(self, encoder: Encoder, lengths: Sequence[int] | np.ndarray) -> float:
        """Return the useful operations of a step for texts of the group. lengths: as in forward_flops."""
        return (training_flops if self.has_backward else forward_flops)(encoder, lengths, self.task)


def text_lengths(batch: ContrastiveBatch) -> list[tuple[Group, np.ndarray]]:
    """Return (group, number of tokens of each text) for a batch, (U,), and for each of its companions, (n,)."""
    return [
        (Group(texts.task, not getattr(texts, "detached", False)), np.concatenate([c.lengths for c in texts.chunks]))
        for texts in _all_texts(batch)
    ]


def _all_texts(batch: ContrastiveBatch) -> tuple[ContrastiveBatch | Companion, ...]:
    return batch, *batch.companions


def num_positions(batch: ContrastiveBatch, padded: bool) -> int:
    """Return the number of positions for which attention is computed. padded: whether texts are padded for it."""
    chunks = [chunk for texts in _all_texts(batch) for chunk in texts.chunks]
    return sum(len(chunk) * chunk.max_length for chunk in chunks) if padded else batch.num_tokens


def pads_attention(encoder: Encoder, dtype: torch.dtype) -> bool:
    """Return whether training pads the texts of a chunk to compute attention. Nothing else is ever padded."""
    config, token = encoder.backbone.config, Tokens.pack([[0]])
    dropout = getattr(config, "attention_probs_dropout_prob", getattr(config, "attention_dropout", 0.0))
    query = torch.empty(1, dtype=dtype, device=encoder.device)
    bias = query if encoder.family.distance_bias else None  # it only matters whether a bias exists
    context = AttentionContext(token, token.input_ids, {}, bias)
    return choose_kernel(query, context, Settings(dropout=dropout)) is attend_padded


def computing_dtype(precision: str) -> torch.dtype:
    """Return the dtype in which matrix products are computed. precision: a name such as "bf16-mixed" or "bf16"."""
    return next((dtype for name, dtype in DTYPES.items() if precision.startswith(name)), torch.float32)


@dataclass(frozen=True)
class Speed:
    """Speed of training, over all ranks.

    tokens_per_second: distinct texts count once, and padding does not count.
    pairs_per_second: a pair is a query with one of its positives.
    mfu: useful operations per second, as a share of the ceilings of all devices.
    padding_share: share of padding among the positions for which attention is computed; 0 without padding.
    data_seconds, data_share: time spent waiting for data, and its share, on the rank that waited longest.
    memory_mb: peak memory of the GPU or the process since training started, on the rank with the most.
    """

    tokens_per_second: float
    pairs_per_second: float
    mfu: float
    padding_share: float
    data_seconds: float
    data_share: float
    memory_mb: float

    def text(self) -> str:
        """Return the figures as a part of a line."""
        return (
            f"{self.tokens_per_second:,.0f} tokens/s  {self.pairs_per_second:,.1f} pairs/s  MFU {self.mfu:.0%}  "
            f"padding {self.padding_share:.0%}  waiting {self.data_share:.0%}  {self.memory_mb:,.0f} MB"
        )


class ThroughputMeter:
    """Measures training steps, from the request for a batch to the end of its step, summed until the next reading.

    Evaluation, checkpoints and mining between two steps do not count. Nothing in a step waits for a GPU, so read only
    after everything is computed.

    encoder: the encoder in training.
    ceiling: speed of this rank's device, in FLOP/s.
    padded: whether texts are padded to compute attention.
    """

    def __init__(self, encoder: Encoder, ceiling: float, padded: bool = False):
        self.encoder, self.ceiling, self.padded, self.memory = encoder, ceiling, padded, Memory(encoder.device)
        self.memory.reset_peak()  # measuring the ceiling may have used more memory than a step
        self._clear()

    def _clear(self) -> None:
        self.seconds, self.waited, self.tokens, self.positions = 0.0, 0.0, 0, 0
        self.pairs: list[Tensor] = []  # on the GPU until they are read
        self.lengths: dict[Group, list[np.ndarray]] = defaultdict(list)  # lengths of the texts of each batch

    def add(self, batch: ContrastiveBatch, seconds: float, waited: float) -> None:
        """Add a training step. seconds: time of the step, including the time `waited` for the batch."""
        self.seconds, self.waited = self.seconds + seconds, self.waited + waited
        self.tokens += batch.num_tokens
        self.positions += num_positions(batch, self.padded)
        self.pairs.append((batch.positives >= 0).sum())
        for group, lengths in text_lengths(batch):
            self.lengths[group].append(lengths)

    def read(self) -> Speed:
        """Return the speed of all ranks since the last reading. All ranks must call this."""
        flops = sum(group.flops(self.encoder, np.concatenate(x)) for group, x in self.lengths.items())
        sums = [self.tokens, int(torch.stack(self.pairs).sum()), flops, self.positions, self.ceiling]
        row = torch.tensor([[*sums, self.seconds, self.waited, self.memory.peak()]], dtype=torch.float64)
        rows = gather_rows(row.to(self.encoder.device) if world_size() > 1 else row).cpu()
        tokens, pairs, flops, positions, ceiling, *_ = rows.sum(0).tolist()
        *_, seconds, waited, memory = rows.max(0).values.tolist()
        self._clear()
        return Speed(
            tokens_per_second=tokens / seconds,
            pairs_per_second=pairs / seconds,
            mfu=flops / seconds / ceiling,
            padding_share=1 - tokens / positions,
            data_seconds=waited,
            data_share=waited / seconds,
            memory_mb=memory / 2**20,
        )
