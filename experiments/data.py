"""Build training data from public downloads: python -m experiments.data RECIPE data.root=FOLDER [key=value ...]"""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datamodules.files import atomic_folder, expanded, read_json, write_json
from datamodules.locks import lock_file
from datamodules.options import option
from datamodules.readers.beir import write_beir
from datamodules.records import Collection, Reader, UserError, check_choices, explained
from experiments.config.arguments import parse
from experiments.config.targets import check_target, instantiate
from experiments.download.fetch import check_url
from experiments.download.recipe import (
    COUNTS,
    OutputSpec,
    Recipe,
    load_recipe,
    needed_sources,
    reader_node,
    recipes,
    resolve_paths,
)
from experiments.download.sources import Sources
from experiments.shared.console import entry_point
from experiments.shared.progress import Progress
from experiments.shared.table_formats import Column, Table, print_table

log = logging.getLogger(__name__)

FORMAT = 1  # version of the output folders; raise it to rebuild all of them
STAMP = "built.json"  # fingerprint of what a folder was built from, and its counts
TOLERANCE = 0.02  # relative difference from published counts that needs no explanation


@dataclass(kw_only=True)
class DataOptions:
    """Build training data from public downloads, by a recipe.

    Finished steps are not repeated: an interrupted command resumes, and a complete one does nothing. You can also
    change keys of the recipe, such as outputs.NAME.reader.ARGUMENT=VALUE or sources.NAME.url=URL.
    """

    recipe: str = option("", f"name of a recipe ({', '.join(recipes())}), or path of a YAML file", positional=True)
    root: Path = option(Path("data"), "folder for all data; pass the same data.root to make train", key="data.root")
    mirror: str = option("", "URL that has SOURCE/FILE, instead of the URLs of the recipe")
    only: tuple[str, ...] = option((), "folders to build, by default all")
    on_error: Literal["fail", "skip"] = option(
        "fail", "what to do with a bad line: stop, or save it in ROOT/NAME.quarantine.jsonl", key="data.on_error"
    )


def main(arguments: Sequence[str]) -> None:
    changes = [argument for argument in arguments if argument.startswith(("outputs.", "sources."))]
    options = parse(DataOptions, [argument for argument in arguments if argument not in changes])
    _check(options)
    recipe = load_recipe(options.recipe, changes)
    names = check_choices("only", options.only, list(recipe.outputs)) or list(recipe.outputs)
    root = expanded(options.root, "data.root").resolve()
    with _locked(root):
        sources = Sources(root, recipe.sources, options.mirror)
        outputs = []
        for name in names:
            spec = recipe.outputs[name]
            missing = [source for source in spec.without if sources.is_missing(source)]
            outputs.append(Output(root / name, spec, sources, missing))
        to_build = [output for output in outputs if not output.is_built()]
        _check_available(sources, to_build)
        for output in to_build:
            output.build(options.on_error)
        for output in outputs:
            log.info("%s: %s", output.folder.name, "built" if output in to_build else "exists already")
        _report(root, recipe, outputs)


def _check(options: DataOptions) -> None:
    if not options.recipe:
        raise UserError(f"recipe: required; expected a name ({', '.join(recipes())}) or a YAML file")
    if options.mirror:
        try:
            check_url("mirror", options.mirror)
        except UserError as error:
            raise UserError(f"{error} (place local files in data.root/downloads)") from error


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Allow only one command at a time to build in a folder."""
    with explained(f"data.root: {root} cannot be written"):
        root.mkdir(parents=True, exist_ok=True)
        lock = lock_file(root / ".lock", wait=False)
    if lock is None:
        raise UserError(f"data.root: another command is working in {root}; wait until it ends")
    with lock:
        yield


@dataclass(frozen=True)
class Output:
    """A folder in BEIR layout, and the sources to build it from. missing: optional sources that are not available."""

    folder: Path
    spec: OutputSpec
    sources: Sources
    missing: list[str]

    @property
    def needed(self) -> list[str]:
        """Names of the sources to build from."""
        return needed_sources(self.spec, self.missing)

    def is_built(self) -> bool:
        if not (self.folder / STAMP).exists():
            return False
        try:
            return self.stamp()["fingerprint"] == self.fingerprint()
        except UserError as error:
            log.warning("%s: building the folder again", error)
            return False

    def stamp(self) -> dict[str, Any]:
        return read_json(self.folder / STAMP, {"fingerprint": str, "counts": dict, "without": list}, hint="")

    def fingerprint(self) -> str:
        """Return a hash of the sources and settings that the folder depends on."""
        checksums = {name: self.sources.checksums(name) for name in self.needed}
        settings = [FORMAT, reader_node(self.spec, self.missing), self.spec.splits, checksums]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def build(self, on_error: str) -> None:
        """Fetch the sources, read them and write the folder. Raises UserError."""
        name = self.folder.name
        if self.folder.exists() and any(self.folder.iterdir()) and not (self.folder / STAMP).exists():
            raise UserError(
                f"{self.folder}: already exists, but was not built by a recipe; move it, or set another data.root"
            )
        for source in self.needed:
            self.sources.fetch(source)
        for source in self.missing:
            log.warning("%s: built without %s. %s", name, source, self.sources.instructions(source))
        node = resolve_paths(reader_node(self.spec, self.missing), self.sources.folder)
        node = check_target(f"outputs.{name}.reader", node, Reader)
        quarantine = str(self.folder.with_name(f"{name}.quarantine.jsonl"))
        reader = instantiate(node, f"outputs.{name}.reader", on_error=on_error, quarantine=quarantine)
        with Progress(f"building {name}"):
            collection = merge_splits(reader.read(), self.spec.splits, name)
            stamp = {"fingerprint": self.fingerprint(), "without": self.missing}
            self._write(collection, stamp | {"counts": count(collection)})

    def _write(self, collection: Collection, stamp: Mapping[str, Any]) -> None:
        """Replace the folder of an earlier build once the new one is complete."""
        with explained(f"{self.folder}: cannot be written"), atomic_folder(self.folder) as folder:
            write_beir(collection, folder, compress=True)
            write_json(folder / STAMP, stamp)


def _check_available(sources: Sources, outputs: Sequence[Output]) -> None:
    """Raise UserError before any download if files must be placed by hand."""
    names = sorted({name for output in outputs for name in output.needed})
    instructions = [sources.instructions(name) for name in names if sources.must_be_placed(name)]
    if instructions:
        raise UserError("; ".join(instructions) + ". Then run the same command again.")


def merge_splits(collection: Collection, splits: Mapping[str, Sequence[str]], name: str) -> Collection:
    """Merge splits of a collection. If a pair is repeated, its highest grade counts.

    splits: new split -> old splits that make it up. If empty, the collection is returned unchanged.
    name: name of the output, for errors.
    """
    if not splits:
        return collection
    qrels: dict[str, dict[str, dict[str, int]]] = {}
    for split, parts in splits.items():
        if not parts:
            raise UserError(f"outputs.{name}.splits.{split}: expected splits of the reader, got an empty list")
        merged = qrels.setdefault(split, {})
        for part in parts:
            if part not in collection.qrels:
                existing = ", ".join(collection.qrels)
                raise UserError(f"outputs.{name}.splits.{split}: the reader has no split {part!r}, only {existing}")
            for query, grades in collection.qrels[part].items():
                earlier = merged.setdefault(query, {})
                earlier.update({id: max(grade, earlier.get(id, grade)) for id, grade in grades.items()})
    queries = {query: collection.queries[query] for judged in qrels.values() for query in judged}
    return Collection(collection.corpus, queries, qrels)


def count(collection: Collection) -> dict[str, int]:
    """Count documents, queries, pairs and negatives in the train split, or in the first split if there is none."""
    qrels = collection.qrels.get("train") or next(iter(collection.qrels.values()))
    num_pairs = sum(grade > 0 for grades in qrels.values() for grade in grades.values())
    num_judgements = sum(map(len, qrels.values()))
    return dict(zip(COUNTS, (len(collection.corpus), len(qrels), num_pairs, num_judgements - num_pairs), strict=True))


def _report(root: Path, recipe: Recipe, outputs: Sequence[Output]) -> None:
    """Print the counts and the published counts, and explain the differences."""
    table = Table([Column("folder"), *(Column(kind, ",d") for kind in COUNTS)], f"training data in {root}")
    stamps = [(output, output.stamp()) for output in outputs]
    for output, stamp in stamps:
        table.add(output.folder.name, *(stamp["counts"][kind] for kind in COUNTS))
        if expected := output.spec.expected:
            table.add("  published", *(_published(stamp["counts"][kind], expected.get(kind)) for kind in COUNTS))
    print_table(table)
    for output, stamp in stamps:
        if text := _verdict(output.spec, stamp):
            log.info("%s: %s", output.folder.name, text)
    if recipe.then:
        log.info("Next: %s", recipe.then.replace("ROOT", shlex.quote(str(root))))


def _published(counted: int, expected: int | None) -> str:
    """Return a published count with our relative difference from it."""
    if expected is None:
        return ""
    return f"{expected:,} ({counted / expected - 1:+.1%})" if expected else "0"


def _verdict(spec: OutputSpec, stamp: Mapping[str, Any]) -> str:
    """Say whether the counts match the published ones, and why they may differ."""
    expected = {kind: spec.expected[kind] for kind in COUNTS if kind in spec.expected}
    different = [kind for kind, value in expected.items() if abs(stamp["counts"][kind] - value) > TOLERANCE * value]
    sentences = []
    if different:
        sentences.append(f"differs from the published counts by more than {TOLERANCE:.0%} in {', '.join(different)}.")
    elif expected:
        sentences.append(f"within {TOLERANCE:.0%} of the published counts.")
    if stamp["without"]:
        sentences.append(f"Built without {', '.join(stamp['without'])}.")
    return " ".join([*sentences, *spec.note.split()])


if __name__ == "__main__":
    entry_point(main)
