"""ModernBERT (LayerNorm first, rotary positions, windows) and MPNet (bias by distance), compared with Hugging Face."""

import pytest
import torch
from transformers import (
    AutoModel,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
)

from datamodules.records import UserError
from lightning_modules.encoders.adapters import AdapterEncoder
from lightning_modules.encoders.backbone import load_backbone, set_dropout
from lightning_modules.encoders.export import save_dense
from lightning_modules.encoders.extend import add_tasks
from lightning_modules.encoders.families import Experts
from lightning_modules.encoders.instruct import InstructEncoder
from lightning_modules.encoders.loading import continue_from, load_encoder
from lightning_modules.encoders.moe import MoEEncoder
from lightning_modules.encoders.routed import RoutedEncoder
from lightning_modules.encoders.shared import SharedEncoder
from lightning_modules.optim import OptimOptions, parameter_groups
from tests.conftest import TASKS, packed, padded_tokens


@pytest.fixture
def make_modern(make_backbone):
    """A ModernBERT with windows of 8 positions to either side in two of four layers, smaller than texts of 40."""

    def make(**settings):
        torch.manual_seed(0)
        config = ModernBertConfig(
            **{
                "vocab_size": 400,
                "hidden_size": 32,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "intermediate_size": 48,
                "max_position_embeddings": 64,
                "local_attention": 16,
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
                "initializer_range": 0.3,
                "pad_token_id": 0,
                "attention_dropout": 0.0,
            }
            | settings
        )
        return changed(ModernBertModel(config)), make_backbone()[1]

    return make


def changed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def make_mpnet(make_backbone):
    def make(**settings):
        torch.manual_seed(0)
        sizes = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
        sizes |= {"intermediate_size": 48, "max_position_embeddings": 66}
        return changed(MPNetModel(MPNetConfig(**sizes | settings), add_pooling_layer=False)), make_backbone()[1]

    return make


@pytest.fixture(params=["make_modern", "make_mpnet"])
def make_family(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=[7, 40])
def tokens(request):
    return padded_tokens(2, 3, request.param, max(4, request.param - 9))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [SharedEncoder, MoEEncoder])
def test_vectors_equal_those_of_modernbert(make_modern, tokens, pooling, bias, kind):
    ids, mask = tokens
    backbone, tokenizer = make_modern(attention_bias=bias, mlp_bias=bias, norm_bias=bias)
    states = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask[..., None].float()
    expected = states[:, 0] if pooling == "cls" else (states * weights).sum(1) / weights.sum(1)
    encoder = kind(backbone, tokenizer, TASKS, pooling=pooling, max_length=64).eval()
    torch.testing.assert_close(encoder(packed(ids, mask), "search"), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("attention", "ffn"), [(True, False), (False, True), (True, True)])
def test_vectors_of_an_expert_equal_those_of_a_plain_model_with_its_weights(make_family, tokens, attention, ffn):
    backbone, tokenizer = make_family()
    dense = make_family()[0]
    encoder = MoEEncoder(backbone, tokenizer, TASKS, attention=attention, ffn=ffn, max_length=64).eval()
    for module in encoder.modules():
        if isinstance(module, Experts):
            changed(module)
    for name, module in encoder.backbone.named_modules():
        if isinstance(module, Experts):
            dense.get_submodule(name).load_state_dict(module.experts["search"].state_dict())
    expected = dense(input_ids=tokens[0], attention_mask=tokens[1]).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder(packed(*tokens), "search"), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(encoder(packed(*tokens), "classification"), expected, atol=1e-3)


def test_new_routed_encoder_equals_its_backbone(make_family, tokens):
    backbone, tokenizer = make_family()
    expected = backbone(input_ids=tokens[0], attention_mask=tokens[1]).last_hidden_state[:, 0]
    for level, attention in (("sequence", True), ("token", False)):
        encoder = RoutedEncoder(make_family()[0], tokenizer, TASKS, level=level, attention=attention, max_length=64)
        torch.testing.assert_close(encoder.eval()(packed(*tokens), "search"), expected, atol=1e-5, rtol=1e-5)


def test_positions_of_text_and_instruction_both_start_at_zero(make_modern, tokens):
    """The expected states of one layer come from an explicit softmax over all rotated keys."""
    backbone, tokenizer = make_modern(num_hidden_layers=1, layer_types=["full_attention"])
    encoder = InstructEncoder(backbone, tokenizer, {"search": "s"}, {"search": "bara beli"}, max_length=64).eval()
    ids, mask = tokens
    instruction = torch.tensor([tokenizer("bara beli")["input_ids"]])

    def projected(x):
        q, k, v = backbone.layers[0].attn.Wqkv(x).chunk(3, -1)
        split = lambda y: y.view(*y.shape[:2], 4, 8).transpose(1, 2)  # noqa: E731
        rope = backbone.config.rope_parameters["full_attention"]["rope_theta"]
        angles = torch.arange(x.shape[1])[:, None] * rope ** (-torch.arange(0, 8, 2) / 8.0)

        def rotate(y):
            a, b = y.chunk(2, -1)
            return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

        return rotate(split(q)), rotate(split(k)), split(v)

    text, other = backbone.embeddings(input_ids=ids), backbone.embeddings(input_ids=instruction)
    (q, k, v), (_, ki, vi) = projected(text), projected(other)
    k, v = torch.cat([ki.expand(len(ids), -1, -1, -1), k], 2), torch.cat([vi.expand(len(ids), -1, -1, -1), v], 2)
    seen = torch.cat([torch.ones(len(ids), instruction.shape[1]), mask], 1).bool()
    scores = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(~seen[:, None, None], float("-inf"))
    hidden = text + backbone.layers[0].attn.Wo((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    hidden = hidden + backbone.layers[0].mlp(backbone.layers[0].mlp_norm(hidden))
    expected = backbone.final_norm(hidden)[:, 0]
    torch.testing.assert_close(encoder(packed(ids, mask), "search"), expected, atol=1e-5, rtol=1e-5)


def test_prefix_trains_only_the_instruction_encoder(make_family, tokens):
    backbone, tokenizer = make_family()
    encoder = InstructEncoder(backbone, tokenizer, {"s": "s"}, {"s": "bara"}, separate=True, max_length=64).train()
    encoder(packed(*tokens), "s").square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_family_is_saved_loaded_and_exported(make_family, tmp_path):
    backbone, tokenizer = make_family()
    backbone.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    plain = load_encoder(tmp_path / "plain")
    tokens = tokenizer(["bara beli"], return_tensors="pt")
    expected = backbone(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state[:, 0]
    torch.testing.assert_close(plain.encode(["bara beli"], "search"), expected, atol=1e-5, rtol=1e-5)
    encoder = MoEEncoder(*load_backbone(str(tmp_path / "plain")), TASKS, max_length=64)
    again = load_encoder(encoder.save_pretrained(tmp_path / "ours"))
    torch.testing.assert_close(again.encode(["bara beli"], "search"), expected, atol=1e-5, rtol=1e-5)
    exported = AutoModel.from_pretrained(save_dense(changed(encoder), "search", tmp_path / "export")).eval()
    states = exported(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state
    ours = encoder.encode(["bara beli"], "search")
    torch.testing.assert_close(states[:, 0], ours, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, expected, atol=1e-3)


def test_experts_continue_from_a_trained_encoder_and_a_new_task_leaves_their_vectors_alone(make_family):
    trained = SharedEncoder(*make_family(), TASKS, max_length=64).eval()
    encoder = MoEEncoder(*make_family(), TASKS, max_length=64).eval()
    changed(encoder)
    continue_from(trained, encoder, "trained")
    expected = trained.encode(["bara beli"], "search")
    torch.testing.assert_close(encoder.encode(["bara beli"], "search"), expected, atol=1e-6, rtol=1e-6)
    before = encoder.encode(["bara beli"], tasks=list(TASKS))
    add_tasks(encoder, {"new": "new"}, {"new": "search"})
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=1.0)
    ids = torch.tensor([encoder.tokenizer("bara beli")["input_ids"]])
    encoder(packed(ids, torch.ones_like(ids)), "new").sum().backward()
    optimizer.step()
    assert not torch.allclose(encoder.encode(["bara beli"], "new"), expected, atol=1e-3)
    for task, vectors in before.items():
        assert torch.equal(encoder.encode(["bara beli"], task), vectors)


def test_each_dropout_applies_to_its_part_of_mpnet(make_mpnet, tokens):
    backbone, tokenizer = make_mpnet()
    encoder = SharedEncoder(backbone, tokenizer, TASKS, max_length=64).train()
    attention = [module.dropout for module in backbone.modules() if hasattr(module, "q")]
    assert len(attention) == 4
    for settings in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5)):
        set_dropout(backbone, *settings)
        assert {module.p for module in attention} == {settings[1]}
        others = [m for m in backbone.modules() if isinstance(m, torch.nn.Dropout) and m not in attention]
        assert {module.p for module in others} == {settings[0]}
        same = torch.equal(encoder(packed(*tokens), "search"), encoder(packed(*tokens), "search"))
        assert same == (settings == (0.0, 0.0))


def test_dropout_and_layer_decay_apply_to_modernbert(make_modern, tokens):
    backbone, tokenizer = make_modern(attention_dropout=0.1)
    encoder = SharedEncoder(backbone, tokenizer, TASKS, max_length=64).train()
    set_dropout(backbone, 0.0, 0.0)
    assert torch.equal(encoder(packed(*tokens), "search"), encoder(packed(*tokens), "search"))
    for settings in ((0.5, None), (None, 0.5)):
        set_dropout(backbone, 0.0, 0.0)
        set_dropout(backbone, *settings)
        assert not torch.equal(encoder(packed(*tokens), "search"), encoder(packed(*tokens), "search"))
    groups = parameter_groups(encoder, OptimOptions(lr=1.0, layer_decay=0.5), encoder.num_layers)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates[id(backbone.layers[0].mlp.Wi.weight)] == 0.5**3
    assert rates[id(backbone.embeddings.tok_embeddings.weight)] == 0.5**4


def test_unsupported_models_raise_user_error_with_their_name(make_modern, make_backbone, tmp_path):
    tokenizer = make_backbone()[1]
    shape = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    electra = ElectraModel(ElectraConfig(**shape, intermediate_size=64, embedding_size=16))
    with pytest.raises(UserError, match=r"backbone: ElectraModel \(electra\) is not supported; expected .*modernbert"):
        SharedEncoder(electra, tokenizer, TASKS)
    DistilBertModel(DistilBertConfig(vocab_size=400, dim=32, n_layers=1, n_heads=4, hidden_dim=64)).save_pretrained(
        tmp_path
    )
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match="is a model of type distilbert; expected bert, roberta, .*, modernbert or dpr$"
    ):
        load_encoder(tmp_path)
    with pytest.raises(UserError, match="expected bert, roberta, .*, modernbert$"):  # DPR needs its weights
        load_backbone(str(tmp_path), with_weights=False)
    with pytest.raises(UserError, match="ModernBertModel cannot have adapters"):
        AdapterEncoder(*make_modern(), TASKS, max_length=64)
