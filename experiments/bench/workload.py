"""Workload of the benchmarks: texts of realistic lengths, encoders of a given shape, and training batches."""

from __future__ import annotations

import random
import statistics
import string
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertTokenizer

from datamodules.packed import ContrastiveBatch, Tokens
from datamodules.records import Document, UserError
from datamodules.text import input_text, length_sorted_chunks, token_ids
from experiments.bench.timing import batch_of, training_step
from lightning_modules.encoders.backbone import SPECIAL_TOKENS, random_backbone, set_dropout
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.instruct import InstructEncoder
from lightning_modules.encoders.moe import MoEEncoder
from lightning_modules.encoders.shared import SharedEncoder
from lightning_modules.retrieval.compute import computing_in, default_token_budget
from lightning_modules.throughput import computing_dtype, synchronize

TASK, OTHER_TASKS = "search", ("classification", "link_prediction")
INSTRUCTION = "find a paper that a reader of this paper will want to read next"  # as long as the paper's instructions
KINDS = ("Vanilla", "MoE", "instruct")
SHAPES: dict[str, dict[str, int]] = {
    "bert-base": {},  # the defaults of transformers
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256},
}
NUM_WORDS, NUM_SUFFIXES = 28_000, 2465  # with special tokens and letters, BERT's 30,522
SPLIT_WORDS = 0.2  # share of words that split into two tokens
SPREAD = 0.43  # standard deviation of log(length); titles with abstracts: 90th percentile = 1.74 * median


@dataclass
class Workload:
    """Texts and models on a device.

    precision: precision of forward passes and training steps, such as "bf16".
    shape: fields of transformers.BertConfig.
    documents: papers with a title and an abstract.
    queries: number of queries in a training batch, each with a positive and a hard negative.
    cached_pairs: number of pairs in a batch with GradCache.
    vectors: number of documents to search.
    seconds: minimum time per figure, which is the median of all runs in this time.
    folder: empty folder for files.
    """

    device: torch.device
    precision: str
    shape: dict[str, int]
    documents: list[Document]
    tokenizer: BertTokenizer
    max_length: int
    pooling: str
    queries: int
    cached_pairs: int
    vectors: int
    seconds: float
    folder: Path
    ceiling: float = 0.0  # speed of a matrix product of the encoder's width, in FLOP/s
    _encoders: dict[str, Encoder] = field(default_factory=dict)

    @cached_property
    def texts(self) -> list[str]:
        return [input_text(document, self.tokenizer.sep_token) for document in self.documents]

    @cached_property
    def ids(self) -> list[np.ndarray]:
        """Token ids of each text."""
        return [np.asarray(ids, np.int32) for ids in token_ids(self.texts, self.tokenizer, self.max_length)]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each text, (n,)."""
        return np.array([len(ids) for ids in self.ids])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrix products."""
        return computing_dtype(self.precision)

    def computing(self) -> AbstractContextManager:
        """Compute in the precision of the workload, as training and `make embed` do."""
        return computing_in(self.precision, self.device)

    def encoder(self, kind: str = "Vanilla") -> Encoder:
        """Return the encoder of a kind, with random weights and no dropout. It is built once per kind."""
        if kind not in self._encoders:
            self._encoders[kind] = self.new_encoder(kind)
            set_dropout(self._encoders[kind].backbone, 0.0, 0.0)
        return self._encoders[kind]

    def new_encoder(self, kind: str = "Vanilla") -> Encoder:
        torch.manual_seed(0)
        with self.device:
            backbone, _ = random_backbone(self.shape, self.tokenizer.get_vocab())
        return wrapped(kind, backbone, self.tokenizer, self.pooling, self.max_length).to(self.device)

    def packed(self) -> list[Tokens]:
        """Return all texts as batches on the device."""
        chunks = length_sorted_chunks([len(text) for text in self.ids], default_token_budget(self.device))
        return [Tokens.pack(self.ids[row] for row in rows).to(self.device) for rows in chunks]

    def batch(self, pairs: int, hard_negatives: int = 1, number: int = 0) -> ContrastiveBatch:
        """Return a training batch on the device. Texts are reused if there are too few.

        number: number of the batch; batches with different numbers have different texts.
        """
        per_query = 2 + hard_negatives
        rows = [i % len(self.ids) for i in range(number * pairs * per_query, (number + 1) * pairs * per_query)]
        texts, budget = [self.ids[row] for row in rows], default_token_budget(self.device)
        return batch_of(TASK, texts, pairs, budget, hard_negatives, number).to(self.device)

    def training_step(
        self, encoder: Encoder, batches: Sequence[ContrastiveBatch], grad_cache: bool = False
    ) -> Callable[[], None]:
        """Return a function that trains on the next of some batches, in the precision of the workload."""
        return training_step(encoder, batches, self.computing, grad_cache)

    def median_seconds(self, run: Callable[[], Any], warm_up: Callable[[], Any] | None = None, most: int = 50) -> float:
        """Call a function for `seconds`, at most `most` times, and return its median time.

        warm_up: function to call first, by default the function itself.
        """
        (warm_up or run)()
        times: list[float] = []
        synchronize(self.device)
        while not times or (sum(times) < self.seconds and len(times) < most):
            started = time.perf_counter()
            run()
            synchronize(self.device)
            times.append(time.perf_counter() - started)
        return statistics.median(times)


def wrapped(kind: str, backbone: torch.nn.Module, tokenizer: Any, pooling: str, max_length: int) -> Encoder:
    """Return an encoder of one of the KINDS."""
    tasks = {task: task for task in (TASK, *OTHER_TASKS)}
    settings = {"pooling": pooling, "max_length": max_length}
    if kind == "MoE":
        return MoEEncoder(backbone, tokenizer, tasks, **settings)
    if kind == "instruct":
        return InstructEncoder(backbone, tokenizer, tasks, dict.fromkeys(tasks, INSTRUCTION), **settings)
    return SharedEncoder(backbone, tokenizer, tasks, **settings)


def synthetic_tokenizer() -> BertTokenizer:
    """Return a WordPiece tokenizer with as many tokens as BERT's: random words and suffixes."""
    rng, letters = random.Random(0), string.ascii_lowercase

    def strings(count: int, shortest: int, longest: int) -> list[str]:
        drawn: dict[str, None] = {}
        while len(drawn) < count:
            drawn["".join(rng.choices(letters, k=rng.randint(shortest, longest)))] = None
        return list(drawn)

    pieces = [*letters, *strings(NUM_WORDS, 3, 9), *(f"##{x}" for x in (*letters, *strings(NUM_SUFFIXES, 2, 4)))]
    return BertTokenizer(vocab={token: i for i, token in enumerate(dict.fromkeys([*SPECIAL_TOKENS, *pieces]))})


def synthetic_documents(count: int, mean: float, max_length: int, tokenizer: BertTokenizer) -> list[Document]:
    """Return papers whose lengths are distributed like those of real titles with abstracts.

    mean: mean number of tokens after truncation to max_length. Raises UserError if this mean is impossible.
    """
    if not 8 <= mean < max_length:
        raise UserError(f"tokens: expected at least 8 and less than max_length ({max_length}), got {mean:g}")
    vocabulary = list(tokenizer.get_vocab())
    words = [word for word in vocabulary if word.isalpha() and len(word) > 1]
    suffixes = [piece[2:] for piece in vocabulary if piece.startswith("##") and len(piece) > 3]
    rng = np.random.default_rng(0)
    return [
        _document(i, int(length), words, suffixes, rng)
        for i, length in enumerate(_lengths(count, mean, max_length, rng))
    ]


def _lengths(count: int, mean: float, max_length: int, rng: np.random.Generator) -> np.ndarray:
    """Draw log-normal lengths, (count,). Their mean is `mean` after truncation to max_length."""
    lengths, low, high = np.exp(SPREAD * rng.standard_normal(count)), 0.0, 100.0 * max_length
    for _ in range(60):
        scale = (low + high) / 2
        if np.clip(scale * lengths, 8, max_length).mean() < mean:
            low = scale
        else:
            high = scale
    return np.clip(high * lengths, 8, 4 * max_length).round()


def _document(number: int, length: int, words: list[str], suffixes: list[str], rng: np.random.Generator) -> Document:
    """Make a document of `length` tokens, counting [CLS] and two [SEP]. Words are drawn according to Zipf's law."""
    drawn = rng.zipf(1.2, length) % len(words)
    is_split = rng.random(length) < SPLIT_WORDS
    last = int(np.searchsorted(np.cumsum(1 + is_split), length - 3, side="right"))
    endings = rng.integers(0, len(suffixes), length)
    text = [words[w] + (suffixes[e] if s else "") for w, e, s in zip(drawn[:last], endings, is_split, strict=False)]
    title = min(int(rng.integers(6, 16)), max(1, len(text) // 3))
    return Document(str(number), " ".join(text[:title]), " ".join(text[title:]))
