"""Lines and JSON entries of files as they are, and as they should not be; and the policy for bad ones."""

import gzip
import json
import random
import sys
import tracemalloc

import pytest

from datamodules.readers import json_window
from datamodules.readers import lines as lines_module
from datamodules.readers.bad_lines import BadLines
from datamodules.readers.beir import BeirReader
from datamodules.readers.fields import grade, identifier, text
from datamodules.readers.json_values import as_object, entries, members, records
from datamodules.readers.lines import lines
from datamodules.records import UserError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data.txt"


def taken(places) -> list[tuple[int, str]]:
    return [(place.number, place.text) for place in places]


def message_of(run) -> str:
    with pytest.raises(UserError) as caught:
        run()
    return str(caught.value)


def refused(path, reader=lines, *arguments) -> str:
    return message_of(lambda: list(reader(path, BadLines(), *arguments)))


# --- lines ---


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("last", ["", "\n"])
def test_any_line_ends_and_a_byte_order_mark(path, end, mark, last):
    path.write_bytes((mark + "one\n\n \ntwø\u2028x\nthree" + last).replace("\n", end).encode())
    assert taken(lines(path, BadLines())) == [(1, "one"), (4, "twø\u2028x"), (5, "three")]


def test_lines_that_are_no_text_are_bad_one_by_one(path, tmp_path):
    path.write_bytes(b"one\ncaf\xe9 x\nthr\xc3\xa9e\nNUL \0\n\xed\xa0\x80\nfive\nsix\nseven\n")
    assert refused(path) == f"{path}, line 2: is not UTF-8 (byte 0xe9 at column 4)"
    with BadLines("skip", str(tmp_path / "q.jsonl")) as bad:
        assert taken(lines(path, bad)) == [(1, "one"), (3, "thrée"), (6, "five"), (7, "six"), (8, "seven")]
    found = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(record["line"], record["text"]) for record in found] == [
        (2, "caf\udce9 x"),
        (4, "NUL \0"),
        (5, "\udced\udca0\udc80"),
    ]


def test_a_gigantic_line_is_bad_and_the_next_is_read(path, tmp_path, monkeypatch):
    monkeypatch.setattr(lines_module, "MAX_LINE", 10_000)
    for rest in (0, 1, 9_999, 10_000, 10_001, 54_321):
        path.write_text("one\n" + "x" * 10_000 + "y" * rest + "\ntwo\nthree\n")
        with BadLines("skip", str(tmp_path / f"{rest}.jsonl")) as bad:
            found = [(place.number, place.text[:5]) for place in lines(path, bad)]
        if rest == 0:
            assert found == [(1, "one"), (2, "xxxxx"), (3, "two"), (4, "three")]
        else:
            assert found == [(1, "one"), (3, "two"), (4, "three")]
            assert len(json.loads((tmp_path / f"{rest}.jsonl").read_text())["text"]) == 2000
            assert refused(path) == f"{path}, line 2: is longer than 10,000 characters"
    path.write_text("one\n" + "x" * 30_000)
    assert "line 2: is longer than" in refused(path)


def test_damaged_gzip_files(path):
    whole = gzip.compress(b"".join(b"line %d\n" % i for i in range(50_000)))
    path = path.with_suffix(".gz")
    for content in (
        whole[: len(whole) // 2],
        whole[:-3],
        whole[:20] + b"\xff\xff\xff" + whole[23:],
        b"no gzip",
        whole[:5],
    ):
        path.write_bytes(content)
        assert f"{path}: the gzip file is damaged after line" in refused(path)
    path.write_bytes(whole + whole)
    assert len(list(lines(path, BadLines()))) == 100_000


def test_damaged_zstd_files(path):
    zstandard = pytest.importorskip("zstandard")
    whole = zstandard.compress(b"".join(b"line %d\n" % i for i in range(50_000)))
    path = path.with_suffix(".zst")
    path.write_bytes(whole + whole)
    assert len(list(lines(path, BadLines()))) == 100_000
    for content in (whole[: len(whole) // 2], whole[:-3], whole + whole[:-1], b"no zstd at all", whole[:5]):
        path.write_bytes(content)
        assert f"{path}: the zstd file is damaged after line" in refused(path)
    path.write_bytes(b"")
    assert list(lines(path, BadLines())) == []


def test_zstandard_is_asked_for_where_it_is_missing(path, monkeypatch):
    path = path.with_suffix(".zst")
    path.write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert refused(path) == f"{path}: reading .zst needs the package zstandard: pip install zstandard"


def test_what_cannot_be_opened(tmp_path):
    assert "cannot be opened (Is a directory)" in refused(tmp_path)


# --- JSON ---


def test_objects_of_lines(path):
    for line, message in (
        ("{", "line 1: is no JSON (Expecting property name"),
        ("[" * 100_000, "line 1: is nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "line 1: holds a number that is too long"),
        ("7", "line 1: expected an object, got '7'"),
    ):
        path.write_text(line)
        (place,) = lines(path, BadLines())

        def use(place=place):
            with place:
                as_object(place)

        assert message in message_of(use)


def values(rng: random.Random, depth: int = 0):
    kind = rng.randrange(4 if depth > 3 else 7)
    if kind < 2:
        return rng.choice([0, -1, 12345678, 1.5e-7, True, None, 3.25])
    if kind < 4:
        return "".join(rng.choice('a "\\\n\u00e9{}[],:') for _ in range(rng.randrange(12)))
    if kind == 4:
        return [values(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {values_key(rng): values(rng, depth + 1) for _ in range(rng.randrange(4))}


def values_key(rng: random.Random) -> str:
    return "".join(rng.choice('k"\\{}') for _ in range(rng.randrange(1, 6))) + str(rng.random())


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 2**20])
def test_entries_are_those_of_json(path, chunk, monkeypatch):
    monkeypatch.setattr(json_window, "CHUNK", chunk)
    rng = random.Random(chunk)
    for indent in (None, 0, 2):
        whole = [values(rng) for _ in range(30)]
        path.write_text("\n " + json.dumps(whole, indent=indent, ensure_ascii=indent == 0) + "\n\n", encoding="utf-8")
        found = list(entries(path, BadLines()))
        assert [place.value for place in found] == whole
        assert [json.loads(place.text) for place in found] == whole
        assert [place.entry for place in found] == list(range(1, 31))
        named = {f"k{i}": value for i, value in enumerate(whole)}
        path.write_text(json.dumps(named, indent=indent), encoding="utf-8")
        assert [place.value for place in entries(path, BadLines(), "object")] == whole
        other = {"": {"b": whole}, "c": whole[:5], "a": 1.5, "b": whole, "d": []}
        path.write_text(json.dumps(other, indent=indent), encoding="utf-8")
        found = [(key, place.entry, place.value) for key, place in members(path, BadLines(), ("b", "c", "d"))]
        wanted = [("c", i, value) for i, value in enumerate(whole[:5], 1)]
        assert found == [*wanted, *(("b", i, value) for i, value in enumerate(whole, 1))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "expected a JSON object"),
        ('{"a": [1], "b": [', "expected a value for entry 1, the file ends"),
        ('{"b": {"c": 1}}', "line 1: expected a JSON list, got '{\"c\": 1}}'"),
        ('{"a": {"c": 1, 2}, "b": []}', "entry 2 has no key"),
        ('{"b": [] "c": 1}', "expected a comma after b"),
        ('{"b": []}]', "the file goes on after the JSON object"),
        ('{"a": [1]}', "the object has no b"),
        ("{}", "the object has no b"),
        ('{"b": [],}', "expected a value for the key of a member of the object, got '}'"),
    ],
)
def test_damage_around_members_is_an_error(path, content, message):
    path.write_text(content)
    assert message in message_of(lambda: list(members(path, BadLines(), ("b",))))


def test_entries_know_their_lines(path):
    path.write_text('[\n{"a":\n1}\n,\n\n{"b": 2}, 3]')
    assert [(place.number, place.entry) for place in entries(path, BadLines())] == [(2, 1), (6, 2), (6, 3)]


@pytest.mark.parametrize("chunk", [1, 5, 2**20])
def test_a_bad_entry_is_set_aside_and_the_next_is_read(path, tmp_path, chunk, monkeypatch):
    monkeypatch.setattr(json_window, "CHUNK", chunk)
    deep = "[" * 2000 + "]" * 2000
    bad_ones = (
        '{"a": nul}',
        "{'a': 1}",
        '{"a" 1, "]": "}"}',
        "[1, 2,]",
        "nul",
        "9" * 5000,
        deep,
        '"\x07"',
        '{"x\n": 1}',
    )
    for number, entry in enumerate(bad_ones):
        path.write_text(f'[1, {{"b": "]"}},\n{entry}, [3], 4, 5]')
        message = refused(path, entries)
        assert message.startswith(f"{path}, line 2, entry 3: "), message
        quarantine = tmp_path / f"{number}.jsonl"
        with BadLines("skip", str(quarantine)) as bad:
            assert [place.value for place in entries(path, bad)] == [1, {"b": "]"}, [3], 4, 5]
        record = json.loads(quarantine.read_text())
        assert (record["line"], record["text"]) == (2, entry[:2000])
        assert record["reason"].startswith("entry 3: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1: expected a JSON list, the file ends"),
        ("{}", "line 1: expected a JSON list, got '{}'"),
        ("[1, 2", "line 1: expected a comma after entry 2, the file ends"),
        ('[1, {"a": [', "the file ends inside entry 2"),
        ('[1, "a', "the file ends inside entry 2"),
        ('[1, "a\\', "the file ends inside entry 2"),
        ("[1 2]", "expected a comma after entry 1, got '2]'"),
        ("[1,]", "expected a value for entry 2, got ']'"),
        ("[,1]", "expected a value for entry 1, got ',1]'"),
        ("[1,", "expected a value for entry 2, the file ends"),
        ("[1]\n[2]", "line 2: the file goes on after the JSON list"),
        ("[1}", "expected a comma after entry 1, got '}'"),
    ],
)
def test_damage_between_entries_is_an_error(path, content, message):
    path.write_text(content)
    assert message in refused(path, entries)
    with BadLines("skip", str(path.with_suffix(".q"))) as bad:
        assert message in message_of(lambda: list(entries(path, bad)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "expected a JSON object"),
        ("{1: 2}", "entry 1 has no key, got '1'"),
        ('{"a" 2}', "expected a colon after the key \"a\", got '2}'"),
        ('{"a": 1, }', "entry 2 has no key"),
        ('{"a": }', "expected a value for entry 1, got '}'"),
    ],
)
def test_damage_in_an_object_is_an_error(path, content, message):
    path.write_text(content)
    assert message in refused(path, entries, "object") or "expected a value" in refused(path, entries, "object")


def test_an_entry_without_end_does_not_fill_the_memory(path, monkeypatch):
    monkeypatch.setattr(json_window, "CHUNK", 1000)
    monkeypatch.setattr(json_window, "MAX_LINE", 5000)
    path.write_text('[1, {"a": "' + "x" * 100_000)
    assert "line 1: entry 2 has no end within 5,000 characters" in refused(path, entries)


def test_big_files_are_never_in_memory(path):
    entry = json.dumps({"question": "q", "text": "x" * 2000})
    with open(path, "w") as file:
        file.write("[" + ",".join([entry] * 10_000) + "]")
    assert path.stat().st_size > 20_000_000
    tracemalloc.start()
    try:
        assert sum(1 for _ in records(path, BadLines())) == 10_000
        assert tracemalloc.get_traced_memory()[1] < 12_000_000
    finally:
        tracemalloc.stop()


def test_records_are_lines_or_entries(path):
    for content in ('{"a": 1}\n{"a": 2}\n', '[{"a": 1},\n{"a": 2}]', '\ufeff\n [{"a": 1}, {"a": 2}]'):
        path.write_text(content, encoding="utf-8")
        assert [as_object(place) for place in records(path, BadLines())] == [{"a": 1}, {"a": 2}]


# --- fields ---


def test_fields_say_what_came():
    assert [grade(value) for value in (3, 3.0, "3", "-1", 0)] == [3, 3, 3, -1, 0]
    for value in (True, None, 1.5, float("nan"), float("inf"), "1_0", "٣", 10**12, "9" * 5000, [1]):
        assert "the score must be an integer, got " in message_of(lambda value=value: grade(value))
    assert identifier({"a": None, "b": 7}, "a", "b") == "7"
    for record in ({"b": 7.5}, {"b": ""}, {"b": True}, {"b": []}, {"b": 10**30}, {"b": "\ud800"}, {}):
        message_of(lambda record=record: identifier(record, "b"))
    assert text({"a": None}, "a") == text({}, "a") == ""
    assert message_of(lambda: text({"x": 1}, "a", required=True)) == "a is missing (keys here: x)"


# --- the policy ---


def test_bad_lines_are_counted_by_reason(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    corpus = [{"_id": f"d{i}", "text": "x"} for i in range(20)]
    rows = [json.dumps(row) for row in corpus]
    rows[3:3] = ['{"_id": "d0", "text": "again"}', '{"_id": "d1", "text": "again"}', "no JSON", "x" * 5000]
    (tmp_path / "corpus.jsonl").write_text("\n".join(rows))
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "x"}\n')
    (tmp_path / "qrels").mkdir()
    judged = [f"q\td{i}\t1" for i in range(20)]
    (tmp_path / "qrels" / "test.tsv").write_text("\n".join([*judged, "q\td99\t1", "z\td1\t1", "q\td2\t0"]))
    collection = BeirReader(str(tmp_path), on_error="skip").read()
    assert len(collection.corpus) == len(collection.qrels["test"]["q"]) == 20
    found = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [(record["file"].rsplit("/", 1)[1], record["line"]) for record in found] == [
        *(("corpus.jsonl", number) for number in (4, 5, 6, 7)),
        *(("test.tsv", number) for number in (21, 22, 23)),
    ]
    assert found[3]["text"] == "x" * 2000
    assert found[4]["reason"] == "the document id 'd99' is not in corpus.jsonl"
    assert (
        "7 bad lines are left out and stand in quarantine.jsonl: 2 x the id ... stands on an earlier line"
        in caplog.text
    )
    assert "2 x is no JSON" in caplog.text
    BeirReader(str(tmp_path), on_error="skip").read()
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 14


def test_a_quarantine_that_cannot_be_written(path, tmp_path):
    path.write_bytes(b"one\n\xff\nthree\n")
    with BadLines("skip", str(tmp_path)) as bad:
        assert "the quarantine file cannot be written (Is a directory)" in message_of(lambda: list(lines(path, bad)))
