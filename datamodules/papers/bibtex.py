"""BibTeX and BibLaTeX libraries. Needs the package bibtexparser."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datamodules.papers.paper_record import (
    Paper,
    doi_names,
    first_text,
    labels_of,
    missing_package,
    split_list,
    without_tags,
    year_of,
)
from datamodules.readers.io import open_text, read_chunk
from datamodules.readers.rows import BadLines, Record, Row
from datamodules.records import UserError, prefixed, short

MAX_SIZE = 256 * 2**20  # characters; the parser holds the whole file in memory
MAX_VALUE = 2**20  # characters after replacing strings, each of which could double the length
KEYWORDS = ("keywords", "keyword", "mendeley-tags")
YEARS = ("year", "date")
FORMULA = re.compile(r"(\$[^$]*\$)")
ENTRY_WITHOUT_AT = re.compile(r"\{[^{}]*=")  # matches in text between entries, which BibTeX ignores


def rows(path: Path, bad: BadLines) -> Iterator[Row]:
    """Yield each entry as an object of its fields. Entries with wrong syntax are reported as bad."""
    bibtexparser, model = _package()
    with open_text(path) as stream:
        text = read_chunk(stream, path, 0, MAX_SIZE + 1)
    if len(text) > MAX_SIZE:
        raise UserError(f"{path}: larger than {MAX_SIZE:,} characters; split it into several files")
    library = bibtexparser.parse_string(text, parse_stack=[])
    strings, parents = _strings(path, library), {entry.key.lower(): entry for entry in library.entries}
    count = 0
    for count, block in enumerate(_entry_blocks(library, model), start=1):
        row = Row(bad, path, _line(block), block.raw or "", count)
        with row:
            if isinstance(block, model.ParsingFailedBlock):
                raise UserError(f"not valid BibTeX ({block.error})")
            if isinstance(block, model.ImplicitComment):
                raise UserError("expected an entry that starts with @")
            fields = _fields(block, strings)
            if parent := parents.get(fields.get("crossref", "").lower()):
                fields = _inherited(fields, _fields(parent, strings)) | fields
            row.value = {"id": block.key} | fields
        if row.value is not None:
            yield row
    bad.end_of_file(path, count)


def _strings(path: Path, library: Any) -> dict[str, str]:
    """Return each @string's text by name."""
    strings: dict[str, str] = {}
    for string in library.strings:  # a string may contain earlier strings
        with prefixed(f"{path}, line {_line(string)}: "):
            strings[string.key.lower()] = _text_of(string.value, strings)
    return strings


def _entry_blocks(library: Any, model: Any) -> Iterator[Any]:
    """Yield entries, unreadable blocks, and text between them that looks like an entry without @."""
    for block in library.blocks:
        if isinstance(block, model.DuplicateBlockKeyBlock | model.DuplicateFieldKeyBlock):  # the first field counts
            block = block.ignore_error_block
        if isinstance(block, model.ImplicitComment):
            if not block.comment.startswith("%") and ENTRY_WITHOUT_AT.search(block.comment):
                yield block
        elif not isinstance(block, model.String | model.Preamble | model.ExplicitComment):
            yield block


def _line(block: Any) -> int:
    return (block.start_line or 0) + 1


def _fields(entry: Any, strings: Mapping[str, str]) -> dict[str, str]:
    return {field.key.lower(): _text_of(field.value, strings) for field in reversed(entry.fields)}


def _inherited(fields: Mapping[str, str], parent: Mapping[str, str]) -> dict[str, str]:
    """Return the fields that a paper inherits from its crossref (the volume it appears in): year and keywords.

    Title, abstract and DOI are not inherited, because the volume has its own.
    """
    missing = [name for names in (YEARS, KEYWORDS) if not any(name in fields for name in names) for name in names]
    return {name: parent[name] for name in missing if name in parent}


def _text_of(value: str, strings: Mapping[str, str]) -> str:
    """Return a value without braces or quotes. Names of strings are replaced, and the parts of a # b are joined."""
    parts = [_text_of_part(part.strip(), strings) for part in _parts(value)]
    if sum(map(len, parts)) > max(len(value), MAX_VALUE):
        raise UserError(f"a value expands to more than {MAX_VALUE:,} characters")
    return "".join(parts)


def _text_of_part(part: str, strings: Mapping[str, str]) -> str:
    if len(part) > 1 and part[0] + part[-1] in ("{}", '""'):
        return part[1:-1]
    return strings.get(part.lower(), part)  # otherwise, a number or the name of a month


def _parts(value: str) -> list[str]:
    """Split a value at each # outside braces and quotes."""
    parts, depth, is_quoted = [""], 0, False
    for character in value if "#" in value else ():
        depth += (character == "{") - (character == "}")
        is_quoted ^= character == '"' and depth == 0
        if character == "#" and depth == 0 and not is_quoted:
            parts.append("")
        else:
            parts[-1] += character
    return parts if len(parts) > 1 and all(map(str.strip, parts)) else [value]


def _package() -> tuple[Any, Any]:
    try:
        import bibtexparser
        from bibtexparser import model
    except ModuleNotFoundError as error:
        raise missing_package("BibTeX files", "bibtexparser>=2") from error
    if not hasattr(bibtexparser, "parse_string"):
        raise missing_package("BibTeX files", "bibtexparser>=2")
    logging.getLogger("bibtexparser").setLevel(logging.CRITICAL)  # because bad entries are reported here
    return bibtexparser, model


def paper(record: Record) -> Paper:
    title = filter(None, (_plain(record.text(key)) for key in ("title", "subtitle")))
    keywords = split_list(_plain(first_text(record, *KEYWORDS)), ";|,")
    return Paper(
        id=record.text("id"),
        title=": ".join(title),
        abstract=_plain(record.text("abstract")),
        year=year_of(record.text("year")) or year_of(record.text("date")),
        labels={"keywords": labels_of(keywords, "keywords")},
        names=doi_names(record.text("doi")),
    )


def _plain(text: str) -> str:
    """Return text without LaTeX, and without HTML from publishers' exports. In a formula, <n> is not a tag."""
    parts = FORMULA.split(_without_latex(text))
    return "".join(part if FORMULA.fullmatch(part) else without_tags(part) for part in parts)


# Characters in exports of Zotero, Mendeley and JabRef that pylatexenc 2 would delete, and the soft hyphen.
CHARACTERS = {
    "textless": "<",
    "textgreater": ">",
    "textbar": "|",
    "textbraceleft": "{",
    "textbraceright": "}",
    "textquotedbl": '"',
    "textunderscore": "_",
    "textminus": "\u2212",
    "slash": "/",
    "euro": "\u20ac",
    "pounds": "\u00a3",
    "S": "\u00a7",
    "LaTeX": "LaTeX",
    "TeX": "TeX",
    "-": "",
}
GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau phi chi psi omega"
# Commands whose last argument is text -> their arguments in pylatexenc's notation.
LAST_ARGUMENT = {
    "href": "{{",
    "textcolor": "{{",
    "foreignlanguage": "{{",
    "enquote": "{",
    "mkbibquote": "{",
    "mbox": "{",
}


@functools.cache
def _decoder() -> Callable[[str], str]:
    """Return the function that turns LaTeX into text."""
    from pylatexenc import latex2text, latexwalker, macrospec

    decoded = latex2text.get_default_latex_context_db()
    plain = latex2text.LatexNodes2Text().latex_to_text
    letters = {f"text{name}": plain(rf"\{name}") for name in (*GREEK.split(), *GREEK.title().split())}
    # Some have no letter, such as \Alpha.
    characters = CHARACTERS | {name: letter for name, letter in letters.items() if letter}
    macros = [latex2text.MacroTextSpec(name, text) for name, text in characters.items()]
    macros += [latex2text.MacroTextSpec(name, f"%({len(form)})s") for name, form in LAST_ARGUMENT.items()]
    decoded.add_context_category("exports", macros=macros, prepend=True)
    parsed = latexwalker.get_default_latex_context_db()
    arguments = [macrospec.MacroSpec(name, form) for name, form in LAST_ARGUMENT.items()]
    parsed.add_context_category("exports", macros=arguments, prepend=True)
    decoder = latex2text.LatexNodes2Text(decoded, math_mode="verbatim")
    return functools.partial(decoder.latex_to_text, latex_context=parsed)


def _without_latex(text: str) -> str:
    """Return text without LaTeX commands and braces. Formulas are kept. Raises UserError if the LaTeX is invalid."""
    if not re.search(r"[\\{}$~]|``|''|--", text):
        return text
    import pylatexenc.latex2text

    # In BibTeX files, % and & usually are plain characters, not a comment or a column. So is a $ without a partner.
    is_paired = len(re.findall(r"(?<!\\)\$", text)) % 2 == 0
    escaped = re.sub(r"(?<!\\)([%&#_])" if is_paired else r"(?<!\\)([%&#_$])", r"\\\1", text)
    try:
        return _decoder()(escaped)
    except (pylatexenc.latexwalker.LatexWalkerError, RecursionError, ValueError, IndexError, TypeError) as error:
        raise UserError(f"the LaTeX in {short(text)} cannot be read ({str(error)[:60]})") from error
