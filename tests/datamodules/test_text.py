"""Documents, input texts, tokens, chunks, padding, and label names in papers."""

import random
import re

import pytest
import torch

from datamodules.records import Document
from datamodules.text import NameMatcher, as_documents, input_text, length_sorted_chunks, token_ids


def test_input_text_of_papers_labels_and_queries():
    assert input_text(Document("p", "A title", "An abstract."), "[SEP]") == "A title [SEP] An abstract."
    assert input_text(Document("l", "Name", ""), "[SEP]") == "Name"
    assert input_text(Document("q", "", "a query"), "[SEP]") == "a query"
    assert input_text(Document("p", "A title", "An abstract."), "</s>") == "A title </s> An abstract."


def test_query_segments_are_joined_by_the_separator():
    assert input_text(Document("q", "", "one\ttwo"), "</s>") == "one </s> two"
    assert input_text(Document("q", "", "one [SEP] two"), "</s>") == "one </s> two"


def test_separator_is_one_token(make_backbone):
    _, tokenizer = make_backbone()
    (ids,) = token_ids([input_text(Document("p", "bara", "beli bomu"), tokenizer.sep_token)], tokenizer, 16)
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "bara", "[SEP]", "beli", "bomu", "[SEP]"]


def test_truncated_text_keeps_the_closing_separator(make_backbone):
    _, tokenizer = make_backbone()
    (ids,) = token_ids([" ".join(["bara"] * 50)], tokenizer, 8)
    assert len(ids) == 8
    assert ids[-1] == tokenizer.sep_token_id


def test_chunks_are_sorted_by_length_and_within_the_budget():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 90, (200,), generator=generator).tolist()
    chunks = list(length_sorted_chunks(lengths, 128))
    assert sorted(i for chunk in chunks for i in chunk) == list(range(200))
    flat = [lengths[i] for chunk in chunks for i in chunk]
    assert flat == sorted(flat)
    for chunk in chunks:
        assert len(chunk) == 1 or sum(lengths[i] for i in chunk) <= 128


def test_text_longer_than_the_budget_is_its_own_chunk():
    assert list(length_sorted_chunks([5, 300, 4], 100)) == [[2, 0], [1]]


def test_matcher_finds_all_names_as_whole_words():
    rng = random.Random(0)
    words = ["Graph", "neural", "network", "networks", "DNA", "repair", "of", "α-helix", "2"]
    names = {f"l{i}": " ".join(rng.choices(words, k=rng.randint(1, 4))) for i in range(60)}
    matcher = NameMatcher({id: Document(id, name, "of no concern") for id, name in names.items()})
    for _ in range(200):
        paper = Document("p", *(rng.choice((" ", ", ")).join(rng.choices(words, k=rng.randint(0, 9))) for _ in "ab"))
        text = " ".join(re.findall(r"\w+", f"{paper.title} {paper.text}".lower()))
        spaced = {id: " ".join(re.findall(r"\w+", name.lower())) for id, name in names.items()}
        wanted = {id for id, name in spaced.items() if re.search(rf"\b{re.escape(name)}\b", text)}
        found = matcher.labels_in(paper)
        assert set(found) == wanted
        assert len(found) == len(wanted)


def test_matcher_ignores_names_without_words():
    matcher = NameMatcher({"a": Document("a", "?!"), "b": Document("b", "x")})
    assert matcher.match([Document("p", "", "a ?! X."), Document("q", "xx")]) == {"p": ["b"], "q": []}


def test_strings_dicts_and_documents_give_the_same_text():
    paper = Document("p1", "A title", "An abstract.")
    items = [paper, {"id": "p1", "title": "A title", "abstract": "An abstract.", "year": 2020, "text": None}]
    items += [{"title": "A title", "text": "An abstract."}, {"title": "A title"}, {"title": None, "text": "words"}]
    items.append("words")
    texts = [input_text(document, "[SEP]") for document in as_documents(items)]
    assert texts == ["A title [SEP] An abstract."] * 3 + ["A title", "words", "words"]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (("t", "x"), r"documents\[1\]: expected a text, a dict .*, got tuple \('t', 'x'\)"),
        (None, r"documents\[1\]: expected a text, .*, got NoneType None"),
        ({"titel": "a"}, r"documents\[1\]: expected a non-empty title, text or abstract, got titel"),
        ({"title": "a", "abstract": float("nan")}, r"documents\[1\]: abstract: expected a text, got float nan"),
        ({"title": " ", "text": ""}, r"documents\[1\]: expected a non-empty title, .* got title, text"),
    ],
)
def test_invalid_item_raises_type_error_with_its_index(item, message):
    with pytest.raises(TypeError, match=message):
        as_documents(["words", item])


@pytest.mark.parametrize("items", ["words", {"title": "a"}, Document("", "a")])
def test_single_paper_raises_type_error(items):
    with pytest.raises(TypeError, match="expected a list, got one "):
        as_documents(items)


def test_encode_accepts_dicts_and_documents(make_encoder):
    encoder = make_encoder()
    paper = {"title": "bara celi", "abstract": "domu fito"}
    vectors = encoder.encode([paper, Document("", "bara celi", "domu fito")], task="search")
    assert vectors[0].equal(vectors[1])
    with pytest.raises(TypeError, match=r"documents\[0\]: expected a text, .* got tuple"):
        encoder.encode([("bara", "celi")], task="search")
