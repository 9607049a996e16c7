"""The contract of all readers, checked on a small folder of each format (worlds.py)."""

import gzip
import json
import re
from pathlib import Path

import pyarrow
import pytest
import yaml

from datamodules.records import Collection, Reader, UserError
from experiments.config.targets import READERS, check_target, instantiate
from tests.datamodules.readers.worlds import WORLDS, World

world = pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
# Between the records of these worlds.
SEPARATORS = dict.fromkeys(("dpr", "doris-mae", "mmsci-captions", "mmsci-references", "mmsci-choices"), ",")


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def insert(path: Path, line: str, separator: str = "") -> int:
    """Insert a line before the last record, and return its line number."""
    lines = path.read_text(encoding="utf-8").splitlines()
    at = len(lines) - 1 - bool(separator)
    lines.insert(at, line + separator)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return at + 1


def error_of(reader) -> str:
    with pytest.raises(UserError) as caught:
        reader.read()
    return str(caught.value)


def error_or_empty(reader) -> str:
    """Return the error message, or "" if the reader gives a consistent collection."""
    try:
        check_consistent(reader.read())
    except UserError as error:
        return str(error)
    return ""


def check_consistent(collection: Collection) -> None:
    assert collection.corpus
    assert collection.qrels
    for documents in (collection.corpus, collection.queries):
        assert all(id == document.id and id for id, document in documents.items())
    for qrels in collection.qrels.values():
        assert qrels
        for query, judged in qrels.items():
            assert query in collection.queries
            assert judged
            assert all(type(grade) is int for grade in judged.values())


@world
def test_reader_returns_the_collection_that_was_written(world: World, tmp_path):
    expected = world.write(tmp_path)
    reader = world.make(tmp_path)
    assert isinstance(reader, Reader)
    collection = reader.read()
    check_consistent(collection)
    assert collection == expected


@world
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_give_the_same_collection(world: World, tmp_path, suffix):
    codec = {".gz": "gzip", ".zst": "zstd"}[suffix]
    expected = world.write(tmp_path)
    for path in files(tmp_path):
        Path(f"{path}{suffix}").write_bytes(pyarrow.compress(path.read_bytes(), codec=codec, asbytes=True))
        path.unlink()
    assert world.make(tmp_path).read() == expected


@world
def test_windows_line_endings_give_the_same_collection(world: World, tmp_path):
    expected = world.write(tmp_path)
    for path in files(tmp_path):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert world.make(tmp_path).read() == expected


@world
def test_bad_line_raises_user_error_with_location_or_is_quarantined(world: World, tmp_path, caplog):
    for number, (line, reason) in enumerate(world.bad):
        if not line:
            continue
        folder, quarantine = tmp_path / str(number), tmp_path / f"{number}.jsonl"
        expected = world.write(folder)
        path = folder / world.file
        at = insert(path, line, SEPARATORS.get(world.name, ""))
        message = error_of(world.make(folder))
        assert message.startswith(f"{path}, line {at}"), message
        assert reason in message
        caplog.clear()
        collection = world.make(folder, on_error="skip", quarantine=str(quarantine)).read()
        assert shifted(collection) == shifted(expected)
        (record,) = map(json.loads, quarantine.read_text().splitlines())
        assert (record["file"], record["line"], record["text"]) == (str(path), at, line)
        assert reason in record["reason"]
        assert "left out 1 bad line" in caplog.text
        assert str(quarantine) in caplog.text


def shifted(collection: Collection) -> Collection:
    """Replace ids that contain a line number, which changes when a line is inserted."""

    def plain(id: str) -> str:
        return re.sub(
            r"^(train|dev|test)\.[0-9]+$",
            lambda m: m[1] + collection.queries[id].text + collection.queries[id].title,
            id,
        )

    queries = {plain(id): (d.title, d.text) for id, d in collection.queries.items()}
    qrels = {s: {plain(id): judged for id, judged in qrels.items()} for s, qrels in collection.qrels.items()}
    return Collection(collection.corpus, queries, qrels)


@world
def test_file_with_mostly_bad_lines_raises_user_error(world: World, tmp_path):
    world.write(tmp_path)
    path = tmp_path / world.file
    for _ in range(40):
        insert(path, world.bad[0][0], SEPARATORS.get(world.name, ""))
    message = error_of(world.make(tmp_path, on_error="skip", quarantine=str(tmp_path / "q.jsonl")))
    assert f"{path}: 40 of " in message
    assert "more than half" in message


@world
def test_truncated_file_raises_user_error_under_both_policies(world: World, tmp_path):
    world.write(tmp_path)
    path = tmp_path / world.file
    whole = gzip.compress(path.read_bytes())
    path.unlink()
    Path(f"{path}.gz").write_bytes(whole[: len(whole) * 2 // 3])
    for policy in ("fail", "skip"):
        reader = world.make(tmp_path, on_error=policy, quarantine=str(tmp_path / "q.jsonl"))
        assert f"{path}.gz: the gzip file is damaged" in error_of(reader)


@world
def test_missing_files_are_named_in_the_error(world: World, tmp_path):
    world.write(tmp_path / "complete")
    assert "no such" in error_of(world.make(tmp_path / "nowhere"))
    for path in files(tmp_path / "complete"):
        content = path.read_bytes()
        path.unlink()
        message = error_or_empty(world.make(tmp_path / "complete"))
        assert not message or str(path.parent) in message  # without an error, a split is missing
        path.write_bytes(content)


@world
def test_unknown_argument_value_raises_user_error(world: World, tmp_path):
    with pytest.raises(UserError, match="on_error: expected one of fail, skip, got 'ignore'"):
        world.make(tmp_path, on_error="ignore")
    for name in {"view", "task", "dataset", "relation"} & world.reader[1].keys():
        with pytest.raises(UserError, match=f"{name}.*: expected one of .*, got 'x'"):
            world.make(tmp_path, **{name: "x"})


def test_documented_nodes_are_readers():
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    nodes = [
        node for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) for node in yaml.safe_load(block).values()
    ]
    classes = {node["_target_"].rpartition(".")[2] for node in nodes}
    assert classes == {"BeirHubReader", *(world.reader[0].__name__ for world in WORLDS)}
    for node in nodes:
        assert isinstance(instantiate(check_target("data.x", node, base=Reader, package=READERS), "data.x"), Reader)
