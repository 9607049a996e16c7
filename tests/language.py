"""Find words of stilted English in docstrings, comments, messages, test names and documentation.

    python -m tests.language [-v] [FOLDER or FILE ...]

Prints the number of findings per folder; with -v each of them with file, line and a suggestion.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
RULES = {
    r"\b(is|are|was|were|be) told(?= of\b| by\b| in\b|[.,;:)]|$)": "shows, reports",
    r"\btold (of|by)\b|\btells? (of|whether|where|when)\b": "shows, reports",
    r"\b(stands?|stood) (in|beside|there|behind|on|for it)\b": "is in, is next to, is stored in",
    r"\b(lies|lay) (in|beside|there|below|at)\b|\bwhere [\w ]*\b(lies|lie)\b": "is in, is stored in",
    r"\b(go|goes|went|gone) on\b": "resumes, continues",
    r"(?<![Tt]here )\b(is|are|was|were) no (?!longer\b|more\b|less\b|need\b|way\b|secret\b|\w+er than\b)": "not a",
    r"\b(allowed|supported|known) (are|is)\b": "expected one of, must be one of",
    r"\banew\b": "again",
    r"\bbeside\b": "next to, in addition to, in parallel",
    r"\bso many\b(?! that\b)": "that many",
    r"\bwhat is left\b": "the rest",
    r"\bmend(ed|s|ing)?\b": "fix",
    r"\b(who|whoever) (looks|calls|asks|judges|names|wants|writes|takes)\b": "the user",
    r"\bwhat (judges|looks|stands|lies)\b": "name it",
    r"\bOf (what|whose|whom)\b|\bof (whose|whom)\b|\b(to|for) who\b": "say it with a noun",
    r"(?<!so )\bthat there (is|are)\b|\bthere is there\b|\bis there already\b": "exists, already exists",
    r"\b(such a|such) ones?\b|\bnone is\b": "say what there is not",
    r"\b(rows that look|columns that are found)\b": "queries, candidates",
    r"\bsees? to it\b|\bholds? on to\b|\bcan be had\b": "ensures, keeps, is available",
    r"\b(whence|whereof|thereof|wherein|therein|whereupon)\b": "plain words",
    r"\bit is of\b|\bthey are of\b": "belongs to, comes from",
    r"\bWhat (somebody|someone|one|a user|is|has|of|was|are)\b(?![^?]*\?)": "start with a verb or a noun",
}
PATTERNS = [(re.compile(pattern), suggestion) for pattern, suggestion in RULES.items()]


@dataclass(frozen=True)
class Finding:
    path: Path
    line: int
    words: str
    suggestion: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.words!r} ({self.suggestion})"


def findings(path: Path) -> Iterator[Finding]:
    """Yield the findings of a file. path: relative to the project."""
    content = (ROOT / path).read_text(encoding="utf-8")
    texts = _python_texts(path, content) if path.suffix == ".py" else _other_texts(path, content)
    for line, text in texts:
        for pattern, suggestion in PATTERNS:
            for match in pattern.finditer(text):
                before, after = text[: match.start()].split(" ")[-4:], text[match.end() :].split(" ")[:4]
                words = f"{' '.join(before)}{match[0]}{' '.join(after)}"
                yield Finding(path, line + text[: match.start()].count("\n"), " ".join(words.split()), suggestion)


def _python_texts(path: Path, content: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of comments, docstrings, test names and, outside of tests, all strings."""
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    is_test = path.parts[0] == "tests"
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            name = getattr(node, "name", "")
            if is_test and name.startswith("test_"):
                yield node.lineno, name.replace("_", " ")
            if is_test and ast.get_docstring(node):
                yield node.body[0].lineno, node.body[0].value.value
        elif not is_test and isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


def _other_texts(path: Path, content: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of documentation, or of the comments of a YAML file, Makefile or configuration."""
    for number, line in enumerate(content.splitlines(), 1):
        if path.suffix == ".md":
            yield number, line
        elif "#" in line:
            yield number, line[line.index("#") :]


def files(folders: list[str]) -> list[Path]:
    """Return the project's files with text that people read, in some folders or in all."""
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = map(Path, listed.splitlines())
    return [
        path
        for path in paths
        if (path.suffix in (".py", ".md", ".yaml", ".cfg", ".toml") or path.name == "Makefile")
        and path != Path("tests/language.py")
        and (ROOT / path).is_file()
    ]


def main(arguments: list[str]) -> int:
    verbose, folders = "-v" in arguments, [argument for argument in arguments if argument != "-v"]
    counts: Counter[str] = Counter()
    for path in files(folders):
        for finding in findings(path):
            counts[str(path.parent)] += 1
            if verbose:
                print(finding)
    for folder, count in sorted(counts.items()):
        print(f"{count:5} {folder}")
    print(f"{sum(counts.values()):5} in total")
    return 1 if counts else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
