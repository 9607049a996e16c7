"""The training step, and training with it."""

import numpy as np
import pytest
import torch

from datamodules.tasks import ClassificationDataModule, LinkPredictionDataModule
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.backbone import set_dropout
from lightning_modules.encoders.instruct import PromptEncoder
from lightning_modules.optim import OptimOptions
from tests.conftest import toy_collection
from tests.lightning_modules.quiet_trainer import after_batch, quiet_trainer, save_once


def first_batch(data, step=0):
    return data.train_dataloader().batches[step]


def test_loss_equals_numpy_with_known_positives_masked(make_encoder, make_task):
    """Papers share labels, so without the mask, a label would be a negative of its own papers."""
    data = make_task(ClassificationDataModule, "classification", toy_collection(12, 4), batch_size=8)
    module = ContrastiveModule(make_encoder("attention", pooling="mean"), similarity="cosine", temperature=0.1).eval()
    batch = first_batch(data)
    outputs = module.training_step(batch, 0)

    vectors = module.embed(batch)[0].detach().numpy()
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    losses, hits, masked = [], [], 0
    for b in range(8):
        known = set(batch.known_positives[b].tolist())
        positive = int(batch.positives[b])
        ids = batch.document_ids.tolist()
        columns = [m for m in range(len(ids)) if m == positive or ids[m] not in known]
        masked += len(ids) - len(columns)
        scores = np.array([vectors[batch.queries[b]] @ vectors[batch.documents[m]] for m in columns]) / 0.1
        losses.append(np.log(np.exp(scores).sum()) - scores[columns.index(positive)])
        hits.append(columns[int(scores.argmax())] == positive)
    assert masked > 0
    assert outputs["loss"].item() == pytest.approx(np.mean(losses), abs=1e-5)
    assert outputs["accuracy"].item() == pytest.approx(np.mean(hits))

    module.objective.options.mask_known_positives = False
    assert module.training_step(batch, 0)["loss"] > outputs["loss"]


def test_dropout_depends_only_on_the_step(make_encoder, make_task):
    data = make_task(LinkPredictionDataModule, "link_prediction", toy_collection(10, 10, papers=True))
    module = ContrastiveModule(make_encoder("attention"))
    set_dropout(module.encoder.backbone, 0.3, 0.3)
    module.train()
    torch.manual_seed(1)
    one = module.training_step(first_batch(data), 0)["loss"]
    torch.manual_seed(2)
    same = module.training_step(first_batch(data), 7)["loss"]
    other = module.training_step(first_batch(data, 1), 0)["loss"]
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_training_turns_dropout_on_for_a_backbone_in_eval_mode(make_encoder, make_task, tmp_path):
    data = make_task(ClassificationDataModule, "classification", num_batches=2)
    module = ContrastiveModule(make_encoder("attention").eval(), total_steps=2)
    modes = []
    watch = after_batch(lambda _, module: modes.append(all(m.training for m in module.encoder.modules())))
    quiet_trainer(tmp_path, max_steps=2, callbacks=[watch]).fit(module, data)
    assert modes == [True, True]


def test_data_get_the_tokenizer_and_prompts_of_each_trained_encoder(make_backbone, make_encoder, make_task, tmp_path):
    """Data with a tokenizer lacked the prompts, and a second training used the tokenizer and prompts of the first."""
    data = make_task(ClassificationDataModule, "classification", num_batches=1)
    prompted = PromptEncoder(
        *make_backbone(), {"classification": "all"}, {"classification": "topics of"}, max_length=32
    )
    starts = []
    for encoder in (prompted, make_encoder("shared"), prompted):
        module = ContrastiveModule(encoder, tasks=["classification"], total_steps=1)
        quiet_trainer(tmp_path, max_steps=1).fit(module, data)
        assert data.tokenizer is encoder.tokenizer
        chunk = data.train_dataloader().batches[0].chunks[0]
        starts.append(encoder.tokenizer.decode(chunk.input_ids[: chunk.lengths[0]]).startswith("[CLS] topics of"))
    assert starts == [True, False, True]


def test_token_budget_does_not_change_the_loss(make_encoder, make_task):
    losses = []
    for budget in (8, 64, 100_000):
        data = make_task(ClassificationDataModule, "classification", token_budget=budget)
        batch = first_batch(data)
        losses.append(ContrastiveModule(make_encoder("both")).eval().training_step(batch, 0)["loss"])
    torch.testing.assert_close(losses[0], losses[2])
    torch.testing.assert_close(losses[1], losses[2])


@pytest.mark.parametrize(("lr", "at_bound"), [(0.03, False), (5.0, True)])
def test_learned_temperature_is_saved_resumed_and_kept_in_its_range(make_encoder, make_task, tmp_path, lr, at_bound):
    file = tmp_path / "two.ckpt"

    def trained(checkpoint):
        learned = {"learn_temperature": "one", "temperature_range": [0.05, 0.2], "temperature_lr": lr}
        optim = OptimOptions(warmup=0.0, weight_decay=0.5)
        module = ContrastiveModule(
            make_encoder("attention"), similarity="cosine", temperature=0.1, optim=optim, total_steps=8, **learned
        )
        trainer = quiet_trainer(tmp_path, max_steps=4, callbacks=[save_once(file)])
        trainer.fit(module, make_task(ClassificationDataModule, "classification"), ckpt_path=checkpoint)
        (group,) = [g for g in trainer.optimizers[0].param_groups if g["initial_lr"] == lr]
        assert group["weight_decay"] == 0
        return module.objective.temperature("classification").item()

    whole = trained(None)
    assert trained(file) == whole != pytest.approx(0.1, rel=1e-3)
    assert (min(abs(whole - 0.05), abs(whole - 0.2)) < 1e-6) == at_bound
