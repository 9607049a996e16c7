"""Papers that are annotated for one task only, for tests of losses that transfer from one task to another.

A paper has a field and a topic, and its text has words of both. Labels have words of their own. The tasks:

    fields   classification    the field of a paper
    topics   classification    the topic of a paper
    links    link prediction   papers cite a few of their topic; relevant to test papers are all papers of the topic
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from datamodules.batches import BatchOptions, MultiTaskDataModule
from datamodules.records import Collection, Document, Task
from datamodules.tasks import ClassificationDataModule, LinkPredictionDataModule
from lightning_modules.encoders.backbone import random_backbone, word_vocabulary
from tests.conftest import SMALL_BERT

KINDS = {"fields": ClassificationDataModule, "topics": ClassificationDataModule, "links": LinkPredictionDataModule}
WORDS_IN_TEXT = 4  # of the field, and of the topic
CITATIONS = 3


@dataclass(frozen=True)
class PartialWorld:
    """Collections by task. Their test splits have the same papers, which are not among the training papers.

    relation: probability of each topic, given the field, (F, T).
    fields, topics: field and topic of each paper, training papers first.
    """

    relation: np.ndarray
    fields: np.ndarray
    topics: np.ndarray
    collections: dict[str, Collection]

    def data(self, **options) -> MultiTaskDataModule:
        """Return the data module, after its setup. options: fields of BatchOptions."""
        options = BatchOptions(**({"max_length": 32} | options))
        tasks = [KINDS[name](Task(name), {name: collection}) for name, collection in self.collections.items()]
        data = MultiTaskDataModule(tasks, options, self.backbone()[1])
        data.setup()
        return data

    def backbone(self, seed: int = 0, **config):
        """Return a random BERT of two layers and 32 dimensions that knows all words, and its tokenizer."""
        documents = [d for c in self.collections.values() for d in (*c.corpus.values(), *c.queries.values())]
        shape = SMALL_BERT | {"num_hidden_layers": 2} | config
        torch.manual_seed(seed)
        return random_backbone(shape, word_vocabulary((document.text for document in documents), 4000))


def partial_world(
    seed: int,
    relation: np.ndarray | None = None,
    tasks: Sequence[str] = ("fields", "topics"),
    num_papers: int = 96,
    num_test: int = 96,
    words_per_value: int = 16,
    share_of_both: float = 0.0,
) -> PartialWorld:
    """Make a world in which each training paper is annotated for one of the tasks, drawn at random.

    relation: probability of each topic, given the field, (F, T); by default eight fields determine eight topics. With
        np.full((8, 8), 1 / 8) they are unrelated.
    num_papers: number of training papers.
    words_per_value: number of words that texts on a field or topic draw from. The more, the less a paper teaches.
    share_of_both: share of the training papers that are annotated for all tasks.
    """
    rng = np.random.default_rng(seed)
    relation = np.eye(8) if relation is None else relation
    total = num_papers + num_test
    fields = rng.permutation(np.arange(total) % len(relation))
    topics = np.array([rng.choice(relation.shape[1], p=relation[field]) for field in fields])
    papers = []
    for number, values in enumerate(zip(fields, topics, strict=True)):
        words = [
            _word(kind, value, word)
            for kind, value in zip(("field", "topic"), values, strict=True)
            for word in rng.choice(words_per_value, WORDS_IN_TEXT, replace=False)
        ]
        papers.append(Document(f"paper{number}", "", " ".join(rng.permutation(words))))
    task_of = rng.permutation(np.arange(num_papers) % len(tasks))
    has_all = rng.random(num_papers) < share_of_both
    test, collections = np.arange(num_papers, total), {}
    for number, task in enumerate(tasks):
        train = np.flatnonzero((task_of == number) | has_all)
        if task == "links":
            collections[task] = _links(papers, topics, train, test, rng)
        else:
            values, count = (fields, relation.shape[0]) if task == "fields" else (topics, relation.shape[1])
            labels = [Document(f"{task}{value}", "", _word(f"{task}label", value, 0)) for value in range(count)]
            positives = {n: [labels[values[n]].id] for n in (*train, *test)}
            collections[task] = _collection(labels, papers, positives, train, test)
    return PartialWorld(relation, fields, topics, collections)


def _word(kind: str, value: int, number: int) -> str:
    return kind + "".join(chr(ord("a") + digit) for digit in (value, number // 20, number % 20))


def _links(papers, topics, train, test, rng) -> Collection:
    positives = {}
    for n in train:
        cited = rng.permutation([m for m in train if topics[m] == topics[n] and m != n])[:CITATIONS]
        positives[n] = [papers[m].id for m in cited]
    for n in test:  # the few that a paper cites are a draw that no model can predict
        positives[n] = [papers[m].id for m in (*train, *test) if topics[m] == topics[n] and m != n]
    return _collection([papers[n] for n in (*train, *test)], papers, positives, train, test)


def _collection(corpus, papers, positives, train, test) -> Collection:
    queries = {papers[n].id: papers[n] for n in (*train, *test)}
    qrels = {
        split: {papers[n].id: dict.fromkeys(positives[n], 1) for n in numbers if positives[n]}
        for split, numbers in (("train", train), ("test", test))
    }
    return Collection({document.id: document for document in corpus}, queries, qrels)
