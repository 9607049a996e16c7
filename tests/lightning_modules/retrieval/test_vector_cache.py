"""Which texts the vector cache encodes again, and which it does not."""

import numpy as np
import pytest
import torch
from tokenizers.normalizers import BertNormalizer
from tokenizers.processors import TemplateProcessing
from transformers import ModernBertConfig, ModernBertModel

from datamodules.records import Document
from lightning_modules.encoders.backbone import random_backbone
from lightning_modules.encoders.loading import build, describe, load_encoder
from lightning_modules.encoders.shared import SharedEncoder
from lightning_modules.retrieval.compute import computing_in
from lightning_modules.retrieval.vector_cache import VectorCache, fingerprint
from tests.conftest import toy_collection


def test_encoding_that_was_killed_continues_at_the_missing_shards(make_encoder, tmp_path, monkeypatch):
    encoder, texts = make_encoder("attention"), list(toy_collection().corpus.values())
    embedded, most = [], 2
    original = encoder.encode_each

    def counted(groups, task, **options):
        for documents in groups:
            if len(embedded) == most:
                raise KeyboardInterrupt
            embedded.append(len(documents))
            yield from original([documents], task, **options)

    monkeypatch.setattr(encoder, "encode_each", counted)
    cache = VectorCache(encoder, tmp_path, shard_size=3)
    with pytest.raises(KeyboardInterrupt):
        cache.vectors(texts, "search", "documents")
    assert embedded == [3, 3]
    (cache.folder / ".half.npy.1").write_bytes(b"left by a killed process")
    embedded[:], most = [0], 9
    vectors = VectorCache(encoder, tmp_path, shard_size=3).vectors(texts, "search", "documents")
    assert embedded == [0, 3, 1]
    monkeypatch.undo()
    np.testing.assert_allclose(np.concatenate(list(vectors)), encoder.encode(texts, "search").numpy(), atol=1e-5)
    cache.remove()
    assert not cache.folder.exists()


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_files_are_not_written_again(make_encoder, tmp_path, caplog, similarity):
    encoder, texts = make_encoder("attention"), list(toy_collection().corpus.values())

    def files():
        return {path: path.stat().st_ino for path in tmp_path.rglob("*.npy")}

    VectorCache(encoder, tmp_path, similarity=similarity).vectors(texts, "search", "d")
    seen = files()
    VectorCache(encoder, tmp_path, similarity=similarity).vectors(texts, "search", "d")
    assert files() == seen
    assert "damaged" not in caplog.text


def test_vectors_are_reused_for_the_same_encoder_task_texts_and_similarity(make_encoder, tmp_path):
    encoder, texts = make_encoder("attention"), list(toy_collection().corpus.values())

    def shards():
        return {path.name for path in tmp_path.rglob("*.npy")}

    cache = VectorCache(encoder, tmp_path)
    cache.vectors(texts, "search", "d")
    seen = shards()
    assert len(seen) == 1
    VectorCache(make_encoder("attention"), tmp_path).vectors(texts, "search", "d")
    assert shards() == seen
    cache.vectors(texts, "classification", "d")
    VectorCache(encoder, tmp_path, similarity="cosine").vectors(texts, "search", "d")
    cache.vectors([*texts[:-1], Document("d9", "other", "words")], "search", "d")
    assert len(shards()) == 4


def changed_in_place(encoder):
    with torch.no_grad():
        next(encoder.parameters()).mul_(1.5)


def changed_through_data(encoder):
    next(encoder.parameters()).data.mul_(1.5)


def changed_by_a_fused_optimizer(encoder):
    parameter = next(encoder.parameters())
    parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW([parameter], lr=0.01, fused=True).step()


def shortened(encoder):
    encoder.max_length = 4


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("change", [changed_in_place, changed_through_data, changed_by_a_fused_optimizer, shortened])
def test_changed_encoder_gets_new_vectors(make_encoder, tmp_path, change, on_disk):
    encoder, texts = make_encoder("attention"), list(toy_collection().corpus.values())
    cache = VectorCache(encoder, tmp_path if on_disk else None)
    before = cache.vectors(texts, "search", "d")[0].copy()
    np.testing.assert_array_equal(cache.vectors(texts, "search", "d")[0], before)
    change(encoder)
    after = cache.vectors(texts, "search", "d")[0]
    np.testing.assert_array_equal(after, encoder.encode(texts, "search").numpy())
    assert np.abs(after - before).max() > 1e-4
    assert cache.fingerprint == fingerprint(encoder)


@pytest.mark.parametrize("on_disk", [False, True])
def test_each_precision_has_its_own_vectors(make_encoder, tmp_path, on_disk):
    encoder, texts = make_encoder("attention"), list(toy_collection().corpus.values())
    cache, vectors = VectorCache(encoder, tmp_path if on_disk else None), {}
    for precision in ("fp32", "bf16", "fp16", "fp32"):
        with computing_in(precision, encoder.device):
            vectors[precision] = cache.vectors(texts, "search", "d")[0].copy()
    np.testing.assert_array_equal(vectors["fp32"], encoder.encode(texts, "search").numpy())
    for one, other in (("fp32", "bf16"), ("fp32", "fp16"), ("bf16", "fp16")):
        assert 1e-6 < np.abs(vectors[one] - vectors[other]).max() < 0.2


def with_epsilon(encoder):
    for module in encoder.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 0.1
    encoder.backbone.config.layer_norm_eps = 0.1


def with_case(encoder):
    encoder.tokenizer.backend_tokenizer.normalizer = BertNormalizer(lowercase=False)


def without_separator(encoder):
    encoder.tokenizer.backend_tokenizer.post_processor = TemplateProcessing("[CLS] $A", None, [("[CLS]", 2)])


def with_half_the_heads(encoder):
    encoder.backbone.config.num_attention_heads = encoder.family.num_heads = 2
    for layer in encoder.family.layers:
        layer.attention.self.num_attention_heads, layer.attention.self.attention_head_size = 2, 16


@pytest.mark.parametrize("change", [with_epsilon, with_case, without_separator, with_half_the_heads])
def test_fingerprint_differs_if_equal_weights_give_other_vectors(make_encoder, change):
    one, other = make_encoder("shared"), make_encoder("shared")
    assert fingerprint(one) == fingerprint(other)
    change(other)
    texts = ["Bara BELI omu", "dito"]
    assert not torch.allclose(one.encode(texts, "search"), other.encode(texts, "search"), atol=1e-4)
    assert fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize("setting", [{"num_attention_heads": 2}, {"hidden_act": "relu"}, {"layer_norm_eps": 0.1}])
def test_fingerprint_differs_for_another_backbone_of_equal_weights(make_encoder, setting):
    one, other = make_encoder("shared"), make_encoder("shared", config=setting)
    other.load_state_dict(one.state_dict())
    assert fingerprint(one) != fingerprint(other)


def test_fingerprint_differs_for_other_rotary_positions(vocabulary):
    def make(theta, window):
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        config = ModernBertConfig(
            **shape, vocab_size=len(vocabulary), global_rope_theta=theta, local_attention=window, pad_token_id=0
        )
        return SharedEncoder(ModernBertModel(config), random_backbone({}, vocabulary)[1], {"search": "search"})

    assert fingerprint(make(160000.0, 128)) == fingerprint(make(160000.0, 128))
    assert len({fingerprint(make(*each)) for each in ((160000.0, 128), (100.0, 128), (160000.0, 8))}) == 3


def test_fingerprint_survives_saving_and_using_a_model(make_encoder, tmp_path):
    encoder = make_encoder("attention")
    first = fingerprint(encoder)
    encoder.encode(["bara beli", "omu"], "search")  # sets truncation and padding of the tokenizer
    assert fingerprint(encoder) == first
    assert fingerprint(load_encoder(encoder.save_pretrained(tmp_path / "saved"))) == first
    assert fingerprint(build(describe(encoder)).to_empty(device="cpu")) != first  # no weights


def test_the_last_two_results_stay_in_memory(make_encoder, monkeypatch):
    encoder, papers = make_encoder("attention"), list(toy_collection().corpus.values())
    encoded, original, encode = [], encoder.encode_each, make_encoder("attention").encode

    def counted(groups, task, **options):
        return original((encoded.append(len(group)) or group for group in groups), task, **options)

    monkeypatch.setattr(encoder, "encode_each", counted)
    cache = VectorCache(encoder, similarity="cosine")
    corpus, queries, others = papers[:6], papers[6:8], papers[8:9]
    for texts in (corpus, queries, corpus, queries, corpus, others, corpus):
        vectors = cache.vectors(texts, "search", "texts")[0]
        expected = torch.nn.functional.normalize(encode(texts, "search"), dim=-1).numpy()
        np.testing.assert_array_equal(vectors, expected)
    assert encoded == [6, 2, 1]
    np.testing.assert_array_equal(
        cache.vectors_of_rank(corpus, "search", "texts"), cache.vectors(corpus, "search", "")[0]
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda good: good[:-20],
        lambda good: good[:60],
        lambda good: b"",
        lambda good: b"not numpy" * 50,
        lambda good: good[:200] + bytes([good[200] ^ 4]) + good[201:],
        lambda good: good + b"x",
    ],
)
def test_damaged_vectors_are_encoded_again(make_encoder, tmp_path, caplog, damage):
    """They ended in a traceback, or in other figures."""
    encoder, texts = make_encoder("attention"), list(toy_collection().corpus.values())
    VectorCache(encoder, tmp_path).vectors(texts, "search", "d")
    (path,) = tmp_path.rglob("*.npy")
    good = path.read_bytes()
    path.write_bytes(damage(good))
    vectors = VectorCache(encoder, tmp_path).vectors(texts, "search", "d")
    assert path.read_bytes() == good
    assert np.array_equal(np.concatenate(list(vectors)), encoder.encode(texts, "search").numpy())
    assert f"{path} is damaged" in caplog.text
    path.write_bytes(good[:-8])  # as earlier versions wrote it
    VectorCache(encoder, tmp_path).vectors(texts, "search", "d")
    assert path.read_bytes() == good[:-8]
