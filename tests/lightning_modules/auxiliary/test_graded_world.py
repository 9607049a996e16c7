"""What cross-task distillation and quadruplets gain, and where they gain nothing."""

from functools import partial

import numpy as np
import pytest

from lightning_modules.auxiliary.cross_task import CrossTaskDistillation
from lightning_modules.auxiliary.quadruplets import QuadrupletRanking
from lightning_modules.retrieval.significance import compare
from tests.lightning_modules.auxiliary.graded_world import OBJECTIVE, TASKS, measured, trained, world
from tests.lightning_modules.paired import LONG

LOSSES = {
    "distillation": partial(CrossTaskDistillation, {"links": ["fields"]}, list(TASKS), objective=OBJECTIVE),
    "quadruplets": partial(QuadrupletRanking, {"links": "fields"}, list(TASKS), objective=OBJECTIVE),
}
# Few citations, by field: the labels say more of them. Many citations, by topic: only labels order the other papers.
PREMISE = {"distillation": {"same_facet": True, "citing": 24}, "quadruplets": {"same_facet": False, "citing": 96}}
SEEDS = range(3)


def gain(kind, folder, shuffled, **options):
    """Train with and without the loss. Return the comparison and the mean cosine with it."""
    collections, arms = world(**PREMISE[kind], shuffled=shuffled), []
    seeds = SEEDS[:2] if shuffled and not LONG else SEEDS
    for weight in (1.0, 0.0):
        make = partial(LOSSES[kind], weight=weight, **options)
        values, cosines = zip(*(measured(*trained(folder, collections, seed, make())) for seed in seeds), strict=True)
        arms.append((np.stack(values), np.mean(cosines)))
    return compare(arms[0][0], arms[1][0]), arms[0][1]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options"), [("distillation", {"margin": None}), ("quadruplets", {})])
@pytest.mark.parametrize("shuffled", [False, True])
def test_labels_of_the_other_task_improve_the_graded_ranking_unless_they_are_shuffled(
    kind, options, shuffled, tmp_path
):
    result, cosine = gain(kind, tmp_path, shuffled, **options)
    print(f"{kind} {result.mean_b:.3f} {result.mean_a:.3f} {result.low:.3f} {result.high:.3f} {cosine:.2f}")
    if shuffled:
        assert result.low <= 0
    else:
        assert result.low > 0.03
    assert cosine < 0.3, "the vectors have not collapsed"


def test_a_teachers_expert_gets_no_gradient_from_its_students_batches(tmp_path):
    module, data = trained(tmp_path, world(False, 96, False), 0, LOSSES["distillation"](), steps=1)
    module.zero_grad()
    batches = data.train_dataloader().batches
    batch = next(batch for batch in (batches[0], batches[1]) if batch.task == "links")
    assert [texts.task for texts in batch.companions] == ["fields"]
    module.training_step(batch, 0)["loss"].backward()
    gradients = {name: p.grad for name, p in module.encoder.named_parameters() if ".experts." in name}
    assert {name.split(".experts.")[1].split(".")[0] for name, g in gradients.items() if g is not None} == {"links"}
