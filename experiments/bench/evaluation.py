"""Measure the time and memory of an evaluation."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from datamodules.options import option
from datamodules.records import Benchmark, Document
from datamodules.text import NameMatcher, input_text
from experiments.bench.timing import DEVICES, backbone_of
from experiments.config.arguments import parse
from experiments.shared.console import entry_point
from experiments.shared.progress import Progress
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.shared import SharedEncoder
from lightning_modules.memory import Memory
from lightning_modules.retrieval.compute import resolve_device
from lightning_modules.retrieval.evaluation import evaluate, measure
from lightning_modules.retrieval.ranking import rank_vectors
from lightning_modules.retrieval.search import Shards
from lightning_modules.retrieval.vector_cache import VectorCache

log = logging.getLogger(__name__)

SIZES = {"loop": (500, 30_000), "large": (6_000, 1_400_000)}  # numbers of queries and documents
CUT_OFFS = (20, 50, 100)
AUTHORS_LENGTH = 512  # tokens that every text is padded to


@dataclass(kw_only=True)
class BenchOptions:
    """Measure the time and memory of an evaluation.

    part=loop ranks 30,000 labels for 500 papers, with the labels that a paper names first, and times this against the
    program of SciMult's authors. Their program pads texts to 512 tokens, encodes queries one by one and labels 64 at a
    time, sorts the whole corpus for each query, and looks ids up in lists. Its encoding is timed on a sample and scaled
    up. Its ranking is timed on all queries.

    part=large evaluates 6,000 queries on 1.4 million generated vectors on disk (768 dimensions, half precision), and
    ranks 10,000 documents for each query. The peak memory includes mapped pages of the file.
    """

    part: Literal["loop", "large"] = option("loop", "what to measure")
    queries: int = option(0, "number of queries; 0: the default of the part", minimum=0)
    documents: int = option(0, "number of documents; 0: the default of the part", minimum=0)
    k: int = option(10_000, "number of documents per query, for part=large", minimum=1)
    dimension: int = option(768, "dimension of the vectors, for part=large", minimum=1)
    layers: int = option(6, "layers of the encoder, for part=loop", minimum=1)
    hidden: int = option(384, "dimension of the encoder, for part=loop", minimum=1)
    sample: int = option(16, "queries to time the authors' encoding on; labels: four times as many", minimum=1)
    threads: int = option(2, "number of threads", minimum=1)
    device: str = option("auto", DEVICES)
    folder: Path | None = option(None, "folder for the vectors of part=large, by default the system's temporary folder")


def main(arguments: Sequence[str]) -> None:
    options = parse(BenchOptions, arguments)
    num_queries, num_documents = SIZES[options.part]
    options.queries, options.documents = options.queries or num_queries, options.documents or num_documents
    torch.set_num_threads(options.threads)
    if options.part == "loop":
        _loop(options)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        _large(options, Path(folder))


def _loop(options: BenchOptions) -> None:
    log.info("generating texts")
    benchmark = _labels_and_papers(options.queries, options.documents)
    shape = {"layers": options.layers, "hidden": options.hidden}
    encoder = SharedEncoder(*backbone_of(shape), {"task0": "expert0"}, max_length=AUTHORS_LENGTH).eval()
    encoder.to(resolve_device(options.device))
    metrics = [f"recall@{k}" for k in CUT_OFFS]
    encoder.encode(list(benchmark.corpus.values())[:100], "task0")  # warm up
    started = _clock()
    NameMatcher(benchmark.corpus).match(benchmark.queries.values())
    vectors = VectorCache(encoder, token_budget=2048)
    with tempfile.TemporaryDirectory() as folder:
        result = evaluate(encoder, benchmark, metrics, vectors=vectors)
        result.write(Path(folder), "ours")
    ours = _clock() - started
    theirs, expected = _authors_program(encoder, vectors, benchmark, options.sample)
    log.info("ours: %.0f s, %.0f s of CPU time; stages: %s", *ours, result.seconds)
    for stage, seconds in theirs.items():
        log.info("the authors' program, %s: %.0f s, %.0f s of CPU time", stage, *seconds)
    log.info("ratio: %.1f, in CPU time %.1f", *(sum(theirs.values()) / ours))
    for metric, value in result.metrics.items():
        log.info("%s: ours %.2f, theirs %.2f", metric, 100 * value, 100 * expected[metric])
        assert round(100 * value, 2) == round(100 * expected[metric], 2)


def _labels_and_papers(num_queries: int, num_documents: int) -> Benchmark:
    """Make labels of two to four words, definitions of twelve words, and papers of 200 words that name labels."""
    rng = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(f"t{i}" for i in (rng.zipf(1.3, count) % 1000))

    def name() -> str:
        return " ".join(f"t{i}" for i in rng.integers(0, 1000, rng.integers(2, 5)))

    labels = {f"l{i}": Document(f"l{i}", name(), words(12)) for i in range(num_documents)}
    names, queries, qrels = list(labels), {}, {}
    for i in range(num_queries):
        gold = [names[j] for j in rng.integers(0, num_documents, 5)]
        text = f"{words(int(np.clip(rng.normal(190, 50), 60, 400)))} {labels[gold[0]].title}"
        queries[f"q{i}"] = Document(f"q{i}", words(12), text)
        qrels[f"q{i}"] = dict.fromkeys(gold, 1)
    first = NameMatcher(labels).match(queries.values())
    return Benchmark("labels", "task0", "test", labels, queries, qrels, first=first)


@torch.no_grad()
def _authors_program(
    encoder: Encoder, vectors: VectorCache, benchmark: Benchmark, sample: int
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Return the time of each stage of the authors' program, and the metrics of all queries.

    vectors: our vectors, which the program's vectors must equal.
    """
    queries, labels = list(benchmark.queries.values()), list(benchmark.corpus.values())

    def embed(documents: Sequence[Document]) -> torch.Tensor:
        texts = [input_text(document, encoder.tokenizer.sep_token) for document in documents]
        padding = {"padding": "max_length", "truncation": True, "max_length": AUTHORS_LENGTH}
        tokens = encoder.tokenizer(texts, return_tensors="pt", **padding).to(encoder.device)
        return encoder.backbone(tokens["input_ids"], attention_mask=tokens["attention_mask"])[0][:, 0].cpu()

    sampled = queries[:: max(1, len(queries) // sample)][:sample]
    started = _clock()
    one_by_one = torch.cat([embed([query]) for query in sampled])
    query_seconds = (_clock() - started) / len(sampled) * len(queries)
    started = _clock()
    embed(labels[: 4 * sample])
    label_seconds = (_clock() - started) / (4 * sample) * len(labels)
    torch.testing.assert_close(one_by_one, encoder.encode(sampled, "task0"), atol=1e-4, rtol=1e-4)

    q = torch.from_numpy(vectors.vectors_of_rank(queries, "task0", "queries"))
    d = torch.from_numpy(vectors.vectors(labels, "task0", "labels")[0])
    ids, totals = [label.id for label in labels], dict.fromkeys(CUT_OFFS, 0.0)
    started = _clock()
    for query, vector in zip(queries, q, strict=True):
        ranked = [ids[i] for i in np.argsort(-torch.matmul(vector, d.T).numpy()).tolist()]
        named = list(benchmark.first[query.id])
        ranked = [label for label in ranked if label in named] + [label for label in ranked if label not in named]
        gold = list(benchmark.qrels[query.id])
        for k in CUT_OFFS:
            totals[k] += len([label for label in gold if label in ranked[:k]]) / len(gold)
    seconds = {"encoding queries": query_seconds, "encoding labels": label_seconds, "ranking": _clock() - started}
    return seconds, {f"recall@{k}": total / len(queries) for k, total in totals.items()}


def _large(options: BenchOptions, folder: Path) -> None:
    count, dimension = options.documents, options.dimension
    path, rng = folder / "documents.f16", np.random.default_rng(0)
    log.info("writing %d vectors to %s", count, path)
    vectors = np.memmap(path, dtype=np.float16, mode="w+", shape=(count, dimension))
    for first in range(0, count, 50_000):
        block = vectors[first : first + 50_000]
        block[:] = rng.standard_normal(block.shape, dtype=np.float32)
    vectors.flush()
    del vectors
    queries = rng.standard_normal((options.queries, dimension), dtype=np.float32)
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
    memory = Memory(torch.device("cpu"))
    before, started = memory.peak(), time.perf_counter()
    with Progress("ranking", "pairs", count * len(ids)) as progress:
        device = resolve_device(options.device)
        run = rank_vectors(benchmark, ids, queries, documents, options.k, device=device, advance=progress.advance)
    ranked = time.perf_counter() - started
    metrics = measure(run, benchmark, ["mrr@10000", "precision@10", "ndcg@10", "recall@1000"])
    log.info("ranking %.0f s, measuring %.0f s", ranked, time.perf_counter() - started - ranked)
    log.info("peak memory %.1f GB (%.1f GB before the ranking)", memory.peak() / 1e9, before / 1e9)
    log.info("metrics of random vectors: %s", {name: round(value, 5) for name, value in metrics.items()})


def _clock() -> np.ndarray:
    """Return wall-clock and CPU seconds. CPU seconds are more reliable on a busy machine."""
    return np.array([time.perf_counter(), time.process_time()])


if __name__ == "__main__":
    entry_point(main)
