"""Files and folders are replaced whole, or stay unchanged."""

import contextlib

import pytest

from datamodules.files import atomic_file, atomic_folder, read_json, write_json, write_text
from datamodules.records import UserError


def test_written_json_is_read_back(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, "ä"]})
    assert read_json(tmp_path / "a.json") == {"x": [1, "ä"]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_failed_write_keeps_the_old_file(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with contextlib.suppress(ZeroDivisionError), atomic_file(tmp_path / "a.txt") as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert (tmp_path / "a.txt").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_folder_replaces_the_old_one_only_if_it_is_complete(tmp_path):
    path = tmp_path / "deep" / "folder"
    with atomic_folder(path) as folder:
        (folder / "old").touch()
    with contextlib.suppress(ZeroDivisionError), atomic_folder(path) as folder:
        (folder / "new").touch()
        raise ZeroDivisionError
    assert [file.name for file in path.iterdir()] == ["old"]
    with atomic_folder(path) as folder:
        (folder / "new").touch()
    assert [file.name for file in path.iterdir()] == ["new"]
    assert len(list(path.parent.iterdir())) == 1


def test_damaged_json_raises_user_error(tmp_path):
    (tmp_path / "a.json").write_text("{")
    for name in ("a.json", "missing.json"):
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            read_json(tmp_path / name)
