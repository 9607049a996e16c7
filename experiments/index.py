"""A FAISS index of embedded texts: python -m experiments.index embeddings=FOLDER output=FILE [kind=ivf] [nlist= m=]

embeddings   what experiments.embed wrote: its folder (task=NAME where it has several), or a .npy file
output       the index; FILE.ids.txt and FILE.json beside it say what its rows are, and with which model to ask
kind         flat (exact), ivf (only the nearest lists are searched), pq (few bytes a vector), ivfpq (both)
nlist        lists of ivf, by default about 4 sqrt(M); m: bytes of a vector of pq, by default D / 8
recall       the share of the exact ten nearest that is found is measured on a sample; the smallest nprobe that finds
             this share, else the one that finds most, becomes the index's own
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from datamodules.records import UserError
from experiments.shared.console import choice, entry_point, key_values, table_console, whole_number
from experiments.shared.progress import Progress
from lightning_modules.retrieval.embedding import beside, open_matrix, write_ids, write_json
from lightning_modules.retrieval.faiss_index import KINDS, IndexOptions, build_index, measure_recall, write_index

log = logging.getLogger(__name__)

KEYS = {"embeddings": "", "task": "", "output": "", "kind": "flat", "nlist": "0", "m": "0", "recall": "0.95"}


def build(values: dict[str, str]) -> None:
    for key in ("embeddings", "output"):
        if not values[key]:
            raise UserError(f"{key}: is missing; for instance embeddings=vectors output=papers.faiss")
    wanted = _share("recall", values["recall"])
    options = IndexOptions(
        choice("kind", values["kind"], KINDS),
        whole_number("nlist", values["nlist"], 0),
        whole_number("m", values["m"], 0),
    )
    matrix, output = open_matrix(Path(values["embeddings"]), values["task"]), Path(values["output"])
    if output.suffix == ".npy" or output.is_dir():
        raise UserError(f"output: {output} is to be the file of an index, such as papers.faiss")
    vectors = matrix.vectors
    options, done = options.resolved(vectors.count, vectors[0].shape[1]), 0
    with Progress(f"index {output}", unit="vectors") as progress:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress.report(done, vectors.count)

        index = build_index(vectors, options, advance)
    lines = measure_recall(index, vectors, options)
    best = "reranked" if options.quantizes else "recall"
    nprobe = next((line for line in lines if line[best] >= wanted), max(lines, key=lambda line: line[best]))["nprobe"]
    about = {
        key: matrix.about[key] for key in ("model", "name", "task", "tasks", "similarity", "count", "input", "on_error")
    }
    about |= vars(options) | {"nprobe": nprobe, "recall": lines, "embeddings": str(matrix.path.absolute())}
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        beside(output, ".json").unlink(missing_ok=True)  # of an index that was there
        write_index(index, output)
        write_ids(output, matrix.ids)
        write_json(beside(output, ".json"), about)
    except OSError as error:
        raise UserError(f"output: {output} cannot be written ({error})") from error
    _show(lines, nprobe, options, output)


def _share(key: str, value: str) -> float:
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise UserError(f"{key}: got {value!r}, allowed are numbers above 0 up to 1")
    return share


def _show(lines: list[dict[str, float]], nprobe: int, options: IndexOptions, output: Path) -> None:
    columns = [name for name in ("nprobe", "recall", "reranked") if name in lines[0]]
    shape = "".join(f", {key} {value}" for key, value in vars(options).items() if value and key != "kind")
    table = Table(*columns, title=f"{options.kind}{shape}")
    for line in lines:
        chosen = " *" if len(lines) > 1 and line["nprobe"] == nprobe else ""
        table.add_row(f"{line['nprobe'] or '-'}{chosen}", *(f"{line[name]:.4f}" for name in columns[1:]))
    table_console().print(table)
    log.info("recall is the share of the ten nearest that is found; reranked, with exact scores of more candidates")
    log.info("%s: %.1f MB. Next: make find index=%s query='...'", output, output.stat().st_size / 1e6, output)


def main(arguments: Sequence[str]) -> None:
    build(key_values(arguments, KEYS))


if __name__ == "__main__":
    entry_point(main)
