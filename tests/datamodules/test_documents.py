"""Papers as strings, dicts and Documents, and the errors for other items."""

import pytest

from datamodules.records import Document
from datamodules.text import as_documents, input_text


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
        ({"titel": "a"}, r"documents\[1\]: expected a title, text or abstract that is not empty, got titel"),
        ({"title": "a", "abstract": float("nan")}, r"documents\[1\]: abstract: expected a text, got float nan"),
        ({"title": " ", "text": ""}, r"documents\[1\]: expected a title, .* got title, text"),
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
