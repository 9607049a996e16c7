"""The command scimult: its commands, its help, and what it does with arguments."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import scimult
from experiments import __main__ as command_line
from experiments.config.experiment import as_dict, experiments, load_config
from experiments.mine import main as mine
from experiments.reference import completion
from experiments.train import main as train

ROOT = Path(__file__).parents[2]
TARGETS = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
OF_THE_TREE = {"check", "clean", "docs", "help", "install", "test", "test-fast"}  # targets without a command


def called(monkeypatch, *arguments):
    """Return the module that the command line would run, with its arguments."""
    runs = []
    monkeypatch.setattr(sys, "argv", ["scimult", *arguments])
    monkeypatch.setattr(command_line.runpy, "run_module", lambda name, **_: runs.append([name, *sys.argv[1:]]))
    command_line.main()
    return runs[0]


def test_every_make_target_is_a_command_with_a_line_of_help(monkeypatch, capsys):
    assert set(command_line.commands()) >= TARGETS - OF_THE_TREE
    monkeypatch.setattr(sys, "argv", ["scimult"])
    command_line.main()
    shown = capsys.readouterr().out
    for name, text in command_line.commands().items():
        assert re.search(rf"^  {name} +{re.escape(text)}$", shown, re.MULTILINE)
        assert len(text) > 10
        module = f"experiments/{command_line.MODULES.get(name, name)}"
        assert (ROOT / f"{module}.py").is_file() or (ROOT / module).is_dir()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("train moe optim.lr=1", "experiments.train moe optim.lr=1"),
        ("train SCALE=small EXP=moe", "experiments.train moe scale=small"),
        ("dry-run moe", "experiments.dry_run moe"),
        ("eval model=a SCALE=x", "experiments.evaluate model=a scale=x"),
        ("import a.bib output=b", "experiments.import_papers a.bib output=b"),
        ("data RECIPE=scimult", "experiments.data scimult"),
        ("slurm moe SWEEP=lr SCALE=small", "experiments.slurm moe SWEEP=lr scale=small"),
        ("compare A=x B=y", "experiments.compare A=x B=y"),
        ("bench BENCH=mining rounds=1", "experiments.bench.mining rounds=1"),
    ],
)
def test_arguments_reach_the_module(monkeypatch, arguments, expected):
    assert called(monkeypatch, *arguments.split()) == expected.split()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("trian moe", 2, "error: unknown command 'trian'; did you mean train?"),
        ("xyz", 2, "expected one of agent, audit"),
        ("reference", 2, "unknown command 'reference'"),
        ("__main__", 2, "unknown command"),
        ("bench nothing", 2, "error: bench: expected one of"),
        ("bench --help", 0, "expected one of"),
        ("bench peer", 2, "error: bench: expected one of data_scale, encoder_cost, "),
    ],
)
def test_wrong_commands_say_what_is_expected(monkeypatch, capsys, arguments, status, message):
    monkeypatch.setattr(sys, "argv", ["scimult", *arguments.split()])
    with pytest.raises(SystemExit) as end:
        command_line.main()
    output = capsys.readouterr()
    assert end.value.code == status
    assert message in (output.err if status else output.out)


def test_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scimult", "--version"])
    command_line.main()
    assert capsys.readouterr().out == f"scimult {scimult.__version__}\n"
    for name in ("CHANGELOG.md", "CITATION.cff"):
        assert scimult.__version__ in (ROOT / name).read_text(encoding="utf-8")


def test_cfg_prints_the_resolved_configuration_and_stops(capsys):
    with pytest.raises(SystemExit) as end:
        train(["moe", "optim.lr=0.5", "--cfg"])
    assert end.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out) == as_dict(load_config("moe", ["optim.lr=0.5"]))


def test_cfg_of_a_command_that_loads_a_model_has_its_packages(capsys, tmp_path):
    with pytest.raises(SystemExit):
        mine(["moe", f"output={tmp_path}", "extend.packages=[mylab]", "mining.k=7", "--cfg"])
    expected = load_config("moe", ["extend.packages=[mylab]", "mining.k=7"])
    assert yaml.safe_load(capsys.readouterr().out) == as_dict(expected)


@pytest.mark.parametrize("command", [train, mine])
def test_help_of_an_experiment_lists_its_keys(capsys, command):
    with pytest.raises(SystemExit):
        command(["--help"])
    shown = capsys.readouterr().out
    assert "  optim.lr=NUMBER\n" in shown
    assert "  task.NAME.kind=classification|link_prediction|search\n" in shown
    assert "default: 1000" in shown


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tra"], {"train"}),
        (["train", "mo"], {name for name in experiments() if name.startswith("mo")}),
        (["train", "moe", "optim.w"], {"optim.warmup=", "optim.weight_decay="}),
        (["mine", "moe", "mining.rel"], {"mining.relative_margin="}),
        (["find", "embeddings=", "que"], {"query=", "queries="}),
        (["train", "init_from", "="], set()),
    ],
)
def test_completion_in_bash(tmp_path, words, expected):
    script = tmp_path / "completion"
    script.write_text(completion())
    typed = " ".join(f"'{word}'" for word in ["scimult", *words])
    code = f"source {script}; COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _scimult; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected


@pytest.mark.slow
def test_quiet_verbose_and_a_closed_pipe(tmp_path):
    def run(*arguments, **options):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "experiments", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, text=True, **options)

    normal = run("sync", "folder=.", capture_output=True)
    assert "nothing left to send" in normal.stdout
    assert run("sync", "folder=.", "-q", capture_output=True).stdout == ""
    assert "nothing left to send" in run("sync", "-v", "folder=.", capture_output=True).stdout
    reading, writing = os.pipe()
    os.close(reading)
    closed = run("train", "--help", stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert closed.stderr == ""
