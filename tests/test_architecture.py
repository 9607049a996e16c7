"""Imports run one way, and what is optional is imported only where it is used."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("datamodules", "lightning_modules", "experiments", "tests")
MAY_IMPORT = {
    "datamodules": {"datamodules"},
    "lightning_modules": {
        "datamodules.files",
        "datamodules.options",
        "datamodules.records",
        "datamodules.text",
        "lightning_modules",
    },
    "experiments": {"datamodules", "lightning_modules", "experiments"},
}
PURE = (
    "lightning_modules/losses.py",
    "lightning_modules/retrieval/metrics.py",
    "lightning_modules/retrieval/metrics.py",
    "datamodules/text.py",
    "datamodules/schedule.py",
)


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_one_way(package):
    assert sources(package)
    for path in sources(package):
        for name in imports(path):
            if name.split(".")[0] in PACKAGES:
                allowed = MAY_IMPORT[package]
                assert any(name == a or name.startswith(a + ".") for a in allowed), f"{path} imports {name}"


def test_only_experiments_know_omegaconf():
    for package in ("datamodules", "lightning_modules"):
        for path in sources(package):
            assert not {name for name in imports(path) if name.startswith(("omegaconf", "yaml"))}, path


def test_optional_packages_are_imported_where_they_are_used():
    for package in MAY_IMPORT:
        for path in sources(package):
            top = {name.split(".")[0] for name in imports(path, top_level_only=True)}
            assert not top & {"wandb", "faiss", "bm25s", "zstandard", "pyarrow", "datasets", "mteb", "sklearn"}, path


@pytest.mark.parametrize("path", PURE)
def test_pure_modules_import_no_framework(path):
    top = {name.split(".")[0] for name in imports(ROOT / path)}
    assert not top & {"lightning", "omegaconf", "wandb", "transformers"}
