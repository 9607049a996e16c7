"""BEIR layout: corpus.jsonl, queries.jsonl and qrels/<split>.tsv, each plain or gzipped."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from datamodules.records import Collection, Document, Qrels, UserError


class BeirReader:
    """A folder in BEIR layout.

    folder/corpus.jsonl    {"_id": ..., "title": ..., "text": ...} a line
    folder/queries.jsonl   the same, title optional
    folder/qrels/SPLIT.tsv a header, then query-id <tab> corpus-id <tab> score (an integer, above 0 is relevant)

    Every file may end in .gz.
    """

    SPLITS = ("train", "dev", "test")

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def read(self) -> Collection:
        """Read and check the whole folder.

        Raises UserError naming the file, the line and what is wrong with it.
        """
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder (expected corpus.jsonl, queries.jsonl and qrels/ in it)")
        corpus = _documents(self._file("corpus.jsonl"))
        queries = _documents(self._file("queries.jsonl"))
        qrels = {}
        for split in self.SPLITS:
            path = self._file(f"qrels/{split}.tsv", required=False)
            if path is not None:
                qrels[split] = _qrels(path, queries, corpus)
        if not qrels:
            allowed = ", ".join(f"{split}.tsv" for split in self.SPLITS)
            raise UserError(f"{self.folder / 'qrels'}: holds none of {allowed} (plain or .gz)")
        return Collection(corpus, queries, qrels)

    def _file(self, name: str, required: bool = True) -> Path | None:
        for path in (self.folder / name, self.folder / f"{name}.gz"):
            if path.is_file():
                return path
        if required:
            raise UserError(f"{self.folder / name}: no such file (nor {name}.gz)")
        return None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of every line that is not blank."""
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 after line {number} ({error.reason})") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: the gzip file is damaged after line {number} ({error})") from error


def _documents(path: Path) -> dict[str, Document]:
    documents: dict[str, Document] = {}
    for number, line in _lines(path):
        document = _document(line, f"{path}, line {number}")
        if document.id in documents:
            raise UserError(f"{path}, line {number}: the id {document.id!r} stands on an earlier line too")
        documents[document.id] = document
    if not documents:
        raise UserError(f"{path}: holds no document")
    return documents


def _document(line: str, where: str) -> Document:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: is no JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise UserError(f"{where}: is nested too deeply") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object with _id, title and text, got {line[:60]!r}")
    fields = {key: "" if record.get(key) is None else record[key] for key in ("_id", "title", "text")}
    for key, value in fields.items():
        if not isinstance(value, str):
            raise UserError(f"{where}: {key} must be a string, got {value!r}")
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise UserError(f"{where}: {key} holds half of a surrogate pair, which is no text")
    if not fields["_id"]:
        raise UserError(f"{where}: _id is missing or empty (keys here: {', '.join(map(str, record)) or 'none'})")
    if not (fields["title"].strip() or fields["text"].strip()):
        raise UserError(f"{where}: document {fields['_id']!r} has neither title nor text")
    return Document(fields["_id"], fields["title"], fields["text"])


def _qrels(path: Path, queries: Mapping[str, Document], corpus: Mapping[str, Document]) -> Qrels:
    qrels: dict[str, dict[str, int]] = {}
    unknown: dict[str, list[str]] = {"query": [], "document": []}
    for order, (number, line) in enumerate(_lines(path)):
        columns = line.split("\t")
        if order == 0 and columns[-1].strip() == "score":
            continue
        if len(columns) != 3:
            raise UserError(
                f"{path}, line {number}: expected query-id, corpus-id and score between tabs, got {line[:60]!r}"
            )
        query, document, score = (column.strip() for column in columns)
        if not re.fullmatch(r"[+-]?[0-9]+", score):
            raise UserError(f"{path}, line {number}: the score must be an integer, got {score!r}")
        grade = int(score)
        if query not in queries:
            unknown["query"].append(query)
        elif document not in corpus:
            unknown["document"].append(document)
        else:
            before = qrels.setdefault(query, {}).setdefault(document, grade)
            if before != grade:
                pair = f"query {query!r} and document {document!r}"
                raise UserError(f"{path}, line {number}: {pair} have score {grade} here and {before} above")
    for kind, ids in unknown.items():
        if ids:
            distinct = list(dict.fromkeys(ids))
            first = ", ".join(map(repr, distinct[:5])) + (", ..." if len(distinct) > 5 else "")
            home = {"query": "queries", "document": "corpus"}[kind]
            raise UserError(
                f"{path}: {len(ids)} lines name {len(distinct)} {kind} ids that are not in {home}.jsonl: {first}"
            )
    if not qrels:
        raise UserError(f"{path}: the split is empty (no judgement below the header)")
    return qrels


def write_beir(collection: Collection, folder: Path | str) -> None:
    """Write a collection as a folder that BeirReader reads."""
    folder = Path(folder)
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, documents in (("corpus", collection.corpus), ("queries", collection.queries)):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as lines:
            for document in documents.values():
                record = {"_id": document.id, "title": document.title, "text": document.text}
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
    for split, qrels in collection.qrels.items():
        with open(folder / "qrels" / f"{split}.tsv", "w", encoding="utf-8") as lines:
            lines.write("query-id\tcorpus-id\tscore\n")
            for query, grades in qrels.items():
                lines.writelines(f"{query}\t{document}\t{grade}\n" for document, grade in grades.items())
