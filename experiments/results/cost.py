"""What a measurement costs: texts and tokens that are encoded, seconds of devices, memory, and money."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from experiments.results.memory import Memory
from lightning_modules.distributed.collectives import world_size
from lightning_modules.encoders.base import Encoder


class Meter:
    """Of one system on one benchmark, from its construction on. encoder: none for BM25."""

    def __init__(self, encoder: Encoder | None):
        self.encoder, self.before = encoder, dict(encoder.encoded) if encoder else {}
        self.memory = Memory(encoder.device if encoder else torch.device("cpu"))
        self.memory.forget_peak()

    def read(self, seconds: Mapping[str, float]) -> dict[str, Any]:
        """Of all ranks together. seconds: of this one, by part.

        texts, tokens: that were encoded now, without those whose vectors were there. texts_per_second: of these, of one
        device. device_seconds: of all devices, for each of which it counts how long the first was busy. memory_mb: the
        most that a device, or without GPU a process, held at once.
        """
        encoded = {key: count - self.before[key] for key, count in self.encoder.encoded.items()} if self.encoder else {}
        here = {"texts": 0, "tokens": 0, **encoded, "memory_mb": round(self.memory.peak() / 2**20)}
        ranks = [here]
        if world_size() > 1:
            ranks = [here] * world_size()
            dist.all_gather_object(ranks, here)
        spent, encoding = sum(seconds.values()), seconds.get("encode", 0.0)
        return {
            "texts": sum(of["texts"] for of in ranks),
            "tokens": sum(of["tokens"] for of in ranks),
            "texts_per_second": round(here["texts"] / encoding, 1) if here["texts"] and encoding else None,
            "devices": len(ranks),
            "device_seconds": round(spent * len(ranks), 2),
            "memory_mb": max(of["memory_mb"] for of in ranks),
        }


def with_money(results: dict[str, Any], price: float | None) -> dict[str, Any]:
    """The same results, in which costs have "money": seconds of devices at a price of each hour, if there is one."""
    for result in results.values() if price is not None else ():
        for of in result["measured"].values():
            of["cost"]["money"] = round(of["cost"]["device_seconds"] / 3600 * price, 6)
    return results


def total(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of one system on several benchmarks: sums, and the most memory. measured: of each of them.

    money: each at the price of its time; only where all have one, as it stands beside the seconds of all.
    """
    costs = [of["cost"] for of in measured]
    encoding = sum(of["seconds"]["encode"] for of in measured if of["cost"]["texts"])
    found = {key: sum(of[key] for of in costs) for key in ("texts", "tokens", "device_seconds")}
    found |= {"devices": max(of["devices"] for of in costs), "memory_mb": max(of["memory_mb"] for of in costs)}
    if all("money" in of for of in costs):
        found["money"] = sum(of["money"] for of in costs)
    return found | {"texts_per_second": found["texts"] / found["devices"] / encoding if encoding else None}
