"""Data of any size: python -m experiments.bench.data_scale folder=FOLDER [documents=3000000] [pairs=10000000]

Makes a collection in BEIR layout in FOLDER (kept, and used again), converts and tokenises it (once), and then measures
in a new process, as training would: seconds from its start to the first batch, at step 0 and at a late step, its memory
above that of its imports, texts a second of the loader, and how many times that is what training a BERT of MiniLM's
size takes, on the same batches and this machine.
"""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from datamodules.batches import BatchOptions
from datamodules.records import ContrastiveBatch, Task, UserError
from datamodules.tasks import SearchDataModule
from experiments.shared.console import entry_point, key_values, whole_number

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
STEPS = 2  # of training that are timed, after one that is not
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


def num_texts(batches: Sequence[ContrastiveBatch]) -> int:
    return sum(len(chunk) for batch in batches for chunk in batch.chunks)


def trained(batches: Sequence[ContrastiveBatch], vocabulary: dict[str, int]) -> float:
    """Texts a second of training on the batches, the first of which is not timed."""
    from lightning_modules.contrastive import ContrastiveModule
    from lightning_modules.encoders.backbone import random_backbone
    from lightning_modules.encoders.shared import SharedEncoder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = SharedEncoder(*random_backbone(MINILM, vocabulary), {"search": "search"}, pooling="mean")
    module = ContrastiveModule(encoder, total_steps=1000).to(device).train()
    optimizer, started = module.configure_optimizers()["optimizer"], 0.0
    for number, batch in enumerate(batches):
        optimizer.zero_grad()
        loss = module.training_step(batch.to(device), number)["loss"]
        loss.backward()
        optimizer.step()
        float(loss)  # waits for the GPU
        started = started or time.perf_counter()
    return num_texts(batches[1:]) / (time.perf_counter() - started)


def first_batches(folder: str, cache: str, step: int, batches: int, workers: int, launched: float) -> dict[str, float]:
    """What a training process meets, measured in this one. launched: when it was, in seconds of the clock."""
    given = tokenizer()
    before, started = memory(), time.perf_counter()
    task = task_of(Path(folder), Path(cache), step + batches + 1, workers)
    task.tokenizer = given
    loader = task.train_dataloader()
    loader.position = step
    stream = iter(loader)
    next(stream)
    found = {"first batch, s": time.perf_counter() - started, "with all imports, s": time.time() - launched}
    started, some, count = time.perf_counter(), [], 0
    for batch in itertools.islice(stream, batches):
        count += num_texts([batch])
        some = [*some, batch][: STEPS + 1]
    rate = count / (time.perf_counter() - started)
    found |= {"memory of the data, GB": memory() - before, "texts a second of the loader": rate}
    if not step:
        return found
    needed = trained(some, given.get_vocab())
    return found | {"texts a second of training MiniLM": needed, "loader over training": rate / needed}


def main(arguments: Sequence[str]) -> None:
    values = key_values(arguments, KEYS)
    if not values["folder"]:
        raise UserError("folder: where may the data be made?")
    documents, pairs, batches = (whole_number(key, values[key]) for key in ("documents", "pairs", "batches"))
    step, workers = whole_number("step", values["step"], 0), whole_number("workers", values["workers"], 0)
    folder = Path(values["folder"])
    data, cache = folder / f"{documents}-{pairs}", folder / "cache"
    table = Table("", "", title=f"{documents:,} documents, {pairs:,} pairs")
    if not data.is_dir():
        make(folder / ".part", documents, pairs)
        (folder / ".part").rename(data)
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
        given = (str(data), str(cache), at, batches, workers, time.time())
        code = "import json; from experiments.bench.data_scale import first_batches; "
        code += f"print(json.dumps(first_batches(*{given!r})))"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        for name, figure in json.loads(done.stdout.splitlines()[-1]).items():
            table.add_row(f"step {at:,}: {name}", f"{figure:,.2f}")
    Console().print(table)


if __name__ == "__main__":
    entry_point(main)
