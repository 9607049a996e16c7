"""The checkpoints of a run on disk: written whole or not at all, the last few kept, damaged ones found.

last.ckpt             the newest
last.1.ckpt, ...      the ones before it, the newest first
last.ckpt.damaged     one that could not be read, put aside when the run went on from the one before
"""

from __future__ import annotations

import logging
import os
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from datamodules.records import UserError
from lightning_modules.encoders.backbone import reason

log = logging.getLogger(__name__)

ARCHIVE = b"PK\x03\x04"  # the first bytes of a ZIP file
READ_ERRORS = (
    *(OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, NotImplementedError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error),
)


def older(path: Path, age: int) -> Path:
    """The checkpoint that was written `age` times before the newest."""
    return path.with_name(f"{path.stem}.{age}{path.suffix}") if age else path


def candidates(path: Path) -> list[Path]:
    """All kept checkpoints that are there, the newest first."""
    ages = [int(p.name.split(".")[-2]) for p in path.parent.glob(f"{path.stem}.*{path.suffix}") if _has_age(p)]
    return [p for p in (older(path, age) for age in (0, *sorted(ages))) if p.is_file()]


def _has_age(path: Path) -> bool:
    return path.name.split(".")[-2].isdecimal()


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path, keep: int = 1) -> None:
    """Write a checkpoint beside the file, bring it safely to disk and rename it; keep - 1 former ones stay.

    Raises OSError if it cannot be written. The former ones are then as they were.
    """
    partial = path.with_name(f"{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        partial.unlink(missing_ok=True)
        cause = next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError)), None)
        if cause is None or cause is error:
            raise
        raise cause from error  # torch wraps what the disk said
    _make_room(path, keep)
    os.replace(partial, path)
    _sync_folder(path.parent)


def _make_room(path: Path, keep: int) -> None:
    """Every kept checkpoint grows older by one; the newest stays where it is, too, until it is replaced."""
    for surplus in [p for p in candidates(path)[1:] if int(p.name.split(".")[-2]) >= max(keep - 1, 1)]:
        surplus.unlink()
    for age in range(keep - 2, 0, -1):
        if older(path, age).is_file():
            os.replace(older(path, age), older(path, age + 1))
    if keep > 1 and path.is_file():
        try:
            os.link(path, older(path, 1))
        except OSError:  # a file system without hard links
            os.replace(path, older(path, 1))


def _sync_folder(folder: Path) -> None:
    """Without it a new name may be lost when the machine stops, though the file is on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # file systems that cannot do this for a folder
    finally:
        os.close(descriptor)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint: memory-mapped tensors and plain containers.

    Raises UserError if the file is not a checkpoint, or if the checksum of any record in it is wrong.
    """
    try:
        with open(path, "rb") as file:
            is_archive = file.read(4) == ARCHIVE  # files of torch before 1.6, such as DPR's, are not
        if is_archive:
            _verify(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except READ_ERRORS as error:
        raise UserError(f"{path}: is no checkpoint, or a damaged one ({reason(error)})") from error


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint of a run, or None if it is intact."""
    try:
        _verify(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        missing = {"global_step", "state_dict", "optimizer_states", "loops"} - set(content)
        return f"it has no {', '.join(sorted(missing))}" if missing else None
    except READ_ERRORS as error:
        return reason(error)


def _verify(path: Path) -> None:
    """Compare the checksum (CRC-32) of every record of an archive. Raises one of READ_ERRORS."""
    with zipfile.ZipFile(path) as archive:
        record = archive.testzip()
    if record:
        raise zipfile.BadZipFile(f"the checksum of {record} is wrong")


def newest_intact(path: Path) -> Path | None:
    """The newest checkpoint that can be read, None if there is none at all. Newer, damaged ones are put aside.

    Raises UserError if all are damaged.
    """
    damaged: dict[Path, str] = {}
    for candidate in candidates(path):
        wrong = damage(candidate)
        if wrong is None:
            _put_aside(damaged, candidate)
            return candidate
        damaged[candidate] = wrong
    if not damaged:
        return None
    told = "; ".join(f"{file} ({wrong})" for file, wrong in damaged.items())
    raise UserError(
        f"no checkpoint of the run can be read: {told}. Put a good one back as {path}, or start over with "
        "run.resume=never (what is there is kept beside)."
    )


def _put_aside(damaged: Mapping[Path, str], chosen: Path) -> None:
    for file, wrong in damaged.items():
        log.warning("%s is damaged (%s): the run goes on from the one before, %s", file, wrong, chosen.name)
        os.replace(file, file.with_name(f"{file.name}.damaged"))
