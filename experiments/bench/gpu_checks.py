"""The checks of `make bench BENCH=gpu` that need the device. Each passes, fails or does not apply."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModel, ModernBertConfig, MPNetConfig, RobertaConfig

from datamodules.packed import Tokens
from datamodules.records import UserError
from experiments.bench.workload import KINDS, OTHER_TASKS, SHAPES, TASK, Workload, wrapped
from lightning_modules.encoders import attention
from lightning_modules.encoders.base import Encoder
from lightning_modules.retrieval.compute import computing_in

NUM_TEXTS = 48  # number of texts in each equality check
LOWEST_COSINE, HIGHEST_ERROR = 0.9999, 2e-2  # bounds for bf16, compared with float32
NUM_BATCHES = {"cuda": 500, "cpu": 40}  # batches over which recompilations are counted
MAX_GRAPHS = 16
PROJECT = str(Path(__file__).parents[2])


@dataclass(frozen=True)
class Check:
    """The result of a check.

    passed: None if the check does not apply here.
    detail: figures, or why it does not apply.
    """

    name: str
    passed: bool | None
    detail: str

    @property
    def verdict(self) -> str:
        return {True: "pass", False: "FAIL", None: "skipped"}[self.passed]


def checks(workload: Workload) -> Iterator[Check]:
    """Run all checks."""
    yield from equality(workload)
    yield batch_invariance(workload)
    yield from synchronisation(workload)
    yield recompilations(workload)


# Packed and padded texts


def equality(workload: Workload) -> Iterator[Check]:
    """Compare vectors and gradients of packed texts in bf16 with padded texts in float32."""
    encoders = {f"BERT, {kind}": lambda kind=kind: workload.new_encoder(kind) for kind in KINDS}
    encoders |= {f"{family}, Vanilla": lambda family=family: _other_family(family, workload) for family in FAMILIES}
    for name, build in encoders.items():
        encoder = build()
        tokens = Tokens.pack(workload.ids[:NUM_TEXTS]).to(workload.device)
        tasks = [[TASK, *OTHER_TASKS][i % 3] for i in range(len(tokens))] if "MoE" in name else TASK
        expected = _vectors_and_gradients(encoder, tokens, tasks, "fp32", padded=True)
        packed, padded = (_vectors_and_gradients(encoder, tokens, tasks, "bf16", padded=p) for p in (False, True))
        cosine, error = _difference(packed, expected)
        padded_cosine, padded_error = _difference(padded, expected)
        yield Check(
            f"packed equals padded: {name}",
            cosine > LOWEST_COSINE and error < HIGHEST_ERROR,
            f"{packed.kernel} in bf16 against fp32: lowest cosine {cosine:.6f}, gradient error {error:.1e} "
            f"(padded in bf16: {padded_cosine:.6f}, {padded_error:.1e})",
        )


FAMILIES = ("RoBERTa", "MPNet", "ModernBERT")


def _other_family(family: str, workload: Workload) -> Encoder:
    """Return a random encoder of another family. ModernBERT's windows are shorter than the texts."""
    sizes = {"vocab_size": 30_522, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
    torch.manual_seed(0)
    if family in ("RoBERTa", "MPNet"):
        config_class = RobertaConfig if family == "RoBERTa" else MPNetConfig
        config = config_class(**sizes, intermediate_size=512, max_position_embeddings=514, pad_token_id=1)
    else:
        config = ModernBertConfig(
            **sizes, intermediate_size=256, local_attention=64, global_attn_every_n_layers=2, pad_token_id=0
        )
    options = {} if family == "ModernBERT" else {"add_pooling_layer": False}
    backbone = AutoModel.from_config(config, **options)
    return wrapped("Vanilla", backbone, workload.tokenizer, workload.pooling, workload.max_length).to(workload.device)


@dataclass
class _Result:
    """Vectors (B, D), the concatenated gradients of all parameters, and the attention kernels used."""

    vectors: Tensor
    gradients: Tensor
    kernel: str


def _vectors_and_gradients(
    encoder: Encoder, tokens: Tokens, tasks: str | list[str], precision: str, padded: bool
) -> _Result:
    """Compute vectors, and the gradients of their dot products with fixed random vectors."""
    encoder.eval().zero_grad(set_to_none=True)
    kernels: dict[str, None] = {}
    choose = attention.choose_kernel

    def chosen(*arguments: object) -> Callable[..., Tensor]:
        kernel = attention.attend_padded if padded else choose(*arguments)
        kernels[kernel.__name__.removeprefix("attend_")] = None
        return kernel

    with mock.patch.object(attention, "choose_kernel", chosen), computing_in(precision, encoder.device):
        vectors = encoder(tokens, tasks).float()
    generator = torch.Generator(encoder.device).manual_seed(1)
    vectors.mul(torch.randn(vectors.shape, generator=generator, device=vectors.device)).sum().backward()
    gradients = [p.grad.float().flatten() for p in encoder.parameters() if p.grad is not None]
    return _Result(vectors.detach(), torch.cat(gradients), " and ".join(kernels))


def _difference(result: _Result, expected: _Result) -> tuple[float, float]:
    """Return the lowest cosine between the two vectors of a text, and the relative error of the gradients."""
    cosine = torch.cosine_similarity(result.vectors.double(), expected.vectors.double()).min()
    error = (result.gradients - expected.gradients).norm() / expected.gradients.norm()
    return float(cosine), float(error)


def batch_invariance(workload: Workload) -> Check:
    """Check that vectors have the same bits in three packings."""
    name = "batch-invariant vectors have the same bits in three packings"
    encoder, documents = workload.encoder(), workload.documents[:256]
    token_budget = max(int(workload.lengths[: len(documents)].sum()) // 7, 16 * workload.max_length)
    orders = torch.randperm(len(documents)), torch.arange(0, len(documents), 3)
    try:
        with workload.computing():
            first = encoder.encode(documents, TASK, batch_invariant=True, token_budget=token_budget)
            others = [
                encoder.encode([documents[row] for row in order], TASK, batch_invariant=True, token_budget=token_budget)
                for order in orders
            ]
            plain = encoder.encode([documents[row] for row in orders[0]], TASK, token_budget=token_budget)
    except UserError as error:
        return Check(name, None, str(error))
    differing = sum(int((first[rows] != other).any(1).sum()) for rows, other in zip(orders, others, strict=True))
    without = int((first[orders[0]] != plain).any(1).sum())
    detail = f"{differing} of {sum(map(len, orders))} vectors differ; without batch_invariant, {without}"
    return Check(name, differing == 0, detail)


# Waiting and compiling


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Raise RuntimeError whenever the host would wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def synchronisation(workload: Workload) -> Iterator[Check]:
    """Take training steps in which the host must not wait for the GPU."""
    for kind in (*KINDS, "GradCache"):
        name = f"a training step never waits for the device: {kind}"
        if workload.device.type != "cuda":
            yield Check(name, None, "needs a GPU: on a CPU, the host does the computing")
            continue
        encoder = workload.new_encoder(kind if kind in KINDS else "Vanilla")
        pairs = workload.queries * (8 if kind == "GradCache" else 1)
        step = workload.training_step(encoder, [workload.batch(pairs)], grad_cache=kind == "GradCache")
        step()  # creates the state of the optimizer and the handles of libraries
        torch.cuda.synchronize()
        try:
            with no_synchronisation():
                step()
        except RuntimeError as error:
            yield Check(name, False, f"{str(error).splitlines()[0]} ({_place(error)})")
        else:
            yield Check(name, True, f"{pairs} queries")


def _place(error: BaseException) -> str:
    """Return the innermost line of this project in a traceback."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(PROJECT)]
    return f"{Path(frames[-1].filename).relative_to(PROJECT)}:{frames[-1].lineno}" if frames else "in a library"


def recompilations(workload: Workload) -> Check:
    """Count the graphs that torch.compile makes for batches of mixed sizes and tasks, with and without gradients.

    The encoder is tiny, because the number of graphs does not depend on its size.
    """
    encoder = replace(workload, shape=SHAPES["tiny"]).new_encoder("MoE")
    encoder.compile()
    tasks, num_batches = (TASK, *OTHER_TASKS), NUM_BATCHES[workload.device.type]
    generator = torch.Generator().manual_seed(0)
    counters.clear()
    counts: list[int] = []
    for number in range(num_batches):
        size = int(torch.randint(1, 24, (), generator=generator))
        first = int(torch.randint(len(workload.ids), (), generator=generator))
        ids = list(chain(workload.ids[first:], workload.ids))[:size]
        tokens = Tokens.pack(sorted(ids, key=len)).to(workload.device)
        training = number % 4 != 0
        encoder.train(training)
        with torch.set_grad_enabled(training), workload.computing():
            vectors = encoder(tokens, tasks[number % 3])
        if training:
            vectors.float().square().mean().backward()
        counts.append(counters["stats"]["unique_graphs"])
    early = counts[len(counts) // 5]
    detail = f"{counts[-1]} graphs in {num_batches} batches, {counts[-1] - early} of them after the first fifth"
    return Check("few recompilations in mixed batches", 0 < counts[-1] <= MAX_GRAPHS, detail)
