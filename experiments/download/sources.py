"""The files of a recipe's sources on disk: downloaded or placed by hand, verified, unpacked.

    ROOT/downloads/SOURCE/FILE     as published
    ROOT/unpacked/SOURCE/          what an archive holds
    ROOT/checksums.json            of every file that was verified: SHA-256, size, time, where it came from

A file of which the recipe knows no checksum is taken as it first comes, and checksums.json holds on to it: another one
later is an error. It also says what a folder was built from when the downloads are gone.
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

from datamodules.files import read_json, write_json
from datamodules.records import UserError
from experiments.download.downloads import NotThere, by_hand, discard, download, keep
from experiments.download.recipe import FileSpec, SourceSpec
from experiments.download.unpacking import unpack
from experiments.shared.progress import Progress

log = logging.getLogger(__name__)

CHUNK = 1 << 22


class Sources:
    """mirror: a url under which SOURCE/FILE are found, instead of what the recipe says."""

    def __init__(self, root: Path, specs: Mapping[str, SourceSpec], mirror: str = ""):
        self.root, self.specs, self.mirror = root, specs, mirror.rstrip("/")
        self.ledger = root / "checksums.json"
        self.known: dict[str, dict[str, Any]] = read_json(self.ledger) if self.ledger.exists() else {}

    def folder(self, name: str) -> Path:
        return self.root / ("downloads" if self.specs[name].unpack == "no" else "unpacked") / name

    def path(self, name: str, file: str) -> Path:
        return self.root / "downloads" / name / file

    def checksums(self, name: str) -> dict[str, str | None]:
        """File -> its SHA-256, as far as it is known; what is there is verified."""
        found = {}
        for file, spec in self.specs[name].files.items():
            if self.path(name, file).is_file():
                self._verify(name, file)
            found[file] = spec.sha256 or self.known.get(f"{name}/{file}", {}).get("sha256")
        return found

    def at_hand(self, name: str) -> bool:
        """Whether all of its files are there, or were."""
        return all(self.path(name, file).is_file() or f"{name}/{file}" in self.known for file in self.specs[name].files)

    def lacks(self, name: str) -> bool:
        """Whether a source that may lack does: it can only be placed by hand, or is not on the mirror."""
        if self.at_hand(name) or (self.url(name, "") and not self.mirror):
            return False
        try:
            for file in self.missing(name) if self.mirror else ():
                self._download(name, file)
        except NotThere:
            return True
        return not self.mirror

    def missing(self, name: str) -> list[str]:
        return [file for file in self.specs[name].files if not self.path(name, file).is_file()]

    def url(self, name: str, file: str) -> str | None:
        """Where a file can be had; None if by hand alone."""
        if self.mirror:
            return f"{self.mirror}/{name}/{quote(file)}"
        return None if self.specs[name].url is None else f"{self.specs[name].url.rstrip('/')}/{quote(file)}"

    def only_by_hand(self, name: str) -> bool:
        """Whether it has to be placed by hand, and is not."""
        return self.url(name, "") is None and bool(self.missing(name)) and not self._is_unpacked(name)

    def instructions(self, name: str) -> str:
        """What to do for a source that cannot be downloaded."""
        places = ", ".join(str(self.path(name, file)) for file in self.missing(name))
        return f"{name} has no address for programs: fetch it from {self.specs[name].page}, and place it as {places}"

    def fetch(self, name: str) -> Path:
        """The source's folder, with everything in it. Raises UserError."""
        spec = self.specs[name]
        if self._is_unpacked(name):
            return self.folder(name)
        if self.missing(name):
            log.info("%s: %s (%s)", name, spec.page, spec.terms)
        for file in self.missing(name):
            self._download(name, file)
        self.checksums(name)  # verifies what was placed by hand
        if spec.unpack != "no":
            self._unpack(name)
        return self.folder(name)

    def _is_unpacked(self, name: str) -> bool:
        stamp = self.folder(name) / ".unpacked.json"
        return self.specs[name].unpack != "no" and stamp.exists() and read_json(stamp) == self._unpacking(name)

    def _download(self, name: str, file: str) -> None:
        url, path, spec = self.url(name, file), self.path(name, file), self.specs[name].files[file]
        if url is None:
            raise UserError(self.instructions(name))
        verified = (spec.sha256 or spec.md5 or self.known.get(f"{name}/{file}")) is not None
        went_on = path.with_name(f"{path.name}.part").exists()
        with Progress(f"{name}/{file}") as progress:
            part = download(url, path, spec.bytes, verified, progress.report)
        try:
            self._accept(name, file, part, url)
        except UserError:
            discard(part)
            if not went_on:
                raise
            log.warning("%s: what was downloaded before did not fit the rest; from the beginning", path)
            return self._download(name, file)
        keep(part)

    def _verify(self, name: str, file: str) -> None:
        """Of a file in its place: again only if its size or time is another than before."""
        path, entry = self.path(name, file), self.known.get(f"{name}/{file}")
        stat = path.stat()
        seen = entry and (entry["bytes"], entry["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns)
        if not seen or self._wrong(self.specs[name].files[file], entry):
            self._accept(name, file, path, "placed by hand")

    def _accept(self, name: str, file: str, path: Path, origin: str) -> None:
        """Verify, and write down. Raises UserError if it is not the file that is expected."""
        key, spec = f"{name}/{file}", self.specs[name].files[file]
        log.info("%s: %.0f MB, verifying", key, path.stat().st_size / 1e6)
        entry = _measured(path) | {"from": origin}
        if wrong := self._wrong(spec, entry):
            raise UserError(f"{path}: {wrong}, as the recipe says. {_cure(self.path(name, file), origin)}")
        before = self.known.get(key)
        if spec.sha256 is None and before and before["sha256"] != entry["sha256"]:
            raise UserError(
                f"{path}: expected sha256 {before['sha256']}, as it first was, got {entry['sha256']}. If this one is "
                f"meant, remove {key} from {self.ledger}. {_cure(self.path(name, file), origin)}"
            )
        if spec.sha256 is None and spec.md5 is None and before is None:
            log.warning(
                "%s: the recipe knows no checksum of it. Trusted as it is, sha256 %s, and from now on no other (%s)",
                key,
                entry["sha256"],
                self.ledger,
            )
        same = before is not None and before["sha256"] == entry["sha256"]
        self.known[key] = entry | ({"from": before["from"]} if same else {})
        write_json(self.ledger, self.known)

    def _distrust(self, name: str, file: str) -> None:
        """Do not hold on to a file that was trusted as it came, and is of no use."""
        if self.specs[name].files[file].sha256 is None:
            self.known.pop(f"{name}/{file}", None)
            write_json(self.ledger, self.known)

    @staticmethod
    def _wrong(spec: FileSpec, entry: Mapping[str, Any]) -> str:
        """What differs from the recipe; empty if nothing does."""
        for kind in ("bytes", "md5", "sha256"):
            if getattr(spec, kind) not in (None, entry[kind]):
                return f"expected {kind} {getattr(spec, kind)}, got {entry[kind]}"
        return ""

    def _unpacking(self, name: str) -> dict[str, Any]:
        return {"archives": self.checksums(name), "members": self.specs[name].members}

    def _unpack(self, name: str) -> None:
        spec, folder, plan = self.specs[name], self.folder(name), self._unpacking(name)
        digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:12]
        partial = folder.with_name(f"{name}.{digest}.part")
        for stale in folder.parent.glob(f"{name}.*.part"):
            if stale != partial:
                shutil.rmtree(stale)
        with Progress(f"unpacking {name}") as progress:
            for file in spec.files:
                try:
                    unpack(self.path(name, file), spec.unpack, spec.members, partial, progress.say)
                except UserError:
                    self._distrust(name, file)
                    raise
        write_json(partial / ".unpacked.json", plan)
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)


def _measured(path: Path) -> dict[str, Any]:
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
            md5.update(chunk)
    stat = path.stat()
    return {"sha256": sha256.hexdigest(), "md5": md5.hexdigest(), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _cure(path: Path, origin: str) -> str:
    if origin == "placed by hand":
        return "Place the right file, or remove it to have it downloaded."
    return f"{origin} has other bytes now: see whether there is a new edition. {by_hand(path)}"
