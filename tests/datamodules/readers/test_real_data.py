"""Real papers in BEIR layout: all collections agree with their README and with a plain reading of the files.

The papers are not part of the repository. The tests are skipped if their folder (SCIMULT_DATA, or shared/data next to
the checkout) is missing.
"""

import gzip
import json
import os
import re
from pathlib import Path

import pytest

from datamodules.conversion import stored
from datamodules.readers.beir import BeirReader

DATA = Path(os.environ.get("SCIMULT_DATA", Path(__file__).parents[4] / "shared" / "data"))
ROW = re.compile(r"\| (\w+) [^|]*\|[^|]+\| (\d+)/(\d+)/(\d+) \| (\d+) \| (\d+) \|")

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the real papers in {DATA} (or SCIMULT_DATA=FOLDER)")


def documented_counts() -> dict[str, tuple[int, ...]]:
    """Return the numbers of train, dev and test queries, documents and judgements of each collection in the README."""
    rows = ROW.findall((DATA / "README.md").read_text(encoding="utf-8"))
    return {name: tuple(map(int, counts)) for name, *counts in rows}


@pytest.mark.parametrize("name", documented_counts() if DATA.is_dir() else ["every collection"])
def test_collection_is_read_completely(name, tmp_path):
    reader = BeirReader(str(DATA / name))
    collection = reader.read()
    sizes = [len(collection.qrels[split]) for split in ("train", "dev", "test")]
    judgements = sum(len(grades) for qrels in collection.qrels.values() for grades in qrels.values())
    assert (*sizes, len(collection.corpus), judgements) == documented_counts()[name]

    with gzip.open(DATA / name / "corpus.jsonl.gz", "rt", encoding="utf-8") as file:
        plain = [json.loads(line) for line in file]
    assert [(d.id, d.title, d.text) for d in collection.corpus.values()] == [
        (row["_id"], row.get("title", ""), row.get("text", "")) for row in plain
    ]
    lines = (DATA / name / "qrels" / "dev.tsv").read_text(encoding="utf-8").splitlines()[1:]
    triples = [(q, d, str(grade)) for q, grades in collection.qrels["dev"].items() for d, grade in grades.items()]
    assert sorted(triples) == sorted(tuple(line.split("\t")) for line in lines)

    kept = stored(reader, tmp_path)
    assert list(kept.corpus.values()) == list(collection.corpus.values())
    assert {split: kept.judged(split)[1] for split in kept.splits} == collection.qrels


def test_no_collection_is_missing():
    assert len(documented_counts()) == 14
    assert set(documented_counts()) == {path.name for path in DATA.iterdir() if path.is_dir()}
