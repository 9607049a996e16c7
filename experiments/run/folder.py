"""The folder of a run: where it lies, what stands in it, and whether it goes on or starts.

config.yaml       the resolved configuration
manifest.json     command, versions, git state, data, cost
metrics.jsonl     every logged row
experts.svg       the last picture of tasks and experts, if diagnostics are on
checkpoints/      last.ckpt, those before it (last.1.ckpt, ...), best.ckpt
results.json      the final table; its presence says that the run is complete
negatives/        mined hard negatives, a folder for each mining, with its report
runs/             TREC run files of the final table
wandb/            W&B's own files
"""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_only

from datamodules.batches import MultiTaskDataModule
from datamodules.files import read_json, write_json, write_text
from datamodules.records import UserError
from experiments.config.experiment import as_dict
from experiments.config.paths import LAST, folder_of, read_config
from experiments.config.schema import Config
from experiments.run.lock import replace_folder
from lightning_modules.checkpoint_files import candidates, newest_intact
from lightning_modules.distributed import launch

log = logging.getLogger(__name__)

# What may change between the attempts of one run, as prefixes of keys.
CHANGEABLE = (
    *("run.dir", "run.resume", "wandb.", "evaluation.", "checkpoint.", "data.num_workers", "data.token_budget"),
    *("data.cache", "mining.memory_mb", "mining.store"),
    # With another number of ranks; the loader sees to it that the global batch stays the same.
    *("data.batch_size", "data.batch_tokens"),
    *("trainer.max_steps", "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.log_every_n_steps"),
    *("trainer.strategy", "trainer.timeout"),
)
VERSIONS = (
    "torch",
    "lightning",
    "transformers",
    "omegaconf",
    "wandb",
    "faiss-cpu",
    "faiss-gpu",
    "bm25s",
    "numpy",
)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """path: of the run. checkpoint: to resume from, or None; ranks take the first one's. complete: the run has its
    results already.
    """

    path: Path
    checkpoint: Path | None
    complete: bool

    @property
    def results(self) -> Path:
        return self.path / "results.json"


def open_run(config: Config) -> RunFolder:
    """Find the run's folder. Nothing is made or changed, but the first rank renames the old one for resume "never", and
    damaged checkpoints newer than the one to go on from.

    Raises UserError if the folder holds a run of another configuration or something that is no run, or if all of its
    checkpoints are damaged.
    """
    path, first = folder_of(config), rank_zero_only.rank == 0
    anew = config.run.resume == "never" and not _begun_by_this_job(path)
    if first:
        try:
            _prepare(config, path, anew)
        except OSError as error:
            raise UserError(f"run.dir: {path} cannot be used ({error})") from error
    if anew:  # other ranks do not look: the first may be renaming the old run just now
        return RunFolder(path, None, False)
    checkpoint = newest_intact(path / LAST) if first else next(iter(candidates(path / LAST)), None)
    return RunFolder(path, checkpoint, _is_complete(path, config))


def _begun_by_this_job(path: Path) -> bool:
    """Whether the run is that of this SLURM job, before it was put into the queue again."""
    job, manifest = launch.slurm_job(), path / "manifest.json"
    if job is None or not manifest.is_file():
        return False
    try:
        return any(attempt.get("job") == job for attempt in read_json(manifest)["attempts"])
    except UserError:
        return False


def _prepare(config: Config, path: Path, anew: bool) -> None:
    if path.is_file():
        raise UserError(f"run.dir: {path} is a file")
    if (path / "config.yaml").exists() and not (path / "checkpoints").is_dir():
        raise UserError(f"run.dir: {path} has a config.yaml and is no run; choose another folder")
    if anew and (path / "config.yaml").exists():
        path = path.resolve()
        kept = next(p for i in range(1, 10_000) if not (p := path.with_name(f"{path.name}.{i}")).exists())
        replace_folder(path, kept)
        log.info("the run that was in %s is kept in %s", path, kept)
    if (path / "config.yaml").exists():
        _refuse_other_run(config, path)


def _is_complete(path: Path, config: Config) -> bool:
    """Whether the run has its results: for these steps, this split and these metrics."""
    if not (path / "results.json").is_file():
        return False
    results = read_json(path / "results.json")
    wanted = config.evaluation
    measured_alike = results["split"] == wanted.split and results["metrics"] == wanted.metrics
    return results["steps"] >= config.trainer.max_steps and measured_alike


def write_config(folder: RunFolder, config: Config) -> None:
    """Make the folder and its config.yaml, when all that can be wrong with the configuration has been found right.

    Raises UserError if it cannot be made.
    """
    if rank_zero_only.rank == 0:
        try:
            (folder.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            write_text(folder.path / "config.yaml", yaml.safe_dump(as_dict(config), sort_keys=False))
        except OSError as error:
            raise UserError(f"run.dir: {folder.path} cannot be used ({error})") from error


def _refuse_other_run(config: Config, path: Path) -> None:
    then, now = dict(flat(read_config(path))), dict(flat(as_dict(config)))
    changed = [
        f"{key}: {then.get(key)} then, {now.get(key)} now"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key) and not key.startswith(CHANGEABLE) and not _is_batch_size(key)
    ]
    if changed:
        first = "; ".join(changed[:5]) + ("; ..." if len(changed) > 5 else "")
        raise UserError(
            f"{path} holds a run of another configuration ({first}). "
            "Choose another run.dir, or run.resume=never to start over (the old run is kept beside)."
        )


def _is_batch_size(key: str) -> bool:
    return key.startswith("task.") and key.endswith(".batch_size")


def flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys with dots, and their values."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from flat(value, f"{prefix}{key}.")
    else:
        yield prefix.rstrip("."), node


def write_manifest(
    folder: RunFolder,
    data: MultiTaskDataModule,
    num_parameters: int,
    schedule: Mapping[str, Any],
    devices: int,
    precision: str,
    seconds: float | None = None,
) -> None:
    """Note what is needed to understand and repeat the run.

    schedule: each task's batches and passes. devices: of all ranks. precision: of training. seconds: of training in
    this attempt, None before it.
    """
    if rank_zero_only.rank > 0:
        return
    path = folder.path / "manifest.json"
    manifest = read_json(path) if path.is_file() else {"attempts": []}
    if seconds is None:
        job = {"job": launch.slurm_job()} if launch.slurm_job() else {}
        manifest["attempts"].append(
            {"command": sys.argv, "started": time.strftime("%Y-%m-%d %H:%M:%S"), "devices": devices, "seconds": None}
            | job
        )
    else:
        manifest["attempts"][-1]["seconds"] = round(seconds, 1)
    manifest |= {
        "python": platform.python_version(),
        "machine": platform.platform(),
        "versions": versions(),
        "git": git_state(),
        "parameters": num_parameters,
        "precision": precision,
        "schedule": dict(schedule),
        "data": {
            name: {
                "task": task.task.name,
                "documents": len(collection.corpus),
                "queries": dict(collection.splits),
                "fingerprint": collection.fingerprint(),
            }
            for task in data.tasks
            for name, collection in task.collections.items()
        },
    }
    write_json(path, manifest)


def begun_in(folder: RunFolder) -> str | None:
    """The precision of a run that goes on: it stays the same on another machine. None for one that begins."""
    manifest = folder.path / "manifest.json"
    return read_json(manifest).get("precision") if folder.checkpoint and manifest.is_file() else None


def versions() -> dict[str, str]:
    """Of the packages that a figure may depend on."""
    return {name: version for name in VERSIONS if (version := _version(name))}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state() -> dict[str, Any] | None:
    """The commit of this code, and whether it was changed since; None where it is in no repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
