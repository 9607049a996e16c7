"""Damaged files of all formats: each is read, quarantined line by line, or rejected with a UserError.

No file causes another error or a hang, or loses more than its damaged lines. SCIMULT_FUZZ=10000 sets the number of
files. The seeds are always the same.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import time
from collections import Counter
from pathlib import Path

from datamodules.readers import io
from datamodules.records import Collection, UserError
from tests.datamodules.readers.test_contract import check_consistent, shifted
from tests.datamodules.readers.worlds import WORLDS, World

NUMBER = int(os.environ.get("SCIMULT_FUZZ", "360"))
MAX_ITEMS_PER_LINE = 8  # documents and judgements, in these worlds


STRUCTURE = (*(bytes([byte]) for byte in b'"{}[],:\n\r\t\\\0\xff'), b"\xed\xa0\x80", b"0")
VALUES = (b"null", b"NaN", b"-", b"1e999", b"9" * 5000, b"[" * 3000, b"\\ud800", b"\xef\xbb\xbf", b"true", b'""', b" ")
TOKENS = (*STRUCTURE, *VALUES)


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Make one to three changes: replace, cut or repeat bytes, or insert tokens of JSON and tables."""
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice((0, 1, 1, 2, 8, 60)))
        kind = rng.randrange(5)
        if kind == 0:
            content = content[:start] + bytes([rng.randrange(256)]) + content[start + 1 :]
        elif kind == 1:
            content = content[:start] + content[end:]
        elif kind == 2:
            content = content[:end] + content[start:end] * rng.choice((1, 2, 50)) + content[end:]
        elif kind == 3:
            content = content[:start] + rng.choice(TOKENS) + content[end:]
        else:
            content = content[:start] if rng.random() < 0.3 else content[:start] + rng.choice(TOKENS) + content[start:]
    return content


ODD_VALUES = (None, True, -1, 0, 2**70, 1.5, float("nan"), "", " ", "p1", "d1", "\ud800")
ODD_VALUES += ([], [None], [[]], ["p1"], {}, {"p1": 1})


def retyped(content: bytes, rng: random.Random) -> bytes:
    """Change or remove one value in a JSON line, at any depth. The line stays valid JSON."""
    rows = content.decode().splitlines()
    at = rng.randrange(len(rows))
    comma = "," if rows[at].endswith(",") else ""
    try:
        row = json.loads(rows[at].removesuffix(","))
    except ValueError:
        return mutated(content, rng)
    parent, node = None, row
    while isinstance(node, dict | list) and node and (parent is None or rng.random() < 0.6):
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        parent, node = (node, key), node[key]
    if parent is None:
        return mutated(content, rng)
    if rng.random() < 0.2:
        del parent[0][parent[1]]
    else:
        parent[0][parent[1]] = rng.choice(ODD_VALUES)
    rows[at] = json.dumps(row) + comma
    return "\n".join(rows).encode()


def confused(content: bytes, rng: random.Random) -> bytes:
    """Repeat a line or swap ids, which gives duplicate or unknown ids and papers that cite themselves."""
    rows, ids = content.split(b"\n"), re.findall(rb"[a-z0-9-]*[0-9]+", content)
    at = rng.randrange(len(rows))
    if rng.random() < 0.5:
        rows.insert(rng.randrange(len(rows)), rows[at])
    else:
        rows[at] = rows[at].replace(rng.choice(ids), rng.choice(ids))
    return b"\n".join(rows)


def damage(path: Path, rng: random.Random) -> tuple[Path, bytes]:
    """Damage a file: return the path and the content that replace it."""
    content = path.read_bytes()
    bad = rng.choice((mutated, retyped, confused))(content, rng)
    if rng.random() < 0.1:
        return Path(f"{path}.gz"), mutated(gzip.compress(content), rng)
    return path, bad


def whole_lines(content: bytes) -> Counter[bytes]:
    rows = content.removeprefix(b"\xef\xbb\xbf").replace(b"\r", b"\n").split(b"\n")
    return Counter(row.strip() for row in rows)


def items(collection: Collection) -> set[tuple[str, ...]]:
    """Return documents and judgements as tuples of ids."""
    plain = shifted(collection)
    judged = {(s, q, d) for s, qrels in plain.qrels.items() for q, grades in qrels.items() for d in grades}
    return {(id,) for id in plain.corpus} | judged


def fuzz(world: World, folder: Path, seed: int, warnings: list) -> str:
    """Damage one file of a world, read the world, restore the file, and return how reading ended."""
    rng = random.Random(f"{world.name}/{seed}")
    path, expected = rng.choice(world.make(folder).sources()), items(world.make(folder).read())
    content = path.read_bytes()
    quarantine = folder.with_suffix(".quarantine")
    quarantine.unlink(missing_ok=True)
    policy = rng.choice(("fail", "skip"))
    target, bad = damage(path, rng)
    warnings.clear()
    path.unlink()
    target.write_bytes(bad)
    started = time.monotonic()
    try:
        collection = world.make(folder, on_error=policy, quarantine=str(quarantine)).read()
    except UserError:
        return "rejected"
    finally:
        target.unlink()
        path.write_bytes(content)
        assert time.monotonic() - started < 20
    check_consistent(collection)
    remaining = whole_lines(gzip.decompress(bad) if target.suffix == ".gz" else bad)
    num_quarantined = len(quarantine.read_bytes().splitlines()) if quarantine.exists() else 0
    num_damaged = (whole_lines(content) - remaining).total() + num_quarantined
    if all("saved in" in record.getMessage() for record in warnings):  # other warnings report more losses
        lost = expected - items(collection)
        assert len(lost) <= MAX_ITEMS_PER_LINE * num_damaged, (world.name, seed, path.name, sorted(lost), num_damaged)
    return "quarantine" if num_quarantined else "read"


def test_mutated_files_are_read_quarantined_or_rejected(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(io, "MAX_LINE", 4000)  # so that some lines are too long
    for world in WORLDS:
        world.write(tmp_path / world.name)
    outcomes: Counter[str] = Counter()
    for number in range(NUMBER):
        world = WORLDS[number % len(WORLDS)]
        outcomes[fuzz(world, tmp_path / world.name, number // len(WORLDS), caplog.records)] += 1
    print(f"{NUMBER} mutated inputs: {dict(outcomes)}")
    assert set(outcomes) == {"read", "quarantine", "rejected"}
    assert outcomes.total() == NUMBER
