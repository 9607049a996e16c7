"""The parts of `make bench BENCH=gpu` that measure speed. Each yields its figures as soon as they are measured."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.files import read_rows
from datamodules.packed import ContrastiveBatch
from datamodules.readers.beir import write_beir
from datamodules.records import Collection, Document
from datamodules.text import token_ids
from datamodules.tokens import CACHE, Encoding, tokenise_ahead
from experiments.bench import mining
from experiments.bench.peer import DEFAULT_BATCH, PEER, Peer, attentions, peer_version
from experiments.bench.workload import KINDS, SHAPES, TASK, Workload
from lightning_modules.encoders.backbone import set_dropout
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.export import save_dense
from lightning_modules.mining.mine import mine
from lightning_modules.mining.mining_options import MiningOptions
from lightning_modules.retrieval.search import top_k
from lightning_modules.throughput import encoder_ceiling, forward_flops, gemm_ceiling, training_flops

OURS = "this project"
DEVICE = "device"
BATCH_SIZES = {"cpu": (8,), "cuda": (128, 256, 512)}  # for sentence-transformers, next to its default
MINI_BATCHES = {"cpu": (8,), "cuda": (32, 256)}  # chunk sizes of its GradCache; the default is 32
DROPOUTS = {"dropout 0": (0.0, 0.0), "dropout 0.1": (0.1, 0.0), "dropout 0.1, of attention too": (0.1, 0.1)}
K = 100  # documents per query


@dataclasses.dataclass(frozen=True)
class Figure:
    """A measured speed.

    part: key of gpu.PARTS, set by run_parts.
    system: OURS, PEER, or DEVICE (the hardware or a library alone).
    setting: what was measured, in words.
    speed: in `unit`, such as "texts/s".
    flops: useful operations per second (lightning_modules/throughput.py); 0 if they are not counted.
    mfu: useful operations as a share of the ceiling; 0 if it does not apply.
    is_default: whether it is the default setting of sentence-transformers.
    """

    part: str = dataclasses.field(default="", kw_only=True)
    system: str
    setting: str
    speed: float
    unit: str
    flops: float = 0.0
    mfu: float = 0.0
    is_default: bool = False


def gemm(workload: Workload) -> Iterator[Figure]:
    """Time matrix products of the encoder's width, and large ones."""
    device, size = workload.device, workload.encoder().dimension
    large = (8192,) * 3 if device.type == "cuda" else (2048,) * 3
    for dtype in dict.fromkeys([workload.dtype, torch.float32]):
        for shape in ((16 * 4096 if device.type == "cuda" else 2048, size, 4 * size), large):
            speed = gemm_ceiling(device, dtype, shape)
            name = f"{' x '.join(map(str, shape))}, {str(dtype).removeprefix('torch.')}"
            yield Figure(DEVICE, name, speed / 1e12, "TFLOP/s", speed)


def tokenizer(workload: Workload) -> Iterator[Figure]:
    """Time the tokenizer alone: in one call, and in threads that tokenise ahead, as `encode` does."""
    texts, documents = workload.texts, workload.documents
    seconds = workload.median_seconds(lambda: token_ids(texts, workload.tokenizer, workload.max_length))
    yield Figure(DEVICE, "one call", len(texts) / seconds, "texts/s")

    def ahead() -> None:
        CACHE.clear()
        encoding = Encoding(workload.tokenizer, "", workload.max_length)
        for _ in tokenise_ahead((encoding, documents[i : i + 1024]) for i in range(0, len(documents), 1024)):
            pass

    yield Figure(OURS, "ahead, in threads", len(texts) / workload.median_seconds(ahead), "texts/s")


def encode(workload: Workload) -> Iterator[Figure]:
    """Time encoding, from texts to vectors on the host."""
    yield _encoding(workload, "Vanilla", workload.encoder())
    yield from _peer_encodings(workload)
    for kind in KINDS[1:]:
        yield _encoding(workload, kind, workload.encoder(kind))
    if workload.dtype != torch.float32:
        some = dataclasses.replace(
            workload, precision="fp32", documents=workload.documents[: len(workload.documents) // 8]
        )
        yield _encoding(some, "Vanilla, fp32", workload.encoder())
    yield _encoding(workload, "Vanilla, compiled", compiled(workload.encoder()))


def compiled(encoder: Encoder) -> Encoder:
    """Return a copy of an encoder with compiled layers."""
    encoder = copy.deepcopy(encoder)
    encoder.compile()
    return encoder


def _encoding(workload: Workload, setting: str, encoder: Encoder, cached: bool = False) -> Figure:
    """Measure `encode`. cached: whether the token ids are cached from an earlier call."""

    def run(count: int | None = None) -> None:
        if not cached:
            CACHE.clear()
        with workload.computing():
            encoder.encode(workload.documents[:count], TASK)

    seconds = workload.median_seconds(run, None if cached else lambda: run(256), most=5)
    return _texts_figure(OURS, setting, workload, encoder, seconds)


def _texts_figure(
    system: str, setting: str, workload: Workload, encoder: Encoder, seconds: float, is_default: bool = False
) -> Figure:
    """Return the figure of a forward pass of all texts."""
    flops, speed = forward_flops(encoder, workload.lengths, TASK) / seconds, len(workload.documents) / seconds
    setting += " (default)" if is_default else ""
    return Figure(system, setting, speed, "texts/s", flops, flops / workload.ceiling, is_default)


def _peer_encodings(workload: Workload) -> Iterator[Figure]:
    if not peer_version():
        return
    sizes = (*BATCH_SIZES[workload.device.type], DEFAULT_BATCH)  # the fastest first
    for attention in attentions(workload):
        peer = Peer(workload, attention)
        for size in sizes:
            seconds = workload.median_seconds(
                lambda peer=peer, size=size: peer.encode(workload.texts, size),
                lambda peer=peer, size=size: peer.encode(workload.texts[: 2 * size], size),
                most=3,
            )
            is_default = size == DEFAULT_BATCH and attention == "sdpa"
            setting = f"batch {size}, {attention}"
            yield _texts_figure(PEER, setting, workload, workload.encoder(), seconds, is_default)


def forward(workload: Workload) -> Iterator[Figure]:
    """Time the forward pass alone: token ids are already packed on the device, and the vectors stay there."""
    batches, encoder = workload.packed(), workload.encoder()

    def figure(setting: str, encoder: Encoder, cast_once: bool) -> Figure:
        encoder.eval()

        @torch.inference_mode()
        def run() -> None:
            with workload.computing(), encoder.casting() if cast_once else nullcontext():
                for tokens in batches:
                    encoder(tokens, TASK)

        return _texts_figure(OURS, setting, workload, encoder, workload.median_seconds(run))

    yield figure("Vanilla, weights cast once", encoder, True)
    if peer_version():
        for attention in attentions(workload):
            peer, size = Peer(workload, attention), BATCH_SIZES[workload.device.type][0]
            padded = peer.sorted_batches(workload.texts, size)
            seconds = workload.median_seconds(lambda peer=peer, padded=padded: peer.forward(padded))
            setting = f"batch {size}, {attention}"
            yield _texts_figure(PEER, setting, workload, encoder, seconds)
    if workload.dtype != torch.float32:
        yield figure("Vanilla, weights cast for each batch", encoder, False)
    yield figure("MoE", workload.encoder("MoE"), True)
    yield figure("Vanilla, compiled", compiled(encoder), True)


def train(workload: Workload) -> Iterator[Figure]:
    """Time training steps: queries with one positive and one hard negative each, clipping, and fused AdamW."""
    batches = [workload.batch(workload.queries, number=number) for number in range(4)]
    yield _step_figure("Vanilla, dropout 0", workload, workload.new_encoder(), batches)
    if peer_version():
        for attention, dropout in itertools.product(attentions(workload), (0.0, 0.1)):
            step = Peer(workload, attention).training_step(workload.queries, dropout)
            seconds, is_default = workload.median_seconds(step), attention == "sdpa" and dropout > 0
            setting = f"dropout {dropout:g}, {attention}"
            yield _pairs_figure(PEER, setting, workload, workload.encoder(), batches[:1], seconds, is_default)
    for name, rates in list(DROPOUTS.items())[1:]:
        yield _step_figure(f"Vanilla, {name}", workload, workload.new_encoder(), batches, rates)
    for kind in KINDS[1:]:
        yield _step_figure(f"{kind}, dropout 0", workload, workload.new_encoder(kind), batches)
    yield _step_figure("Vanilla, dropout 0, compiled", workload, compiled(workload.new_encoder()), batches)


def _step_figure(
    setting: str,
    workload: Workload,
    encoder: Encoder,
    batches: Sequence[ContrastiveBatch],
    dropout: tuple[float, float] = (0.0, 0.0),
    grad_cache: bool = False,
) -> Figure:
    set_dropout(encoder.backbone, *dropout)
    seconds = workload.median_seconds(workload.training_step(encoder, batches, grad_cache))
    return _pairs_figure(OURS, setting, workload, encoder, batches, seconds)


def _pairs_figure(
    system: str,
    setting: str,
    workload: Workload,
    encoder: Encoder,
    batches: Sequence[ContrastiveBatch],
    seconds: float,
    is_default: bool = False,
) -> Figure:
    """Return the figure of a training step. seconds: mean time per batch of `batches`."""
    lengths = [length for batch in batches for chunk in batch.chunks for length in chunk.lengths]
    flops = training_flops(encoder, np.array(lengths), TASK) / len(batches) / seconds
    pairs = len(batches[0].queries) / seconds
    setting += " (default)" if is_default else ""
    return Figure(system, setting, pairs, "pairs/s", flops, flops / workload.ceiling, is_default)


def grad_cache(workload: Workload) -> Iterator[Figure]:
    """Time GradCache: a large batch in the memory of one chunk. The second forward pass does not count as useful."""
    pairs = workload.cached_pairs
    batches = [workload.batch(pairs, hard_negatives=0)]
    once = dataclasses.replace(workload, seconds=0.0)  # one step, after a warm-up
    yield _step_figure(f"{pairs:,} pairs", once, workload.new_encoder(), batches, grad_cache=True)
    if peer_version():
        for size in reversed(MINI_BATCHES[workload.device.type]):
            step = Peer(workload).training_step(pairs, 0.0, hard_negatives=0, mini_batch=size)
            warm_up = Peer(workload).training_step(size, 0.0, hard_negatives=0, mini_batch=size)
            seconds, is_default = once.median_seconds(step, warm_up), size == 32
            setting = f"{pairs:,} pairs, chunks of {size}"
            yield _pairs_figure(PEER, setting, workload, workload.encoder(), batches, seconds, is_default)


def search(workload: Workload) -> Iterator[Figure]:
    """Time exact top-k, and mining of hard negatives from vectors. There is one query per 32 documents."""
    dimension, count = workload.encoder().dimension, workload.vectors
    rng = np.random.default_rng(0)
    documents, queries = (rng.standard_normal((n, dimension), dtype=np.float32) for n in (count, max(1, count // 32)))
    size = f"{len(queries):,} queries, {count:,} documents, {dimension} dimensions"
    flops = 2.0 * len(queries) * count * dimension

    def figure(system: str, setting: str, run: Callable[[], Any]) -> Figure:
        seconds = workload.median_seconds(run, most=3)
        return Figure(system, f"{setting}: {size}", len(queries) / seconds, "queries/s", flops / seconds)

    yield figure(
        OURS, f"top {K}, from vectors on the host", lambda: top_k(queries, documents, K, device=workload.device)
    )
    if peer_version():
        on_device = [torch.from_numpy(x).to(workload.device) for x in (queries, documents)]
        yield figure(PEER, f"top {K}, from vectors on the device", lambda: Peer(workload).search(*on_device, K))
    clustered = mining.random_vectors(count, len(queries), dimension, max(1, count // 100), workload.device)
    options = MiningOptions(k=K)
    yield figure(OURS, "mining", lambda: mine(clustered.encoder, clustered.pool, options=options, vectors=clustered))


def minilm(workload: Workload) -> Iterator[Figure]:
    """Time a model of MiniLM's shape. Its forward pass is so fast that all other work matters."""
    folder = workload.folder / "minilm"
    folder.mkdir()
    shape = workload.shape | (SHAPES["minilm"] if workload.encoder().dimension > 64 else {})  # not of the tiny encoder
    small = dataclasses.replace(workload, shape=shape, folder=folder, _encoders={})
    encoder = small.encoder()
    small.ceiling = encoder_ceiling(encoder, small.dtype)
    yield _encoding(small, "cached tokens", encoder, cached=True)
    yield from _peer_encodings(small)
    yield _encoding(small, "from texts", encoder)
    yield _encoding(small, "cached tokens, compiled", compiled(encoder), cached=True)


def make_train(workload: Workload) -> Iterator[Figure]:
    """Time a real run, with loader, logging, W&B offline and checkpoints, next to the bare training step."""
    batches = [workload.batch(workload.queries, number=number) for number in range(4)]
    yield _step_figure("bare step", workload, workload.new_encoder(), batches)
    pairs = real_training(workload, workload.folder / "training")
    setting, seconds = "make train, from its first to its last log row", workload.queries / pairs
    yield _pairs_figure(OURS, setting, workload, workload.encoder(), batches, seconds)


def real_training(workload: Workload, folder: Path) -> float:
    """Run `make train` on the workload's texts, and return the pairs per second between its first and last log row."""
    folder.mkdir(parents=True)
    steps, log_every, save_every = (300, 20, 200) if workload.device.type == "cuda" else (12, 4, 6)
    _write_texts(workload.documents, folder / "data")
    save_dense(workload.encoder(), TASK, folder / "backbone")
    settings = {
        "run.dir": folder / "run",
        "tasks": f"[{TASK}]",
        f"task.{TASK}.data": folder / "data",
        "data.cache": folder / "cache",
        "data.batch_size": workload.queries,
        "data.max_length": workload.max_length,
        "data.on_leak": "ignore",
        "backbone.name": folder / "backbone",
        "backbone.dropout": 0.0,
        "backbone.attention_dropout": 0.0,
        "encoder.pooling": workload.pooling,
        "trainer.max_steps": steps,
        "trainer.accelerator": "gpu" if workload.device.type == "cuda" else "cpu",
        "trainer.precision": workload.precision,
        "trainer.log_every_n_steps": log_every,
        "checkpoint.every_n_steps": save_every,
        "evaluation.every_n_steps": 0,
        "evaluation.baselines": "false",
        "wandb.mode": "offline",
    }
    command = [sys.executable, "-m", "experiments.train", "vanilla", "scale=sample"]
    result = subprocess.run(
        [*command, *(f"{key}={value}" for key, value in settings.items())], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise RuntimeError("make train failed: " + " ".join((result.stdout + result.stderr).splitlines()[-3:]))
    rows = [row for row in read_rows(folder / "run" / "metrics.jsonl") if "train/tokens_per_second" in row]
    first, last = rows[0], rows[-1]
    return (last["step"] - first["step"]) * workload.queries / (last["time"] - first["time"])


def _write_texts(documents: Sequence[Document], folder: Path) -> None:
    """Write texts in BEIR layout: a third are queries, with a positive and a judged negative each."""
    count = max(1, len(documents) // 3)
    queries, positives, negatives = (documents[i * count : (i + 1) * count] for i in range(3))
    train = {
        query.id: {positive.id: 1, negative.id: 0}
        for query, positive, negative in zip(queries, positives, negatives, strict=True)
    }
    qrels = {"train": train, "test": dict(list(train.items())[:16])}
    corpus, queries = ({document.id: document for document in texts} for texts in ([*positives, *negatives], queries))
    write_beir(Collection(corpus, queries, qrels), folder)
