"""A new task for a trained encoder is learned, and the vectors of the old tasks do not change, bit for bit."""

import dataclasses

import pytest
import torch

from datamodules.records import UserError
from datamodules.tasks import SearchDataModule
from experiments.build.module import first_batches
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.adapters import AdapterEncoder
from lightning_modules.encoders.cross_stitch import CrossStitchEncoder
from lightning_modules.encoders.extend import add_tasks, losses_by_task
from lightning_modules.encoders.loading import load_encoder
from lightning_modules.optim import OptimOptions, parameter_groups
from tests.conftest import TASKS, packed

TEXTS = ["bara beli", "bomu bito buna", "cara"]


@pytest.fixture(params=["attention", "ffn", "both", "adapters", "stitched"])
def encoder(request, make_encoder, make_backbone):
    kinds = {"adapters": AdapterEncoder, "stitched": CrossStitchEncoder}
    if request.param in kinds:
        encoder = kinds[request.param](*make_backbone(), TASKS, max_length=32)
    else:
        encoder = make_encoder(request.param)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def test_vectors_of_old_tasks_do_not_change_while_the_new_one_learns(encoder, tmp_path):
    before = encoder.encode(TEXTS, tasks=list(TASKS))
    add_tasks(encoder, {"reviews": "reviews", "ratings": "reviews"}, {"reviews": "search", "ratings": "search"})
    assert torch.equal(encoder.encode(TEXTS, "reviews"), before["search"])
    optimizer = torch.optim.AdamW(
        parameter_groups(encoder, OptimOptions(lr=0.1, weight_decay=0.5), 4), lr=0.1, fused=True
    )
    tokens = encoder.tokenizer(TEXTS, padding=True, return_tensors="pt")
    for _ in range(3):
        optimizer.zero_grad()
        encoder.train()(packed(tokens["input_ids"], tokens["attention_mask"]), "reviews").square().sum().backward()
        optimizer.step()
    assert not torch.allclose(encoder.encode(TEXTS, "reviews"), before["search"], atol=1e-3)
    assert torch.equal(encoder.encode(TEXTS, "ratings"), encoder.encode(TEXTS, "reviews"))
    for task in TASKS:
        assert torch.equal(encoder.encode(TEXTS, task), before[task])
    again = load_encoder(encoder.save_pretrained(tmp_path / "model"))
    assert list(again.tasks) == [*TASKS, "reviews", "ratings"]
    for task, vectors in again.encode(TEXTS, tasks=list(again.tasks)).items():
        torch.testing.assert_close(vectors, encoder.encode(TEXTS, task), atol=2e-6, rtol=1e-5)


def test_the_nearest_expert_has_the_lowest_loss(make_encoder, make_task):
    encoder = make_encoder("attention", pooling="mean")
    with torch.no_grad():  # all experts but one get random weights
        for name, parameter in encoder.named_parameters():
            if ".experts.classification." in name or ".experts.search." in name:
                parameter.add_(torch.randn_like(parameter))
    module = ContrastiveModule(encoder, similarity="cosine", temperature=0.05)
    optimizer = torch.optim.AdamW([p for n, p in encoder.named_parameters() if ".link_prediction." in n], lr=0.01)
    task = make_task(SearchDataModule, name="reviews")
    batches = first_batches(task, encoder.tokenizer, count=3)
    assert len(batches) == 3
    for seed, batch in enumerate(batches * 10):  # a seed is a dropout mask, which must not be learned
        batch = dataclasses.replace(batch, task="link_prediction", seed=seed)
        module.train().training_step(batch, 0)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    losses = losses_by_task(module, batches)
    assert min(losses, key=losses.__getitem__) == "link_prediction"
    alone = module.eval().training_step(dataclasses.replace(batches[0], task="search"), 0)["loss"]
    assert losses_by_task(module, batches[:1])["search"] == pytest.approx(float(alone.detach()))


def test_changing_an_old_task_raises_user_error(make_encoder):
    encoder = make_encoder("attention")
    with pytest.raises(UserError, match="task search: the encoder already has this task"):
        add_tasks(encoder, {"search": "other"}, {"search": "search"})
    with pytest.raises(UserError, match="task reviews: the expert search already exists"):
        add_tasks(encoder, {"reviews": "search"}, {"reviews": "search"})
    with pytest.raises(UserError, match="expert 'a b': expected a name"):
        add_tasks(encoder, {"reviews": "a b"}, {"reviews": "search"})
    with pytest.raises(UserError, match="SharedEncoder has no experts"):
        add_tasks(make_encoder("shared"), {"reviews": "reviews"}, {"reviews": "search"})
