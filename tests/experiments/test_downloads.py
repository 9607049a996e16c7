"""Downloads from servers that break off, lie and refuse; archives that are damaged, or do not stay in their folder."""

import errno
import io
import random
import socket
import tarfile
import zipfile

import pytest

from datamodules.records import UserError
from experiments.download import downloads, unpacking
from experiments.download.downloads import NotThere, download, keep
from experiments.download.unpacking import unpack
from tests.experiments.loopback import loopback

CONTENT = random.Random(0).randbytes(3_000_000)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloads, "PAUSES", (0.01, 0.01))
    with loopback() as state:
        state.files["file"] = CONTENT
        yield state


def fetched(server, folder, **options):
    arguments = {"size": None, "verified": False} | options
    return download(f"{server.url}/file", folder / "file", **arguments).read_bytes()


def test_a_file_arrives_whole_and_tells_how_far_it_is(server, tmp_path):
    told = []
    assert fetched(server, tmp_path, report=lambda done, total: told.append((done, total))) == CONTENT
    assert told[-1] == (len(CONTENT), len(CONTENT))
    keep(tmp_path / "file.part")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("lengths", [True, False])
def test_a_broken_connection_goes_on_where_it_ended(server, tmp_path, lengths):
    """Without Content-Length the recipe's size tells that it did."""
    server.lengths = lengths
    server.dies_after = [1_000_000, 500_000]
    assert fetched(server, tmp_path, size=None if lengths else len(CONTENT)) == CONTENT
    assert [wanted for _, wanted in server.requests] == [None, "bytes=1000000-", "bytes=1500000-"]


def test_more_breaks_than_attempts_do_not_matter_while_there_is_progress(server, tmp_path):
    server.dies_after = [100_000] * 20
    assert fetched(server, tmp_path) == CONTENT
    assert len(server.requests) == 21


def test_a_server_without_ranges_begins_again(server, tmp_path):
    server.ranges, server.dies_after = False, [1_000_000]
    assert fetched(server, tmp_path) == CONTENT


def test_another_file_under_the_same_name_is_not_appended_to_the_old_one(server, tmp_path):
    server.dies_after = [1_000_000] + [0] * 10
    with pytest.raises(UserError, match="ended after 1,000,000 of 3,000,000 bytes"):
        fetched(server, tmp_path)
    assert (tmp_path / "file.part").stat().st_size == 1_000_000
    server.dies_after = []
    server.files["file"] = new = CONTENT[::-1]
    assert fetched(server, tmp_path) == new


def test_without_any_sign_of_the_version_only_a_known_checksum_allows_going_on(server, tmp_path):
    server.tags = False
    for verified, expected in ((False, [None, None]), (True, [None, "bytes=1000000-"])):
        server.requests.clear()
        server.dies_after = [1_000_000]
        (tmp_path / "file.part").unlink(missing_ok=True)
        assert fetched(server, tmp_path, verified=verified) == CONTENT
        assert [wanted for _, wanted in server.requests] == expected


def test_a_part_that_is_whole_already_is_not_sent_again(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    assert fetched(server, tmp_path, verified=True, size=len(CONTENT)) == CONTENT
    (tmp_path / "file.part").write_bytes(CONTENT + b"more")
    assert fetched(server, tmp_path, verified=True) == CONTENT


def test_busy_servers_are_asked_again(server, tmp_path):
    server.status = [503, 429]
    assert fetched(server, tmp_path) == CONTENT
    server.status = [503] * 9
    with pytest.raises(
        UserError, match=r"the server says 503 .*, 3 times without progress. Give the same command again"
    ):
        fetched(server, tmp_path / "other")


def test_a_server_may_ask_for_a_longer_pause_but_not_for_any(server, tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(downloads.time, "sleep", slept.append)
    server.headers["Retry-After"] = "7"
    server.status = [429]
    assert fetched(server, tmp_path) == CONTENT
    server.headers["Retry-After"] = "86400"
    server.status = [429]
    assert fetched(server, tmp_path / "other") == CONTENT
    assert slept == [7, 120]


def test_a_web_page_is_no_file(server, tmp_path):
    server.headers["Content-Type"] = "text/html; charset=utf-8"
    with pytest.raises(
        UserError, match="sends a web page instead of the file. Give the same command again to go on, or"
    ):
        fetched(server, tmp_path)
    assert not (tmp_path / "file.part").exists()


def test_what_the_server_refuses_is_told_at_once(server, tmp_path):
    server.status = [403]
    with pytest.raises(UserError, match=f"says 403 Forbidden.*place the file by hand as {tmp_path / 'file'}, and"):
        fetched(server, tmp_path)
    del server.files["file"]
    with pytest.raises(NotThere, match="says 404"):
        fetched(server, tmp_path)
    assert len(server.requests) == 2


def test_no_network_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "PAUSES", (0.01,))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/file"
    with pytest.raises(UserError, match=r"cannot be reached .*, 2 times without progress. .* by hand as .*/file, and"):
        download(url, tmp_path / "file", None, False)


def test_another_size_than_the_recipes_is_not_received(server, tmp_path):
    with pytest.raises(UserError, match="the recipe says 7 bytes, the server has 3,000,000: not this file"):
        fetched(server, tmp_path, size=7)
    assert not (tmp_path / "file.part").exists()


def test_a_full_disk_is_told(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(UserError, match=r"file.part: needs 3,000,000 bytes, and 10 are free there"):
        fetched(server, tmp_path)
    monkeypatch.undo()

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(downloads.os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full; the same command goes on from here"):
        fetched(server, tmp_path)
    monkeypatch.undo()
    assert fetched(server, tmp_path) == CONTENT


def zipped(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def tarred(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


PACK = {"zip": zipped, "tar": tarred}
kinds = pytest.mark.parametrize("kind", PACK)


@kinds
def test_members_that_match_are_unpacked(tmp_path, kind):
    PACK[kind](tmp_path / "archive", {"a/one.json": b"1", "a/two.txt": b"2", "b/one.json": b"3"})
    unpack(tmp_path / "archive", kind, ["a/*"], tmp_path / "out", lambda name: None)
    found = {str(path.relative_to(tmp_path / "out")): path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    assert found == {"a/one.json": b"1", "a/two.txt": b"2"}
    with pytest.raises(UserError, match=r"holds no b/two.txt, no c/\*: not the archive that is meant"):
        unpack(tmp_path / "archive", kind, ["a/*", "b/two.txt", "c/*"], tmp_path / "out", lambda name: None)


@kinds
@pytest.mark.parametrize("name", ["../out.txt", "/etc/out.txt", "a/../../out.txt", "a\\..\\out.txt", "."])
def test_members_outside_of_the_folder_are_refused(tmp_path, kind, name):
    PACK[kind](tmp_path / "archive", {name: b"x"})
    with pytest.raises(UserError, match="has a member outside of its folder"):
        unpack(tmp_path / "archive", kind, ["*"], tmp_path / "out", lambda name: None)
    assert [path.name for path in tmp_path.rglob("*")] == ["archive"]


def test_links_in_an_archive_are_no_files(tmp_path):
    with tarfile.open(tmp_path / "archive", "w") as archive:
        for kind, name in ((tarfile.SYMTYPE, "soft"), (tarfile.LNKTYPE, "hard"), (tarfile.FIFOTYPE, "pipe")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    with pytest.raises(UserError, match="holds no soft"):
        unpack(tmp_path / "archive", "tar", ["soft"], tmp_path / "out", lambda name: None)
    assert not (tmp_path / "out").exists()


@kinds
def test_damaged_archives_are_refused(tmp_path, kind):
    PACK[kind](tmp_path / "whole", {"a": CONTENT, "b": CONTENT})
    content = (tmp_path / "whole").read_bytes()
    for number, damaged in enumerate((content[:2_000_000], b"no archive", b"")):
        (tmp_path / "archive").write_bytes(damaged)
        with pytest.raises(UserError, match="the archive is damaged"):
            unpack(tmp_path / "archive", kind, ["*"], tmp_path / str(number), lambda name: None)
    flipped = bytearray(content)
    flipped[1_500_000] ^= 255
    (tmp_path / "archive").write_bytes(bytes(flipped))
    with pytest.raises(UserError, match="the archive is damaged"):
        unpack(tmp_path / "archive", kind, ["*"], tmp_path / "flipped", lambda name: None)


@kinds
def test_an_interrupted_unpacking_goes_on_with_the_next_member(tmp_path, kind, monkeypatch):
    PACK[kind](tmp_path / "archive", {"a": b"first", "b": b"second", "c": b"third"})
    write = unpacking._write

    def killed(open_member, target):
        if target.name == "b":
            target.with_name("b.partial").write_bytes(b"sec")
            raise KeyboardInterrupt
        write(open_member, target)

    monkeypatch.setattr(unpacking, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        unpack(tmp_path / "archive", kind, ["*"], tmp_path / "out", lambda name: None)
    monkeypatch.undo()
    said = []
    unpack(tmp_path / "archive", kind, ["*"], tmp_path / "out", said.append)
    assert said == ["b", "c"]
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert found == {"a": b"first", "b": b"second", "c": b"third"}
