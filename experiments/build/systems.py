"""What an evaluation compares: models by name, each loaded once, and BM25."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from datamodules.records import Benchmark, UserError
from experiments.build.models import default_similarity, load_model
from experiments.config.schema import Config
from experiments.results.results import Results, evaluate_bm25, evaluate_encoder
from experiments.shared.console import token_budget, whole_number
from lightning_modules.encoders.backbone import PACKAGE
from lightning_modules.encoders.base import Encoder
from lightning_modules.retrieval.compute import computing_in
from lightning_modules.retrieval.vector_cache import VectorCache

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class System:
    """A model as it is measured. name: in tables and files. encoder: none for BM25."""

    name: str
    model: str
    encoder: Encoder | None
    similarity: str
    vectors: VectorCache | None = None

    def lacks(self, benchmark: Benchmark) -> str:
        """What it would need to be measured on a benchmark, if that is not there."""
        if self.encoder is None:
            return f"{self.name} has no vectors for a linear model" if benchmark.training is not None else ""
        if benchmark.task not in self.encoder.tasks:
            return f"unknown task {benchmark.task!r}: {self.name} was built for {', '.join(self.encoder.tasks)}"
        return ""

    def evaluate(
        self,
        benchmarks: Sequence[Benchmark],
        metrics: Sequence[str],
        folder: Path,
        token_budget: int | None,
        precision: str,
    ) -> Results:
        if self.encoder is None:
            return evaluate_bm25(benchmarks, metrics, folder)
        with computing_in(precision, self.encoder.device):
            return evaluate_encoder(
                self.name,
                self.encoder,
                benchmarks,
                metrics,
                folder,
                similarity=self.similarity,
                token_budget=token_budget,
                model=self.model,
                vectors=self.vectors,
            )


def short_name(model: str) -> str:
    """A name of a model's path, or of a hub's: its end, and a few digits that tell it from others of that end."""
    path = Path(model)
    if not path.exists():
        return model.removeprefix(PACKAGE).replace("/", "-")
    digits = hashlib.blake2b(str(path.resolve()).encode(), digest_size=3).hexdigest()
    return f"{path.stem}-{digits}"


def load_systems(
    values: Mapping[str, str], similarities: Sequence[str], config: Config | None, names: Mapping[str, str]
) -> list[System]:
    """The systems that model= names, each under every similarity; by default each model's own.

    names: model -> how it is called. The encoders are on the GPU, if there is one. Raises UserError.
    """
    systems = []
    for model in models_of(values):
        if model == "bm25":
            systems.append(System("bm25", model, None, "bm25"))
            continue
        encoder = load_model({**values, "model": model}, config)
        if values["max_length"]:
            encoder.max_length = _checked_length(values["max_length"], model, encoder)
        encoder.to("cuda" if torch.cuda.is_available() else "cpu")
        folder = Path(values["vectors"]) if values["vectors"] else None
        vectors = VectorCache(encoder, token_budget=token_budget(values), folder=folder)
        own = default_similarity({**values, "model": model}, config)
        for similarity in similarities or [own]:
            name = names[model] + (f"-{similarity}" if len(similarities) > 1 else "")
            systems.append(System(name, model, encoder, similarity, vectors))
    return systems


def _checked_length(length: str, model: str, encoder: Encoder) -> int:
    longest = encoder.family.max_positions
    if (tokens := whole_number("max_length", length, least=3)) > longest:
        raise UserError(f"max_length: got {tokens} tokens, but {model} has positions for {longest}")
    return tokens


def models_of(values: Mapping[str, str]) -> list[str]:
    models = list(filter(None, values["model"].split(",")))
    if len(set(models)) < len(models):
        raise UserError(f"model: each may be named once, got {values['model']}")
    if not models:
        raise UserError("model: required, folder of a run, checkpoint, exported folder, plain BERT, or bm25")
    return models
