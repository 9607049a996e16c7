"""Files of an evaluation, in the formats of trec_eval and as tab-separated tables.

Programs split the lines of these files at white space. White space in an id is percent-encoded, as in URLs, and so is
the percent sign: "Computer science" is Computer%20science.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np

from datamodules.files import atomic_file
from datamodules.records import Qrels
from lightning_modules.retrieval.metrics import Run

SPLITS_LINES = re.compile(r"[%\s\x00-\x1f\x7f-\x9f]")


def encode_id(id: str) -> str:
    """Return an id, or another name, without white space and control characters."""
    return SPLITS_LINES.sub(lambda character: quote(character[0], safe=""), id)


def decode_id(text: str) -> str:
    """Undo encode_id. A text that encode_id cannot have returned, as in older files, stays unchanged."""
    id = unquote(text, errors="surrogateescape") if "%" in text else text
    return id if encode_id(id) == text else text


def write_trec(run: Run, path: Path, tag: str) -> None:
    """Write a run for trec_eval: query Q0 document rank score tag. Scores are written exactly."""
    tag, digits = encode_id(tag), 9 if run.scores.dtype == np.float32 else 17
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as lines:
        documents = run.documents
        for query, indices, scores in zip(map(encode_id, run.queries), run.indices, run.scores, strict=True):
            for position, (index, score) in enumerate(zip(indices.tolist(), scores.tolist(), strict=True), start=1):
                if index >= 0:
                    document = encode_id(documents[index])
                    lines.write(f"{query} Q0 {document} {position} {score:.{digits}g} {tag}\n".encode())


def write_qrels(qrels: Qrels, path: Path) -> None:
    """Write judgements for trec_eval: query 0 document grade."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as lines:
        for query, grades in qrels.items():
            query = encode_id(query)
            for document, grade in grades.items():
                lines.write(f"{query} 0 {encode_id(document)} {grade}\n".encode())


def write_draws(draws: Sequence[Mapping[str, float]], path: Path) -> None:
    """Write a table of the metrics of each draw in few-shot learning."""
    rows = ((str(number), metrics.values()) for number, metrics in enumerate(draws, start=1))
    _write_table(("draw", *draws[0]), rows, path)


def write_query_values(metrics: Sequence[str], rows: Iterable[tuple[str, Iterable[float]]], path: Path) -> None:
    """Write a table of the metrics of each counted query. rows: query id and the value of each metric."""
    _write_table(("query", *metrics), rows, path)


def _write_table(header: Sequence[str], rows: Iterable[tuple[str, Iterable[float]]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as lines:
        lines.write(("\t".join(header) + "\n").encode())
        for name, values in rows:
            lines.write(("\t".join((encode_id(name), *(f"{value:.17g}" for value in values))) + "\n").encode())
