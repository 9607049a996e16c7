"""The sources of a recipe on disk: downloaded or placed by hand, verified, and unpacked.

    ROOT/downloads/SOURCE/FILE   published files
    ROOT/unpacked/SOURCE/        contents of archives
    ROOT/checksums.json          SHA-256, MD5, size, time and origin of every verified file

A file without a checksum in the recipe is trusted at its first download. checksums.json then pins it, and another
version is an error. The checksums still show what an output was built from after the downloads are deleted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from datamodules.files import RECREATED, read_json, write_json
from datamodules.records import UserError
from experiments.download.fetch import NotOnServer, discard, download, keep, manual_help, unpack
from experiments.download.recipe import FileSpec, SourceSpec
from experiments.shared.progress import Progress

log = logging.getLogger(__name__)

CHUNK = 1 << 22


class Sources:
    """All sources of a recipe.

    root: folder for all data.
    specs: sources by name.
    mirror: URL that has SOURCE/FILE, instead of the URLs of the recipe.
    """

    def __init__(self, root: Path, specs: Mapping[str, SourceSpec], mirror: str = ""):
        self.root, self.specs, self.mirror = root, specs, mirror.rstrip("/")
        self.checksum_file = root / "checksums.json"
        self.known: dict[str, dict[str, Any]] = {}
        if self.checksum_file.exists():
            self.known = read_json(self.checksum_file)
            if not all(isinstance(entry, dict) for entry in self.known.values()):
                raise UserError(f"{self.checksum_file}: expected the checksums of each file. {RECREATED}")

    def folder(self, name: str) -> Path:
        """Return the folder with the contents of a source."""
        return self.root / ("downloads" if self.specs[name].unpack == "no" else "unpacked") / name

    def path(self, name: str, file: str) -> Path:
        """Return the path of a published file."""
        return self.root / "downloads" / name / file

    def checksums(self, name: str) -> dict[str, str | None]:
        """Verify the existing files of a source, and return the SHA-256 of each file, or None if unknown."""
        checksums = {}
        for file, spec in self.specs[name].files.items():
            if self.path(name, file).is_file():
                self._verify(name, file)
            checksums[file] = spec.sha256 or self.known.get(f"{name}/{file}", {}).get("sha256")
        return checksums

    def is_missing(self, name: str) -> bool:
        """Return whether an optional source is missing, because it must be placed by hand or is not on the mirror.

        Downloads the source, because only a download shows what the mirror has.
        """
        files = self.specs[name].files
        if all(self.path(name, file).is_file() or f"{name}/{file}" in self.known for file in files):
            return False
        if not self.mirror:
            return self.url(name, "") is None
        try:
            for file in self.missing_files(name):
                self._download(name, file)
        except NotOnServer:
            return True
        return False

    def missing_files(self, name: str) -> list[str]:
        return [file for file in self.specs[name].files if not self.path(name, file).is_file()]

    def url(self, name: str, file: str) -> str | None:
        """Return the URL of a file, or None if it must be downloaded by hand."""
        if self.mirror:
            return f"{self.mirror}/{name}/{quote(file)}"
        return None if self.specs[name].url is None else f"{self.specs[name].url.rstrip('/')}/{quote(file)}"

    def must_be_placed(self, name: str) -> bool:
        """Return whether the user must still place files of a source by hand."""
        return self.url(name, "") is None and bool(self.missing_files(name)) and not self._is_unpacked(name)

    def instructions(self, name: str) -> str:
        """Return instructions for a source that cannot be downloaded automatically."""
        paths = ", ".join(str(self.path(name, file)) for file in self.missing_files(name))
        page = self.specs[name].page
        return f"{name} cannot be downloaded automatically: get it from {page}, and place it as {paths}"

    def fetch(self, name: str) -> Path:
        """Download, verify and unpack the missing parts of a source, and return its folder. Raises UserError."""
        spec = self.specs[name]
        if self._is_unpacked(name):
            return self.folder(name)
        if self.missing_files(name):
            log.info("%s: %s (%s)", name, spec.page, spec.terms)
        for file in self.missing_files(name):
            self._download(name, file)
        self.checksums(name)  # verifies files that were placed by hand
        if spec.unpack != "no":
            self._unpack(name)
        return self.folder(name)

    def _is_unpacked(self, name: str) -> bool:
        stamp = self.folder(name) / ".unpacked.json"
        return self.specs[name].unpack != "no" and stamp.exists() and read_json(stamp, object) == self._unpacking(name)

    def _download(self, name: str, file: str) -> None:
        url, path, spec = self.url(name, file), self.path(name, file), self.specs[name].files[file]
        if url is None:
            raise UserError(self.instructions(name))
        has_checksum = (spec.sha256 or spec.md5 or self.known.get(f"{name}/{file}")) is not None
        was_resumed = path.with_name(f"{path.name}.part").exists()
        with Progress(f"{name}/{file}") as progress:
            part = download(url, path, spec.bytes, has_checksum, progress.report)
        try:
            self._accept(name, file, part, url)
        except UserError:
            discard(part)
            if not was_resumed:
                raise
            log.warning("%s: the partial download did not match the rest; downloading it from the beginning", path)
            self._download(name, file)
        else:
            keep(part)

    def _verify(self, name: str, file: str) -> None:
        """Verify a file, unless its size and time are unchanged."""
        path, entry = self.path(name, file), self.known.get(f"{name}/{file}")
        stat = path.stat()
        is_unchanged = entry and (entry["bytes"], entry["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns)
        if not is_unchanged or _difference(self.specs[name].files[file], entry):
            self._accept(name, file, path, "placed by hand")

    def _accept(self, name: str, file: str, path: Path, origin: str) -> None:
        """Verify a file, and record its checksum. Raises UserError if it is not the expected file.

        path: the file, which may still be a partial download. origin: its URL, or "placed by hand".
        """
        key, spec = f"{name}/{file}", self.specs[name].files[file]
        log.info("%s: verifying %.0f MB", key, path.stat().st_size / 1e6)
        entry = _measure(path) | {"from": origin}
        advice = _advice(self.path(name, file), origin)
        if difference := _difference(spec, entry):
            raise UserError(f"{path}: the recipe has {difference}. {advice}")
        before = self.known.get(key)
        is_known = before is not None and before["sha256"] == entry["sha256"]
        if spec.sha256 is None and before and not is_known:
            raise UserError(
                f"{path}: the first download had sha256 {before['sha256']}, this one has {entry['sha256']}. To accept "
                f"the new version, remove {key} from {self.checksum_file}. {advice}"
            )
        if spec.sha256 is None and spec.md5 is None and before is None:
            log.warning(
                "%s: the recipe has no checksum, so this first download is trusted, and %s pins its sha256 %s",
                key,
                self.checksum_file,
                entry["sha256"],
            )
        self.known[key] = entry | ({"from": before["from"]} if is_known else {})
        write_json(self.checksum_file, self.known)

    def _unpacking(self, name: str) -> dict[str, Any]:
        """Return everything that determines the contents of an unpacked source."""
        return {"archives": self.checksums(name), "members": self.specs[name].members}

    def _unpack(self, name: str) -> None:
        spec, folder, stamp = self.specs[name], self.folder(name), self._unpacking(name)
        digest = hashlib.sha256(json.dumps(stamp, sort_keys=True).encode()).hexdigest()[:12]
        partial = folder.with_name(f"{name}.{digest}.part")  # the same name after an interruption
        for stale in folder.parent.glob(f"{name}.*.part"):
            if stale != partial:
                shutil.rmtree(stale)
        with Progress(f"unpacking {name}") as progress:
            for file in spec.files:
                try:
                    unpack(self.path(name, file), spec.unpack, spec.members, partial, progress.say)
                except UserError:
                    if spec.files[file].sha256 is None:  # the first download was trusted, but cannot be unpacked
                        self.known.pop(f"{name}/{file}", None)
                        write_json(self.checksum_file, self.known)
                    raise
        write_json(partial / ".unpacked.json", stamp)
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)


def _measure(path: Path) -> dict[str, Any]:
    """Return the checksums, size and time of a file."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
            md5.update(chunk)
    stat = path.stat()
    return {"sha256": sha256.hexdigest(), "md5": md5.hexdigest(), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _difference(spec: FileSpec, entry: Mapping[str, Any]) -> str:
    """Describe how a file differs from the recipe, or return "" if it does not."""
    for key in ("bytes", "md5", "sha256"):
        if getattr(spec, key) not in (None, entry[key]):
            return f"{key} {getattr(spec, key)}, the file has {entry[key]}"
    return ""


def _advice(path: Path, origin: str) -> str:
    if origin == "placed by hand":
        return "Replace it by the right file, or delete it to have it downloaded."
    return f"{origin} may have a new version. {manual_help(path)}"
