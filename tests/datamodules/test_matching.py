"""Names in papers, against a search for each name with a regular expression."""

import random
import re

from datamodules.records import Document
from datamodules.text import NameMatcher


def test_all_names_are_found_as_whole_words():
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


def test_names_of_no_word_are_found_nowhere():
    matcher = NameMatcher({"a": Document("a", "?!"), "b": Document("b", "x")})
    assert matcher.of_all([Document("p", "", "a ?! X."), Document("q", "xx")]) == {"p": ["b"], "q": []}
