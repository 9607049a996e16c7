"""LoRA: the matrices that peft adds are those of the paper, only they are trained, and merging them changes nothing."""

import copy
import json
import re
import sys
from collections import defaultdict

import pytest
import torch
from torch.func import functional_call

from datamodules.packed import Tokens
from datamodules.records import UserError
from lightning_modules.encoders.adapters import AdapterEncoder
from lightning_modules.encoders.backbone import load_backbone
from lightning_modules.encoders.export import average, save_dense, save_reference
from lightning_modules.encoders.extend import add_tasks
from lightning_modules.encoders.loading import describe, load_encoder, without_lora
from lightning_modules.encoders.lora import LoraOptions, add_lora
from lightning_modules.encoders.shared import SharedEncoder
from lightning_modules.optim import OptimOptions, parameter_groups
from tests.conftest import TASKS
from tests.lightning_modules.encoders.test_packed import FAMILIES, make_family, make_tokens, pooled
from tests.lightning_modules.encoders.test_pretrained import KINDS, TEXTS

# parameters of a kind outside the backbone
OWN = {"routed": "gates.", "adapters": "adapters.", "stitched": "stitches."}
OPTIONS = LoraOptions(rank=4, alpha=6.0)


@pytest.fixture
def make(make_backbone):
    """Make an encoder with LoRA. trained: whether its matrices have changed since."""

    def make(name, trained=True, options=OPTIONS, **arguments):
        kind, own = KINDS[name]
        own = own | ({"freeze_backbone": False} if name == "adapters" else {})
        encoder = kind(*make_backbone(), TASKS, normalize=True, max_length=32, **own | arguments)
        add_lora(encoder, options)
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in encoder.parameters() if trained else ():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return encoder.eval()

    return make


def is_matrix(name):
    return name.endswith((".lora_A.default.weight", ".lora_B.default.weight"))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_the_formula_in_float64(make_backbone, family, pooling):
    plain = make_family(family).double()
    encoder = SharedEncoder(copy.deepcopy(plain), make_backbone()[1], TASKS, pooling=pooling, max_length=48)
    add_lora(encoder, LoraOptions(rank=3, alpha=5.0))
    matrices = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    weights = dict(plain.named_parameters())
    for name in [name for name in matrices if ".lora_A." in name]:
        up = matrices[name.replace("lora_A", "lora_B")]
        torch.nn.init.normal_(up, std=0.3)
        weight = name.removeprefix("backbone.").replace(".lora_A.default", "")
        weights[weight] = weights[weight].detach() + 5 / 3 * up @ matrices[name]
    tokens, ids, mask = make_tokens(plain.config.pad_token_id)
    states = functional_call(plain, weights, kwargs={"input_ids": ids, "attention_mask": mask}).last_hidden_state
    expected, vectors = pooled(states, mask, pooling), encoder(tokens, "search")
    tolerance = 1e-6 if family == "modernbert" else 1e-12  # transformers rotates its queries and keys in float32
    torch.testing.assert_close(vectors, expected, atol=tolerance, rtol=0)
    direction = torch.randn(vectors.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours, theirs = (torch.autograd.grad((x * direction).sum(), [*matrices.values()]) for x in (vectors, expected))
    assert len(ours) == 2 * len(encoder.family.layers) * (2 if family == "modernbert" else 4)
    for name, one, other in zip(matrices, ours, theirs, strict=True):
        assert float(other.abs().max()) > 1e-6, name
        torch.testing.assert_close(one, other, atol=10 * tolerance * float(other.abs().max() + 1), rtol=0, msg=name)


@pytest.mark.parametrize("name", KINDS)
def test_only_the_matrices_and_what_is_outside_the_backbone_are_trained(make, name):
    encoder = make(name, trained=False)
    own = OWN.get(name, "none")
    before = {key: p.detach().clone() for key, p in encoder.named_parameters()}
    options = OptimOptions(lr=0.01, weight_decay=0.5)
    optimizer = torch.optim.AdamW(parameter_groups(encoder, options, encoder.num_layers), fused=True)
    tokens = Tokens.pack([[2, word, word + 1, 3] for word in range(5, 45)])  # enough for every expert of control
    for task in [*TASKS, *TASKS]:
        optimizer.zero_grad()
        encoder.train().forward_with_penalty(tokens, task)[0][:, :5].sum().backward()
        optimizer.step()
    for key, parameter in encoder.named_parameters():
        assert torch.equal(parameter, before[key]) == (not is_matrix(key) and not key.startswith(own)), key
    assert any(map(is_matrix, before))


@pytest.mark.parametrize("name", ["attention", "ffn", "both", "routed"])
def test_experts_start_with_equal_matrices(make, name):
    state = make(name, trained=False).state_dict()
    matrices = defaultdict(list)
    for key, tensor in state.items():
        if ".experts." in key and is_matrix(key):
            matrices[re.sub(r"\.experts\.\w+", "", key)].append(tensor)
    assert matrices
    for key, (first, *others) in matrices.items():
        assert others
        assert all(torch.equal(other, first) for other in others), key
        assert bool(first.any()) == (".lora_A." in key)


@pytest.mark.parametrize("name", KINDS)
def test_merged_vectors_equal_the_others(make, name, tmp_path, monkeypatch):
    """A checkpoint and an exported folder are loaded without peft."""
    encoder = make(name)
    start = make(name, trained=False).encode(TEXTS, tasks=list(TASKS))
    expected = encoder.encode(TEXTS, tasks=list(TASKS))
    state = {f"encoder.{key}": tensor for key, tensor in encoder.state_dict().items()}
    torch.save({"encoder": describe(encoder), "state_dict": state}, tmp_path / "run.ckpt")
    folder = encoder.save_pretrained(tmp_path / "whole")
    monkeypatch.setitem(sys.modules, "peft", None)
    for again in (load_encoder(tmp_path / "run.ckpt"), load_encoder(folder), without_lora(encoder)):
        assert not any(map(is_matrix, again.state_dict()))
        assert without_lora(again) is again
        for task, vectors in again.encode(TEXTS, tasks=list(TASKS)).items():
            torch.testing.assert_close(vectors, expected[task], atol=1e-6, rtol=0)
            assert not torch.allclose(vectors, start[task], atol=1e-3)


@pytest.mark.parametrize("name", ["shared", "attention", "ffn", "both", "prompt"])
def test_plain_exports_have_the_merged_weights(make, name, tmp_path):
    encoder = make(name, pooling="mean")
    expected = encoder.encode(TEXTS, "search")
    plain = load_encoder(save_dense(encoder, "search", tmp_path / "plain"))
    torch.testing.assert_close(plain.encode(TEXTS, "search"), expected, atol=1e-6, rtol=0)
    if name == "prompt":
        return
    layers = {} if name == "shared" else {"layers": "mod2"}
    encoder = make(name, pooling="mean", **layers)
    reference = load_encoder(save_reference(encoder, tmp_path / "their.ckpt"), backbone=tmp_path / "plain")
    torch.testing.assert_close(reference.encode(TEXTS, "search"), encoder.encode(TEXTS, "search"), atol=1e-6, rtol=0)
    if name != "shared":
        assert not any(map(is_matrix, average(encoder).state_dict()))


@pytest.mark.parametrize("name", ["attention", "ffn", "both"])
def test_new_experts_train_only_their_matrices(make, name):
    encoder = make(name)
    before = encoder.encode(TEXTS, "search")
    add_tasks(encoder, {"reviews": "reviews"}, {"reviews": "search"})
    assert torch.equal(encoder.encode(TEXTS, "reviews"), before)
    trained = [key for key, parameter in encoder.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(is_matrix(key) and ".experts.reviews." in key for key in trained)


def test_targets(make):
    def layers(name, *targets):
        encoder = make(name, options=LoraOptions(rank=2, targets=list(targets)))
        keys = [key.removesuffix(".lora_A.default.weight") for key in encoder.state_dict() if ".lora_A." in key]
        return {key.partition("layer.0.")[2] for key in keys if "layer.0." in key}

    assert layers("shared") == {f"attention.{x}" for x in ("self.query", "self.key", "self.value", "output.dense")}
    assert layers("shared", "query", "attention.output.dense") == {"attention.self.query", "attention.output.dense"}
    assert layers("shared", "dense") == {"attention.output.dense", "intermediate.dense", "output.dense"}
    experts = layers("attention", "value")
    assert experts == {f"attention.self.experts.{task}.value" for task in TASKS}
    with pytest.raises(
        UserError, match=r"lora\.targets: unknown linear layer 'q'; expected one of attention\.output\."
    ):
        layers("shared", "query", "q")
    with pytest.raises(
        UserError, match=r"the experts would stay equal; add one of .* \(intermediate\.dense, output\.d"
    ):
        layers("ffn", "query")


def test_impossible_encoders_are_refused(make, make_backbone, monkeypatch):
    with pytest.raises(
        UserError, match=r"lora\.rank: AdapterEncoder does not train any linear layer of its backbone; set it"
    ):
        add_lora(AdapterEncoder(*make_backbone(), TASKS, max_length=32), OPTIONS)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"lora: the package peft is not installed \(pip install peft\)"):
        make("shared")


def test_damaged_matrices_raise_user_error(make, tmp_path):
    encoder = make("shared")
    description, path = describe(encoder), tmp_path / "run.ckpt"
    key = next(key for key in encoder.state_dict() if ".lora_A." in key)
    huge = torch.ones(1, 1).expand(4, 10**12)
    for damaged, scale in (
        *((tensor, 1.5) for tensor in (None, torch.ones(3, 32), torch.ones(4, 3), torch.ones(()), huge)),
        (encoder.state_dict()[key], "x"),
    ):
        weights = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items() if name != key}
        weights |= {} if damaged is None else {f"encoder.{key}": damaged}
        torch.save({"encoder": description | {"lora_scale": scale}, "state_dict": weights}, path)
        with pytest.raises(UserError, match=r"run\.ckpt: the matrices of LoRA do not fit the weights of backbone\.enc"):
            load_encoder(path)


def test_backbone_with_an_adapter_of_peft_is_refused(make, tmp_path):
    """Transformers would add it to the model, but only if peft is installed."""
    from peft import LoraConfig, get_peft_model

    folder = save_dense(make("shared"), "search", tmp_path / "plain")
    get_peft_model(load_backbone(str(folder))[0], LoraConfig(target_modules=["query"])).save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    with pytest.raises(UserError, match=r"contains an adapter of peft .* save the model after merge_and_unload\(\)"):
        load_encoder(folder)
