"""Checkpoints of SciMult's authors give the vectors, loss and gradients that their code computed."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from datamodules.records import UserError
from datamodules.text import token_ids
from lightning_modules.encoders.loading import load_encoder
from lightning_modules.encoders.scimult_format import EXPERTS, _our_key
from lightning_modules.losses import comparable, info_nce
from tests.conftest import packed

GOLDEN = Path(os.environ.get("SCIMULT_GOLDEN", Path(__file__).parents[4] / "shared" / "golden"))
pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"no outputs of the authors' code in {GOLDEN} (SCIMULT_GOLDEN names another folder)"
)
MOE = ("moe_attn", "moe_fwd", "moe_attn_fwd")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert-tiny")
    for path in GOLDEN.glob("bert-tiny_*"):
        shutil.copy(path, folder / path.name.removeprefix("bert-tiny_"))
    return folder


@pytest.fixture(scope="module")
def tokens():
    return tuple(torch.from_numpy(np.load(GOLDEN / f"{name}.npy")) for name in ("input_ids", "attention_mask"))


def close(ours, expected, tolerance=1e-5):
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=0)


def states(encoder, ids, mask, task):
    """Return the states of the last layer, (B, S, D), with zeros for padding."""
    kept = []
    pooling, pool = encoder.pooling, encoder.pool
    encoder.pooling, encoder.pool = "mean", lambda hidden, *_: kept.append(hidden) or hidden
    encoder(packed(ids, mask), task)
    encoder.pooling, encoder.pool = pooling, pool
    result = kept[0].new_zeros(*mask.shape, kept[0].shape[1])
    result[mask.bool()] = kept[0]
    return result


@pytest.mark.parametrize("name", ["dense", *MOE])
def test_vectors_equal_those_of_the_authors_code(bert, tokens, name):
    encoder, expected = (
        load_encoder(GOLDEN / f"{name}.ckpt", backbone=bert),
        load_file(GOLDEN / f"{name}.expected.safetensors"),
    )
    assert tuple(encoder.tasks) == EXPERTS
    with torch.no_grad():
        for number, task in enumerate(EXPERTS):
            suffix = "" if name == "dense" else f"_expert{number}"
            close(encoder(packed(*tokens), task), expected[f"cls{suffix}"])
            close(states(encoder, *tokens, task), expected[f"seq{suffix}"])
            texts = expected["text_input_ids"], expected["text_attention_mask"]
            close(encoder(packed(*texts), task), expected[f"text_cls{suffix}"])


@pytest.mark.parametrize("name", MOE)
def test_vectors_of_a_mixed_batch_equal_those_of_the_authors_code(bert, tokens, name):
    encoder, expected = (
        load_encoder(GOLDEN / f"{name}.ckpt", backbone=bert),
        load_file(GOLDEN / f"{name}.expected.safetensors"),
    )
    tasks = [EXPERTS[number] for number in np.load(GOLDEN / "mixed_expert_ids.npy")]
    close(encoder(packed(*tokens), tasks), expected["cls_mixed"])
    with pytest.raises(ValueError, match="2 tasks for 12 texts"):
        encoder(packed(*tokens), tasks[:2])


def test_token_ids_equal_those_of_the_authors_code(bert):
    encoder, expected = (
        load_encoder(GOLDEN / "dense.ckpt", backbone=bert),
        load_file(GOLDEN / "dense.expected.safetensors"),
    )
    texts = json.loads((GOLDEN / "texts.json").read_text())
    wanted = zip(expected["text_input_ids"], expected["text_attention_mask"].bool(), strict=True)
    assert token_ids(texts, encoder.tokenizer, 128) == [ids[mask].tolist() for ids, mask in wanted]


def test_mean_pooling_equals_that_of_the_authors_code(bert, tokens, tmp_path):
    checkpoint = torch.load(GOLDEN / "moe_attn.ckpt", weights_only=True)
    checkpoint["encoder_params"]["mean_pool"] = True
    torch.save(checkpoint, tmp_path / "mean.ckpt")
    encoder = load_encoder(tmp_path / "mean.ckpt", backbone=bert)
    expected = load_file(GOLDEN / "moe_attn_meanpool.expected.safetensors")
    for number, task in enumerate(EXPERTS):
        close(encoder(packed(*tokens), task), expected[f"meannorm_expert{number}"])


@pytest.mark.parametrize("name", ["dense", *MOE])
@pytest.mark.parametrize(("similarity", "temperature"), [("dot", 1.0), ("cosine", 0.01)])
def test_loss_and_gradients_equal_those_of_the_authors_code(bert, tokens, name, similarity, temperature):
    """In float64, because a temperature of 0.01 magnifies the rounding of ours and of theirs, which is in float32."""
    encoder, expected = (
        load_encoder(GOLDEN / f"{name}.ckpt", backbone=bert).double(),
        load_file(GOLDEN / f"{name}.expected.safetensors"),
    )
    vectors = encoder(packed(*tokens), "link_prediction")
    queries, documents = comparable(vectors, similarity).split([4, len(vectors) - 4])
    loss = info_nce(queries @ documents.T / temperature, torch.tensor([[0], [2], [4], [6]])).mean()
    prefix = f"train_{similarity[:3]}"
    close(loss.reshape(1), expected[f"{prefix}_loss"].double())
    loss.backward()
    gradients = {f"{n}": p.grad for n, p in encoder.named_parameters() if p.grad is not None}
    compared = 0
    for key, gradient in expected.items():
        if key.startswith(f"{prefix}_grad::question_model.encoder."):
            ours = _our_key(key.split("question_model.encoder.")[1], EXPERTS)
            if ours in gradients:
                close(gradients[ours], gradient.double(), 5e-5)
                compared += 1
            else:
                assert not gradient.any(), ours  # an idle expert, or the unused pooler
    assert compared >= 5


def saved(tmp_path, change):
    checkpoint = torch.load(GOLDEN / "moe_attn.ckpt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    return tmp_path / "changed.ckpt"


def test_nested_settings_and_optimizer_states_are_accepted(bert, tokens, tmp_path):
    def change(checkpoint):
        checkpoint["encoder_params"] = {"encoder": checkpoint["encoder_params"]}
        checkpoint |= {"optimizer_dict": {"state": {}}, "scheduler_dict": {}, "offset": 3, "epoch": 1}
        for tower in ("question_model", "ctx_model"):
            checkpoint["model_dict"].pop(f"{tower}.encoder.embeddings.position_ids")

    plain = load_encoder(GOLDEN / "moe_attn.ckpt", backbone=bert)
    other = load_encoder(saved(tmp_path, change), backbone=bert)
    assert torch.equal(plain(packed(*tokens), "search"), other(packed(*tokens), "search"))


def drop(key):
    return lambda checkpoint: [
        checkpoint["model_dict"].pop(f"{t}.encoder.{key}") for t in ("question_model", "ctx_model")
    ]


QUERY = "encoder.layer.1.attention.self.moe_query.2.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("encoder.layer.0.output.dense.weight"), "1 missing .backbone.encoder.layer.0.output.dense.weight"),
        (lambda c: c["model_dict"].update({"span_proj.weight": torch.ones(1)}), "1 unexpected keys .span_proj.weight"),
        (
            lambda c: c["model_dict"].update({f"question_model.encoder.{QUERY}": torch.ones(32, 32)}),
            "tower: required, query or document",
        ),
        (lambda c: c["encoder_params"].update(num_expert=4), "num_expert 4, but the weights contain 3"),
        (
            lambda c: c["encoder_params"].update(moe_type="mod3:attn"),
            "mod3 means experts in layers .2, 5., .* .1, 3, 5.",
        ),
        (lambda c: c["encoder_params"].update(use_infer_expert=True), "use_infer_expert"),
        (lambda c: c["encoder_params"].update(projection_dim=16), "projection of 16"),
        (lambda c: c.update(model_dict={}), "has no question_model"),
    ],
)
def test_inconsistent_checkpoints_raise_user_error(bert, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        load_encoder(saved(tmp_path, change), backbone=bert)


def test_missing_or_unsuitable_backbone_raises_user_error(bert, tmp_path):
    with pytest.raises(UserError, match="backbone: required"):
        load_encoder(GOLDEN / "dense.ckpt")
    with pytest.raises(UserError, match="backbone: '/no/where' is not an existing file or folder"):
        load_encoder(GOLDEN / "dense.ckpt", backbone="/no/where")
    wider = tmp_path / "wider"
    shutil.copytree(bert, wider)
    config = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(UserError, match="with the wrong shape"):
        load_encoder(GOLDEN / "dense.ckpt", backbone=wider)
