"""Planted overlaps between training and evaluation are found, and no others."""

import random

import pytest

from datamodules.leakage import THRESHOLD, WAYS, Index, normal, shingles, similarity
from datamodules.records import Document


def paper(draw, name, length=60):
    words = ["".join(draw.choices("abcdefghijklmnoprstuvw", k=draw.randint(3, 9))) for _ in range(length)]
    return Document(name, " ".join(words[:7]), " ".join(words[7:]))


@pytest.fixture
def world():
    """Make 1,000 training documents, 300 other documents, and 20 overlaps planted in each way."""
    draw = random.Random(3)
    trained = [paper(draw, f"t{i}") for i in range(1000)]
    other = [paper(draw, f"e{i}") for i in range(300)]
    planted = {"id": [], "title": [], "text": []}
    for i in range(20):
        planted["id"].append(paper(draw, f"t{i}"))
        title = trained[100 + i].title.upper().replace(" ", ",  ", 2) + "!"
        planted["title"].append(Document(f"x{i}", title, paper(draw, "").text))
        words = trained[200 + i].text.split()
        words[draw.randrange(len(words))] = "changed"
        planted["text"].append(Document(f"y{i}", paper(draw, "").title[:10], " ".join(words)))
    return trained, other, planted


def overlaps(evaluated, trained, **ways):
    index = Index()
    index.add("set", evaluated, **ways)
    return [overlap for document in trained for overlap in index.overlaps(document)]


def test_only_planted_overlaps_are_found(world):
    trained, other, planted = world
    assert overlaps(other, trained) == []
    for way, documents in planted.items():
        planted_overlaps = overlaps(other + documents, trained)
        assert {overlap.evaluated.id for overlap in planted_overlaps} == {document.id for document in documents}
        assert {overlap.way for overlap in planted_overlaps} == {way}
        assert overlaps(documents, trained, ways=[w for w in WAYS if w != way]) == []
    first = overlaps(planted["text"], trained)[0]
    assert first.trained == trained[200]
    assert THRESHOLD <= first.similarity < 1


def test_text_in_several_sets_is_found_in_each():
    index, text = Index(), "one two three four five six seven eight nine"
    for name in ("a", "b"):
        index.add(name, [Document(f"{name}{i}", "", text) for i in range(2)], ["text"])
    matches = index.overlaps(Document("a0", "", text))
    assert [(o.name, o.evaluated.id, o.way) for o in matches] == [
        (n, f"{n}{i}", "text") for n in "ab" for i in range(2)
    ]


def test_similarity_compares_runs_of_words():
    a, b = (
        Document("a", "", "one two three four five six seven eight nine"),
        Document("b", "", "zero two three four five six seven eight nine"),
    )
    assert similarity(shingles(a), shingles(b)) == pytest.approx(6 / 8)
    assert similarity(shingles(a), shingles(a)) == 1
    assert not len(shingles(Document("c", "", "too short")))


def test_titles_are_compared_by_words():
    assert normal("  Étude: deep-learning,\tfor PAPERS ") == "etude deep learning for papers"
    titles = [Document("a", "Introduction", ""), Document("b", "A study of something", "")]
    assert not overlaps(titles, [Document("z", "Introduction", "")])
    assert [o.evaluated.id for o in overlaps(titles, [Document("z", "a STUDY of (something)", "")])] == ["b"]


def test_short_queries_must_be_equal():
    queries = [Document("a", "", "contrastive learning of papers"), Document("b", "", "deep nets")]
    assert [(o.evaluated.id, o.way) for o in overlaps(queries, [Document("z", "", "Deep nets!")])] == [("b", "text")]
    assert not overlaps(queries, [Document("z", "", "deep networks"), Document("y", "", "")])
    assert not overlaps([Document("c", "", "?")], [Document("z", "", "!")])
