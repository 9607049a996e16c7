"""Find papers among embedded ones: python -m experiments.find embeddings=FOLDER query="..." [k=10]

embeddings   what experiments.embed wrote: its folder (task=NAME where it has several), or a .npy file; searched exactly
index        instead: what experiments.index wrote. nprobe: lists that are searched, by default what the index was
             measured with
model        that the papers were embedded with, by default where it was then; backbone, pooling, tower and adapters as
             then
query        a text; or queries=FILE of {"id", "text"} a line, whose rankings go to output=FILE in TREC format
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from datamodules.readers.checks import BadLines
from datamodules.readers.texts import documents_at, read_shards, text_file
from datamodules.records import Document, UserError
from experiments.build.models import MODEL_KEYS, load_model
from experiments.shared.console import entry_point, key_values, table_console, whole_number
from lightning_modules.encoders.base import Encoder
from lightning_modules.retrieval.embedding import Matrix, open_matrix, read_about, read_ids
from lightning_modules.retrieval.faiss_index import read_index, search_index
from lightning_modules.retrieval.metrics import Run
from lightning_modules.retrieval.run_files import write_trec
from lightning_modules.retrieval.search import top_k
from lightning_modules.retrieval.vector_cache import fingerprint

log = logging.getLogger(__name__)

KEYS = MODEL_KEYS | {
    "embeddings": "",
    "index": "",
    "task": "",
    "nprobe": "0",
    "query": "",
    "queries": "",
    "output": "",
    "k": "10",
}


def asking(values: dict[str, str], about: dict[str, Any]) -> Encoder:
    """The encoder that the papers were embedded with. Raises UserError for another one."""
    model = values["model"] or about["name"]
    encoder = load_model(values | {"model": model, "task": about["task"]}, None)
    if fingerprint(encoder) != about["model"]:
        raise UserError(f"model: {model} is not what the papers were embedded with ({about['name']}, {about['model']})")
    return encoder.to("cuda" if torch.cuda.is_available() else "cpu")


def vectors_of(encoder: Encoder, queries: list[Document], about: dict[str, Any]) -> np.ndarray:
    encoded = encoder.encode(queries, about["task"])
    return (torch.nn.functional.normalize(encoded, dim=-1) if about["similarity"] == "cosine" else encoded).numpy()


def find(values: dict[str, str]) -> None:
    if bool(values["query"]) == bool(values["queries"]):
        raise UserError("query: what is looked for? Give query='a text', or queries=FILE and output=FILE")
    if bool(values["embeddings"]) == bool(values["index"]):
        raise UserError("embeddings, index: where is looked? Give one of them")
    if values["queries"] and not values["output"]:
        raise UserError("output: where do the rankings of queries=FILE go?")
    k, nprobe = whole_number("k", values["k"]), whole_number("nprobe", values["nprobe"], 0)
    queries = _queries(values)
    if values["index"]:
        path = Path(values["index"])
        about, index = read_about(path), read_index(path)
        ids, matrix = read_ids(path, index.ntotal), None
        if about["m"]:
            matrix = _matrix_of(about)
        vectors = vectors_of(asking(values, about), queries, about)
        rows, scores = search_index(index, vectors, k, nprobe or about["nprobe"], matrix and matrix.vectors)
    else:
        matrix = open_matrix(Path(values["embeddings"]), values["task"])
        about, ids = matrix.about, matrix.ids
        encoder = asking(values, about)
        rows, scores = top_k(vectors_of(encoder, queries, about), matrix.vectors, k, device=encoder.device)
    if values["queries"]:
        run = Run([query.id for query in queries], ids, rows, scores)
        write_trec(run, Path(values["output"]), "scimult")
        log.info("%s: the %d best for each of %d queries", values["output"], rows.shape[1], len(queries))
    else:
        _show(queries[0].text, rows[0], scores[0], ids, about)


def _matrix_of(about: dict[str, Any]) -> Matrix | None:
    """The vectors that a quantized index was built from, for exact scores; None where they are gone."""
    try:
        return open_matrix(Path(about["embeddings"]))
    except UserError as error:
        log.warning("scores are approximate, since the index's own vectors cannot be read: %s", error)
        return None


def _queries(values: dict[str, str]) -> list[Document]:
    if values["query"]:
        return [Document("query", "", values["query"])]
    path = text_file(Path(values["queries"]))
    with BadLines() as bad:
        found = [query for _, part in read_shards(path, 2**16, range(2**31), bad) for query in part]
    if not found:
        raise UserError(f"queries: {path} holds no text")
    return found


def _show(query: str, rows: np.ndarray, scores: np.ndarray, ids: list[str], about: dict[str, Any]) -> None:
    """A table of what was found; titles where the texts are still there."""
    rows, titles, source = rows[rows >= 0], {}, Path(about["input"])
    if source.is_file() and about["on_error"] == "fail":  # then a row is a line
        titles = documents_at(source, rows.tolist())
    table = Table("", "score", "id", "title", title=query, title_justify="left")
    for place, (row, score) in enumerate(zip(rows.tolist(), scores, strict=False), start=1):
        paper = titles.get(row)
        known = paper is not None and paper.id == ids[row]
        table.add_row(str(place), f"{score:.4f}", ids[row], (paper.title or paper.text[:80]) if known else "")
    table_console().print(table)


def main(arguments: Sequence[str]) -> None:
    find(key_values(arguments, KEYS))


if __name__ == "__main__":
    entry_point(main)
