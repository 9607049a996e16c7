"""Our encoders as mteb takes models, so that mteb itself runs its tasks on them (Muennighoff et al., MTEB, EACL 2023).

mteb knows kinds of tasks, not experts: EXPERTS says whose expert encodes a kind's texts. Titles and texts of its
documents come apart, and are joined as in training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from datamodules.records import Document
from lightning_modules.encoders.base import Encoder
from lightning_modules.retrieval.vector_cache import fingerprint

EXPERTS = {
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
LINKS = ("scidocs", "cite")  # in names of retrieval tasks whose queries are papers


class MtebEncoder:
    """mteb's EncoderProtocol. name: of the model, as results are filed. similarity: "dot" or "cosine".

    experts: name of an mteb task -> the task whose expert encodes, where it is not that of EXPERTS.
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
        """The task whose expert encodes for an mteb task. Raises UserError if the encoder has none."""
        by_kind = EXPERTS.get(metadata.type, "search")
        if by_kind == "search" and any(word in metadata.name.lower() for word in LINKS):
            by_kind = "link_prediction"
        task = self.experts.get(metadata.name, by_kind)
        self.encoder.expert_of(task)
        return task

    def encode(
        self, inputs: Iterable[Mapping[str, Any]], *, task_metadata: Any, prompt_type: Any = None, **_: Any
    ) -> np.ndarray:
        """Vectors (n, D) of mteb's batches. prompt_type: "query" or "document", in retrieval."""
        documents = [document for batch in inputs for document in _documents(batch)]
        task = self.task_of(task_metadata)
        if prompt_type == "document":
            task = self.encoder.document_task(task)
        return self.encoder.encode(documents, task, token_budget=self.token_budget).numpy()

    def similarity(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Scores (n, m) of vectors (n, D) and (m, D)."""
        first, second = self._compared(embeddings1), self._compared(embeddings2)
        return first @ second.T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Scores (n,) of vectors (n, D) and (n, D), row by row."""
        return (self._compared(embeddings1) * self._compared(embeddings2)).sum(-1)

    def _compared(self, vectors: Any) -> np.ndarray:
        vectors = np.atleast_2d(np.asarray(vectors, dtype=np.float32))
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if self.metric == "cosine" else vectors

    @property
    def mteb_model_meta(self) -> Any:
        """What mteb files results under: another revision for other weights, similarity or experts."""
        from mteb.models.model_meta import ModelMeta

        chosen = [f"{task}={expert}" for task, expert in sorted(self.experts.items())]
        about = {
            "name": f"scimult/{self.name}",
            "revision": "-".join([self.fingerprint, self.metric, *chosen]),
            "embed_dim": self.encoder.dimension,
            "max_tokens": self.encoder.max_length,
            "n_parameters": sum(parameter.numel() for parameter in self.encoder.parameters()),
            "framework": ["PyTorch"],
        }
        return ModelMeta.create_empty(about)


def _documents(batch: Mapping[str, Any]) -> Iterable[Document]:
    """The texts of a batch: of documents title and body, else one text."""
    if "body" in batch:
        titles = batch.get("title") or [""] * len(batch["body"])
        return [Document("", title, body) for title, body in zip(titles, batch["body"], strict=True)]
    return [Document("", "", text) for text in batch["text"]]
