"""Token tables: equal to the tokenizer's ids, computed once, and ahead of the thread that uses them."""

import itertools
import json
import pickle
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizer, RobertaTokenizer, XLMRobertaTokenizer

import datamodules.tokens
from datamodules.conversion import stored
from datamodules.readers.beir import BeirReader, write_beir
from datamodules.records import Document, UserError
from datamodules.tokens import (
    AHEAD,
    BLOCK,
    PIECE,
    Encoding,
    TokenCache,
    TokenFile,
    TokenTable,
    stored_tokens,
    token_tables,
    tokenise_ahead,
)
from tests.conftest import text_of, toy_collection

CHARACTERS = "bara Beli  BOMU, (buna) bito?\n- naïve Ünïcode 12.5% 论文 [SEP] </s> [MASK] <mask> x²"

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


@pytest.fixture
def tokenizer(make_backbone):
    return make_backbone()[1]


@pytest.fixture(autouse=True)
def cache(token_cache):
    return token_cache


@pytest.fixture
def collection(tmp_path):
    write_beir(toy_collection(papers=True), tmp_path / "data")
    return stored(BeirReader(str(tmp_path / "data")), tmp_path / "cache")


def trained(model, pre_tokenizer, trainer):
    """Return the model of a tokenizer trained on CHARACTERS."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator([CHARACTERS] * 3, trainer)
    return json.loads(tokenizer.to_str())["model"]


def bpe():
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=[*SPECIAL, "<mask>"], show_progress=False)
    model = trained(models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False), trainer)
    return RobertaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])


def sentencepiece():
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    model = trained(models.Unigram(), pre_tokenizers.Metaspace(), trainer)
    return XLMRobertaTokenizer(vocab=[tuple(entry) for entry in model["vocab"]])


class Characters(PreTrainedTokenizer):
    """A tokenizer written in Python, without a fast one. A token is a character; there are more than 2**16."""

    vocab_size = 70_000

    def __init__(self):
        super().__init__(cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")

    def get_vocab(self):
        return self.added_tokens_encoder

    def _tokenize(self, text, **_):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token)

    def build_inputs_with_special_tokens(self, ids, pair=None):
        return [self.cls_token_id, *ids, self.sep_token_id]


def with_a_part_in_python(tokenizer):
    class Words:
        def pre_tokenize(self, text):
            text.split(lambda _, string: string.split(" ", "removed"))

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Words())
    return tokenizer


def truncated_left(tokenizer):
    tokenizer.truncation_side = "left"
    return tokenizer


def split_special(tokenizer):
    tokenizer.split_special_tokens = True
    return tokenizer


KINDS = {
    "WordPiece": lambda tokenizer: tokenizer,
    "WordPiece, truncated at the left": truncated_left,
    "WordPiece, special tokens split": split_special,
    "BPE": lambda _: bpe(),
    "sentencepiece": lambda _: sentencepiece(),
    "slow": lambda _: Characters(),
    "with a part in Python": with_a_part_in_python,
}


def documents_of(count, seed=0):
    rng = random.Random(seed)
    words = [*CHARACTERS.split(" "), *CHARACTERS]
    return [
        Document(str(i), *(" ".join(rng.choices(words, k=rng.randint(0, 20))) for _ in range(2))) for i in range(count)
    ]


def called(encoding, documents):
    """Return the ids of a plain call of the tokenizer."""
    texts = encoding._texts(documents)
    return encoding.tokenizer(texts, truncation=True, max_length=encoding.max_length)["input_ids"]


def lists_of(table):
    return [ids.tolist() for ids in table]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "max_length"), [("", 12), ("bara: ", 256)])
def test_ids_equal_a_call_of_the_tokenizer(tokenizer, kind, prompt, max_length):
    encoding = Encoding(KINDS[kind](tokenizer), prompt, max_length)
    documents = documents_of(300)
    expected = called(encoding, documents)
    assert max(map(len, expected)) == max_length or max_length == 256
    assert len({id for ids in expected for id in ids}) > 10
    assert lists_of(encoding.table(documents)) == expected
    (table,) = tokenise_ahead([(encoding, documents)])
    assert lists_of(table) == expected
    assert (table.ids.dtype, table.starts.dtype) == (encoding.dtype, np.int64)


@pytest.mark.parametrize("kind", ["WordPiece", "with a part in Python"])
def test_other_calls_of_the_tokenizer_change_nothing(tokenizer, kind):
    """A call sets the tokenizer's truncation and padding for all threads. The state that others set is kept too."""
    tokenizer = KINDS[kind](tokenizer)
    documents = documents_of(200)
    encodings = [Encoding(tokenizer, "", max_length) for max_length in (8, 64)]
    expected = [called(encoding, documents) for encoding in encodings]
    tokenizer(["bara"], truncation=True, max_length=5, padding="max_length")
    state = (tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding)
    if kind == "WordPiece":
        assert [lists_of(encoding.table(documents)) for encoding in encodings] == expected
        assert (tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding) == state
    else:  # these are called one after the other
        assert [lists_of(encoding.table(documents)) for encoding in encodings] == expected


def test_threads_tokenise_at_once_while_others_call_the_tokenizer(tokenizer):
    documents = documents_of(200)
    encodings = [Encoding(tokenizer, "", max_length) for max_length in (8, 16, 64)]
    expected = [called(encoding, documents) for encoding in encodings]
    stopped = threading.Event()

    def disturb():
        while not stopped.is_set():
            tokenizer(["bara"] * 3, truncation=True, max_length=5, padding="max_length")
            tokenizer(["bara"])

    with ThreadPoolExecutor(7) as pool:
        pool.submit(disturb)
        try:
            tables = list(pool.map(lambda encoding: encoding.table(documents), encodings * 6))
        finally:
            stopped.set()
    assert [lists_of(table) for table in tables] == expected * 6


def test_changed_tokenizer_is_used_as_it_is_now(tokenizer):
    encoding = Encoding(tokenizer, "", 64)
    documents = [Document("", "", "BARA bara-beli")] * 3
    fingerprints, tables = [], []
    changes = [
        lambda: None,
        lambda: tokenizer.add_tokens(["bara-beli"]),
        lambda: setattr(tokenizer.backend_tokenizer, "normalizer", None),
        lambda: setattr(tokenizer, "sep_token", "[CLS]"),
    ]
    for change in changes:
        change()
        fingerprints.append(encoding.fingerprint())
        tables.append(lists_of(encoding.table(documents)))
        assert tables[-1] == called(encoding, documents)
    assert len(set(fingerprints)) == len(changes)
    assert tables[0] != tables[1] != tables[2]


@pytest.mark.parametrize("sizes", [[], [0], [3], [PIECE, 0, 1], [2 * PIECE + 1, 5 * PIECE, 7], [7 * PIECE, 2]])
def test_tables_come_in_the_order_of_the_jobs(tokenizer, sizes, monkeypatch):
    monkeypatch.setattr(datamodules.tokens, "AHEAD", 4 * PIECE)
    documents = iter([Document("", "", text_of(i % 60, i // 60)) for i in range(sum(sizes))])
    jobs = [(Encoding(tokenizer), list(itertools.islice(documents, size))) for size in sizes]
    tables = list(tokenise_ahead(iter(jobs)))
    assert [len(table) for table in tables] == sizes
    for table, (encoding, texts) in zip(tables, jobs, strict=True):
        assert table.ids.dtype == encoding.dtype
        assert lists_of(table) == (called(encoding, texts) if texts else [])


def test_few_texts_are_tokenised_without_threads(tokenizer, monkeypatch):
    threads = []
    tokenise = Encoding._tokenise
    monkeypatch.setattr(
        Encoding, "_tokenise", lambda *given: threads.append(threading.current_thread()) or tokenise(*given)
    )
    list(tokenise_ahead([(Encoding(tokenizer), documents_of(PIECE))]))
    assert threads == [threading.main_thread()]
    list(tokenise_ahead([(Encoding(tokenizer), documents_of(PIECE + 1))]))
    assert threading.main_thread() not in threads[1:]


@pytest.mark.parametrize("number", [0, 1, 5])
def test_failure_to_read_texts_is_raised_after_the_tables_before_it(tokenizer, number):
    def jobs():
        for i in range(number):
            yield Encoding(tokenizer), documents_of(3, i)
        raise UserError("a bad line")

    sizes = []
    with pytest.raises(UserError, match="a bad line"):
        sizes.extend(len(table) for table in tokenise_ahead(jobs()))
    assert sizes == [3] * number
    assert not tokenising_threads()


def tokenising_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("tokenise")]


@pytest.mark.parametrize("ending", ["close", "interrupt", "failure"])
def test_threads_end_with_the_generator_and_tokenise_no_more_than_needed(tokenizer, tokenised, monkeypatch, ending):
    def job(number):
        if ending == "failure" and number == 3:
            return Encoding(tokenizer), [Document("", "", None)] * PIECE
        return Encoding(tokenizer), documents_of(PIECE, number)

    started = []
    jobs = (started.append(number) or job(number) for number in range(10 * AHEAD // PIECE))
    expected = {"close": GeneratorExit, "interrupt": KeyboardInterrupt, "failure": TypeError}[ending]
    tables = tokenise_ahead(jobs)

    def consume():
        for number, _ in enumerate(tables):
            assert tokenising_threads()
            if number == 2 and ending != "failure":
                tables.throw(expected)

    with pytest.raises(expected):
        consume()
    assert not tokenising_threads()
    assert len(started) <= AHEAD // PIECE + 4
    assert len(tokenised) <= len(started)


def test_texts_of_the_cache_are_not_tokenised_again(tokenizer, tokenised, cache):
    documents = documents_of(2 * PIECE + 9)
    encoding = Encoding(tokenizer)
    (first,) = tokenise_ahead([(encoding, documents)])
    assert len(tokenised) == 3
    copies = [Document(f"other {document.id}", document.title, document.text) for document in documents]
    for again in tokenise_ahead([(Encoding(tokenizer), documents), (Encoding(tokenizer), copies)]):
        assert lists_of(again) == lists_of(first)
    assert len(tokenised) == 3
    for other in (Encoding(tokenizer, "bara "), Encoding(tokenizer, "", 9)):
        list(tokenise_ahead([(other, documents)]))
    assert len(tokenised) == 9
    changed = [*documents[:-1], Document("", "", "bara")]
    list(tokenise_ahead([(encoding, changed)]))
    assert len(tokenised) == 10  # the last piece
    shifted = [Document("", document.title + document.text[:1], document.text[1:]) for document in documents]
    (table,) = tokenise_ahead([(encoding, shifted)])
    assert lists_of(table) == called(encoding, shifted)
    del tokenised[:]
    for _ in range(2):
        list(tokenise_ahead([(encoding, documents[:8])]))
    assert len(tokenised) == 2  # few texts are not kept


def test_full_cache_drops_the_least_recently_used():
    table = TokenTable(np.zeros(1000, np.uint16), np.arange(11) * 100)
    size = TokenCache(1 << 20)
    size.put(b"", table)
    cache = TokenCache(2 * size.size)
    for key in (b"a", b"b", b"b"):
        cache.put(key, table)
    assert cache.get(b"a") is table
    cache.put(b"c", table)
    assert [cache.get(key) for key in (b"a", b"b", b"c")] == [table, None, table]
    assert cache.size == cache.limit
    cache.put(b"d", TokenTable(np.zeros(10**6, np.uint16), np.arange(11) * 100))
    assert cache.size == 0  # larger than the limit


def test_table_takes_any_rows(collection, tokenizer):
    encoding = Encoding(tokenizer)
    file, _ = token_tables(collection, encoding)
    in_memory = encoding.table(collection.corpus.values())
    for table in (file, in_memory):
        for rows in ([], [3], range(2, 7), [5, 1, 1, 9], range(10)):
            taken = table.take(rows)
            assert type(taken) is TokenTable
            assert lists_of(taken) == [in_memory[row].tolist() for row in rows]
            assert taken.ids.dtype == encoding.dtype


def test_texts_of_a_stored_collection_are_read_from_its_token_file(collection, tokenizer, tokenised):
    """Mining and evaluation read the ids that were stored for training."""
    encoding = Encoding(tokenizer)
    corpus, queries = collection.corpus.values(), collection.queries.values()
    assert stored_tokens(corpus, encoding) is None
    token_tables(collection, encoding)
    del tokenised[:]
    selections = [corpus, corpus[2:7], corpus.select(np.array([3, 1, 8]))[::-1], queries, queries[3:]]
    expected = [called(encoding, documents) for documents in selections]
    tables = list(tokenise_ahead([(encoding, documents) for documents in selections]))
    assert not tokenised
    assert [lists_of(table) for table in tables] == expected
    list(tokenise_ahead([(Encoding(tokenizer, "bara "), corpus)]))
    assert tokenised  # another prompt


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
        expected = called(encoding, documents)
        assert all(len(ids) == max_length for ids in expected)
        for table in (*both, pickle.loads(pickle.dumps(both[0]))):
            assert lists_of(table) == expected
            assert table[-1].tolist() == expected[-1]
            with pytest.raises(IndexError):
                table[len(expected)]


def test_token_table_of_several_blocks(tokenizer):
    class Many:
        corpus = {str(i): Document(str(i), "", text_of(i, i + 1)) for i in range(2 * BLOCK + 3)}
        queries = {}

    table, none = token_tables(Many(), Encoding(tokenizer))
    assert (len(table), len(none)) == (2 * BLOCK + 3, 0)
    for row in (0, BLOCK - 1, BLOCK, 2 * BLOCK + 2):
        assert table[row].tolist() == tokenizer(text_of(row, row + 1))["input_ids"]


def test_collection_is_tokenised_once_per_encoding(collection, tokenizer, tokenised, cache):
    cache.limit = 0
    for encoding in (
        Encoding(tokenizer),
        Encoding(tokenizer),
        Encoding(tokenizer, "bara "),
        Encoding(tokenizer, "", 9),
    ):
        token_tables(collection, encoding)
    assert len(tokenised) == 3 * 2  # corpus and queries
    # This changes the state of the tokenizer, but not its ids.
    tokenizer("a text", truncation=True, max_length=5, padding="max_length")
    token_tables(collection, Encoding(tokenizer))
    assert len(tokenised) == 3 * 2
    tokenizer.add_tokens(["bara-beli"])
    token_tables(collection, Encoding(tokenizer))
    assert len(tokenised) == 4 * 2


def test_failure_to_tokenise_leaves_nothing(collection, tokenizer, monkeypatch):
    def breaks(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Encoding, "_tokenise", breaks)
    with pytest.raises(KeyboardInterrupt):
        token_tables(collection, Encoding(tokenizer))
    assert not [path for path in collection.folder.iterdir() if path.is_dir()]


@pytest.mark.parametrize("damage", [lambda ids: ids[:-2], lambda ids: bytes([ids[0] ^ 1]) + ids[1:]])
def test_damaged_token_file_is_not_used_and_made_again(collection, tokenizer, cache, caplog, damage):
    """It was read while it was made again, so the damage became part of the new file."""
    encoding = Encoding(tokenizer)
    table, _ = token_tables(collection, encoding)
    good = table.path.read_bytes()
    table.path.write_bytes(damage(good))
    assert stored_tokens(collection.corpus.values(), encoding) is None
    cache.clear()
    token_tables(collection, encoding)
    assert table.path.read_bytes() == good
    assert caplog.text.count("is damaged") == 2
