"""Console output of all commands: log lines, tables, and errors without a traceback."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from datamodules.records import UserError
from experiments.shared.plain import PlainFormatter, plain, say
from lightning_modules.distributed import launch

# Messages of safetensors and other Rust libraries, and of numpy. Their errors have no error number.
FULL_DISK = re.compile(
    r"No space left|Disk quota exceeded|File too large|os error (27|28|122)|\d+ requested and \d+ written"
)
UNCUT = 10_000  # width of tables in files and pipes, where nothing must be cut
LEVELS = {"-q": logging.WARNING, "--quiet": logging.WARNING, "-v": logging.DEBUG, "--verbose": logging.DEBUG}


def quiet_libraries() -> None:
    """Silence library messages that users cannot act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it would warn whenever a data worker is forked
    for name in ("lightning.pytorch", "lightning.fabric", "bm25s", "faiss.loader", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It logs which rank failed before it stops the others.
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    for name in ("huggingface_hub", "datasets"):  # they also print their messages by themselves
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
        r".*in eval mode at the start of training.*",  # ContrastiveModule sets train mode
    ):
        warnings.filterwarnings("ignore", message)


def entry_point(main: Callable[[Sequence[str]], None]) -> None:
    """Run a command with the arguments of the command line. On an error that the user can fix, exit with status 2."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # only a UTF-8 terminal has all characters
        arguments, level = _verbosity(sys.argv[1:])
        logging.basicConfig(level=level if launch.rank() == 0 else logging.ERROR, stream=sys.stdout, force=True)
        logging.getLogger().handlers[0].setFormatter(PlainFormatter())
        logging.captureWarnings(True)
        if level > logging.DEBUG:
            quiet_libraries()
        main(arguments)
    except UserError as error:
        say(f"error: {error}", sys.stderr, line_break="\n  ")
        sys.exit(2)
    except BrokenPipeError:  # the reader of the pipe, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it exits
        sys.exit(141)  # as after SIGPIPE
    except Exception as error:
        if problem := full_disk(error):
            say(f"error: {problem}. Free some space and run the same command again.", sys.stderr)
        elif isinstance(error, OSError) and error.filename and logging.getLogger().level > logging.DEBUG:
            say(f"error: {error.filename}: {error.strerror} (-v shows where)", sys.stderr)
        else:
            raise
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        say(str(interrupt) or "interrupted", sys.stderr)
        sys.exit(130)


def _verbosity(arguments: Sequence[str]) -> tuple[list[str], int]:
    """Return the arguments without -v and -q, and the level of messages to show."""
    chosen = [LEVELS[argument] for argument in arguments if argument in LEVELS]
    return [argument for argument in arguments if argument not in LEVELS], [logging.INFO, *chosen][-1]


def verbosity() -> list[str]:
    """Return -q or -v if a child command needs it to log at this command's level."""
    return [flag for flag, level in LEVELS.items() if level == logging.getLogger().level][:1]


def log_to_stderr() -> None:
    """Send this command's log lines to stderr, so that stdout only has the result."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setStream(sys.stderr)


def full_disk(error: BaseException | None) -> str | None:
    """Return the message of an error caused by a full disk, else None. Libraries wrap it in errors of their own."""
    while error is not None:
        is_system = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if is_system or FULL_DISK.search(str(error)):
            return str(error).strip().splitlines()[0]
        error = error.__cause__ or error.__context__
    return None


class PlainConsole(Console):
    """A console that prints strings literally: no markup, no emoji codes, and nothing that controls the terminal.

    For a style of our own, pass Text(plain(...), style).
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Format a cell, a title or a line. Rich calls this for every string."""
        return super().render_str(plain(text), **(options | {"emoji": False, "markup": False, "highlight": False}))


def table_console() -> PlainConsole:
    """Return a console for tables: as wide as the terminal, or unlimited in a file or pipe."""
    console = PlainConsole()
    return console if console.is_terminal else PlainConsole(width=UNCUT)


def relative_path(path: Path | str) -> Path:
    """Return a path relative to the working directory if it is inside it, else unchanged."""
    path = Path(path)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
