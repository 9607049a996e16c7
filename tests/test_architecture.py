"""Imports go one way, optional packages are imported where they are used, and names mean one thing."""

import ast
import configparser
import importlib.metadata
import inspect
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGES = ("datamodules", "lightning_modules", "experiments", "tests")
MAY_IMPORT = {
    "datamodules": {"datamodules"},
    "lightning_modules": {
        "datamodules.batches",
        "datamodules.citation_graph",
        "datamodules.co_annotation",
        "datamodules.files",
        "datamodules.options",
        "datamodules.packed",
        "datamodules.progress_lines",
        "datamodules.ragged",
        "datamodules.records",
        "datamodules.relations",
        "datamodules.store",
        "datamodules.tasks",
        "datamodules.text",
        "datamodules.tokens",
        "lightning_modules",
    },
    "experiments": {"datamodules", "lightning_modules", "experiments"},
}
# Folders of experiments/, lowest first. "commands" are the files in experiments/ itself, bench and download.
LAYERS = ("shared", "config", "build", "run", "results", "reporting", "commands")
# Callbacks have the name of what they call during training.
CALLBACKS = {"evaluation.py", "hard_negatives.py"}
# Commands that import Lightning at their start, and those that import torch and transformers.
READ_TRAINING_DATA = {"dry_run", "mine", "train"}
LOAD_MODELS = {"embed", "evaluate", "export", "find", "harness", "index", "merge", "mteb", "report"}
PURE = (
    "lightning_modules/losses.py",
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


def layer(name: str) -> str:
    """Return the layer of a module of experiments."""
    folder = name.split(".")[1]
    return folder if folder in LAYERS else "commands"


def test_folders_of_experiments_import_one_way():
    for path in sources("experiments"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name in imports(path):
            if name.startswith("experiments.") and module != "experiments.__init__":
                assert LAYERS.index(layer(name)) <= LAYERS.index(layer(module)), f"{module} imports {name}"


def test_no_two_modules_have_the_same_name():
    """Commands are exempt: experiments/mine.py runs lightning_modules/mining/mine.py."""
    places = defaultdict(list)
    for package in MAY_IMPORT:
        for path in sources(package):
            is_command = path.parent in (ROOT / "experiments", ROOT / "experiments" / "bench")
            if path.name != "__init__.py" and not is_command and path.name not in CALLBACKS:
                places[path.name].append(str(path.relative_to(ROOT)))
    assert not [paths for paths in places.values() if len(paths) > 1]


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


@pytest.mark.parametrize(
    ("may_import", "packages"),
    [(READ_TRAINING_DATA, {"lightning"}), (READ_TRAINING_DATA | LOAD_MODELS, {"torch", "transformers"})],
)
def test_commands_start_without_packages_that_take_seconds_to_import(may_import, packages):
    names = {path.stem for path in (ROOT / "experiments").glob("*.py")} - {"__init__"}
    assert may_import < names
    code = "".join(f"import experiments.{name}\n" for name in sorted(names - may_import))
    code += f"import sys\nassert not {packages} & set(sys.modules), {packages} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=300)


def test_methods_that_subclasses_implement_are_abstract():
    """A class with abstract methods can be instantiated unless ABC or Protocol is among its bases."""
    abstract = set()
    for path in [path for package in MAY_IMPORT for path in sources(package)]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"raise NotImplementedError\b", text), path
        if "@abstractmethod" in text:
            module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
            classes = [
                each for each in vars(module).values() if inspect.isclass(each) and each.__module__ == module.__name__
            ]
            abstract |= {
                each for each in classes if any(getattr(m, "__isabstractmethod__", 0) for m in vars(each).values())
            }
    assert len(abstract) > 3
    assert not [each for each in abstract if not inspect.isabstract(each)]


def test_imported_packages_are_declared():
    """A package that another one brings along may go with a new version of it."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = config["options"]["install_requires"] + "".join(config["options.extras_require"].values())
    declared = {canonicalize_name(re.split(r"[^\w.-]", line)[0]) for line in lines.split("\n") if line}
    distributions = importlib.metadata.packages_distributions()
    imported = {name.split(".")[0] for package in MAY_IMPORT for path in sources(package) for name in imports(path)} - {
        *sys.stdlib_module_names,
        *PACKAGES,
        "scimult",
    }
    assert "huggingface_hub" in imported
    providers = {name: {canonicalize_name(each) for each in distributions.get(name, [name])} for name in imported}
    assert not sorted(name for name in imported if not providers[name] & declared)


def test_requirements_are_named_once_with_one_bound_each():
    """A package may be in several extras. constraints.txt holds the versions that the tests run with."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    sections = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    bounds = defaultdict(set)
    for section in sections:
        lines = [line for line in section.split("\n") if line and not line.startswith("#")]
        requirements = [Requirement(line) for line in lines]
        names = [canonicalize_name(requirement.name) for requirement in requirements]
        assert len(set(names)) == len(names), f"named twice in: {lines}"
        for name, requirement in zip(names, requirements, strict=True):
            assert any(each.operator == ">=" for each in requirement.specifier), f"{requirement}: no lower bound"
            bounds[name].add(requirement.specifier)
    assert not {name: different for name, different in bounds.items() if len(different) > 1}
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    tested = [pin.split("==") for pin in pins if "==" in pin]
    assert len(bounds.keys() & {canonicalize_name(name) for name, _ in tested}) > 30
    for name, version in tested:
        for bound in bounds.get(canonicalize_name(name), ()):
            assert version in bound, f"{name}: constraints.txt has {version}, and setup.cfg asks for {bound}"
