"""Helpers for the benchmarks: random models and texts, training steps, times and memory."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import numpy as np
import torch
from torch import nn
from transformers import BertTokenizer

from datamodules.batches import Collator
from datamodules.packed import ContrastiveBatch
from datamodules.records import Example
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.backbone import SPECIAL_TOKENS, random_backbone
from lightning_modules.encoders.base import Encoder

VOCABULARY = 30_522  # size of BERT's vocabulary
DEVICES = "auto (a GPU if there is one), cpu, cuda or cuda:N"  # help of the option device
T = TypeVar("T")
Run = Callable[[], object]


def backbone_of(size: Mapping[str, int], num_words: int = 1000) -> tuple[nn.Module, BertTokenizer]:
    """Return a random BERT and its tokenizer, whose words are t0, t1, ...

    size: dict with "layers" and "hidden".
    """
    torch.manual_seed(0)
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *(f"t{i}" for i in range(num_words))])}
    config = {
        "hidden_size": size["hidden"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": math.gcd(size["hidden"], max(1, size["hidden"] // 64)),  # a divisor of the width
        "intermediate_size": 4 * size["hidden"],
    }
    return random_backbone(config, vocabulary)


def tasks_of(count: int) -> dict[str, str]:
    """Return tasks, each with its own expert."""
    return {f"task{i}": f"expert{i}" for i in range(count)}


def random_pairs(task: str, pairs: int, tokens: int, token_budget: int, seed: int = 0) -> ContrastiveBatch:
    """Return queries with one positive each. All texts have `tokens` random tokens of VOCABULARY."""
    texts = np.random.default_rng(seed).integers(5, VOCABULARY, (2 * pairs, tokens))
    return batch_of(task, texts, pairs, token_budget)


def batch_of(
    task: str, texts: Sequence[np.ndarray], pairs: int, token_budget: int, hard_negatives: int = 0, number: int = 0
) -> ContrastiveBatch:
    """Return a batch: the first texts are the queries, then come their positives, then hard negatives.

    texts: token ids. number: number of the batch, which seeds its dropout.
    """
    examples = [Example(i, (pairs + i,), (1,), (2 * pairs + i,) * hard_negatives, (pairs + i,)) for i in range(pairs)]
    budgets = {"token_budget": token_budget, "num_hard_negatives": hard_negatives}
    return Collator(task, examples, texts, **budgets, seed=number)([(i, 0) for i in range(pairs)], number)


def module_of(encoder: Encoder, grad_cache: bool = False) -> ContrastiveModule:
    """Return a module that trains the encoder, on its device."""
    module = ContrastiveModule(encoder, grad_cache=grad_cache, total_steps=10**6, similarity="cosine", temperature=0.05)
    return module.to(encoder.device).train()


def training_step(
    encoder: Encoder,
    batches: Sequence[ContrastiveBatch],
    computing: Callable[[], AbstractContextManager] = nullcontext,
    grad_cache: bool = False,
) -> Callable[[], None]:
    """Return a function that trains on the next of some batches: forward, backward, clipping and fused AdamW."""
    module = module_of(encoder, grad_cache)
    optimizer, rotation = module.configure_optimizers()["optimizer"], itertools.cycle(batches)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with computing():
            loss = module.training_step(next(rotation), 0)["loss"]
        loss.backward()
        module.configure_gradient_clipping(optimizer, 1.0)
        optimizer.step()

    return step


def seconds(function: Run) -> float:
    """Return the time of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def time_ratio(function: Run, base: Run, rounds: int) -> float:
    """Return the median ratio of the times of two functions, which take turns in running first."""
    function(), base()  # warm up
    ratios = []
    for i in range(rounds):
        times = {each: seconds(each) for each in ((function, base) if i % 2 else (base, function))}
        ratios.append(times[function] / times[base])
    return statistics.median(ratios)


def in_new_process(function: Callable[..., T], *arguments: object) -> T:
    """Call a function in a new process, whose memory is free of earlier calls."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
