"""Search an embedded corpus for papers."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.files import refuse_other_file
from datamodules.options import option
from datamodules.readers.io import find_optional_file
from datamodules.readers.rows import BadLines
from datamodules.readers.texts import documents_at, read_shards, text_files
from datamodules.records import Document, UserError
from experiments.build.models import EncodingOptions
from experiments.config.arguments import parse
from experiments.shared.console import entry_point
from experiments.shared.table_formats import Column, Table, print_table
from lightning_modules.losses import comparable
from lightning_modules.retrieval.embedding import Matrix, open_matrix, read_ids, read_metadata
from lightning_modules.retrieval.faiss_index import read_index, search_index
from lightning_modules.retrieval.metrics import Run
from lightning_modules.retrieval.search import top_k
from lightning_modules.retrieval.trec import write_trec
from lightning_modules.retrieval.vector_cache import fingerprint

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class FindOptions(EncodingOptions):
    """Find the papers of an embedded corpus that are nearest to a query.

    By default, the model that embedded the papers embeds the query.
    """

    embeddings: Path | None = option(None, "output of make embed (the folder or a .npy file), for an exact search")
    index: Path | None = option(None, "output of make index, for a search in the index")
    task: str = option("", "task whose vectors to search, if the folder has several tasks")
    nprobe: int = option(0, "number of index lists to search; 0 uses the number chosen by `make index`", minimum=0)
    query: str = option("", "text to search for")
    queries: Path | None = option(
        None, "file (or folder in BEIR layout) with queries, each with an id and a text; instead of query"
    )
    output: Path | None = option(None, "file for the rankings in TREC format; required with queries=")
    k: int = option(10, "number of papers per query", minimum=1)


def main(arguments: Sequence[str]) -> None:
    options = parse(FindOptions, arguments)
    if bool(options.query) == bool(options.queries):
        raise UserError("query: set either query=TEXT, or queries=FILE with output=FILE")
    if bool(options.embeddings) == bool(options.index):
        raise UserError("embeddings, index: set exactly one, to the output of make embed or make index")
    if options.queries and not options.output:
        raise UserError("output: queries= needs a file for the rankings")
    if options.output:
        refuse_other_file(options.output, rb"\S+ Q0 ", "a ranking in TREC format")
    queries = _read_queries(options.queries) if options.queries else [Document("query", "", options.query)]
    result = _search_index(options, queries) if options.index else _search_embeddings(options, queries)
    if options.output:
        run = Run([query.id for query in queries], result.ids, result.rows, result.scores)
        write_trec(run, options.output, "scimult")
        log.info("%s: the %d best papers for each query (%d)", options.output, result.rows.shape[1], len(queries))
    if options.query:
        _show(queries[0].text, result)


@dataclass(frozen=True)
class SearchResult:
    """Rows and scores of the best papers, (Q, k), the ids of all rows, and the metadata of the vectors."""

    rows: np.ndarray
    scores: np.ndarray
    ids: list[str]
    metadata: dict[str, Any]


def _search_embeddings(options: FindOptions, queries: list[Document]) -> SearchResult:
    matrix = open_matrix(options.embeddings, options.task)
    vectors, device = _encode(options, queries, matrix.metadata)
    rows, scores = top_k(vectors, matrix.vectors, options.k, device=device)
    return SearchResult(rows, scores, matrix.ids, matrix.metadata)


def _search_index(options: FindOptions, queries: list[Document]) -> SearchResult:
    if not options.index.is_file():
        raise UserError(f"index: {options.index} is not a file; expected the file that make index wrote")
    metadata = read_metadata(options.index, {"m": int, "nprobe": int, "embeddings": str})
    index = read_index(options.index)
    ids = read_ids(options.index, index.ntotal)
    matrix = _matrix_of(metadata)
    vectors, _ = _encode(options, queries, metadata)
    nprobe = options.nprobe or metadata["nprobe"]
    rows, scores = search_index(index, vectors, options.k, nprobe, matrix.vectors if matrix and metadata["m"] else None)
    return SearchResult(rows, scores, ids, metadata)


def _encode(options: FindOptions, queries: list[Document], metadata: dict[str, Any]) -> tuple[np.ndarray, torch.device]:
    """Encode the queries. Return the vectors (Q, D), and the encoder's device.

    Raises UserError if the model is not the one that embedded the papers.
    """
    model = options.model or metadata["name"]
    encoder = dataclasses.replace(options, model=model).load_on_device(task=metadata["task"])
    if fingerprint(encoder) != metadata["model"]:
        raise UserError(
            f"model: {model} is not the one that embedded the papers ({metadata['name']}, fingerprint "
            f"{metadata['model']})"
        )
    vectors = comparable(encoder.encode(queries, metadata["task"]), metadata["similarity"])
    return vectors.numpy(), encoder.device


def _matrix_of(metadata: dict[str, Any]) -> Matrix | None:
    """Return the vectors that an index was built from, or None if they cannot be read or have changed."""
    try:
        matrix = open_matrix(Path(metadata["embeddings"]))
    except UserError as error:
        if metadata["m"]:
            log.warning("scores are approximate, because the vectors of the index cannot be read: %s", error)
        return None
    if matrix.metadata.get("shards") == metadata.get("shards"):
        return matrix
    log.warning("%s: has changed since the index was built; run make index again to search its vectors", matrix.path)
    return None


def _read_queries(source: Path) -> list[Document]:
    file = find_optional_file(source, "queries.jsonl")  # a BEIR folder has both queries and documents
    files = text_files(file or source, "queries")
    with BadLines() as bad_lines:
        queries = [query for _, shard in read_shards(files, 2**16, range(2**31), bad_lines) for query in shard]
    if not queries:
        raise UserError(f"queries: {source} contains no texts")
    return queries


def _show(query: str, result: SearchResult) -> None:
    """Print the best papers for the first query, with titles if the input file still exists."""
    rows, scores, metadata = result.rows[0], result.scores[0], result.metadata
    rows, titles = rows[rows >= 0], {}
    if metadata["on_error"] == "fail":  # no lines were skipped, so row i is line i
        with suppress(UserError):  # the input may have moved or changed
            titles = documents_at(text_files(Path(metadata["input"])), rows.tolist())
    table = Table([Column("", "d"), Column("score", ".4f"), Column("id"), Column("title", folds=True)], query)
    for number, (row, score) in enumerate(zip(rows.tolist(), scores, strict=False), start=1):
        paper = titles.get(row)
        known = paper is not None and paper.id == result.ids[row]
        table.add(number, score, result.ids[row], (paper.title or paper.text[:80]) if known else "")
    print_table(table)


if __name__ == "__main__":
    entry_point(main)
