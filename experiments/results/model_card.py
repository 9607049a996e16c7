"""The README.md of an exported model: what it is, how to use it, what it was trained on, and its results."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.files import read_json
from experiments.config.experiment import read_config
from experiments.results.results import Results, read_results
from experiments.run.folder import read_manifest
from lightning_modules.encoders.base import Encoder

CARD = "README.md"
RECIPE = "merge.json"  # members, weights and dev scores of a merged model, in its folder
INTRODUCTION = "contrastive multi-task training as in SciMult ([arXiv 2305.14232](https://arxiv.org/abs/2305.14232))"


def write_card(folder: Path, encoder: Encoder, source: str, run: Path | None, similarity: str, task: str = "") -> Path:
    """Write the README.md of an exported folder.

    source: folder, file or hub name of the model that was exported. run: folder of its run, if any.
    task: task of a plain folder, or "average"; empty for the whole encoder.
    """
    sections = [_introduction(encoder, task), _usage(encoder, similarity, task), _encoder(encoder, source, similarity)]
    if run is not None:
        sections += _training(run, task)
    if recipe := next((path for path in (folder / RECIPE, Path(source) / RECIPE) if path.is_file()), None):
        sections.append(_merge(recipe))
    path = folder / CARD
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def _introduction(encoder: Encoder, task: str) -> str:
    library = "sentence-transformers" if task else "transformers"
    tags = ["sentence-similarity", "feature-extraction", "scientific-papers"]
    front_matter = "\n".join(["---", f"library_name: {library}", "tags:", *(f"- {tag}" for tag in tags), "---"])
    purpose = task.replace("_", " ") if task and task != "average" else "scientific papers"
    average = " The weights are the mean of all its experts." if task == "average" else ""
    return (
        f"{front_matter}\n\n# Encoder for {purpose}\n\nVectors of {encoder.dimension} dimensions for papers, labels "
        f"and queries, by {INTRODUCTION}.{average}"
    )


def _usage(encoder: Encoder, similarity: str, task: str) -> str:
    separator = encoder.tokenizer.sep_token
    if task:
        code = (
            "from sentence_transformers import SentenceTransformer  # pip install sentence-transformers\n\n"
            'model = SentenceTransformer("THIS FOLDER")\n'
            f'vectors = model.encode(["A title {separator} and its abstract"])'
        )
        note = "Transformers may warn that `pooler.*` is missing. It is not used."
        if prompt := encoder.prompts.get(task, ""):
            note += f"\n\nEvery text starts with `{prompt}`, which sentence-transformers adds automatically."
    else:
        code = (
            'from lightning_modules import load_encoder\n\nencoder = load_encoder("THIS FOLDER")\n'
            f'vectors = encoder.encode(["some text"], task="{next(iter(encoder.tasks))}")'
        )
        note = f"Tasks: {', '.join(encoder.tasks)}. `lightning_modules` is a package of the project scimult."
    return (
        f"## Use\n\n```python\n{code}\n```\n\nThe text of a paper is its title and abstract, joined by ` {separator} `."
        " The text of a label is its name and definition, joined in the same way. A query is only its text. Compare "
        f"vectors by {'cosine' if similarity == 'cosine' else 'dot product'}.\n\n{note}"
    )


def _encoder(encoder: Encoder, source: str, similarity: str) -> str:
    properties = {
        "exported from": f"`{source}`",
        "kind": type(encoder).__name__,
        "backbone": f"{encoder.backbone.config.model_type}, {encoder.num_layers} layers of {encoder.dimension}",
        "parameters": f"{sum(p.numel() for p in encoder.parameters()):,}",
        "tasks (expert)": ", ".join(f"{name} ({expert})" for name, expert in encoder.tasks.items()),
        "pooling": encoder.pooling + (", length 1" if encoder.normalize else ""),
        "similarity": similarity,
        "longest text": f"{encoder.max_length} tokens",
    }
    return "## Encoder\n\n" + _table(["", ""], list(properties.items()))


def _training(run: Path, task: str) -> list[str]:
    """Return the sections on data, training and results of a run."""
    config, sections = read_config(run), []
    manifest = read_manifest(run / "manifest.json") if (run / "manifest.json").is_file() else {}
    data = manifest.get("data", {})
    if task not in ("", "average") and data and task not in {entry["task"] for entry in data.values()}:
        extended = config.get("extend", {}).get("model")
        return [f"## Training\n\nThe exported run did not train this task. Its vectors are those of {extended}."]
    if data:
        rows = [
            (name, d["task"], f"{d['documents']:,}", f"{d['queries'].get('train', 0):,}", d["fingerprint"])
            for name, d in data.items()
        ]
        text = _table(["data", "task", "documents", "training queries", "fingerprint"], rows)
        if config.get("scale") == "sample":
            text += "\n\nThese papers are synthetic, for trying things out. The model knows nothing about real ones."
        sections.append(f"## Training data\n\n{text}")
    if manifest:
        sections.append(_run(config, manifest))
    if (run / "results.json").is_file():
        sections.append(_results(read_results(run / "results.json"), task))
    return sections


def _run(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    attempts = manifest.get("attempts", [])
    commands = [shlex.join(["python", "-m", "experiments.train", *attempt["command"][1:]]) for attempt in attempts]
    seconds = sum(attempt.get("seconds") or 0 for attempt in attempts)
    start = config.get("extend", {}).get("model") or config.get("init_from") or config["backbone"].get("name")
    text = (
        f"{config['trainer']['max_steps']} steps of {config['data']['batch_size']} queries, learning rate "
        f"{config['optim']['lr']}, seed {config['run']['seed']}, {seconds:.0f} seconds in total. The run started from "
        f"{start or 'random weights'}. Its config.yaml is the complete configuration."
    )
    if prefixes := ", ".join(map(str, config["objective"].get("matryoshka", []))):
        text += f" The first {prefixes} dimensions of a vector can be used alone (with cosine: normalize them)."
    block = "\n".join(["```", *dict.fromkeys(commands), "```"])
    versions = ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items())
    git = manifest.get("git") or {}
    commit = f"\n\nCommit {git['commit']}{' with changes' if git['changed'] else ''}." if git else ""
    return f"## Training\n\n{text}\n\n{block}\n\nWith {versions}.{commit}"


def _merge(path: Path) -> str:
    """Return the section on how a merged model was made. path: its recipe."""
    recipe = read_json(path, {"members": list, "parts": dict, "tried": list, "dev": list})
    parts = [f"{name}: {' '.join(map(str, weights))}" for name, weights in recipe["parts"].items()]
    text = f"The parameters are the {recipe['method']} average of these models."
    if parts:
        text += f" Parts with other weights: {'; '.join(parts)}."
    rows = [(member["model"], f"{member['weight']:.4g}", member["fingerprint"]) for member in recipe["members"]]
    section = f"## Merge\n\n{text}\n\n{_table(['model', 'weight', 'fingerprint'], rows)}"
    if not recipe["tried"]:
        return section
    sets = [f"{entry['name']} ({entry['task']}, {entry['split']})" for entry in recipe["dev"]]
    tried = [
        (trial["weights"], *(f"{score:.4f}" for score in (trial["mean"], *trial["scores"].values())))
        for trial in recipe["tried"]
    ]
    note = f"{recipe['metric']} with the weights that were tried; {recipe['chosen']} was chosen."
    return f"{section}\n\n{note}\n\n{_table(['weights', 'mean', *sets], tried)}"


def _results(results: Results, task: str) -> str:
    """Return the results on the benchmarks of a task, or on all of them."""
    if task == "average":
        return "## Results\n\nThe run did not evaluate the average of its experts. Use `make eval model=THIS FOLDER`."
    info = results.info
    rows = [
        (name, system, *(f"{result.metrics[metric]:.4f}" for metric in info.metrics))
        for name, table in results.benchmarks.items()
        if task in ("", table.task)
        for system, result in table.systems.items()
    ]
    text = f"{info.split} split, {info.checkpoint} of step {info.checkpoint_step}."
    return f"## Results\n\n{text}\n\n{_table(['benchmark', 'system', *info.metrics], rows)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
