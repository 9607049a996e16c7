"""Models by the keys that entry points share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from datamodules.records import UserError
from experiments.config.schema import Config
from experiments.run.folder import runs_there
from lightning_modules.encoders.backbone import PACKAGE, package_folder
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.loading import DEFAULT_TASKS, load_encoder

MODEL_KEYS = {"model": "", "backbone": "", "pooling": "", "tower": "", "adapters": ""}


def load_model(values: Mapping[str, str], config: Config | None) -> Encoder:
    """The encoder that model= and its fellow keys name. config: of the run that it belongs to."""
    if not values["model"]:
        raise UserError("which model? Give model=FOLDER of a run, a checkpoint, an exported folder, or a plain model")
    pooling = values["pooling"] or (config.encoder.get("pooling") if config else None)
    tasks = DEFAULT_TASKS
    if values["task"] and values["task"] not in ("all", "average"):
        tasks = {values["task"]: values["task"]}
    adapters = {}
    for part in filter(None, values["adapters"].split(",")):
        task, colon, folder = part.partition(":")
        if not (task and colon and folder):
            raise UserError(f"adapters: got {part!r}, expected task:FOLDER, and a comma between several")
        adapters[task] = folder
    encoder = load_encoder(
        located(values["model"]),
        tasks,
        backbone=values["backbone"] or None,
        pooling=pooling,
        tower=values["tower"] or None,
        adapters=adapters or None,
    )
    if values["pooling"] and encoder.pooling != values["pooling"]:
        raise UserError(f"pooling: is for plain models; this one has its own, {encoder.pooling}")
    return encoder


def located(model: str) -> str:
    """A model's folder where it is named as an installed package (package:NAME), else as it is.

    Raises UserError for a package or run that is not there.
    """
    if not model.startswith(PACKAGE):
        if Path(model).parts[:1] == ("runs",) and not Path(model).exists():  # else it may be a name of the hub
            raise UserError(f"model: {model} is not there. {runs_there()}")
        return model
    if folder := package_folder(model):
        return folder
    raise UserError(f"model: the package {model.removeprefix(PACKAGE)} is not installed (or has no get_model_path)")


def default_similarity(values: Mapping[str, str], config: Config | None) -> str:
    """That of the model's run; dot for the authors' checkpoints, which were trained with it; else cosine."""
    if config:
        return config.objective.similarity
    return "dot" if values["backbone"] else "cosine"


def run_of(model: str) -> Path | None:
    """The folder of the run that a model belongs to, if any."""
    if not Path(model).exists():
        return None
    for path in (Path(model), Path(model).resolve().parent.parent):
        if (path / "config.yaml").is_file() and (path / "checkpoints").is_dir():
            return path
    return None
