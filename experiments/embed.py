"""Vectors of a corpus: python -m experiments.embed model=M task=search input=papers.jsonl output=FOLDER

model        a run's folder, a checkpoint, an exported folder, a plain BERT (folder or hub name); backbone, pooling,
             tower, adapters: as in experiments.evaluate
task         whose expert encodes, one or several (task=search,classification), or all: layers that serve all of them
             are computed once. side: documents, or queries, for a model that encodes them differently
input        {"id", "title", "text" or "abstract"} a line, plain, .gz or .zst; one JSON list; .parquet; or a folder in
             BEIR layout, whose corpus is taken
output       a folder: TASK.npy (M, D), TASK.ids.txt and TASK.json, and the shards they are merged from; or, for one
             task, FILE.npy. Who is killed goes on with the same command
part         3/8: the third of eight processes that share the work, on any machines that see the folder; by default
             that of torchrun, srun or a SLURM array. The last one to end merges
devices      processes on this machine, one for each GPU
shard_size   texts of a shard. Shards are encoded by themselves, so vectors do not depend on the number of processes
similarity   cosine keeps vectors of length 1, dot as they are; by default that of the run, dot with backbone=
precision    fp32, bf16 or auto (bf16 where the hardware is made for it) for the encoder; dtype: float32 or float16 on
             disk
token_budget padded tokens of a forward, by default 2,048 on a CPU, 65,536 on a GPU
on_error     fail, or skip: bad lines go to a quarantine file
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datamodules.readers.checks import BadLines
from datamodules.readers.texts import count_lines, read_shards, text_file
from datamodules.records import Document, UserError
from experiments.build.models import MODEL_KEYS, default_similarity, load_model, run_of
from experiments.config.experiment import from_dict
from experiments.config.paths import read_config
from experiments.run.workers import Share, run_processes, share_of
from experiments.shared.console import choice, entry_point, key_values, token_budget, whole_number
from experiments.shared.progress import Progress
from lightning_modules.encoders.base import Encoder
from lightning_modules.losses import SIMILARITIES
from lightning_modules.retrieval.compute import PRECISIONS, computing_in, resolved, token_budget_of
from lightning_modules.retrieval.embedding import STORED, Arrays, ShardFolder, embed_shard, merge
from lightning_modules.retrieval.vector_cache import fingerprint

log = logging.getLogger(__name__)

KEYS = MODEL_KEYS | {
    "task": "",
    "side": "documents",
    "input": "",
    "output": "",
    "part": "",
    "devices": "1",
    "shard_size": "16384",
    "similarity": "",
    "precision": "fp32",
    "dtype": "float32",
    "token_budget": "",
    "on_error": "fail",
}


class Job:
    """What is embedded, how, and where to."""

    def __init__(self, values: dict[str, str], share: Share):
        self.values, self.share = values, share
        for key in ("task", "input", "output"):
            if not values[key]:
                raise UserError(f"{key}: is missing; for instance task=search input=papers.jsonl output=vectors")
        choice("side", values["side"], ("documents", "queries"))
        choice("on_error", values["on_error"], BadLines.POLICIES)
        self.stored = choice("dtype", values["dtype"], STORED)
        self.precision = resolved(choice("precision", values["precision"], PRECISIONS), share.device)
        self.size = whole_number("shard_size", values["shard_size"])
        self.token_budget = token_budget(values) or token_budget_of(share.device)
        self.output = Path(values["output"])
        self.is_file = self.output.suffix == ".npy"
        self.folder = self.output.with_name(self.output.name + ".shards") if self.is_file else self.output / "shards"
        self.source = text_file(Path(values["input"]))

    def matrix(self, task: str) -> Path:
        return self.output if self.is_file else self.output / f"{task}.npy"

    def load(self) -> Encoder:
        values, run = self.values, run_of(self.values["model"])
        config = from_dict(read_config(run), str(run / "config.yaml")) if run else None
        several = values | ({"task": "all"} if "," in values["task"] else {})
        encoder = load_model(several, config).to(self.share.device)
        names = list(encoder.tasks) if values["task"] == "all" else values["task"].split(",")
        if self.is_file and len(names) > 1:
            raise UserError(f"output: {self.output} is a file, and the tasks are {len(names)}: name a folder")
        for name in names:
            encoder.expert_of(name)
        documents = values["side"] == "documents"
        self.tasks = {name: encoder.document_task(name) if documents else name for name in names}
        self.similarity = values["similarity"] or default_similarity(values, config)
        choice("similarity", self.similarity, SIMILARITIES)
        return encoder

    def about(self, encoder: Encoder) -> dict[str, Any]:
        """What decides the vectors."""
        return {
            "model": fingerprint(encoder),
            "tasks": self.tasks,
            "similarity": self.similarity,
            "precision": self.precision,
            "dtype": self.stored,
            "shard_size": self.size,
            "token_budget": self.token_budget,
            "on_error": self.values["on_error"],
        }


def embed(job: Job) -> None:
    """Embed this process's shards, and merge when all are there."""
    num_lines = count_lines(job.source, job.values["on_error"])
    if not num_lines:
        raise UserError(f"input: {job.source} holds no text")
    count = -(-num_lines // job.size)
    encoder = job.load()
    shards = ShardFolder(job.folder, job.about(encoder))
    mine = job.share.shards(count)
    log.info("%s: %d of %d shards, on %s", job.source, len(mine), count, job.share.device)
    _embed_shards(job, encoder, shards, mine, sum(min(job.size, num_lines - n * job.size) for n in mine))
    missing = shards.missing(count)
    if missing:
        log.info("%d of %d shards are still missing, the first is %d: not this part's", len(missing), count, missing[0])
        return
    for task in job.tasks:
        path = job.matrix(task)
        about = shards.about | {"input": str(job.source.absolute()), "name": job.values["model"]}
        log.info("%s: %s vectors", path, f"{merge(shards, task, count, path, about):,}")
    log.info("Next: make find embeddings=%s task=%s query='...'", job.output, next(iter(job.tasks)))


def _embed_shards(job: Job, encoder: Encoder, shards: ShardFolder, mine: range, total: int) -> None:
    """Those that are not there yet. total: texts of all of them."""
    done, kept, quarantine = 0, 0, job.folder / f"quarantine-{job.share.index + 1}.jsonl"
    with BadLines(job.values["on_error"], str(quarantine)) as bad, Progress("embedding", unit="texts") as progress:

        def advance(texts: int) -> None:
            nonlocal done
            done += texts
            progress.report(done, total)

        for number, documents in read_shards(job.source, job.size, mine, bad):
            if shards.has(number, documents):
                total, kept = total - len(documents), kept + 1
            else:
                shards.write(number, documents, _encode(job, encoder, documents, advance))
    seconds = time.monotonic() - progress.started
    there = f"; {kept} shards were there already" if kept else ""
    log.info("%s texts embedded, %.1f a second%s", f"{done:,}", done / seconds, there)


def _encode(job: Job, encoder: Encoder, documents: list[Document], advance: Callable[[int], None]) -> Arrays:
    with computing_in(job.precision, encoder.device):
        return embed_shard(
            encoder,
            documents,
            job.tasks,
            similarity=job.similarity,
            stored=job.stored,
            token_budget=job.token_budget,
            advance=advance,
        )


def main(arguments: Sequence[str]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # nothing is forked here
    values = key_values(arguments, KEYS)
    share = share_of(values["part"])
    job = Job(values, share)
    devices = whole_number("devices", values["devices"])
    if devices > 1:
        own = [text for text in arguments if text.partition("=")[0] not in ("part", "devices")]
        run_processes("experiments.embed", own, share, devices)
    else:
        embed(job)


if __name__ == "__main__":
    entry_point(main)
