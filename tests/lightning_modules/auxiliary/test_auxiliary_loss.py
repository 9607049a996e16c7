"""Losses that are added to InfoNCE: the texts that they get, their part of training, and their errors."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from datamodules.batches import CompanionSource, MultiTaskDataModule
from datamodules.records import UserError
from lightning_modules.auxiliary.auxiliary_loss import AuxiliaryLoss
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.throughput import num_positions, text_lengths
from tests.lightning_modules.quiet_trainer import quiet_trainer

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OTHER = {"classification": "search", "search": "classification"}


class Likeness(AuxiliaryLoss):
    """Bring the vectors of queries as one task, through a matrix, to those as another task, and see all labels."""

    def __init__(self, weight: float = 1.0, lr: float | None = None, dimension: int = 32):
        super().__init__(weight, lr)
        self.matrix = nn.Parameter(torch.eye(dimension))
        self.seen: list[tuple] = []

    def companions(self, data, task):
        tables = data.by_name
        if task not in OTHER:
            return ()
        labels = len(tables[OTHER[task]].collections["toy"].corpus)
        return (
            CompanionSource(tables[task], OTHER[task], lambda queries, documents, rng: queries),
            CompanionSource(
                tables[OTHER[task]], OTHER[task], lambda queries, documents, rng: np.array([rng.randrange(labels), 0])
            ),
        )

    def forward(self, batch, vectors, companions):
        if not companions:
            return 0 * vectors.sum()
        self.seen.append((batch, vectors, companions))
        other, labels = companions
        return (vectors[batch.queries] @ self.matrix - other).square().mean() + labels.square().mean()


def trained(make_encoder, three_tasks, folder, loss, config=None):
    """Train one step, and return the module."""
    module = ContrastiveModule(make_encoder(config=config), similarity="cosine", losses={"likeness": loss})
    quiet_trainer(folder, max_steps=1).fit(module, three_tasks)
    return module


def test_companions_are_the_texts_that_a_loss_asks_for_encoded_as_its_task(make_encoder, three_tasks, tmp_path):
    loss = Likeness(weight=1e-30)
    module = trained(make_encoder, three_tasks, tmp_path, loss, config=NO_DROPOUT)
    batch, vectors, (other, labels) = loss.seen[0]
    tables = three_tasks.by_name
    encoder, task = make_encoder(config=NO_DROPOUT), batch.task
    own = [tables[task].documents[row] for row in batch.rows.tolist()]
    encode = {name: lambda texts, name=name: encoder.encode(texts, name) for name in OTHER}
    torch.testing.assert_close(vectors, encode[task](own), atol=1e-5, rtol=0)
    queries = [own[row] for row in batch.queries.tolist()]
    torch.testing.assert_close(other, encode[OTHER[task]](queries), atol=1e-5, rtol=0)
    rows = batch.companions[1].rows.tolist()
    expected = encode[OTHER[task]]([tables[OTHER[task]].documents[row] for row in rows])
    torch.testing.assert_close(labels, expected, atol=1e-5, rtol=0)
    assert module.num_companions == {"classification": [2], "link_prediction": [0], "search": [2]}


def test_each_of_several_losses_gets_its_own_companions(make_encoder, three_tasks, tmp_path):
    losses = {"first": Likeness(), "second": Likeness()}
    module = ContrastiveModule(make_encoder(), similarity="cosine", total_steps=1, losses=losses)
    quiet_trainer(tmp_path, max_steps=1).fit(module, three_tasks)
    (first, *_), (second, *_) = (loss.seen[0] for loss in losses.values())
    assert len(first.companions) == len(second.companions) == 2
    assert first.companions[0].seed != second.companions[0].seed


def test_companions_count_as_tokens_and_operations(make_encoder, three_tasks, tmp_path):
    loss = Likeness()
    trained(make_encoder, three_tasks, tmp_path, loss)
    batch = loss.seen[0][0]
    lengths = text_lengths(batch)
    assert [group.task for group, _ in lengths] == [batch.task, OTHER[batch.task], OTHER[batch.task]]
    assert sum(x.sum() for _, x in lengths) == batch.num_tokens == num_positions(batch, padded=False)


def test_detached_companions_have_no_gradient_and_no_backward_pass(make_encoder, three_tasks, tmp_path):
    class Detached(Likeness):
        def companions(self, data, task):
            return [dataclasses.replace(source, detached=True) for source in super().companions(data, task)]

    attached, detached = Likeness(), Detached()
    operations = []
    for loss in (attached, detached):
        module = trained(make_encoder, three_tasks, tmp_path, loss, config=NO_DROPOUT)
        (own, _), *others = text_lengths(loss.seen[0][0])
        assert own.has_backward
        operations.append(sum(group.flops(module.encoder, lengths) for group, lengths in others))
    for first, second in zip(attached.seen[0][2], detached.seen[0][2], strict=True):
        assert (first.requires_grad, second.requires_grad) == (True, False)
        assert torch.equal(first, second)
    assert operations[1] < 0.5 * operations[0]


def test_own_learning_rate_is_that_of_the_loss_alone(make_encoder, three_tasks):
    module = ContrastiveModule(make_encoder(), total_steps=1, losses={"likeness": Likeness(lr=0.5)})
    groups = module.configure_optimizers()["optimizer"].param_groups
    (group,) = [g for g in groups if any(p is module.losses["likeness"].matrix for p in g["params"])]
    assert group["initial_lr"] == 0.5
    assert sum(len(g["params"]) for g in groups if g["initial_lr"] == 0.5) == 1


@pytest.mark.parametrize("name", ["keys", "training", "a.b", "", "two words"])
def test_impossible_name_raises_user_error(make_encoder, name):
    with pytest.raises(UserError, match="cannot be the name of a loss"):
        ContrastiveModule(make_encoder(), losses={name: Likeness()})


@pytest.mark.parametrize("options", [{"weight": -1.0}, {"weight": float("nan")}, {"lr": 0.0}])
def test_impossible_numbers_raise_user_error(options):
    with pytest.raises(UserError, match=f"{next(iter(options))}: expected a number"):
        Likeness(**options)


def test_error_in_prepare_names_the_loss(make_encoder, three_tasks, tmp_path):
    class Refusing(Likeness):
        def prepare(self, data):
            raise UserError("file.tsv, line 3: unknown label 'x'")

    with pytest.raises(UserError, match="^losses.likeness: file.tsv, line 3: unknown label 'x'$"):
        trained(make_encoder, three_tasks, tmp_path, Refusing())


def test_other_data_get_companions_even_at_the_address_of_the_first(make_encoder, three_tasks):
    """Fifty data modules, each made when the last one is gone, share a few addresses."""
    module = ContrastiveModule(make_encoder(), losses={"likeness": Likeness()})
    addresses = set()
    for _ in range(50):
        data = MultiTaskDataModule(three_tasks.tasks)
        for task in data.tasks:
            task.companions = ()
        module.prepare_losses(data)
        addresses.add(id(data))
        assert [len(task.companions) for task in data.tasks] == [2, 0, 2]
        del data
    assert len(addresses) < 50
