"""The BEIR reader on good and damaged folders."""

import json

import pytest

from datamodules.readers.beir import BeirReader, write_beir
from datamodules.records import Collection, Document, UserError
from datamodules.sample import SampleReader


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "qrels").mkdir()
    corpus = [{"_id": "d1", "title": "A", "text": "one"}, {"_id": "d2", "title": "B", "text": "two"}]
    queries = [{"_id": "q1", "text": "first"}, {"_id": "q2", "text": "second"}]
    write(tmp_path / "corpus.jsonl", map(json.dumps, corpus))
    write(tmp_path / "queries.jsonl", map(json.dumps, queries))
    write(tmp_path / "qrels" / "train.tsv", ["query-id\tcorpus-id\tscore", "q1\td1\t1", "q1\td2\t0", "q2\td2\t2"])
    return tmp_path


def write(path, lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def error_of(folder):
    with pytest.raises(UserError) as caught:
        BeirReader(str(folder)).read()
    return str(caught.value)


def test_reads_documents_and_judgements(folder):
    collection = BeirReader(str(folder)).read()
    assert [(d.id, d.title, d.text) for d in collection.corpus.values()] == [("d1", "A", "one"), ("d2", "B", "two")]
    assert collection.queries["q2"].text == "second"
    assert collection.qrels == {"train": {"q1": {"d1": 1, "d2": 0}, "q2": {"d2": 2}}}


def test_windows_folder_gives_the_same_collection(folder):
    plain = BeirReader(str(folder)).read()
    for path in [*folder.glob("*.jsonl"), *folder.glob("qrels/*.tsv")]:
        text = path.read_text()
        path.write_bytes(b"\xef\xbb\xbf" + ("\n" + text).replace("\n", "\r\n").encode())
    assert BeirReader(str(folder)).read() == plain


def test_written_collection_is_read_back(tmp_path):
    collection = SampleReader("citations", num_papers=500).read()
    write_beir(collection, tmp_path)
    assert BeirReader(str(tmp_path)).read() == collection


def test_id_that_a_file_of_judgements_cannot_have_raises_user_error(tmp_path):
    """The id of a judged document outside the corpus was written with its tab, and the file could not be read."""
    papers = {"a": Document("a", "", "x")}
    for document in ("b\tc", " b", "b\n"):
        with pytest.raises(UserError, match="cannot have tabs, line breaks, or spaces around an id"):
            write_beir(Collection(papers, papers, {"test": {"a": {document: 1}}}), tmp_path)


def test_missing_folder_or_file_raises_user_error(folder, tmp_path):
    assert "no such folder" in error_of(tmp_path / "nowhere")
    (folder / "corpus.jsonl").unlink()
    assert f"{folder}/corpus.jsonl: no such file" in error_of(folder)


def test_missing_qrels_raise_user_error(folder):
    (folder / "qrels" / "train.tsv").unlink()
    assert "contains none of train.tsv, dev.tsv, test.tsv" in error_of(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"_id": "d3", "title": ', "line 3: invalid JSON"),
        ("[1, 2]", "line 3: expected an object"),
        ('{"id": "d3", "text": "x"}', "line 3: _id is missing (keys here: id, text)"),
        ('{"_id": 7, "text": "x"}', "line 3: _id must be a string, got 7"),
        ('{"_id": 0, "text": "x"}', "line 3: _id must be a string, got 0"),
        ('{"_id": "d3", "text": "\\ud800"}', "line 3: text contains half of a surrogate pair"),
        ("[" * 100_000, "line 3: nested too deeply"),
        ('{"_id": "d3", "text": ["x"]}', "line 3: text must be a string"),
        ('{"_id": "d1", "text": "x"}', "line 3: duplicate id 'd1', which an earlier line also has"),
        ('{"_id": "d3"}', "line 3: document 'd3' has neither title nor text"),
    ],
)
def test_bad_line_raises_user_error_with_line_number(folder, line, message):
    with open(folder / "corpus.jsonl", "a") as corpus:
        corpus.write(line + "\n")
    assert f"{folder}/corpus.jsonl, {message}" in error_of(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q1 d1 1", "line 5: expected query-id, corpus-id and score, separated by tabs"),
        ("q1\td1\tone", "line 5: the score must be an integer, got 'one'"),
        ("q1\td1\t1_0", "line 5: the score must be an integer, got '1_0'"),
        ("q1\td1\t0", "line 5: query 'q1' and document 'd1' have score 0 here and 1 earlier"),
    ],
)
def test_bad_judgement_raises_user_error_with_line_number(folder, line, message):
    with open(folder / "qrels" / "train.tsv", "a") as qrels:
        qrels.write(line + "\n")
    assert f"{folder}/qrels/train.tsv, {message}" in error_of(folder)


def test_unknown_ids_are_counted_and_listed(folder):
    write(folder / "qrels" / "train.tsv", [f"q1\tx{i % 7}\t1" for i in range(9)])
    message = error_of(folder)
    assert "none of the judged documents is in the corpus: 'x0', 'x1', 'x2', 'x3', 'x4', ..." in message
    write(folder / "qrels" / "train.tsv", ["q9\td1\t1"])
    assert "these query ids are not in queries.jsonl (1 lines, 1 different ids): 'q9'" in error_of(folder)


def test_empty_split_raises_user_error(folder):
    write(folder / "qrels" / "dev.tsv", ["query-id\tcorpus-id\tscore"])
    assert f"{folder}/qrels/dev.tsv: the split is empty (no judgements below the header)" in error_of(folder)


def test_empty_corpus_raises_user_error(folder):
    write(folder / "corpus.jsonl", [""])
    assert "corpus.jsonl: contains no documents" in error_of(folder)


def test_empty_queries_raise_user_error(folder):
    write(folder / "queries.jsonl", [""])
    assert "queries.jsonl: contains no queries" in error_of(folder)
