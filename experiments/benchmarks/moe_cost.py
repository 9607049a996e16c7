"""Cost of experts: python -m experiments.benchmarks.moe_cost [layers=6] [hidden=384] [texts=16] [tokens=128]

Forward, and forward with backward, of encoders with attention and FFN experts, 3 to 32 of them, against the dense one
of the same shape. All take turns in one process; each ratio is the median over the rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table

from experiments.console import entry_point, key_values, whole_number
from lightning_modules.encoders.backbone import SPECIAL_TOKENS, random_backbone
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.moe import MoEEncoder
from lightning_modules.encoders.shared import SharedEncoder

KEYS = {"layers": "6", "hidden": "384", "texts": "16", "tokens": "128", "rounds": "15"}
VARIANTS = (("attention", 3), ("attention", 32), ("ffn", 3), ("ffn", 32), ("both", 3))


def encoder_of(kind: str, num_experts: int, values: dict[str, int]) -> Encoder:
    torch.manual_seed(0)
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *(f"t{i}" for i in range(1000))])}
    shape = {
        "hidden_size": values["hidden"],
        "num_hidden_layers": values["layers"],
        "num_attention_heads": values["hidden"] // 32,
        "intermediate_size": 4 * values["hidden"],
    }
    backbone, tokenizer = random_backbone(shape, vocabulary)
    tasks = {f"task{i}": f"expert{i}" for i in range(num_experts)}
    if kind == "dense":
        return SharedEncoder(backbone, tokenizer, tasks)
    return MoEEncoder(backbone, tokenizer, tasks, attention=kind != "ffn", ffn=kind != "attention")


def timed(function: Callable[[], None]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def ratios(functions: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median, over rounds in which all take turns, of each function's time over that of the one named "dense"."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 2):
        for name, function in functions.items():
            times[name].append(timed(function))
    rounds_of = {name: values[2:] for name, values in times.items()}  # two to warm up
    return {
        name: statistics.median(a / b for a, b in zip(values, rounds_of["dense"], strict=True))
        for name, values in rounds_of.items()
    }


def main(arguments: Sequence[str]) -> None:
    values = {key: whole_number(key, value) for key, value in key_values(arguments, KEYS).items()}
    ids = torch.randint(5, 1000, (values["texts"], values["tokens"]))
    mask = torch.ones_like(ids)
    encoders = {"dense": encoder_of("dense", 1, values)}
    encoders |= {f"{kind}, {count} experts": encoder_of(kind, count, values) for kind, count in VARIANTS}

    def forward(encoder: Encoder) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                encoder.eval()(ids, mask, "task0")

        return run

    def step(encoder: Encoder) -> Callable[[], None]:
        def run() -> None:
            encoder.zero_grad(set_to_none=True)
            encoder.train()(ids, mask, "task0").square().mean().backward()

        return run

    forward_ratios = ratios({name: forward(encoder) for name, encoder in encoders.items()}, values["rounds"])
    step_ratios = ratios({name: step(encoder) for name, encoder in encoders.items()}, values["rounds"])
    table = Table(title=f"time over that of the dense encoder ({', '.join(f'{k} {v}' for k, v in values.items())})")
    for heading in ("encoder", "forward", "forward + backward"):
        table.add_column(heading, justify="left" if heading == "encoder" else "right")
    for name in encoders:
        table.add_row(name, f"{forward_ratios[name]:.3f}", f"{step_ratios[name]:.3f}")
    Console().print(table)


if __name__ == "__main__":
    entry_point(main)
