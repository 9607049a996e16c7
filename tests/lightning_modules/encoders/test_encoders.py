"""Encoders equal the forward pass of Hugging Face; experts start as copies of the backbone and then differ."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import RobertaConfig, RobertaModel

from datamodules.packed import Tokens
from datamodules.records import Document, UserError
from lightning_modules.encoders.attention import AttentionContext
from lightning_modules.encoders.backbone import SPECIAL_TOKENS, random_backbone, set_dropout, word_vocabulary
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.families import Experts
from lightning_modules.encoders.moe import MoEEncoder, expert_layers
from lightning_modules.encoders.shared import SharedEncoder
from lightning_modules.optim import OptimOptions, parameter_groups
from lightning_modules.retrieval.vector_cache import VectorCache
from tests.conftest import TASKS, packed, padded_tokens, separate, text_of

KINDS = ("shared", "attention", "ffn", "both")
MOE = KINDS[1:]


@pytest.fixture
def tokens():
    return padded_tokens(2, 3, 9, 20, 31, 12)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_vectors_equal_those_of_the_hugging_face_model(make_encoder, tokens, pooling):
    ids, mask = tokens
    encoder = make_encoder("shared", pooling=pooling).eval()
    states = encoder.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask[..., None].float()
    expected = states[:, 0] if pooling == "cls" else (states * weights).sum(1) / weights.sum(1)
    torch.testing.assert_close(encoder(packed(ids, mask), "search"), expected, atol=2e-6, rtol=1e-5)


def test_vectors_equal_those_of_roberta(tokens, make_backbone):
    ids, mask = tokens
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
        pad_token_id=1,
    )
    ids = torch.where(mask.bool(), ids, 1)
    backbone = RobertaModel(config, add_pooling_layer=False).eval()
    expected = backbone(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
    _, tokenizer = make_backbone()
    encoder = MoEEncoder(backbone, tokenizer, TASKS, layers="all", max_length=32).eval()
    torch.testing.assert_close(encoder(packed(ids, mask), "search"), expected, atol=2e-6, rtol=1e-5)
    assert encoder.family.max_positions == 38
    with pytest.raises(UserError, match="positions for 38"):
        SharedEncoder(RobertaModel(config, add_pooling_layer=False), tokenizer, TASKS, max_length=40)


@pytest.mark.parametrize("kind", MOE)
@pytest.mark.parametrize("layers", ["mod2", "all", [0]])
def test_new_experts_equal_the_backbone_bit_for_bit(make_encoder, tokens, kind, layers):
    shared, experts = make_encoder("shared").eval(), make_encoder(kind, layers=layers).eval()
    for task in TASKS:
        assert torch.equal(experts(packed(*tokens), task), shared(packed(*tokens), task))


@pytest.mark.parametrize("kind", MOE)
def test_each_task_has_its_own_expert(make_encoder, tokens, kind):
    encoder = separate(make_encoder(kind)).eval()
    vectors = [encoder(packed(*tokens), task) for task in TASKS]
    for i in range(3):
        assert not torch.allclose(vectors[i], vectors[i - 1], atol=1e-3)
    # Changing one expert changes only its task.
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if ".experts.search." in name:
                parameter.mul_(1.5)
    again = [encoder(packed(*tokens), task) for task in TASKS]
    assert torch.equal(again[0], vectors[0])
    assert torch.equal(again[1], vectors[1])
    assert not torch.allclose(again[2], vectors[2], atol=1e-3)


@pytest.mark.parametrize("kind", MOE)
def test_vectors_equal_those_of_a_backbone_with_the_weights_of_the_expert(make_encoder, tokens, kind):
    """The expected vectors come from a BERT of Hugging Face with the weights of one task."""
    encoder = separate(make_encoder(kind)).eval()
    dense = make_encoder("shared").eval().backbone
    for name, module in encoder.backbone.named_modules():
        if isinstance(module, Experts):
            dense.get_submodule(name).load_state_dict(module.experts["link_prediction"].state_dict())
    expected = dense(input_ids=tokens[0], attention_mask=tokens[1]).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder(packed(*tokens), "link_prediction"), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", MOE)
def test_step_on_one_task_does_not_change_other_experts_or_their_optimizer_state(make_encoder, tokens, kind):
    encoder = make_encoder(kind)
    optimizer = torch.optim.AdamW(parameter_groups(encoder, OptimOptions(lr=0.1), 4), lr=0.1, fused=True)
    for task in ("classification", "search"):  # so that the idle expert has an optimizer state
        optimizer.zero_grad(set_to_none=True)
        encoder(packed(*tokens), task).square().sum().backward()
        optimizer.step()
    idle = {n: p for n, p in encoder.named_parameters() if ".experts.classification." in n}
    never = {n: p for n, p in encoder.named_parameters() if ".experts.link_prediction." in n}
    before = {n: p.detach().clone() for n, p in (idle | never).items()}
    states = {n: copy.deepcopy(optimizer.state[p]) for n, p in idle.items()}
    optimizer.zero_grad(set_to_none=True)
    encoder(packed(*tokens), "search").square().sum().backward()
    optimizer.step()
    for name, parameter in (idle | never).items():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None
    for name, parameter in idle.items():
        assert states[name], name
        for key, value in states[name].items():
            assert torch.equal(optimizer.state[parameter][key], value), (name, key)
    assert not any(optimizer.state.get(p) for p in never.values())
    shared = [n for n, p in encoder.named_parameters() if ".experts." not in n and p.grad is not None]
    assert shared


@pytest.mark.parametrize("kind", MOE)
def test_number_of_operations_does_not_depend_on_the_number_of_experts(make_encoder, tokens, kind):
    def flops(encoder):
        counter = FlopCounterMode(display=False)
        with counter:
            encoder(packed(*tokens), next(iter(encoder.tasks)))
        return counter.get_total_flops()

    dense = flops(make_encoder("shared"))
    for count in (1, 3, 32):
        tasks = {f"task{i}": f"expert{i}" for i in range(count)}
        assert flops(make_encoder(kind, tasks=tasks)) == dense


def test_layernorm_of_attention_is_shared_and_that_of_the_ffn_is_not(make_encoder):
    names = [n for n, _ in make_encoder("both").named_parameters()]
    per_layer = [n.removeprefix("backbone.encoder.layer.1.") for n in names if ".layer.1." in n]
    assert [n for n in per_layer if n.startswith("attention") and "LayerNorm.weight" in n] == [
        "attention.output.LayerNorm.weight"
    ]
    assert sum(n.startswith("output.experts.") and "LayerNorm.weight" in n for n in per_layer) == 3


def test_number_of_parameters_equals_that_of_the_paper():
    """BERT-base: 12 layers of 768 dimensions, with three experts in every second layer."""
    config = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    tokens = [*SPECIAL_TOKENS, *(f"t{i}" for i in range(30517))]
    vocabulary = {token: i for i, token in enumerate(tokens)}

    def count(**kind):
        with torch.device("meta"):
            backbone, tokenizer = random_backbone(config, vocabulary)
            encoder = (
                MoEEncoder(backbone, tokenizer, TASKS, **kind) if kind else SharedEncoder(backbone, tokenizer, TASKS)
            )
        return sum(p.numel() for p in encoder.parameters()) + 590_592  # the paper counts the unused pooler

    assert count() == 109_482_240
    assert count(attention=True) == 137_830_656
    assert count(attention=False, ffn=True) == 166_169_856


def test_padding_does_not_change_vectors(make_encoder, tokens):
    ids, mask = tokens
    encoder = separate(make_encoder("both", pooling="mean")).eval()
    batched = encoder(packed(ids, mask), "search")
    for row in range(len(ids)):
        length = int(mask[row].sum())
        alone = encoder(packed(ids[row : row + 1, :length], mask[row : row + 1, :length]), "search")
        torch.testing.assert_close(batched[row : row + 1], alone, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_does_not_change_gradients(make_encoder, tokens, kind):
    grads = []
    for checkpointing in (False, True):
        encoder = make_encoder(kind)
        encoder.gradient_checkpointing = checkpointing
        set_dropout(encoder.backbone, 0.1, 0.1)
        torch.manual_seed(3)
        encoder(packed(*tokens), "search").square().sum().backward()
        grads.append({n: p.grad for n, p in encoder.named_parameters()})
    for name, grad in grads[0].items():
        assert (grad is None) == (grads[1][name] is None), name
        if grad is not None:
            assert torch.equal(grad, grads[1][name]), name


def test_dropout_is_only_active_in_training(make_encoder, tokens):
    encoder = make_encoder("attention").train()
    set_dropout(encoder.backbone, 0.5, 0.0)
    assert not torch.equal(encoder(packed(*tokens), "search"), encoder(packed(*tokens), "search"))
    set_dropout(encoder.backbone, 0.0, 0.5)
    assert not torch.equal(encoder(packed(*tokens), "search"), encoder(packed(*tokens), "search"))
    encoder.eval()
    assert torch.equal(encoder(packed(*tokens), "search"), encoder(packed(*tokens), "search"))


def test_encode_restores_the_training_mode_of_each_module(make_encoder):
    encoder = make_encoder("attention").train()
    encoder.backbone.embeddings.eval()
    encoder.encode(["bara"], "search")
    assert encoder.training
    assert encoder.backbone.encoder.training
    assert not encoder.backbone.embeddings.training
    assert not encoder.backbone.embeddings.LayerNorm.training


@pytest.mark.parametrize("budget", [16, 64, 4096])
def test_encode_keeps_the_order_of_documents(make_encoder, budget):
    encoder = make_encoder("attention").train()
    documents = [Document(str(i), text_of(i), text_of(*range(i % 9))) for i in range(40)]
    done = []
    vectors = encoder.encode(documents, "search", token_budget=budget, advance=done.append)
    assert encoder.training
    assert sum(done) == 40
    for i in (0, 8, 39):
        alone = encoder.encode([documents[i]], "search")
        torch.testing.assert_close(vectors[i : i + 1], alone, atol=2e-6, rtol=1e-5)
    assert encoder.encode([], "search").shape == (0, 32)
    torch.testing.assert_close(encoder.encode(["bara"], "search"), encoder.encode([Document("", "", "bara")], "search"))


def test_default_token_budget_fits_a_cpu(make_encoder, monkeypatch):
    encoder, sizes = make_encoder("shared"), []
    forward = encoder.forward_tasks
    monkeypatch.setattr(
        encoder, "forward_tasks", lambda ids, *rest: sizes.append(ids.num_tokens) or forward(ids, *rest)
    )
    texts = [Document(str(i), "", text_of(*range(9))) for i in range(600)]
    for encode in (encoder.encode, lambda *given: VectorCache(encoder).vectors(*given, "texts")):
        sizes.clear()
        encode(texts, "search")
        assert len(sizes) > 2
        assert 1024 < max(sizes) <= 2048


def test_mean_of_bfloat16_states_is_summed_in_float32(make_encoder):
    """A sum of 250 numbers in bfloat16 is 1 % off, and so were the vectors of long texts."""
    encoder = make_encoder("shared", pooling="mean")
    tokens = Tokens.pack([[5] * 250, [5] * 7])
    states = (1 + torch.randn(257, encoder.dimension)).bfloat16()
    pooled = encoder.pool(states, AttentionContext(tokens, tokens.positions(), {}), "search")
    expected = torch.stack([states[:250].double().mean(0), states[250:].double().mean(0)])
    torch.testing.assert_close(pooled.double(), expected, rtol=1e-5, atol=1e-6)


def test_normalized_vectors_have_length_one(make_encoder):
    vectors = make_encoder("shared", normalize=True).encode(["bara", "beli bomu"], "search")
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize(
    ("rule", "layers", "expected"),
    [
        ("mod2", 12, [1, 3, 5, 7, 9, 11]),
        ("mod3", 12, [2, 5, 8, 11]),
        ("mod4", 12, [3, 7, 11]),
        ("mod12", 12, [11]),
        ("ge6mod3", 12, [5, 8, 11]),
        ("le7mod3", 12, [0, 3, 6]),
        ("last2", 6, [4, 5]),
        ("all", 3, [0, 1, 2]),
        ([4, 0], 6, [0, 4]),
    ],
)
def test_layer_rules(rule, layers, expected):
    assert expert_layers(rule, layers) == expected


@pytest.mark.parametrize("rule", ["mod0", "even", "mod", "", [6], [-1], "mod7", []])
def test_rules_without_a_layer_raise_user_error(rule):
    with pytest.raises(UserError, match="layers"):
        expert_layers(rule, 6)


def test_tasks_can_share_an_expert(make_encoder, tokens):
    encoder = separate(make_encoder("attention", tasks={"a": "one", "b": "one", "c": "two"})).eval()
    assert torch.equal(encoder(packed(*tokens), "a"), encoder(packed(*tokens), "b"))
    assert not torch.equal(encoder(packed(*tokens), "a"), encoder(packed(*tokens), "c"))


@pytest.mark.parametrize("expert", ["a.b", "", "3", "keys", "get", "training", "an expert"])
def test_invalid_expert_names_raise_user_error(make_encoder, expert):
    with pytest.raises(UserError, match="expert .*expected a name of letters"):
        make_encoder("attention", tasks={"search": expert})


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_task_raises_user_error(make_encoder, tokens, kind):
    with pytest.raises(UserError, match="unknown task 'clasification': .* classification, link_prediction, search"):
        make_encoder(kind)(packed(*tokens), "clasification")


def test_max_length_above_the_positions_of_the_backbone_raises_user_error(make_encoder):
    with pytest.raises(UserError, match="max_length: got 128 tokens, but the backbone has positions for 64"):
        make_encoder("shared", max_length=128)


def test_unsupported_backbones_and_poolings_raise_user_error(make_backbone):
    backbone, tokenizer = make_backbone()
    with pytest.raises(UserError, match="backbone: Linear is not supported; expected a model of type bert, roberta"):
        Encoder(torch.nn.Linear(2, 2), tokenizer, TASKS)
    with pytest.raises(UserError, match="pooling: expected one of cls, mean, .* got 'median'"):
        Encoder(backbone, tokenizer, TASKS, pooling="median", max_length=32)
    with pytest.raises(UserError, match="attention, ffn: both are false"):
        MoEEncoder(backbone, tokenizer, TASKS, attention=False, max_length=32)


def test_vocabulary_has_the_most_frequent_words_and_spells_others():
    vocabulary = word_vocabulary(["bara bara beli", "bara beli bomu"], 5 + 2 * 9 + 2)
    assert {"bara", "beli"} <= set(vocabulary)
    assert "bomu" not in vocabulary
    _, tokenizer = random_backbone({"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}, vocabulary)
    assert tokenizer.tokenize("Bara bomu") == ["bara", "b", "##o", "##m", "##u"]
    with pytest.raises(UserError, match="vocab_size: got 6"):
        word_vocabulary(["bara"], 6)


def test_invalid_fields_of_a_random_backbone_raise_user_error(vocabulary):
    with pytest.raises(UserError, match="transformers.BertConfig has no field hiden_size"):
        random_backbone({"hiden_size": 8}, vocabulary)
    for config in (
        {"hidden_size": 10, "num_attention_heads": 3},
        {"hidden_size": -4},
        {"hidden_act": "foo"},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": "many"},
    ):
        with pytest.raises(UserError, match="backbone config"):
            random_backbone(config, vocabulary)
