"""Data of any size: python -m experiments.timing.data_scale folder=FOLDER [documents=3000000] [pairs=10000000]

Makes a collection in BEIR layout in FOLDER (kept, and used again), converts and tokenises it (once), and then measures
in a new process, as training would: seconds from its start to the first batch, at step 0 and at a late step, its memory
above that of its imports, and texts a second of the loader.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from datamodules.records import Task, UserError
from datamodules.tasks import BatchOptions, SearchDataModule
from experiments.console import entry_point, key_values, whole_number

LETTERS = "abcdefghijklmnopqrstuvwxyz"
KEYS = {"folder": "", "documents": "3000000", "pairs": "10000000", "step": "100000", "batches": "50", "workers": "0"}


def words(draw: random.Random) -> list[str]:
    return ["".join(draw.choices(LETTERS, k=draw.randint(3, 10))) for _ in range(20_000)]


def make(folder: Path, documents: int, pairs: int) -> None:
    """Documents of some 70 words; a tenth as many queries as pairs, each with its share of them."""
    draw = random.Random(0)
    vocabulary = words(draw)
    abstracts = [" ".join(draw.choices(vocabulary, k=60)) for _ in range(5_000)]
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    with open(folder / "corpus.jsonl", "w") as file:
        for i in range(documents):
            record = {"_id": f"paper-{i}", "title": f"{vocabulary[i % 20_000]} {i}", "text": abstracts[i * 7 % 5_000]}
            file.write(json.dumps(record) + "\n")
    queries = pairs // 10
    with open(folder / "queries.jsonl", "w") as file:
        for i in range(queries):
            file.write(json.dumps({"_id": f"query-{i}", "text": f"{vocabulary[i % 20_000]} {i % 977}"}) + "\n")
    with open(folder / "qrels" / "train.tsv", "w") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        for i in range(queries):
            first = i * 7919 % documents
            file.writelines(f"query-{i}\tpaper-{(first + 31 * j) % documents}\t{int(j > 1)}\n" for j in range(10))


def task_of(folder: Path, cache: Path, num_batches: int = 1, workers: int = 0) -> SearchDataModule:
    from datamodules.readers.beir import BeirReader

    options = BatchOptions(
        batch_size=16, num_batches=num_batches, max_length=192, token_budget=2048, cache=str(cache), num_workers=workers
    )
    task = SearchDataModule(Task("search", "search"), {"large": BeirReader(str(folder))}, options)
    task.setup()
    return task


def tokenizer():
    """Knows the words of the texts, but not the numbers in their titles."""
    from transformers import BertTokenizer

    from lightning_modules.encoders.backbone import word_vocabulary

    return BertTokenizer(vocab=word_vocabulary(words(random.Random(0)), 30_000))


def memory() -> float:
    """Resident memory of this process, GB."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1e6


def first_batches(folder: Path, cache: Path, step: int, batches: int, workers: int) -> dict[str, float]:
    """What a training process meets, measured in this one."""
    given = tokenizer()
    before, started = memory(), time.perf_counter()
    task = task_of(folder, cache, step + batches + 1, workers)
    task.tokenizer = given
    loader = task.train_dataloader()
    loader.position = step
    stream = iter(loader)
    next(stream)
    first = time.perf_counter() - started
    started, count = time.perf_counter(), 0
    for _ in range(batches):
        count += sum(len(chunk) for chunk in next(stream).chunks)
    taken = time.perf_counter() - started
    return {"first batch, s": first, "memory, GB": memory() - before, "texts a second": count / taken}


def main(arguments: Sequence[str]) -> None:
    values = key_values(arguments, KEYS)
    if not values["folder"]:
        raise UserError("folder: where may the data be made?")
    folder = Path(values["folder"])
    data, cache = folder / "data", folder / "cache"
    documents, pairs, batches = (whole_number(key, values[key]) for key in ("documents", "pairs", "batches"))
    step, workers = whole_number("step", values["step"], 0), whole_number("workers", values["workers"], 0)
    table = Table("", "", title=f"{documents:,} documents, {pairs:,} pairs")
    if not (data / "qrels" / "train.tsv").is_file():
        make(data, documents, pairs)
    started = time.perf_counter()
    task = task_of(data, cache)
    seconds = time.perf_counter() - started
    table.add_row("converted (or found), s", f"{seconds:.1f}")
    table.add_row("documents a second, with judgements", f"{(documents + pairs // 10) / seconds:,.0f}")
    task.tokenizer, started = tokenizer(), time.perf_counter()
    task.train_dataloader()
    seconds = time.perf_counter() - started
    table.add_row("tokenised (or found), s", f"{seconds:.1f}")
    table.add_row("texts a second", f"{(documents + pairs // 10) / seconds:,.0f}")
    for at in (0, step):
        code = "import sys, json; from pathlib import Path; from experiments.timing.data_scale import first_batches; "
        code += "print(json.dumps(first_batches(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))))"
        command = [sys.executable, "-c", code, str(data), str(cache), str(at), str(batches), str(workers)]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        whole = time.perf_counter() - started
        for name, figure in json.loads(done.stdout.splitlines()[-1]).items():
            table.add_row(f"step {at:,}: {name}", f"{figure:,.2f}")
        table.add_row(f"step {at:,}: the whole process, s", f"{whole:.1f}")
    Console().print(table)


if __name__ == "__main__":
    entry_point(main)
