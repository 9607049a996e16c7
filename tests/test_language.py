"""Docstrings, comments, messages and documentation are written in plain English."""

import pytest

from tests.language import PATTERNS, files, findings


def test_no_stilted_words():
    assert not [str(finding) for path in files([]) for finding in findings(path)]


@pytest.mark.parametrize(
    "text",
    [
        "What somebody may have meant who wrote a key",
        "parts of the evaluation stand in the training data",
        "Where a run is told of: metrics.jsonl",
        "The training goes on",
        "got 5, allowed are numbers above 0",
        "which is no Encoder",
        "by trainer.timeout, beside the training",
    ],
)
def test_stilted_words_are_found(text):
    assert any(pattern.search(text) for pattern, _ in PATTERNS)


@pytest.mark.parametrize(
    "text",
    ["if there is no GPU", "The encoder is told the task in every call", "so that there is room", "What is a run?"],
)
def test_plain_words_are_not_found(text):
    assert not [pattern.pattern for pattern, _ in PATTERNS if pattern.search(text)]
