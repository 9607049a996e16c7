"""What somebody may have meant who wrote a key that there is not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

CLOSE = 0.6  # difflib's measure of two words, from which on one may be meant by the other
OF_MAKE = ("EXP", "SCALE", "EXTRAS")  # what every target that takes an experiment knows, beside its own


def did_you_mean(word: str, allowed: Iterable[str], prefix: str = "") -> str:
    """Words for an error, such as "did you mean run.seed? ", or none. prefix: what stands before the allowed ones.

    Of the allowed ones are meant, first found first: the same in other case; a key with dots that ends in the word;
    the one that is written most alike as a whole, or in its last part.
    """
    allowed, low = list(dict.fromkeys(allowed)), word.lower()
    same = [name for name in allowed if name.lower() == low]
    ending = [name for name in allowed if name.lower().rpartition(".")[2] == low]
    found = same or ending or _alike(word, allowed)
    return f"did you mean {' or '.join(f'{prefix}{name}' for name in found[:3])}? " if found else ""


def _alike(word: str, allowed: Iterable[str]) -> list[str]:
    def ratio(one: str, other: str) -> float:
        return difflib.SequenceMatcher(None, one, other).ratio()

    def likeness(name: str) -> tuple[float, float]:
        forms = [name] if "." in word else [name, name.rpartition(".")[2]]
        return max(ratio(word.lower(), form.lower()) for form in forms), max(ratio(word, form) for form in forms)

    best = max(allowed, key=likeness, default="")
    return [best] if best and likeness(best)[0] >= CLOSE else []
