"""What a caller may hand over as papers, and the words for what may not."""

import pytest

from datamodules.records import Document
from datamodules.text import as_documents, input_text


def test_strings_dicts_and_documents_are_read_alike():
    paper = Document("p1", "A title", "An abstract.")
    items = [paper, {"id": "p1", "title": "A title", "abstract": "An abstract.", "year": 2020, "text": None}]
    items += [{"title": "A title", "text": "An abstract."}, {"title": "A title"}, {"title": None, "text": "words"}]
    items.append("words")
    found = [input_text(document, "[SEP]") for document in as_documents(items)]
    assert found == ["A title [SEP] An abstract."] * 3 + ["A title", "words", "words"]


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
def test_other_items_are_refused_with_their_place(item, message):
    with pytest.raises(TypeError, match=message):
        as_documents(["words", item])


@pytest.mark.parametrize("items", ["words", {"title": "a"}, Document("", "a")])
def test_one_paper_is_no_list(items):
    with pytest.raises(TypeError, match="expected a list, got one "):
        as_documents(items)


def test_encode_takes_them(make_encoder):
    encoder = make_encoder()
    paper = {"title": "bara celi", "abstract": "domu fito"}
    vectors = encoder.encode([paper, Document("", "bara celi", "domu fito")], task="search")
    assert vectors[0].equal(vectors[1])
    with pytest.raises(TypeError, match=r"documents\[0\]: expected a text, .* got tuple"):
        encoder.encode([("bara", "celi")], task="search")
