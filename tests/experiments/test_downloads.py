"""Downloads from unreliable servers, and archives that are damaged or write outside their folder."""

import errno
import io
import os
import random
import socket
import tarfile
import zipfile
from types import SimpleNamespace

import pytest

from datamodules.records import UserError
from experiments.download import fetch
from experiments.download.fetch import NotOnServer, download, keep, unpack
from tests.experiments.loopback import loopback

CONTENT = random.Random(0).randbytes(3_000_000)


def write_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def write_tar(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


PACK = {"zip": write_zip, "tar": write_tar}
kinds = pytest.mark.parametrize("kind", PACK)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetch, "PAUSES", (0.01, 0.01))
    with loopback() as state:
        state.files["file"] = CONTENT
        yield state


def fetched(server, folder, **options):
    arguments = {"size": None, "has_checksum": False} | options
    return download(f"{server.url}/file", folder / "file", **arguments).read_bytes()


def test_download_is_complete_and_reports_progress(server, tmp_path):
    reports = []
    assert fetched(server, tmp_path, report=lambda done, total: reports.append((done, total))) == CONTENT
    assert reports[-1] == (len(CONTENT), len(CONTENT))
    keep(tmp_path / "file.part")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("lengths", [True, False])
def test_broken_connection_resumes(server, tmp_path, lengths):
    """Without Content-Length, the size in the recipe shows that the connection broke."""
    server.lengths = lengths
    server.dies_after = [1_000_000, 500_000]
    assert fetched(server, tmp_path, size=None if lengths else len(CONTENT)) == CONTENT
    assert [wanted for _, wanted in server.requests] == [None, "bytes=1000000-", "bytes=1500000-"]


def test_attempts_are_unlimited_while_there_is_progress(server, tmp_path):
    server.dies_after = [100_000] * 20
    assert fetched(server, tmp_path) == CONTENT
    assert len(server.requests) == 21


def test_server_without_ranges_sends_the_file_again(server, tmp_path):
    server.ranges, server.dies_after = False, [1_000_000]
    assert fetched(server, tmp_path) == CONTENT


def test_new_version_is_not_appended_to_old_part(server, tmp_path):
    server.dies_after = [1_000_000] + [0] * 10
    with pytest.raises(UserError, match="ended after 1,000,000 of 3,000,000 bytes"):
        fetched(server, tmp_path)
    assert (tmp_path / "file.part").stat().st_size == 1_000_000
    server.dies_after = []
    server.files["file"] = new = CONTENT[::-1]
    assert fetched(server, tmp_path) == new


def test_without_version_only_a_known_checksum_allows_resuming(server, tmp_path):
    server.tags = False
    for has_checksum, expected in ((False, [None, None]), (True, [None, "bytes=1000000-"])):
        server.requests.clear()
        server.dies_after = [1_000_000]
        (tmp_path / "file.part").unlink(missing_ok=True)
        assert fetched(server, tmp_path, has_checksum=has_checksum) == CONTENT
        assert [wanted for _, wanted in server.requests] == expected


def test_complete_part_is_not_downloaded_again(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    assert fetched(server, tmp_path, has_checksum=True, size=len(CONTENT)) == CONTENT
    (tmp_path / "file.part").write_bytes(CONTENT + b"more")
    assert fetched(server, tmp_path, has_checksum=True) == CONTENT


def test_busy_server_is_asked_again(server, tmp_path):
    server.status = [503, 429]
    assert fetched(server, tmp_path) == CONTENT
    server.status = [503] * 9
    with pytest.raises(
        UserError,
        match=r"the server answers 503 .*; gave up after 3 attempts without progress. Run the same command again",
    ):
        fetched(server, tmp_path / "other")


def test_retry_after_is_followed_up_to_a_limit(server, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(fetch.time, "sleep", pauses.append)
    server.headers["Retry-After"] = "7"
    server.status = [429]
    assert fetched(server, tmp_path) == CONTENT
    server.headers["Retry-After"] = "86400"
    server.status = [429]
    assert fetched(server, tmp_path / "other") == CONTENT
    assert pauses == [7, 120]


def test_web_page_instead_of_file_raises_user_error(server, tmp_path):
    server.headers["Content-Type"] = "text/html; charset=utf-8"
    with pytest.raises(
        UserError, match="sent a web page instead of the file. Run the same command again to resume, or"
    ):
        fetched(server, tmp_path)
    assert not (tmp_path / "file.part").exists()


def test_refusal_raises_user_error_at_once(server, tmp_path):
    server.status = [403]
    with pytest.raises(UserError, match=f"answers 403 Forbidden.*place the file yourself as {tmp_path / 'file'} and"):
        fetched(server, tmp_path)
    del server.files["file"]
    with pytest.raises(NotOnServer, match="answers 404"):
        fetched(server, tmp_path)
    assert len(server.requests) == 2


def test_no_network_raises_user_error_with_advice(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "PAUSES", (0.01,))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/file"
    with pytest.raises(
        UserError, match=r"cannot be reached .*; gave up after 2 attempts without progress. .* yourself as .*/file and"
    ):
        download(url, tmp_path / "file", None, False)


def test_file_of_another_size_is_not_downloaded(server, tmp_path):
    with pytest.raises(UserError, match="expected a file of 7 bytes, but the server has 3,000,000"):
        fetched(server, tmp_path, size=7)
    assert not (tmp_path / "file.part").exists()


def test_full_disk_raises_user_error(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(UserError, match=r"file.part: needs 3,000,000 bytes, but only 10 are free"):
        fetched(server, tmp_path)
    monkeypatch.undo()

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetch.os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full; the same command resumes the download"):
        fetched(server, tmp_path)
    monkeypatch.undo()
    assert fetched(server, tmp_path) == CONTENT


def test_file_shorter_than_announced_is_never_complete(server, tmp_path):
    """A server that announces more than it has answered 416 to the request for the rest, which counted as complete."""
    server.missing = 1000
    with pytest.raises(
        UserError, match=r"ended after 3,000,000 of 3,001,000 bytes|size of the file on the server has changed"
    ):
        fetched(server, tmp_path)
    assert not (tmp_path / "file").exists()
    server.missing = 0
    assert fetched(server, tmp_path) == CONTENT


def test_size_that_changes_starts_again(server, tmp_path):
    server.dies_after = [1_000_000]
    server.missing = 7  # the first answer only
    requests = server.requests

    class Once(list):
        def append(self, request):
            server.missing = 7 if not self else 0
            super().append(request)

    server.requests = Once(requests)
    assert fetched(server, tmp_path) == CONTENT
    assert server.requests[-1][1] is None


@pytest.mark.parametrize("name", ["file.part", "file.part.sign"])
@pytest.mark.parametrize("kind", ["link", "hard link", "dangling link", "pipe"])
def test_links_at_the_files_of_a_download_are_not_followed(server, tmp_path, name, kind):
    victim, folder = tmp_path / "victim", tmp_path / "data"
    folder.mkdir()
    victim.write_bytes(b"mine")
    planted = folder / name
    if kind == "link":
        planted.symlink_to(victim)
    elif kind == "hard link":
        planted.hardlink_to(victim)
    elif kind == "dangling link":
        planted.symlink_to(tmp_path / "new")
    elif name == "file.part.sign":
        return  # a pipe blocks its reader; it is the own folder's business
    else:
        os.mkfifo(planted)
    for has_checksum in (True, False):
        assert fetched(server, folder, has_checksum=has_checksum) == CONTENT
    assert victim.read_bytes() == b"mine"
    assert not (tmp_path / "new").exists()
    assert (folder / "file.part").stat().st_nlink == 1


BAD_URLS = (
    *("http://[::1", "http://", "https:///x", "http://host:port/x", "http://host:99999/x", "http://a b/x", "//host/x"),
    *(
        "ftp://host/x",
        "file:///etc/passwd",
        "http://ho\nst/x",
        "http://host/\r\nX: y",
        "x",
        "http://.",
        "http://a..b/x",
    ),
    *("http://" + "a" * 64 + ".org/x", "http://host:0/x", "HTTP", "http://\x00"),
)


@pytest.mark.parametrize("url", BAD_URLS)
def test_urls_that_cannot_be_parsed_raise_user_error(tmp_path, url):
    with pytest.raises(UserError, match="is not a valid URL|expected http://"):
        download(url, tmp_path / "file", None, False)


@pytest.mark.parametrize("url", BAD_URLS)
def test_redirection_to_a_bad_url_raises_user_error(server, tmp_path, url):
    if "\n" in url or "\x00" in url:
        return  # cannot be in a header
    server.redirect = url
    with pytest.raises(UserError):
        fetched(server, tmp_path)


def bomb(path, kind, size):
    """Write an archive whose only member has `size` zero bytes."""
    PACK[kind](path, {"a/zeros": bytes(size)})


@kinds
def test_archive_that_expands_too_far_is_refused(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(fetch, "MIN_EXPANSION", 1_000_000)
    bomb(tmp_path / "archive", kind, 20_000_000)
    for members in (["*"], ["a/*"], ["other"]):
        if (kind, members) != ("zip", ["other"]):  # a zip's other members are not read
            with pytest.raises(UserError, match=r"archive: unpacking stopped at [\d,]+ bytes, 200 times the size"):
                unpack(tmp_path / "archive", kind, members, tmp_path / "out", lambda name: None)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    unpack(tmp_path / "archive", kind, ["*"], tmp_path / "out", lambda name: None)


@kinds
def test_unpacking_leaves_space_on_the_disk(tmp_path, kind, monkeypatch):
    PACK[kind](tmp_path / "archive", {"a": b"1", "b": CONTENT})
    free = fetch.RESERVE + 1_000_000
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(UserError, match=r"b from archive needs 3,000,000 bytes, but only 1,000,000 are free"):
        unpack(tmp_path / "archive", kind, ["*"], tmp_path / "out", lambda name: None)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


@kinds
def test_links_in_the_folder_of_an_archive_are_not_followed(tmp_path, kind):
    PACK[kind](tmp_path / "archive", {"a": b"new", "sub/b": b"new", "c": b"new"})
    victim, out = tmp_path / "victim", tmp_path / "out"
    out.mkdir()
    victim.mkdir()
    for name in ("a", "c", "b"):
        (victim / name).write_bytes(b"old")
    (out / "a").symlink_to(victim / "a")
    (out / "c.partial").symlink_to(victim / "c")
    unpack(tmp_path / "archive", kind, ["a", "c"], out, lambda name: None)
    assert (out / "a").read_bytes() == (out / "c").read_bytes() == b"new"
    (out / "sub").symlink_to(victim)
    with pytest.raises(UserError, match="'sub/b' is outside the folder"):
        unpack(tmp_path / "archive", kind, ["*"], out, lambda name: None)
    assert {path.name: path.read_bytes() for path in victim.iterdir()} == {"a": b"old", "b": b"old", "c": b"old"}


@kinds
def test_matching_members_are_unpacked(tmp_path, kind):
    PACK[kind](tmp_path / "archive", {"a/one.json": b"1", "a/two.txt": b"2", "b/one.json": b"3"})
    unpack(tmp_path / "archive", kind, ["a/*"], tmp_path / "out", lambda name: None)
    files = {str(path.relative_to(tmp_path / "out")): path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    assert files == {"a/one.json": b"1", "a/two.txt": b"2"}
    with pytest.raises(UserError, match=r"does not contain b/two.txt, c/\*; is it the right archive"):
        unpack(tmp_path / "archive", kind, ["a/*", "b/two.txt", "c/*"], tmp_path / "out", lambda name: None)


@kinds
@pytest.mark.parametrize("name", ["../out.txt", "/etc/out.txt", "a/../../out.txt", "a\\..\\out.txt", "."])
def test_member_outside_the_folder_raises_user_error(tmp_path, kind, name):
    PACK[kind](tmp_path / "archive", {name: b"x"})
    with pytest.raises(UserError, match="its member .* is outside the folder"):
        unpack(tmp_path / "archive", kind, ["*"], tmp_path / "out", lambda name: None)
    assert [path.name for path in tmp_path.rglob("*")] == ["archive"]


def test_links_in_an_archive_are_not_unpacked(tmp_path):
    with tarfile.open(tmp_path / "archive", "w") as archive:
        for kind, name in ((tarfile.SYMTYPE, "soft"), (tarfile.LNKTYPE, "hard"), (tarfile.FIFOTYPE, "pipe")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    with pytest.raises(UserError, match="does not contain soft"):
        unpack(tmp_path / "archive", "tar", ["soft"], tmp_path / "out", lambda name: None)
    assert not (tmp_path / "out").exists()


@kinds
def test_damaged_archive_raises_user_error(tmp_path, kind):
    PACK[kind](tmp_path / "whole", {"a": CONTENT, "b": CONTENT})
    content = (tmp_path / "whole").read_bytes()
    for number, damaged in enumerate((content[:2_000_000], b"not an archive", b"")):
        (tmp_path / "archive").write_bytes(damaged)
        with pytest.raises(UserError, match="the archive is damaged"):
            unpack(tmp_path / "archive", kind, ["*"], tmp_path / str(number), lambda name: None)
    flipped = bytearray(content)
    flipped[1_500_000] ^= 255
    (tmp_path / "archive").write_bytes(bytes(flipped))
    with pytest.raises(UserError, match="the archive is damaged"):
        unpack(tmp_path / "archive", kind, ["*"], tmp_path / "flipped", lambda name: None)


@kinds
def test_interrupted_unpacking_continues_with_the_next_member(tmp_path, kind, monkeypatch):
    PACK[kind](tmp_path / "archive", {"a": b"first", "b": b"second", "c": b"third"})
    write_member = fetch._write_member

    def interrupted(member, target):
        if target.name == "b":
            target.with_name("b.partial").write_bytes(b"sec")
            raise KeyboardInterrupt
        write_member(member, target)

    monkeypatch.setattr(fetch, "_write_member", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unpack(tmp_path / "archive", kind, ["*"], tmp_path / "out", lambda name: None)
    monkeypatch.undo()
    unpacked = []
    unpack(tmp_path / "archive", kind, ["*"], tmp_path / "out", unpacked.append)
    assert unpacked == ["b", "c"]
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert files == {"a": b"first", "b": b"second", "c": b"third"}
