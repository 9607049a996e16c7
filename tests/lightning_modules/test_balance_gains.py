"""What balancing gains where one task drowns out another, and where two tasks agree.

A paper has a field and a topic, independent of each other, and its text has words of both. The tasks share one small
encoder and all papers:

    fields   a query has words of a field, and the papers of that field are relevant
    topics   unequal tasks: the same with topics, and its loss is SCALE times as large
             equal tasks:   more queries with words of a field

Unequal tasks want papers to forget what the other one needs. An encoder can serve both, because a query shows which one
it belongs to, but the sum of the gradients is almost only that of topics. So fields should gain from balancing. Equal
tasks should gain nothing.

The worlds, seeds and options were fixed before the first result, and no other world was tried. Only uncertainty_lr came
later, because learned weights hardly move at the encoder's learning rate.
"""

import dataclasses
from functools import cache, partial

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from datamodules.batches import BatchOptions, MultiTaskDataModule
from datamodules.records import Collection, Document, Task
from datamodules.tasks import SearchDataModule
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.backbone import random_backbone, set_dropout, word_vocabulary
from lightning_modules.encoders.shared import SharedEncoder
from lightning_modules.loss_weights import DynamicWeights
from lightning_modules.optim import OptimOptions
from lightning_modules.retrieval.evaluation import evaluate
from lightning_modules.task_balance import Coefficients, GradientBalance, GradNorm, GramianBalance, PCGrad
from tests.lightning_modules.paired import LONG, gain_of
from tests.lightning_modules.quiet_trainer import quiet_trainer

NAMES = ["fields", "topics"]
SEEDS = range(5)
SCALE, STEPS = 30.0, 80
VALUES, WORDS, PAPERS, TRAIN, TEST = 8, 16, 128, 48, 96  # values of a facet, words of a value; queries of each split
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
}


class EqualWeights(GradientBalance):
    """The sum of the gradients. Records their cosine, and how much longer the second is, at each step."""

    def __init__(self, tasks):
        super().__init__(tasks)
        self.cosines, self.ratios = [], []

    def coefficients(self, trainer, losses):
        products = self.gradients.products()
        norms = products.diagonal().sqrt()
        self.cosines.append((products[0, 1] / norms.prod()).item())
        self.ratios.append((norms[1] / norms[0]).item())
        return Coefficients(shared=torch.ones_like(losses), other=torch.ones_like(losses))


METHODS = {  # with their defaults, except for what would not move within 80 steps
    "dwa": partial(DynamicWeights, window=10),
    "gradnorm": GradNorm,
    "pcgrad": PCGrad,
    "mgda": partial(GramianBalance, method="mgda"),
    "upgrad": partial(GramianBalance, method="upgrad"),
}


@cache
def world(seed, unequal):
    """Return the collections of both tasks, which share their papers."""
    rng = np.random.default_rng(seed)
    values = {facet: rng.permutation(np.arange(PAPERS) % VALUES) for facet in NAMES}

    def words(facet, value):
        return [f"{facet}{chr(97 + value)}{chr(97 + n)}" for n in rng.choice(WORDS, 4, replace=False)]

    texts = [
        " ".join(rng.permutation([*words("fields", f), *words("topics", t)]))
        for f, t in zip(*values.values(), strict=True)
    ]
    corpus = {f"p{n}": Document(f"p{n}", "", text) for n, text in enumerate(texts)}
    collections = {}
    for task in NAMES:
        facet, queries, qrels = task if unequal else "fields", {}, {"train": {}, "test": {}}
        for n in range(TRAIN + TEST):
            relevant = [f"p{paper}" for paper in np.flatnonzero(values[facet] == n % VALUES)]
            split = "train" if n < TRAIN else "test"
            chosen = rng.choice(relevant, 3, replace=False) if split == "train" else relevant
            queries[f"q{n}"] = Document(f"q{n}", "", " ".join(words(facet, n % VALUES)))
            qrels[split][f"q{n}"] = dict.fromkeys(map(str, chosen), 1)
        collections[task] = Collection(corpus, queries, qrels)
    return collections


@dataclasses.dataclass
class Outcome:
    """ndcg: nDCG@10 of the test queries of each task, (2, Q). cosine: mean cosine of two papers."""

    ndcg: np.ndarray
    cosine: float


def trained(folder, seed, unequal, callback=None, **options):
    """Train an encoder with a batch of each task in each step, and evaluate it."""
    collections = world(seed, unequal)
    documents = [d for c in collections.values() for d in (*c.corpus.values(), *c.queries.values())]
    torch.manual_seed(seed)
    backbone, tokenizer = random_backbone(SHAPE, word_vocabulary((d.text for d in documents), 2000))
    set_dropout(backbone, 0.0, 0.0)
    encoder = SharedEncoder(backbone, tokenizer, dict.fromkeys(NAMES, "shared"), pooling="mean", max_length=16)
    batches = BatchOptions(batch_size=16, max_length=16, seed=seed)
    tasks = [SearchDataModule(Task(name), {name: collections[name]}, batches, tokenizer) for name in NAMES]
    data = MultiTaskDataModule(tasks, batches, tokenizer)
    data.setup()
    module = ContrastiveModule(
        encoder,
        similarity="cosine",
        temperature=0.1,
        **options,
        task_weights={"topics": SCALE} if unequal else {},
        total_steps=STEPS,
        optim=OptimOptions(lr=5e-3, schedule="constant"),
    )
    callbacks = [callback] if callback else []
    quiet_trainer(folder, max_steps=STEPS, accumulate_grad_batches=2, gradient_clip_val=1.0, callbacks=callbacks).fit(
        module, data
    )
    encoder.eval()
    results = [evaluate(encoder, task.benchmarks("test")[0], ["ndcg@10"], similarity="cosine") for task in tasks]
    vectors = normalize(encoder.encode(list(collections["fields"].corpus.values()), "fields"), dim=1).numpy()
    cosines = (vectors @ vectors.T)[np.triu_indices(PAPERS, 1)]
    return Outcome(np.stack([result.query_values.values[:, 0] for result in results]), float(cosines.mean()))


def gains(folder, unequal, methods=(*METHODS, "uncertainty"), seeds=SEEDS):
    """Return the gain of each method over equal weights by task, and cosines and ratios of gradients, (S, steps)."""
    recorders = [EqualWeights(NAMES) for _ in seeds]
    arms = {"none": [trained(folder, seed, unequal, each) for seed, each in zip(seeds, recorders, strict=True)]}
    for name in methods:
        if name == "uncertainty":
            arms[name] = [trained(folder, s, unequal, balance=name, uncertainty_lr=0.05) for s in seeds]
        else:
            arms[name] = [trained(folder, seed, unequal, METHODS[name](NAMES)) for seed in seeds]
    ndcg = {name: np.stack([each.ndcg for each in arm], 1) for name, arm in arms.items()}  # (2, S, Q)
    result = {}
    for name, values in ndcg.items():
        cosine = np.mean([each.cosine for each in arms[name]])
        print(f"{name}: nDCG@10 {values.mean((1, 2)).round(3)}, mean cosine of two papers {cosine:.2f}")
        result[name] = [gain_of(*pair) for pair in zip(values, ndcg["none"], strict=True)]
        result[name].append(gain_of(values.mean(0), ndcg["none"].mean(0)))
        for task, gain in zip((*NAMES, "mean"), result[name], strict=True):
            print(f"    {task} {gain}")
    return result, *(np.array([getattr(each, name) for each in recorders]) for name in ("cosines", "ratios"))


@pytest.mark.slow
def test_a_task_with_small_gradients_gains_from_balancing_gradients(tmp_path):
    helpful = ("gradnorm", "pcgrad", "upgrad", "mgda")
    result, cosines, ratios = gains(tmp_path, True, (*METHODS, "uncertainty") if LONG else helpful)
    print(
        f"gradients: {np.mean(cosines < 0):.0%} of the cosines below 0, median ratio of norms {np.median(ratios):.1f}"
    )
    assert np.median(ratios) > 5
    for name in helpful:
        fields, topics, _ = result[name]
        assert fields.mean > fields.of_seeds, name
        assert name == "mgda" or topics.mean > -0.03, name
    both = result["gradnorm"][2]
    assert both.mean > both.of_seeds


@pytest.mark.slow
def test_equal_tasks_gain_nothing_from_balancing(tmp_path):
    result, cosines, ratios = gains(tmp_path, False, seeds=SEEDS if LONG else SEEDS[:2])
    assert cosines.mean() > 0
    assert np.median(ratios) < 2
    assert all(gain.mean < 0.01 for arm in result.values() for gain in arm)
