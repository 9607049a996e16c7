"""Checkpoint files of a run: write them atomically, keep the last few, and detect damaged ones.

last.ckpt             newest checkpoint
last.1.ckpt, ...      previous checkpoints, newest first
last.ckpt.damaged     damaged checkpoint, renamed when the run was resumed from an older one
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
from torch import Tensor

from datamodules.files import open_new, regular
from datamodules.records import UserError, reason

log = logging.getLogger(__name__)

ZIP_START = b"PK\x03\x04"  # first bytes of a ZIP file
ENTRIES = {"global_step": int, "state_dict": dict, "optimizer_states": list, "loops": dict}  # in a run's checkpoint
READ_ERRORS = (
    *(OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, NotImplementedError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error),
)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint with memory-mapped tensors.

    Raises UserError if the file is not a checkpoint, or if a checksum in it is wrong.
    """
    try:
        with open(regular(path), "rb") as file:
            is_zip = file.read(4) == ZIP_START  # files written by torch before 1.6, such as DPR's, are not
        if is_zip:
            _verify(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except READ_ERRORS as error:
        raise UserError(f"{path}: not a checkpoint, or a damaged one ({reason(error)})") from error


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path, keep: int = 1) -> None:
    """Write a checkpoint atomically, and keep `keep` checkpoints in total.

    Raises OSError if it cannot be written; the earlier checkpoints are then unchanged.
    """
    partial = path.with_name(f"{path.name}.partial")  # a fixed name, so that killed runs leave at most one
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open_new(partial) as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        partial.unlink(missing_ok=True)
        cause = next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError)), None)
        if cause is None or cause is error:
            raise
        raise cause from error  # torch wraps OSError in other errors
    _rotate(path, keep)
    os.replace(partial, path)
    _sync_folder(path.parent)


def older(path: Path, age: int) -> Path:
    """Return the path of a checkpoint by age: 0 for the newest, 1 for the previous one."""
    return path.with_name(f"{path.stem}.{age}{path.suffix}") if age else path


def candidates(path: Path) -> list[Path]:
    """Return the existing checkpoints, newest first."""
    ages = [_age(p) for p in path.parent.glob(f"{path.stem}.*{path.suffix}") if p.name.split(".")[-2].isdecimal()]
    return [p for p in (older(path, age) for age in (0, *sorted(ages))) if p.is_file()]


def _age(path: Path) -> int:
    return int(path.name.split(".")[-2])


def _rotate(path: Path, keep: int) -> None:
    """Rename the existing checkpoints to make room for a new one. The newest also keeps its name until replaced."""
    for surplus in [p for p in candidates(path)[1:] if _age(p) >= max(keep - 1, 1)]:
        surplus.unlink()
    for age in range(keep - 2, 0, -1):
        if older(path, age).is_file():
            os.replace(older(path, age), older(path, age + 1))
    if keep > 1 and path.is_file():
        try:
            os.link(path, older(path, 1))
        except OSError:  # the file system has no hard links
            os.replace(path, older(path, 1))


def _sync_folder(folder: Path) -> None:
    """Flush a folder to disk, so that a rename in it survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # the file system cannot sync folders
    finally:
        os.close(descriptor)


def damage(path: Path) -> str | None:
    """Return a description of the damage to a checkpoint of a run, or None if it is intact.

    Numbers that are not finite also count as damage, because training would never recover from them.
    """
    try:
        _verify(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except READ_ERRORS as error:
        return reason(error)
    if not isinstance(content, dict):
        return f"expected a dict, got a {type(content).__name__}"
    if missing := ENTRIES.keys() - content.keys():
        return f"it has no {', '.join(sorted(missing))}"
    for key, kind in ENTRIES.items():
        if not isinstance(content[key], kind):
            return f"{key} must be a {kind.__name__}, got a {type(content[key]).__name__}"
    return f"{name} contains non-finite numbers" if (name := first_not_finite(content)) else None


def first_not_finite(checkpoint: Mapping[str, Any]) -> str | None:
    """Return the name of the first weight or optimizer state with a number that is not finite, or None."""
    return _first_not_finite({key: checkpoint.get(key) for key in ("state_dict", "optimizer_states")}, "")


def _first_not_finite(node: Any, name: str) -> str | None:
    if isinstance(node, Tensor):
        return name if node.is_floating_point() and not node.isfinite().all() else None
    children = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, (list, tuple)) else ()
    names = (_first_not_finite(child, f"{name}.{key}" if name else str(key)) for key, child in children)
    return next(filter(None, names), None)


def _verify(path: Path) -> None:
    """Verify the CRC-32 checksum of every record. Raises one of READ_ERRORS."""
    with zipfile.ZipFile(path) as archive:
        record = archive.testzip()
    if record:
        raise zipfile.BadZipFile(f"the checksum of {record} is wrong")


def newest_intact(path: Path) -> Path | None:
    """Return the newest intact checkpoint, or None if there are no checkpoints. Rename any newer, damaged ones.

    Raises UserError if all checkpoints are damaged.
    """
    if path.is_dir():
        raise UserError(f"{path}: expected a checkpoint, got a folder. Remove it.")
    damaged: dict[Path, str] = {}
    for candidate in candidates(path):
        problem = damage(candidate)
        if problem is None:
            for file, why in damaged.items():
                log.warning("%s is damaged (%s); resuming from the checkpoint before it, %s", file, why, candidate.name)
                os.replace(file, file.with_name(f"{file.name}.damaged"))
            return candidate
        damaged[candidate] = problem
    if not damaged:
        return None
    problems = "; ".join(f"{file} ({why})" for file, why in damaged.items())
    raise UserError(f"all checkpoints of the run are damaged: {problems}. Restore an intact one as {path}.")
