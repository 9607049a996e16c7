"""Additions of the site to the pages of this folder, for mkdocs and its API reference (see mkdocs.yml)."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import datamodules
import lightning_modules

ROOT = Path(__file__).parent.parent
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
API = {"Data": datamodules, "Encoders, training and evaluation": lightning_modules}
PARAMETERS = re.compile(r"(?:^|(?<=\n\n))\w+(?:, \w+)*: .*(?:\n(?!\n).*)*")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/: those of the root, the API reference, and notebooks."""
    pages = {page: (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](") for page, name in PAGES.items()}
    pages = {page: text.replace("](CONTRIBUTING.md", "](contributing.md") for page, text in pages.items()}
    pages["api.md"] = api()
    for notebook in (file for file in list(files) if file.src_uri.endswith(".ipynb")):
        pages[notebook.src_uri.replace(".ipynb", ".md")] = markdown_of(json.loads(notebook.content_string))
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links to notebooks to their pages. Replace links to source files, which the site lacks, by their text."""
    return re.sub(r"\[([^]]+)\]\(\.\./[^)]*\)", r"\1", markdown).replace(".ipynb)", ".md)")


def api() -> str:
    """Return the page with all names of `scimult`, which mkdocstrings replaces by their documentation."""
    lines = [
        "# Python API",
        "",
        "All of these are names of `scimult`. [Use it as a library](library.md) shows how they work together.",
    ]
    for title, package in API.items():
        lines += ["", f"## {title}"]
        for name in sorted(package.__all__):
            lines += ["", f"::: {package.__name__}.{name}"]
    return "\n".join(lines)


def markdown_of(notebook: dict[str, Any]) -> str:
    """Return the cells of a notebook as a page."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    return "\n\n".join(f"```python\n{text}\n```" if kind == "code" else text for kind, text in cells)


class Docstrings(griffe.Extension):
    """Our docstrings in Markdown: parameters, and fields made by `option`, are lists."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = PARAMETERS.sub(listed, obj.docstring.value)

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        lines = []
        for attribute in cls.attributes.values():
            if isinstance(attribute.value, griffe.ExprCall) and str(attribute.value.function) == "option":
                attribute.value, help_text, *_ = attribute.value.arguments
                lines.append(f"- `{attribute.name}`: {ast.literal_eval(str(help_text))}")
        if lines:
            cls.docstring.value += "\n\n" + "\n".join(lines)


def listed(paragraph: re.Match[str]) -> str:
    """Return a paragraph of lines `name: description` as a list."""
    return re.sub(r"^(\w+(?:, \w+)*): ", r"- `\1`: ", paragraph[0], flags=re.MULTILINE)
