"""import scimult, in the tree and from a wheel that is installed elsewhere."""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import datamodules
import lightning_modules
import scimult
from experiments.__main__ import commands
from tests.experiments.test_train import TINY

ROOT = Path(__file__).parents[1]
PACKAGES = ("datamodules", "lightning_modules", "experiments")


@pytest.mark.parametrize("package", [datamodules, lightning_modules])
def test_every_public_name_can_be_imported(package):
    source = Path(package.__file__).read_text()
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
        assert getattr(scimult, name) is getattr(package, name)
        assert f"import {name} as {name}\n" in source  # so that type checkers know it
    assert set(scimult.__all__) == {*datamodules.__all__, *lightning_modules.__all__}


@pytest.mark.parametrize("module", [datamodules, lightning_modules, scimult])
def test_public_names_are_listed_and_others_are_errors(module):
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match="has no attribute 'load_encodr'"):
        module.load_encodr  # noqa: B018


@pytest.mark.slow
def test_packages_import_neither_torch_nor_lightning_until_they_are_used():
    code = "import sys, scimult; from datamodules import Document, UserError; "
    code += "print({'torch', 'lightning'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build a wheel from a copy of the tree, so that nothing is left in it."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "tree").mkdir()
    for name in (*PACKAGES, "scimult-stubs"):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("scimult.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder / "tree"]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def scimult_in(wheel, tmp_path_factory):
    """Install the wheel into a folder. Return a function that runs the command scimult in another, empty one."""
    target = tmp_path_factory.mktemp("target")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel]
    subprocess.run(command, check=True, capture_output=True)
    environment = os.environ | {"PYTHONPATH": str(target)}

    def run(folder, *arguments, program=None):
        command = [sys.executable, program or target / "bin" / "scimult", *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)

    return run


@pytest.mark.slow
def test_wheel_contains_every_file_of_the_packages(wheel):
    files = {
        str(path.relative_to(ROOT))
        for package in (*PACKAGES, "scimult-stubs")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    assert files | {"scimult.py"} == {name for name in names if ".dist-info/" not in name}
    metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert f"\nVersion: {scimult.__version__}\n" in text
    assert re.search(r"^Requires-Dist: lightning<2.7,>=2.6.6$", text, re.MULTILINE)


@pytest.mark.slow
def test_scripts_that_use_the_wheel_are_type_checked(wheel, tmp_path):
    """Other packages are not installed next to it, so their types are Any, which makes mypy fast."""
    venv.create(tmp_path / "venv")
    (site_packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site_packages)
    script = tmp_path / "script.py"
    script.write_text("""
import scimult
encoder = scimult.load_encoder("runs/RUN")
reveal_type(encoder)
reveal_type(encoder.encode(["a paper"], tasks=["search"]))
def measure(data: scimult.MultiTaskDataModule) -> None:
    reveal_type(scimult.evaluate(encoder, data.benchmarks("test")[0]))
    reveal_type(scimult.mine(encoder, data.pools()[0]))
    encoder.encode(["a paper"])
    scimult.load_encodr()
""")
    python = tmp_path / "venv" / "bin" / "python"
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file=",
        "--ignore-missing-imports",
        "--python-executable",
        python,
    ]
    done = subprocess.run([*command, script], cwd=tmp_path, capture_output=True, text=True)
    types = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert [name.split(".")[-1] for name in types] == ["Encoder", "dict[str, Any]", "BenchmarkResult", "Mined"]
    errors = re.findall(r"script.py:(\d+): error: (.*)", done.stdout)
    assert [line for line, _ in errors] == ["9", "10"], done.stdout
    assert "encode" in errors[0][1], errors
    assert "load_encodr" in errors[1][1], errors


@pytest.mark.slow
def test_training_in_an_empty_folder(scimult_in, tmp_path):
    tiny = [*TINY, "trainer.max_steps=2", "evaluation.baselines=false"]
    done = scimult_in(tmp_path, "train", "moe", *tiny, "data.cache=null")
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "runs").glob("moe-sample-*")
    assert "ndcg@10" in done.stdout
    script = tmp_path / "script.py"
    script.write_text(
        "import scimult\nencoder = scimult.load_encoder(__import__('sys').argv[1])\n"
        "print(scimult.__file__, tuple(encoder.encode(['a paper'], 'search').shape))\n"
    )
    done = scimult_in(tmp_path, str(run), program=script)
    assert re.search(r"\(1, \d+\)$", done.stdout.strip()), done.stderr
    assert str(ROOT) not in done.stdout
    (tmp_path / "sweep").mkdir()
    done = scimult_in(tmp_path / "sweep", "sweep", "moe", "sweep=seeds", "run_cap=1", *tiny)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in (tmp_path / "sweep").iterdir()} <= {"runs", "sweeps"}


@pytest.mark.slow
def test_help_of_every_command(scimult_in, tmp_path):
    """All in one process, because most commands take seconds to import."""
    script = tmp_path / "script.py"
    script.write_text("""
import sys
from experiments.__main__ import commands, main
for name in commands():
    sys.argv = ["scimult", name, "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (name, end.code)
    print("shown", name)
""")
    done = scimult_in(tmp_path, program=script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("usage: ") == len(commands()) - 2  # bench and doctor have no options
    for name in commands():
        assert f"shown {name}\n" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]
    assert "usage: scimult audit EXPERIMENT" in scimult_in(tmp_path, "audit", "--help").stdout
