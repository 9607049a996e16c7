"""Lines and JSON entries of good and damaged files, fields of records, and the policy for bad lines."""

import gzip
import json
import random
import tracemalloc

import pyarrow
import pytest

from datamodules.readers import io
from datamodules.readers.beir import BeirReader
from datamodules.readers.checks import check_grade
from datamodules.readers.io import read_lines
from datamodules.readers.json_files import (
    as_object,
    read_entries,
    read_lists,
    read_members,
    read_records,
    read_whole_json,
)
from datamodules.readers.rows import BadLines, Record
from datamodules.records import UserError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data.txt"


def numbered(rows) -> list[tuple[int, str]]:
    return [(row.number, row.text) for row in rows]


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def error_of(run) -> str:
    with pytest.raises(UserError) as caught:
        run()
    return str(caught.value)


def error_of_reading(path, reader=read_lines, *arguments) -> str:
    return error_of(lambda: list(reader(path, BadLines(), *arguments)))


# --- lines ---


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("last", ["", "\n"])
def test_any_line_ending_and_byte_order_mark_is_read(path, end, mark, last):
    path.write_bytes((mark + "one\n\n \ntwø\u2028x\nthree" + last).replace("\n", end).encode())
    assert numbered(read_lines(path, BadLines())) == [(1, "one"), (4, "twø\u2028x"), (5, "three")]


def test_lines_that_are_not_text_are_bad_one_by_one(path, tmp_path):
    path.write_bytes(b"one\ncaf\xe9 x\nthr\xc3\xa9e\nNUL \0\n\xed\xa0\x80\nfive\nsix\nseven\n")
    assert error_of_reading(path) == f"{path}, line 2: not UTF-8 (byte 0xe9 at column 4)"
    with BadLines("skip", str(tmp_path / "q.jsonl")) as bad:
        assert numbered(read_lines(path, bad)) == [(1, "one"), (3, "thrée"), (6, "five"), (7, "six"), (8, "seven")]
    records = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(record["line"], record["text"]) for record in records] == [
        (2, "caf\udce9 x"),
        (4, "NUL \0"),
        (5, "\udced\udca0\udc80"),
    ]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_named(path, encoding):
    path.write_bytes("\ufeffone\ntwo\n".encode(encoding))
    assert (
        error_of_reading(path) == f"{path}, line 1: UTF-16, as some Windows programs write it; save the file as UTF-8"
    )


def test_line_that_is_too_long_is_bad_and_next_line_is_read(path, tmp_path, monkeypatch):
    monkeypatch.setattr(io, "MAX_LINE", 10_000)
    for rest in (0, 1, 9_999, 10_000, 10_001, 54_321):
        path.write_text("one\n" + "x" * 10_000 + "y" * rest + "\ntwo\nthree\n")
        with BadLines("skip", str(tmp_path / f"{rest}.jsonl")) as bad:
            rows = [(row.number, row.text[:5]) for row in read_lines(path, bad)]
        if rest == 0:
            assert rows == [(1, "one"), (2, "xxxxx"), (3, "two"), (4, "three")]
        else:
            assert rows == [(1, "one"), (3, "two"), (4, "three")]
            assert len(json.loads((tmp_path / f"{rest}.jsonl").read_text())["text"]) == 2000
            assert error_of_reading(path) == f"{path}, line 2: longer than 10,000 characters"
    path.write_text("one\n" + "x" * 30_000)
    assert "line 2: longer than" in error_of_reading(path)


def test_damaged_gzip_file_raises_user_error(path):
    whole = gzip.compress(b"".join(b"line %d\n" % i for i in range(50_000)))
    path = path.with_suffix(".gz")
    for content in (
        whole[: len(whole) // 2],
        whole[:-3],
        whole[:20] + b"\xff\xff\xff" + whole[23:],
        b"not gzip",
        whole[:5],
    ):
        path.write_bytes(content)
        assert f"{path}: the gzip file is damaged after line" in error_of_reading(path)
    path.write_bytes(whole + whole)
    assert len(list(read_lines(path, BadLines()))) == 100_000


def test_damaged_zstd_file_raises_user_error(path):
    whole = zstd(b"".join(b"line %d\n" % i for i in range(50_000)))
    path = path.with_suffix(".zst")
    path.write_bytes(whole + whole)
    assert len(list(read_lines(path, BadLines()))) == 100_000
    for content in (whole[: len(whole) // 2], whole[:-3], whole + whole[:-1], b"not zstd", whole[:5]):
        path.write_bytes(content)
        assert f"{path}: the zstd file is damaged after line" in error_of_reading(path)
    path.write_bytes(b"")
    assert list(read_lines(path, BadLines())) == []


def test_folder_in_place_of_a_file_raises_user_error(tmp_path):
    assert "cannot be opened (Is a directory)" in error_of_reading(tmp_path)


# --- JSON ---


def test_line_that_is_not_an_object_raises_user_error(path):
    for line, message in (
        ("{", "line 1: invalid JSON (Expecting property name"),
        ("[" * 100_000, "line 1: nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "line 1: contains a number that is too long"),
        ("7", "line 1: expected an object, got '7'"),
    ):
        path.write_text(line)
        (row,) = read_lines(path, BadLines())

        def parse(row=row):
            with row:
                as_object(row)

        assert message in error_of(parse)


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
def test_entries_equal_those_of_the_json_module(path, chunk, monkeypatch):
    monkeypatch.setattr(io, "CHUNK", chunk)
    rng = random.Random(chunk)
    for indent in (None, 0, 2):
        whole = [values(rng) for _ in range(30)]
        path.write_text("\n " + json.dumps(whole, indent=indent, ensure_ascii=indent == 0) + "\n\n", encoding="utf-8")
        rows = list(read_entries(path, BadLines()))
        assert [row.value for row in rows] == whole
        assert [json.loads(row.text) for row in rows] == whole
        assert [row.entry for row in rows] == list(range(1, 31))
        named = {f"k{i}": value for i, value in enumerate(whole)}
        path.write_text(json.dumps(named, indent=indent), encoding="utf-8")
        assert [row.value for row in read_entries(path, BadLines(), "object")] == whole
        other = {"": {"b": whole}, "c": whole[:5], "a": 1.5, "b": whole, "d": []}
        path.write_text(json.dumps(other, indent=indent), encoding="utf-8")
        rows = [(key, row.entry, row.value) for key, row in read_members(path, BadLines(), ("b", "c", "d"))]
        expected = [("c", i, value) for i, value in enumerate(whole[:5], 1)]
        assert rows == [*expected, *(("b", i, value) for i, value in enumerate(whole, 1))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "expected a JSON object"),
        ('{"a": [1], "b": [', "expected a value for entry 1, but the file ends"),
        ('{"b": {"c": 1}}', "line 1: expected a JSON list, got '{\"c\": 1}}'"),
        ('{"a": {"c": 1, 2}, "b": []}', "entry 2 has no key"),
        ('{"b": [] "c": 1}', "expected a comma after b"),
        ('{"b": []}]', "unexpected text after the JSON object"),
        ('{"a": [1]}', "the JSON object lacks the key b"),
        ("{}", "the JSON object lacks the key b"),
        ('{"b": [],}', "expected a value for the key of member 2, got '}'"),
    ],
)
def test_damage_around_members_raises_user_error(path, content, message):
    path.write_text(content)
    assert message in error_of(lambda: list(read_members(path, BadLines(), ("b",))))


@pytest.mark.parametrize(
    ("read", "before", "after"),
    [
        (read_entries, "", ""),
        (lambda path, bad: (row for _, row in read_lists(path, bad)), "[[], ", "]"),
        (lambda path, bad: (row for _, row in read_members(path, bad, ("b",))), '{"a": [1], "b": ', "}"),
    ],
)
def test_file_with_more_bad_entries_than_good_ones_is_refused(path, tmp_path, read, before, after):
    """An entry of the wrong type counted twice in two of the three, as if there were a good one for each bad one."""
    for content, is_refused in (([1, 2, 3, {}], True), ([1, 2, {}, {}], False)):
        path.write_text(before + json.dumps(content) + after)
        with BadLines("skip", str(tmp_path / "quarantine.jsonl")) as bad:

            def objects(bad=bad):
                for row in read(path, bad):
                    with row:
                        as_object(row)

            if is_refused:
                assert "3 of 4 lines are bad, more than half" in error_of(objects)
            else:
                objects()


def test_second_pass_over_a_file_counts_its_bad_lines_once(path, tmp_path):
    path.write_text(json.dumps({"a": [1, 2, 3, 4, 5], "b": [6, 7]}))
    with BadLines("skip", str(tmp_path / "quarantine.jsonl")) as bad:
        for _, row in read_members(path, bad, ("a",)):
            with row:
                if row.value < 3:
                    raise UserError("too small")
        assert len(list(read_members(path, bad, ("b",)))) == 2


def test_optional_members_may_be_missing_and_need_not_be_lists(path):
    path.write_text('{"a": "x",\n"b": [1,\n2], "c": {"b": [3]}}')
    rows = list(read_members(path, BadLines(), (), optional=("a", "b", "d")))
    assert [(key, row.number, row.value) for key, row in rows] == [("a", 1, "x"), ("b", 2, 1), ("b", 3, 2)]


def test_lists_of_a_list_are_numbered(path):
    path.write_text('[[1,\n2], [], [{"a": [3]}]]\n')
    rows = list(read_lists(path, BadLines()))
    assert [(number, row.entry, row.number) for number, row in rows] == [(0, 1, 1), (0, 2, 2), (2, 1, 2)]
    assert [row.value for _, row in rows] == [1, 2, {"a": [3]}]
    path.write_text("[]")
    assert list(read_lists(path, BadLines())) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "expected a JSON list of lists, got '{}'"),
        ("[1]", "expected a JSON list, got '1]'"),
        ("[[1] [2]]", "expected a comma after list 1"),
        ("[[1], ]", "expected a JSON list, got ']'"),
        ("[[1]", "expected a comma after list 1, but the file ends"),
        ("[[1]] 2", "unexpected text after the JSON list"),
    ],
)
def test_damage_around_lists_raises_user_error(path, content, message):
    path.write_text(content)
    assert message in error_of(lambda: list(read_lists(path, BadLines())))


def test_entries_have_line_numbers(path):
    path.write_text('[\n{"a":\n1}\n,\n\n{"b": 2}, 3]')
    assert [(row.number, row.entry) for row in read_entries(path, BadLines())] == [(2, 1), (6, 2), (6, 3)]


@pytest.mark.parametrize("chunk", [1, 5, 2**20])
def test_bad_entry_is_skipped_and_next_entry_is_read(path, tmp_path, chunk, monkeypatch):
    monkeypatch.setattr(io, "CHUNK", chunk)
    deep = "[" * 100_000 + "]" * 100_000  # Python 3.12 and newer accept a few thousand
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
        message = error_of_reading(path, read_entries)
        assert message.startswith(f"{path}, line 2, entry 3: "), message
        quarantine = tmp_path / f"{number}.jsonl"
        with BadLines("skip", str(quarantine)) as bad:
            assert [row.value for row in read_entries(path, bad)] == [1, {"b": "]"}, [3], 4, 5]
        record = json.loads(quarantine.read_text())
        assert (record["line"], record["text"]) == (2, entry[:2000])
        assert record["reason"].startswith("entry 3: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1: expected a JSON list, but the file ends"),
        ("{}", "line 1: expected a JSON list, got '{}'"),
        ("[1, 2", "line 1: expected a comma after entry 2, but the file ends"),
        ('[1, {"a": [', "the file ends inside entry 2"),
        ('[1, "a', "the file ends inside entry 2"),
        ('[1, "a\\', "the file ends inside entry 2"),
        ("[1 2]", "expected a comma after entry 1, got '2]'"),
        ("[1,]", "expected a value for entry 2, got ']'"),
        ("[,1]", "expected a value for entry 1, got ',1]'"),
        ("[1,", "expected a value for entry 2, but the file ends"),
        ("[1]\n[2]", "line 2: unexpected text after the JSON list"),
        ("[1}", "expected a comma after entry 1, got '}'"),
    ],
)
def test_damage_between_entries_raises_user_error(path, content, message):
    path.write_text(content)
    assert message in error_of_reading(path, read_entries)
    with BadLines("skip", str(path.with_suffix(".q"))) as bad:
        assert message in error_of(lambda: list(read_entries(path, bad)))


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
def test_damage_in_an_object_raises_user_error(path, content, message):
    path.write_text(content)
    assert message in error_of_reading(path, read_entries, "object") or "expected a value" in error_of_reading(
        path, read_entries, "object"
    )


def test_unterminated_entry_does_not_fill_the_memory(path, monkeypatch):
    monkeypatch.setattr(io, "CHUNK", 1000)
    monkeypatch.setattr(io, "MAX_LINE", 5000)
    path.write_text('[1, {"a": "' + "x" * 100_000)
    assert "line 1: entry 2 does not end within 5,000 characters" in error_of_reading(path, read_entries)


def test_large_json_list_is_not_held_in_memory(path):
    entry = json.dumps({"question": "q", "text": "x" * 2000})
    with open(path, "w") as file:
        file.write("[" + ",".join([entry] * 10_000) + "]")
    assert path.stat().st_size > 20_000_000
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_records(path, BadLines())) == 10_000
        assert tracemalloc.get_traced_memory()[1] < 12_000_000
    finally:
        tracemalloc.stop()


def test_records_are_lines_or_entries_of_a_list(path):
    for content in ('{"a": 1}\n{"a": 2}\n', '[{"a": 1},\n{"a": 2}]', '\ufeff\n [{"a": 1}, {"a": 2}]'):
        path.write_text(content, encoding="utf-8")
        assert [as_object(row) for row in read_records(path, BadLines())] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("content", [b"\0", b"word\n", b"x"])
def test_compressed_file_that_expands_too_far_is_refused(tmp_path, monkeypatch, suffix, content):
    monkeypatch.setattr(io, "MIN_EXPANSION", 2_000_000)
    content *= 10_000_000 // len(content)
    path = tmp_path / f"bomb{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == ".gz" else zstd(content))
    for reader in (read_lines, read_records) if content[:1] == b"w" else (read_lines,):
        assert "200 times its size; if it is the right file, decompress it" in error_of_reading(path, reader)
    assert "200 times its size" in error_of(lambda: read_whole_json(path))
    monkeypatch.undo()
    assert io.MIN_EXPANSION == 2**30  # a gigabyte is accepted at any ratio
    with io.open_text(path) as stream:
        assert len(stream.read()) == len(content)


# --- fields of records ---


def test_fields_of_the_wrong_type_raise_user_error():
    assert [check_grade(value) for value in (3, 3.0, "3", "-1", 0)] == [3, 3, 3, -1, 0]
    for value in (True, None, 1.5, float("nan"), float("inf"), "1_0", "٣", 10**12, "9" * 5000, [1]):
        assert "the score must be an integer, got " in error_of(lambda value=value: check_grade(value))
    assert Record(a=None, b=7).id("a", "b") == "7"
    for record in ({"b": 7.5}, {"b": ""}, {"b": True}, {"b": []}, {"b": 10**30}, {"b": "\ud800"}, {}):
        error_of(lambda record=record: Record(record).id("b"))
    assert Record(a=None).text("a") == Record().text("a") == ""
    assert error_of(lambda: Record(x=1).text("a", required=True)) == "a is missing (keys here: x)"


# --- the policy for bad lines ---


def test_bad_lines_are_quarantined_and_counted_by_reason(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    corpus = [{"_id": f"d{i}", "text": "x"} for i in range(20)]
    rows = [json.dumps(row) for row in corpus]
    rows[3:3] = ['{"_id": "d0", "text": "again"}', '{"_id": "d1", "text": "again"}', "not JSON", "x" * 5000]
    (tmp_path / "corpus.jsonl").write_text("\n".join(rows))
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "x"}\n')
    (tmp_path / "qrels").mkdir()
    judged = [f"q\td{i}\t1" for i in range(20)]
    (tmp_path / "qrels" / "test.tsv").write_text("\n".join([*judged, "q\td99\t1", "z\td1\t1", "q\td2\t0"]))
    collection = BeirReader(str(tmp_path), on_error="skip").read()
    assert len(collection.corpus) == 20
    assert list(collection.qrels["test"]["q"]) == [*collection.corpus, "d99"]
    records = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [(record["file"].rsplit("/", 1)[1], record["line"]) for record in records] == [
        *(("corpus.jsonl", number) for number in (4, 5, 6, 7)),
        *(("test.tsv", number) for number in (22, 23)),
    ]
    assert records[3]["text"] == "x" * 2000
    assert records[4]["reason"] == "the query id 'z' is not in queries.jsonl"
    assert "left out 6 bad lines, saved in quarantine.jsonl: 2 x duplicate id ..., which an earlier line" in caplog.text
    assert "2 x invalid JSON" in caplog.text
    BeirReader(str(tmp_path), on_error="skip").read()
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 12


def test_quarantine_file_that_cannot_be_written_raises_user_error(path, tmp_path):
    path.write_bytes(b"one\n\xff\nthree\n")
    with BadLines("skip", str(tmp_path)) as bad:
        assert "cannot write the quarantine file (Is a directory)" in error_of(lambda: list(read_lines(path, bad)))
