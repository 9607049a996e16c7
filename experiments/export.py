"""Write a model for other tools: python -m experiments.export model=M [task=search] [output=FOLDER] [onnx=yes]

model        as for evaluate: a run's folder, a checkpoint, an exported folder, a checkpoint of SciMult's authors, ...
format       plain (one task as a folder that sentence-transformers, transformers and vector databases load without
             this project), pretrained (the whole encoder, for load_encoder and AutoModel), or reference (a .ckpt in
             the layout of SciMult's authors)
task         of the plain format: a task, average (the mean of all experts, a general model), or all: a folder for each
output       a new folder (a new file for reference); by default in export/ of the model's run, or in exports/
overwrite    yes writes an export anew that is there, for instance with onnx=yes
onnx         yes writes onnx/model.onnx beside the plain format (make install EXTRAS=cpu,onnx)
similarity   dot or cosine, for the plain format's settings; by default that of the run, dot with
             backbone=, else cosine
backbone, pooling, tower, adapters    of models that need them, as for evaluate

Each folder gets a README.md: what the model is, how it is used, what it was trained on and what it reached.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from datamodules.records import UserError
from experiments.build.models import MODEL_KEYS, default_similarity, load_model, run_of
from experiments.config.experiment import from_dict
from experiments.run.folder import read_config
from experiments.run.model_card import write_card
from experiments.shared.console import choice, entry_point, key_values
from experiments.shared.files import whole_folder
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.export import dense, save_dense, save_onnx, save_reference
from lightning_modules.losses import SIMILARITIES

log = logging.getLogger(__name__)

KEYS = MODEL_KEYS | {"format": "plain", "task": "all", "output": "", "onnx": "no", "overwrite": "no", "similarity": ""}
CARD = "README.md"  # of each folder that is exported


def main(arguments: Sequence[str]) -> None:
    values = key_values(arguments, KEYS)
    way = choice("format", values["format"], ("plain", "pretrained", "reference"))
    onnx = choice("onnx", values["onnx"], ("yes", "no")) == "yes"
    overwrites = choice("overwrite", values["overwrite"], ("yes", "no")) == "yes"
    run = run_of(values["model"])
    config = from_dict(read_config(run), str(run / "config.yaml")) if run else None
    similarity = values["similarity"] or default_similarity(values, config)
    choice("similarity", similarity, SIMILARITIES)
    if onnx and way != "plain":
        raise UserError("onnx: is written beside format=plain alone")
    if values["task"] != "all" and way != "plain":
        raise UserError(f"task: is for format=plain alone; format={way} holds all tasks")
    output = Path(values["output"]) if values["output"] else default_output(values, run)
    _check_output(output, overwrites)
    encoder = load_model(values, config)
    source = values["model"]

    if way == "reference":
        save_reference(encoder, output)
        log.info("%s: in the layout of SciMult's authors", output)
        return
    with whole_folder(output, replaces=overwrites) as folder:
        if way == "pretrained":
            encoder.save_pretrained(folder)
            write_card(folder, encoder, source, run, similarity)
        tasks = [] if way == "pretrained" else list(encoder.tasks) if values["task"] == "all" else [values["task"]]
        for task in tasks:
            target = folder / task if values["task"] == "all" else folder
            save_dense(encoder, task, target, similarity)
            write_card(target, dense(encoder, task), source, run, similarity, task)
            if onnx:
                save_onnx(target)
    log.info("%s", _how_to_load(output, way, values["task"], encoder))


def _check_output(output: Path, overwrites: bool) -> None:
    """Raise UserError if something is there that is not to be written over, or is no export."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrites:
        raise UserError(f"output: {output} is there already; overwrite=yes writes it anew, output= names another one")
    if output.is_dir() and not (output / CARD).is_file() and not all((p / CARD).is_file() for p in output.iterdir()):
        raise UserError(f"output: {output} is no export; name another one, or remove it")


def default_output(values: dict[str, str], run: Path | None) -> Path:
    """A place of its own for each model, format and task."""
    model = Path(values["model"])
    folder = run / "export" if run else Path("exports") / model.stem
    if values["format"] == "plain":
        return folder / (values["task"] if values["task"] != "all" else "tasks")
    return folder / ("reference.ckpt" if values["format"] == "reference" else "pretrained")


def _how_to_load(output: Path, way: str, task: str, encoder: Encoder) -> str:
    if way == "pretrained":
        return f"{output}: load_encoder({str(output)!r})"
    folders = [output / name for name in encoder.tasks] if task == "all" else [output]
    return "\n".join(f"{folder}: SentenceTransformer({str(folder)!r})" for folder in folders)


if __name__ == "__main__":
    entry_point(main)
