"""Stored collections equal those in memory, and are converted only once."""

import json
import multiprocessing
import os
import pickle
import random
import time

import pytest

from datamodules.batches import BatchOptions
from datamodules.conversion import FileReader, StreamingReader, describe, stored
from datamodules.examples import in_memory
from datamodules.readers import io
from datamodules.readers.beir import BeirReader, write_beir
from datamodules.readers.jsonl import JsonlReader
from datamodules.records import Document, Task, UserError
from datamodules.sample import SampleReader
from datamodules.store import BATCH_ROWS, StoredCollection, StoredDocuments
from datamodules.tasks import KINDS
from tests.conftest import text_of
from tests.datamodules.readers.test_fuzz import mutated, retyped
from tests.datamodules.readers.worlds import WORLDS

VIEWS = {"classification": "topics", "link_prediction": "citations", "search": "searches"}


class Streamed:
    """A streaming reader of a given collection. folder: folder of its source files."""

    def __init__(self, collection, folder):
        self._collection, self.folder, self._read_count = collection, folder, 0

    def read(self):
        return self._collection

    def sources(self):
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def _corpus(self):
        return iter(self._collection.corpus.values())

    def stream(self, sink):
        self._read_count += 1
        for document in self._corpus():
            sink.add_document(document)
        for query in self._collection.queries.values():
            sink.add_query(query)
        for split, qrels in self._collection.qrels.items():
            for query, grades in qrels.items():
                for document, grade in grades.items():
                    sink.add_judgement(split, query, document, grade)


@pytest.fixture(params=VIEWS)
def streamed(request, tmp_path):
    collection = SampleReader(VIEWS[request.param], num_papers=500).read()
    write_beir(collection, tmp_path / "data")
    return request.param, Streamed(collection, tmp_path / "data")


def test_stored_collection_equals_the_one_read(streamed, tmp_path):
    _, reader = streamed
    expected, actual = reader._collection, stored(reader, tmp_path / "cache")
    assert list(actual.corpus) == list(expected.corpus)
    assert list(actual.corpus.values()) == list(expected.corpus.values())
    assert dict(actual.queries) == dict(expected.queries)
    assert actual.splits == expected.splits
    for split in expected.splits:
        queries, qrels = actual.judged(split)
        assert qrels == expected.qrels[split]
        assert queries == expected.judged(split)[0]
    for queries_are_documents in (False, True):
        ours = [list(part) for part in actual.table(queries_are_documents)[0]]
        parts, examples = in_memory(expected, queries_are_documents)
        assert ours == parts
        assert list(actual.table(queries_are_documents)[1]) == list(examples)


def test_stored_and_in_memory_collections_give_the_same_batches_and_benchmarks(streamed, tmp_path, make_backbone):
    kind, reader = streamed
    actual = []
    for cache in ("", str(tmp_path / "cache")):
        options = BatchOptions(batch_size=4, num_batches=6, max_length=32, num_workers=2 if cache else 0, cache=cache)
        task = KINDS[kind](Task(kind, kind), {"toy": reader}, options, make_backbone()[1])
        task.setup()
        assert isinstance(task.collections["toy"], StoredCollection) == bool(cache)
        batches = [batch.fingerprint for batch in task.train_dataloader()]
        benchmarks = [(b.name, dict(b.corpus), dict(b.queries), dict(b.qrels)) for b in task.benchmarks("test")]
        actual.append((batches, benchmarks, list(task.texts())))
    assert actual[0] == actual[1]


def test_collection_is_converted_again_only_if_a_file_changes(streamed, tmp_path):
    _, reader = streamed
    first = stored(reader, tmp_path / "cache")
    assert stored(reader, tmp_path / "cache").folder == first.folder
    assert reader._read_count == 1
    source = reader.sources()[0]
    source.write_bytes(source.read_bytes() + b"\n")
    again = stored(reader, tmp_path / "cache")
    assert reader._read_count == 2
    assert again.folder != first.folder
    assert again.fingerprint() == first.fingerprint()  # its content is the same


def test_failed_conversion_leaves_nothing_and_can_be_repeated(streamed, tmp_path):
    _, reader = streamed
    whole = reader._corpus

    def broken():
        yield from list(whole())[:7]
        raise UserError("corpus.jsonl, line 8: invalid JSON")

    reader._corpus = broken
    with pytest.raises(UserError, match="line 8"):
        stored(reader, tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    reader._corpus = whole
    assert list(stored(reader, tmp_path / "cache").corpus) == list(reader._collection.corpus)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache: cannot use the folder .*file"):
        stored(reader, tmp_path / "file")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-8]),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"[]"),
        lambda path: path.unlink(),
        flip,
    ],
)
def test_any_damaged_file_is_converted_again(streamed, tmp_path, caplog, damage):
    """A flipped bit gave other texts or a traceback; other damage was an error that asked to delete the folder."""
    _, reader = streamed
    folder = stored(reader, tmp_path / "cache").folder
    good = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for name in good:
        caplog.clear()
        damage(folder / name)
        stored(reader, tmp_path / "cache")
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == good
        assert f"{folder} is damaged" in caplog.text
        assert name in caplog.text
    caplog.clear()
    stored(reader, tmp_path / "cache")
    assert "damaged" not in caplog.text


def _convert(reader, cache, seen):
    seen.put(str(stored(reader, cache).folder))


@pytest.mark.slow
def test_concurrent_processes_convert_once(streamed, tmp_path):
    _, reader = streamed
    whole = reader._corpus

    def slow():
        (tmp_path / f"started-{time.monotonic_ns()}").touch()
        time.sleep(0.3)
        return whole()

    reader._corpus = slow
    context = multiprocessing.get_context("fork")
    seen = context.Queue()
    processes = [context.Process(target=_convert, args=(reader, tmp_path / "cache", seen)) for _ in range(3)]
    for process in processes:
        process.start()
    folders = {seen.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(folders) == 1
    assert len(list(tmp_path.glob("started-*"))) == 1


def test_stored_documents_span_several_arrow_batches(tmp_path):
    count = 2 * BATCH_ROWS + 17

    class Many(Streamed):
        def _corpus(self):
            return (Document(f"d{i}", text_of(i), f"{text_of(i)} {i}") for i in range(count))

        def stream(self, sink):
            for document in self._corpus():
                sink.add_document(document)
            sink.add_query(Document("q", "", "bara"))
            sink.add_judgement("train", "q", f"d{count - 1}", 1)
            sink.add_judgement("train", "q", "d0", 0)

    (tmp_path / "data").mkdir()
    actual = stored(Many(None, tmp_path / "data"), tmp_path / "cache")
    assert len(actual.corpus) == count
    for i in (0, BATCH_ROWS - 1, BATCH_ROWS, 2 * BATCH_ROWS, count - 1):
        assert actual.corpus.values()[i] == Document(f"d{i}", text_of(i), f"{text_of(i)} {i}")
    assert actual.corpus.values()[-1].id == f"d{count - 1}"
    with pytest.raises(IndexError):
        actual.corpus.values()[count]
    (example,) = actual.table(False)[1]
    assert (example.query, example.positives, example.hard_negatives) == (count, (count - 1,), (0,))
    again = pickle.loads(pickle.dumps(actual.corpus))
    assert isinstance(again, StoredDocuments)
    assert again["d5"] == actual.corpus.values()[5]


def test_file_changed_with_the_same_time_is_converted_again(streamed, tmp_path):
    _, reader = streamed
    first = stored(reader, tmp_path / "cache")
    source = reader.sources()[0]
    before, content = source.stat(), source.read_bytes()
    source.write_bytes(content.replace(b"e", b"i", 1))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert stored(reader, tmp_path / "cache").folder != first.folder


def test_streaming_a_beir_folder_raises_the_errors_of_reading(streamed, tmp_path):
    _, reader = streamed
    beir = BeirReader(str(reader.folder))
    assert isinstance(beir, StreamingReader)
    actual, expected = stored(beir, tmp_path / "cache"), beir.read()
    assert list(actual.corpus.values()) == list(expected.corpus.values())
    assert {split: actual.judged(split)[1] for split in actual.splits} == expected.qrels
    qrels = reader.folder / "qrels" / "train.tsv"
    good = qrels.read_text()
    query, document, grade = good.splitlines()[1].split("\t")
    for line, message in (
        (
            f"{query}\t{document}\t{int(grade) + 1}",
            f"split train: query '{query}' and document '{document}' have the scores",
        ),
        (f"nobody\t{document}\t1", "these query ids are not in queries.jsonl .1 lines, 1 different ids.: 'nobody'"),
        (f"{query}\t{document}", "line [0-9]+: expected query-id, corpus-id and score"),
        (f"{query}\t{document}\thigh", "line [0-9]+: the score must be an integer"),
    ):
        qrels.write_text(good + line + "\n")
        with pytest.raises(UserError, match=message):
            stored(beir, tmp_path / "cache")
    # A repeated judgement with the same score is harmless.
    qrels.write_text(good + "\t".join((query, document, grade)) + "\n")
    assert stored(beir, tmp_path / "cache").judged("train")[1] == expected.qrels["train"]
    corpus = reader.folder / "corpus.jsonl"
    texts = corpus.read_text().splitlines()
    corpus.write_text("\n".join([*texts, texts[0]]) + "\n")
    with pytest.raises(
        UserError, match=rf"corpus.jsonl, line {len(texts) + 1}: duplicate id .*, which an earlier line also has"
    ):
        stored(beir, tmp_path / "cache")


def test_skipped_lines_are_logged_on_every_use(streamed, tmp_path, caplog):
    _, reader = streamed
    with open(reader.folder / "corpus.jsonl", "a") as corpus:
        corpus.write("no json\n")
    quarantine = tmp_path / "run" / "quarantine.jsonl"
    beir = BeirReader(str(reader.folder), on_error="skip", quarantine=str(quarantine))
    for _ in range(2):
        caplog.clear()
        actual = stored(beir, tmp_path / "cache")
        assert list(actual.corpus) == list(reader._collection.corpus)
        assert "left out 1 bad line" in caplog.text
    assert len(quarantine.read_text().splitlines()) == 1


def outcome(act):
    """Return the result of an action, or "rejected" if it raises UserError."""
    try:
        return act()
    except UserError:
        return "rejected"


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_conversion_of_every_reader_equals_its_collection(world, tmp_path, monkeypatch):
    world.write(tmp_path / "data")
    reader, opened = world.make(tmp_path / "data"), []
    assert isinstance(reader, FileReader)
    monkeypatch.setattr(io, "open_text", lambda path, real=io.open_text: opened.append(path) or real(path))
    expected = reader.read()
    assert set(opened) == set(reader.sources())
    actual = stored(reader, tmp_path / "cache")
    assert dict(actual.corpus) == dict(expected.corpus)
    assert dict(actual.queries) == dict(expected.queries)
    assert {split: actual.judged(split)[1] for split in actual.splits} == expected.qrels
    assert stored(world.make(tmp_path / "data"), tmp_path / "cache").folder == actual.folder
    assert describe(world.make(tmp_path / "data", on_error="skip")) != describe(reader)


def jsonl_folder(collection, folder):
    """Write a collection for JsonlReader. Every fifth query of a split has a second line."""
    folder.mkdir()
    records = [{"id": d.id, "title": d.title, "text": d.text} for d in collection.corpus.values()]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for split, qrels in collection.qrels.items():
        records = []
        for query, grades in qrels.items():
            positives = {id: grade for id, grade in grades.items() if grade > 0}
            negatives = [id for id, grade in grades.items() if grade == 0]
            records.append({"query": {"id": query}, "positives": positives, "negatives": negatives})
            if len(records) % 5 == 0:
                records.append({"query": query, "positives": positives})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["fail", "skip"])
@pytest.mark.parametrize("kind", ["beir", "jsonl"])
def test_streaming_agrees_with_reading_on_mutated_files(tmp_path, kind, policy):
    collection = SampleReader("citations", num_papers=500).read()
    (write_beir if kind == "beir" else jsonl_folder)(collection, tmp_path / "data")
    make = BeirReader if kind == "beir" else JsonlReader
    rng, num_rejected = random.Random(policy), 0
    for turn in range(60):
        path = rng.choice([p for p in sorted((tmp_path / "data").rglob("*")) if p.is_file()])
        good = path.read_bytes()
        path.write_bytes(rng.choice((mutated, retyped))(good, rng))
        reader = make(str(tmp_path / "data"), on_error=policy, quarantine=str(tmp_path / "quarantine.jsonl"))
        expected = outcome(reader.read)
        actual = outcome(lambda reader=reader, turn=turn: stored(reader, tmp_path / f"cache{turn}"))
        path.write_bytes(good)
        if "rejected" in (actual, expected):
            assert actual == expected
            num_rejected += 1
            continue
        assert list(actual.corpus.values()) == list(expected.corpus.values())
        assert dict(actual.queries) == dict(expected.queries)
        assert {split: actual.judged(split)[1] for split in actual.splits} == expected.qrels
    assert num_rejected < 55
    assert policy == "skip" or num_rejected > 5


def test_skip_policy_ignores_contradicting_scores(streamed, tmp_path, caplog):
    _, reader = streamed
    qrels = reader.folder / "qrels" / "train.tsv"
    query, document, grade = qrels.read_text().splitlines()[1].split("\t")
    with open(qrels, "a") as file:
        file.write(f"{query}\t{document}\t{int(grade) + 1}\n")
    skipping = BeirReader(str(reader.folder), on_error="skip", quarantine=str(tmp_path / "quarantine.jsonl"))
    actual = stored(skipping, tmp_path / "cache")
    assert actual.judged("train")[1] == skipping.read().qrels["train"] == reader._collection.qrels["train"]
    assert "split train: 1 pairs have a second, different score" in caplog.text
