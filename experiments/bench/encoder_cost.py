"""Time of each variant of the encoder against the dense one: python -m experiments.bench.encoder_cost --help"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from datamodules.options import option
from experiments.bench.timing import Run, backbone_of, tasks_of, time_ratio
from experiments.config.arguments import parse
from experiments.shared.console import entry_point
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.instruct import InstructEncoder, PromptEncoder
from lightning_modules.encoders.moe import MoEEncoder, expert_layers
from lightning_modules.encoders.shared import SharedEncoder

NUM_EXPERTS = (3, 8, 32)
RULES = ("mod2", "mod3", "mod4", "ge6mod3", "le7mod3", "last2", "last1", "all")


@dataclass(kw_only=True)
class CostOptions:
    """Measure the time of each variant against the dense encoder, and of several tasks against one.

    The defaults are those of BERT-base. A variant and the dense encoder run in turns in the same process, and the
    figures are medians of the ratios of their times.
    """

    layers: int = option(12, "number of layers", minimum=1)
    hidden: int = option(768, "hidden size", minimum=1)
    texts: int = option(8, "number of texts in a batch", minimum=1)
    tokens: int = option(256, "number of tokens of a text", minimum=1)
    instruction: int = option(16, "number of tokens of an instruction, including [CLS] and [SEP]", minimum=3)
    rounds: int = option(9, "number of ratios of which the median is taken", minimum=1)
    backward: bool = option(False, "measure forward and backward pass together")


def main(arguments: Sequence[str]) -> None:
    options, console = parse(CostOptions, arguments), Console()
    console.print(compare_variants(options))
    if not options.backward:
        console.print(compare_numbers_of_tasks(options))


def compare_variants(options: CostOptions) -> Table:
    """Compare each variant with the dense encoder: on texts of one task, and on texts of different tasks."""
    make = backward_run if options.backward else forward_run
    ids = torch.randint(5, 1000, (options.texts, options.tokens))
    prompt = torch.randint(5, 1000, (options.texts, options.instruction - 1))
    measured = "forward + backward" if options.backward else "forward"
    sizes = ", ".join(f"{key} {value}" for key, value in vars(options).items() if key != "backward")
    table = Table("encoder", "one task", "mixed batch", title=f"{measured}, time relative to dense ({sizes})")
    dense = make(SharedEncoder(*backbone_of(vars(options)), tasks_of(1)), ids, "task0")
    for name, encoder in variants(options):
        inputs = torch.cat([ids[:, :1], prompt, ids[:, 1:]], 1) if name == "Prompt" else ids
        ratios = [time_ratio(make(encoder, inputs, "task0"), dense, options.rounds)]
        if isinstance(encoder, MoEEncoder):
            tasks = [list(encoder.tasks)[i % len(encoder.tasks)] for i in range(options.texts)]
            ratios.append(time_ratio(make(encoder, inputs, tasks), dense, options.rounds))
        table.add_row(name, *(f"{ratio:.3f}" for ratio in ratios))
    return table


def variants(options: CostOptions) -> Iterator[tuple[str, Encoder]]:
    """Yield the name and encoder of each variant. The first is dense: its distance from 1 is the noise."""
    size = vars(options)
    yield "dense", SharedEncoder(*backbone_of(size), tasks_of(1))
    for name, ffn in (("MHA", False), ("FFN", True)):
        for count in NUM_EXPERTS:
            encoder = MoEEncoder(*backbone_of(size), tasks_of(count), attention=not ffn, ffn=ffn)
            yield f"{name}, {count} experts", encoder
    instructions = {"task0": " ".join(["t1"] * (options.instruction - 2))}  # without [CLS] and [SEP]
    yield "Instruction", InstructEncoder(*backbone_of(size), {"task0": "task0"}, instructions)
    longest = options.tokens + options.instruction
    yield "Prompt", PromptEncoder(*backbone_of(size), {"task0": "task0"}, instructions, max_length=longest)


def compare_numbers_of_tasks(options: CostOptions) -> Table:
    """Compare encoding for three tasks with encoding for one, by layer rule, and with the ratio of layers computed."""
    ids = torch.randint(5, 1000, (options.texts, options.tokens))
    mask, tasks = torch.ones_like(ids), list(tasks_of(3))
    table = Table("layers", "measured", "expected", title="time for the vectors of three tasks relative to one task")
    for rule in RULES:
        try:
            first = expert_layers(rule, options.layers)[0]
        except ValueError:  # no layer of such a small backbone
            continue
        encoder = MoEEncoder(*backbone_of(vars(options)), tasks_of(3), layers=rule, pooling="mean").eval()

        def run(tasks: list[str], encoder: Encoder = encoder) -> None:
            with torch.inference_mode():
                encoder.forward_tasks(ids, mask, tasks)

        ratio = time_ratio(lambda run=run: run(tasks), lambda run=run: run(tasks[:1]), options.rounds)
        expected = (first + 3 * (options.layers - first)) / options.layers
        table.add_row(rule, f"{ratio:.3f}", f"{expected:.3f}")
    return table


def forward_run(encoder: Encoder, ids: torch.Tensor, task: str | list[str]) -> Run:
    encoder.eval()

    def run() -> None:
        with torch.inference_mode():
            encoder(ids, torch.ones_like(ids), task)

    return run


def backward_run(encoder: Encoder, ids: torch.Tensor, task: str | list[str]) -> Run:
    def run() -> None:
        encoder.zero_grad(set_to_none=True)
        encoder(ids, torch.ones_like(ids), task).square().mean().backward()

    return run


if __name__ == "__main__":
    entry_point(main)
