"""Suggest the word a user probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from datamodules.records import UserError

MAKE_VARIABLES = ("EXP", "SCALE", "EXTRAS")  # variables of every make target that takes an experiment


def did_you_mean(word: str, expected: Iterable[str], prefix: str = "") -> str:
    """Return a suggestion for an error message, such as "did you mean run.seed? ", or "" if no word is similar.

    A word in another case comes first, then dotted keys that end in the word, then the most similar word or last part.
    prefix: path of the expected keys, for the message.
    """
    expected, lower = list(dict.fromkeys(expected)), word.lower()
    suggestions = (
        [name for name in expected if name.lower() == lower]
        or [name for name in expected if _last_part(name.lower()) == lower]
        or _most_similar(word, expected)
    )
    return f"did you mean {' or '.join(f'{prefix}{name}' for name in suggestions[:3])}? " if suggestions else ""


def unknown(what: str, word: str, expected: Sequence[str]) -> UserError:
    """Return the error for a word that is not among the expected ones, with a suggestion."""
    hint = did_you_mean(word, expected)
    return UserError(f"unknown {what} {word!r}; {hint}{expected_one_of(expected, hint)}")


def expected_one_of(expected: Iterable[str], hint: str = "") -> str:
    """Return the end of an error message: the expected words. It is a sentence of its own after a suggestion."""
    return f"{'Expected' if hint else 'expected'} one of {', '.join(expected)}"


def _most_similar(word: str, expected: Iterable[str]) -> list[str]:
    forms: dict[str, list[str]] = {}  # lower case -> the names that read so, as a whole or in their last part
    for name in expected:
        for form in {name.lower()} if "." in word else {name.lower(), _last_part(name.lower())}:
            forms.setdefault(form, []).append(name)
    close = difflib.get_close_matches(word.lower(), forms, n=1)
    return [max(forms[close[0]], key=lambda name: difflib.SequenceMatcher(None, word, name).ratio())] if close else []


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]
