"""The cost of an evaluation: texts and tokens encoded, device seconds, memory, and money."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lightning_modules.distributed.collectives import world_size
from lightning_modules.encoders.base import Encoder
from lightning_modules.memory import Memory
from lightning_modules.throughput import computing_dtype, encoder_ceiling


@dataclass(kw_only=True)
class Cost:
    """The cost of evaluating a system, over all ranks.

    texts, tokens: numbers encoded, without padding. Texts whose vectors were stored do not count.
    texts_per_second, tokens_per_second: speed of one device while encoding; None if nothing was encoded.
    mfu: useful operations per second of one device, as a share of a large matrix product's (see throughput.py).
    device_seconds: seconds of this rank, times the number of devices.
    memory_mb: peak memory of a GPU, or of a process without one.
    money: price of the device seconds; None if no price was given.
    """

    texts: int
    tokens: int
    texts_per_second: float | None
    devices: int
    device_seconds: float
    memory_mb: int
    tokens_per_second: float | None = None
    mfu: float | None = None
    money: float | None = None

    def price(self, per_hour: float) -> None:
        """Set the money. per_hour: price of one device per hour."""
        self.money = round(self.device_seconds / 3600 * per_hour, 6)


class CostMeter:
    """Measures the cost of one system on one benchmark, from construction to read().

    encoder: None for BM25.
    precision: "fp32" or "bf16".
    """

    def __init__(self, encoder: Encoder | None, precision: str = "fp32"):
        self.encoder, self.before = encoder, dict(encoder.encoded) if encoder else {}
        self.dtype = computing_dtype(precision)
        self.memory = Memory(encoder.device if encoder else torch.device("cpu"))
        self.memory.reset_peak()

    def read(self, seconds: Mapping[str, float]) -> Cost:
        """Return the cost so far. All ranks must call this. seconds: stage -> seconds of this rank."""
        encoded = {key: count - self.before[key] for key, count in self.encoder.encoded.items()} if self.encoder else {}
        usage = {"texts": 0, "tokens": 0, **encoded, "memory_mb": round(self.memory.peak() / 2**20)}
        encode_seconds = seconds.get("encode", 0.0)
        speed = {}
        if usage["texts"] and encode_seconds:
            speed = {f"{unit}_per_second": round(usage[unit] / encode_seconds, 1) for unit in ("texts", "tokens")}
            speed["mfu"] = round(usage["flops"] / encode_seconds / encoder_ceiling(self.encoder, self.dtype), 4)
        ranks = [usage] * world_size()
        if len(ranks) > 1:
            dist.all_gather_object(ranks, usage)
        return Cost(
            texts=sum(rank["texts"] for rank in ranks),
            tokens=sum(rank["tokens"] for rank in ranks),
            **{"texts_per_second": None} | speed,
            devices=len(ranks),
            device_seconds=round(sum(seconds.values()) * len(ranks), 2),
            memory_mb=max(rank["memory_mb"] for rank in ranks),
        )


def total_cost(costs: Sequence[Cost], encode_seconds: Sequence[float]) -> Cost:
    """Add up the costs of one system on several benchmarks; memory is the largest.

    encode_seconds: seconds of encoding for each benchmark. The sum has money only if every cost does.
    """
    with_seconds = [(cost, seconds) for cost, seconds in zip(costs, encode_seconds, strict=True) if cost.texts]
    encoding, devices = sum(seconds for _, seconds in with_seconds), max(cost.devices for cost in costs)
    texts, tokens = sum(cost.texts for cost in costs), sum(cost.tokens for cost in costs)
    has_mfu = encoding and all(cost.mfu is not None for cost, _ in with_seconds)
    return Cost(
        texts=texts,
        tokens=tokens,
        texts_per_second=texts / devices / encoding if encoding else None,
        tokens_per_second=tokens / devices / encoding if encoding else None,
        mfu=sum(cost.mfu * seconds for cost, seconds in with_seconds) / encoding if has_mfu else None,
        devices=devices,
        device_seconds=sum(cost.device_seconds for cost in costs),
        memory_mb=max(cost.memory_mb for cost in costs),
        money=None if any(cost.money is None for cost in costs) else sum(cost.money for cost in costs),
    )
