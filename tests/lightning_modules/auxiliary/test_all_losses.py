"""What holds for every loss that is added to InfoNCE. cases.py has their cases.

distributed/test_ranks.py compares their gradients on two ranks, ../test_waiting.py checks that they do not wait for a
GPU, and tests/experiments/test_losses.py kills runs of their experiments.
"""

import copy
import pickle

import pytest
import torch

from tests.lightning_modules.auxiliary.cases import CASES, all_losses, module_of, world
from tests.lightning_modules.quiet_trainer import quiet_trainer

STEPS = 6  # two batches of each task


def test_every_loss_has_a_case():
    assert {kind for kind, _ in CASES.values()} == all_losses(), "add a case to CASES in cases.py"


def trained(folder, case, steps=STEPS, resume=None, **options):
    """Train with dropout, and return the module and the state of its optimizer."""
    data = world().data(batch_size=4)
    torch.manual_seed(5)
    module = module_of(case, dropout=0.2, **options)
    trainer = quiet_trainer(folder, max_steps=steps)
    trainer.fit(module, data, ckpt_path=resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module, trainer.optimizers[0].state_dict()["state"]


def states_equal(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("case", CASES)
def test_weight_0_trains_as_without_the_loss_to_the_bit(case, tmp_path):
    arms = ((case, 0.0), (case, 1.0), (None, 0.0))
    zero, some, without = (trained(tmp_path, name, weight=w)[0].encoder.state_dict() for name, w in arms)
    assert states_equal(zero, without)
    assert not states_equal(some, without)


@pytest.mark.parametrize("case", CASES)
def test_resumed_training_is_the_whole_training_to_the_bit(case, tmp_path):
    """Weights, parameters of the loss, and moments of the optimizer."""
    whole, moments = trained(tmp_path, case)
    trained(tmp_path, case, steps=STEPS // 2)
    resumed, resumed_moments = trained(tmp_path, case, resume=tmp_path / "last.ckpt")
    assert states_equal(whole.state_dict(), resumed.state_dict())
    assert moments.keys() == resumed_moments.keys()
    assert all(states_equal(moments[key], resumed_moments[key]) for key in moments)


def gradients(module, batches):
    module.zero_grad(set_to_none=True)
    for batch in batches:
        (module.training_step(batch, 0)["loss"] / len(batches)).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def batches_of(module, token_budget):
    data = world().data(batch_size=12, token_budget=token_budget)
    module.prepare_losses(data)
    source = data.train_dataloader().batches
    return [source[step] for step in range(3)]


@pytest.mark.parametrize("case", CASES)
def test_gradient_with_grad_cache_equals_that_of_one_chunk(case):
    module, without = module_of(case).double(), module_of(None).double()
    whole = gradients(module, batches_of(module, 100_000))
    module.grad_cache = True
    batches = batches_of(module, 40)
    assert all(len(batch.chunks) > 1 for batch in batches)
    cached = gradients(module, batches)
    assert cached.keys() == whole.keys()
    scale = max(gradient.abs().max() for gradient in whole.values())
    assert max((cached[name] - whole[name]).abs().max() for name in whole) < 1e-12 * scale
    plain = gradients(without, batches_of(without, 100_000))
    assert max((plain[name] - whole[name]).abs().max() for name in plain) > 1e-3 * scale, "the loss has no effect"


@pytest.mark.parametrize("case", CASES)
def test_copy_of_a_prepared_module_computes_the_same_loss(case):
    """An average of the weights copies the module."""
    module = module_of(case)
    batches = batches_of(module, 100_000)
    values = [copied.training_step(batches[2], 0)["loss"] for copied in (module, copy.deepcopy(module))]
    assert torch.equal(*values)


@pytest.mark.parametrize("case", CASES)
def test_worker_processes_that_are_not_forked_make_the_same_batches(case):
    """They get everything by pickle, on macOS and from Python 3.14 on, but not the data module with its trainer."""
    module, data = module_of(case), world().data(batch_size=4)
    pickle.loads(pickle.dumps(module)).prepare_losses(data)
    source = data.train_dataloader().batches
    content = pickle.dumps(source)
    assert b"DataModule" not in content
    for step in range(3):
        batches = [each[step] for each in (source, pickle.loads(content))]
        assert len({batch.fingerprint for batch in batches}) == 1
        for ours, theirs in zip(*(batch.companions for batch in batches), strict=True):
            assert ours.rows.tolist() == theirs.rows.tolist()
            assert [chunk.keys for chunk in ours.chunks] == [chunk.keys for chunk in theirs.chunks]
