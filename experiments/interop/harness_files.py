"""What the programs of other evaluations read: vectors for SciDocs and SciRepEval, rankings for PMC-Patients.

    SciDocs        cls.jsonl, user-citation.jsonl, recomm.jsonl   {"paper_id", "title", "embedding"} a line
    SciRepEval     CONFIG.jsonl                                   {"doc_id", "embedding"} a line
                   tasks.jsonl                                    its tasks, each told where its vectors are
    PMC-Patients   PAR.json, PPR.json                             {query: {document: score}}

Sources: allenai/scidocs (README.md, scidocs/embeddings.py), allenai/scirepeval (evaluation/embeddings_generator.py,
scirepeval.py), pmc-patients/pmc-patients (README.md, evaluation.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.readers.checks import BadLines
from datamodules.readers.io import as_object, find_file, read_records
from datamodules.readers.pmc_patients import PmcPatientsReader
from datamodules.readers.scidocs import read_papers
from datamodules.readers.scirepeval import read_texts
from datamodules.records import Benchmark, Document, UserError
from experiments.shared.console import choice
from experiments.shared.progress import Progress
from lightning_modules.encoders.base import Encoder
from lightning_modules.retrieval.evaluation import rank_benchmark
from lightning_modules.retrieval.measure import whole_run
from lightning_modules.retrieval.vector_cache import VectorCache

SCIDOCS = {  # file -> metadata of the papers in it, and whose expert encodes them
    "cls": ("paper_metadata_mag_mesh.json", "classification"),
    "user-citation": ("paper_metadata_view_cite_read.json", "link_prediction"),
    "recomm": ("paper_metadata_recomm.json", "link_prediction"),
}
SCIREPEVAL = {  # its types of tasks -> whose expert encodes
    "classification": "classification",
    "regression": "classification",
    "proximity": "link_prediction",
    "adhoc_search": "search",
}


@dataclass(frozen=True, slots=True)
class Job:
    """What is written, of what and where to. only: names of files or tasks; none for all whose data are there.

    on_error: what becomes of bad lines (see BadLines). similarity, depth: of rankings.
    """

    encoder: Encoder
    vectors: VectorCache
    data: Path
    output: Path
    only: Sequence[str] = ()
    on_error: str = "fail"
    similarity: str = "dot"
    depth: int = 1000

    def chosen(self, names: Sequence[str]) -> list[str]:
        for name in self.only:
            choice("only", name, names)
        return [name for name in names if not self.only or name in self.only]

    def bad_lines(self) -> BadLines:
        return BadLines(self.on_error, str(self.output / "quarantine.jsonl"))

    def encode(self, texts: Sequence[Document], task: str, what: str) -> Iterator[list[float]]:
        """A vector for each text, in their order; all are encoded before the first one comes."""
        with Progress(f"encoding {what}", "texts", len(texts)) as progress:
            shards = self.vectors.of_all_ranks(texts, task, what, progress.advance)
        for _, block in shards.blocks(1024):
            yield from block.astype(np.float64).tolist()


def write_scidocs(job: Job) -> list[Path]:
    """The files whose papers are in job.data. Raises UserError if none are, or papers that were named are not."""
    written = []
    for name in job.chosen(list(SCIDOCS)):
        file, task = SCIDOCS[name]
        path = find_file(job.data, file, required=bool(job.only))
        if path is None:
            continue
        with job.bad_lines() as bad:
            papers = list(read_papers(path, bad).values())
        vectors = job.encode(papers, task, file)
        lines = (
            {"paper_id": paper.id, "title": paper.title, "embedding": vector}
            for paper, vector in zip(papers, vectors, strict=True)
        )
        written.append(_write_lines(job.output / f"{name}.jsonl", lines))
    if not written:
        raise UserError(f"data: {job.data} holds none of {', '.join(file for file, _ in SCIDOCS.values())}")
    return written


def write_scirepeval(job: Job, tasks: Path, final: Path) -> list[Path]:
    """Vectors of the configs that are folders of job.data, and the tasks that need them.

    tasks: scirepeval_tasks.jsonl. final: where the files will stand. Raises UserError.
    """
    described = _tasks(tasks)
    written: dict[tuple[str, str], Path] = {}
    ready = []
    for name in job.chosen(list(described)):
        record, config, kind = described[name]
        if not (job.data / config).is_dir():
            if job.only:
                raise UserError(f"data: {job.data / config}: no such folder, which {name!r} needs")
            continue
        if (config, kind) not in written:
            path = job.output / f"{config}.jsonl"
            if path in written.values():
                path = path.with_name(f"{config}-{kind}.jsonl")
            written[config, kind] = _write_lines(path, _scirepeval_lines(job, config, SCIREPEVAL[kind]))
        ready.append(record | {"embeddings": {"load": str(final.absolute() / written[config, kind].name)}})
    if not ready:
        raise UserError(f"data: {job.data} has no folder for any of the tasks (named as the configs, such as fos)")
    return [*written.values(), _write_lines(job.output / "tasks.jsonl", ready)]


def _tasks(path: Path) -> dict[str, tuple[dict[str, Any], str, str]]:
    """Name -> the task as it stands in the file, its config and its type."""
    found = {}
    with BadLines("fail") as bad:
        for place in read_records(path, bad):
            with place:
                record = as_object(place)
                kind = choice("type", record.get("type"), list(SCIREPEVAL))
                try:
                    found[str(record["name"])] = record, str(record["data"]["meta"]["config"]), kind
                except (KeyError, TypeError) as error:
                    raise UserError("a task has name, type and data.meta.config") from error
    return found


def _scirepeval_lines(job: Job, config: str, task: str) -> Iterator[dict[str, Any]]:
    """Queries first, and each id once, as the program itself embeds them."""
    with job.bad_lines() as bad:
        queries, papers = read_texts(job.data / config, bad)
    papers = {id: paper for id, paper in papers.items() if id not in queries}
    sides = ((queries, task), (papers, job.encoder.document_task(task)))
    for texts, encoded_for in sides:
        vectors = job.encode(list(texts.values()), encoded_for, config) if texts else ()
        for id, vector in zip(texts, vectors, strict=True):
            yield {"doc_id": id, "embedding": vector}


def write_pmc_patients(job: Job, split: str) -> list[Path]:
    """The rankings of those of PAR and PPR whose folders are in job.data. Raises UserError."""
    written = []
    for name in job.chosen(PmcPatientsReader.TASKS):
        if not job.only and not (job.data / name).is_dir():
            continue
        reader = PmcPatientsReader(str(job.data), name, job.on_error, str(job.output / "quarantine.jsonl"))
        collection = reader.read()
        choice("split", split, list(collection.qrels))
        queries, qrels = collection.judged(split)
        benchmark = Benchmark(name, "link_prediction", split, collection.corpus, queries, qrels)
        with Progress(f"encoding {name}", "texts", len(queries) + len(collection.corpus)) as progress:
            run = whole_run(
                rank_benchmark(
                    job.encoder,
                    benchmark,
                    min(job.depth, len(collection.corpus)),
                    similarity=job.similarity,
                    advance=progress.advance,
                    vectors=job.vectors,
                )
            )
        path = job.output / f"{name}.json"
        _write_object(path, zip(run.queries, map(_ranking(run.documents), run.indices, run.scores), strict=True))
        written.append(path)
    if not written:
        raise UserError(f"data: {job.data} has neither PAR nor PPR (the ReCDS benchmark of PMC-Patients)")
    return written


def _ranking(documents: Sequence[str]) -> Callable[[np.ndarray, np.ndarray], dict[str, float]]:
    def of_query(indices: np.ndarray, scores: np.ndarray) -> dict[str, float]:
        pairs = zip(indices.tolist(), scores.tolist(), strict=True)
        return {documents[index]: score for index, score in pairs if index >= 0}

    return of_query


def _write_lines(path: Path, lines: Iterator[Mapping[str, Any]] | Sequence[Mapping[str, Any]]) -> Path:
    with open(path, "w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return path


def _write_object(path: Path, entries: Iterator[tuple[str, Any]]) -> None:
    """One JSON object, an entry at a time: it may be larger than memory."""
    with open(path, "w", encoding="utf-8") as file:
        for number, (key, value) in enumerate(entries):
            file.write("," if number else "{")
            file.write(f"\n{json.dumps(key)}: {json.dumps(value)}")
        file.write("\n}\n")
