"""Converted collections: the same examples, texts, batches and benchmarks as in memory, and no conversion twice."""

import json
import multiprocessing
import os
import pickle
import random
import time

import numpy as np
import pytest

from datamodules.batches import BatchOptions
from datamodules.conversion import FileReader, StreamingReader, describe, stored
from datamodules.examples import ExampleTable, in_memory
from datamodules.readers import io
from datamodules.readers.beir import BeirReader, write_beir
from datamodules.readers.jsonl import JsonlReader
from datamodules.records import Collection, Document, Task, UserError
from datamodules.sample import SampleReader
from datamodules.store import ROWS, StoredCollection, StoredDocuments
from datamodules.tasks import KINDS
from tests.conftest import text_of
from tests.datamodules.readers.test_fuzz import mutated, retyped
from tests.datamodules.readers.worlds import WORLDS

VIEWS = {"classification": "topics", "link_prediction": "citations", "search": "searches"}


class Streamed:
    """A collection as a stream, whose source is a folder."""

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


def test_it_holds_what_the_reader_gave(streamed, tmp_path):
    _, reader = streamed
    wanted, found = reader._collection, stored(reader, tmp_path / "cache")
    assert list(found.corpus) == list(wanted.corpus)
    assert list(found.corpus.values()) == list(wanted.corpus.values())
    assert dict(found.queries) == dict(wanted.queries)
    assert found.splits == wanted.splits
    for split in wanted.splits:
        queries, qrels = found.judged(split)
        assert qrels == wanted.qrels[split]
        assert queries == wanted.judged(split)[0]
    for queries_are_documents in (False, True):
        ours = [list(part) for part in found.table(queries_are_documents)[0]]
        parts, examples = in_memory(wanted, queries_are_documents)
        assert ours == parts
        assert list(found.table(queries_are_documents)[1]) == list(examples)


def test_batches_and_benchmarks_are_those_of_memory(streamed, tmp_path, make_backbone):
    kind, reader = streamed
    found = []
    for cache in ("", str(tmp_path / "cache")):
        options = BatchOptions(batch_size=4, num_batches=6, max_length=32, num_workers=2 if cache else 0, cache=cache)
        task = KINDS[kind](Task(kind, kind), {"toy": reader}, options, make_backbone()[1])
        task.setup()
        assert isinstance(task.collections["toy"], StoredCollection) == bool(cache)
        batches = [batch.fingerprint for batch in task.train_dataloader()]
        benchmarks = [(b.name, dict(b.corpus), dict(b.queries), dict(b.qrels)) for b in task.benchmarks("test")]
        found.append((batches, benchmarks, list(task.texts())))
    assert found[0] == found[1]


def test_it_is_converted_once_and_anew_when_a_file_changes(streamed, tmp_path):
    _, reader = streamed
    first = stored(reader, tmp_path / "cache")
    assert stored(reader, tmp_path / "cache").folder == first.folder
    assert reader._read_count == 1
    source = reader.sources()[0]
    source.write_bytes(source.read_bytes() + b"\n")
    again = stored(reader, tmp_path / "cache")
    assert reader._read_count == 2
    assert again.folder != first.folder
    assert again.fingerprint() == first.fingerprint()  # the same content


def test_a_failed_conversion_leaves_nothing_and_is_tried_again(streamed, tmp_path):
    _, reader = streamed
    whole = reader._corpus

    def broken():
        yield from list(whole())[:7]
        raise UserError("corpus.jsonl, line 8: is no JSON")

    reader._corpus = broken
    with pytest.raises(UserError, match="line 8"):
        stored(reader, tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    reader._corpus = whole
    assert list(stored(reader, tmp_path / "cache").corpus) == list(reader._collection.corpus)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache: cannot use the folder .*file"):
        stored(reader, tmp_path / "file")


@pytest.mark.parametrize("name", ["corpus.arrow", "train.documents.npy", "examples.starts.npy", "own.npy"])
def test_converted_file_of_another_size_raises_user_error(streamed, tmp_path, name):
    _, reader = streamed
    folder = stored(reader, tmp_path / "cache").folder
    (folder / name).write_bytes((folder / name).read_bytes()[:-8])
    with pytest.raises(UserError, match=rf"{name}: expected [0-9]+ bytes, found [0-9]+; delete .*{folder.name}"):
        stored(reader, tmp_path / "cache")
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: expected [0-9]+ bytes, found no such file; delete"):
        stored(reader, tmp_path / "cache")


def test_conversion_without_file_sizes_is_still_read(streamed, tmp_path):
    """Conversions of earlier versions have no sizes."""
    _, reader = streamed
    folder = stored(reader, tmp_path / "cache").folder
    meta = json.loads((folder / "meta.json").read_text())
    del meta["files"]
    (folder / "meta.json").write_text(json.dumps(meta))
    assert list(stored(reader, tmp_path / "cache").corpus) == list(reader._collection.corpus)


def _convert(reader, cache, seen):
    seen.put(str(stored(reader, cache).folder))


def test_several_processes_convert_once(streamed, tmp_path):
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


def test_documents_of_many_batches(tmp_path):
    count = 2 * ROWS + 17

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
    found = stored(Many(None, tmp_path / "data"), tmp_path / "cache")
    assert len(found.corpus) == count
    for i in (0, ROWS - 1, ROWS, 2 * ROWS, count - 1):
        assert found.corpus.rows[i] == Document(f"d{i}", text_of(i), f"{text_of(i)} {i}")
    assert found.corpus.rows[-1].id == f"d{count - 1}"
    with pytest.raises(IndexError):
        found.corpus.rows[count]
    (example,) = found.table(False)[1]
    assert (example.query, example.positives, example.hard_negatives) == (count, (count - 1,), (0,))
    again = pickle.loads(pickle.dumps(found.corpus))
    assert isinstance(again, StoredDocuments)
    assert again["d5"] == found.corpus.rows[5]


def test_examples_keep_the_order_in_which_queries_come_and_need_a_positive():
    judgements = np.array([[2, 5, 1], [0, 1, 0], [2, 6, 0], [1, 3, 2], [0, 4, 0], [1, 2, 1], [2, 7, 3]]).T
    rows, own = np.array([10, 11, 12]), np.array([-1, 4, -1])
    table = ExampleTable.from_judgements(*judgements, rows, own)
    assert [example.query for example in table] == [12, 11]
    first, second = table
    assert (first.positives, first.grades, first.hard_negatives, first.not_negatives) == ((5, 7), (1, 3), (6,), (5, 7))
    assert (second.positives, second.grades, second.not_negatives) == ((3, 2), (2, 1), (3, 2, 4))
    moved = table.example(1, offset=100)
    assert (moved.query, moved.positives, moved.not_negatives) == (111, (103, 102), (103, 102, 104))
    assert table[-1] == second
    assert table[:1] == [first]


@pytest.mark.parametrize("queries_are_documents", [False, True])
def test_a_text_that_stands_twice_is_one_document_in_training(tmp_path, queries_are_documents):
    texts = {"a": "one", "b": "two", "c": "one", "d": "three", "e": "two"}
    corpus = {id: Document(id, "", text) for id, text in texts.items()}
    queries = {"q": Document("q", "", "asks"), "e": corpus["e"]}
    qrels = {"train": {"q": {"c": 1, "a": 0, "d": 0, "e": 2, "b": 1}, "e": {"d": 1, "c": 0}}}
    collection = Collection(corpus, queries, qrels)
    write_beir(collection, tmp_path / "data")
    converted = stored(BeirReader(str(tmp_path / "data")), tmp_path / "cache")
    for _, examples in (in_memory(collection, queries_are_documents), converted.table(queries_are_documents)):
        q, e = examples
        assert dict(zip(q.positives, q.grades, strict=True)) == {0: 1, 1: 2}
        assert (q.hard_negatives, set(q.not_negatives)) == ((3,), {0, 1})
        assert (e.positives, e.hard_negatives) == ((3,), (0,))
        assert (e.query, set(e.not_negatives)) == ((1, {1, 3}) if queries_are_documents else (6, {3}))
    assert converted.judged("train")[1] == qrels["train"]  # evaluation goes by ids


@pytest.mark.parametrize("queries_are_documents", [False, True])
def test_a_paper_is_not_relevant_to_itself(tmp_path, queries_are_documents, caplog):
    """Where queries are documents: by its id (a), or as a copy under another id (b cites its preprint c)."""
    texts = {"a": "one", "b": "two", "c": "two", "d": "three"}
    corpus = {id: Document(id, "", text) for id, text in texts.items()}
    queries = {id: corpus[id] for id in "abd"}
    qrels = {"train": {"a": {"a": 1, "d": 1}, "b": {"c": 1}, "d": {"a": 1, "d": 0}}}
    collection = Collection(corpus, queries, qrels)
    write_beir(collection, tmp_path / "data")
    converted = stored(BeirReader(str(tmp_path / "data")), tmp_path / "cache")
    for _, examples in (in_memory(collection, queries_are_documents), converted.table(queries_are_documents)):
        found = [(example.positives, example.hard_negatives) for example in examples]
        if queries_are_documents:
            assert found == [((3,), ()), ((0,), ())]
            assert [example.query for example in examples] == [0, 3]
        else:
            assert found == [((0, 3), ()), ((1,), ()), ((0,), (3,))]
    assert caplog.text.count("ignored 3 of 5 judgements: they relate a paper to itself") == (
        2 if queries_are_documents else 0
    )


def test_large_grades_stay_what_they_are(tmp_path):
    corpus = {id: Document(id, "", f"text of {id}") for id in "ab"}
    qrels = {"train": {"q": {"a": 65536, "b": 10**9}}}
    collection = Collection(corpus, {"q": Document("q", "", "asks")}, qrels)
    write_beir(collection, tmp_path / "data")
    converted = stored(BeirReader(str(tmp_path / "data")), tmp_path / "cache")
    for _, (example,) in (in_memory(collection, False), converted.table(False)):
        assert (example.positives, example.grades, example.hard_negatives) == ((0, 1), (65536, 10**9), ())


def test_a_file_that_was_changed_behind_its_time_is_converted_anew(streamed, tmp_path):
    _, reader = streamed
    first = stored(reader, tmp_path / "cache")
    source = reader.sources()[0]
    before, content = source.stat(), source.read_bytes()
    source.write_bytes(content.replace(b"e", b"i", 1))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert stored(reader, tmp_path / "cache").folder != first.folder


def test_a_beir_folder_is_streamed_with_the_errors_of_reading(streamed, tmp_path):
    _, reader = streamed
    beir = BeirReader(str(reader.folder))
    assert isinstance(beir, StreamingReader)
    found, wanted = stored(beir, tmp_path / "cache"), beir.read()
    assert list(found.corpus.values()) == list(wanted.corpus.values())
    assert {split: found.judged(split)[1] for split in found.splits} == wanted.qrels
    qrels = reader.folder / "qrels" / "train.tsv"
    good = qrels.read_text()
    query, document, grade = good.splitlines()[1].split("\t")
    for line, message in (
        (
            f"{query}\t{document}\t{int(grade) + 1}",
            f"split train: query '{query}' and document '{document}' have score",
        ),
        (f"nobody\t{document}\t1", "1 lines have 1 query ids that are not in queries.jsonl: 'nobody'"),
        (f"{query}\t{document}", "line [0-9]+: expected query-id, corpus-id and score"),
        (f"{query}\t{document}\thigh", "line [0-9]+: the score must be an integer"),
    ):
        qrels.write_text(good + line + "\n")
        with pytest.raises(UserError, match=message):
            stored(beir, tmp_path / "cache")
    qrels.write_text(good + "\t".join((query, document, grade)) + "\n")  # the same again does no harm
    assert stored(beir, tmp_path / "cache").judged("train")[1] == wanted.qrels["train"]
    corpus = reader.folder / "corpus.jsonl"
    texts = corpus.read_text().splitlines()
    corpus.write_text("\n".join([*texts, texts[0]]) + "\n")
    with pytest.raises(
        UserError, match=rf"corpus.jsonl, line {len(texts) + 1}: duplicate id .*: an earlier line has it too"
    ):
        stored(beir, tmp_path / "cache")


def test_what_was_left_out_is_told_each_time(streamed, tmp_path, caplog):
    _, reader = streamed
    with open(reader.folder / "corpus.jsonl", "a") as corpus:
        corpus.write("no json\n")
    quarantine = tmp_path / "run" / "quarantine.jsonl"
    beir = BeirReader(str(reader.folder), on_error="skip", quarantine=str(quarantine))
    for _ in range(2):
        caplog.clear()
        found = stored(beir, tmp_path / "cache")
        assert list(found.corpus) == list(reader._collection.corpus)
        assert "left out 1 bad line" in caplog.text
    assert len(quarantine.read_text().splitlines()) == 1


def ending(act):
    """What an action gives, or that it is refused."""
    try:
        return act()
    except UserError:
        return "refused"


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_what_any_reader_reads_is_kept_and_found_by_its_files(world, tmp_path, monkeypatch):
    world.write(tmp_path / "data")
    reader, opened = world.make(tmp_path / "data"), []
    assert isinstance(reader, FileReader)
    monkeypatch.setattr(io, "open_text", lambda path, real=io.open_text: opened.append(path) or real(path))
    wanted = reader.read()
    assert set(opened) == set(reader.sources())
    found = stored(reader, tmp_path / "cache")
    assert dict(found.corpus) == dict(wanted.corpus)
    assert dict(found.queries) == dict(wanted.queries)
    assert {split: found.judged(split)[1] for split in found.splits} == wanted.qrels
    assert stored(world.make(tmp_path / "data"), tmp_path / "cache").folder == found.folder
    assert describe(world.make(tmp_path / "data", on_error="skip")) != describe(reader)


def jsonl_folder(collection, folder):
    """The collection as JsonlReader reads it; in every split some queries stand on two lines."""
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


@pytest.mark.parametrize("policy", ["fail", "skip"])
@pytest.mark.parametrize("kind", ["beir", "jsonl"])
def test_streaming_ends_as_reading_does_on_mutated_files(tmp_path, kind, policy):
    collection = SampleReader("citations", num_papers=500).read()
    (write_beir if kind == "beir" else jsonl_folder)(collection, tmp_path / "data")
    make = BeirReader if kind == "beir" else JsonlReader
    rng, ends = random.Random(policy), []
    for turn in range(60):
        path = rng.choice([p for p in sorted((tmp_path / "data").rglob("*")) if p.is_file()])
        good = path.read_bytes()
        path.write_bytes(rng.choice((mutated, retyped))(good, rng))
        reader = make(str(tmp_path / "data"), on_error=policy, quarantine=str(tmp_path / "quarantine.jsonl"))
        wanted = ending(reader.read)
        found = ending(lambda reader=reader, turn=turn: stored(reader, tmp_path / f"cache{turn}"))
        ends.append(wanted == "refused")
        path.write_bytes(good)
        if found == "refused" or wanted == "refused":
            assert found == wanted
            continue
        assert list(found.corpus.values()) == list(wanted.corpus.values())
        assert dict(found.queries) == dict(wanted.queries)
        assert {split: found.judged(split)[1] for split in found.splits} == wanted.qrels
    assert sum(ends) < 55
    if policy == "fail":
        assert sum(ends) > 5


def test_another_score_of_the_same_pair_is_left_out_under_skip(streamed, tmp_path, caplog):
    _, reader = streamed
    qrels = reader.folder / "qrels" / "train.tsv"
    query, document, grade = qrels.read_text().splitlines()[1].split("\t")
    with open(qrels, "a") as file:
        file.write(f"{query}\t{document}\t{int(grade) + 1}\n")
    skipping = BeirReader(str(reader.folder), on_error="skip", quarantine=str(tmp_path / "quarantine.jsonl"))
    found = stored(skipping, tmp_path / "cache")
    assert found.judged("train")[1] == skipping.read().qrels["train"] == reader._collection.qrels["train"]
    assert "split train: 1 pairs are judged again with another score" in caplog.text
