"""The record that every format is converted to, and functions that clean its fields."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from datamodules.readers.checks import check_id, check_text, content_id
from datamodules.readers.rows import Record
from datamodules.records import UserError, short

LABEL_KINDS = ("topics", "mesh", "fields", "keywords")  # kinds of labels, in order of preference

# White space and control characters.
BLANKS = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")
# Tags of HTML, JATS and MathML. Attributes need quotes, so that "a <b and c> d" is not a tag.
TAG = re.compile(r"</?(?:\w+:)?[A-Za-z][\w-]*(?:\s+[\w:-]+\s*=\s*(?:\"[^\"]*\"|'[^']*'))*\s*/?>")
YEAR = re.compile(r"(?<![0-9])(?:1[5-9]|2[01])[0-9]{2}(?![0-9])")
FORMS = {";": "\uff1b\u061b", ",": "\uff0c\u3001\u060c"}  # Chinese, Japanese and Arabic forms of a separator
DOI = re.compile(r"10\.[0-9]{4,9}/\S+", re.IGNORECASE)


class Label(NamedTuple):
    """A field, topic, MeSH heading or keyword of a paper. definition: text of the label, if the format has one."""

    id: str
    name: str
    definition: str = ""


@dataclass(slots=True)
class Paper:
    """A paper of a library or dump. Its authors are not read.

    year: year of publication, if known.
    labels: labels by kind, one of LABEL_KINDS.
    references: ids or other names of the papers that it cites.
    names: other names under which it is cited, such as "doi:10.1234/x".
    split: split named in the file ("train", "dev" or "test"), or "".
    is_part: whether the record only has the abstract or the references of the paper with this id.
    """

    id: str
    title: str = ""
    abstract: str = ""
    year: int | None = None
    labels: Mapping[str, Sequence[Label]] = field(default_factory=dict)
    references: Sequence[str] = ()
    names: Sequence[str] = ()
    split: str = ""
    is_part: bool = False

    def __post_init__(self) -> None:
        self.title, self.abstract = clean(self.title, "title"), clean(self.abstract, "abstract")
        references = (without_blanks(clean(name, "references")) for name in self.references)
        self.references = list(filter(None, references))
        self.names = [clean(name, "names") for name in self.names]
        self.labels = {
            kind: [Label(*(clean(text, kind) for text in label)) for label in labels]
            for kind, labels in self.labels.items()
        }
        doi = next((name for name in self.names if name.startswith("doi:")), "")
        self.id = without_blanks(clean(self.id, "id")) or doi.removeprefix("doi:")
        self.id = self.id or content_id(self.title, self.abstract)


def clean(text: str, key: str) -> str:
    """Return a text without control characters and repeated spaces. Raises UserError if it is not valid Unicode."""
    return BLANKS.sub(" ", check_text(text, key)).strip()


def without_blanks(id: str) -> str:
    """Replace white space in an id, because files of judgements and rankings separate ids by it."""
    return re.sub(r"\s+", "_", id)


def without_tags(text: str) -> str:
    """Remove HTML or JATS markup from a string."""
    if "<" in text:
        text = re.sub(r"<jats:title>\s*abstract\s*</jats:title>", " ", text, flags=re.IGNORECASE)
        text = TAG.sub(lambda match: "" if match[0].strip("</>").lower() in INLINE else " ", text)
    return html.unescape(text) if "&" in text else text


INLINE = {name for tag in ("i", "b", "em", "sub", "sup", "scp", "u") for name in (tag, f"jats:{tag}")}
INLINE |= {"jats:italic", "jats:bold", "jats:sc"}


def year_of(value: Any) -> int | None:
    """Return the first year in a number or a date, or None."""
    match = YEAR.search(str(value)) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else None
    return int(match[0]) if match else None


def doi_names(value: Any) -> list[str]:
    """Return ["doi:10.1234/x"] for a DOI or its URL, or [] if the value is not a DOI."""
    match = DOI.search(value) if isinstance(value, str) else None
    return [f"doi:{match[0].lower()}"] if match else []


def labels_of(names: Iterable[Any], key: str) -> list[Label]:
    """Make labels from names. Names that only differ in case or spaces give the same label."""
    labels = []
    for name in names:
        if not isinstance(name, str):
            raise UserError(f"{key} must be a list of strings, got {short(name)}")
        if name := clean(name, key):
            labels.append(Label(without_blanks(name.casefold()), name))
    return labels


def label(record: Record, id_key: str, name_key: str) -> Label:
    """Return the label of an object. id_key, name_key: keys of the label's id and name."""
    return Label(without_blanks(record.id(id_key)), clean(record.words(name_key), name_key))


def split_list(text: str, separators: str = ";|") -> list[str]:
    """Split a string such as "a; b; c" at the first of the separators that it contains.

    Full-width and Arabic forms of a separator count as that separator.
    """
    items = [text]
    for separator in separators:
        forms = separator + FORMS.get(separator, "")
        if not set(forms).isdisjoint(text):
            items = re.split(f"[{re.escape(forms)}]", text)
            break
    return [item.strip() for item in items if item.strip()]


def first_text(record: Record, *keys: str) -> str:
    """Return the first non-empty string under one of the keys, or ""."""
    return next((text for key in keys if (text := record.text(key))), "")


def objects(record: Record, key: str) -> list[Record]:
    """Return the list of objects under a key. A missing key or null is an empty list."""
    values = record.array(key)
    if not all(isinstance(value, dict) for value in values):
        raise UserError(f"{key} must be a list of objects, got {short(values)}")
    return [Record(value) for value in values]


def optional_id(record: Record, key: str) -> str:
    """Return an id, or "" if the key is missing, null or an empty string."""
    return "" if record.get(key) in (None, "") else check_id(record[key], key)


def missing_package(what: str, package: str) -> UserError:
    """Return the error for an optional package that is not installed."""
    return UserError(f"{what} need the package {package}: pip install {package} (the extra `import` has it)")
