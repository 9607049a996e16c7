"""Have mteb measure a model: python -m experiments.mteb model=M [tasks=SciFact,SCIDOCS:search] [output=FOLDER]

model        as for evaluate: a run's folder, a checkpoint, an exported folder, a plain model
tasks        of mteb, with commas between; NAME:TASK has the expert of TASK encode, where it should be another one than
             experiments/interop/mteb_encoder.py says. By default its scientific ones
output       where mteb keeps its results; what stands there of the same model is not measured again
similarity   dot or cosine; by default that of the run, dot with backbone=, else cosine
token_budget, backbone, pooling, tower, adapters    as for evaluate

mteb loads its data from the hub (HF_HOME is where they are kept). It needs make install EXTRAS=cpu,mteb.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from datamodules.records import UserError
from experiments.build.models import MODEL_KEYS, default_similarity, load_model, run_of
from experiments.build.systems import short_name
from experiments.config.experiment import from_dict
from experiments.interop.mteb_encoder import MtebEncoder
from experiments.config.paths import read_config
from experiments.shared.console import choice, entry_point, key_values, table_console, token_budget

log = logging.getLogger(__name__)

TASKS = (
    "SciFact",
    "NFCorpus",
    "TRECCOVID",
    "SCIDOCS",
    "LitSearchRetrieval",
    "SciDocsRR",
    "SciRepEvalDRSMClassification",
    "SciRepEvalBiomimicryClassification",
    "SciRepEvalMeSHDescriptorsClassification",
    "SciRepEvalFoSClassification",
    "BiorxivClusteringP2P.v2",
    "MedrxivClusteringP2P.v2",
    "ArXivHierarchicalClusteringP2P",
    "BIOSSES",
)
KEYS = MODEL_KEYS | {"tasks": ",".join(TASKS), "output": "", "similarity": "", "token_budget": ""}
SIMILARITIES = ("dot", "cosine")


def main(arguments: Sequence[str]) -> None:
    values = key_values(arguments, KEYS)
    run = run_of(values["model"])
    config = from_dict(read_config(run), str(run / "config.yaml")) if run else None
    similarity = values["similarity"] or default_similarity(values, config)
    choice("similarity", similarity, SIMILARITIES)
    named = [part.partition(":")[::2] for part in filter(None, values["tasks"].split(","))]
    budget = token_budget(values)
    tasks = find_tasks([name for name, _ in named])
    encoder = load_model(values | {"task": ""}, config).to("cuda" if torch.cuda.is_available() else "cpu")
    experts = {name: task for name, task in named if task}
    model = MtebEncoder(encoder, short_name(values["model"]), similarity, experts, budget)
    for task in tasks:
        log.info("%s: the expert of %s", task.metadata.name, model.task_of(task.metadata))
    output = Path(values["output"] or (run / "evaluation" if run else Path("evaluations")) / "mteb")
    scores = evaluate(model, tasks, output)
    show(model, tasks, scores, f"{values['model']}, measured by mteb")
    log.info("mteb's results lie in %s", output)


def find_tasks(names: Sequence[str]) -> list[Any]:
    """mteb's tasks of these names. Raises UserError for others, or if mteb is not there."""
    try:
        import mteb
    except ImportError as error:
        raise UserError("mteb is not installed (make install EXTRAS=cpu,mteb)") from error
    tasks = []
    for name in names:
        try:
            tasks.append(mteb.get_task(name))
        except KeyError as error:
            raise UserError(f"tasks: mteb knows no task {name!r} ({' '.join(str(error).split())[:200]})") from error
    return tasks


def evaluate(model: MtebEncoder, tasks: Sequence[Any], output: Path) -> dict[str, float]:
    """mteb task -> its main score. Raises UserError if the data of one cannot be had."""
    import mteb

    scores, cache, bar = {}, mteb.ResultCache(output), Console().is_terminal
    batches = {"batch_size": 1024, "show_progress_bar": bar}  # how mteb hands texts over; the encoder has its own
    for task in tasks:
        name = task.metadata.name
        try:
            found = mteb.evaluate(model, task, cache=cache, encode_kwargs=batches, show_progress_bar=bar)
        except OSError as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{name}: its data cannot be had ({reason}). What was measured is in {output}") from error
        scores[name] = float(found.task_results[0].get_score())
        log.info("%s: %s %.4f", name, task.metadata.main_score, scores[name])
    return scores


def show(model: MtebEncoder, tasks: Sequence[Any], scores: dict[str, float], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for heading in ("mteb task", "kind", "expert", "metric"):
        table.add_column(heading, no_wrap=True)
    table.add_column("score", justify="right")
    for task in tasks:
        about = task.metadata
        table.add_row(about.name, about.type, model.task_of(about), about.main_score, f"{scores[about.name]:.4f}")
    table_console().print(table)


if __name__ == "__main__":
    entry_point(main)
