"""Embed a corpus: one vector for each text."""

from __future__ import annotations

import logging
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datamodules.options import option
from datamodules.readers.rows import BadLines
from datamodules.readers.texts import check_ids, count_lines, read_shards, text_files
from datamodules.records import Document, UserError
from experiments.build.models import EncodingOptions, default_similarity, token_budget_option
from experiments.config.arguments import parse
from experiments.run.processes import Share, end_with_launcher, launch_processes, share_of
from experiments.shared.console import entry_point
from experiments.shared.progress import Progress
from lightning_modules.encoders.base import Encoder
from lightning_modules.retrieval.compute import (
    computing_in,
    default_token_budget,
    resolve_device,
    resolve_precision,
)
from lightning_modules.retrieval.embedding import ShardFolder, embed_shards
from lightning_modules.retrieval.vector_cache import fingerprint
from lightning_modules.throughput import computing_dtype, encoder_ceiling

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class EmbedOptions(EncodingOptions):
    """Embed a corpus: one vector per text. If the command is killed, running it again computes the missing shards."""

    task: tuple[str, ...] = option(help="comma-separated tasks to embed for, or all")
    side: Literal["documents", "queries"] = option(
        "documents", "whether the texts are documents or queries, for models that encode them differently"
    )
    input: Path = option(
        help="JSON lines (.gz, .zst), a JSON list or .parquet with id, title and text (or abstract); a BEIR folder; or "
        "several files: a folder of shards, or a pattern such as 'part-*.jsonl.gz'"
    )
    output: Path = option(help="folder for TASK.npy, TASK.npy.ids.txt and TASK.npy.json; or a .npy file, for one task")
    part: str = option(
        "",
        "I/N embeds part I of N, on any machine that can write to the output; by default, the task of the SLURM array",
    )
    devices: int = option(1, "number of processes on this machine, one per GPU", minimum=1)
    shard_size: int = option(16384, "number of texts per shard", minimum=1)
    similarity: Literal["dot", "cosine"] | None = option(
        None, "cosine normalises the vectors; by default the one used in training, else cosine"
    )
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = option(
        "fp32", "precision of the encoder; auto: bf16 on hardware where it is fast, else fp32"
    )
    dtype: Literal["float32", "float16"] = option("float32", "type of the vectors on disk")
    token_budget: int | None = token_budget_option()
    on_error: Literal["fail", "skip"] = option(
        "fail", "what to do with a bad line: fail, or skip it and write it to a quarantine file"
    )


def main(arguments: Sequence[str]) -> None:
    end_with_launcher()
    options = parse(EmbedOptions, arguments)
    share = share_of(options.part)
    job = EmbeddingJob(options, share)
    if options.devices > 1:
        launch_processes("experiments.embed", [*arguments, "devices=1", f"part={share}"], options.devices)
    else:
        job.run()


class EmbeddingJob:
    """One process's share of embedding a corpus. The process that finishes last merges the shards."""

    def __init__(self, options: EmbedOptions, share: Share):
        self.options, self.share = options, share
        self.device = share.device if options.device == "auto" else resolve_device(options.device)
        self.files = text_files(options.input)
        self.source = self.files[0] if len(self.files) == 1 else options.input
        self.precision = resolve_precision(options.precision, self.device)
        self.token_budget = options.token_budget or default_token_budget(self.device)
        self.one_file = options.output.suffix == ".npy"
        self.folder = Path(f"{options.output}.shards") if self.one_file else options.output / "shards"

    def run(self) -> None:
        """Embed this process's shards. The process that completes the last shard merges them all."""
        options = self.options
        num_lines = count_lines(self.files, options.on_error)
        if not num_lines:
            raise UserError(f"input: {self.source} contains no texts")
        if self.share.index == 0:
            check_ids(self.files, options.on_error)
        num_shards = -(-num_lines // options.shard_size)
        encoder, tasks, similarity = self._load()
        shards = ShardFolder(self.folder, self._metadata(encoder, tasks, similarity))
        numbers = self.share.shards(num_shards)
        log.info("this process embeds %d of %d shards of %s", len(numbers), num_shards, self.source)
        num_texts = sum(min(options.shard_size, num_lines - number * options.shard_size) for number in numbers)
        self._embed_shards(encoder, shards, numbers, num_texts)
        if missing := shards.missing(num_shards) or self._outdated(shards, set(range(num_shards)) - set(numbers)):
            remaining = len(missing), num_shards, missing[0]
            log.info(
                "%d of %d shards are still missing or outdated (first: shard %d); other parts will embed them",
                *remaining,
            )
            return
        source = {"input": str(self.source.absolute()), "name": options.model}
        for task in tasks:
            path = options.output if self.one_file else options.output / f"{task}.npy"
            log.info("%s: %s vectors", path, f"{shards.merge(task, num_shards, path, source):,}")
        output = shlex.quote(str(options.output))
        log.info("Next: make find embeddings=%s task=%s query='...'", output, next(iter(tasks)))

    def _load(self) -> tuple[Encoder, dict[str, str], str]:
        """Return the encoder, a dict from output task to encoder task, and the similarity."""
        options = self.options
        config = options.run_config()
        only_task = options.task[0] if len(options.task) == 1 else "all"
        encoder = options.load_on_device(config, task=only_task, device=self.device)
        names = list(encoder.tasks) if options.task == ("all",) else options.task
        if self.one_file and len(names) > 1:
            raise UserError(f"output: expected a folder for {len(names)} tasks, got the file {options.output}")
        for name in names:
            encoder.expert_of(name)
        tasks = {name: encoder.document_task(name) if options.side == "documents" else name for name in names}
        return encoder, tasks, options.similarity or default_similarity(encoder, config)

    def _metadata(self, encoder: Encoder, tasks: dict[str, str], similarity: str) -> dict[str, Any]:
        """Return the settings that determine the vectors."""
        return {
            "model": fingerprint(encoder),
            "tasks": tasks,
            "similarity": similarity,
            "precision": self.precision,
            "dtype": self.options.dtype,
            "shard_size": self.options.shard_size,
            "token_budget": self.token_budget,
            "on_error": self.options.on_error,
        }

    def _embed_shards(self, encoder: Encoder, shards: ShardFolder, numbers: range, num_texts: int) -> None:
        """Embed the given shards, except complete ones. num_texts: number of texts in all shards."""
        num_written = 0
        quarantine = self.folder / f"quarantine-{self.share.index + 1}.jsonl"
        with (
            BadLines(self.options.on_error, str(quarantine)) as bad_lines,
            Progress("embedding", "texts", num_texts) as progress,
            computing_in(self.precision, encoder.device),
            closing(
                embed_shards(
                    encoder,
                    self._missing(shards, numbers, bad_lines, progress),
                    shards.metadata["tasks"],
                    similarity=shards.metadata["similarity"],
                    dtype=self.options.dtype,
                    token_budget=self.token_budget,
                    advance=progress.advance,
                )
            ) as embedded,
        ):
            for number, documents, vectors in embedded:
                shards.write(number, documents, vectors)
                num_written += 1
        seconds, num_complete = time.monotonic() - progress.started, len(numbers) - num_written
        complete = f"; {num_complete} shards were already complete" if num_complete else ""
        log.info("%s texts embedded, %s%s", f"{progress.done:,}", self._speed(encoder, seconds), complete)

    def _missing(
        self, shards: ShardFolder, numbers: range, bad_lines: BadLines, progress: Progress
    ) -> Iterator[tuple[int, list[Document]]]:
        """Yield the texts of each incomplete shard. Complete shards are subtracted from the total of `progress`."""
        for number, documents in read_shards(self.files, self.options.shard_size, numbers, bad_lines):
            if shards.has(number, documents):
                progress.total -= len(documents)
            else:
                yield number, documents

    def _outdated(self, shards: ShardFolder, others: set[int]) -> list[int]:
        """Return the shards of other processes that are damaged, or were made before the input changed."""
        bad_lines = BadLines(self.options.on_error, os.devnull)  # the other processes report them
        texts = read_shards(self.files, self.options.shard_size, others, bad_lines) if others else ()
        return [number for number, documents in texts if not shards.has(number, documents)]

    def _speed(self, encoder: Encoder, seconds: float) -> str:
        """Describe the mean speed of this process, including reading and writing."""
        texts, tokens, flops = (encoder.encoded[unit] / seconds for unit in ("texts", "tokens", "flops"))
        mfu = flops / encoder_ceiling(encoder, computing_dtype(self.precision))
        return f"{texts:,.1f} texts/s, {tokens:,.0f} tokens/s, MFU {mfu:.0%}"


if __name__ == "__main__":
    entry_point(main)
