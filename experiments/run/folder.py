"""Open the folder of a run, and write its configuration and manifest.

config.yaml       resolved configuration
manifest.json     command, versions, git state, data, cost
metrics.jsonl     every logged row
experts.svg       latest plot of tasks and experts, if diagnostics are on
checkpoints/      last.ckpt, earlier ones (last.1.ckpt, ...), best.ckpt;
                  start.ckpt and merged.ckpt with trainer.start_share
results.json      final table; exists if the run is complete
negatives/        mined hard negatives: one folder per mining, with its report
runs/             TREC run files of the final table
wandb/            W&B's own files
tensorboard/      TensorBoard's files, with loggers=[tensorboard]
csv/              one table per start of the run, with loggers=[csv]
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import OmegaConf

from datamodules.files import damage_explained, read_json, write_json, write_text
from datamodules.records import UserError, changes, explained
from experiments.config.experiment import LAST, as_dict, folder_of, read_config
from experiments.config.schema import Config
from experiments.run.lock import replace_folder
from lightning_modules.distributed import launch

if TYPE_CHECKING:  # because Lightning takes seconds to import
    from datamodules.batches import MultiTaskDataModule

log = logging.getLogger(__name__)

# Prefixes of keys that may change between the attempts of a run.
CHANGEABLE = (
    *("run.dir", "run.resume", "wandb.", "loggers", "evaluation.", "checkpoint.", "extend.packages"),
    *("data.num_workers", "data.token_budget", "data.cache", "mining.memory_mb", "mining.store"),
    # These two change with the number of ranks. The loader checks that the global batch stays the same.
    *("data.batch_size", "data.batch_tokens"),
    *("trainer.max_steps", "trainer.max_epochs", "trainer.accelerator", "trainer.devices", "trainer.num_nodes"),
    *("trainer.log_every_n_steps", "trainer.strategy", "trainer.timeout", "trainer.peak_tflops", "trainer.compile"),
)
WITHOUT_MANIFEST = "Delete it to use the run without a check that its data are unchanged."
PACKAGES = ("torch", "lightning", "transformers", "omegaconf", "wandb", "faiss-cpu", "faiss-gpu", "bm25s", "numpy")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run's folder, and its state at the start of this attempt.

    checkpoint: checkpoint to resume from (the first rank's choice counts for all ranks), or None for a new run.
    complete: whether the run has its results.
    """

    path: Path
    checkpoint: Path | None
    complete: bool

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    def recorded_precision(self) -> str | None:
        """Return the precision that a resumed run must keep, even on another machine, or None for a new run."""
        return manifest_of(self.path).get("precision") if self.checkpoint else None


def open_run(config: Config) -> RunFolder:
    """Inspect the run's folder: is the run new, unfinished or complete?

    Only the first rank changes anything. It renames damaged checkpoints that are newer than the one to resume from, and
    with run.resume=never the whole old run. Raises UserError if the folder holds another run or something else, or if
    all checkpoints are damaged.
    """
    from lightning_modules.checkpoint_files import candidates, newest_intact  # only here, because it imports torch

    path, is_first = folder_of(config), launch.rank() == 0
    starts_over = config.run.resume == "never" and not _was_started_by_this_job(path)
    if is_first:
        with explained(f"run.dir: {path} cannot be used"):
            _prepare(config, path, starts_over)
    if starts_over:  # the other ranks must not read the old run, which the first rank may be renaming now
        return RunFolder(path, None, False)
    try:
        checkpoint = newest_intact(path / LAST) if is_first else next(iter(candidates(path / LAST)), None)
    except UserError as error:
        raise UserError(f"{error} run.resume=never starts a new run and keeps the old one.") from error
    return RunFolder(path, checkpoint, _is_complete(path, config))


def _was_started_by_this_job(path: Path) -> bool:
    """Return whether this SLURM job started the run before it was requeued."""
    job = launch.slurm_job()
    if job is None:
        return False
    try:
        return any(attempt.get("job") == job for attempt in manifest_of(path).get("attempts", ()))
    except UserError:
        return False


def _prepare(config: Config, path: Path, starts_over: bool) -> None:
    if path.is_file():
        raise UserError(f"run.dir: {path} is a file")
    if not (path / "config.yaml").exists():
        return
    if not (path / "checkpoints").is_dir():
        raise UserError(f"run.dir: {path} has a config.yaml, but it is not a run; choose another folder")
    if starts_over:
        path = path.resolve()
        names = (path.with_name(f"{path.name}.{number}") for number in range(1, 10_000))
        kept = next(name for name in names if not name.exists())
        replace_folder(path, kept)
        log.info("moved the previous run from %s to %s", path, kept)
    else:
        _refuse_other_run(config, path)


def _is_complete(path: Path, config: Config) -> bool:
    """Return whether the run has results for the length, the split and the metrics of the configuration."""
    if not (path / "results.json").is_file():
        return False
    results = read_json(path / "results.json", {"split": str, "metrics": list, "steps": int})
    evaluation = config.evaluation
    same_protocol = evaluation.split == "none" or (
        results["split"] == evaluation.split and results["metrics"] == evaluation.metrics
    )
    recorded, trained_steps = read_config(path), results["steps"]
    if isinstance(stopped_at := results.get("stopped_at"), int):
        if recorded.get("evaluation", {}).get("patience") == evaluation.patience:
            return same_protocol
        trained_steps = stopped_at
    steps = config.trainer.max_steps
    if epochs := config.trainer.max_epochs:  # the number of steps was computed when the run started
        trained = recorded.get("trainer", {})
        steps = trained["max_steps"] if trained.get("max_epochs", 0) >= epochs else math.inf
    return trained_steps >= steps and same_protocol


def _refuse_other_run(config: Config, path: Path) -> None:
    defaults = dict(flat(OmegaConf.to_container(OmegaConf.structured(Config))))
    then, now = dict(flat(read_config(path))), dict(flat(as_dict(config)))
    # Keys that are newer than the run have their default.
    then = {key: defaults.get(key) for key in now.keys() - then.keys()} | then
    fixed = [
        {key: value for key, value in each.items() if not key.startswith(CHANGEABLE) and not _is_batch_size(key)}
        for each in (then, now)
    ]
    if changed := changes(*fixed):
        first = "; ".join(changed[:5]) + ("; ..." if len(changed) > 5 else "")
        raise UserError(
            f"run.dir: {path} has a run with another configuration ({first}). "
            "Choose another run.dir, or use run.resume=never to start over and keep the old run under another name."
        )


def _is_batch_size(key: str) -> bool:
    return key.startswith("task.") and key.endswith(".batch_size")


def flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and their values."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from flat(value, f"{prefix}{key}.")
    else:
        yield prefix.rstrip("."), node


def check_same_data(folder: RunFolder, config: Config, data: MultiTaskDataModule) -> None:
    """Raise UserError if the data differ from the run's original data.

    Call this before building the model, because a random backbone takes its vocabulary from the texts.
    """
    if not (folder.checkpoint or folder.complete):
        return
    if differences := data_differences(folder.path, config, data):
        raise UserError(
            f"run.dir: the data are not those of the run in {folder.path} ({'; '.join(differences)}). Restore the data "
            "or choose another run.dir, or use run.resume=never to start over and keep the old run under another name."
        )
    manifest = manifest_of(folder.path)
    if folder.complete or not manifest:
        return
    then, now = _cache_of(folder.path), config.data.cache
    if bool(then) == bool(now):
        return
    recorded, current = manifest["data"], describe_data(data)
    # The same collection has different fingerprints in memory and in the cache, and the schedule depends on them.
    if any(_value_of(recorded, name, "fingerprint") != _value_of(current, name, "fingerprint") for name in current):
        raise UserError(
            f"data.cache: the run began with {then or 'null'}, and this command has {now or 'null'}. A run cannot "
            f"switch between data in memory and in a cache; set data.cache={then or 'null'}"
        )


def _cache_of(path: Path) -> str | None:
    """Return the cache of a run's data. path: folder of the run."""
    return read_config(path).get("data", {}).get("cache")


def data_differences(path: Path, config: Config, data: MultiTaskDataModule) -> list[str]:
    """Return how the data differ from a run's original data. path: folder of the run."""
    then, now = manifest_of(path).get("data", {}), describe_data(data)
    if not then:  # for example, the folder only has checkpoints
        return []
    # Collections in memory and in the cache have different fingerprints.
    keys = ("documents", "queries", *(["fingerprint"] if bool(_cache_of(path)) == bool(config.data.cache) else []))
    return [
        f"{name}: {key} {_value_of(then, name, key)} then, {_value_of(now, name, key)} now"
        for name in dict.fromkeys((*then, *now))
        if (key := next((key for key in keys if _value_of(then, name, key) != _value_of(now, name, key)), None))
    ]


def _value_of(data: Mapping[str, Any], collection: str, key: str) -> Any:
    return data.get(collection, {}).get(key)


def describe_data(data: MultiTaskDataModule) -> dict[str, dict[str, Any]]:
    """Return the size and the fingerprint of each collection."""
    return {
        name: {
            "task": task.task.name,
            "documents": len(collection.corpus),
            "queries": dict(collection.splits),
            "fingerprint": collection.fingerprint(),
        }
        for task in data.tasks
        for name, collection in task.collections.items()
    }


def write_config(folder: RunFolder, config: Config) -> None:
    """Create the folder and its config.yaml, once the whole configuration has been checked.

    Raises UserError if the folder cannot be created.
    """
    if launch.rank() == 0:
        with explained(f"run.dir: {folder.path} cannot be used"):
            (folder.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            write_text(folder.path / "config.yaml", yaml.safe_dump(as_dict(config), sort_keys=False))


def record_start(
    folder: RunFolder,
    data: MultiTaskDataModule,
    *,
    num_parameters: int,
    schedule: Mapping[str, Any],
    devices: int,
    precision: str,
    start: str | None,
) -> None:
    """On the first rank, record an attempt of the run in the manifest, so that it can be understood and repeated.

    schedule: batches of each task, and passes over its examples.
    devices: number of ranks.
    precision: precision of the training, such as "bf16".
    start: model that the run started from, or None for random weights.
    """
    if launch.rank() > 0:
        return
    manifest = manifest_of(folder.path) or {"attempts": []}
    attempt = {"command": sys.argv, "started": time.strftime("%Y-%m-%d %H:%M:%S"), "devices": devices, "seconds": None}
    if job := launch.slurm_job():
        attempt["job"] = job
    manifest["attempts"].append(attempt)
    manifest = {"start": start} | manifest  # a resumed run keeps the start of its first attempt
    manifest |= {
        "python": platform.python_version(),
        "machine": platform.platform(),
        "versions": versions(),
        "git": git_state(),
        "parameters": num_parameters,
        "precision": precision,
        "schedule": dict(schedule),
        "data": describe_data(data),
    }
    write_json(folder.manifest, manifest)


def record_end(folder: RunFolder, seconds: float) -> None:
    """On the first rank, record in the manifest how long this attempt trained."""
    if launch.rank() > 0:
        return
    manifest = manifest_of(folder.path)
    if not manifest:
        raise UserError(f"run.dir: {folder.path} was deleted or moved during the training")
    manifest["attempts"][-1]["seconds"] = round(seconds, 1)
    write_json(folder.manifest, manifest)


def manifest_of(run: Path) -> dict[str, Any]:
    """Return the manifest of a run, or {} if it has none yet. run: folder of the run.

    Raises UserError if the file is damaged or its types differ from those that record_start writes.
    """
    path = run / "manifest.json"
    if not path.is_file():
        return {}
    manifest = {"attempts": [], "data": {}, "versions": {}, "parameters": 0} | read_json(path, hint=WITHOUT_MANIFEST)
    with damage_explained(path, "a manifest of a run", WITHOUT_MANIFEST):
        for attempt in manifest["attempts"]:
            float(attempt["seconds"] or 0), int(attempt.get("devices", 1))
        for collection in manifest["data"].values():
            collection["task"], int(collection["documents"]), collection["queries"].items(), collection["fingerprint"]
        dict(manifest["versions"]), int(manifest["parameters"]), (manifest.get("git") or {}).items()
    return manifest


def versions() -> dict[str, str]:
    """Return the versions of installed packages that may affect results."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def git_state() -> dict[str, Any] | None:
    """Return the commit of this code and whether files have changed since, or None outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
