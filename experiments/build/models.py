"""Load the models that a command names."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from datamodules.options import option
from datamodules.records import Benchmark, UserError, check_name
from experiments.config.arguments import named_values
from experiments.config.run_config import config_of_run, existing_runs, packages_option, run_of
from experiments.config.schema import Config
from experiments.shared.output import name_of, shortened
from lightning_modules.distributed import launch
from lightning_modules.encoders.backbone import PACKAGE, installed
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.loading import DEFAULT_TASKS, is_plain, load_encoder
from lightning_modules.retrieval.compute import default_device, describe_device, resolve_device
from lightning_modules.retrieval.vector_cache import VectorCache

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ModelOptions:
    """Which model to load, and how."""

    model: str = option(
        "",
        "run folder, checkpoint, exported folder, or plain BERT (folder, hub name, or package:NAME of an installed "
        "package)",
    )
    backbone: str | None = option(
        None, "folder or hub name of the configuration and tokenizer, for a checkpoint of SciMult's authors or of DPR"
    )
    pooling: Literal["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"] | None = option(
        None, "pooling of a plain model; by default as in its run or its sentence-transformers files, else cls"
    )
    tower: Literal["query", "document"] | None = option(None, "tower of a DPR checkpoint to load")
    adapters: tuple[str, ...] = option(
        (),
        "task:FOLDER or task:HUB_NAME for each adapter of a plain model, as in SPECTER2; task.documents:FOLDER if "
        "documents have an adapter of their own",
    )
    packages: tuple[str, ...] = packages_option()

    def run_folder(self) -> Path | None:
        """Return the folder of the run that the model belongs to, if any."""
        return run_of(self.model)

    def run_config(self) -> Config | None:
        """Return the configuration of the run that the model belongs to, if any."""
        return config_of_run(self.run_folder(), self.packages)

    def load(self, config: Config | None = None, *, task: str = "", like: Encoder | None = None) -> Encoder:
        """Return the encoder. Raises UserError if it cannot be loaded.

        config: configuration of the model's run; its pooling is the default for a plain model.
        task: the only task of a plain model, by default the paper's three tasks.
        like: encoder whose tasks and pooling a plain model takes.
        """
        if not self.model:
            raise UserError("model: required, folder of a run, checkpoint, exported folder, or plain model")
        if self.model == "bm25":
            raise UserError(
                "model: bm25 has no encoder. make eval compares with it; make mine mines with it, without a model: "
                "mining.miner._target_=lightning_modules.mining.miners.BM25Miner"
            )
        model = _resolve(self.model)
        tasks = {task: task} if task and task not in ("all", "average") else DEFAULT_TASKS
        pooling = like.pooling if like else config.encoder.get("pooling") if config else None
        return load_encoder(
            model,
            like.tasks if like else tasks,
            backbone=self.backbone,
            pooling=self.pooling or (pooling if pooling and is_plain(model) else None),
            tower=self.tower,
            adapters=named_values("adapters", self.adapters, "task:FOLDER, with commas between several") or None,
            packages=self.packages,
        )


@dataclass(kw_only=True)
class EncodingOptions(ModelOptions):
    """Which model to load, and on which device."""

    device: str = option("auto", "device of the model: cpu, cuda or cuda:N; auto: a GPU if there is one")

    def load_on_device(
        self, config: Config | None = None, *, task: str = "", device: torch.device | None = None
    ) -> Encoder:
        """Return the encoder as load() does, on a device, by default that of the options."""
        device = device or resolve_device(self.device)
        encoder = self.load(config, task=task).to(device)
        log.info("%s on %s", self.model, describe_device(device))
        return encoder


def token_budget_option() -> Any:
    return option(
        None, "maximum number of tokens per forward pass, by default 2,048 on a CPU, 65,536 on a GPU", minimum=1
    )


def default_similarity(encoder: Encoder, config: Config | None) -> str:
    """Return the similarity that an encoder was trained with, according to its files or its run. Default: cosine."""
    return encoder.similarity or (config.objective.similarity if config else "cosine")


def device_of(config: Config) -> torch.device:
    """Return the device on which this process trains."""
    return torch.device("cpu") if config.trainer.accelerator == "cpu" else default_device(launch.local_rank())


def ranks_of(config: Config) -> int:
    """Return the number of ranks on all nodes."""
    devices = torch.cuda.device_count() if config.trainer.devices == -1 else config.trainer.devices
    return devices * config.trainer.num_nodes


def _resolve(model: str) -> str:
    """Resolve package:NAME to a folder, and return any other model unchanged.

    Raises UserError for a package that is not installed, or a run that does not exist.
    """
    # Any other missing path may be a name on the hub.
    if Path(model).parts[:1] == ("runs",) and not Path(model).exists():
        raise UserError(f"model: {model} does not exist. {existing_runs()}")
    return installed(model)


@dataclass(frozen=True, slots=True)
class System:
    """A model under evaluation.

    name: name in tables and file names.
    model: path or name that the model was loaded from.
    encoder, vectors: None for BM25.
    similarity: "dot", "cosine" or "l2", for benchmarks without their own.
    document_vectors: vectors of the documents, if another model encodes them.
    """

    name: str
    model: str
    encoder: Encoder | None
    similarity: str
    vectors: VectorCache | None = None
    document_vectors: VectorCache | None = None

    def __post_init__(self) -> None:
        check_name("system", self.name)

    def obstacle(self, benchmark: Benchmark) -> str:
        """Return why the system cannot be evaluated on a benchmark, or "" if it can."""
        if self.encoder is None:
            return f"{self.name} has no vectors, which a linear model needs" if benchmark.training is not None else ""
        if benchmark.task not in self.encoder.tasks:
            tasks = ", ".join(self.encoder.tasks)
            return f"unknown task {benchmark.task!r}: the tasks of {self.name} are {tasks}"
        return ""


def load_systems(
    models: Mapping[str, EncodingOptions],
    config: Config | None,
    similarities: Sequence[str] = (),
    *,
    task: str = "",
    max_length: int | None = None,
    token_budget: int | None = None,
    vectors_folder: Path | None = None,
    document_model: EncodingOptions | None = None,
) -> list[System]:
    """Load the models on their devices. Each model becomes one system per similarity.

    models: name in tables -> model; "bm25" is not loaded.
    config: configuration of the model's run, if any.
    similarities: similarities to compare, by default each model's own.
    task: the only task of a plain model, by default the paper's three tasks.
    max_length: maximum number of tokens of a text, by default the model's.
    vectors_folder: folder for cached vectors.
    document_model: model that encodes the documents, if `models` only encode queries.
    """
    systems, document_vectors = [], None
    if document_model is not None:
        encoder = document_model.load_on_device(task=task)
        document_vectors = VectorCache(encoder, token_budget=token_budget, folder=vectors_folder)
    for name, options in models.items():
        if options.model == "bm25":
            systems.append(System("bm25", "bm25", None, "bm25"))
            continue
        encoder = options.load_on_device(config, task=task)
        if max_length is not None:
            if max_length > (longest := encoder.family.max_positions):
                raise UserError(f"max_length: {options.model} supports at most {longest} tokens, got {max_length}")
            encoder.max_length = max_length
        vectors = VectorCache(encoder, token_budget=token_budget, folder=vectors_folder)
        for similarity in similarities or [default_similarity(encoder, config)]:
            full_name = f"{name}-{similarity}" if len(similarities) > 1 else name
            systems.append(System(full_name, options.model, encoder, similarity, vectors, document_vectors))
    return systems


def short_name(model: str) -> str:
    """Return a short name for a model: the stem of its path, with digits to tell equal stems apart."""
    if not Path(model).exists():
        return shortened(model.removeprefix(PACKAGE).replace("/", "-"))
    digits = hashlib.blake2b(os.fsencode(Path(model).resolve()), digest_size=3).hexdigest()
    return f"{stem(model)}-{digits}"


def stem(model: str) -> str:
    """Return the stem of a model's path, even if the path is . or .."""
    return shortened(Path(name_of(model)).stem)
