"""Instruction and Prefix equal the authors' later code, Prompt equals sentence-transformers."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from datamodules.records import Document, UserError
from lightning_modules.encoders.instruct import InstructEncoder, PromptEncoder
from lightning_modules.encoders.loading import continue_from
from lightning_modules.losses import info_nce
from lightning_modules.optim import OptimOptions, parameter_groups
from tests.conftest import TASKS, packed

GOLDEN = Path(os.environ.get("SCIMULT_GOLDEN", Path(__file__).parents[4] / "shared" / "golden")) / "instruct"
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no outputs of the authors' code in {GOLDEN}")
INSTRUCTIONS = {"classification": "tag bara beli", "link_prediction": "cite bomu", "search": "find bito buna cara"}


class Numbered:
    """A tokenizer for the golden instructions, which are stored as ids. The text is the number of the instruction."""

    def __init__(self):
        ids, mask = np.load(GOLDEN / "instruct_ids.npy"), np.load(GOLDEN / "instruct_mask.npy")
        self.ids = [row[: m.sum()].tolist() for row, m in zip(ids, mask, strict=True)]

    def __call__(self, text):
        return {"input_ids": self.ids[int(text)]}


def bert_of(file):
    backbone = BertModel(BertConfig(**json.loads((GOLDEN / "config.json").read_text())), add_pooling_layer=False)
    weights = {k: v for k, v in load_file(GOLDEN / file).items() if not k.startswith("pooler.")}
    backbone.load_state_dict(weights)
    return backbone


@pytest.fixture(params=["instruction", "prefix"])
def kind(request):
    return request.param


@pytest.fixture
def reference(kind):
    """The encoder of a golden case. Its tasks are named by the numbers of the instructions."""
    tasks = {number: number for number in "012"}
    encoder = InstructEncoder(
        bert_of("model.safetensors"),
        Numbered(),
        tasks,
        {n: n for n in tasks},
        separate=kind == "prefix",
        max_length=128,
    )
    if kind == "prefix":
        encoder.instruction_backbone.load_state_dict(bert_of("instruct_model.safetensors").state_dict())
    return encoder.eval()


@pytest.fixture
def texts():
    return torch.from_numpy(np.load(GOLDEN / "input_ids.npy")), torch.from_numpy(np.load(GOLDEN / "attention_mask.npy"))


def close(ours, wanted, atol=1e-5):
    torch.testing.assert_close(ours.reshape(wanted.shape), wanted, atol=atol, rtol=0)


@golden
def test_vectors_and_states_equal_those_of_the_authors_code(kind, reference, texts, monkeypatch):
    expected = load_file(GOLDEN / f"{kind}.expected.safetensors")
    mask = texts[1]
    for number in "012":
        for suffix in ("", "_unpadded"):
            close(reference(packed(*texts), number), expected[f"cls_instr{number}{suffix}"])
    rows = [str(number) for number in np.load(GOLDEN / "mixed_instruct_ids.npy")]
    close(reference(packed(*texts), rows), expected["cls_mixed"])
    with torch.inference_mode():
        close(reference(packed(*texts), "1"), expected["cls_instr1"])
    reference.pooling = "mean"  # so that the last layer computes all positions
    monkeypatch.setattr(reference, "pool", lambda hidden, *_: hidden)
    for number in "012":
        states = reference(packed(*texts), number)
        close(states, expected[f"seq_instr{number}"][mask.bool()])


@golden
def test_loss_and_gradients_equal_those_of_the_authors_code(kind, reference, texts):
    expected = load_file(GOLDEN / f"{kind}.train.safetensors")
    vectors = reference(packed(*texts), "1")
    close(vectors[:4], expected["q"])
    close(vectors[4:], expected["ctx"])
    loss = info_nce(vectors[:4] @ vectors[4:].T, torch.tensor([[0], [2], [4], [6]])).mean()
    close(loss, expected["loss"])
    loss.backward()
    ours = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    prefix = "instruction_backbone." if kind == "prefix" else "backbone."
    compared = 0
    for key, gradient in expected.items():
        if key.startswith("grad::"):
            name = prefix + key.removeprefix("grad::").removeprefix("instruct_model.")
            if name in ours:
                close(ours.pop(name), gradient, 5e-5)
                compared += 1
            else:
                assert not gradient.any(), name
    assert compared > 50
    assert not ours, "parameters that have no gradient in the authors' code"


@pytest.fixture
def make_instruct(make_backbone):
    def make(kind=InstructEncoder, seed=0, instructions=INSTRUCTIONS, **arguments):
        backbone, tokenizer = make_backbone(seed)
        return kind(backbone, tokenizer, TASKS, instructions, **{"max_length": 32} | arguments)

    return make


def test_each_task_reads_its_own_instruction(make_instruct):
    for encoder in (make_instruct(), make_instruct(separate=True), make_instruct(PromptEncoder)):
        vectors = [encoder.encode(["bara beli", "bomu"], task) for task in TASKS]
        for i in range(3):
            assert not torch.allclose(vectors[i], vectors[i - 1], atol=1e-3)


def test_instruction_is_computed_once_per_call_of_encode(make_instruct, monkeypatch):
    encoder = make_instruct()
    computed = []
    original = encoder._prefixes
    monkeypatch.setattr(encoder, "_prefixes", lambda text: computed.append(text) or original(text))
    encoder.encode(["bara"] * 40, tasks=list(TASKS), token_budget=16)
    assert sorted(computed) == sorted(INSTRUCTIONS.values())


def test_new_prefix_encoder_equals_instruction_and_trains_only_its_instruction_encoder(make_instruct, make_encoder):
    shared, prefix = make_instruct(), make_instruct(separate=True)
    for task in TASKS:
        assert torch.equal(shared.encode(["bara beli"], task), prefix.encode(["bara beli"], task))
    optimizer = torch.optim.AdamW(parameter_groups(prefix, OptimOptions(lr=0.1), 4), lr=0.1)
    before = {n: p.detach().clone() for n, p in prefix.named_parameters()}
    tokens = prefix.tokenizer(["bara beli", "bomu bito"], return_tensors="pt")
    prefix.train()(packed(tokens["input_ids"], tokens["attention_mask"]), "search").square().sum().backward()
    trainable = {n for n, p in prefix.named_parameters() if p.requires_grad}
    assert {n for n, p in prefix.named_parameters() if p.grad is not None} == trainable  # so that plain DDP works
    optimizer.step()
    moved = {n for n, p in prefix.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all(n.startswith("instruction_backbone.") for n in moved)
    # The paper's second stage: both backbones start from a trained Vanilla.
    vanilla, target = make_encoder("shared", seed=9), make_instruct(separate=True)
    continue_from(vanilla, target, "vanilla")
    for name, tensor in target.state_dict().items():
        origin = name.replace("instruction_backbone.", "backbone.")
        assert torch.equal(tensor, vanilla.state_dict()[origin]), name


def test_prompt_is_the_beginning_of_the_text(make_instruct, make_encoder):
    prompt, plain = make_instruct(PromptEncoder), make_encoder("shared")
    paper = Document("p", "bara", "beli bomu")
    wanted = plain.encode(["find bito buna cara bara [SEP] beli bomu"], "search")
    assert torch.equal(prompt.encode([paper], "search"), wanted)
    assert torch.equal(prompt.encode([paper], tasks=list(TASKS))["search"], wanted)


@pytest.mark.parametrize("pool_prompt", [True, False])
def test_mean_includes_the_prompt_only_with_pool_prompt(make_instruct, pool_prompt):
    encoder = make_instruct(PromptEncoder, pooling="mean", pool_prompt=pool_prompt).eval()
    tokens = encoder.tokenizer(["find bito buna cara bara beli"], return_tensors="pt")
    states = encoder.backbone(**tokens).last_hidden_state[0]
    first = 0 if pool_prompt else 1 + len(encoder.tokenizer.tokenize("find bito buna cara"))  # with [CLS]
    wanted = states[first:].mean(0, keepdim=True)
    torch.testing.assert_close(encoder.encode(["bara beli"], "search"), wanted, atol=2e-6, rtol=1e-5)


def test_missing_and_too_long_instructions_raise_user_error(make_instruct):
    with pytest.raises(UserError, match="task search has no instruction"):
        make_instruct(instructions=INSTRUCTIONS | {"search": " "})
    with pytest.raises(
        UserError, match="instruction of task search has 72 tokens, but the backbone has positions for 64"
    ):
        make_instruct(instructions=INSTRUCTIONS | {"search": "bara " * 70})
    with pytest.raises(UserError, match="leaves no room for texts in max_length 32"):
        make_instruct(PromptEncoder, instructions=INSTRUCTIONS | {"search": "bara " * 40})
