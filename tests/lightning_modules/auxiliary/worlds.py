"""Papers that are annotated for one task only, for tests of losses that transfer from one task to another.

A paper has a field and a topic, and its text has words of both. Labels have words of their own. The tasks:

    fields   classification    the field of a paper
    topics   classification    the topic of a paper
    links    link prediction   papers of the same topic cite each other
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from datamodules.batches import BatchOptions, MultiTaskDataModule
from datamodules.records import Collection, Document, Task
from datamodules.tasks import ClassificationDataModule, LinkPredictionDataModule
from lightning_modules.encoders.backbone import random_backbone, word_vocabulary

KINDS = {"fields": ClassificationDataModule, "topics": ClassificationDataModule, "links": LinkPredictionDataModule}
WORDS_PER_VALUE, WORDS_IN_TEXT, CITATIONS = 16, 4, 3


@dataclass(frozen=True)
class PartialWorld:
    """Collections by task. Their test split has the same papers, and no training paper is in it.

    relation: probability of each topic, given the field, (F, T).
    fields, topics: field and topic of each paper, training papers first, (papers,).
    """

    relation: np.ndarray
    fields: np.ndarray
    topics: np.ndarray
    collections: dict[str, Collection]

    def data(self, **options) -> MultiTaskDataModule:
        """Return the data module, after its setup. options: fields of BatchOptions."""
        tasks = [KINDS[name](Task(name), {name: collection}) for name, collection in self.collections.items()]
        data = MultiTaskDataModule(tasks, BatchOptions(**({"max_length": 32} | options)), self.backbone(0)[1])
        data.setup()
        return data

    def backbone(self, seed: int, **config):
        """Return a random BERT of two layers and 32 dimensions that knows all words, and its tokenizer."""
        import torch

        texts = [
            f"{d.title} {d.text}" for c in self.collections.values() for d in (*c.corpus.values(), *c.queries.values())
        ]
        shape = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
        }
        torch.manual_seed(seed)
        return random_backbone(shape | config, word_vocabulary(texts, 4000))


def partial_world(
    seed: int,
    relation: np.ndarray | None = None,
    tasks: Sequence[str] = ("fields", "topics"),
    num_papers: int = 96,
    num_test: int = 96,
    share_of_both: float = 0.0,
) -> PartialWorld:
    """Make a world in which each training paper is annotated for one of the tasks, drawn at random.

    relation: probability of each topic, given the field, (F, T); by default eight of each, in pairs.
    share_of_both: share of the training papers that are annotated for all tasks.
    """
    rng = np.random.default_rng(seed)
    relation = np.eye(8) if relation is None else relation
    total = num_papers + num_test
    fields = rng.permutation(np.arange(total) % len(relation))
    topics = np.array([rng.choice(relation.shape[1], p=relation[field]) for field in fields])
    papers = [_paper(number, fields[number], topics[number], rng) for number in range(total)]
    annotated = rng.permutation(np.arange(num_papers) % len(tasks))  # number of the one task of each training paper
    both = rng.random(num_papers) < share_of_both
    collections = {}
    for number, task in enumerate(tasks):
        train = np.flatnonzero((annotated == number) | both)
        test = np.arange(num_papers, total)
        collections[task] = _collection(task, papers, fields, topics, relation.shape, train, test, rng)
    return PartialWorld(relation, fields, topics, collections)


def _word(kind: str, value: int, number: int) -> str:
    return kind + "".join(chr(ord("a") + digit) for digit in (value, number // 20, number % 20))


def _paper(number: int, field: int, topic: int, rng: np.random.Generator) -> Document:
    words = [
        _word(kind, value, word)
        for kind, value in (("field", field), ("topic", topic))
        for word in rng.choice(WORDS_PER_VALUE, WORDS_IN_TEXT, replace=False)
    ]
    return Document(f"paper{number}", "", " ".join(rng.permutation(words)))


def _collection(task, papers, fields, topics, shape, train, test, rng) -> Collection:
    """Return the collection of a task. train, test: numbers of its papers."""
    values = fields if task == "fields" else topics
    if task == "links":
        corpus = {papers[n].id: papers[n] for n in (*train, *test)}
        linked = {n: [m for m in train if topics[m] == topics[n] and m != n] for n in (*train, *test)}
        positives = {n: [papers[m].id for m in rng.permutation(others)[:CITATIONS]] for n, others in linked.items()}
    else:
        count = shape[task == "topics"]
        corpus = {f"{task}{v}": Document(f"{task}{v}", _word(f"{task}label", v, 0)) for v in range(count)}
        positives = {n: [f"{task}{values[n]}"] for n in (*train, *test)}
    qrels = {
        split: {papers[n].id: dict.fromkeys(positives[n], 1) for n in numbers if positives[n]}
        for split, numbers in (("train", train), ("test", test))
    }
    queries = {papers[n].id: papers[n] for n in (*train, *test)}
    return Collection(corpus, queries, qrels)
