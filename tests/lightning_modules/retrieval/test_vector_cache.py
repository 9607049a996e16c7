"""Which texts the vector cache encodes again, and which it does not."""

import numpy as np
import pytest
import torch

from datamodules.records import Document
from lightning_modules.retrieval.vector_cache import VectorCache, fingerprint
from tests.conftest import toy_collection


def test_encoding_that_was_killed_continues_at_the_missing_shards(make_encoder, tmp_path, monkeypatch):
    encoder, texts = make_encoder("attention"), list(toy_collection().corpus.values())
    embedded = []
    original = encoder.encode

    def counted(documents, task, **options):
        if len(embedded) == 2:
            raise KeyboardInterrupt
        embedded.append(len(documents))
        return original(documents, task, **options)

    monkeypatch.setattr(encoder, "encode", counted)
    cache = VectorCache(encoder, tmp_path, shard_size=3)
    with pytest.raises(KeyboardInterrupt):
        cache.vectors(texts, "search", "documents")
    assert embedded == [3, 3]
    (cache.folder / ".half.npy.1").write_bytes(b"left by a killed process")
    embedded[:] = [0]
    monkeypatch.setattr(encoder, "encode", lambda d, t, **o: embedded.append(len(d)) or original(d, t, **o))
    vectors = VectorCache(encoder, tmp_path, shard_size=3).vectors(texts, "search", "documents")
    assert embedded == [0, 3, 1]
    np.testing.assert_allclose(np.concatenate(list(vectors)), original(texts, "search").numpy(), atol=1e-5)
    cache.remove()
    assert not cache.folder.exists()


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
    with torch.no_grad():
        next(encoder.parameters()).add_(1e-3)
    assert fingerprint(encoder) != cache.fingerprint


def test_the_last_two_results_stay_in_memory(make_encoder, monkeypatch):
    encoder, papers = make_encoder("attention"), list(toy_collection().corpus.values())
    encoded, original = [], encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda d, t, **o: encoded.append(len(d)) or original(d, t, **o))
    cache = VectorCache(encoder, similarity="cosine")
    corpus, queries, others = papers[:6], papers[6:8], papers[8:9]
    for texts in (corpus, queries, corpus, queries, corpus, others, corpus):
        vectors = cache.vectors(texts, "search", "texts")[0]
        expected = torch.nn.functional.normalize(original(texts, "search"), dim=-1).numpy()
        np.testing.assert_array_equal(vectors, expected)
    assert encoded == [6, 2, 1]
    np.testing.assert_array_equal(
        cache.vectors_of_rank(corpus, "search", "texts"), cache.vectors(corpus, "search", "")[0]
    )
