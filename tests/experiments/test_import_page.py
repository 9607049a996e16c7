"""The commands on docs/import.md run as they are, from a library to a trained and measured encoder."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from datamodules.records import Reader
from experiments.config.targets import READERS, check_target, instantiate
from tests.datamodules.papers.worlds import WORLDS, papers
from tests.forked import run

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "import.md"


def command_of(line: str, folder: Path) -> list[str]:
    """Return the command that make would run for a line of the page, with this interpreter."""
    words = shlex.split(line, comments=True)
    shown = subprocess.run([words[0], "-n", *words[1:]], cwd=folder, capture_output=True, text=True, check=True).stdout
    command = next(shlex.split(each) for each in shown.splitlines() if "-m experiments " in each)
    return [sys.executable, *command[1:]]


@pytest.mark.slow
def test_commands_of_the_page_run(tmp_path):
    for name in ("Makefile", "setup.cfg", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    next(world for world in WORLDS if world.file == "library.bib").write(tmp_path / "library.bib", papers())
    text = PAGE.read_text(encoding="utf-8").partition("\n## Files")[0]
    lines = re.findall(r"^    (make .*)$", text, re.MULTILINE)
    assert [line.split()[1] for line in lines] == ["import", "train", "eval", "embed", "find"]
    outputs = []
    for line in lines:
        line = line.replace("trainer.max_steps=150", "trainer.max_steps=5")
        environment = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
        done = run(command_of(line, tmp_path), cwd=tmp_path, env=environment)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        outputs.append(done.stdout)
    assert "299 papers from 300 records" in outputs[0]
    assert "Next: make train EXP=moe 'tasks=[classification,search]'" in outputs[0]
    assert "mylib_classification" in outputs[1]
    assert (tmp_path / "runs" / "mylib" / "results.json").exists()
    assert "bm25" in outputs[2]
    assert re.search(r"Títle [0-9]+ on", outputs[4])


def test_nodes_of_the_page_are_readers():
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    nodes = [node for block in blocks for node in yaml.safe_load(block).values()]
    assert nodes
    for node in nodes:
        assert isinstance(instantiate(check_target("data.x", node, base=Reader, package=READERS), "data.x"), Reader)
