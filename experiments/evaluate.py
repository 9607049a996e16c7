"""Measure a model: python -m experiments.evaluate model=M [output=FOLDER] [split=test] [beir=FOLDER task=search]

model        a run's folder, a checkpoint, an exported folder, a plain BERT (folder or hub name), or bm25
data         the collections of the run that the model belongs to, or of run=FOLDER; or any folder in BEIR layout
             (beir=FOLDER), ranked with the expert of task=NAME
output       where results.json and the run files go; by default evaluation/ in the run's folder, or evaluations/<data>
backbone     folder or hub name with configuration and tokenizer, for a checkpoint of SciMult's authors
similarity   dot or cosine; by default that of the run, else cosine
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from datamodules.readers.beir import BeirReader
from datamodules.records import Benchmark, UserError
from experiments.build import build_data
from experiments.config import from_dict
from experiments.console import entry_point, key_values, whole_number
from experiments.results import evaluate_bm25, evaluate_encoder, show
from experiments.run_folder import read_config
from experiments.schema import Config, EvaluationConfig
from lightning_modules.encoders.checkpoints import DEFAULT_TASKS, load_encoder
from lightning_modules.losses import SIMILARITIES
from lightning_modules.metrics import parse_metric

log = logging.getLogger(__name__)

KEYS = {
    "model": "",
    "run": "",
    "backbone": "",
    "output": "",
    "split": "test",
    "beir": "",
    "task": "",
    "similarity": "",
    "metrics": ",".join(EvaluationConfig().metrics),
    "token_budget": "8192",
}


def run_of(model: str) -> Path | None:
    """The folder of the run that a model belongs to, if any."""
    for path in (Path(model), Path(model).parent.parent):
        if (path / "config.yaml").is_file():
            return path
    return None


def benchmarks_of(values: dict[str, str], config: Config | None) -> list[Benchmark]:
    if values["beir"]:
        return [_beir_benchmark(Path(values["beir"]), values["task"], values["split"])]
    if config is None:
        raise UserError("which data? Give run=FOLDER of a run, or beir=FOLDER and task=NAME")
    found = build_data(config).benchmarks(values["split"])
    if values["task"]:
        found = [benchmark for benchmark in found if benchmark.task == values["task"]]
    if not found:
        of_task = f" of task {values['task']}" if values["task"] else ""
        raise UserError(f"the data{of_task} has no split {values['split']!r}")
    return found


def _beir_benchmark(folder: Path, task: str, split: str) -> Benchmark:
    if not task:
        raise UserError(f"task: whose expert ranks {folder}? For instance task=search")
    collection = BeirReader(str(folder)).read()
    if split not in collection.qrels:
        raise UserError(f"split: {folder} has no {split!r}, it has {', '.join(collection.qrels)}")
    qrels = collection.qrels[split]
    queries = {query: collection.queries[query] for query in qrels}
    # Papers that are queries and documents under one id are not ranked for themselves.
    same = all(collection.corpus.get(query) == document for query, document in queries.items())
    return Benchmark(folder.name, task, split, collection.corpus, queries, qrels, exclude_query=same)


def main(arguments: Sequence[str]) -> None:
    values = key_values(arguments, KEYS)
    if not values["model"]:
        raise UserError("which model? Give model=FOLDER of a run, a checkpoint, an exported folder, a BERT, or bm25")
    metrics = values["metrics"].split(",")
    for name in metrics:
        parse_metric(name)
    run = Path(values["run"]) if values["run"] else run_of(values["model"])
    config = from_dict(read_config(run), str(run / "config.yaml")) if run else None
    similarity = values["similarity"] or (config.objective.similarity if config else "cosine")
    if similarity not in SIMILARITIES:
        raise UserError(f"similarity: got {similarity!r}, allowed are {', '.join(SIMILARITIES)}")

    encoder = None
    if values["model"] != "bm25":
        tasks = {values["task"]: values["task"]} if values["task"] else DEFAULT_TASKS
        encoder = load_encoder(values["model"], tasks, values["backbone"] or None)
        encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    benchmarks = benchmarks_of(values, config)
    folder = Path(values["output"] or (run / "evaluation" if run else f"evaluations/{benchmarks[0].name}"))
    if encoder is None:
        results = evaluate_bm25(benchmarks, metrics, folder / "runs")
    else:
        for benchmark in benchmarks:
            encoder.expert_of(benchmark.task)
        results = evaluate_encoder(
            "encoder",
            encoder,
            benchmarks,
            metrics,
            folder / "runs",
            similarity=similarity,
            token_budget=whole_number("token_budget", values["token_budget"]),
        )
    about = {"model": values["model"], "similarity": similarity, "metrics": metrics}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(about | {"benchmarks": results}, indent=2), encoding="utf-8")
    show(results, metrics, f"{values['model']}, {values['split']} split")
    log.info("Results and run files lie in %s", folder)


if __name__ == "__main__":
    entry_point(main)
