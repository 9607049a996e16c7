"""Export a model to formats that other tools load: python -m experiments.export --help"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from datamodules.options import option
from datamodules.records import UserError, check_name, reason
from experiments.build.models import ModelOptions, default_similarity, stem
from experiments.config.arguments import parse
from experiments.results.hub_metadata import CARD, HubDetails
from experiments.results.model_card import INTRODUCTION, write_card
from experiments.shared.console import entry_point
from experiments.shared.output import whole_folder
from lightning_modules.checkpoint_files import read_checkpoint
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.export import dense, save_dense, save_onnx, save_reference
from lightning_modules.encoders.scimult_format import is_exported_reference
from lightning_modules.retrieval.vector_cache import fingerprint

log = logging.getLogger(__name__)

MARKER = ".scimult-export"  # a file in each exported folder; overwrite=yes replaces only folders that contain this file
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
MARKER_TEXT = "This folder was written by make export. overwrite=yes replaces it with everything in it.\n"
UNMARKED = re.compile(  # names of files and folders in exports by older versions, which wrote no marker
    r"README\.md|config\.json|model\.safetensors|modules\.json|sentence_bert_config\.json|"
    r"config_sentence_transformers\.json|1_Pooling|2_Normalize|onnx|vocab\.(txt|json)|merges\.txt|"
    r"tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|sentencepiece\.bpe\.model"
)


@dataclass(kw_only=True)
class ExportOptions(ModelOptions):
    """Export a model to formats that other tools load without this project.

    Each exported folder gets a README.md that explains what the model is, how to use it, its training data and its
    results.
    """

    format: Literal["plain", "pretrained", "reference"] = option(
        "plain",
        "plain (one task, as a folder for sentence-transformers, transformers and vector databases), pretrained (the "
        "whole encoder, for load_encoder and AutoModel), or reference (a .ckpt in the layout of SciMult's authors)",
    )
    task: str = option(
        "all",
        "for format=plain: a task, average (a general model, the mean of all experts), or all (one folder per task)",
    )
    output: Path | None = option(
        None, "new folder, or new file with format=reference; by default in export/ of the model's run, or in exports/"
    )
    overwrite: bool = option(False, "replace the output if it is an earlier export, for instance to add onnx=yes")
    onnx: bool = option(False, "for format=plain: also write onnx/model.onnx (make install EXTRAS=cpu,onnx)")
    similarity: Literal["dot", "cosine"] | None = option(
        None, "similarity of vectors, by default as the model was trained, else cosine"
    )
    license: str = option(
        "",
        "license of the model under its name on the hub, such as apache-2.0; by default the start model's license, if "
        "known",
    )
    language: tuple[str, ...] = option(("en",), "languages of the texts as ISO 639 codes")
    base_model: str = option("", "hub name of the model that training started from, if it was loaded from a folder")
    push: str = option(
        "",
        "OWNER/NAME on the Hugging Face hub (or the server in HF_ENDPOINT) to upload the exported folder to; task=all "
        "uploads each task to OWNER/NAME-TASK",
    )
    private: bool = option(False, "for push: create a private repository")

    def repository(self, task: str) -> str:
        """Return the repository that a task is pushed to, or "" without push. task: "" for the whole encoder."""
        return f"{self.push}-{task}" if self.push and self.task == "all" and task else self.push

    def hub_details(self, task: str) -> HubDetails:
        return HubDetails(
            repository=self.repository(task),
            license=self.license,
            language=self.language,
            base_model=self.base_model,
        )


def main(arguments: Sequence[str]) -> None:
    options = parse(ExportOptions, arguments)
    if options.onnx and options.format != "plain":
        raise UserError(f"onnx: needs format=plain, got format={options.format}")
    if options.task != "all" and options.format != "plain":
        raise UserError(f"task: needs format=plain; format={options.format} always contains all tasks")
    check_name("task", options.task)
    _check_hub_options(options)
    run, config = options.run_folder(), options.run_config()
    output = options.output or default_output(options, run)
    inputs = _inputs(options, run)
    check_output(output, options.overwrite, inputs)
    encoder = options.load(config, task=options.task)
    tasks = _tasks(options, encoder)
    for task in tasks if options.push else ():
        _check_repository(options.repository(task))
    measured = fingerprint(encoder)
    encoder.similarity = options.similarity or default_similarity(encoder, config)
    if options.format == "reference":
        save_reference(encoder, output)
        log.info("wrote %s, a checkpoint in the layout of SciMult's authors", output)
        return
    with whole_folder(output, replaces=options.overwrite) as folder:
        (folder / MARKER).write_text(MARKER_TEXT)
        for task in tasks:
            _write_model(options, encoder, task, run, measured, folder / (task if options.task == "all" else ""))
        check_output(output, options.overwrite, inputs)  # again, because the output may have changed during the export
    loader = "load_encoder" if options.format == "pretrained" else "SentenceTransformer"
    for task in tasks:
        folder = output / (task if options.task == "all" else "")
        log.info("%s: %s(%r)", folder, loader, str(folder))
        if options.push:
            push(folder, options.repository(task), options.private)


def _tasks(options: ExportOptions, encoder: Encoder) -> list[str]:
    """Return the tasks that get a folder, or [""] for one folder with the whole encoder."""
    if options.format != "plain":
        return [""]
    return list(encoder.tasks) if options.task == "all" else [options.task]


def _write_model(
    options: ExportOptions, encoder: Encoder, task: str, run: Path | None, measured: str, folder: Path
) -> None:
    """Write the model for a task (the whole encoder if it is ""), with its README.md.

    run: folder of the encoder's run, if any. measured: fingerprint of the whole encoder.
    """
    similarity, exported = encoder.similarity, encoder
    if options.format == "pretrained":
        encoder.save_pretrained(folder)
    else:
        save_dense(encoder, task, folder, similarity)
        exported = dense(encoder, task)
    details = {"origin": encoder.origin, "fingerprint": measured, "hub": options.hub_details(task)}
    write_card(folder, exported, options.model, run, similarity, task, **details)
    (folder / MARKER).write_text(MARKER_TEXT)
    if options.onnx:
        save_onnx(folder)


def _check_hub_options(options: ExportOptions) -> None:
    """Check the options for the hub, before the model is loaded."""
    languages = [("language", language) for language in options.language]
    for key, value in (("license", options.license), ("base_model", options.base_model), *languages):
        if value and not HUB_ID.fullmatch(value):
            raise UserError(f"{key}: expected an id from the hub, got {value!r}")
    if not options.push:
        if options.private:
            raise UserError("private: needs push=OWNER/NAME")
        return
    if options.format == "reference":
        raise UserError("push: needs a folder, so format=plain or format=pretrained, got format=reference")
    _check_repository(options.push)
    if not get_token():
        raise UserError(
            "push: you are not logged in to the hub; run `hf auth login`, or set HF_TOKEN to a token with write access"
        )


def _check_repository(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"push: {reason(error)}") from error
    if "/" not in name:
        raise UserError(f"push: expected OWNER/NAME, got {name!r}")


def push(folder: Path, repository: str, private: bool) -> None:
    """Upload an exported folder to the hub. Raises UserError if that fails."""
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise UserError(
                f"private: {repository} already exists and is public; make it private first, or push elsewhere"
            )
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, ignore_patterns=MARKER, commit_message="Upload the model"
        )
    except UserError:
        raise
    except Exception as error:  # a network can fail in many ways, each with its own exception
        raise UserError(
            f"push: {repository}: the upload to {api.endpoint} failed ({reason(error)}). The export is complete in "
            f"{folder}; upload it with `hf upload {repository} {folder}`, or repeat this command with overwrite=yes"
        ) from error
    log.info("%s: uploaded, %s", repository, commit.commit_url)


def default_output(options: ExportOptions, run: Path | None) -> Path:
    """Return the output folder or file for a model, format and task."""
    folder = run / "export" if run else Path("exports") / stem(options.model)
    if options.format == "plain":
        return folder / (options.task if options.task != "all" else "tasks")
    return folder / ("reference.ckpt" if options.format == "reference" else "pretrained")


def _inputs(options: ExportOptions, run: Path | None) -> list[Path]:
    """Return the files and folders that the model is read from."""
    adapters = [adapter.partition(":")[2] for adapter in options.adapters]
    paths = [Path(name) for name in (options.model, options.backbone, *adapters) if name]
    return [path for path in paths if path.exists()] + ([run] if run else [])


def check_output(output: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Raise UserError if the output exists, unless overwrite is set and it is an earlier export.

    inputs: files and folders of the model. An output that contains one of them, or the working directory, is refused.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        advice = "overwrite=yes replaces an earlier export; output= sets another folder"
        raise UserError(f"output: {output} already exists; {advice}")
    advice = "Choose another output, or remove this one yourself"
    if output.is_symlink():
        raise UserError(f"output: {output} is a symbolic link, whose target must not be replaced. {advice}")
    for path in (Path.cwd(), *inputs):
        if path.resolve().is_relative_to(output.resolve()):
            raise UserError(f"output: {output} is or contains {path}, which must not be replaced. {advice}")
    if not (is_export(output) if output.is_dir() else is_exported_checkpoint(output)):
        missing = f"it has no {MARKER} file" if output.is_dir() else "it is not a checkpoint of format=reference"
        raise UserError(f"output: {output} was not written by this command ({missing}). {advice}")
    for name in (".git", "checkpoints"):  # a repository or a run inside an export
        if output.is_dir() and (path := next(output.rglob(name), None)):
            raise UserError(f"output: {output} is an export, but contains {path}. {advice}")


def is_export(folder: Path) -> bool:
    """Return whether this command or an older version of it wrote a folder."""
    if (folder / MARKER).is_file():
        return True
    entries = list(folder.iterdir())
    if all(path.is_dir() and not path.is_symlink() for path in entries):  # task=all
        return all(map(_is_unmarked_export, entries))
    return _is_unmarked_export(folder)


def _is_unmarked_export(folder: Path) -> bool:
    """Return whether a folder contains a model with our README.md, and nothing else."""
    names = {path.name for path in folder.iterdir()}
    if not {CARD, "config.json", "model.safetensors"} <= names or not all(map(UNMARKED.fullmatch, names)):
        return False
    return INTRODUCTION in (folder / CARD).read_text(encoding="utf-8", errors="replace")


def is_exported_checkpoint(path: Path) -> bool:
    """Return whether this command wrote a file with format=reference."""
    try:
        return is_exported_reference(read_checkpoint(path))
    except UserError:
        return False


if __name__ == "__main__":
    entry_point(main)
