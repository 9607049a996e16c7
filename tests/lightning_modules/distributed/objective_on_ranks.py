"""Compare the loss and its gradient on several ranks with those of one process. test_ranks.py starts every rank.

    python -m tests.lightning_modules.distributed.objective_on_ranks RANK WORLD_SIZE PORT

Ranks draw some of the same documents, and different numbers of queries, documents and known positives.
"""

import random
import sys

import torch
import torch.distributed as dist

from datamodules.batches import padded
from lightning_modules.frozen import FrozenVectors
from lightning_modules.objective import Objective
from lightning_modules.objective_options import GuideOptions, ObjectiveOptions, TeacherOptions, VectorTeacherOptions
from tests.lightning_modules.objective_reference import batch_without_texts

SIZES, IDS = [4, 3, 5, 2], 14  # queries of each rank
COSINE = {"similarity": "cosine", "temperature": 0.3}
CASES = [
    {"temperature": 0.7},
    {"temperature": 0.7, "mask_known_positives": False},
    COSINE | {"symmetric": True},
    COSINE | {"symmetric": True, "mask_known_positives": False},
    COSINE | {"symmetric": True, "mask_same_text": False},
    COSINE | {"symmetric": True, "positives": "log_mean", "learn_temperature": "one", "matryoshka": [3]},
    COSINE | {"symmetric": True, "guide": GuideOptions("x", 0.1), "score_memory": 1e-6},
    COSINE | {"teacher": TeacherOptions("x", "kl", "batch"), "positives_in_denominator": True},
    COSINE | {"teacher": TeacherOptions("x", "margin_mse", "own"), "guide": GuideOptions("x", 0.1)},
    COSINE | {"vector_teacher": VectorTeacherOptions("x", 0.7)},
    {"vector_teacher": VectorTeacherOptions("x", 0.7, "cosine"), "symmetric": True},
    COSINE | {"vector_teacher": VectorTeacherOptions("6", asymmetric=True), "symmetric": True},
]


def examples(world):
    """Return (query, positives, hard negatives, known positives). Ranks share some documents."""
    rng, rows = random.Random(0), []
    for rank in range(world):
        for query in range(SIZES[rank]):
            ids = rng.sample(range(IDS), 7)
            known = ids[: rng.randint(1, 3 + rank)]  # lists of different lengths on different ranks
            positives = known[: rng.randint(1, min(3, len(known)))]
            rows.append((IDS + len(rows), positives, ids[6 : 6 + query % 2], known))
    return rows


def batch_of(examples, weight=1.0):
    documents = list(dict.fromkeys(d for _, positives, negatives, _ in examples for d in positives + negatives))
    column = {d: i for i, d in enumerate(documents)}
    queries = [query for query, *_ in examples]
    return batch_without_texts(
        queries=torch.arange(len(queries)),
        documents=torch.arange(len(queries), len(queries) + len(documents)),
        document_ids=torch.tensor(documents),
        positives=padded([[column[d] for d in positives] for _, positives, _, _ in examples]),
        hard_negatives=padded([[column[d] for d in negatives] for _, _, negatives, _ in examples]),
        known_positives=padded([known for *_, known in examples]),
        texts=tuple(queries + documents),
        weight=weight,
        text_keys=torch.tensor([number % 11 for number in queries + documents]),
    )


class FrozenModel:
    def __init__(self, features):
        self.vectors, self.dimension = torch.nn.functional.normalize(features, dim=1), features.shape[1]

    def embed(self, batch):
        vectors = self.vectors[list(batch.texts)]
        return FrozenVectors(vectors[batch.queries], vectors[batch.documents])


def gradient(objective, features, weight, batch):
    vectors = features[list(batch.texts)] @ weight
    loss = objective(vectors, batch)["loss"]
    leaves = [weight, *objective.parameters()]
    return torch.cat([x.flatten() for x in (loss.detach(), *torch.autograd.grad(loss, leaves))])


def main(rank, world, port):
    store = dist.TCPStore("127.0.0.1", port, world, rank == 0)
    everything = examples(world)
    torch.manual_seed(0)
    features = torch.randn(IDS + len(everything), 6, dtype=torch.float64)
    weight = (torch.eye(6) + 0.1 * torch.randn(6, 6)).double().requires_grad_()
    names = ("guide", "teacher", "vector_teacher")
    models = {name: FrozenModel(torch.randn(len(features), 5).double()) for name in names}
    same_size = FrozenModel(torch.randn(len(features), 6).double())
    objectives = []
    for case in CASES:
        options = ObjectiveOptions(**case)
        used = {name: models[name] for name in models if getattr(options, name).model}
        if options.vector_teacher.asymmetric:
            used["vector_teacher"] = same_size
        objectives.append(Objective(options, ["search"], 6, **used).double())
    expected = [gradient(objective, features, weight, batch_of(everything)) for objective in objectives]

    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    start, size = sum(SIZES[:rank]), SIZES[rank]
    own_batch = batch_of(everything[start : start + size], weight=size * world / len(everything))
    for objective, whole in zip(objectives, expected, strict=True):
        ours = gradient(objective, features, weight, own_batch) / world
        dist.all_reduce(ours)  # as DDP does
        error = ((ours - whole).abs().max() / whole.abs().max()).item()
        assert error < 1e-12, (objective.options, error)
    print("equal")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
