"""Check values in files, and make ids and splits for files without them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from datamodules.records import UserError, short

SPLITS = ("train", "dev", "test")
# Names of splits in published data sets, in order of preference. "evaluation" counts as the test split.
SPLIT_NAMES = dict.fromkeys(("train", "training"), "train")
SPLIT_NAMES |= dict.fromkeys(("dev", "validation", "valid", "val", "development"), "dev")
SPLIT_NAMES |= dict.fromkeys(("test", "evaluation"), "test")
MAX_GRADE = 10**9
# Lone surrogates are not text. Bytes that are not UTF-8 are decoded to lone surrogates.
SURROGATES = re.compile("[\ud800-\udfff]")


# --- fields of records ---


def check_text(value: str, key: str) -> str:
    """Return a string. Raises UserError unless it is valid Unicode. key: its key in the record, for the error."""
    if not value.isascii() and (match := SURROGATES.search(value)):
        code = ord(match[0])
        if 0xDC80 <= code <= 0xDCFF:
            raise UserError(f"{key} is not UTF-8 (byte 0x{code & 0xFF:02x} at character {match.start() + 1})")
        raise UserError(f"{key} contains half of a surrogate pair, which is not valid text")
    return value


def check_id(value: Any, key: str) -> str:
    """Return an id as a string. Raises UserError unless it is a string or an integer."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        return str(value)
    if not isinstance(value, str) or not value:
        raise UserError(f"{key} must be an id, a non-empty string or an integer, got {short(value)}")
    return check_text(value, key)


def check_grade(value: Any, key: str = "score") -> int:
    """Return an integer grade, given as a number (1, 1.0) or a string ("1", "1.0"). Raises UserError otherwise."""
    if isinstance(value, str) and len(value) < 20 and (match := re.fullmatch(r"([+-]?[0-9]+)(\.0*)?", value)):
        value = int(match[1])
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > MAX_GRADE:
        raise UserError(f"the {key} must be an integer, got {short(value)}")
    return value


def first_ids(ids: Sequence[str]) -> str:
    """Return the first five ids, for an error message."""
    return ", ".join(map(repr, ids[:5])) + (", ..." if len(ids) > 5 else "")


# --- ids and splits for files without them ---


def content_id(title: str, body: str) -> str:
    """Return an id for a document that has none. Equal texts have equal ids."""
    return hashlib.blake2b(repr((title, body)).encode(), digest_size=8).hexdigest()


def stable_hash(text: str) -> int:
    """Return a hash from 0 to 2**64 - 1, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def check_percentages(dev: int, test: int) -> None:
    """Raise UserError if the percentages of the two splits leave no papers for training."""
    if min(dev, test) < 0 or dev + test >= 100:
        raise UserError(
            "dev_percent, test_percent: expected numbers of at least 0 that add up to less than 100, "
            f"got {dev} and {test}"
        )


def split_of(
    id: str, dev_percent: int, test_percent: int, year: int | None = None, train_until: int | None = None
) -> str:
    """Choose the split of a paper by a hash of its id.

    train_until: last year of the training papers. Later papers form the test split, and test_percent is ignored.
    """
    percent = stable_hash(id) % 100
    if train_until is not None and year is not None and year > train_until:
        return "test"
    if percent < dev_percent:
        return "dev"
    return "test" if train_until is None and percent < dev_percent + test_percent else "train"
