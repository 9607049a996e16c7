"""Training in fp16 with a scaled loss takes the steps of training in fp32, up to the rounding of fp16."""

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from datamodules.tasks import ClassificationDataModule
from lightning_modules.callbacks.diagnostics import Diagnostics
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.loss_weights import DynamicWeights
from lightning_modules.optim import OptimOptions
from lightning_modules.task_balance import GradNorm, GramianBalance, PCGrad
from tests.conftest import TASKS
from tests.lightning_modules.quiet_trainer import quiet_trainer, save_once

OPTIM = OptimOptions(warmup=0.0, weight_decay=0.0)


CLIP = {"gradient_clip_val": 0.01}


def fitted(make_encoder, data, folder, fp16, steps=1, callbacks=(), scale=2.0**12, accumulate=1, clip=CLIP, **options):
    """Train, and return the trainer, the module, and the mean gradient that Adam has recorded of each parameter."""
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))] if fp16 else []
    module = ContrastiveModule(
        make_encoder("both").eval(), similarity="cosine", temperature=0.1, optim=OPTIM, **options
    )
    trainer = quiet_trainer(
        folder, max_steps=steps, plugins=plugins, callbacks=list(callbacks), accumulate_grad_batches=accumulate, **clip
    )
    trainer.fit(module, data)
    means = [state["exp_avg"] for state in trainer.optimizers[0].state.values()]
    return trainer, module, torch.cat([mean.flatten() for mean in means])


def close(one, other, tolerance=0.02):
    return float((one - other).norm()) < tolerance * float(other.norm())


@pytest.mark.parametrize("grad_cache", [False, True])
def test_clipped_gradients_have_the_norm_asked_for(make_encoder, three_tasks, tmp_path, grad_cache):
    options = {"total_steps": 4, "grad_cache": grad_cache}
    _, _, expected = fitted(make_encoder, three_tasks, tmp_path, fp16=False, **options)
    _, _, means = fitted(make_encoder, three_tasks, tmp_path, fp16=True, **options)
    assert float(expected.norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)  # beta1 is 0.9
    assert close(means, expected)
    assert not torch.equal(means, expected)


@pytest.mark.parametrize("fp16", [False, True])
def test_gradients_are_clipped_by_value_if_the_trainer_asks_for_it(make_encoder, three_tasks, tmp_path, fp16):
    """They were clipped by norm."""
    clip = CLIP | {"gradient_clip_algorithm": "value"}
    _, _, means = fitted(make_encoder, three_tasks, tmp_path, fp16, clip=clip, total_steps=4)
    limit = 0.1 * 0.01  # beta1 is 0.9
    assert float(means.abs().max()) == pytest.approx(limit, rel=1e-3)
    assert int((means.abs() > 0.999 * limit).sum()) > 1


def test_balanced_gradients_and_losses_do_not_depend_on_the_scale(make_encoder, three_tasks, tmp_path):
    methods = (PCGrad, GradNorm, lambda tasks: GramianBalance(tasks, "upgrad"), lambda tasks: DynamicWeights(tasks))
    for method in methods:
        callbacks = [method(list(TASKS)) for _ in range(2)]
        _, _, expected = fitted(make_encoder, three_tasks, tmp_path, False, callbacks=callbacks[:1], accumulate=3)
        _, _, means = fitted(make_encoder, three_tasks, tmp_path, True, callbacks=callbacks[1:], accumulate=3)
        assert close(means, expected)
        if isinstance(callbacks[0], GradNorm):
            torch.testing.assert_close(callbacks[1].first_losses, callbacks[0].first_losses, rtol=1e-2, atol=0)
            torch.testing.assert_close(callbacks[1].weights, callbacks[0].weights, rtol=1e-2, atol=0)
        if isinstance(callbacks[0], DynamicWeights):
            torch.testing.assert_close(callbacks[1].sums, callbacks[0].sums, rtol=1e-2, atol=0)


def test_gradient_norms_of_the_diagnostics_are_not_scaled(make_encoder, three_tasks, tmp_path):
    diagnostics = [Diagnostics(every_n_steps=3) for _ in range(2)]
    for fp16, callback in enumerate(diagnostics):
        fitted(make_encoder, three_tasks, tmp_path, bool(fp16), steps=3, callbacks=[callback], total_steps=100)
    expected, values = (callback.values for callback in diagnostics)
    norms = [name for name in expected if name.endswith("gradient_norm")]
    assert len(norms) == 3
    for name in norms:
        assert values[name] == pytest.approx(expected[name], rel=0.03)


@pytest.mark.parametrize("balance", [None, GradNorm])
def test_step_whose_gradients_overflow_changes_nothing(make_encoder, three_tasks, tmp_path, balance):
    class Watch(L.Callback):
        def on_train_start(self, trainer, module):
            self.before = [p.detach().clone() for p in module.parameters()]

        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 1 and not hasattr(self, "unchanged"):
                pairs = zip(self.before, module.parameters(), strict=True)
                self.unchanged = all(torch.equal(a, b) for a, b in pairs)
                self.scale = trainer.precision_plugin.scaler.get_scale()

    watch = Watch()
    balancing = [balance(list(TASKS))] if balance else []
    _, module, _ = fitted(
        *(make_encoder, three_tasks, tmp_path, True),
        callbacks=[*balancing, watch],
        steps=3 if balance else 6,
        accumulate=3 if balance else 1,
        scale=2.0**40,
        total_steps=100,
    )
    assert watch.unchanged
    assert watch.scale == 2.0**39
    assert all(p.isfinite().all() for p in module.parameters())
    for callback in balancing:
        assert callback.weights.isfinite().all()


def test_resumed_training_keeps_the_scale_of_the_loss(make_encoder, make_task, tmp_path):
    file = tmp_path / "two.ckpt"

    def trained(checkpoint):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=1)
        module = ContrastiveModule(make_encoder("attention"), optim=OPTIM, total_steps=8)
        trainer = quiet_trainer(
            tmp_path,
            max_steps=4,
            plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
            callbacks=[save_once(file)],
            **CLIP,
        )
        trainer.fit(module, make_task(ClassificationDataModule, "classification"), ckpt_path=checkpoint)
        assert scaler.get_scale() == 2.0**8  # doubled in each step
        return module.state_dict()

    whole, resumed = trained(None), trained(file)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
