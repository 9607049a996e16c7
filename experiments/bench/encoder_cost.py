"""Measure the time of each encoder relative to the dense one: python -m experiments.bench.encoder_cost --help"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table

from datamodules.options import option
from datamodules.packed import Tokens
from experiments.bench.timing import DEVICES, Run, backbone_of, tasks_of, time_ratio
from experiments.config.arguments import parse
from experiments.shared.console import entry_point, table_console
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.control import ControlEncoder
from lightning_modules.encoders.cross_stitch import CrossStitchEncoder
from lightning_modules.encoders.instruct import InstructEncoder, PromptEncoder
from lightning_modules.encoders.moe import MoEEncoder, expert_layers
from lightning_modules.encoders.shared import SharedEncoder
from lightning_modules.retrieval.compute import resolve_device
from lightning_modules.throughput import synchronize

RULES = ("mod2", "mod3", "mod4", "ge6mod3", "le7mod3", "last2", "last1", "all")


@dataclass(kw_only=True)
class CostOptions:
    """Compare the speed of each encoder with the dense one, and of encoding for several tasks with encoding for one.

    The default sizes are those of BERT-base. The two encoders of a comparison take turns in the same process, and the
    result is the median ratio of their times.
    """

    layers: int = option(12, "number of layers", minimum=1)
    hidden: int = option(768, "hidden size", minimum=1)
    texts: int = option(8, "number of texts in a batch", minimum=1)
    tokens: int = option(256, "number of tokens of a text", minimum=1)
    instruction: int = option(16, "number of tokens of an instruction, including [CLS] and [SEP]", minimum=3)
    experts: tuple[int, ...] = option((3, 8, 32), "numbers of experts", minimum=1)
    rounds: int = option(9, "number of measurements per comparison", minimum=1)
    backward: bool = option(False, "include the backward pass")
    device: str = option("auto", DEVICES)


def main(arguments: Sequence[str]) -> None:
    options, console = parse(CostOptions, arguments), table_console()
    console.print(compare_encoders(options))
    if not options.backward:
        console.print(compare_numbers_of_tasks(options))


def compare_encoders(options: CostOptions) -> Table:
    """Compare each encoder with the dense one, on batches of one task and of several tasks."""
    ids = torch.randint(5, 1000, (options.texts, options.tokens))
    prompt = torch.randint(5, 1000, (options.texts, options.instruction - 1))
    passes, device = "forward + backward" if options.backward else "forward", resolve_device(options.device)
    sizes = ", ".join(f"{key} {value}" for key, value in vars(options).items() if key not in ("backward", "device"))
    table = Table("encoder", "one task", "mixed batch", title=f"{passes} on {device}, time relative to dense ({sizes})")
    dense = make_run(SharedEncoder(*backbone_of(vars(options)), tasks_of(1)), ids, "task0", options.backward, device)
    for name, encoder in encoders(options):
        inputs = torch.cat([ids[:, :1], prompt, ids[:, 1:]], 1) if name == "Prompt" else ids
        batches = ["task0"]
        if isinstance(encoder, MoEEncoder):
            batches.append([list(encoder.tasks)[i % len(encoder.tasks)] for i in range(options.texts)])
        runs = [make_run(encoder, inputs, tasks, options.backward, device) for tasks in batches]
        table.add_row(name, *(f"{time_ratio(run, dense, options.rounds):.3f}" for run in runs))
    return table


def encoders(options: CostOptions) -> Iterator[tuple[str, Encoder]]:
    """Yield each encoder and its name. The first is the dense baseline; its ratio to itself shows the noise."""
    size = vars(options)
    yield "dense", SharedEncoder(*backbone_of(size), tasks_of(1))
    for name, ffn in (("MHA", False), ("FFN", True)):
        for count in options.experts:
            encoder = MoEEncoder(*backbone_of(size), tasks_of(count), attention=not ffn, ffn=ffn)
            yield f"{name}, {count} experts", encoder
    count = options.experts[0]
    for name, kind in (("Cross-stitch MHA", CrossStitchEncoder), ("Control MHA", ControlEncoder)):
        yield f"{name}, {count} experts", kind(*backbone_of(size), tasks_of(count))
    instructions = {"task0": " ".join(["t1"] * (options.instruction - 2))}  # without [CLS] and [SEP]
    yield "Instruction", InstructEncoder(*backbone_of(size), {"task0": "task0"}, instructions)
    max_length = options.tokens + options.instruction
    yield "Prompt", PromptEncoder(*backbone_of(size), {"task0": "task0"}, instructions, max_length=max_length)


def compare_numbers_of_tasks(options: CostOptions) -> Table:
    """Compare encoding for three tasks with encoding for one, for each layer rule. Expected: the ratio of layers."""
    ids, tasks = torch.randint(5, 1000, (options.texts, options.tokens)), list(tasks_of(3))
    device = resolve_device(options.device)
    tokens = Tokens.from_padded(ids, torch.ones_like(ids)).to(device)
    table = Table("layers", "measured", "expected", title="time for the vectors of three tasks relative to one task")
    for rule in RULES:
        try:
            first = expert_layers(rule, options.layers)[0]
        except ValueError:  # the backbone is too small for this rule
            continue
        encoder = MoEEncoder(*backbone_of(vars(options)), tasks_of(3), layers=rule, pooling="mean").to(device).eval()

        @torch.inference_mode()
        def run(names: list[str], encoder: Encoder = encoder) -> None:
            encoder.forward_tasks(tokens, names)
            synchronize(device)

        ratio = time_ratio(lambda run=run: run(tasks), lambda run=run: run(tasks[:1]), options.rounds)
        expected = (first + 3 * (options.layers - first)) / options.layers
        table.add_row(rule, f"{ratio:.3f}", f"{expected:.3f}")
    return table


def make_run(encoder: Encoder, ids: torch.Tensor, task: str | list[str], backward: bool, device: torch.device) -> Run:
    """Return a function that runs a batch forward and, if `backward` is set, backward."""
    encoder.to(device).train(backward)
    tokens = Tokens.from_padded(ids, torch.ones_like(ids)).to(device)

    def run() -> None:
        with torch.inference_mode(not backward):
            vectors = encoder(tokens, task)
        if backward:
            encoder.zero_grad(set_to_none=True)
            vectors.square().mean().backward()
        synchronize(device)

    return run


if __name__ == "__main__":
    entry_point(main)
