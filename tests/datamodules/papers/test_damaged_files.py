"""Damaged files of all formats: each is read, with its bad records counted, or rejected with a UserError.

SCIMULT_FUZZ=5000 sets the number of files of each format. The seeds are always the same.
"""

from __future__ import annotations

import gzip
import os
import random
import re
import time
from collections import Counter
from pathlib import Path

import pytest

from datamodules.papers.formats import files_of, read_papers
from datamodules.papers.library import library_in
from datamodules.papers.splits import Splits
from datamodules.papers.views import VIEWS, EmptyView, ViewOptions
from datamodules.readers import io
from datamodules.readers.collecting import MemorySink
from datamodules.readers.rows import BadLines
from datamodules.records import UserError
from tests.datamodules.papers.worlds import WORLDS, World, in_file, papers
from tests.datamodules.readers.test_fuzz import confused, mutated, retyped

NUMBER = int(os.environ.get("SCIMULT_FUZZ", "25"))  # per format
TOKENS = (
    b"@",
    b"@article{",
    b"}",
    b"{",
    b"<",
    b"&",
    b"]]>",
    b"<!--",
    b"%",
    b"$",
    b"\\",
    b"\\begin{x}",
    b"#",
    b";",
    b'"',
)
TOKENS += (
    b"<!ENTITY a 'b'>",
    b"&a;",
    b"TY  - JOUR\n",
    b"ER  - \n",
    b"AB  - ",
    b"\xff\xfe",
    b"\xf0\x9f\x98\x80",
    b"\n\n",
)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Change a file as the other readers' fuzz does, or insert a token of one of the formats."""
    if rng.random() < 0.4:
        start = rng.randrange(len(content) + 1)
        return content[:start] + rng.choice(TOKENS) * rng.choice((1, 1, 1, 40)) + content[start + rng.choice((0, 1)) :]
    try:
        return rng.choice((mutated, retyped, confused))(content, rng)
    except (UnicodeDecodeError, IndexError):  # not text, or without ids
        return mutated(content, rng)


def read(path: Path, policy: str, quarantine: Path) -> tuple[int, int]:
    """Return the number of papers, and of records that were counted as left out."""
    with BadLines(policy, str(quarantine)) as bad, library_in(Splits(), path.parent) as library:
        library.read(read_papers(files_of(path), bad))
        for view in VIEWS.values():
            try:
                made = view(library, ViewOptions(min_papers=1), bad)
            except EmptyView:
                continue
            made.stream(sink := MemorySink())
            assert len(sink.documents) == made.num_documents
            assert {split: len(qrels) for split, qrels in sink.qrels.items()} == made.queries
        return len(library), library.left_out.total() + bad.by_reason.total()


def fuzz(world: World, path: Path, content: bytes, seed: int, num_left_out: int = 4) -> str:
    """Read a damaged file, and return how it ended. num_left_out: records that are left out without damage."""
    rng = random.Random(f"{world.name}/{seed}")
    bad, policy = damaged(content, rng), rng.choice(("fail", "skip", "skip"))
    target = path
    if rng.random() < 0.05:
        bad, target = mutated(gzip.compress(bad), rng), Path(f"{path}.gz")
    target.write_bytes(bad)
    quarantine = path.with_name("quarantine.jsonl")
    quarantine.unlink(missing_ok=True)
    started = time.monotonic()
    try:
        num_papers, num_counted = read(target, policy, quarantine)
    except UserError:
        return "rejected"
    finally:
        target.unlink()
        assert time.monotonic() - started < 20
    records = re.findall(world.marker, bad, re.MULTILINE) if world.marker and target is path else []
    # A change of one place merges at most two records into one, unless it opens a text or comment that never ends.
    assert num_papers + num_counted >= len(records) - 2, (world.name, seed, num_papers, num_counted, len(records))
    return "counted" if num_counted > num_left_out else "read"


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_damaged_file_is_read_counted_or_rejected(world: World, tmp_path, monkeypatch):
    monkeypatch.setattr(io, "MAX_LINE", 60_000)
    path = tmp_path / world.file
    world.write(path, in_file(papers(15)))
    content = path.read_bytes()
    num_papers, num_left_out = read(path, "fail", tmp_path / "quarantine.jsonl")
    assert (num_papers, num_left_out) == (14, 2 + world.extra)
    outcomes = Counter(fuzz(world, path, content, seed, num_left_out) for seed in range(NUMBER))
    print(f"{world.name}: {NUMBER} damaged files: {dict(outcomes)}")
    assert outcomes["rejected"]
    assert outcomes["rejected"] < NUMBER
