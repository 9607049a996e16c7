"""Compiled layers: the same numbers, few compilations, and the same dropout in both passes of GradCache."""

import random
from dataclasses import replace

import pytest
import torch

from datamodules.packed import Tokens
from datamodules.tasks import SearchDataModule
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.backbone import set_dropout
from lightning_modules.encoders.families import num_graphs
from lightning_modules.encoders.lora import LoraOptions, add_lora
from tests.conftest import TASKS

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def random_tokens(rng, most=12):
    lengths = sorted(rng.randint(3, 30) for _ in range(rng.randint(1, most)))
    return Tokens.pack([[2, *(rng.randrange(5, 60) for _ in range(length - 2)), 3] for length in lengths])


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["shared", "attention"])
def test_compiled_layers_give_the_same_vectors_and_gradients(make_encoder, kind, lora):
    plain, compiled = make_encoder(kind).train(), make_encoder(kind).train()
    for encoder in (plain, compiled):
        if lora:
            torch.manual_seed(1)
            add_lora(encoder, LoraOptions(rank=4))
            for parameter in encoder.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.1)
        set_dropout(encoder.backbone, 0.0, 0.0)
    compiled.compile()
    rng = random.Random(0)
    for _ in range(3):
        tokens = random_tokens(rng)
        results = []
        for encoder in (plain, compiled):
            encoder.zero_grad()
            vectors = encoder(tokens, "search")
            vectors.square().sum().backward()
            results.append((vectors.detach(), gradients(encoder)))
        (expected, expected_gradients), (ours, our_gradients) = results
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
        assert our_gradients.keys() == expected_gradients.keys()
        for name, gradient in our_gradients.items():
            torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("lora", [False, True])
def test_500_mixed_batches_are_compiled_a_few_times(make_encoder, lora):
    """Any numbers of texts and tokens, three experts, training and inference."""
    encoder, rng = make_encoder("both"), random.Random(0)
    if lora:
        add_lora(encoder, LoraOptions(rank=4, dropout=0.1))
    encoder.compile()
    before, graphs = num_graphs(), {}
    for step in range(500):
        encoder.train(step % 5 > 0)
        with torch.set_grad_enabled(encoder.training):
            vectors = encoder(random_tokens(rng), rng.choice(list(TASKS)))
        if encoder.training and step % 20 == 1:
            vectors.sum().backward()
        graphs[step] = num_graphs()
    # Two functions, for training and inference, one text and several, and weights with and without a gradient.
    assert 4 <= graphs[499] - before <= 16
    assert graphs[499] == graphs[199]


def test_grad_cache_repeats_the_dropout_of_compiled_layers(make_encoder, make_task):
    encoder = make_encoder("both")
    set_dropout(encoder.backbone, 0.3, 0.0)
    data = make_task(SearchDataModule, batch_size=8, token_budget=40)
    data.tokenizer = encoder.tokenizer
    batch = next(iter(data.train_dataloader()))
    assert len(batch.chunks) > 2
    encoder.compile()
    results = []
    for cache in (False, True):
        module = ContrastiveModule(encoder, grad_cache=cache, similarity="cosine", temperature=0.05).train()
        module.zero_grad()
        loss = module.training_step(replace(batch), 0)["loss"]
        loss.backward()
        results.append((float(loss.detach()), gradients(module)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    other = ContrastiveModule(encoder, similarity="cosine", temperature=0.05).train()
    assert float(other.training_step(replace(batch, seed=batch.seed + 99), 0)["loss"]) != results[0][0]
