"""What run it was: the head of the page, and at its end what is needed to repeat it."""

from __future__ import annotations

import shlex
from pathlib import PurePath
from typing import Any

import yaml

from experiments.reporting.html import Html, join, section, table, tag
from experiments.reporting.run_files import CONFIG, FIGURES, RunFiles
from experiments.reporting.source import Source


def title(run: RunFiles) -> str:
    config = run.config
    return f"{config['experiment']}, scale {config['scale']}, seed {config['run']['seed']}: {PurePath(run.path).name}"


def head(run: RunFiles) -> Html:
    """Title, state, and the figures that one asks for first."""
    config, wanted = run.at(CONFIG), run.at(CONFIG)["trainer"]["max_steps"].figure(",")
    state: list[Any] = ["incomplete, at step ", run.at(FIGURES)["last_step"].figure(","), " of ", wanted]
    if results := run.at("results.json"):
        checkpoint, step = tag("code", results.value["checkpoint"]), results["checkpoint_step"].figure(",")
        state = ["complete; measured: ", checkpoint, " of step ", step, " of ", wanted]
    told = tag("p", f"scale {run.config['scale']}, seed ", config["run"]["seed"].figure("d"), ", ", *state)
    return tag("header", tag("h1", run.config["experiment"]), told, tag("dl", *_tiles(run), class_="tiles"))


def _tiles(run: RunFiles) -> list[Html]:
    figures, tiles = run.at(FIGURES), []
    if "mean" in figures:
        metric = run.results["metrics"][0]
        for system, label in (("trained", f"mean {metric}"), ("bm25", "the same, BM25"), ("untrained", "untrained")):
            if system in figures["mean"]:
                tiles.append((label, figures["mean"][system].figure()))
    time, millions = figures["time"], figures["parameters_million"]
    if time.value["value"]:
        tiles.append(("training", join([time["value"].figure(".1f"), tag("small", f" {time.value['unit']}")])))
    if millions.value:
        tiles.append(("parameters", join([millions.figure(",.1f"), tag("small", " million")])))
    return [tag("div", tag("dt", label), tag("dd", value)) for label, value in tiles]


def identity(run: RunFiles) -> Html:
    """Commands, code, versions, data and the whole configuration."""
    settings = tag("pre", tag("code", yaml.safe_dump(dict(run.config), sort_keys=False)))
    parts, files = [tag("details", tag("summary", "The whole configuration"), settings)], [CONFIG]
    if manifest := run.at("manifest.json"):
        facts = (join([tag("dt", label), tag("dd", value)]) for label, value in _facts(manifest))
        parts = [tag("dl", *facts, class_="facts"), _data(manifest["data"]), *parts]
        files.insert(0, "manifest.json")
    return section("run", "The run", *parts, files=files)


def _facts(manifest: Source) -> list[tuple[str, Html]]:
    facts = []
    for attempt in manifest["attempts"]:
        command = tag("code", shlex.join(["python", "-m", "experiments.train", *attempt.value["command"][1:]]))
        ended: list[Any] = [", did not reach its end"]
        if attempt.value["seconds"] is not None:
            ended = [", trained for ", attempt["seconds"].figure(",.0f"), " s"]
        started = attempt["started"].told(attempt.value["started"])
        facts.append(("command", join([command, tag("br"), started, *ended])))
    about = manifest.value
    if about["git"]:
        changed = " with uncommitted changes" if about["git"]["changed"] else ""
        facts.append(("code", join([tag("code", about["git"]["commit"][:12]), changed])))
    facts.append(("machine", join([tag("code", about["machine"]), ", Python ", tag("code", about["python"])])))
    versions = (tag("code", f"{package} {version}") for package, version in about["versions"].items())
    return [*facts, ("versions", join(versions, ", "))]


def _data(data: Source) -> Html:
    rows = []
    for name, of in data:
        queries = join((join([f"{split} ", count.figure(",")]) for split, count in of["queries"]), ", ")
        fingerprint = tag("code", of.value["fingerprint"])
        rows.append([name, of.value["task"], of["documents"].figure(","), queries, fingerprint])
    head = ("data", "task", "documents", "queries", "fingerprint")
    return table(head, rows, "What it was trained and measured on", "texts")
