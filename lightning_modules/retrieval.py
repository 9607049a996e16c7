"""From a benchmark to a run: corpus and queries to vectors, their exact top-k, and BM25, the baseline without vectors.

With several ranks each embeds its share of the corpus and ranks its share of the queries.

Shapes: Q queries, M documents, D dimensions, k documents a query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from datamodules.records import Benchmark, Document, UserError
from lightning_modules.bm25 import Bm25Index
from lightning_modules.distributed import gather_rows, rank, world_size
from lightning_modules.encoders.base import Encoder
from lightning_modules.metrics import MeanOverQueries, Run, judge, parse_metric, sorted_run
from lightning_modules.top_k import top_k

Advance = Callable[[int], None]


def hide_own(indices: np.ndarray, own: Sequence[int]) -> np.ndarray:
    """Rankings (Q, k) with -1 where document own[q] stands in row q."""
    return np.where(indices == np.asarray(own)[:, None], -1, indices)


def rank_benchmark(
    encoder: Encoder,
    benchmark: Benchmark,
    k: int,
    *,
    similarity: str = "dot",
    token_budget: int = 16384,
    advance: Advance | None = None,
) -> Run:
    """This rank's share of a benchmark's run: queries rank, rank + world size, ...

    k: documents kept for each query. similarity: "dot" or "cosine".
    """
    size, mine = world_size(), rank()

    def vectors(documents: Iterable[Document], task: str) -> Tensor:
        encoded = encoder.encode(list(documents), task, token_budget=token_budget, advance=advance)
        return torch.nn.functional.normalize(encoded, dim=-1) if similarity == "cosine" else encoded

    names, corpus = list(benchmark.corpus), list(benchmark.corpus.values())
    # Round-robin shares, so that ranks get texts of similar length; gathered, they are sorted back.
    gathered = gather_rows(vectors(corpus[mine::size], encoder.document_task(benchmark.task)).to(encoder.device)).cpu()
    order = torch.cat([torch.arange(r, len(corpus), size) for r in range(size)])
    documents = torch.empty_like(gathered)
    documents[order] = gathered

    ids = list(benchmark.queries)[mine::size]
    queries = vectors((benchmark.queries[query] for query in ids), benchmark.task)
    if not torch.isfinite(documents).all() or not torch.isfinite(queries).all():
        raise UserError(f"{benchmark.name}: the encoder gives vectors that are not finite (training diverged?)")
    indices, scores = top_k(queries, documents, k + benchmark.exclude_query, device=encoder.device)
    return _finished(benchmark, ids, names, indices, scores, k)


def bm25_run(benchmark: Benchmark, k: int) -> Run:
    """This rank's share of the BM25 ranking. Documents that share no word with the query are not retrieved."""
    names = list(benchmark.corpus)
    ids = list(benchmark.queries)[rank() :: world_size()]
    wanted = min(k + benchmark.exclude_query, len(names))
    index = Bm25Index(benchmark.corpus.values())
    indices, scores = index.top_k((benchmark.queries[query] for query in ids), wanted)
    return _finished(benchmark, ids, names, indices, scores, k)


def _finished(
    benchmark: Benchmark, ids: list[str], names: list[str], indices: np.ndarray, scores: np.ndarray, k: int
) -> Run:
    """The run of retrieved documents, a query's own document left out where the benchmark says so, k for each query."""
    if benchmark.exclude_query:
        place = {name: i for i, name in enumerate(names)}
        indices = hide_own(indices, [place.get(query, -2) for query in ids])
    run = sorted_run(ids, names, indices, scores)
    return Run(run.queries, run.documents, run.indices[:, :k], run.scores[:, :k])


def whole_run(run: Run) -> Run:
    """All ranks' shares of a run as one."""
    if world_size() == 1:
        return run
    shares: list[Run] = [run] * world_size()
    dist.all_gather_object(shares, run)
    return Run(
        [query for share in shares for query in share.queries],
        run.documents,
        np.concatenate([share.indices for share in shares]),
        np.concatenate([share.scores for share in shares]),
    )


def depth(metrics: Sequence[str]) -> int:
    """Documents to keep for each query: the deepest cut-off of the metrics."""
    return max(parse_metric(name)[1] for name in metrics)


def measure(
    run: Run, benchmark: Benchmark, metrics: Sequence[str], device: torch.device | str = "cpu"
) -> Mapping[str, float]:
    """Means over all queries of all ranks. run: this rank's share of the benchmark's queries.

    Raises UserError if no query has a relevant document.
    """
    if not any(grade > 0 for grades in benchmark.qrels.values() for grade in grades.values()):
        raise UserError(f"{benchmark.name}: no query of the {benchmark.split} split has a relevant document")
    means = MeanOverQueries(metrics).to(device)
    place = {query: i for i, query in enumerate(benchmark.queries)}
    means.update(torch.tensor([place[query] for query in run.queries], device=device), judge(run, benchmark.qrels))
    return means.compute()


def write_trec(run: Run, path: Path, tag: str) -> None:
    """Write a run as trec_eval reads it: query Q0 document rank score tag."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as lines:
        for query, indices, scores in zip(run.queries, run.indices.tolist(), run.scores.tolist(), strict=True):
            for position, (index, score) in enumerate(zip(indices, scores, strict=True), start=1):
                if index >= 0:
                    lines.write(f"{query} Q0 {run.documents[index]} {position} {score:.9g} {tag}\n")
