"""Real papers in BEIR layout: all sets load, and hold what their README and a plain reading of the files say.

They come with no checkout: the tests are skipped where the folder (SCIMULT_DATA, or shared/data beside the checkout) is
missing.
"""

import gzip
import json
import os
import re
from pathlib import Path

import pytest

from datamodules.conversion import stored
from datamodules.readers.beir import BeirReader

DATA = Path(os.environ.get("SCIMULT_DATA", Path(__file__).parents[3] / "shared" / "data"))
ROW = re.compile(r"\| (\w+) [^|]*\|[^|]+\| (\d+)/(\d+)/(\d+) \| (\d+) \| (\d+) \|")

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the real papers in {DATA} (or SCIMULT_DATA=FOLDER)")


def told() -> dict[str, tuple[int, ...]]:
    """Set -> queries of train, dev and test, documents, judgements: as the README says."""
    rows = ROW.findall((DATA / "README.md").read_text(encoding="utf-8"))
    return {name: tuple(map(int, counts)) for name, *counts in rows}


@pytest.mark.parametrize("name", told() if DATA.is_dir() else ["every set"])
def test_a_set_is_read_whole(name, tmp_path):
    reader = BeirReader(str(DATA / name))
    collection = reader.read()
    sizes = [len(collection.qrels[split]) for split in ("train", "dev", "test")]
    judgements = sum(len(grades) for qrels in collection.qrels.values() for grades in qrels.values())
    assert (*sizes, len(collection.corpus), judgements) == told()[name]

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


def test_no_set_is_missing():
    assert len(told()) == 14
    assert set(told()) == {path.name for path in DATA.iterdir() if path.is_dir()}
