"""Models of other projects: DPR (both formats), the gates of TASER, RoBERTa folders; errors for unsuitable files."""

import copy
import json
import pickle
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertModel,
    DPRConfig,
    DPRContextEncoder,
    DPRQuestionEncoder,
    RobertaConfig,
    RobertaModel,
)

from datamodules.records import UserError
from lightning_modules.encoders.loading import describe, load_encoder
from lightning_modules.encoders.routed import RoutedEncoder
from lightning_modules.encoders.scimult_format import to_reference
from tests.conftest import TASKS, packed

TEXTS = ["bara beli", "bomu bito buna"]


@pytest.fixture
def bert(make_backbone, tmp_path):
    backbone, tokenizer = make_backbone()
    backbone.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def tokens_of(encoder):
    tokens = encoder.tokenizer(TEXTS, padding=True, return_tensors="pt")
    return tokens["input_ids"], tokens["attention_mask"]


@pytest.mark.parametrize("kind", [DPRQuestionEncoder, DPRContextEncoder])
def test_dpr_encoders_in_the_layout_of_hugging_face_are_loaded(make_backbone, tmp_path, kind):
    tokenizer = make_backbone()[1]
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = DPRConfig(vocab_size=400, max_position_embeddings=64, initializer_range=0.3, **shape)
    torch.manual_seed(3)
    model = kind(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    assert type(encoder.backbone) is BertModel
    expected = model(*tokens_of(encoder)).pooler_output  # DPR's is the last [CLS]
    torch.testing.assert_close(encoder.encode(TEXTS, "search"), expected, atol=2e-6, rtol=1e-5)
    again = load_encoder(encoder.save_pretrained(tmp_path / "ours"))
    assert torch.equal(again.encode(TEXTS, "search"), encoder.encode(TEXTS, "search"))
    kind(DPRConfig(vocab_size=400, projection_dim=16, **shape)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="projection of 16 dimensions"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("old_file", [False, True])
def test_one_tower_of_a_dpr_checkpoint_is_loaded(make_backbone, bert, tmp_path, old_file):
    towers = {"query": make_backbone(1)[0].eval(), "document": make_backbone(2)[0].eval()}
    prefixes = {"query": "question_model.", "document": "ctx_model."}
    model = {f"{prefixes[k]}{n}": p for k, b in towers.items() for n, p in b.state_dict().items()}
    model |= {f"{prefix}embeddings.position_ids": torch.arange(64)[None] for prefix in prefixes.values()}
    model |= {f"{prefix}pooler.dense.weight": torch.ones(32, 32) for prefix in prefixes.values()}
    settings = {"do_lower_case": True, "pretrained_model_cfg": "bert-base-uncased", "projection_dim": 0}
    checkpoint = {"model_dict": model, "encoder_params": settings, "optimizer_dict": {}, "offset": 0, "epoch": 1}
    torch.save(checkpoint, tmp_path / "dpr.cp", _use_new_zipfile_serialization=not old_file)
    with pytest.raises(UserError, match="tower: required, query or document, because the two towers of .* differ"):
        load_encoder(tmp_path / "dpr.cp", backbone=bert)
    for tower, backbone in towers.items():
        encoder = load_encoder(tmp_path / "dpr.cp", backbone=bert, tower=tower)
        expected = backbone(*tokens_of(encoder)).last_hidden_state[:, 0]
        torch.testing.assert_close(encoder.encode(TEXTS, "search"), expected, atol=2e-6, rtol=1e-5)
    with pytest.raises(UserError, match="tower: expected query or document, got 'both'"):
        load_encoder(tmp_path / "dpr.cp", backbone=bert, tower="both")


@pytest.mark.parametrize(("level", "moe_type", "per_layer"), [("sequence", "fwd", True), ("token", "fwd_tok", False)])
def test_gates_of_taser_are_loaded(make_backbone, bert, tmp_path, level, moe_type, per_layer):
    """The checkpoint uses the parameter names of TASER's code. test_routed tests the forward pass."""
    torch.manual_seed(4)
    ours = RoutedEncoder(
        *make_backbone(), TASKS, num_experts=2, layers=[1, 3], level=level, gate_per_layer=per_layer, max_length=64
    ).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model = {}
    for key, tensor in ours.state_dict().items():
        name = key.removeprefix("backbone.")
        for number in (0, 1):
            name = name.replace(f".intermediate.experts.expert{number}.", f".moe_layer.interm_layers.{number}.")
            name = name.replace(f".output.experts.expert{number}.", f".moe_layer.output_layers.{number}.")
        if name.startswith("gates."):
            layer = "" if name.startswith("gates.all") else f".{name.split('.')[1]}"
            name = f"encoder.expert_gate{layer}.fwd_func.{name.rpartition('.')[2]}"
        for tower in ("question_model", "ctx_model"):
            model[f"{tower}.encoder.{name}"] = tensor
    settings = {
        "use_infer_expert": True,
        "num_expert": 2,
        "moe_type": f"mod2:{moe_type}",
        "per_layer_gating": per_layer,
    }
    torch.save({"model_dict": model, "encoder_params": {"encoder": settings}}, tmp_path / "taser.cp")
    encoder = load_encoder(tmp_path / "taser.cp", backbone=bert)
    assert (encoder.level, encoder.gate_per_layer, encoder.expert_layers) == (level, per_layer, [1, 3])
    assert torch.equal(
        encoder(packed(*tokens_of(encoder)), "search"),
        ours(packed(*tokens_of(encoder)), "search"),
    )
    settings["use_infer_expert"] = False
    torch.save({"model_dict": model, "encoder_params": settings}, tmp_path / "taser.cp")
    with pytest.raises(UserError, match="use_infer_expert False, but the weights contain a gate"):
        load_encoder(tmp_path / "taser.cp", backbone=bert)


def test_roberta_folder_is_loaded(make_backbone, tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=400, max_position_embeddings=66, pad_token_id=1, initializer_range=0.3, **shape)
    backbone = RobertaModel(config, add_pooling_layer=False).eval()
    backbone.save_pretrained(tmp_path)
    make_backbone()[1].save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    assert encoder.max_length == 64
    ids = encoder.tokenizer(["bara beli"], return_tensors="pt")["input_ids"]
    expected = backbone(ids, torch.ones_like(ids)).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder.encode(["bara beli"], "search"), expected, atol=2e-6, rtol=1e-5)


def test_half_precision_files_are_loaded_as_float32(make_backbone, tmp_path):
    backbone, tokenizer = make_backbone()
    backbone.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    encoder = load_encoder(tmp_path / "half")
    again = load_encoder(encoder.save_pretrained(tmp_path / "ours"))
    for one in (encoder, again):
        assert {p.dtype for p in one.parameters()} == {torch.float32}
    assert torch.equal(encoder.encode(TEXTS, "search"), again.encode(TEXTS, "search"))


def test_damaged_and_unrelated_checkpoints_raise_user_error(bert, make_encoder, tmp_path):
    good = tmp_path / "good.ckpt"
    torch.save(to_reference(make_encoder("attention", max_length=64)), good)
    assert load_encoder(good, backbone=bert).encode(TEXTS, "search").shape == (2, 32)
    content = good.read_bytes()
    bad = tmp_path / "bad.ckpt"
    for part in (b"", content[:100], content[: len(content) // 2], content[:-50], b"\x80\x04" + content[:50]):
        bad.write_bytes(part)
        with pytest.raises(UserError, match=r"bad\.ckpt: not a checkpoint, or a damaged one"):
            load_encoder(bad, backbone=bert)
    for foreign in ([1, 2], {"model": {}}, {"model_dict": [1], "encoder_params": {}}, torch.ones(2)):
        torch.save(foreign, bad)
        with pytest.raises(UserError, match=r"bad\.ckpt: "):
            load_encoder(bad, backbone=bert)
    bad.write_bytes(pickle.dumps({"model_dict": {}, "encoder_params": {}}))
    with pytest.raises(UserError, match=r"bad\.ckpt: "):
        load_encoder(bad, backbone=bert)


ATTENTION = "question_model.encoder.encoder.layer.1.attention.self.moe_query"


@pytest.mark.usefixtures("time_limit")  # a huge number of experts fills the memory
@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({3: torch.ones(1)}, {}, "the keys of model_dict must be names of tensors, got 3"),
        ({}, {"encoder": "bert"}, "model_dict and encoder_params must be mappings"),
        (
            {f"{ATTENTION}.4.weight": torch.ones(1)},
            {"num_expert": 5},
            r"experts with the numbers 0, 1, .* got 0, 1, 2, 4",
        ),
        ({f"{ATTENTION}.300000000.weight": torch.ones(1)}, {"num_expert": 300000001}, "num_expert 300000001, but"),
        ({f"{ATTENTION}.{i}.weight": torch.ones(1) for i in range(1025)}, {"num_expert": 1025}, "up to 1023, got 0, 1"),
        ({}, {"moe_type": "mod" + "9" * 5000}, "layers: expected mod2"),
    ],
)
def test_impossible_reference_checkpoint_raises_user_error(bert, make_encoder, tmp_path, tensors, settings, message):
    checkpoint = to_reference(make_encoder("attention", max_length=64))
    checkpoint["model_dict"] |= tensors
    checkpoint["encoder_params"] |= settings
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match=message):
        load_encoder(tmp_path / "bad.ckpt", backbone=bert, tower="query")


def test_exported_folders_with_other_weights_or_descriptions_raise_user_error(make_encoder, tmp_path):
    folder = make_encoder("attention").save_pretrained(tmp_path / "model")
    weights, config = load_file(folder / "model.safetensors"), (folder / "config.json").read_text()
    key = "encoder.backbone.encoder.layer.1.attention.self.experts.search.query.weight"
    save_file({k: v for k, v in weights.items() if k != key}, folder / "model.safetensors")
    (folder / "checksum.json").unlink()
    with pytest.raises(
        UserError, match="1 missing .backbone.encoder.layer.1.attention.self.experts.search.query.weight"
    ):
        load_encoder(folder)
    save_file(weights | {"encoder.more": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="1 unexpected .more"):
        load_encoder(folder)
    save_file(weights | {key: torch.ones(2, 2)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"with the wrong shape .*expected \(32, 32\), got \(2, 2\)"):
        load_encoder(folder)
    save_file(weights, folder / "model.safetensors")
    for old, new, message in (
        ('"num_hidden_layers": 4', '"num_hidden_layers": 3', "unexpected"),
        ('"search": "search"', '"search": "serach"', "missing .*serach"),
        ('"lightning_modules.encoders.moe.MoEEncoder"', '"os.system"', "only classes of lightning_modules.encoders"),
        ('"attention": true', '"attenshun": true', "attenshun"),
        ('"pooling": "cls"', '"pooling": "median"', "pooling: expected one of cls, mean, .* got 'median'"),
    ):
        assert old in config
        (folder / "config.json").write_text(config.replace(old, new))
        with pytest.raises(UserError, match=message):
            load_encoder(folder)
    (folder / "config.json").write_text(config[:100])
    with pytest.raises(UserError):
        load_encoder(folder)


def test_plain_folder_with_other_weights_raises_user_error(bert, tmp_path):
    weights, config = load_file(bert / "model.safetensors"), (bert / "config.json").read_text()
    key = "encoder.layer.1.attention.self.query.weight"
    for changed, message in (
        ({k: v for k, v in weights.items() if k != key}, f"1 missing .{key}"),
        ({f"bogus.{k}": v for k, v in weights.items()}, "missing"),
        (weights | {key: torch.ones(2, 2)}, "with the wrong shape|size mismatch|cannot be loaded"),
    ):
        save_file(changed, bert / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=message):
            load_encoder(bert)
    save_file(
        weights | {"pooler.dense.weight": torch.ones(32, 32)}, bert / "model.safetensors", metadata={"format": "pt"}
    )
    load_encoder(bert)
    for layers, message in ((2, "unexpected .encoder.layer.2"), (6, "missing .encoder.layer.4")):
        (bert / "config.json").write_text(config.replace('"num_hidden_layers": 4', f'"num_hidden_layers": {layers}'))
        with pytest.raises(UserError, match=message):
            load_encoder(bert)


def mutated(value, draw):
    """Return a copy of plain containers in which one value is changed or removed."""
    value = copy.deepcopy(value)
    node, path = value, []
    while isinstance(node, dict | list) and node:
        key = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
        path.append((node, key))
        node = node[key]
        if draw.random() < 0.3:
            break
    parent, key = draw.choice(path)
    if isinstance(parent, dict) and draw.random() < 0.3:
        del parent[key]
    else:
        parent[key] = draw.choice([None, "", "x", -1, 0, 3.7, True, [None], {}, float("nan"), 10**9])
    return value


@pytest.mark.parametrize("seed", range(4))
def test_mutated_descriptions_raise_user_error_or_give_finite_vectors(make_encoder, tmp_path, seed):
    draw = random.Random(seed)
    encoder = make_encoder("attention")
    good = {"encoder": describe(encoder), "state_dict": {f"encoder.{k}": v for k, v in encoder.state_dict().items()}}
    folder = encoder.save_pretrained(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    refused = 0
    for _ in range(25):
        for path, content in ((tmp_path / "x.ckpt", mutated(good, draw)), (folder, mutated(config, draw))):
            if path == folder:
                (folder / "config.json").write_text(json.dumps(content))
            else:
                torch.save(content, path)
            try:
                loaded = load_encoder(path)
                assert torch.isfinite(loaded.encode(TEXTS, next(iter(loaded.tasks)))).all()
            except UserError:
                refused += 1
    assert refused > 5
