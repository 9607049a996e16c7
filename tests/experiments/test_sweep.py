"""Sweeps on this machine: no trial is lost or runs twice, even after kills."""

import json
import logging
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from datamodules.records import UserError
from experiments.config import sweep_file
from experiments.config.experiment import load_config
from experiments.config.sweep_file import check_trials, read_sweep, sweeps
from experiments.run import trials as trials_module
from experiments.run.agent_trials import publish_trial
from experiments.run.runner import environment
from experiments.run.trials import Controller, Trial
from experiments.slurm import slurm
from experiments.sweep import main as sweep
from experiments.train import train
from lightning_modules.checkpoint_files import read_checkpoint
from lightning_modules.distributed.signals import Preempted
from tests.experiments.test_train import TINY

METRIC = "metric: {name: val/mean/ndcg@10, goal: maximize}\n"
ONE = "method: grid\nparameters: {optim.lr: {value: 0.1}}\n"
THREE = "method: grid\nparameters: {optim.lr: {values: [0.1, 0.2, 0.3]}}\n"

# A stand-in for a training. It reads its arguments as the configuration would, exits with the status of its attempt,
# and logs the learning rate as its metric.
STUB = """
import json, os, sys, time
from pathlib import Path
from omegaconf import OmegaConf
config = OmegaConf.to_container(OmegaConf.from_dotlist(sys.argv[1:]))
folder = Path(config["run"]["dir"])
folder.mkdir(exist_ok=True)
attempts = len(list(folder.glob("attempt-*")))
(folder / f"attempt-{attempts}").write_text(json.dumps([config, dict(os.environ)]))
statuses = []
status = statuses[attempts] if attempts < len(statuses) else 0
if status == 0:
    rows = [{"step": 1, "val/mean/ndcg@10": config["optim"]["lr"]}, {"step": 2, "val/mean/ndcg@10": 0.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
    (folder / "results.json").write_text("{}")
else:
    print("something went wrong in", folder.name)
sys.exit(status)
"""


@pytest.fixture
def make_sweep(tmp_path):
    """Return a function that writes a sweep's file whose trials run the stub, and returns its path."""

    def make(body):
        (tmp_path / "stub.py").write_text(STUB)
        command = f'command: [{sys.executable}, {tmp_path / "stub.py"}, "${{args_no_hyphens}}"]\n'
        path = tmp_path / "mine.yaml"
        path.write_text(body + METRIC + command)
        return str(path)

    return make


@pytest.mark.parametrize("name", ["a #1", "a: b", " lead", "[x]", "{x}", "*x", "!x", "null", "it's"])
def test_names_of_folders_are_not_read_as_yaml(name, tmp_path, monkeypatch):
    """Trials of `my #1 sweep.yaml` were trained in the folder `my`."""
    trial = Trial(0, {}, tmp_path / name / "t000")
    config = load_config("vanilla", trial.arguments(read_sweep("lr", "vanilla")))
    assert (config.run.dir, config.wandb.group) == (str(trial.folder), name)
    monkeypatch.setenv("SCIMULT_TRIALS", str(tmp_path))
    publish_trial("vanilla", [], trial.folder)
    _, argument = json.loads((tmp_path / "0.json").read_text())
    assert load_config("vanilla", [argument]).run.dir == str(trial.folder)


@pytest.mark.parametrize("overrides", [["run.dir=mine"], []])
def test_run_dir_cannot_be_set_for_a_sweep(make_sweep, overrides):
    body = ONE if overrides else ONE.replace("optim.lr", "run.dir")
    with pytest.raises(UserError, match="mine.yaml: run.dir: cannot be set for a sweep"):
        read_sweep(make_sweep(body), "vanilla", overrides)


def test_a_trial_that_ends_without_results_is_explained(make_sweep, tmp_path, monkeypatch, caplog):
    """The log said that it failed with status 0."""
    controller = Controller(read_sweep(make_sweep(ONE), "vanilla"), tmp_path / "out")
    monkeypatch.setattr(controller, "_run_process", lambda *_: 0)
    controller.run()
    assert f"trial 0 failed because it wrote no results.json into {tmp_path}/out/t000; its log" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("name", sweeps())
def test_every_sweep_takes_two_steps(name, tmp_path):
    each = read_sweep(name, "moe", ["scale=sample"])
    assert check_trials(each).experiment == "moe"
    assert each.command(["a=1"]) == ["make", "train", "EXP=moe", "SCALE=sample", "a=1"]
    trial = Trial(0, each.trials()[-1], tmp_path / "t000")
    short = ["trainer.max_steps=2", "evaluation.every_n_steps=2", "evaluation.baselines=false"]
    train("moe", [*TINY, *short, *trial.arguments(each)])
    assert trial.has_results
    assert 0 <= trial.best(each.metric, each.maximize) <= 1


@pytest.mark.parametrize(
    "rows", [["NaN", "0.5", "0.7"], ["0.5", "NaN", "0.7"], ["0.7", "null", '"x"', "0.5", "Infinity"]]
)
def test_the_score_of_a_trial_is_its_best_finite_value(tmp_path, rows):
    trial, lines = Trial(0, {}, tmp_path), [f'{{"step": {i}, "m": {x}}}' for i, x in enumerate(rows)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, "7", "null", "[]", '{"m": 9}', '{"step": 9, "m"']))
    assert trial.best("m", maximize=True) == 0.7
    assert trial.best("m", maximize=False) == 0.5
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "m": 3}\n{"step": 1, "m": 2}')
    assert trial.metric_values("m") == {1: 2}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "m": NaN}')
    assert trial.best("m", maximize=True) is None


def attempts(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("attempt-*"))]


SIX = """
method: grid
parameters:
  optim.lr: {values: [0.1, 0.3, 0.2]}
  data.cache: {values: [null, some where]}
"""


@pytest.mark.slow
def test_preempted_trials_are_resumed_failed_ones_kept_and_the_best_one_shown(
    make_sweep, tmp_path, caplog, capsys, monkeypatch
):
    caplog.set_level("INFO")
    monkeypatch.setattr(sweep_file, "MAX_CHECKED", 1)
    monkeypatch.setenv("MAKEFLAGS", " -- SWEEP=mine optim.lr=9")
    path, output = make_sweep(SIX), tmp_path / "out"
    plan = {"t001": [3], "t004": [75, 75], "t005": [75, 75]}  # two of six trials are preempted twice, and one fails
    (tmp_path / "stub.py").write_text(STUB.replace("statuses = []", f"statuses = {plan}.get(folder.name, [])"))
    sweep(["moe", f"sweep={path}", f"output={output}", "parallel=2", "run.seed=3"])
    results = json.loads((output / "results.json").read_text())
    assert [row["value"] for row in results["trials"]] == [0.3, 0.3, 0.2, 0.2, 0.1, None]
    assert [row["state"] for row in results["trials"]] == ["finished"] * 5 + ["failed"]
    assert {len(attempts(output / f"t00{i}")) for i in (4, 5)} == {3}
    for config, variables in attempts(output / "t004"):
        assert config["optim"]["lr"] == 0.2
        assert config["data"]["cache"] is None
        assert config["EXP"] == "moe"
        assert config["run"] == {"seed": 3, "dir": str(output / "t004")}
        assert "MAKEFLAGS" not in variables
    assert attempts(output / "t001")[0][0]["data"]["cache"] == "some where"
    assert "The best is trial 2 (optim.lr=0.3 data.cache=null)" in caplog.text
    assert "trial 1 failed with status 3; its log is" in caplog.text
    assert "something went wrong in t001" in (output / "t001.log").read_text()
    assert "mine (moe): val/mean/ndcg@10" in capsys.readouterr().out

    sweep(["moe", f"sweep={path}", f"output={output}", "run.seed=3"])  # does not repeat the failed trial
    assert len(attempts(output / "t000")) == len(attempts(output / "t001")) == 1
    sweep(["moe", f"sweep={path}", f"output={output}", "run.seed=3", "retry_failed=yes"])
    assert len(attempts(output / "t000")) == 1
    assert len(attempts(output / "t001")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("torn", ['{"trial": 1, "state": "fini', '{"trial": 1, "state": "\\xc3', "null"])
def test_a_truncated_line_loses_one_row_and_not_the_sweep(make_sweep, tmp_path, torn):
    path, output = make_sweep(THREE), tmp_path / "out"
    sweep(["moe", f"sweep={path}", f"output={output}"])
    states = output / "trials.jsonl"
    lines = states.read_text().splitlines()
    states.write_bytes("\n".join([*lines[:-1], torn.encode().decode("unicode_escape")]).encode("latin1"))
    (output / "t002" / "results.json").unlink()
    sweep(["moe", f"sweep={path}", f"output={output}"])
    rows = json.loads((output / "results.json").read_text())["trials"]
    assert [row["state"] for row in rows] == ["finished"] * 3
    assert [len(attempts(output / f"t00{i}")) for i in range(3)] == [1, 1, 2]
    assert json.loads(states.read_text(errors="replace").splitlines()[-1])["state"] == "finished"


@pytest.mark.slow
def test_a_sweep_logs_the_progress_of_its_trials_and_relative_paths(make_sweep, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trials_module, "POLL_EVERY", 0.05)
    monkeypatch.setattr(trials_module, "REPORT_EVERY", 0.0)
    path = make_sweep(ONE)
    (tmp_path / "stub.py").write_text(STUB.replace("sys.exit", "time.sleep(0.5); sys.exit"))
    sweep(["moe", f"sweep={path}", "output=out"])
    assert "  trial 0: starting" in caplog.text
    assert "  trial 0: step 2, val/mean/ndcg@10 0.0000 at step 2" in caplog.text
    assert "1 trials of moe, in out\n" in caplog.text
    assert "Its run is in out/t000. Next: make eval model=out/t000 split=dev" in caplog.text


@pytest.mark.slow
def test_a_sweep_ends_when_the_first_trials_all_fail(make_sweep, tmp_path):
    path = make_sweep("method: grid\nparameters: {optim.lr: {values: [0.1, 0.2, 0.3, 0.4, 0.5]}}\n")
    (tmp_path / "stub.py").write_text("raise SystemExit('no such file')")
    with pytest.raises(UserError, match="the first 3 trials failed.*\n.*no such file"):
        sweep(["moe", f"sweep={path}", f"output={tmp_path / 'out'}"])
    states = [json.loads(line) for line in (tmp_path / "out" / "trials.jsonl").read_text().splitlines()]
    assert {row["trial"] for row in states} == {0, 1, 2}


@pytest.mark.slow
def test_a_trial_that_is_behind_is_stopped_for_good(make_sweep, tmp_path, monkeypatch, caplog, capsys):
    caplog.set_level("INFO")
    monkeypatch.setattr(trials_module, "POLL_EVERY", 0.05)
    path = make_sweep(
        "method: grid\nparameters: {optim.lr: {values: [0.2, 0.1, 0.3]}}\n"
        "early_terminate: {type: hyperband, min_iter: 1, eta: 2}\n"
    )
    output, stub = tmp_path / "out", tmp_path / "stub.py"
    waiting = """
import signal
signal.signal(signal.SIGTERM, lambda *_: ((folder / "saved").touch(), sys.exit(75)))
(folder / "metrics.jsonl").write_text(json.dumps({"step": 7, "val/mean/ndcg@10": config["optim"]["lr"]}) + '\\n{"st')
while config["optim"]["lr"] == 0.1:
    time.sleep(0.02)
"""
    stub.write_text(STUB.replace("statuses = []", waiting + "statuses = []"))
    sweep(["moe", f"sweep={path}", f"output={output}"])
    assert (output / "t001" / "saved").exists()
    results = json.loads((output / "results.json").read_text())["trials"]
    assert [(row["trial"], row["state"]) for row in results] == [(2, "finished"), (0, "finished"), (1, "stopped")]
    assert (results[2]["step"], results[2]["value"]) == (7, 0.1)
    assert results[2]["reason"] == "0.1 at value 1; the best 1 of 2 trials reached 0.2"
    assert "trial 1 is stopped early at step 7" in caplog.text
    assert "failed" not in caplog.text
    assert "stopped early at step 7" in " ".join(capsys.readouterr().out.split())
    sweep(["moe", f"sweep={path}", f"output={output}", "retry_failed=yes"])
    assert len(attempts(output / "t001")) == 1


@pytest.mark.slow
def test_a_training_that_is_behind_saves_before_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(trials_module, "POLL_EVERY", 0.1)
    path, output = tmp_path / "early.yaml", tmp_path / "out"
    path.write_text(
        "method: grid\nmetric: {name: train/search/loss, goal: minimize}\n"
        "parameters: {data.batch_size: {values: [2, 8]}}\n"  # fewer negatives have a lower loss
        "early_terminate: {type: hyperband, min_iter: 2}\n"
        f'command: [{sys.executable}, -m, experiments.train, moe, "${{args_no_hyphens}}"]\n'
    )
    quick = ["trainer.max_steps=150", "trainer.log_every_n_steps=10", "evaluation.every_n_steps=0", "tasks=[search]"]
    monkeypatch.setattr(
        sweep_file.Sweep,
        "command",
        lambda self, arguments: [*self.content["command"][:-1], *self.overrides, *arguments],
    )
    sweep(["moe", f"sweep={path}", f"output={output}", *TINY[2:], *quick, "evaluation.baselines=false"])
    best, other = json.loads((output / "results.json").read_text())["trials"]
    assert (best["state"], best["parameters"]) == ("finished", {"data.batch_size": 2})
    assert (other["state"], other["step"] % 10) == ("stopped", 0)
    assert 20 <= other["step"] < 150
    saved = read_checkpoint(output / "t001" / "checkpoints" / "last.ckpt")["global_step"]
    assert other["step"] <= saved < 150
    assert not (output / "t001" / "results.json").exists()


def test_parallel_trials_have_one_gpu_each(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert [environment(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["4", "7", "4"]
    assert environment(1, 1)["CUDA_VISIBLE_DEVICES"] == "4,7"


def forked(path, output):
    """Start a controller in a new process, and return its id."""
    if child := os.fork():
        return child
    try:
        Controller(read_sweep(path, "moe"), output).run()
    except Preempted:
        os._exit(75)
    finally:
        os._exit(0)


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def states_in(output):
    """Return the rows of trials.jsonl, except for a line that is being written."""
    path = output / "trials.jsonl"
    complete = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in complete.splitlines()]


@pytest.mark.slow
def test_after_a_kill_a_controller_waits_for_the_trial_that_is_still_running(make_sweep, tmp_path):
    path, output = make_sweep(THREE), tmp_path / "out"
    stub = tmp_path / "stub.py"
    waiting = (
        "while config['optim']['lr'] == 0.1 and not Path('"
        + str(tmp_path / "free")
        + "').exists():\n    time.sleep(0.02)\n"
    )
    stub.write_text(STUB.replace("statuses =", waiting + "statuses ="))
    first = forked(path, output)
    until(lambda: list(output.glob("t000/attempt-0")))
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    second = forked(path, output)
    until(lambda: [row["trial"] for row in states_in(output) if row["state"] == "finished"] == [1, 2])
    assert len(attempts(output / "t000")) == 1
    (tmp_path / "free").touch()
    os.waitpid(second, 0)
    finished = [row["trial"] for row in states_in(output) if row["state"] == "finished"]
    assert finished == [1, 2, 0]
    assert [len(attempts(output / f"t00{i}")) for i in range(3)] == [1, 1, 1]


@pytest.mark.slow
def test_a_signal_reaches_the_trials(make_sweep, tmp_path):
    path, output = make_sweep("method: grid\nparameters: {optim.lr: {values: [0.1, 0.2]}}\n"), tmp_path / "out"
    saving = "import signal\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
    text = STUB.replace("folder = Path", saving + "folder = Path").replace(
        "statuses =", "time.sleep(30 * (attempts == 0))\nstatuses ="
    )
    (tmp_path / "stub.py").write_text(text)
    controller = forked(path, output)
    until(lambda: list(output.glob("t000/attempt-0")))
    os.kill(controller, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(controller, 0)[1]) == 75
    assert [(row["trial"], row["state"]) for row in states_in(output)] == [(0, "started"), (0, "preempted")]


@pytest.mark.slow
def test_a_job_array_runs_one_trial_in_each_task(make_sweep, tmp_path, monkeypatch):
    path = make_sweep("method: grid\nparameters: {optim.lr: {values: [0.1, 0.2]}, wandb.entity: {value: null}}\n")
    monkeypatch.chdir(tmp_path)
    script = slurm(["moe", "TIME=60", "GPUS=0", f"SWEEP={path}", "run.seed=1"]).read_text()
    folder = read_sweep(path, "moe", ["run.seed=1"]).folder
    assert "#SBATCH --array=0-1" in script
    for number, lr in enumerate((0.1, 0.2)):
        arguments = f"run moe run.seed=1 optim.lr={lr} wandb.entity=null run.dir={folder / f't00{number}'}"
        assert f"{number}) {arguments}" in script
    with pytest.raises(UserError, match="SWEEP: cannot be combined with EXPS"):
        slurm(["moe", "TIME=60", f"SWEEP={path}", "SEEDS=0,1"])


def test_trials_run_with_the_interpreter_of_the_sweep(make_sweep, tmp_path, monkeypatch):
    """make ran them with that of .venv, which it first installed where there was none."""
    path, started = Path(make_sweep(ONE)), []

    @contextmanager
    def process(_, command, *others):
        started.append(command)
        yield SimpleNamespace(wait=lambda _: 1)

    monkeypatch.setattr(Controller, "process", process)
    path.write_text(
        path.read_text().partition("command:")[0] + "command: [make, train, EXTRAS=gpu, '${args_no_hyphens}']"
    )
    Controller(read_sweep(str(path), "moe", ["scale=small"]), tmp_path / "out").run()
    words = [
        "train",
        "EXP=moe",
        "SCALE=small",
        "optim.lr=0.1",
        f"run.dir={tmp_path / 'out' / 't000'}",
        "wandb.group=out",
    ]
    assert started == [[sys.executable, "-m", "experiments", *words]]


@pytest.mark.parametrize(
    ("argument", "suggestion"), [("PARALELL=2", "PARALLEL"), ("paralell=2", "parallel"), ("seed=1", "run.seed")]
)
def test_a_misspelt_option_is_suggested(argument, suggestion):
    with pytest.raises(UserError, match=rf"did you mean {suggestion}\?"):
        sweep(["moe", "sweep=lr", argument])


@pytest.mark.slow
def test_bayes_records_the_values_it_chooses_and_resumes_with_them(make_sweep, tmp_path):
    text = "method: bayes\nrun_cap: 4\nparameters: {optim.lr: {min: 0.1, max: 1.0}, run.seed: {values: [0, 1]}}\n"
    path, output = make_sweep(text), tmp_path / "out"
    sweep(["moe", f"sweep={path}", f"output={output}", "parallel=2"])
    rows = json.loads((output / "results.json").read_text())["trials"]
    assert [row["value"] for row in rows] == sorted((row["parameters"]["optim.lr"] for row in rows), reverse=True)
    assert len({row["value"] for row in rows}) == 4
    chosen = {row["trial"]: row["parameters"] for row in rows}
    for number in (2, 3):
        (output / f"t00{number}" / "results.json").unlink()
    with open(output / "trials.jsonl", "a") as file:  # as if trial 1 had ended after a kill of the controller
        file.write(json.dumps({"trial": 1, "state": "started", "parameters": chosen[1]}) + "\n")
    with open(output / "trials.jsonl", "a") as file:  # as if trial 2 had been killed, and trial 3 had never started
        file.write(json.dumps({"trial": 2, "state": "started", "parameters": chosen[2]}) + "\n")
    lines = [line for line in (output / "trials.jsonl").read_text().splitlines() if json.loads(line)["trial"] != 3]
    (output / "trials.jsonl").write_text("\n".join(lines) + "\n")
    sweep(["moe", f"sweep={path}", f"output={output}"])
    rows = json.loads((output / "results.json").read_text())["trials"]
    assert {row["trial"]: row["parameters"] for row in rows if row["trial"] < 3} == {i: chosen[i] for i in range(3)}
    assert [len(attempts(output / f"t00{i}")) for i in range(4)] == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("body", "difference"),
    [
        ("method: grid\nparameters: {optim.lr: {values: [0.1, 0.5, 0.3]}}\n", "optim.lr: 0.2 then, 0.5 now"),
        ("method: grid\nparameters: {run.seed: {values: [1, 2]}}\n", "optim.lr: 0.1 then, None now; run.seed: None"),
        (
            "method: bayes\nrun_cap: 4\nparameters: {optim.weight_decay: {min: 0.1, max: 1.0}}\n",
            "optim.lr: 0.1 then, None now",
        ),
    ],
)
def test_trials_of_another_sweep_are_not_shown_as_trials_of_this_one(make_sweep, tmp_path, body, difference):
    """With an output that had been used before, a changed file showed the old trials, or ended in KeyError."""
    path, output = make_sweep(body), tmp_path / "out"
    output.mkdir()
    rows = [
        {"trial": number, "state": "finished", "parameters": {"optim.lr": rate}}
        for number, rate in enumerate((0.1, 0.2, 0.3))
    ]
    (output / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=f"output: .*out has trials of another sweep .trial .: {difference}"):
        sweep(["moe", f"sweep={path}", f"output={output}"])
    assert not (output / "results.json").exists()


def test_trials_with_other_settings_are_not_shown_as_trials_of_this_command(make_sweep, tmp_path):
    """The old trials were shown as results of the new settings."""
    path, output = make_sweep(THREE), tmp_path / "out"
    command = ["moe", f"sweep={path}", f"output={output}"]
    sweep([*command, "optim.warmup=0.5"])
    content = (output / "results.json").read_text()
    for change, difference in (
        (["optim.warmup=0.6"], "optim.warmup: 0.5 then, 0.6 now"),
        ([], "optim.warmup: 0.5 then, None now"),
    ):
        with pytest.raises(UserError, match=f"trials of another sweep .trial 0: {difference}"):
            sweep([*command, *change])
    with pytest.raises(UserError, match="EXP: moe then, vanilla now"):
        sweep(["vanilla", *command[1:], "optim.warmup=0.5"])
    assert (output / "results.json").read_text() == content
    sweep([*command, "optim.warmup=0.5", "trainer.log_every_n_steps=3"])  # a run may resume with it, too


def test_an_output_that_is_a_file_raises_user_error(make_sweep, tmp_path):
    with pytest.raises(UserError, match="output: .*mine.yaml cannot be used"):
        sweep(["moe", f"sweep={make_sweep(THREE)}", f"output={tmp_path / 'mine.yaml'}"])


def test_bayes_needs_a_controller(make_sweep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = make_sweep("method: bayes\nrun_cap: 4\nparameters: {optim.lr: {min: 0.1, max: 1.0}}\n")
    with pytest.raises(UserError, match="trial: method bayes needs the results of earlier trials"):
        sweep(["moe", f"sweep={path}", "trial=1"])
    with pytest.raises(UserError, match="SWEEP: method bayes needs the results of earlier trials"):
        slurm(["moe", "TIME=60", f"SWEEP={path}"])


def test_a_trial_alone_is_as_quiet_as_its_command(make_sweep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = []
    monkeypatch.setattr(os, "execv", lambda _, command: commands.append(command))
    monkeypatch.setattr(logging.getLogger(), "level", logging.WARNING)
    sweep(["moe", f"sweep={make_sweep(THREE)}", "trial=1"])
    assert commands[0][1:4] == ["-m", "experiments.train", "moe"]
    assert commands[0][-1] == "-q"


def test_rows_of_earlier_versions_are_read(make_sweep, tmp_path):
    path, output = make_sweep(THREE), tmp_path / "out"
    (output / "t000").mkdir(parents=True)
    (output / "t000" / "metrics.jsonl").write_text('{"step": 1, "val/mean/ndcg@10": 0.7}\n')
    rows = [
        {"trial": 0, "state": "finished", "parameters": {"optim.lr": 0.1}, "time": 1.0, "status": 0, "value": 0.7},
        {"trial": 1, "state": "stopped", "parameters": {"optim.lr": 0.2}, "time": 2.0, "step": 4, "reason": "behind"},
        {"trial": 2, "state": "failed", "parameters": {"optim.lr": 0.3}, "time": 3.0, "status": 1},
    ]
    (output / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sweep(["moe", f"sweep={path}", f"output={output}"])
    table = json.loads((output / "results.json").read_text())["trials"]
    assert [(row["trial"], row["state"], row["value"]) for row in table] == [
        (0, "finished", 0.7),
        (1, "stopped", None),
        (2, "failed", None),
    ]
    assert table[1]["reason"] == "behind"
    assert not list(output.glob("t00*/attempt-*"))
