"""The Makefile: unknown targets, and values that reach Python as they were typed and never the shell."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from experiments.__main__ import command_names

ROOT = Path(__file__).parents[2]


def dry(folder, *words: str) -> subprocess.CompletedProcess:
    """Print the commands that would run, in a folder that has only the Makefile."""
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("setup.cfg", "constraints.txt", "pyproject.toml"):
        (folder / name).touch()
    return subprocess.run(["make", "-n", *words], cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "unknown"),
    [
        (["train", "EXP=moe", "optim.lr"], "optim.lr"),
        (["train", "moe"], "moe"),
        (["find", "embeddings=V", "query=reward", "policy"], "policy"),
        (["evall", "model=M"], "evall"),
    ],
)
def test_unknown_target_fails_before_anything_runs(tmp_path, words, unknown):
    done = dry(tmp_path, *words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"unknown target: {unknown}" in done.stderr
    assert "Settings are key=value" in done.stderr


@pytest.mark.slow
def test_several_targets_run_in_order_with_their_settings(tmp_path):
    done = dry(tmp_path, "dry-run", "train", "EXP=vanilla", "optim.lr=1e-3", "query=two words")
    assert done.returncode == 0, done.stderr
    last = [line for line in done.stdout.splitlines() if "-m experiments" in line]
    assert [line.split()[3] for line in last] == ["dry-run", "train"]
    assert all("'EXP=vanilla' 'SCALE=sample'" in line and "'optim.lr=1e-3'" in line for line in last)
    assert all("'query=two words'" in line for line in last)
    assert dry(tmp_path).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(("word", "meant"), [("trian", "train"), ("evall", "eval"), ("comapre", "compare")])
def test_misspelt_target_is_corrected(tmp_path, word, meant):
    assert f"unknown target: {word}; did you mean {meant}?" in dry(tmp_path, word, "EXP=moe").stderr


@pytest.mark.slow
@pytest.mark.parametrize("words", [("train", "help"), ("help", "clean"), ("train", "help", "EXP=moe")])
def test_help_next_to_a_target_runs_nothing(tmp_path, words):
    done = dry(tmp_path, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"make {next(word for word in words if word not in ('help', 'EXP=moe'))} ARGS=--help" in done.stderr


# For each variable of the Makefile, a target that passes it on to Python. FREE is any other key.
USED_BY = {
    **{"EXP": "train", "SCALE": "train", "RECIPE": "data", "SWEEP": "sweep", "PARALLEL": "sweep", "TRIAL": "sweep"},
    **{
        "SWEEP_ID": "agent",
        "COUNT": "agent",
        "BENCH": "bench",
        "STUDY": "study",
        "ARGS": "train",
        "FREE": "train",
        "PARTITION": "slurm",
    },
    **{
        "TESTS": "test",
        "OVERRIDES": "train",
        "ARGUMENTS": "train",
        "VARIABLES": "train",
        "PY": "train",
        "STAMP": "train",
        "TARGETS": "train",
    },
}
NOT_PASSED_ON = {"OVERRIDES", "ARGUMENTS", "VARIABLES", "PY", "STAMP", "TARGETS"}  # the Makefile's own
HOSTILE = (
    *("moe; touch x", "moe && touch x", "moe | touch x", "$(touch x)", "$$(touch x)", "`touch x`", "$(shell touch x)"),
    *("${shell touch x}", "'; touch x; '", '"; touch x; "', "\\'; touch x #", "moe > x", "moe # '", "*", "~", "$HOME"),
    *("a\tb", "{x,y}", "!x", "a=b", "it's", "a,b", "(a)", ";touch\tx"),
)


@pytest.fixture
def project(tmp_path):
    """Make a folder with the Makefile and an interpreter that writes its arguments to the file `calls`."""
    dry(tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\nprintf "%s\\0" "$@" >> calls\n', encoding="utf-8")
    python.chmod(0o755)
    for extras in ("cpu", "cpu,dev"):
        (tmp_path / ".venv" / f".installed-{extras}").touch()
    return tmp_path


def run(project, *words, **environment):
    """Run make, and return its exit status and the arguments that Python got."""
    (project / "calls").unlink(missing_ok=True)
    done = subprocess.run(
        ["make", *words], cwd=project, capture_output=True, text=True, timeout=60, env=os.environ | environment
    )
    calls = project / "calls"
    return done, calls.read_text(encoding="utf-8").split("\0")[:-1] if calls.exists() else []


@pytest.mark.slow
def test_every_target_runs_the_command_of_its_name(project):
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    experiments, others = (re.search(rf"override {name} := (.*)", text)[1] for name in ("OF_EXPERIMENTS", "COMMANDS"))
    experiments, others = experiments.split(), others.split()[1:]
    assert {*experiments, *others, "import"} == set(command_names()) - {"sample"}
    for target in [*experiments, *others]:
        before = {"data": ["RECIPE=scimult"], "bench": ["BENCH=encoder_cost"]}.get(target, [])
        before = ["EXP=moe", "SCALE=sample"] if target in experiments else before
        done, arguments = run(project, target, "output=x y")
        assert arguments == ["-m", "experiments", target, *before, "output=x y"], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["bench", "BENCH=peer_training", "output=X", "ARGS=vanilla"], ["BENCH=peer_training", "vanilla", "output=X"]),
        (["train", "SCALE=", "PARALLEL=2"], ["EXP=moe", "SCALE="]),
        (["sweep", "EXP=", "SWEEP=lr", "TRIAL="], ["EXP=", "SCALE=sample", "SWEEP=lr"]),
        (["data", "RECIPE="], ["RECIPE="]),
    ],
)
def test_positions_and_empty_values_reach_the_command(project, words, expected):
    """The experiment of a bench came after its keys, and was refused. SCALE=$UNSET trained at the scale sample."""
    done, arguments = run(project, *words)
    assert arguments == ["-m", "experiments", words[0], *expected], done.stderr


def test_the_page_on_new_commands_names_lists_of_the_makefile():
    """It named a list that was gone."""
    page = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    names = re.findall(r"`([A-Z_]+)`", page.partition("## A command\n")[2])
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert names
    assert all(f"override {name} :=" in makefile for name in names)


def variables() -> set[str]:
    """Return the variables that the Makefile names as its own."""
    names = re.search(r"OWN := (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"))[1].split()
    return set(names) - {"PYTHON", "VENV", "EXTRAS"}  # these do not reach a command


@pytest.mark.slow
@pytest.mark.parametrize("name", USED_BY)
def test_values_reach_python_as_they_were_typed(project, name):
    assert variables() <= set(USED_BY)
    files = {path.name for path in project.iterdir()}
    for value in HOSTILE:
        for from_environment in (False, True) if name in variables() else (False,):
            words = () if from_environment else (f"{name}={value}",)
            environment = {name: value} if from_environment else {}
            done, arguments = run(project, USED_BY[name], *words, **environment)
            assert done.returncode == 0, (value, done.stderr)
            assert {path.name for path in project.iterdir()} == files | {"calls"}, value
            if name in ("ARGS", "TESTS"):
                assert arguments[-len(value.split()) :] == value.split()
            elif name in NOT_PASSED_ON:
                assert arguments == ["-m", "experiments", "train", "EXP=moe", "SCALE=sample"]
            else:
                assert [text for text in arguments if text.endswith(value)], (value, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*USED_BY, "EXTRAS", "VENV"])
def test_values_with_a_line_break_are_refused(project, name):
    """make runs each line of a recipe in a shell of its own, so a line break would end the quotes."""
    for value in ("moe\ntouch x", "a\ntouch x #", "a\n"):
        done, arguments = run(project, USED_BY.get(name, "train"), f"{name}={value}")
        if name not in NOT_PASSED_ON:  # replaced by the Makefile's own
            assert (done.returncode, arguments) == (2, [])
            assert f"{name}: a value cannot have a line break" in done.stderr
        assert not (project / "x").exists()


@pytest.mark.slow
def test_values_in_file_names_are_restricted(project):
    for name in ("EXTRAS", "VENV"):
        for value in HOSTILE:
            done, _ = run(project, "train", f"{name}={value}")
            if (name, value) != ("EXTRAS", "a,b"):
                assert done.returncode == 2
                assert f"{name}: expected" in done.stderr
            assert not (project / "x").exists()


@pytest.mark.slow
def test_files_to_import_never_reach_the_shell(project):
    (project / ".venv" / ".installed-cpu,import").touch()
    for value in HOSTILE:
        if "=" not in value:
            done, arguments = run(project, "import", value, "output=X")
            expected = (os.path.expanduser(value), ",".join(value.split()))  # several words are several files
            assert (done.returncode, arguments) == (2, []) or arguments[3] in expected
            assert not (project / "x").exists()
    assert run(project, "import", "my.bib", "a/b.csv")[1] == ["-m", "experiments", "import", "my.bib,a/b.csv"]


@pytest.mark.slow
def test_unknown_targets_never_reach_the_shell(project):
    for value in HOSTILE:
        if "=" not in value:
            assert run(project, value)[0].returncode == 2
            assert not (project / "x").exists()
