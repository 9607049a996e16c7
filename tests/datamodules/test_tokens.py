"""Token tables: equal to the tokenizer, and made once per tokenizer, prompt and length."""

import pickle

import pytest

from datamodules.conversion import stored
from datamodules.readers.beir import BeirReader, write_beir
from datamodules.records import Document, UserError
from datamodules.tokens import BLOCK, Encoding, TokenFile, TokenTable, token_tables
from tests.conftest import text_of, toy_collection


@pytest.fixture
def tokenizer(make_backbone):
    return make_backbone()[1]


@pytest.fixture
def collection(tmp_path):
    write_beir(toy_collection(papers=True), tmp_path / "data")
    return stored(BeirReader(str(tmp_path / "data")), tmp_path / "cache")


def expected(documents, tokenizer, prompt, max_length):
    texts = [f"{prompt}{d.title} {tokenizer.sep_token} {d.text}" for d in documents]
    return [[*tokenizer(text)["input_ids"][: max_length - 1], tokenizer.sep_token_id] for text in texts]


@pytest.mark.parametrize(("prompt", "max_length"), [("", 6), ("bara beli ", 7)])
def test_token_tables_equal_the_tokenizer(collection, tokenizer, prompt, max_length):
    encoding = Encoding(tokenizer, prompt, max_length)
    tables = token_tables(collection, encoding)
    assert all(isinstance(table, TokenFile) for table in tables)
    in_memory = token_tables(toy_collection(papers=True), encoding)
    assert all(type(table) is TokenTable for table in in_memory)
    for documents, *both in zip(
        (collection.corpus.values(), collection.queries.values()), tables, in_memory, strict=True
    ):
        wanted = expected(documents, tokenizer, prompt, max_length)
        assert all(len(ids) == max_length for ids in wanted)
        for table in (*both, pickle.loads(pickle.dumps(both[0]))):
            assert [ids.tolist() for ids in table] == wanted
            assert table[-1].tolist() == wanted[-1]
            with pytest.raises(IndexError):
                table[len(wanted)]


def test_token_table_of_several_blocks(tokenizer):
    class Many:
        corpus = {str(i): Document(str(i), "", text_of(i, i + 1)) for i in range(2 * BLOCK + 3)}
        queries = {}

    table, none = token_tables(Many(), Encoding(tokenizer))
    assert (len(table), len(none)) == (2 * BLOCK + 3, 0)
    for row in (0, BLOCK - 1, BLOCK, 2 * BLOCK + 2):
        assert table[row].tolist() == tokenizer(text_of(row, row + 1))["input_ids"]


def test_texts_are_tokenised_once_per_encoding(collection, tokenizer, monkeypatch):
    made = []
    monkeypatch.setattr("datamodules.tokens.token_ids", lambda texts, *_: made.append(texts) or [[1, 2] for _ in texts])
    for encoding in (
        Encoding(tokenizer),
        Encoding(tokenizer),
        Encoding(tokenizer, "bara "),
        Encoding(tokenizer, "", 9),
    ):
        token_tables(collection, encoding)
    assert len(made) == 3 * 2  # corpus and queries
    # This changes the state of the tokenizer, but not its ids.
    tokenizer("a text", truncation=True, max_length=5, padding="max_length")
    tokenizer.add_tokens(["bara-beli"])
    token_tables(collection, Encoding(tokenizer))
    assert len(made) == 4 * 2


def test_truncated_token_file_raises_user_error_and_failure_leaves_nothing(collection, tokenizer, monkeypatch):
    def breaks(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("datamodules.tokens.token_ids", breaks)
    with pytest.raises(KeyboardInterrupt):
        token_tables(collection, Encoding(tokenizer))
    assert not [path for path in collection.folder.iterdir() if path.is_dir()]
    monkeypatch.undo()
    table, _ = token_tables(collection, Encoding(tokenizer))
    table.path.write_bytes(table.path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"corpus.ids: expected [0-9]+ bytes, found [0-9]+; delete .*tokens-"):
        token_tables(collection, Encoding(tokenizer))
