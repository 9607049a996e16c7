"""Files of an evaluation, in the formats of trec_eval and as tab-separated tables.

Programs split the lines of these files at white space. White space in an id is percent-encoded, as in URLs, and so is
the percent sign: "Computer science" is Computer%20science.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np

from datamodules.files import atomic_file
from datamodules.records import Qrels
from lightning_modules.retrieval.metrics import Run

SPLITS_LINES = re.compile(r"[%\s\x00-\x1f\x7f-\x9f]")


def encode_id(id: str) -> str:
    """Return an id or name with white space and control characters percent-encoded."""
    return SPLITS_LINES.sub(lambda character: quote(character[0], safe=""), id)


def decode_id(text: str) -> str:
    """Undo encode_id. Texts that encode_id cannot have returned, as in older files, are returned unchanged."""
    id = unquote(text, errors="surrogateescape") if "%" in text else text
    return id if encode_id(id) == text else text


def write_trec(run: Run, path: Path, tag: str) -> None:
    """Write a run for trec_eval: query Q0 document rank score tag. Scores are written exactly."""
    tag, digits = encode_id(tag), 9 if run.scores.dtype == np.float32 else 17
    ranked = zip(map(encode_id, run.queries), run.indices, run.scores, strict=True)
    lines = (
        f"{query} Q0 {encode_id(run.documents[index])} {position} {score:.{digits}g} {tag}"
        for query, indices, scores in ranked
        for position, (index, score) in enumerate(zip(indices.tolist(), scores.tolist(), strict=True), start=1)
        if index >= 0
    )
    _write_lines(path, lines)


def write_qrels(qrels: Qrels, path: Path) -> None:
    """Write judgements for trec_eval: query 0 document grade."""
    judged = ((encode_id(query), grades) for query, grades in qrels.items())
    _write_lines(
        path, (f"{query} 0 {encode_id(id)} {grade}" for query, grades in judged for id, grade in grades.items())
    )


def write_table(header: Sequence[str], rows: Iterable[tuple[str, Iterable[float]]], path: Path) -> None:
    """Write a tab-separated table of exact numbers. rows: pairs of an id or name, and the value of each metric."""
    cells = ((encode_id(name), *(f"{value:.17g}" for value in values)) for name, values in rows)
    _write_lines(path, map("\t".join, itertools.chain([header], cells)))


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        for line in lines:
            file.write(f"{line}\n".encode())
