"""Build a FAISS index of an embedded corpus."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datamodules.files import refuse_other_file
from datamodules.options import option
from datamodules.records import UserError, explained
from experiments.config.arguments import parse
from experiments.shared.console import entry_point
from experiments.shared.progress import Progress
from experiments.shared.table_formats import Column, Table, print_table
from lightning_modules.retrieval.embedding import delete_metadata, open_matrix, write_metadata
from lightning_modules.retrieval.faiss_index import IndexOptions, build_index, measure_recall, write_index

log = logging.getLogger(__name__)

# Metadata that an index copies from its vectors.
INHERITED = ("model", "name", "task", "tasks", "similarity", "count", "input", "on_error")


@dataclass(frozen=True, kw_only=True)
class BuildOptions(IndexOptions):
    """Build a FAISS index of an embedded corpus, and measure how many of the ten nearest papers it finds."""

    embeddings: Path = option(help="output of make embed (the folder or a .npy file)")
    task: str = option("", "task whose vectors to index, if the folder has several tasks")
    output: Path = option(help="file for the index; FILE.ids.txt and FILE.json describe its rows")
    recall: float = option(
        0.95,
        "target recall; by default, nprobe is the smallest value that reaches it, or else the one with the highest "
        "recall",
        above=0,
        maximum=1,
    )


def main(arguments: Sequence[str]) -> None:
    options = parse(BuildOptions, arguments)
    output = options.output
    if output.suffix == ".npy" or output.is_dir():
        raise UserError(f"output: expected a file for the index, such as papers.faiss, got {output}")
    refuse_other_file(output, rb"I\w{3}", "a FAISS index")
    refuse_other_file(Path(f"{output}.json"), rb'\{"model": ', "the metadata of an index")
    matrix = open_matrix(options.embeddings, options.task)
    vectors = matrix.vectors
    shape = options.resolved(vectors.count, vectors[0].shape[1])
    with Progress(f"index {output}", unit="vectors", total=vectors.count) as progress:
        index = build_index(vectors, shape, progress.advance)
    recalls = measure_recall(index, vectors, shape)
    nprobe = _choose_nprobe(recalls, shape, options.recall)
    metadata = {key: matrix.metadata[key] for key in INHERITED} | vars(shape)
    metadata |= {"nprobe": nprobe, "recall": recalls, "embeddings": str(matrix.path.absolute())}
    metadata["shards"] = matrix.metadata.get("shards")  # hashes, by which a search notices that the vectors changed
    with explained(f"output: {output} cannot be written"):
        output.parent.mkdir(parents=True, exist_ok=True)
        delete_metadata(output)  # may be left from an earlier index
        write_index(index, output)
        write_metadata(output, matrix.ids, metadata)
    _show(recalls, nprobe, shape, output)


def _choose_nprobe(recalls: list[dict[str, float]], options: IndexOptions, target: float) -> int:
    """Return the smallest nprobe that reaches the target recall, or else the one with the highest recall."""
    name = "reranked" if options.quantizes else "recall"
    sufficient = [line for line in recalls if line[name] >= target]
    return (sufficient or [max(recalls, key=lambda line: line[name])])[0]["nprobe"]


def _show(recalls: list[dict[str, float]], nprobe: int, options: IndexOptions, output: Path) -> None:
    columns = [name for name in ("nprobe", "recall", "reranked") if name in recalls[0]]
    shape = "".join(f", {key} {value}" for key, value in vars(options).items() if value and key != "kind")
    table = Table([Column(name, ".4f") for name in columns], f"{options.kind}{shape}")
    for line in recalls:
        chosen = " *" if len(recalls) > 1 and line["nprobe"] == nprobe else ""
        table.add(f"{line['nprobe'] or '-'}{chosen}", *(line[name] for name in columns[1:]))
    print_table(table)
    log.info("recall: share of the ten nearest papers found; reranked: recall after exact scoring of more candidates")
    size, quoted = output.stat().st_size / 1e6, shlex.quote(str(output))
    log.info("%s: %.1f MB. Next: make find index=%s query='...'", output, size, quoted)


if __name__ == "__main__":
    entry_point(main)
