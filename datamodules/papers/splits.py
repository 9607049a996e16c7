"""Assign papers to the train, dev and test splits."""

from __future__ import annotations

import re
from dataclasses import dataclass

from datamodules.papers.paper_record import Paper
from datamodules.readers.checks import split_of
from datamodules.records import UserError


@dataclass(frozen=True)
class Splits:
    """A rule that gives each paper a split.

    rule: one of
        "80/10/10"    percentages of train, dev and test, by a hash of the id
        "2015"        last year of train; later papers are test
        "2015/2018"   last years of train and dev; later papers are test
        "given"       the file has a column or key "split"
    """

    rule: str = "80/10/10"

    def __post_init__(self) -> None:
        numbers = self._numbers()
        by_hash = len(numbers) == 3 and sum(numbers) == 100 and numbers[0] > 0
        is_ascending = list(numbers) == sorted(set(numbers))
        by_year = len(numbers) in (1, 2) and numbers[0] >= 1000 and is_ascending
        if self.rule != "given" and not by_hash and not by_year:
            raise UserError(
                "split: expected three percentages that add up to 100 (80/10/10), the last year of training (2015), "
                f"the last years of training and dev (2015/2018), or given, got {self.rule!r}"
            )

    def _numbers(self) -> tuple[int, ...]:
        return tuple(map(int, self.rule.split("/"))) if re.fullmatch(r"[0-9]{1,4}(/[0-9]{1,4}){0,2}", self.rule) else ()

    @property
    def needs(self) -> str:
        """The field of a paper that the rule needs: "year" or "split"."""
        return "split" if self.rule == "given" else "year"

    def of(self, paper: Paper) -> str:
        """Return the split of a paper, or "" if the paper lacks a year or split that the rule needs."""
        if self.rule == "given":
            return paper.split
        numbers = self._numbers()
        if len(numbers) == 3:
            return split_of(paper.id, dev_percent=numbers[1], test_percent=numbers[2])
        if paper.year is None:
            return ""
        return "train" if paper.year <= numbers[0] else "dev" if paper.year <= numbers[-1] else "test"
