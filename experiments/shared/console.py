"""What entry points share: arguments, log lines, and errors in the user's words."""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from datamodules.records import UserError
from experiments.config.suggest import did_you_mean
from lightning_modules.distributed import launch

UNCUT = 10_000  # columns of a table that no terminal shows


def quiet_libraries() -> None:
    """Silence what libraries print and a user cannot act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its warning at every fork of a data worker
    for name in ("lightning.pytorch", "lightning.fabric", "bm25s", "faiss.loader", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Tells which rank has ended before it ends the others.
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    for name in ("huggingface_hub", "datasets"):  # they write their lines themselves too
        logging.getLogger(name).propagate = False
    for message in (
        r".*does not have many workers.*",
        r".*srun.*",
        r".*LeafSpec.*",
        r".*`isinstance\(treespec.*",
        r".*tensorboardX.*",
        r".*find_unused_parameters=True was specified.*",
        r".*smaller than the logging interval.*",
        r".*all_gather_into_tensor` is deprecated.*",
        r".*distributed\.nn\.functional\.all_gather is deprecated.*",
        r".*in eval mode at the start of training.*",  # ContrastiveModule sees to it
    ):
        warnings.filterwarnings("ignore", message)


def entry_point(main: Callable[[Sequence[str]], None]) -> None:
    """Run an entry point with the command line's arguments. Errors that the user can mend end it with status 2."""
    try:
        level = logging.INFO if launch.rank() == 0 else logging.ERROR
        logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout, force=True)
        logging.captureWarnings(True)
        quiet_libraries()
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"error: {error}. Make room, and run the same command again.", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted", file=sys.stderr)
        sys.exit(130)


def token_budget(values: Mapping[str, str]) -> int | None:
    """The value of token_budget; None where it is left to the device."""
    return whole_number("token_budget", values["token_budget"]) if values["token_budget"] else None


def table_console() -> Console:
    """Where tables go: as wide as the terminal, and in a file or pipe so wide that nothing is cut."""
    console = Console()
    return console if console.is_terminal else Console(width=UNCUT)


def counted(count: int, word: str) -> str:
    """A number with its noun: 1 run, 1,200 runs."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def key_values(arguments: Sequence[str], defaults: dict[str, str]) -> dict[str, str]:
    """Arguments key=value over defaults; a key without default is an error."""
    values = dict(defaults)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"the command line: expected key=value, got {argument!r}")
        if key not in defaults:
            hint = did_you_mean(key, defaults)
            raise UserError(f"the command line: unknown key {key!r}; {hint}allowed are {', '.join(defaults)}")
        values[key] = value
    return values


def near(path: Path | str) -> Path:
    """A path as one would type it here: from the working directory on, where it is below that."""
    path = Path(path)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def choice(key: str, value: str, allowed: Sequence[str]) -> str:
    """The value of a key that must be one of some words."""
    if value not in allowed:
        raise UserError(f"{key}: got {value!r}, allowed are {', '.join(allowed)}")
    return value


def whole_number(key: str, value: str, least: int = 1) -> int:
    """The value of a key that must be a whole number from least on."""
    if not value.isdecimal() or int(value) < least:
        raise UserError(f"{key}: got {value!r}, allowed are whole numbers from {least}")
    return int(value)
