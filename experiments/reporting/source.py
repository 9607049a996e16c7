"""A place in a file of the run: what stands there, and how the page says where it was read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from experiments.reporting.html import Html, shown, tag


@dataclass(frozen=True)
class Source:
    """value: what stands there. place: FILE#/KEY/KEY, keys as RFC 6901 has them; FILE#step=STEP/KEY in JSON lines."""

    value: Any
    place: str

    def __getitem__(self, key: Any) -> Source:
        return Source(self.value[key], f"{self.place}/{str(key).replace('~', '~0').replace('/', '~1')}")

    def __contains__(self, key: Any) -> bool:
        return key in self.value

    def __iter__(self) -> Iterator[Any]:
        """The entries of a list, or the keys and entries of a mapping."""
        if isinstance(self.value, list):
            return (self[i] for i in range(len(self.value)))
        return ((key, self[key]) for key in self.value)

    def figure(self, form: str = ".3f") -> Html:
        """The number. form: as of str.format."""
        return tag("data", shown(self.value, form), value=repr(self.value), data_source=self.place)

    def told(self, words: str, name: str = "span") -> Html:
        """Words that tell what stands there."""
        return tag(name, words, data_source=self.place)
