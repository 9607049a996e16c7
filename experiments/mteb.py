"""Evaluate a model with mteb (Muennighoff et al., MTEB, EACL 2023). mteb loads the data, ranks and scores."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datamodules.options import option
from datamodules.records import Document, UserError
from experiments.build.models import EncodingOptions, default_similarity, short_name, token_budget_option
from experiments.config.arguments import named_values, parse
from experiments.shared.console import entry_point, table_console
from experiments.shared.table_formats import Column, Table, print_table
from lightning_modules.encoders.base import Encoder
from lightning_modules.retrieval.vector_cache import fingerprint

log = logging.getLogger(__name__)

TASKS = (
    *("SciFact", "NFCorpus", "TRECCOVID", "SCIDOCS", "LitSearchRetrieval", "SciDocsRR"),
    *("SciRepEvalDRSMClassification", "SciRepEvalBiomimicryClassification", "SciRepEvalMeSHDescriptorsClassification"),
    *("SciRepEvalFoSClassification", "BiorxivClusteringP2P.v2", "MedrxivClusteringP2P.v2"),
    *("ArXivHierarchicalClusteringP2P", "BIOSSES"),
)
EXPERTS = {  # type of mteb's task -> our task, whose expert encodes
    "Retrieval": "search",
    "Reranking": "search",
    "InstructionRetrieval": "search",
    "InstructionReranking": "search",
    "Classification": "classification",
    "MultilabelClassification": "classification",
    "Clustering": "classification",
    "Regression": "classification",
    "PairClassification": "link_prediction",
    "STS": "link_prediction",
    "BitextMining": "link_prediction",
    "Summarization": "link_prediction",
}
PAPERS_AS_QUERIES = ("scidocs", "cite")  # words in names of retrieval tasks that the link_prediction expert encodes
BATCH_SIZE = 1024  # texts that mteb passes per call; the encoder splits them into its own batches


@dataclass(kw_only=True)
class MtebOptions(EncodingOptions):
    """Evaluate a model with mteb.

    mteb downloads its data from the hub into HF_HOME. Install it with make install EXTRAS=cpu,mteb.
    """

    tasks: tuple[str, ...] = option(
        TASKS, "mteb tasks; NAME:TASK encodes with the expert of TASK, instead of the expert for this type of task"
    )
    output: Path | None = option(
        None,
        "folder for mteb's results, by default evaluation/mteb of the run or evaluations/mteb; reuses existing results",
    )
    similarity: Literal["dot", "cosine"] | None = option(
        None, "similarity of vectors, by default as the model was trained, else cosine"
    )
    token_budget: int | None = token_budget_option()


def main(arguments: Sequence[str]) -> None:
    options = parse(MtebOptions, arguments)
    run, config = options.run_folder(), options.run_config()
    experts = named_values("tasks", options.tasks, "NAME or NAME:TASK", optional=True)
    tasks = _find_tasks(list(experts))
    experts = {name: task for name, task in experts.items() if task}
    encoder = options.load_on_device(config)
    similarity = options.similarity or default_similarity(encoder, config)
    model = MtebEncoder(encoder, short_name(options.model), similarity, experts, options.token_budget)
    for task in tasks:
        log.info("%s: encoded by the expert of %s", task.metadata.name, model.task_of(task.metadata))
    output = options.output or (run / "evaluation" if run else Path("evaluations")) / "mteb"
    scores = _evaluate(model, tasks, output)
    _show(model, tasks, scores, f"{options.model}, evaluated by mteb")
    log.info("mteb's results are in %s", output)


def _find_tasks(names: Sequence[str]) -> list[Any]:
    """Return mteb's tasks with these names. Raises UserError for an unknown name, or if mteb is not installed."""
    try:
        import mteb
    except ImportError as error:
        raise UserError("mteb is not installed (make install EXTRAS=cpu,mteb)") from error
    tasks = []
    for name in names:
        try:
            tasks.append(mteb.get_task(name))
        except KeyError as error:
            raise UserError(f"tasks: mteb has no task {name!r} ({' '.join(str(error).split())[:200]})") from error
    return tasks


def _evaluate(model: MtebEncoder, tasks: Sequence[Any], output: Path) -> dict[str, float]:
    """Return the main score of each task. Raises UserError if the data of a task cannot be loaded."""
    import mteb

    scores, cache, show_bar = {}, mteb.ResultCache(output), table_console().is_terminal
    batches = {"batch_size": BATCH_SIZE, "show_progress_bar": show_bar}
    for task in tasks:
        name = task.metadata.name
        try:
            results = mteb.evaluate(model, task, cache=cache, encode_kwargs=batches, show_progress_bar=show_bar)
        except OSError as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{name}: cannot load its data ({reason}). The results so far are in {output}") from error
        scores[name] = float(results.task_results[0].get_score())
        log.info("%s: %s %.4f", name, task.metadata.main_score, scores[name])
    return scores


def _show(model: MtebEncoder, tasks: Sequence[Any], scores: dict[str, float], title: str) -> None:
    columns = [*map(Column, ("mteb task", "type", "expert", "metric")), Column("score", ".4f")]
    table = Table(columns, title)
    for data in (task.metadata for task in tasks):
        table.add(data.name, data.type, model.task_of(data), data.main_score, scores[data.name])
    print_table(table)


class MtebEncoder:
    """An encoder as a model of mteb (its EncoderProtocol).

    EXPERTS maps mteb's types of tasks to experts. Titles and texts of documents are joined as in training.

    name: name of the model in mteb's results.
    similarity: "dot" or "cosine".
    experts: mteb task -> our task, whose expert encodes; overrides EXPERTS.
    token_budget: maximum number of tokens per forward pass.
    """

    def __init__(
        self,
        encoder: Encoder,
        name: str,
        similarity: str = "cosine",
        experts: Mapping[str, str] | None = None,
        token_budget: int | None = None,
    ):
        self.encoder, self.name, self.metric = encoder, name, similarity
        self.experts, self.token_budget = dict(experts or {}), token_budget
        self.fingerprint = fingerprint(encoder)

    def task_of(self, metadata: Any) -> str:
        """Return the task whose expert encodes an mteb task. Raises UserError if the encoder has none."""
        by_type = EXPERTS.get(metadata.type, "search")
        if by_type == "search" and any(word in metadata.name.lower() for word in PAPERS_AS_QUERIES):
            by_type = "link_prediction"
        task = self.experts.get(metadata.name, by_type)
        self.encoder.expert_of(task)  # raises UserError
        return task

    def encode(
        self, inputs: Iterable[Mapping[str, Any]], *, task_metadata: Any, prompt_type: Any = None, **_: Any
    ) -> np.ndarray:
        """Return the vectors of mteb's batches, (n, D). prompt_type: "query" or "document" in retrieval."""
        documents = [document for batch in inputs for document in _documents(batch)]
        task = self.task_of(task_metadata)
        if prompt_type == "document":
            task = self.encoder.document_task(task)
        return self.encoder.encode(documents, task, token_budget=self.token_budget).numpy()

    def similarity(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Return the scores of all pairs of vectors: (n, D), (m, D) -> (n, m)."""
        return self._prepare(embeddings1) @ self._prepare(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Return the scores of vectors row by row: (n, D), (n, D) -> (n,)."""
        return (self._prepare(embeddings1) * self._prepare(embeddings2)).sum(-1)

    def _prepare(self, vectors: Any) -> np.ndarray:
        vectors = np.atleast_2d(np.asarray(vectors, dtype=np.float32))
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if self.metric == "cosine" else vectors

    @property
    def mteb_model_meta(self) -> Any:
        """Key under which mteb stores results. Different weights, similarity or experts give a different revision."""
        from mteb.models.model_meta import ModelMeta

        experts = [f"{task}={expert}" for task, expert in sorted(self.experts.items())]
        metadata = {
            "name": f"scimult/{self.name}",
            "revision": "-".join([self.fingerprint, self.metric, *experts]),
            "embed_dim": self.encoder.dimension,
            "max_tokens": self.encoder.max_length,
            "n_parameters": sum(parameter.numel() for parameter in self.encoder.parameters()),
            "framework": ["PyTorch"],
        }
        return ModelMeta.create_empty(metadata)


def _documents(batch: Mapping[str, Any]) -> list[Document]:
    """Return the documents of one of mteb's batches, with their titles, if any."""
    if "body" in batch:
        titles = batch.get("title") or [""] * len(batch["body"])
        return [Document("", title, body) for title, body in zip(titles, batch["body"], strict=True)]
    return [Document("", "", text) for text in batch["text"]]


if __name__ == "__main__":
    entry_point(main)
