"""Papers that cite each other by topic and are labelled by field, with graded relevance that depends on both.

A paper's text has words of its topic and of its field. Relevant to a query are papers of its topic (grade 2) and other
papers of its field (grade 1). The tasks are `links`, with the citations of some of the training papers, and `fields`,
with the field of each training paper.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from datamodules.batches import BatchOptions, MultiTaskDataModule
from datamodules.records import Collection, Document, Task
from datamodules.tasks import ClassificationDataModule, LinkPredictionDataModule
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.backbone import random_backbone, set_dropout, word_vocabulary
from lightning_modules.encoders.moe import MoEEncoder
from lightning_modules.objective_options import ObjectiveOptions
from lightning_modules.optim import OptimOptions
from lightning_modules.retrieval.evaluation import evaluate
from tests.conftest import SMALL_BERT
from tests.lightning_modules.quiet_trainer import quiet_trainer

TRAIN, TEST = 96, 64  # papers
TOPICS, FIELDS = 12, 4  # numbers of them; 8 of both if they are the same
WORDS, CITATIONS = 4, 3  # words of each facet in a text, and citations of a paper
TASKS = {"links": "links", "fields": "fields"}
OBJECTIVE = ObjectiveOptions(similarity="cosine", temperature=0.1)


def word(facet: str, value: int, number: int) -> str:
    return facet + chr(ord("a") + value) + chr(ord("a") + number)


@cache
def world(same_facet: bool, citing: int, shuffled: bool) -> dict[str, Collection]:
    """Return the collections of links and fields. The test split of links is graded.

    same_facet: whether the field of a paper is its topic; otherwise the two are independent.
    citing: number of training papers with citations.
    shuffled: whether training papers have the fields of other papers.
    """
    rng = np.random.default_rng(0)
    numbers = np.arange(TRAIN + TEST)
    topics, fields = (numbers % 8, numbers % 8) if same_facet else (numbers % TOPICS, rng.permutation(numbers % FIELDS))
    papers = []
    for number, (topic, field) in enumerate(zip(topics, fields, strict=True)):
        words = [word("topic", topic, w) for w in rng.choice(16, WORDS, replace=False)]
        words += [word("field", field, w) for w in rng.choice(16, WORDS, replace=False)]
        papers.append(Document(f"p{number}", "", " ".join(rng.permutation(words))))
    cited, graded = {}, {}
    for number in range(TRAIN + TEST):
        others = [n for n in range(TRAIN) if n != number]
        if number < citing:
            same = [n for n in others if topics[n] == topics[number]]
            cited[f"p{number}"] = {f"p{n}": 1 for n in rng.choice(same, CITATIONS, replace=False)}
        grades = {n: 2 * (topics[n] == topics[number]) or int(fields[n] == fields[number]) for n in others}
        if number >= TRAIN:
            graded[f"p{number}"] = {f"p{n}": int(grade) for n, grade in grades.items() if grade}
    given = rng.permutation(fields[:TRAIN]) if shuffled else fields[:TRAIN]
    texts = {paper.id: paper for paper in papers}
    labels = {f"f{value}": Document(f"f{value}", word("label", value, 0)) for value in np.unique(fields)}
    return {
        "links": Collection(dict(list(texts.items())[:TRAIN]), texts, {"train": cited, "test": graded}),
        "fields": Collection(labels, texts, {"train": {f"p{n}": {f"f{v}": 1} for n, v in enumerate(given)}}),
    }


def trained(folder, collections, seed, loss, steps=150):
    """Train an encoder whose tasks share only word vectors, and return the module and its data."""
    texts = [
        document.text + document.title
        for c in collections.values()
        for document in (*c.corpus.values(), *c.queries.values())
    ]
    shape = SMALL_BERT | {"num_hidden_layers": 1, "max_position_embeddings": 32}
    torch.manual_seed(seed)
    backbone, tokenizer = random_backbone(shape, word_vocabulary(texts, 1000))
    set_dropout(backbone, 0.0, 0.0)
    kinds = {"links": LinkPredictionDataModule, "fields": ClassificationDataModule}
    tasks = [kinds[name](Task(name), {name: collection}) for name, collection in collections.items()]
    data = MultiTaskDataModule(tasks, BatchOptions(batch_size=32, max_length=16, num_workers=0, seed=seed), tokenizer)
    data.setup()
    encoder = MoEEncoder(
        backbone, tokenizer, TASKS, attention=True, ffn=True, layers="all", pooling="mean", max_length=16
    )
    module = ContrastiveModule(
        encoder,
        **vars(OBJECTIVE),
        total_steps=steps,
        optim=OptimOptions(lr=6e-3, schedule="constant", warmup=0.0),
        losses={"extra": loss},
    )
    quiet_trainer(folder, max_steps=steps).fit(module, data)
    return module, data


def measured(module, data):
    """Return nDCG@20 of each test query of links, (Q,), and the mean cosine of two papers."""
    encoder, (links, _) = module.encoder.eval(), data.tasks
    result = evaluate(encoder, links.benchmarks("test")[0], ["ndcg@20"])
    vectors = torch.nn.functional.normalize(encoder.encode(list(links.documents[:TRAIN]), "links"), dim=1)
    cosines = (vectors @ vectors.T).numpy()[np.triu_indices(TRAIN, 1)]
    return result.query_values.values[:, 0], float(cosines.mean())
