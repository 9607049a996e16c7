"""Encoding in groups: the same bits, texts tokenised ahead, and one wait for the device per block."""

import threading
from contextlib import closing

import numpy as np
import pytest
import torch

import datamodules.tokens
from datamodules.batches import BatchOptions
from datamodules.conversion import stored
from datamodules.packed import token_hash
from datamodules.readers.beir import BeirReader, write_beir
from datamodules.records import Document, Task
from datamodules.tasks import LinkPredictionDataModule, SearchDataModule
from datamodules.tokens import Encoding, TokenTable
from lightning_modules.encoders import pipeline
from lightning_modules.encoders.instruct import PromptEncoder
from lightning_modules.encoders.pipeline import copied_to
from lightning_modules.retrieval.evaluation import evaluate
from lightning_modules.retrieval.vector_cache import VectorCache, vectors_of_pool
from tests.conftest import TASKS, text_of, toy_collection


@pytest.fixture(autouse=True)
def cache(token_cache):
    return token_cache


@pytest.fixture
def encoder(make_encoder):
    encoder = make_encoder()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # experts that differ
    return encoder


def documents_of(count, seed=0):
    return [Document(str(i), text_of(i, seed), text_of(*range(seed, seed + i % 9))) for i in range(count)]


def tokenising_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("tokenise")]


class FakeDevice:
    """Pretend that tensors are on a GPU: copies to the host arrive when the host waits for an event."""

    def __init__(self, monkeypatch):
        self.log, self.copies = [], []
        launch, device = pipeline._Block.launch, self

        class Event:
            def record(self):
                self.copies, device.copies = device.copies, []

            def synchronize(self):
                device.log.append("wait")
                with torch.inference_mode():
                    for target, source in self.copies:
                        target.add_(source)

        def host_buffer(shape, dtype, _):
            buffer = torch.zeros(shape, dtype=dtype)
            buffer.copy_ = lambda source, non_blocking: self.copies.append((buffer, source))
            buffer.to = lambda device, non_blocking: self.log.append("copy") or torch.Tensor.clone(buffer)
            return buffer

        monkeypatch.setattr(pipeline, "is_asynchronous", lambda _: True)
        monkeypatch.setattr(pipeline, "host_buffer", host_buffer)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(pipeline._Block, "launch", lambda *given: self.log.append("launch") or launch(*given))


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("kind", ["moe", "instruct"])
def test_groups_have_the_bits_of_single_calls(encoder, make_backbone, monkeypatch, kind, asynchronous):
    if kind == "instruct":  # each task has another prompt
        instructions = {"classification": "bara", "link_prediction": "beli bomu", "search": "bito"}
        encoder = PromptEncoder(*make_backbone(), TASKS, instructions, max_length=32)
    monkeypatch.setattr(pipeline, "BLOCK", 16)
    groups = [documents_of(40), [], documents_of(3, 5), documents_of(16, 2), [], documents_of(17, 7)]
    options = {"tasks": list(TASKS), "token_budget": 64}
    expected = [encoder.encode(group, **options) for group in groups]
    if asynchronous:
        FakeDevice(monkeypatch)
    for vectors, wanted, group in zip(encoder.encode_each(iter(groups), **options), expected, groups, strict=True):
        assert list(vectors) == list(TASKS)
        for task in TASKS:
            assert vectors[task].shape == (len(group), 32)
            assert vectors[task].dtype == torch.float32
            assert torch.equal(vectors[task], wanted[task])
    for vectors, wanted in zip(encoder.encode_each(groups, "search", token_budget=64), expected, strict=True):
        assert torch.equal(vectors, wanted["search"])
    assert not torch.equal(expected[0]["search"], expected[0]["classification"])


def test_host_copies_and_waits_once_per_block_and_one_block_late(encoder, monkeypatch):
    monkeypatch.setattr(pipeline, "BLOCK", 16)
    device, passes = FakeDevice(monkeypatch), []
    encoder.encode(documents_of(64), "search", token_budget=64, advance=passes.append)
    assert len(passes) > 2 * 4
    assert sum(passes) == 64
    launches = ["launch", "copy"]
    assert device.log == [*launches, *launches, "wait", *launches, "wait", *launches, "wait", "wait"]


def test_batches_are_slices_of_one_copy():
    lengths = [3, 1, 4, 1, 5]
    ids = np.arange(sum(lengths), dtype=np.uint32) + 70_000
    table = TokenTable(ids, np.cumsum([0, *lengths]))
    batches = list(copied_to(torch.device("cpu"), table, [2, 1, 2], has_keys=True))
    assert [batch.lengths for batch in batches] == [(3, 1), (4,), (1, 5)]
    assert [batch.offsets.tolist() for batch in batches] == [[0, 3, 4], [0, 4], [0, 1, 6]]
    assert torch.cat([batch.input_ids for batch in batches]).tolist() == ids.tolist()
    assert {(batch.input_ids.dtype, batch.offsets.dtype) for batch in batches} == {(torch.int64, torch.int32)}
    keys = [key for batch in batches for key in batch.keys]
    assert keys == [token_hash(text) for text in table]
    assert len(set(keys)) == 5
    batches = copied_to(torch.device("cpu"), table, [2, 1, 2], has_keys=False)
    assert [batch.keys for batch in batches] == [(0, 0), (0,), (0, 0)]


def test_each_forward_pass_runs_while_the_next_texts_are_tokenised(encoder, monkeypatch):
    """Both wait for each other. Without overlap, the test would time out."""
    count, meeting = 6, threading.Barrier(2, timeout=60)
    tokenise, forward, calls = Encoding._tokenise, encoder.forward_tasks, {"tokenise": 0, "forward": 0}

    def waiting_tokenise(*given):
        calls["tokenise"] += 1
        if calls["tokenise"] > 1:
            meeting.wait()
        return tokenise(*given)

    def waiting_forward(*given):
        calls["forward"] += 1
        if calls["forward"] < count:
            meeting.wait()
        return forward(*given)

    monkeypatch.setattr(Encoding, "_tokenise", waiting_tokenise)
    monkeypatch.setattr(encoder, "forward_tasks", waiting_forward)
    monkeypatch.setattr(datamodules.tokens, "_num_threads", lambda: 1)
    assert len(list(encoder.encode_each((documents_of(4, i) for i in range(count)), "search"))) == count
    assert calls == {"tokenise": count, "forward": count}


@pytest.mark.parametrize("ending", ["close", "interrupt", "failure of the caller"])
def test_early_end_leaves_the_encoder_as_it_was_and_no_threads(encoder, ending):
    encoder.train()
    encoder.backbone.embeddings.eval()
    modes = [module.training for module in encoder.modules()]

    def advance(_):
        if ending == "interrupt":
            assert not encoder.training
            raise KeyboardInterrupt

    def consume():
        with closing(
            encoder.encode_each((documents_of(200, i) for i in range(9)), "search", advance=advance)
        ) as groups:
            for _ in groups:
                assert [module.training for module in encoder.modules()] == modes  # between the groups too
                if ending == "failure of the caller":
                    raise KeyboardInterrupt
                break

    if ending == "close":
        consume()
    else:
        with pytest.raises(KeyboardInterrupt):
            consume()
    assert [module.training for module in encoder.modules()] == modes
    assert not tokenising_threads()
    assert encoder.encode(["bara"], "search").shape == (1, 32)


def test_wrong_arguments_raise_before_the_first_group(encoder):
    with pytest.raises(TypeError, match="either task or tasks"):
        encoder.encode_each([])
    with pytest.raises(TypeError, match=r"documents\[1\]: expected a text"):
        list(encoder.encode_each([["bara"], ["bara", 3]], "search"))


def test_second_evaluation_tokenises_nothing(encoder, make_task, tokenised):
    (benchmark,) = make_task(SearchDataModule).benchmarks("test")
    first = evaluate(encoder, benchmark, ["ndcg@10"]).metrics
    assert tokenised
    del tokenised[:]
    assert evaluate(encoder, benchmark, ["ndcg@10"]).metrics == first
    assert not tokenised


@pytest.mark.parametrize("kind", [SearchDataModule, LinkPredictionDataModule])
def test_mining_and_evaluation_read_the_ids_that_training_has_stored(encoder, tmp_path, tokenised, cache, kind):
    cache.limit = 0
    collection = toy_collection(papers=kind is LinkPredictionDataModule)
    write_beir(collection, tmp_path / "data")
    reader = BeirReader(str(tmp_path / "data"))
    options = BatchOptions(batch_size=4, num_batches=8, max_length=encoder.max_length, cache=str(tmp_path / "cache"))
    data = kind(Task("search", "search"), {"toy": reader}, options, encoder.tokenizer)
    data.setup()
    (pool,), (benchmark,) = data.pools(), data.benchmarks("test")
    expected = [encoder.encode(list(documents), "search").numpy() for documents in (pool.queries, pool.corpus)]
    data.train_dataloader()  # stores the ids
    assert any((tmp_path / "cache").rglob("corpus.ids"))
    del tokenised[:]
    for shards, vectors in zip(vectors_of_pool(VectorCache(encoder), pool), expected, strict=True):
        np.testing.assert_array_equal(np.concatenate(list(shards)), vectors)
    assert not tokenised
    evaluate(encoder, benchmark, ["ndcg@10"])
    assert sum(map(len, tokenised)) in (0, len(benchmark.queries))  # these are in memory
    assert stored(reader, tmp_path / "cache").folder in (tmp_path / "cache").iterdir()
