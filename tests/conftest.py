"""Fixtures: a small random BERT, collections of a few documents, and no network."""

import logging
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Sequence
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HOME"] = tempfile.mkdtemp(prefix="home-")  # the default of data.cache is in it
os.environ.update(MAKEFLAGS="", MFLAGS="", MAKELEVEL="")  # those of `make test` must not reach tests that run make

import pytest
import torch

import datamodules.tokens
from datamodules.batches import BatchOptions, MultiTaskDataModule
from datamodules.packed import Tokens
from datamodules.readers.beir import write_beir
from datamodules.records import Collection, Document, Task
from datamodules.sample import SampleReader
from datamodules.tasks import ClassificationDataModule, LinkPredictionDataModule, SearchDataModule
from datamodules.tokens import Encoding, TokenCache, tokenise_ahead
from lightning_modules.encoders.backbone import random_backbone, word_vocabulary
from lightning_modules.encoders.moe import MoEEncoder
from lightning_modules.encoders.shared import SharedEncoder
from lightning_modules.encoders.text_features import TextFeatures

TASKS = {"classification": "classification", "link_prediction": "link_prediction", "search": "search"}
SMALL_BERT = {  # fields of transformers.BertConfig; four layers, unless a test sets fewer
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
WORDS = [f"{a}{b}" for a in "bcdfglmnprst" for b in ("ara", "eli", "omu", "ito", "una")]

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread():
    """Sums differ in their last bits with the number of threads, so no test may leave more to the next."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def logging_of_one_test():
    """A command configures the logging of its process. In the next test, its messages would still be captured."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


@pytest.fixture
def time_limit():
    """Raise TimeoutError after a minute, in a test of something that would never end."""

    def late(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.fixture
def token_cache(monkeypatch):
    """An empty cache of token ids, for texts of nine documents or more."""
    cache = TokenCache(1 << 20)
    monkeypatch.setattr(datamodules.tokens, "CACHE", cache)
    monkeypatch.setattr(datamodules.tokens, "MIN_CACHED", 9)
    return cache


@pytest.fixture
def tokenised(monkeypatch):
    """The texts that were tokenised, piece by piece, without those of the cache."""
    pieces, tokenise = [], Encoding._tokenise

    def recorded(self, texts, snapshot):
        pieces.append(texts)
        return tokenise(self, texts, snapshot)

    monkeypatch.setattr(Encoding, "_tokenise", recorded)
    return pieces


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HOME"], ignore_errors=True)


packed = Tokens.from_padded


def padded_tokens(*lengths: int):
    """Return random token ids of texts, and their attention mask, (B, longest). Equal lengths give equal ids."""
    ids = torch.randint(5, 60, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(7))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def separate(encoder):
    """Change the parameters of each expert, so that all experts differ, and return the encoder."""
    torch.manual_seed(99)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if ".experts." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def text_of(*numbers: int) -> str:
    return " ".join(WORDS[n % len(WORDS)] for n in numbers)


def toy_collection(num_queries: int = 12, num_documents: int = 10, papers: bool = False) -> Collection:
    """Make a collection in which query i has positives i (grade 1) and i + 1 (grade 2), and hard negative i + 2.

    papers: whether queries are the first documents of the corpus. The document numbers above are then one higher.
    """
    corpus = {f"d{i}": Document(f"d{i}", text_of(i), text_of(i, i + 3, i + 5)) for i in range(num_documents)}
    if papers:
        queries = {key: corpus[key] for key in list(corpus)[:num_queries]}
    else:
        queries = {f"q{i}": Document(f"q{i}", "", text_of(i, i + 7)) for i in range(num_queries)}
    qrels = {}
    for i, query in enumerate(queries):
        first = i + 1 if papers else i  # a paper does not cite itself
        qrels[query] = {
            f"d{first % num_documents}": 1,
            f"d{(first + 1) % num_documents}": 2,
            f"d{(first + 2) % num_documents}": 0,
        }
    return Collection(corpus, queries, {"train": qrels, "dev": qrels, "test": qrels})


def with_features(encoder, documents: Sequence[Document], size: int = 3):
    """Give documents random features, whose projection is not 0, and return the encoder."""
    random = torch.Generator().manual_seed(3)
    features = encoder.features["positions"] = TextFeatures(size, encoder.dimension)
    ((table,),) = [list(tokenise_ahead([(Encoding(encoder.tokenizer, "", encoder.max_length), documents)]))]
    features.fill(list(table), torch.randn(len(documents), size, generator=random).numpy(), encoder.max_length)
    with torch.no_grad():
        features.projection.weight.copy_(torch.randn(encoder.dimension, size, generator=random))
    return encoder


def trainer_on(device: str = "cpu", global_rank: int = 0, world_size: int = 1) -> SimpleNamespace:
    """Return what a data module reads of its trainer."""
    strategy = SimpleNamespace(root_device=torch.device(device))
    ranks = {"global_rank": global_rank, "world_size": world_size, "num_devices": world_size, "strategy": strategy}
    return SimpleNamespace(**ranks, max_steps=-1, max_epochs=1, accumulate_grad_batches=1)


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    return unused_port()


@pytest.fixture(scope="session")
def vocabulary():
    return word_vocabulary([*WORDS, "title text query"], 400)


@pytest.fixture
def make_backbone(vocabulary):
    def make(seed: int = 0, num_layers: int = 4, **config):
        torch.manual_seed(seed)
        return random_backbone(SMALL_BERT | {"num_hidden_layers": num_layers} | config, vocabulary)

    return make


@pytest.fixture
def make_encoder(make_backbone):
    """Make an encoder: shared, or with experts in attention, ffn or both. Equal seeds give equal backbones."""

    def make(kind: str = "attention", seed: int = 0, tasks=None, config=None, **arguments):
        backbone, tokenizer = make_backbone(seed, **(config or {}))
        arguments = {"max_length": 32} | arguments
        if kind == "shared":
            return SharedEncoder(backbone, tokenizer, tasks or TASKS, **arguments)
        sub_layers = {"attention": kind in ("attention", "both"), "ffn": kind in ("ffn", "both")}
        return MoEEncoder(backbone, tokenizer, tasks or TASKS, **sub_layers, **arguments)

    return make


@pytest.fixture
def make_task(make_backbone):
    """Make the data module of one task."""

    def make(kind, name: str = "search", collection: Collection | None = None, **options):
        _, tokenizer = make_backbone()
        collection = collection or toy_collection()
        settings = {"batch_size": 4, "num_batches": 8, "max_length": 32} | options
        data = kind(Task(name, name), {"toy": collection}, BatchOptions(**settings), tokenizer)
        data.setup()
        return data

    return make


@pytest.fixture
def three_tasks(make_backbone, make_task):
    """Three tasks in turns, twelve batches. The judgements of search are the opposite of those of classification."""
    kinds = (ClassificationDataModule, LinkPredictionDataModule, SearchDataModule)
    toy = toy_collection()
    opposite = {
        query: {d: int(grade == 0) for d, grade in grades.items()} for query, grades in toy.qrels["train"].items()
    }
    collections = (toy, toy_collection(10, 10, papers=True), Collection(toy.corpus, toy.queries, {"train": opposite}))
    tasks = []
    for kind, name, collection in zip(kinds, TASKS, collections, strict=True):
        task = make_task(kind, name, collection)
        task.readers = {name: task.readers["toy"]}
        tasks.append(task)
    options = BatchOptions(batch_size=4, num_batches=12, max_length=32, token_budget=64)
    data = MultiTaskDataModule(tasks, options, make_backbone()[1])
    data.setup()
    return data


@pytest.fixture(scope="session")
def beir_root(tmp_path_factory):
    """The sample's collections as BEIR folders, under the names that the small and paper scales expect."""
    root = tmp_path_factory.mktemp("beir")
    for view, folders in {
        "topics": ("arxiv_cats", "maple_cs", "maple_mesh", "maple_coarse"),
        "citations": ("mlcite", "cite_prediction"),
        "searches": ("scitldr", "scirepeval_search", "scirepeval_search_test"),
    }.items():
        collection = SampleReader(view, num_papers=500).read()
        for folder in folders:
            write_beir(collection, root / folder)
    return root
