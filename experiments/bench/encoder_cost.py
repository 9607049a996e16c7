"""Cost of every variant against the dense encoder of the same shape, and of several tasks against one, in one run.

    python -m experiments.bench.encoder_cost [layers=12] [hidden=768] [texts=8] [tokens=256] [backward=no]

The defaults are BERT-base, and an instruction of 16 tokens. Each variant is timed beside the dense encoder, a pair at a
time, in one process; a figure is the median of the pairs' ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from experiments.shared.console import choice, entry_point, key_values, whole_number
from lightning_modules.encoders.backbone import SPECIAL_TOKENS, random_backbone
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.instruct import InstructEncoder, PromptEncoder
from lightning_modules.encoders.moe import MoEEncoder, expert_layers
from lightning_modules.encoders.shared import SharedEncoder

KEYS = {
    "layers": "12",
    "hidden": "768",
    "texts": "8",
    "tokens": "256",
    "instruction": "16",
    "rounds": "9",
    "backward": "no",
}
EXPERTS = (3, 8, 32)
RULES = ("mod2", "mod3", "mod4", "ge6mod3", "le7mod3", "last2", "last1", "all")
Run = Callable[[], object]


def backbone_of(values: dict[str, int], num_words: int = 1000) -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *(f"t{i}" for i in range(num_words))])}
    shape = {
        "hidden_size": values["hidden"],
        "num_hidden_layers": values["layers"],
        "num_attention_heads": max(1, values["hidden"] // 64),
        "intermediate_size": 4 * values["hidden"],
    }
    return random_backbone(shape, vocabulary)


def tasks_of(count: int) -> dict[str, str]:
    return {f"task{i}": f"expert{i}" for i in range(count)}


def encoders(values: dict[str, int]) -> Iterable[tuple[str, Encoder]]:
    """Name and encoder of all variants, first the dense one again: how far from 1 it is shows the noise."""
    yield "dense", SharedEncoder(*backbone_of(values), tasks_of(1))
    for name, ffn in (("MHA", False), ("FFN", True)):
        for count in EXPERTS:
            yield (
                f"{name}, {count} experts",
                MoEEncoder(*backbone_of(values), tasks_of(count), attention=not ffn, ffn=ffn),
            )
    # With [CLS] and [SEP] it has the wanted number of tokens.
    instructions = {"task0": " ".join(["t1"] * (values["instruction"] - 2))}
    yield "Instruction", InstructEncoder(*backbone_of(values), {"task0": "task0"}, instructions)
    longest = values["tokens"] + values["instruction"]
    yield "Prompt", PromptEncoder(*backbone_of(values), {"task0": "task0"}, instructions, max_length=longest)


def seconds(function: Run) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def ratio(function: Run, base: Run, rounds: int) -> float:
    """Median over pairs of a function's time over that of base, which take turns to be first."""
    function(), base()
    found = []
    for i in range(rounds):
        pair = (function, base) if i % 2 else (base, function)
        taken = {id(f): seconds(f) for f in pair}
        found.append(taken[id(function)] / taken[id(base)])
    return statistics.median(found)


def forward(encoder: Encoder, ids: torch.Tensor, task: str | list[str]) -> Run:
    encoder.eval()

    def run() -> None:
        with torch.inference_mode():
            encoder(ids, torch.ones_like(ids), task)

    return run


def step(encoder: Encoder, ids: torch.Tensor, task: str | list[str]) -> Run:
    def run() -> None:
        encoder.zero_grad(set_to_none=True)
        encoder(ids, torch.ones_like(ids), task).square().mean().backward()

    return run


def variants(values: dict[str, int], backward: bool) -> Table:
    """Each variant against the dense encoder: all texts of one task, and texts of different tasks in turn."""
    make = step if backward else forward
    ids = torch.randint(5, 1000, (values["texts"], values["tokens"]))
    prompt = torch.randint(5, 1000, (values["texts"], values["instruction"] - 1))
    what = "forward + backward" if backward else "forward"
    shape = ", ".join(f"{key} {value}" for key, value in values.items())
    table = Table("encoder", "one task", "mixed batch", title=f"{what}, time over the dense encoder's ({shape})")
    dense = make(SharedEncoder(*backbone_of(values), tasks_of(1)), ids, "task0")
    for name, encoder in encoders(values):
        given = torch.cat([ids[:, :1], prompt, ids[:, 1:]], 1) if name == "Prompt" else ids
        figures = [ratio(make(encoder, given, "task0"), dense, values["rounds"])]
        if isinstance(encoder, MoEEncoder):
            order = [list(encoder.tasks)[i % len(encoder.tasks)] for i in range(values["texts"])]
            figures.append(ratio(make(encoder, given, order), dense, values["rounds"]))
        table.add_row(name, *(f"{figure:.3f}" for figure in figures))
    return table


def several_tasks(values: dict[str, int]) -> Table:
    """Encoding for three tasks at once against one task, by layer rule; the arithmetic counts layers."""
    ids = torch.randint(5, 1000, (values["texts"], values["tokens"]))
    mask, tasks, depth = torch.ones_like(ids), list(tasks_of(3)), values["layers"]
    table = Table("layers", "measured", "arithmetic", title="vectors for three tasks at once, over one task's cost")
    for rule in RULES:
        try:
            first = expert_layers(rule, depth)[0]
        except ValueError:
            continue
        encoder = MoEEncoder(*backbone_of(values), tasks_of(3), layers=rule, pooling="mean").eval()

        def run(wanted: list[str], encoder: Encoder = encoder) -> None:
            with torch.inference_mode():
                encoder.forward_tasks(ids, mask, wanted)

        found = ratio(lambda run=run: run(tasks), lambda run=run: run(tasks[:1]), values["rounds"])
        table.add_row(rule, f"{found:.3f}", f"{(first + 3 * (depth - first)) / depth:.3f}")
    return table


def main(arguments: Sequence[str]) -> None:
    given = key_values(arguments, KEYS)
    backward = choice("backward", given.pop("backward"), ("yes", "no")) == "yes"
    values = {key: whole_number(key, value, 3 if key == "instruction" else 1) for key, value in given.items()}
    console = Console()
    console.print(variants(values, backward))
    if not backward:
        console.print(several_tasks(values))


if __name__ == "__main__":
    entry_point(main)
