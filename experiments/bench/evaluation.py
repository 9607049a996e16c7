"""What an evaluation costs: python -m experiments.bench.evaluation [part=loop] [queries=500] [documents=30000] ...

part=loop    500 papers against 30,000 labels, encoded, ranked with named labels first, and measured; beside the way of
             SciMult's authors: texts padded to 512 tokens, queries one at a time and labels 64 at a time, a sort of the
             whole corpus for each query, and membership in lists. Their encoding is timed on `sample` queries and four
             times as many labels, and scaled to all in proportion; their ranking is timed on all queries.
part=large   generated vectors on disk, half precision: 1.4 million of 768 dimensions, 6,000 queries, the 10,000 best of
             each, ranked and measured. Memory is the most that the process ever held, mapped pages of the file
             included.
"""

from __future__ import annotations

import logging
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from datamodules.records import Benchmark, Document
from datamodules.text import NameMatcher, input_text
from experiments.bench.timing import backbone_of
from experiments.results.results import evaluate_encoder
from experiments.shared.console import choice, entry_point, key_values, whole_number
from experiments.shared.progress import Progress
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.shared import SharedEncoder
from lightning_modules.retrieval.evaluation import rank_vectors
from lightning_modules.retrieval.measure import measure
from lightning_modules.retrieval.search import Shards
from lightning_modules.retrieval.vector_cache import VectorCache

log = logging.getLogger(__name__)

KEYS = {
    "part": "loop",
    "queries": "0",
    "documents": "0",
    "k": "10000",
    "dimension": "768",
    "layers": "6",
    "hidden": "384",
    "sample": "16",
    "threads": "2",
    "folder": "",
}
SIZES = {"loop": (500, 30_000), "large": (6_000, 1_400_000)}
CUTS = (20, 50, 100)


def labels_and_papers(num_queries: int, num_documents: int) -> Benchmark:
    """Labels of two to four words and twelve of definition; papers of about 200 words that name a label or a few."""
    rng = np.random.default_rng(0)

    def some(count: int) -> str:
        return " ".join(f"t{i}" for i in (rng.zipf(1.3, count) % 1000))

    def name() -> str:
        return " ".join(f"t{i}" for i in rng.integers(0, 1000, rng.integers(2, 5)))

    labels = {f"l{i}": Document(f"l{i}", name(), some(12)) for i in range(num_documents)}
    names, queries, qrels = list(labels), {}, {}
    for i in range(num_queries):
        gold = [names[j] for j in rng.integers(0, num_documents, 5)]
        words = f"{some(int(np.clip(rng.normal(190, 50), 60, 400)))} {labels[gold[0]].title}"
        queries[f"q{i}"] = Document(f"q{i}", some(12), words)
        qrels[f"q{i}"] = dict.fromkeys(gold, 1)
    first = NameMatcher(labels).of_all(queries.values())
    return Benchmark("labels", "task0", "test", labels, queries, qrels, first=first)


def loop(values: dict[str, int]) -> None:
    log.info("generating texts")
    benchmark = labels_and_papers(values["queries"], values["documents"])
    encoder = SharedEncoder(*backbone_of(values), {"task0": "expert0"}, max_length=512).eval()
    metrics = [f"recall@{k}" for k in CUTS]
    encoder.encode(list(benchmark.corpus.values())[:100], "task0")  # warm
    started = clock()
    NameMatcher(benchmark.corpus).of_all(benchmark.queries.values())
    vectors = VectorCache(encoder, token_budget=2048)
    with tempfile.TemporaryDirectory() as folder:
        found = evaluate_encoder(
            "ours", encoder, [benchmark], metrics, Path(folder), similarity="dot", token_budget=2048, vectors=vectors
        )["labels"]
    ours = clock() - started
    theirs, figures = authors_way(encoder, vectors, benchmark, values["sample"])
    log.info("ours: %.0f s, of processors %.0f s; %s", *ours, found["measured"]["ours"]["seconds"])
    for part, seconds in theirs.items():
        log.info("the authors' way, %s: %.0f s, of processors %.0f s", part, *seconds)
    log.info("ratio: %.1f, of processor time %.1f", *(sum(theirs.values()) / ours))
    for metric, value in found["systems"]["ours"].items():
        log.info("%s: ours %.2f, theirs %.2f", metric, 100 * value, 100 * figures[metric])
        assert round(100 * value, 2) == round(100 * figures[metric], 2)


@torch.no_grad()
def authors_way(
    encoder: Encoder, vectors: VectorCache, benchmark: Benchmark, sample: int
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Time of each part, and figures of all queries. vectors: ours, which theirs are checked to equal."""
    queries, labels = list(benchmark.queries.values()), list(benchmark.corpus.values())

    def embed(documents: Sequence[Document]) -> torch.Tensor:
        texts = [input_text(document, encoder.tokenizer.sep_token) for document in documents]
        tokens = encoder.tokenizer(texts, padding="max_length", truncation=True, max_length=512, return_tensors="pt")
        return encoder.backbone(tokens["input_ids"], attention_mask=tokens["attention_mask"])[0][:, 0].cpu()

    some = queries[:: max(1, len(queries) // sample)][:sample]
    started = clock()
    by_one = torch.cat([embed([query]) for query in some])
    of_queries = (clock() - started) / len(some) * len(queries)
    started = clock()
    embed(labels[: 4 * sample])
    of_labels = (clock() - started) / (4 * sample) * len(labels)
    torch.testing.assert_close(by_one, encoder.encode(some, "task0"), atol=1e-4, rtol=1e-4)

    q = torch.from_numpy(vectors.of_this_rank(queries, "task0", "queries"))
    d = torch.from_numpy(vectors.of_all_ranks(labels, "task0", "labels")[0])
    ids, totals = [label.id for label in labels], dict.fromkeys(CUTS, 0.0)
    started = clock()
    for query, vector in zip(queries, q, strict=True):
        ranked = [ids[i] for i in np.argsort(-torch.matmul(vector, d.T).numpy()).tolist()]
        named = list(benchmark.first[query.id])
        ranked = [label for label in ranked if label in named] + [label for label in ranked if label not in named]
        gold = list(benchmark.qrels[query.id])
        for k in CUTS:
            totals[k] += len([label for label in gold if label in ranked[:k]]) / len(gold)
    seconds = {"encoding queries": of_queries, "encoding labels": of_labels, "ranking": clock() - started}
    return seconds, {f"recall@{k}": total / len(queries) for k, total in totals.items()}


def large(values: dict[str, int], folder: Path) -> None:
    count, dimension = values["documents"], values["dimension"]
    path, rng = folder / "documents.f16", np.random.default_rng(0)
    log.info("writing %d vectors to %s", count, path)
    vectors = np.memmap(path, dtype=np.float16, mode="w+", shape=(count, dimension))
    for first in range(0, count, 50_000):
        part = vectors[first : first + 50_000]
        part[:] = rng.standard_normal(part.shape, dtype=np.float32)
    vectors.flush()
    del vectors
    queries = rng.standard_normal((values["queries"], dimension), dtype=np.float32)
    documents = Shards([np.memmap(path, dtype=np.float16, mode="r", shape=(count, dimension))])
    ids = [f"q{i}" for i in range(len(queries))]
    benchmark = Benchmark(
        "large",
        "search",
        "test",
        {f"d{i}": Document(f"d{i}") for i in range(count)},
        {query: Document(query) for query in ids},
        {query: {f"d{i}": 1 for i in rng.integers(0, count, 10)} for query in ids},
    )
    before = peak()
    started = time.perf_counter()
    with Progress("ranking", "pairs", count * len(ids)) as progress:
        run = rank_vectors(benchmark, ids, queries, documents, values["k"], advance=progress.advance)
    ranked = time.perf_counter() - started
    figures = measure(run, benchmark, ["mrr@10000", "precision@10", "ndcg@10", "recall@1000"])
    log.info("ranking %.0f s, measuring %.0f s", ranked, time.perf_counter() - started - ranked)
    log.info("peak memory %.1f GB, before the ranking %.1f GB", peak(), before)
    log.info("figures of chance: %s", {name: round(value, 5) for name, value in figures.items()})


def clock() -> np.ndarray:
    """Seconds on the wall, and of all processors for this process: the latter tell more on a busy machine."""
    return np.array([time.perf_counter(), time.process_time()])


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main(arguments: Sequence[str]) -> None:
    texts = key_values(arguments, KEYS)
    part = choice("part", texts["part"], tuple(SIZES))
    values = {key: whole_number(key, texts[key], least=0) for key in KEYS if key not in ("part", "folder")}
    for key, size in zip(("queries", "documents"), SIZES[part], strict=True):
        values[key] = values[key] or size
    torch.set_num_threads(values["threads"])
    if part == "loop":
        loop(values)
        return
    with tempfile.TemporaryDirectory(dir=texts["folder"] or None) as folder:
        large(values, Path(folder))


if __name__ == "__main__":
    entry_point(main)
