"""Measure a model: python -m experiments.evaluate model=M [output=FOLDER] [split=test] [beir=FOLDER task=search]

model        a run's folder, a checkpoint, an exported folder, a plain BERT (folder or hub name), or bm25
data         the collections of the run that the model belongs to, or of run=FOLDER; or any folder in BEIR layout
             (beir=FOLDER), ranked with the expert of task=NAME
output       where results.json and the run files go; by default a folder for this model, data and split under
             evaluation/ in the run's folder, or under evaluations/
pooling      cls or mean, for a plain model; by default that of the run or of its sentence-transformers files, else cls
backbone     folder or hub name with configuration and tokenizer, for a checkpoint of SciMult's authors or of DPR
tower        query or document, for a checkpoint of DPR
adapters     task:FOLDER,... (or hub names) for a plain model with adapters, as SPECTER2 has them;
             search.documents:FOLDER where documents have another one than queries
similarity   dot or cosine; by default that of the run, dot with backbone=, else cosine. Vectors are computed in
             float32; the final table of a run trained in bf16 is measured in bf16, so its last digits may differ.
exclude      whether a query's own id is left out of its ranking: yes, no, or auto (for tasks of the kind
             link_prediction, or where queries are documents word for word)
metrics, token_budget    as in a training's configuration
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from datamodules.readers.beir import BeirReader
from datamodules.records import Benchmark, UserError
from experiments.build_data import build_data
from experiments.config import from_dict
from experiments.console import choice, entry_point, key_values, whole_number
from experiments.files import write_json
from experiments.models import MODEL_KEYS, default_similarity, load_model, run_of
from experiments.results import evaluate_bm25, evaluate_encoder, show
from experiments.run_folder import read_config
from experiments.schema import Config, EvaluationConfig
from lightning_modules.losses import SIMILARITIES
from lightning_modules.metrics import parse_metric

log = logging.getLogger(__name__)

KEYS = MODEL_KEYS | {
    "run": "",
    "exclude": "auto",
    "output": "",
    "split": "test",
    "beir": "",
    "task": "",
    "similarity": "",
    "metrics": ",".join(EvaluationConfig().metrics),
    "token_budget": "8192",
}


def default_output(values: dict[str, str], run: Path | None) -> Path:
    """A folder of its own for each model, data and split."""
    own = run is not None and Path(values["model"]).resolve() == run.resolve()
    model = "" if own else _short_name(values["model"])
    parts = (model, Path(values["beir"]).name, values["task"], values["split"])
    return (run / "evaluation" if run else Path("evaluations")) / "-".join(part for part in parts if part)


def _short_name(model: str) -> str:
    """A name of a model's path, or of a hub's: its end, and a few digits that tell it from others of that end."""
    path = Path(model)
    if not path.exists():
        return model.replace("/", "-")
    digits = hashlib.blake2b(str(path.resolve()).encode(), digest_size=3).hexdigest()
    return f"{path.stem}-{digits}"


def benchmarks_of(values: dict[str, str], config: Config | None) -> list[Benchmark]:
    if values["beir"]:
        return [_beir_benchmark(values, config)]
    if config is None:
        raise UserError("which data? Give run=FOLDER of a run, or beir=FOLDER and task=NAME")
    found = build_data(config).benchmarks(values["split"])
    if values["task"]:
        found = [benchmark for benchmark in found if benchmark.task == values["task"]]
    if not found:
        of_task = f" of task {values['task']}" if values["task"] else ""
        raise UserError(f"split: the data{of_task} has no {values['split']!r} (usual are train, dev and test)")
    return found


def _beir_benchmark(values: dict[str, str], config: Config | None) -> Benchmark:
    folder, task, split = Path(values["beir"]), values["task"], values["split"]
    if not task:
        raise UserError(f"task: whose expert ranks {folder}? For instance task=search")
    collection = BeirReader(str(folder)).read()
    if split not in collection.qrels:
        raise UserError(f"split: {folder} has no {split!r}, it has {', '.join(collection.qrels)}")
    qrels = collection.qrels[split]
    queries = {query: collection.queries[query] for query in qrels}
    if values["exclude"] != "auto":
        exclude = values["exclude"] == "yes"
    elif config and task in config.task:
        exclude = config.task[task].kind == "link_prediction"
    else:  # ids alone do not tell: many collections number queries and documents alike
        exclude = all(collection.corpus.get(query) == document for query, document in queries.items())
    return Benchmark(folder.name, task, split, collection.corpus, queries, qrels, exclude)


def main(arguments: Sequence[str]) -> None:
    values = key_values(arguments, KEYS)
    if not values["model"]:
        raise UserError("which model? Give model=FOLDER of a run, a checkpoint, an exported folder, a BERT, or bm25")
    metrics = values["metrics"].split(",")
    for name in metrics:
        parse_metric(name)
    run = Path(values["run"]) if values["run"] else run_of(values["model"])
    config = from_dict(read_config(run), str(run / "config.yaml")) if run else None
    similarity = values["similarity"] or default_similarity(values, config)
    choice("similarity", similarity, SIMILARITIES)
    choice("exclude", values["exclude"], ("auto", "yes", "no"))

    encoder = None
    if values["model"] != "bm25":
        encoder = load_model(values, config)
        encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    benchmarks = benchmarks_of(values, config)
    folder = Path(values["output"]) if values["output"] else default_output(values, run)
    for benchmark in benchmarks if encoder else []:
        encoder.expert_of(benchmark.task)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: {folder} cannot be used ({error})") from error
    if encoder is None:
        results = evaluate_bm25(benchmarks, metrics, folder / "runs")
    else:
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
    write_json(folder / "results.json", about | {"benchmarks": results})
    show(results, metrics, f"{values['model']}, {values['split']} split")
    log.info("Results and run files lie in %s", folder)


if __name__ == "__main__":
    entry_point(main)
