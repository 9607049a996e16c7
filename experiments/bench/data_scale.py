"""Measure how fast a large collection loads."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from transformers import BertTokenizer

from datamodules.batches import BatchOptions
from datamodules.files import atomic_folder
from datamodules.options import option
from datamodules.packed import ContrastiveBatch
from datamodules.readers.beir import BeirReader, BeirWriter
from datamodules.records import Document, Task
from datamodules.tasks import SearchDataModule
from experiments.bench.timing import DEVICES, in_new_process, training_step
from experiments.bench.workload import SHAPES
from experiments.config.arguments import parse
from experiments.shared.console import entry_point, table_console
from lightning_modules.encoders.backbone import random_backbone, word_vocabulary
from lightning_modules.encoders.shared import SharedEncoder
from lightning_modules.memory import Memory
from lightning_modules.retrieval.compute import resolve_device
from lightning_modules.throughput import synchronize

LETTERS = "abcdefghijklmnopqrstuvwxyz"
STEPS = 2  # timed training steps, after a warm-up step


@dataclass(kw_only=True)
class DataScaleOptions:
    """Measure how fast a large collection loads.

    Generates a collection in BEIR layout, converts it and tokenises it. A new process then measures the seconds until
    the first batch, at step 0 and at a late step, the memory of the data, and the speed of the loader. That speed is
    compared with training a BERT of MiniLM's size on the same batches.
    """

    folder: Path = option(help="folder for the generated data, reused by the next call")
    documents: int = option(3_000_000, "number of documents", minimum=1)
    pairs: int = option(10_000_000, "number of query-document pairs, ten per query", minimum=10)
    step: int = option(100_000, "late step at which loading is measured too", minimum=0)
    batches: int = option(50, "number of batches to time", minimum=1)
    workers: int = option(0, "number of processes that prepare batches", minimum=0)
    device: str = option("auto", DEVICES)


def main(arguments: Sequence[str]) -> None:
    options = parse(DataScaleOptions, arguments)
    device = str(resolve_device(options.device))
    data, cache = options.folder / f"{options.documents}-{options.pairs}", options.folder / "cache"
    table = Table("", "", title=f"{options.documents:,} documents, {options.pairs:,} pairs")
    if not data.is_dir():
        with atomic_folder(data) as folder:
            generate(folder, options.documents, options.pairs)
    num_texts = options.documents + options.pairs // 10
    started = time.perf_counter()
    task = build_task(data, cache)
    seconds = time.perf_counter() - started
    table.add_row("conversion (or finding the copy), s", f"{seconds:.1f}")
    table.add_row("documents and queries per second", f"{num_texts / seconds:,.0f}")
    task.tokenizer, started = tokenizer(), time.perf_counter()
    task.train_dataloader()
    seconds = time.perf_counter() - started
    table.add_row("tokenisation (or finding the tokens), s", f"{seconds:.1f}")
    table.add_row("texts per second", f"{num_texts / seconds:,.0f}")
    for step in (0, options.step):
        settings = (data, cache, step, options.batches, options.workers, device)
        figures = in_new_process(measure_batches, *settings, time.time())
        for name, figure in figures.items():
            table.add_row(f"step {step:,}: {name}", f"{figure:,.2f}")
    table_console().print(table)


def generate(folder: Path, num_documents: int, num_pairs: int) -> None:
    """Write documents of about 60 words, and queries with ten judged documents each."""
    rng = random.Random(0)
    vocabulary = words(rng)
    abstracts = [" ".join(rng.choices(vocabulary, k=60)) for _ in range(5_000)]
    with BeirWriter(folder) as writer:
        for i in range(num_documents):
            title = f"{vocabulary[i % 20_000]} {i}"
            writer.add_document(Document(f"paper-{i}", title, abstracts[i * 7 % 5_000]))
        for i in range(num_pairs // 10):
            writer.add_query(Document(f"query-{i}", "", f"{vocabulary[i % 20_000]} {i % 977}"))
            for j in range(10):
                document = (i * 7919 + 31 * j) % num_documents
                writer.add_judgement("train", f"query-{i}", f"paper-{document}", int(j > 1))


def words(rng: random.Random) -> list[str]:
    return ["".join(rng.choices(LETTERS, k=rng.randint(3, 10))) for _ in range(20_000)]


def build_task(folder: Path, cache: Path, num_batches: int = 1, workers: int = 0) -> SearchDataModule:
    options = BatchOptions(
        batch_size=16, num_batches=num_batches, max_length=192, token_budget=2048, cache=str(cache), num_workers=workers
    )
    task = SearchDataModule(Task("search", "search"), {"large": BeirReader(str(folder))}, options)
    task.setup()
    return task


def tokenizer():
    """Return a tokenizer that knows the words of the texts, but not the numbers in titles."""
    return BertTokenizer(vocab=word_vocabulary(words(random.Random(0)), 30_000))


def measure_batches(
    folder: Path, cache: Path, step: int, num_batches: int, workers: int, device: str, launched: float
) -> dict[str, float]:
    """Measure the loader in this process, starting at a step. launched: when the process started."""
    text_tokenizer = tokenizer()
    memory = Memory(torch.device("cpu"))
    before, started = memory.now(), time.perf_counter()
    task = build_task(folder, cache, step + num_batches + 1, workers)
    task.tokenizer = text_tokenizer
    loader = task.train_dataloader()
    loader.position = step
    batches = iter(loader)
    next(batches)
    figures = {"first batch, s": time.perf_counter() - started, "with all imports, s": time.time() - launched}
    started, kept, count = time.perf_counter(), [], 0
    for batch in itertools.islice(batches, num_batches):
        count += num_texts([batch])
        kept = [*kept, batch][: STEPS + 1]
    rate = count / (time.perf_counter() - started)
    figures |= {"memory for the data, GB": (memory.now() - before) / 1e9, "texts per second of the loader": rate}
    if step:
        training = training_rate(kept, text_tokenizer.get_vocab(), device)
        figures |= {"texts per second of training MiniLM": training, "loader over training": rate / training}
    return figures


def training_rate(batches: Sequence[ContrastiveBatch], vocabulary: dict[str, int], device: str) -> float:
    """Return the texts per second of training on the batches. The first one is a warm-up."""
    encoder = SharedEncoder(*random_backbone(SHAPES["minilm"], vocabulary), {"search": "search"}, pooling="mean")
    step = training_step(encoder.to(device), [batch.to(device) for batch in batches])
    step()
    synchronize(encoder.device)
    started = time.perf_counter()
    for _ in batches[1:]:
        step()
    synchronize(encoder.device)
    return num_texts(batches[1:]) / (time.perf_counter() - started)


def num_texts(batches: Sequence[ContrastiveBatch]) -> int:
    return sum(len(chunk) for batch in batches for chunk in batch.chunks)


if __name__ == "__main__":
    entry_point(main)
