"""Write a model for other tools: python -m experiments.export model=M [task=search] [output=FOLDER] [onnx=yes]

model        as for evaluate: a run's folder, a checkpoint, an exported folder, a checkpoint of SciMult's authors, ...
format       plain (one task as a folder that sentence-transformers, transformers and vector databases load without
             this project), pretrained (the whole encoder, for load_encoder and AutoModel), or reference (a .ckpt in
             the layout of SciMult's authors)
task         of the plain format: a task, average (the mean of all experts, a general model), or all: a folder for each
output       a new folder (a new file for reference); by default in export/ of the model's run, or in exports/
overwrite    yes replaces an earlier export, for instance to add onnx=yes; nothing else is ever replaced
onnx         yes writes onnx/model.onnx beside the plain format (make install EXTRAS=cpu,onnx)
similarity   dot or cosine, for the plain format's settings; by default that of the run, dot with
             backbone=, else cosine
backbone, pooling, tower, adapters    of models that need them, as for evaluate

Each folder gets a README.md: what the model is, how it is used, what it was trained on and what it reached.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from datamodules.records import UserError
from experiments.build.models import MODEL_KEYS, default_similarity, load_model, run_of
from experiments.config.experiment import from_dict
from experiments.config.paths import read_config
from experiments.run.model_card import INTRODUCTION, write_card
from experiments.shared.console import choice, entry_point, key_values
from experiments.shared.output import whole_folder
from lightning_modules.checkpoint_files import read_checkpoint
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.export import dense, save_dense, save_onnx, save_reference
from lightning_modules.encoders.scimult_format import is_reference
from lightning_modules.losses import SIMILARITIES

log = logging.getLogger(__name__)

KEYS = MODEL_KEYS | {"format": "plain", "task": "all", "output": "", "onnx": "no", "overwrite": "no", "similarity": ""}
CARD = "README.md"  # in each exported folder
MARKER = ".scimult-export"  # in each exported folder; overwrite=yes removes only folders that have it
EXPORTED = re.compile(  # names in a folder that a version without markers wrote
    r"README\.md|config\.json|model\.safetensors|modules\.json|sentence_bert_config\.json|"
    r"config_sentence_transformers\.json|1_Pooling|2_Normalize|onnx|vocab\.(txt|json)|merges\.txt|"
    r"tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|sentencepiece\.bpe\.model"
)


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
    inputs = _inputs(values, run)
    _check_output(output, overwrites, inputs)
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
            (target / MARKER).touch()
            if onnx:
                save_onnx(target)
        (folder / MARKER).touch()
        _check_output(output, overwrites, inputs)  # it may have changed meanwhile
    log.info("%s", _how_to_load(output, way, values["task"], encoder))


def _check_output(output: Path, overwrites: bool, inputs: Sequence[Path]) -> None:
    """Raise UserError if the output would replace anything but an earlier export.

    inputs: folders and files of the model. They, and the working directory, must not be in the output.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrites:
        raise UserError(
            f"output: {output} exists already; overwrite=yes replaces an earlier export, output= names another folder"
        )
    advice = "Name another output, or remove it yourself"
    if output.is_symlink():
        raise UserError(f"output: {output} is a symbolic link, and its target is never replaced. {advice}")
    for kept in (Path.cwd(), *inputs):
        if kept.resolve().is_relative_to(output.resolve()):
            raise UserError(f"output: {output} is or contains {kept}, which must not be replaced. {advice}")
    if not (is_export(output) if output.is_dir() else is_exported_checkpoint(output)):
        missing = f"it has no {MARKER} file" if output.is_dir() else "it is not a checkpoint of format=reference"
        raise UserError(f"output: {output} was not written by this command ({missing}). {advice}")
    for name in (".git", "checkpoints"):
        if output.is_dir() and (found := next(output.rglob(name), None)):
            raise UserError(f"output: {output} is an export, but contains {found}. {advice}")


def is_export(folder: Path) -> bool:
    """Whether this command wrote the folder: it has the marker file, or is an export of a version without markers."""
    if (folder / MARKER).is_file():
        return True
    entries = list(folder.iterdir())
    if all(path.is_dir() and not path.is_symlink() for path in entries):  # task=all
        return all(map(_is_unmarked_export, entries))
    return _is_unmarked_export(folder)


def _is_unmarked_export(folder: Path) -> bool:
    """Whether a folder holds a model and our card, and nothing else."""
    names = {path.name for path in folder.iterdir()}
    if not {CARD, "config.json", "model.safetensors"} <= names or not all(map(EXPORTED.fullmatch, names)):
        return False
    return INTRODUCTION in (folder / CARD).read_text(encoding="utf-8", errors="replace")


def is_exported_checkpoint(path: Path) -> bool:
    """Whether format=reference wrote the file. Only its settings have max_length; the authors' own do not."""
    try:
        checkpoint = read_checkpoint(path)
    except UserError:
        return False
    return is_reference(checkpoint) and "max_length" in checkpoint["encoder_params"]


def _inputs(values: dict[str, str], run: Path | None) -> list[Path]:
    """Folders and files that the model is read from."""
    adapters = [part.partition(":")[2] for part in values["adapters"].split(",")]
    names = [name for name in (values["model"], values["backbone"], *adapters) if name]
    return [Path(name) for name in names if Path(name).exists()] + ([run] if run else [])


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
