"""Write the README.md of an exported model: what it is, how to use it, its training data, and its results."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datamodules.files import damage_explained, read_json
from experiments.config.experiment import read_config
from experiments.results.hub_metadata import (
    CARD,
    HubDetails,
    front_matter,
    public_command,
    start_of_run,
    without_paths,
)
from experiments.results.results import BenchmarkTable, Results, read_run_results
from experiments.run.folder import manifest_of
from experiments.shared.plain import plain
from experiments.shared.table_formats import Column, Table, as_markdown, escape_markdown, markdown_table
from lightning_modules.encoders.base import Encoder

RECIPE = "merge.json"  # members, weights and dev scores of a merged model, in its folder
INTRODUCTION = "contrastive multi-task training as in SciMult ([arXiv 2305.14232](https://arxiv.org/abs/2305.14232))"
CITATION = """## Citation

The training method is SciMult's:

```bibtex
@inproceedings{zhang2023scimult,
  title     = {Pre-training Multi-task Contrastive Learning Models for Scientific Literature Understanding},
  author    = {Zhang, Yu and Cheng, Hao and Shen, Zhihong and Liu, Xiaodong and Wang, Ye-Yi and Gao, Jianfeng},
  booktitle = {Findings of the Association for Computational Linguistics: EMNLP 2023},
  year      = {2023},
  url       = {https://arxiv.org/abs/2305.14232}
}
```"""


def write_card(
    folder: Path,
    encoder: Encoder,
    source: str,
    run: Path | None,
    similarity: str,
    task: str = "",
    *,
    origin: str = "",
    fingerprint: str = "",
    hub: HubDetails | None = None,
) -> Path:
    """Write the README.md of an exported folder. It never contains local paths.

    source: folder, file or hub name of the exported model. run: folder of its run, if any.
    task: task of a plain folder, or "average"; empty for the whole encoder.
    origin: checkpoint the weights were loaded from (Encoder.origin), if any.
    fingerprint: fingerprint of the whole encoder; results of a run are only shown if they belong to this encoder.
    """
    hub = hub or HubDetails()
    results = read_run_results(run / "results.json")[0] if run and (run / "results.json").is_file() else None
    measured = _measured(results, task, fingerprint, similarity) if results else {}
    sections = [
        f"---\n{front_matter(source, run, task, measured, hub)}---",
        _introduction(encoder, task),
        _usage(encoder, similarity, task, hub.repository or "THIS FOLDER"),
        _encoder(encoder, source, origin, similarity),
    ]
    manifest = manifest_of(run) if run else {}
    if run is not None:
        sections += _training(read_config(run), manifest, task)
    if results is not None and (task in ("", "average") or task in _trained_tasks(manifest)):
        sections.append(_results(results, measured, task))
    if recipe := next((path for path in (folder / RECIPE, Path(source) / RECIPE) if path.is_file()), None):
        content = read_json(recipe, {"members": list, "parts": dict, "tried": list, "dev": list}, hint="")
        with damage_explained(recipe, "the recipe of a merged model", hint=""):
            sections.append(_merge(content))
    path = folder / CARD
    path.write_text("\n\n".join([*sections, CITATION]) + "\n", encoding="utf-8")
    return path


def _measured(results: Results, task: str, fingerprint: str, similarity: str) -> dict[str, BenchmarkTable]:
    """Return the tables of a task (or all tasks) in which "trained" is the exported encoder, with no other model."""
    tables = {}
    for name, table in results.benchmarks.items():
        trained = table.systems.get("trained")
        if trained is None or task not in ("", table.task) or trained.document_fingerprint:
            continue
        if (trained.fingerprint, trained.similarity) == (fingerprint, similarity):
            tables[name] = table
    return tables


def code_span(text: str) -> str:
    """Return text as Markdown code on one line."""
    text = plain(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    padding = " " if text[:1] in ("`", " ") or text[-1:] in ("`", " ") else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def _introduction(encoder: Encoder, task: str) -> str:
    purpose = task.replace("_", " ") if task and task != "average" else "scientific papers"
    average = " The weights are the mean of all its experts." if task == "average" else ""
    return (
        f"# Encoder for {escape_markdown(purpose)}\n\nVectors of {encoder.dimension} dimensions for papers, labels "
        f"and queries, by {INTRODUCTION}.{average}"
    )


def _usage(encoder: Encoder, similarity: str, task: str, name: str) -> str:
    separator = encoder.tokenizer.sep_token
    if task:
        code = (
            "from sentence_transformers import SentenceTransformer  # pip install sentence-transformers\n\n"
            f"model = SentenceTransformer({_quoted(name)})\n"
            f"vectors = model.encode([{_quoted(f'A title {separator} and its abstract')}])"
        )
        note = "Transformers may warn that `pooler.*` is missing. It is not used."
        if prompt := encoder.prompts.get(task, ""):
            note += f"\n\nEvery text starts with {code_span(prompt)}, which sentence-transformers adds automatically."
    else:
        code = (
            f"from lightning_modules import load_encoder\n\nencoder = load_encoder({_quoted(name)})\n"
            f'vectors = encoder.encode(["some text"], task={_quoted(next(iter(encoder.tasks)))})'
        )
        tasks = ", ".join(map(escape_markdown, encoder.tasks))
        note = f"Tasks: {tasks}. `lightning_modules` is a package of the project scimult."
    return (
        f"## Use\n\n```python\n{code}\n```\n\nThe text of a paper is its title and abstract, joined by "
        f"{code_span(f' {separator} ')}. The text of a label is its name and definition, joined in the same way. A "
        f"query is only its text. Compare vectors by {'cosine' if similarity == 'cosine' else 'dot product'}.\n\n{note}"
    )


def _quoted(text: str) -> str:
    """Return text as a Python string in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _encoder(encoder: Encoder, source: str, origin: str, similarity: str) -> str:
    properties = {
        "exported from": without_paths(source),
        **({"checkpoint": origin} if origin else {}),
        "kind": type(encoder).__name__,
        "backbone": f"{encoder.backbone.config.model_type}, {encoder.num_layers} layers of {encoder.dimension}",
        "parameters": f"{sum(p.numel() for p in encoder.parameters()):,}",
        "tasks (expert)": ", ".join(f"{name} ({expert})" for name, expert in encoder.tasks.items()),
        "pooling": encoder.pooling + (", length 1" if encoder.normalize else ""),
        "similarity": similarity,
        "longest text": f"{encoder.max_length} tokens",
    }
    return "## Encoder\n\n" + markdown_table(["", ""], list(properties.items()))


def _trained_tasks(manifest: Mapping[str, Any]) -> set[str]:
    """Return the tasks that a run trained."""
    return {entry["task"] for entry in manifest.get("data", {}).values()}


def _training(config: Mapping[str, Any], manifest: Mapping[str, Any], task: str) -> list[str]:
    """Return the sections on the data and the training of a run."""
    sections, data = [], manifest.get("data", {})
    if task not in ("", "average") and data and task not in _trained_tasks(manifest):
        extend = config.get("extend", {})
        name = escape_markdown(without_paths(extend.get("model") or "its start"))
        vectors = f"Its vectors are those of {name}." if extend.get("freeze", True) else f"It started from {name}."
        return [f"## Training\n\nThe exported run did not train this task. {vectors}"]
    if data:
        rows = [
            (name, d["task"], f"{d['documents']:,}", f"{d['queries'].get('train', 0):,}", d["fingerprint"])
            for name, d in data.items()
        ]
        text = markdown_table(["data", "task", "documents", "training queries", "fingerprint"], rows)
        if config.get("scale") == "sample":
            text += "\n\nThese papers are synthetic, for trying things out. The model knows nothing about real papers."
        sections.append(f"## Training data\n\n{text}")
    if manifest:
        sections.append(_run(config, manifest))
    return sections


def _run(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    attempts = manifest.get("attempts", [])
    commands = [
        plain(shlex.join(["python", "-m", "experiments.train", *public_command(attempt["command"][1:])]))
        for attempt in attempts
    ]
    seconds = sum(attempt.get("seconds") or 0 for attempt in attempts)
    start = start_of_run(config, manifest)
    text = (
        f"{config['trainer']['max_steps']} steps of {config['data']['batch_size']} queries, learning rate "
        f"{config['optim']['lr']}, seed {config['run']['seed']}, {seconds:.0f} seconds in total. The run started from "
        f"{escape_markdown(without_paths(start)) if start else 'random weights'}."
    )
    if share := config["trainer"].get("start_share"):
        text += f" It ended with an average of the weights, in which those before training have the share {share}."
    if prefixes := ", ".join(map(str, config["objective"].get("matryoshka", []))):
        text += f" The first {prefixes} dimensions of a vector can be used alone (with cosine: normalize them)."
    block = "\n".join(["```", *dict.fromkeys(commands), "```"])
    versions = ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items())
    git = manifest.get("git") or {}
    commit = f"Commit {git['commit']}{' with changes' if git['changed'] else ''}." if git else ""
    return f"## Training\n\n{text}\n\n{block}\n\nWith {escape_markdown(f'{versions}. {commit}')}"


def _merge(recipe: Mapping[str, Any]) -> str:
    """Return the section on how the model was merged."""
    parts = [f"{name}: {' '.join(map(str, weights))}" for name, weights in recipe["parts"].items()]
    text = f"The parameters are the {escape_markdown(recipe['method'])} average of these models."
    if parts:
        text += f" Parts with other weights: {escape_markdown('; '.join(parts))}."
    rows = [
        (
            ", ".join(filter(None, [without_paths(member["model"]), member.get("checkpoint")])),
            f"{member['weight']:.4g}",
            member["fingerprint"],
        )
        for member in recipe["members"]
    ]
    section = f"## Merge\n\n{text}\n\n{markdown_table(['model', 'weight', 'fingerprint'], rows)}"
    if not recipe["tried"]:
        return section
    sets = [f"{entry['name']} ({entry['task']}, {entry['split']})" for entry in recipe["dev"]]
    tried = [
        (trial["weights"], *(f"{score:.4f}" for score in (trial["mean"], *trial["scores"].values())))
        for trial in recipe["tried"]
    ]
    note = f"{recipe['metric']} with the weights that were tried; {recipe['chosen']} was chosen."
    return f"{section}\n\n{escape_markdown(note)}\n\n{markdown_table(['weights', 'mean', *sets], tried)}"


def _results(results: Results, measured: Mapping[str, BenchmarkTable], task: str) -> str:
    """Return the section with the results on a task's benchmarks, or all. measured: tables of the exported encoder."""
    info = results.info
    if task == "average":
        return "## Results\n\nThe run did not evaluate the average of its experts. Use `make eval model=THIS FOLDER`."
    if not results.benchmarks:
        return "## Results\n\nThe run was not evaluated. Use `make eval model=THIS FOLDER`."
    if not measured:
        return "## Results\n\nThe run measured another checkpoint or similarity. Use `make eval model=THIS FOLDER`."
    metrics = [Column(metric, ".4f", "highest") for metric in info.metrics]
    table = Table([Column("benchmark"), Column("system"), *metrics])
    for name, benchmark in measured.items():
        for system, result in benchmark.systems.items():
            table.add(name, system, *(result.metrics.get(metric) for metric in info.metrics), group=name)
    text = f"{info.split} split, {info.checkpoint} of step {info.checkpoint_step}."
    return f"## Results\n\n{escape_markdown(text)} Bold is the best of each benchmark.\n\n{as_markdown(table)}"
