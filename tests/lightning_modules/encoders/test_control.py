"""The control of an MoE: as large and as fast as the MoE, but a hash of the text chooses its expert."""

import hashlib
import struct
from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from datamodules.packed import Tokens
from datamodules.records import UserError
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.backbone import set_dropout
from lightning_modules.encoders.control import ControlEncoder
from lightning_modules.encoders.families import Experts
from lightning_modules.encoders.moe import MoEEncoder
from lightning_modules.encoders.routed import RoutedEncoder
from tests.conftest import TASKS, packed, padded_tokens
from tests.lightning_modules.encoders.test_checkpoints import scrambled

FORMS = [(True, False), (False, True), (True, True)]


@pytest.fixture
def make_control(make_backbone):
    def make(attention=True, ffn=False, kind=ControlEncoder, **arguments):
        return kind(*make_backbone(), TASKS, attention, ffn, **{"max_length": 32} | arguments)

    return make


@pytest.fixture
def tokens():
    return padded_tokens(2, 3, 9, 20, 31, 12, 12, 5)


def hashed(ids, num_experts=3):
    """Return the number of the expert of a text, from the description of token_hash."""
    digest = hashlib.blake2b(struct.pack(f"<{len(ids)}I", *ids), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 1) % num_experts


@pytest.mark.parametrize(("attention", "ffn"), FORMS)
def test_each_text_is_computed_by_the_expert_of_its_hash(make_control, make_encoder, tokens, attention, ffn):
    """The expected vectors come from a BERT of Hugging Face with the weights of that expert."""
    encoder = scrambled(make_control(attention, ffn), 1).eval()
    ids, mask = tokens
    ours = encoder(packed(ids, mask), "search")
    choice = [hashed(row[:length].tolist()) for row, length in zip(ids, mask.sum(1), strict=True)]
    assert set(choice) == {0, 1, 2}
    dense = make_encoder("shared").eval().backbone
    for row, expert in enumerate(choice):
        weights = {k: v for k, v in encoder.backbone.state_dict().items() if ".experts." not in k}
        for name, module in encoder.backbone.named_modules():
            if isinstance(module, Experts):
                own = module.experts[f"expert{expert}"].state_dict()
                weights |= {f"{name}.{key}": tensor for key, tensor in own.items()}
        dense.load_state_dict(weights)
        expected = dense(input_ids=ids, attention_mask=mask).last_hidden_state[row, 0]
        torch.testing.assert_close(ours[row], expected, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize(("attention", "ffn"), FORMS)
def test_control_has_the_parameters_and_operations_of_the_moe(make_control, tokens, attention, ffn):
    sizes, operations = [], []
    for kind in (ControlEncoder, MoEEncoder):
        encoder = make_control(attention, ffn, kind=kind).train()
        sizes.append(sorted(tuple(parameter.shape) for parameter in encoder.parameters()))
        with FlopCounterMode(display=False) as counter:
            encoder(packed(*tokens), "search").sum().backward()
        operations.append(counter.get_total_flops())
    assert sizes[0] == sizes[1]
    assert operations[0] == operations[1]


def test_new_control_equals_its_backbone(make_control, make_encoder, tokens):
    expected = make_encoder("shared").eval()(packed(*tokens), "search")
    torch.testing.assert_close(make_control(ffn=True).eval()(packed(*tokens), "search"), expected, atol=2e-6, rtol=1e-5)


def test_vectors_do_not_depend_on_the_task(make_control, tokens):
    encoder = scrambled(make_control(), 1).eval()
    assert len({encoder.served_by(task) for task in TASKS}) == 1
    assert encoder.num_shared_layers == encoder.num_layers
    vectors = [encoder(packed(*tokens), task) for task in TASKS]
    assert torch.equal(vectors[0], vectors[1])
    assert torch.equal(vectors[0], vectors[2])
    with pytest.raises(UserError, match="unknown task 'serach'"):
        encoder(packed(*tokens), "serach")


def test_a_text_has_the_same_expert_in_training_and_inference(make_control, three_tasks):
    encoder, experts, training = make_control(pooling="mean"), {}, {}
    experts_of = encoder.experts_of

    def recorded(tokens):
        numbers = experts_of(tokens)
        for text, number in zip(tokens.input_ids.split(list(tokens.lengths)), numbers.tolist(), strict=True):
            experts.setdefault(tuple(text.tolist()), set()).add(number)
        return numbers

    encoder.experts_of = recorded
    module = ContrastiveModule(encoder, grad_cache=True).train()
    for step in range(3):
        module.training_step(three_tasks.train_dataloader().batches[step], step)["loss"].backward()
    training |= experts
    experts.clear()
    for task in three_tasks.tasks:
        encoder.encode(list(task.documents), task.task.name, token_budget=50)
        encoder.encode(list(task.documents)[:3], task.task.name, batch_invariant=True)
    assert training.keys() <= experts.keys()
    for text, numbers in experts.items():
        assert numbers == {hashed(text)} == training.get(text, numbers)


@pytest.mark.parametrize("kind", [ControlEncoder, RoutedEncoder])
def test_batch_invariant_vectors_are_refused_on_a_gpu(make_backbone, monkeypatch, kind):
    """Kernels differ with the number of rows of an expert, and fillers keep only the number of all rows."""
    encoder = kind(*make_backbone(), TASKS, max_length=32)
    monkeypatch.setattr(kind, "device", torch.device("cuda"))
    with pytest.raises(UserError, match=f"batch_invariant: {kind.__name__} only supports it on CPUs"):
        encoder.encode(["bara"], "search", batch_invariant=True)


def test_experts_get_similar_numbers_of_texts(make_control):
    texts = Tokens.pack([[2, i % 50 + 5, i // 50 + 5, 3] for i in range(3000)])
    counts = Counter(make_control().experts_of(texts).tolist())
    assert all(abs(counts[expert] - 1000) < 4 * (3000 * 2 / 9) ** 0.5 for expert in range(3))


@pytest.mark.parametrize("texts", [[0, 1], [3]])
def test_all_experts_have_gradients_in_each_step(make_control, tokens, texts):
    """Sharded ranks exchange the gradients of the same parameters, even if one of them has no text for an expert."""
    encoder = make_control(ffn=True).train()
    chosen = packed(*tokens).select(texts)
    encoder(chosen, "search").square().sum().backward()
    used = {f"expert{i}" for i in encoder.experts_of(chosen)}
    assert len(used) < 3
    for name, parameter in encoder.named_parameters():
        idle = ".experts." in name and name.split(".experts.")[1].split(".")[0] not in used
        assert parameter.grad is not None, name
        assert not idle or not parameter.grad.any(), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_each_text_alone(make_control, tokens, checkpointing):
    encoder, gradients = scrambled(make_control(ffn=True, pooling="mean"), 1).double().train(), []
    set_dropout(encoder.backbone, 0.0, 0.0)
    encoder.gradient_checkpointing = checkpointing
    for parts in ([range(8)], [[text] for text in range(8)]):
        encoder.zero_grad()
        for part in parts:
            encoder(packed(*tokens).select(part), "search").square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in encoder.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-11, rtol=1e-11, msg=name)


def test_control_without_experts_raises_user_error(make_control):
    with pytest.raises(UserError, match="attention, ffn: both are false"):
        make_control(attention=False)
