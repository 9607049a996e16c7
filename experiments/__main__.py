"""The command scimult: each of its subcommands runs a module of experiments, as `python -m` would.

A command is only imported when it runs: many take seconds to import, and training must catch signals before that.
"""

from __future__ import annotations

import ast
import difflib
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.shared.plain import say

FOLDER = Path(__file__).parent
# Commands whose names differ from their modules'.
MODULES = {"dry-run": "dry_run", "eval": "evaluate", "import": "import_papers"}
INTERNAL = {"reference"}  # commands that only work inside the source tree
POSITIONAL = ("EXP", "RECIPE", "BENCH")  # variables of make whose value is the first argument
KEYS = ("SCALE", "PARALLEL", "TRIAL", "STUDY", "SWEEP", "SWEEP_ID", "COUNT")  # variables of make that are keys
HELP = """usage: scimult COMMAND [key=value ...]

{commands}

  scimult COMMAND --help    all options of a command; for an experiment, also all of its keys
  scimult train moe --cfg   print the resolved configuration, and stop
  -v, -q                    show more or fewer messages
  --version                 print the version
  --completion              print a script that completes commands and keys in bash or zsh:
                            scimult --completion > ~/.scimult-completion, then source this file in ~/.bashrc

`make NAME key=value` in a message is `scimult NAME key=value`; EXP=, SCALE= and the like work here, too."""


def main() -> None:
    """Run a command. Exits with status 2 for an unknown command."""
    name, arguments = (sys.argv[1] if sys.argv[1:] else "--help"), sys.argv[2:]
    if name in ("--help", "-h", "help"):
        width = max(map(len, commands()))
        say(HELP.format(commands="\n".join(f"  {key:{width}}  {text}" for key, text in commands().items())))
    elif name == "--version":
        import scimult

        say(f"scimult {scimult.__version__}")
    elif name == "--completion":
        from experiments.reference import completion

        say(completion())
    elif name not in command_names():
        close = difflib.get_close_matches(name, command_names(), 1)
        hint = f"; did you mean {close[0]}?" if close else f"; expected one of {', '.join(command_names())}"
        say(f"error: unknown command {name!r}{hint}", sys.stderr)
        sys.exit(2)
    else:
        run(name, arguments)


def run(name: str, arguments: Sequence[str]) -> None:
    """Run a command in this process, as `python -m` would. Arguments may have make's form."""
    module = f"experiments.{MODULES.get(name, name)}"
    arguments = from_make(name, arguments)
    if name == "bench":
        if not arguments or arguments[0] not in benches():
            wants_help = arguments[:1] in (["--help"], ["-h"])
            text = f"expected one of {', '.join(benches())} as first argument (scimult bench encoder_cost)"
            say(text if wants_help else f"error: bench: {text}", sys.stdout if wants_help else sys.stderr)
            sys.exit(0 if wants_help else 2)
        module = f"{module}.{arguments.pop(0)}"
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def from_make(name: str, arguments: Sequence[str]) -> list[str]:
    """Turn variables of make, such as EXP=moe, into the first argument or keys, except keys of slurm's own."""
    first, rest = [], []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in POSITIONAL:
            first.append(value)
        elif equals and key in KEYS and (name != "slurm" or key == "SCALE"):
            rest.append(f"{key.lower()}={value}")
        else:
            rest.append(argument)
    return first + rest


def command_names() -> list[str]:
    """Return the names of all commands."""
    modules = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "__main__", *INTERNAL}
    return sorted(["bench", *MODULES, *(modules - set(MODULES.values()))])


def commands() -> dict[str, str]:
    """Return command -> what it does, in one line."""
    paths = {name: FOLDER / f"{MODULES.get(name, name)}.py" for name in command_names()}
    return {
        name: "Measure speed: scimult bench NAME" if name == "bench" else _summary(path) for name, path in paths.items()
    }


def benches() -> list[str]:
    """Return the programs of `scimult bench`. The other modules in the folder are their helpers."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in (FOLDER / "bench").glob("*.py")}
    return sorted(name for name, text in texts.items() if "entry_point(main)" in text)


def _summary(path: Path) -> str:
    """Return the first sentence of the docstring of a command's options, or of its module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Options")]
    text = ast.get_docstring(classes[-1] if classes else tree) or ""
    return re.split(r"(?<=\.)\s|\n\n|: python", " ".join(text.partition("\n\n")[0].split()), maxsplit=1)[0].rstrip(".")


if __name__ == "__main__":
    main()
