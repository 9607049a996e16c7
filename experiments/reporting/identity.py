"""What run it was: the head of the page, and at its end what is needed to repeat it."""

from __future__ import annotations

import shlex
from pathlib import PurePath
from typing import Any

import yaml

from experiments.reporting.html import Html, figure, join, pointer, quoted, section, table, tag
from experiments.reporting.run_files import FIGURES, RunFiles


def head(run: RunFiles) -> Html:
    """Title, state, and the figures that one asks for first."""
    config, steps = run.config, figure(run.last_step, pointer(FIGURES, "last_step"), ",")
    seed = figure(config["run"]["seed"], pointer("config.yaml", "run", "seed"), "d")
    wanted = figure(config["trainer"]["max_steps"], pointer("config.yaml", "trainer", "max_steps"), ",")
    state: list[Any] = ["incomplete, at step ", steps, " of ", wanted]
    if run.results:
        step = figure(run.results["checkpoint_step"], pointer("results.json", "checkpoint_step"), ",")
        state = ["complete; measured: ", tag("code", run.results["checkpoint"]), " of step ", step, " of ", wanted]
    told = tag("p", f"scale {config['scale']}, seed ", seed, ", ", *state)
    return tag("header", tag("h1", config["experiment"]), told, tag("dl", *_tiles(run), class_="tiles"))


def _tiles(run: RunFiles) -> list[Html]:
    tiles = []
    if means := run.figures.get("mean"):
        metric = run.results["metrics"][0]
        for system, label in (("trained", f"mean {metric}"), ("bm25", "the same, BM25"), ("untrained", "untrained")):
            if system in means:
                tiles.append((label, figure(means[system], pointer(FIGURES, "mean", system), ".3f")))
    time, count = run.figures["time"], run.figures["parameters_million"]
    if time["value"]:
        shown = figure(time["value"], pointer(FIGURES, "time", "value"), ".1f")
        tiles.append(("training", join([shown, tag("small", f" {time['unit']}")])))
    if count:
        shown = figure(count, pointer(FIGURES, "parameters_million"), ",.1f")
        tiles.append(("parameters", join([shown, tag("small", " million")])))
    return [tag("div", tag("dt", label), tag("dd", value)) for label, value in tiles]


def identity(run: RunFiles) -> Html:
    """Commands, code, versions, data and the whole configuration."""
    manifest, name = run.manifest, "manifest.json"
    facts: list[tuple[str, Any]] = []
    for i, attempt in enumerate(manifest.get("attempts", ())):
        command = shlex.join(["python", "-m", "experiments.train", *attempt["command"][1:]])
        started = quoted(attempt["started"], pointer(name, "attempts", i, "started"))
        ended: list[Any] = [", did not reach its end"]
        if attempt["seconds"] is not None:
            ended = [
                ", trained for ",
                figure(attempt["seconds"], pointer(name, "attempts", i, "seconds"), ",.0f"),
                " s",
            ]
        facts.append(("command", join([tag("code", command), tag("br"), started, *ended])))
    if git := manifest.get("git"):
        changed = " with uncommitted changes" if git["changed"] else ""
        facts.append(
            ("code", join([tag("code", git["commit"][:12], data_source=pointer(name, "git", "commit")), changed]))
        )
    if manifest:
        facts.append(
            ("machine", join([tag("code", manifest["machine"]), ", Python ", tag("code", manifest["python"])]))
        )
        versions = (tag("code", f"{package} {version}") for package, version in manifest["versions"].items())
        facts.append(("versions", join(versions, ", ")))
    listed = tag("dl", *(join([tag("dt", label), tag("dd", value)]) for label, value in facts), class_="facts")
    settings = tag("details", tag("summary", "The whole configuration"),
                   tag("pre", tag("code", yaml.safe_dump(dict(run.config), sort_keys=False))))  # fmt: skip
    return section(
        "run", "The run", listed, _data(run), settings, files=[name, "config.yaml"] if manifest else ["config.yaml"]
    )


def _data(run: RunFiles) -> Html:
    rows = []
    for name, of in run.manifest.get("data", {}).items():
        where = ("manifest.json", "data", name)
        queries = (
            join([f"{split} ", figure(count, pointer(*where, "queries", split), ",")])
            for split, count in of["queries"].items()
        )
        documents = figure(of["documents"], pointer(*where, "documents"), ",")
        rows.append([name, of["task"], documents, join(queries, ", "), tag("code", of["fingerprint"])])
    return (
        table(
            ("data", "task", "documents", "queries", "fingerprint"),
            rows,
            "What it was trained and measured on",
            "texts",
        )
        if rows
        else Html("")
    )


def title(run: RunFiles) -> str:
    config = run.config
    return f"{config['experiment']}, scale {config['scale']}, seed {config['run']['seed']}: {PurePath(run.path).name}"
