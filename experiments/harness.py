"""Write files for other evaluation programs: vectors for SciDocs and SciRepEval, rankings for PMC-Patients.

    SciDocs        cls.jsonl, user-citation.jsonl, recomm.jsonl   {"paper_id", "title", "embedding"} per line
    SciRepEval     CONFIG.jsonl                                   {"doc_id", "embedding"} per line
                   tasks.jsonl                                    the tasks, with the files of their vectors
    PMC-Patients   PAR.json, PPR.json                             {query: {document: score}}

Sources: allenai/scidocs (README.md, scidocs/embeddings.py), allenai/scirepeval (evaluation/embeddings_generator.py,
scirepeval.py), pmc-patients/pmc-patients (README.md, evaluation.py).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datamodules.options import option
from datamodules.readers.io import find_file, find_optional_file
from datamodules.readers.json_files import as_object, read_records
from datamodules.readers.pmc_patients import PmcPatientsReader
from datamodules.readers.rows import BadLines
from datamodules.readers.scidocs import read_papers
from datamodules.readers.scirepeval import read_texts
from datamodules.records import Benchmark, Document, UserError, check_choice, check_choices
from experiments.build.models import EncodingOptions, default_similarity, token_budget_option
from experiments.config.arguments import parse
from experiments.shared.console import entry_point
from experiments.shared.output import whole_folder
from experiments.shared.progress import Progress
from lightning_modules.encoders.base import Encoder
from lightning_modules.retrieval.evaluation import gather_run, rank_benchmark
from lightning_modules.retrieval.vector_cache import VectorCache

log = logging.getLogger(__name__)

SCIDOCS = {  # file -> metadata file of its papers, and the task whose expert encodes them
    "cls": ("paper_metadata_mag_mesh.json", "classification"),
    "user-citation": ("paper_metadata_view_cite_read.json", "link_prediction"),
    "recomm": ("paper_metadata_recomm.json", "link_prediction"),
}
SCIREPEVAL = {  # type of SciRepEval's task -> our task, whose expert encodes
    "classification": "classification",
    "regression": "classification",
    "proximity": "link_prediction",
    "adhoc_search": "search",
}


@dataclass(kw_only=True)
class HarnessOptions(EncodingOptions):
    """Write files for other evaluation programs. Each file uses the expert of its task."""

    format: Literal["scidocs", "scirepeval", "pmc_patients"] = option(
        help="vectors for the programs of SciDocs or SciRepEval, or rankings for the leaderboard of PMC-Patients"
    )
    data: Path = option(
        help="scidocs: folder with paper_metadata_*.json; scirepeval: folder with one "
        "subfolder per config, such as fos, each with the split evaluation; pmc_patients: folder of the ReCDS benchmark"
    )
    output: Path = option(help="new folder for the files")
    tasks: Path | None = option(
        None, "scirepeval only (required): the file scirepeval_tasks.jsonl from github.com/allenai/scirepeval"
    )
    only: tuple[str, ...] = option(
        (),
        "what to write: files (cls), tasks of SciRepEval (Fields of study), PAR or PPR; by default all that have data",
    )
    split: str = option("test", "pmc_patients only: split of the queries")
    depth: int = option(1000, "pmc_patients only: number of documents per query", minimum=1)
    similarity: Literal["dot", "cosine", "l2"] | None = option(
        None, "pmc_patients only: similarity of vectors, by default as the model was trained, else cosine"
    )
    vectors: Path | None = option(None, "folder for cached vectors, to resume after an interruption")
    on_error: Literal["fail", "skip"] = option(
        "fail", "what to do with a bad line: fail, or move it to quarantine.jsonl"
    )
    token_budget: int | None = token_budget_option()


@dataclass(frozen=True, slots=True)
class Job:
    """The encoder and the options of a command. output: temporary folder that becomes options.output at the end."""

    encoder: Encoder
    vectors: VectorCache
    options: HarnessOptions
    output: Path
    similarity: str

    def chosen(self, names: Sequence[str]) -> list[str]:
        """Return the names that only= selects, by default all. Raises UserError if a name is unknown."""
        check_choices("only", self.options.only, names)
        return [name for name in names if not self.options.only or name in self.options.only]

    def bad_lines(self) -> BadLines:
        return BadLines(self.options.on_error, str(self.output / "quarantine.jsonl"))

    def encode(self, texts: Sequence[Document], task: str, name: str) -> Iterator[list[float]]:
        """Yield a vector for each text, in order. The first is yielded once all texts are encoded."""
        with Progress(f"encoding {name}", "texts", len(texts)) as progress:
            shards = self.vectors.vectors(texts, task, name, progress.advance)
        for _, block in shards.blocks(1024):
            yield from block.astype(np.float64).tolist()


def main(arguments: Sequence[str]) -> None:
    options = parse(HarnessOptions, arguments)
    if options.format == "scirepeval" and options.tasks is None:
        raise UserError("tasks: required with format=scirepeval; set it to scirepeval_tasks.jsonl")
    config = options.run_config()
    encoder = options.load_on_device(config)
    similarity = options.similarity or default_similarity(encoder, config)
    vectors = VectorCache(encoder, token_budget=options.token_budget, folder=options.vectors)
    write = {"scidocs": _write_scidocs, "scirepeval": _write_scirepeval, "pmc_patients": _write_pmc_patients}
    with whole_folder(options.output) as folder:
        written = write[options.format](Job(encoder, vectors, options, folder, similarity))
    log.info("%s: %s", options.output, ", ".join(path.name for path in written))


def _write_scidocs(job: Job) -> list[Path]:
    """Write the files whose papers are in the data. Raises UserError if the data have no papers."""
    written = []
    for name in job.chosen(list(SCIDOCS)):
        file, task = SCIDOCS[name]
        path = (find_file if job.options.only else find_optional_file)(job.options.data, file)
        if path is None:
            continue
        with job.bad_lines() as bad:
            papers = list(read_papers(path, bad).values())
        lines = (
            {"paper_id": paper.id, "title": paper.title, "embedding": vector}
            for paper, vector in zip(papers, job.encode(papers, task, file), strict=True)
        )
        written.append(_write_lines(job.output / f"{name}.jsonl", lines))
    if not written:
        files = ", ".join(file for file, _ in SCIDOCS.values())
        raise UserError(f"data: {job.options.data} has none of {files}")
    return written


def _write_scirepeval(job: Job) -> list[Path]:
    """Write the vectors of the configs in the data, and the tasks that use them."""
    tasks = _read_tasks(job.options.tasks)
    written: dict[tuple[str, str], Path] = {}
    complete = []
    for name in job.chosen(list(tasks)):
        task = tasks[name]
        folder = job.options.data / task.config
        if not folder.is_dir():
            if job.options.only:
                raise UserError(f"data: {name!r} needs the folder {folder}, which does not exist")
            continue
        key = task.config, task.type
        if key not in written:
            path = job.output / f"{task.config}.jsonl"
            if path in written.values():
                path = path.with_name(f"{task.config}-{task.type}.jsonl")
            written[key] = _write_lines(path, _scirepeval_lines(job, task.config, SCIREPEVAL[task.type]))
        embeddings = job.options.output.absolute() / written[key].name
        complete.append(task.record | {"embeddings": {"load": str(embeddings)}})
    if not complete:
        raise UserError(f"data: {job.options.data} has no task folders (they are named after configs, such as fos)")
    return [*written.values(), _write_lines(job.output / "tasks.jsonl", complete)]


@dataclass(frozen=True, slots=True)
class SciRepEvalTask:
    """A line of scirepeval_tasks.jsonl. config: name of its data."""

    record: dict[str, Any]
    config: str
    type: str


def _read_tasks(path: Path) -> dict[str, SciRepEvalTask]:
    tasks = {}
    with BadLines("fail") as bad:
        for row in read_records(path, bad):
            with row:
                record = as_object(row)
                check_choice("type", record.get("type"), list(SCIREPEVAL))
                try:
                    config = str(record["data"]["meta"]["config"])
                    tasks[str(record["name"])] = SciRepEvalTask(record, config, record["type"])
                except (KeyError, TypeError) as error:
                    raise UserError("expected a task with name, type and data.meta.config") from error
    return tasks


def _scirepeval_lines(job: Job, config: str, task: str) -> Iterator[dict[str, Any]]:
    """Yield the vectors of a config, queries first and each id once, as SciRepEval's program does."""
    with job.bad_lines() as bad:
        queries, papers = read_texts(job.options.data / config, bad)
    papers = {id: paper for id, paper in papers.items() if id not in queries}
    for texts, side_task in ((queries, task), (papers, job.encoder.document_task(task))):
        vectors = job.encode(list(texts.values()), side_task, config) if texts else ()
        for id, vector in zip(texts, vectors, strict=True):
            yield {"doc_id": id, "embedding": vector}


def _write_pmc_patients(job: Job) -> list[Path]:
    """Write the rankings of PAR and PPR, if the data have them. Raises UserError if they have neither."""
    written, options = [], job.options
    for name in job.chosen(PmcPatientsReader.TASKS):
        if not options.only and not (options.data / name).is_dir():
            continue
        reader = PmcPatientsReader(
            str(options.data), name, on_error=options.on_error, quarantine=str(job.output / "quarantine.jsonl")
        )
        collection = reader.read()
        check_choice("split", options.split, list(collection.qrels))
        queries, qrels = collection.judged(options.split)
        benchmark = Benchmark(name, "link_prediction", options.split, collection.corpus, queries, qrels)
        with Progress(f"encoding {name}", "texts", len(queries) + len(collection.corpus)) as progress:
            run = rank_benchmark(
                job.encoder,
                benchmark,
                min(options.depth, len(collection.corpus)),
                similarity=job.similarity,
                advance=progress.advance,
                vectors=job.vectors,
            )
        run = gather_run(run)
        path = job.output / f"{name}.json"
        entries = (
            (query, {run.documents[i]: score for i, score in zip(indices, scores, strict=True) if i >= 0})
            for query, indices, scores in zip(run.queries, run.indices.tolist(), run.scores.tolist(), strict=True)
        )
        _write_object(path, entries)
        written.append(path)
    if not written:
        raise UserError(f"data: {options.data} has neither PAR nor PPR (the ReCDS benchmark of PMC-Patients)")
    return written


def _write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> Path:
    with open(path, "w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return path


def _write_object(path: Path, entries: Iterable[tuple[str, Any]]) -> None:
    """Write a JSON object entry by entry, because it may be larger than memory."""
    with open(path, "w", encoding="utf-8") as file:
        for number, (key, value) in enumerate(entries):
            file.write("," if number else "{")
            file.write(f"\n{json.dumps(key)}: {json.dumps(value)}")
        file.write("\n}\n")


if __name__ == "__main__":
    entry_point(main)
