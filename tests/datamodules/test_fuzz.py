"""Mutated files of all formats: each is read, set aside line by line or refused.

None ends in an error of another kind, a hang, or the loss of more than what was damaged.

SCIMULT_FUZZ=10000 sets how many; the seeds are always the same.
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

from datamodules.readers import json_window, lines
from datamodules.records import Collection, UserError
from tests.datamodules.reader_worlds import WORLDS, World
from tests.datamodules.test_readers import consistent, shifted

NUMBER = int(os.environ.get("SCIMULT_FUZZ", "360"))
OF_A_LINE = 6  # documents and judgements at most, in these worlds


def mutated(content: bytes, rng: random.Random) -> bytes:
    """One to three changes: bytes flipped, cut, repeated, swapped for what JSON and tables are made of."""
    pieces = [
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\n",
        b"\r",
        b"\t",
        b"\\",
        b"\0",
        b"\xff",
        b"\xed\xa0\x80",
        b"0",
    ]
    pieces += [
        b"null",
        b"NaN",
        b"-",
        b"1e999",
        b"9" * 5000,
        b"[" * 3000,
        b"\\ud800",
        b"\xef\xbb\xbf",
        b"true",
        b'""',
        b" ",
    ]
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
            content = content[:start] + rng.choice(pieces) + content[end:]
        else:
            content = content[:start] if rng.random() < 0.3 else content[:start] + rng.choice(pieces) + content[start:]
    return content


ODD_VALUES = (
    None,
    True,
    -1,
    0,
    2**70,
    1.5,
    float("nan"),
    "",
    " ",
    "p1",
    "d1",
    "\ud800",
    [],
    [None],
    [[]],
    ["p1"],
    {},
    {"p1": 1},
)


def retyped(content: bytes, rng: random.Random) -> bytes:
    """One value in a JSON line, at any depth, is another or gone; JSON and its brackets stay whole."""
    rows = content.decode().splitlines()
    at = rng.randrange(len(rows))
    comma = "," if rows[at].endswith(",") else ""
    try:
        row = json.loads(rows[at].removesuffix(","))
    except ValueError:
        return mutated(content, rng)
    place, node = None, row
    while isinstance(node, dict | list) and node and (place is None or rng.random() < 0.6):
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        place, node = (node, key), node[key]
    if place is None:
        return mutated(content, rng)
    if rng.random() < 0.2:
        del place[0][place[1]]
    else:
        place[0][place[1]] = rng.choice(ODD_VALUES)
    rows[at] = json.dumps(row) + comma
    return "\n".join(rows).encode()


def confused(content: bytes, rng: random.Random) -> bytes:
    """A line stands twice, or its id is another's: ids that are double or unknown, papers that cite themselves."""
    rows, ids = content.split(b"\n"), re.findall(rb"[a-z0-9-]*[0-9]+", content)
    at = rng.randrange(len(rows))
    if rng.random() < 0.5:
        rows.insert(rng.randrange(len(rows)), rows[at])
    else:
        rows[at] = rows[at].replace(rng.choice(ids), rng.choice(ids))
    return b"\n".join(rows)


def damage(path: Path, rng: random.Random) -> tuple[Path, bytes]:
    """What takes the file's place."""
    content = path.read_bytes()
    bad = rng.choice((mutated, retyped, confused))(content, rng)
    if rng.random() < 0.1:
        return Path(f"{path}.gz"), mutated(gzip.compress(content), rng)
    return path, bad


def whole_lines(content: bytes) -> Counter[bytes]:
    rows = content.removeprefix(b"\xef\xbb\xbf").replace(b"\r", b"\n").split(b"\n")
    return Counter(row.strip() for row in rows)


def items(collection: Collection) -> set[tuple[str, ...]]:
    """Documents and judgements by their ids."""
    plain = shifted(collection)
    judged = {(s, q, d) for s, qrels in plain.qrels.items() for q, grades in qrels.items() for d in grades}
    return {(id,) for id in plain.corpus} | judged


def fuzz(world: World, folder: Path, seed: int, warnings: list) -> str:
    """One damaged file of the world's folder (which is as it was afterwards): how reading it ends."""
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
        found = world.make(folder, on_error=policy, quarantine=str(quarantine)).read()
    except UserError:
        return "refused"
    finally:
        target.unlink()
        path.write_bytes(content)
        assert time.monotonic() - started < 20
    consistent(found)
    left = whole_lines(gzip.decompress(bad) if target.suffix == ".gz" else bad)
    set_aside = len(quarantine.read_bytes().splitlines()) if quarantine.exists() else 0
    harmed = (whole_lines(content) - left).total() + set_aside
    if all("left out and stand" in record.getMessage() for record in warnings):  # else more is lost, and told
        lost = expected - items(found)
        assert len(lost) <= OF_A_LINE * harmed, (world.name, seed, path.name, sorted(lost), harmed)
    return "quarantine" if set_aside else "read"


def test_mutated_files_are_read_set_aside_or_refused(tmp_path, monkeypatch, caplog):
    for module in (lines, json_window):  # so that some lines are too long
        monkeypatch.setattr(module, "MAX_LINE", 4000)
    for world in WORLDS:
        world.write(tmp_path / world.name)
    ends: Counter[str] = Counter()
    for number in range(NUMBER):
        world = WORLDS[number % len(WORLDS)]
        ends[fuzz(world, tmp_path / world.name, number // len(WORLDS), caplog.records)] += 1
    print(f"{NUMBER} mutated inputs: {dict(ends)}")
    assert set(ends) == {"read", "quarantine", "refused"}
    assert ends.total() == NUMBER
