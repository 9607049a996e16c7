"""Build training data from public downloads: python -m experiments.data RECIPE data.root=FOLDER [key=value ...]

A recipe (experiments/recipes) names files with their checksums, and the folders in BEIR layout that readers make of
them. What is done is not done again: an interrupted command goes on, and a complete one does nothing.

    data.root=data        where everything goes, and where `make train SCALE=paper data.root=` looks for it
    mirror=URL            take SOURCE/FILE from there, instead of from where the recipe says
    only=NAME,NAME        these outputs alone
    data.on_error=fail    or skip: bad lines go to FOLDER/OUTPUT.quarantine.jsonl
    outputs.NAME.reader.ARGUMENT=VALUE, and so on: another value of the recipe
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from datamodules.locks import lock_file
from datamodules.readers.bad_lines import BadLines
from datamodules.readers.beir import write_beir
from datamodules.readers.fields import allowed
from datamodules.records import Collection, UserError
from datamodules.tasks import Reader
from experiments.config.targets import accepted_arguments, check_target, instantiate
from experiments.download.recipe import (
    COUNTS,
    FOLDER,
    OutputSpec,
    Recipe,
    load_recipe,
    needed,
    node,
    recipes,
    with_folders,
)
from experiments.download.sources import Sources
from experiments.shared.console import choice, entry_point, key_values, table_console
from experiments.shared.files import read_json, write_json
from experiments.shared.progress import Progress

log = logging.getLogger(__name__)

FORMAT = 1  # of what is written: a higher one has everything built again
STAMP = "built.json"
TOLERANCE = 0.02  # of counts, beside the published ones
KEYS = {"data.root": "data", "mirror": "", "only": "", "data.on_error": "fail"}


def main(arguments: Sequence[str]) -> None:
    recipe, values = _arguments(arguments)
    root = Path(values["data.root"]).expanduser().resolve()
    only = [name for name in values["only"].split(",") if name] or list(recipe.outputs)
    allowed("only", only, list(recipe.outputs))
    with _alone(root):
        sources = Sources(root, recipe.sources, values["mirror"])
        lacking = {name: [one for one in recipe.outputs[name].without if sources.lacks(one)] for name in only}
        to_do = [name for name in only if not _is_built(sources, root / name, recipe.outputs[name], lacking[name])]
        _can_be_had(sources, {one for name in to_do for one in needed(recipe.outputs[name], lacking[name])})
        for name in to_do:
            _build(sources, root / name, recipe.outputs[name], lacking[name], values["data.on_error"])
        for name in only:
            log.info("%s: %s", name, "built" if name in to_do else "is there already")
        _tell(root, recipe, {name: read_json(root / name / STAMP) for name in only})


def _arguments(arguments: Sequence[str]) -> tuple[Recipe, dict[str, str]]:
    if not arguments or "=" in arguments[0]:
        raise UserError(f"which recipe? There are {', '.join(recipes())}: python -m experiments.data scimult")
    path = Path(arguments[0])
    if path.suffix != ".yaml":
        choice("recipe", arguments[0], recipes())
        path = FOLDER / f"{arguments[0]}.yaml"
    changes = [argument for argument in arguments[1:] if argument.startswith(("outputs.", "sources."))]
    values = key_values([argument for argument in arguments[1:] if argument not in changes], KEYS)
    choice("data.on_error", values["data.on_error"], BadLines.POLICIES)
    if values["mirror"] and not values["mirror"].startswith(("http://", "https://")):
        raise UserError(f"mirror: got {values['mirror']!r}, allowed are http:// and https:// (files: in downloads/)")
    return load_recipe(path, changes), values


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One command at a time works in a folder; the lock goes with its process."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = lock_file(root / ".lock", wait=False)
    except OSError as error:
        raise UserError(f"data.root: {root} cannot be written ({error.strerror})") from error
    if lock is None:
        raise UserError(f"data.root: another command is at work in {root}; wait for its end")
    with lock:
        yield


def _can_be_had(sources: Sources, names: Iterable[str]) -> None:
    """Raises UserError with what has to be placed by hand, before anything is downloaded."""
    found = [sources.instructions(name) for name in sorted(names) if sources.only_by_hand(name)]
    if found:
        raise UserError("; ".join(found) + ". Then give the same command again.")


def _fingerprint(sources: Sources, output: OutputSpec, lacking: Sequence[str]) -> str:
    """Of what a folder is made from and how."""
    checksums = {name: sources.checksums(name) for name in needed(output, lacking)}
    plan = [FORMAT, node(output, lacking), output.splits, checksums]
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]


def _is_built(sources: Sources, folder: Path, output: OutputSpec, lacking: Sequence[str]) -> bool:
    stamp = folder / STAMP
    return stamp.exists() and read_json(stamp)["fingerprint"] == _fingerprint(sources, output, lacking)


def _build(sources: Sources, folder: Path, output: OutputSpec, lacking: Sequence[str], on_error: str) -> None:
    if folder.exists() and any(folder.iterdir()) and not (folder / STAMP).exists():
        raise UserError(f"{folder}: is there already, and no recipe built it; move it away, or name another data.root")
    for source in needed(output, lacking):
        sources.fetch(source)
    for source in lacking:
        log.warning("%s: built without %s. %s", folder.name, source, sources.instructions(source))
    checked = check_target(f"outputs.{folder.name}.reader", with_folders(node(output, lacking), sources.folder), Reader)
    given = {"on_error": on_error, "quarantine": str(folder.with_name(f"{folder.name}.quarantine.jsonl"))}
    reader = instantiate(
        checked, **{key: given[key] for key in accepted_arguments(checked, given) if key not in checked}
    )
    with Progress(f"building {folder.name}"):
        collection = selected(reader.read(), output.splits, folder.name)
        stamp = {"fingerprint": _fingerprint(sources, output, lacking), "without": list(lacking)}
        _write(collection, folder, stamp | {"counts": counts(collection)})


def _write(collection: Collection, folder: Path, stamp: Mapping[str, Any]) -> None:
    """In place of what an earlier recipe built; until all is written, that stays."""
    partial, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("part", "old"))
    for stale in (partial, old):
        shutil.rmtree(stale, ignore_errors=True)
    try:
        write_beir(collection, partial, compress=True)
        write_json(partial / STAMP, stamp)
    except OSError as error:
        raise UserError(f"{partial}: cannot be written ({error.strerror}); give the same command again") from error
    if folder.exists():
        folder.replace(old)
    partial.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def selected(collection: Collection, splits: Mapping[str, Sequence[str]], name: str) -> Collection:
    """Each split made of several; of two grades of a pair the higher one counts. None: the splits as they are."""
    if not splits:
        return collection
    qrels: dict[str, dict[str, dict[str, int]]] = {}
    for split, parts in splits.items():
        if not parts:
            raise UserError(f"outputs.{name}.splits.{split}: is empty, expected splits of the reader")
        together = qrels.setdefault(split, {})
        for part in parts:
            if part not in collection.qrels:
                there = ", ".join(collection.qrels)
                raise UserError(f"outputs.{name}.splits.{split}: the reader gives no {part!r}, it gives {there}")
            for query, grades in collection.qrels[part].items():
                before = together.setdefault(query, {})
                before.update({id: max(grade, before.get(id, grade)) for id, grade in grades.items()})
    queries = {query: collection.queries[query] for judged in qrels.values() for query in judged}
    return Collection(collection.corpus, queries, qrels)


def counts(collection: Collection) -> dict[str, int]:
    """Of the train split, or of the first one where there is none."""
    judged = collection.qrels.get("train") or next(iter(collection.qrels.values()))
    relevant = sum(grade > 0 for grades in judged.values() for grade in grades.values())
    total = sum(map(len, judged.values()))
    return dict(zip(COUNTS, (len(collection.corpus), len(judged), relevant, total - relevant), strict=True))


def _tell(root: Path, recipe: Recipe, built: Mapping[str, Mapping[str, Any]]) -> None:
    """The table of counts beside the published ones, and in what they differ."""
    columns = (Column("folder", no_wrap=True), *(Column(kind, justify="right") for kind in COUNTS))
    table = Table(*columns, title=f"training data in {root}")
    for name, stamp in built.items():
        table.add_row(name, *(f"{stamp['counts'][kind]:,}" for kind in COUNTS))
        if expected := recipe.outputs[name].expected:
            table.add_row("  published", *(_beside(stamp["counts"][kind], expected.get(kind)) for kind in COUNTS))
    table_console().print(table)
    for name, stamp in built.items():
        if text := _verdict(recipe.outputs[name], stamp):
            log.info("%s: %s", name, text)
    if recipe.then:
        log.info("Next: %s", recipe.then.replace("ROOT", str(root)))


def _beside(count: int, expected: int | None) -> str:
    if expected is None:
        return ""
    return f"{expected:,} ({count / expected - 1:+.1%})" if expected else "0"


def _verdict(output: OutputSpec, stamp: Mapping[str, Any]) -> str:
    """Whether it is what was published, and why it may not be."""
    expected = {kind: output.expected[kind] for kind in COUNTS if kind in output.expected}
    far = [kind for kind, count in expected.items() if abs(stamp["counts"][kind] - count) > TOLERANCE * count]
    verdict = f"differs from the published by more than {TOLERANCE:.0%} in {', '.join(far)}." if far else ""
    if expected and not far:
        verdict = f"within {TOLERANCE:.0%} of the published."
    without = f"Built without {', '.join(stamp['without'])}." if stamp["without"] else ""
    return " ".join((verdict + " " + without + " " + output.note).split())


if __name__ == "__main__":
    entry_point(main)
