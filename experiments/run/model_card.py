"""The README.md of an exported model: what it is, how it is used, what it was trained on, and what it reached."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datamodules.files import read_json
from experiments.config.paths import read_config
from lightning_modules.encoders.base import Encoder

PAPER = "[arXiv 2305.14232](https://arxiv.org/abs/2305.14232)"

INTRODUCTION = f"contrastive multi-task training as in SciMult ({PAPER})"


def write_card(folder: Path, encoder: Encoder, source: str, run: Path | None, similarity: str, task: str = "") -> Path:
    """Write README.md. source: what was exported. run: its folder, if known. task: of a plain folder."""
    sections = [_head(encoder, task), _use(encoder, similarity, task), _encoder(encoder, source, similarity)]
    if run is not None:
        sections += _training(run, task)
    path = folder / "README.md"
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def _head(encoder: Encoder, task: str) -> str:
    library = "sentence-transformers" if task else "transformers"
    tags = ["sentence-similarity", "feature-extraction", "scientific-papers"]
    front = "\n".join(["---", f"library_name: {library}", "tags:", *(f"- {tag}" for tag in tags), "---"])
    what = f"for {task.replace('_', ' ')}" if task and task != "average" else "for scientific papers"
    general = " The weights are the mean of all its experts." if task == "average" else ""
    return (
        f"{front}\n\n# Encoder {what}\n\nVectors of {encoder.dimension} dimensions for papers, labels and queries, by "
        f"{INTRODUCTION}.{general}"
    )


def _use(encoder: Encoder, similarity: str, task: str) -> str:
    inputs = (
        'A paper is `title + " [SEP] " + abstract`, a label `name + " [SEP] " + definition`, a query its words.'
        if encoder.tokenizer.sep_token == "[SEP]"
        else f"Title and abstract, or name and definition, are joined by ` {encoder.tokenizer.sep_token} `."
    )
    if task:
        code = [
            "from sentence_transformers import SentenceTransformer  # pip install sentence-transformers",
            "",
            'model = SentenceTransformer("THIS FOLDER")',
            f'vectors = model.encode(["A title {encoder.tokenizer.sep_token} and its abstract"])',
        ]
        prompt = encoder.prompts.get(task, "")
        note = "\n\nWhere transformers says that `pooler.*` is missing: nothing uses it."
        note += f"\n\nEvery text begins with `{prompt}`; sentence-transformers adds it by itself." if prompt else ""
    else:
        code = [
            "from lightning_modules.encoders.loading import load_encoder",
            "",
            'encoder = load_encoder("THIS FOLDER")',
            f'vectors = encoder.encode(["some text"], task="{next(iter(encoder.tasks))}")',
        ]
        note = f"\n\nTasks: {', '.join(encoder.tasks)}. The code is that of the project scimult."
    compare = "cosine" if similarity == "cosine" else "dot product"
    block = "\n".join(["```python", *code, "```"])
    return f"## Use\n\n{block}\n\n{inputs} Vectors are compared by {compare}.{note}"


def _encoder(encoder: Encoder, source: str, similarity: str) -> str:
    config = encoder.backbone.config
    rows = {
        "exported from": f"`{source}`",
        "kind": type(encoder).__name__,
        "backbone": f"{config.model_type}, {encoder.num_layers} layers of {encoder.dimension}",
        "parameters": f"{sum(p.numel() for p in encoder.parameters()):,}",
        "tasks (expert)": ", ".join(f"{name} ({expert})" for name, expert in encoder.tasks.items()),
        "pooling": encoder.pooling + (", length 1" if encoder.normalize else ""),
        "similarity": similarity,
        "longest text": f"{encoder.max_length} tokens",
    }
    return "## Encoder\n\n" + _table(["", ""], [[key, value] for key, value in rows.items()])


def _training(run: Path, task: str) -> list[str]:
    config, sections = read_config(run), []
    manifest = read_json(run / "manifest.json") if (run / "manifest.json").is_file() else {}
    data = manifest.get("data", {})
    if task not in ("", "average") and data and task not in {one["task"] for one in data.values()}:
        older = config.get("extend", {}).get("model")
        return [
            f"## Training\n\nThis task was not trained in the run that the model is exported from: it is as in {older}."
        ]
    if data:
        rows = [
            [name, one["task"], f"{one['documents']:,}", f"{one['queries'].get('train', 0):,}", one["fingerprint"]]
            for name, one in data.items()
        ]
        text = _table(["data", "task", "documents", "training queries", "fingerprint"], rows)
        if config.get("scale") == "sample":
            text += "\n\nThese are synthetic papers, made to try things on: the model knows nothing of real ones."
        sections.append(f"## Training data\n\n{text}")
    if manifest:
        sections.append(_run(config, manifest))
    if (run / "results.json").is_file():
        sections.append(_results(read_json(run / "results.json"), task))
    return sections


def _run(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    attempts = manifest.get("attempts", [])
    words = [attempt["command"] for attempt in attempts]
    commands = dict.fromkeys(shlex.join(["python", "-m", "experiments.train", *command[1:]]) for command in words)
    seconds = sum(attempt.get("seconds") or 0 for attempt in attempts)
    versions = ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items())
    git = manifest.get("git") or {}
    commit = f"\n\nCommit {git['commit']}{' with changes' if git['changed'] else ''}." if git else ""
    start = config.get("extend", {}).get("model") or config.get("init_from") or config["backbone"].get("name")
    steps = f"{config['trainer']['max_steps']} steps of {config['data']['batch_size']} queries"
    settings = f"learning rate {config['optim']['lr']}, seed {config['run']['seed']}, {seconds:.0f} seconds in all"
    whole = f"From {start or 'random weights'}. The whole configuration stands in config.yaml of the run."
    prefixes = ", ".join(str(prefix) for prefix in config["objective"].get("matryoshka", []))
    if prefixes:
        whole += f" The first {prefixes} dimensions of a vector are trained to be used alone (cosine: normalise them)."
    lines = "\n".join(["```", *commands, "```"])
    return f"## Training\n\n{steps}, {settings}. {whole}\n\n{lines}\n\nWith {versions}.{commit}"


def _results(results: Mapping[str, Any], task: str) -> str:
    """Of the task's own benchmarks. The experts' average was not measured."""
    if task == "average":
        return (
            "## Results\n\nThe average of the experts was not measured in the run; `make eval model=THIS FOLDER` does."
        )
    metrics = results["metrics"]
    rows = [
        [name, system, *(f"{figures[metric]:.4f}" for metric in metrics)]
        for name, result in results["benchmarks"].items()
        if task in ("", result["task"])
        for system, figures in result["systems"].items()
    ]
    title = f"## Results\n\n{results['split']} split, {results['checkpoint']} of step {results['checkpoint_step']}."
    return f"{title}\n\n{_table(['benchmark', 'system', *metrics], rows)}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
