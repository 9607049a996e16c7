"""Sweeps: values as W&B's format means them, typed through make and shell, and a controller that loses no trial."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from datamodules.records import UserError
from experiments.config.experiment import load_config
from experiments.slurm import slurm
from experiments.sweep import main as sweep
from experiments.sweeping import controller as controller_module
from experiments.sweeping import file
from experiments.sweeping.controller import Controller
from experiments.sweeping.file import as_override, check_trials, read_sweep, sweeps
from experiments.sweeping.hyperband import Hyperband, read_hyperband
from experiments.sweeping.space import DISTRIBUTIONS, read_parameters, trials
from experiments.sweeping.trial import Trial, environment
from experiments.train import train
from lightning_modules.checkpoint_files import read_checkpoint
from lightning_modules.distributed.signals import Preempted
from tests.experiments.test_train import TINY

METRIC = "metric: {name: val/mean/ndcg@10, goal: maximize}\n"
COMMAND = 'command: [make, train, "${args_no_hyphens}"]\n'

ONE = "method: grid\nparameters: {optim.lr: {value: 0.1}}\n"

# Stands for a training: it reads its arguments as the configuration would, ends as told, and logs its parameters.
STUB = """
import json, os, sys, time
from pathlib import Path
from omegaconf import OmegaConf
given = OmegaConf.to_container(OmegaConf.from_dotlist(sys.argv[1:]))
folder = Path(given["run"]["dir"])
folder.mkdir(exist_ok=True)
attempts = len(list(folder.glob("attempt-*")))
(folder / f"attempt-{attempts}").write_text(json.dumps([given, dict(os.environ)]))
statuses = []
status = statuses[attempts] if attempts < len(statuses) else 0
if status == 0:
    rows = [{"step": 1, "val/mean/ndcg@10": given["optim"]["lr"]}, {"step": 2, "val/mean/ndcg@10": 0.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
    (folder / "results.json").write_text("{}")
else:
    print("something went wrong in", folder.name)
sys.exit(status)
"""


def parameters_of(text):
    return read_parameters(OmegaConf.to_container(OmegaConf.create(text)))


@pytest.fixture
def make_sweep(tmp_path):
    """Writes a sweep's file, whose trials are stubs if command is None, and returns its path."""

    def make(body, command=None):
        (tmp_path / "stub.py").write_text(STUB)
        command = command or f'command: [{sys.executable}, {tmp_path / "stub.py"}, "${{args_no_hyphens}}"]\n'
        path = tmp_path / "mine.yaml"
        path.write_text(body + METRIC + command)
        return str(path)

    return make


@pytest.mark.parametrize("name", sweeps())
def test_every_sweep_takes_two_steps(name, tmp_path):
    found = read_sweep(name, "moe", ["scale=sample"])
    assert check_trials(found).experiment == "moe"
    assert found.command(["a=1"]) == ["make", "train", "EXP=moe", "SCALE=sample", "a=1"]
    trial = Trial(0, found.trials()[-1], tmp_path / "t000")
    few = ["trainer.max_steps=2", "evaluation.every_n_steps=2", "evaluation.baselines=false"]
    train("moe", [*TINY, *few, *trial.arguments(found)])
    assert trial.has_results
    assert 0 <= trial.value(found.metric, found.maximize) <= 1


def test_draws_have_the_distribution_that_is_named():
    """Compared with the quantiles of numpy's own draws, 4,000 of each."""
    own = np.random.default_rng(0)
    expected = {
        "uniform": ({"min": 2.0, "max": 3.0}, own.uniform(2, 3, 4000)),
        "int_uniform": ({"min": 1, "max": 4}, own.integers(1, 5, 4000)),
        "q_uniform": ({"min": 0, "max": 1, "q": 0.25}, np.round(own.uniform(0, 1, 4000) / 0.25) * 0.25),
        "log_uniform_values": ({"min": 1e-4, "max": 1e-1}, 10 ** own.uniform(-4, -1, 4000)),
        "q_log_uniform_values": ({"min": 1, "max": 100}, np.exp(own.uniform(0, math.log(100), 4000))),
        "normal": ({"mu": 5, "sigma": 0.5}, own.normal(5, 0.5, 4000)),
        "q_normal": ({"mu": 0, "sigma": 9, "q": 2}, np.round(own.normal(0, 9, 4000) / 2) * 2),
        "log_normal": ({"mu": 1, "sigma": 0.1}, own.lognormal(1, 0.1, 4000)),
        "q_log_normal": ({"mu": 3, "sigma": 0.5, "q": 1}, np.round(own.lognormal(3, 0.5, 4000))),
        "constant": ({"value": 7}, np.full(4000, 7)),
        "categorical": ({"values": [1, 2], "probabilities": [0.9, 0.1]}, own.choice([1, 2], 4000, p=[0.9, 0.1])),
    }
    assert expected.keys() == DISTRIBUTIONS.keys()
    for name, (node, wanted) in expected.items():
        (parameter,) = read_parameters({"x": {"distribution": name, **node}})
        drawn = [parameter.draw(random.Random(f"{name}/{i}")) for i in range(4000)]
        spread = np.std(wanted) or 1
        assert abs(np.mean(drawn) - np.mean(wanted)) < 0.1 * spread, name
        assert abs(np.std(drawn) - np.std(wanted)) < 0.1 * spread, name
        assert {type(value) for value in drawn} <= {int, float}, name
        if "q" in node:
            assert np.allclose(np.array(drawn) / node["q"], np.round(np.array(drawn) / node["q"])), name


def test_a_grid_has_every_combination_once_and_random_trials_are_those_of_their_seed():
    nested = "d: {value: x}, e: {distribution: q_uniform, min: 0.0, max: 0.2, q: 0.1}"
    text = f"a: {{values: [1, null]}}\nb: {{min: 0, max: 2}}\nc: {{parameters: {{{nested}}}}}"
    found = list(trials("grid", parameters_of(text), None, 0))
    combinations = {(t["a"], t["b"], t["c.d"], t["c.e"]) for t in found}
    assert combinations == {(a, b, "x", e) for a in (1, None) for b in (0, 1, 2) for e in (0.0, 0.1, 0.2)}
    assert len(found) == 18
    assert found[0] == {"a": 1, "b": 0, "c.d": "x", "c.e": 0.0}
    assert len(list(trials("grid", parameters_of(text), 5, 0))) == 5
    lr = parameters_of("lr: {distribution: log_uniform_values, min: 1e-4, max: 1e-2}")
    first, more, other = (list(trials("random", lr, count, seed)) for count, seed in ((3, 0), (5, 0), (3, 1)))
    assert more[:3] == first
    assert other != first


@pytest.mark.parametrize(
    ("body", "messages"),
    [
        ("method: grid\nparameters: {optim.lrr: {value: 1}}\n", ["trial 0", "unknown key optim.lrr", "optim.lr?"]),
        ("method: grid\nparameters: {data.batch_size: {values: [8, 2.5]}}\n", ["trial 1", "data.batch_size", "2.5"]),
        ("method: grid\nparameters: {optim.lr: {min: 0.1, max: 1.0}}\n", ["optim.lr: uniform has no grid"]),
        ("method: random\nparameters: {optim.lr: {min: 0.1, max: 1.0}}\n", ["how many random trials?", "run_cap"]),
        ("method: bayes\nparameters: {optim.lr: {min: 0.1, max: 1.0}}\n", ["bayes needs W&B's server"]),
        ("method: hunt\nparameters: {optim.lr: {value: 1}}\n", ["method: got 'hunt'", "grid, random"]),
        ("metod: grid\n", ["unknown key 'metod'", "method"]),
        ("method: grid\n", ["parameters is missing"]),
        ("method: grid\nparameters: {optim.lr: 0.1}\n", ["parameters.optim.lr", "got 0.1"]),
        ("method: grid\nparameters: {optim.lr: {min: 1, max: 2.0}}\n", ["both be whole numbers, or both have a point"]),
        ("method: grid\nparameters: {optim.lr: {min: 2, max: 1}}\n", ["min 2 is above max 1"]),
        ("method: grid\nparameters: {optim.lr: {values: []}}\n", ["a list of at least one"]),
        ("method: grid\nparameters: {optim.lr: {vales: [1]}}\n", ["expected value, values"]),
        (
            "method: grid\nparameters: {optim.lr: {distribution: log_uniform, min: -9, max: -1}}\n",
            ["got 'log_uniform', take log_uniform_values, whose min and max are the values"],
        ),
        (
            "method: grid\nparameters: {optim.lr: {distribution: normal, mean: 1}}\n",
            ["unknown key 'mean'; normal has mu, sigma"],
        ),
        (f"{ONE}early_terminate: {{type: hyperban, min_iter: 1}}\n", ["early_terminate.type: got 'hyperban'"]),
        (f"{ONE}early_terminate: {{type: hyperband, min: 1}}\n", ["unknown key 'min'", "min_iter, max_iter, s"]),
        (f"{ONE}early_terminate: {{type: hyperband}}\n", ["give min_iter, or max_iter with s"]),
        (f"{ONE}early_terminate: {{type: hyperband, max_iter: 9}}\n", ["give min_iter, or max_iter with s"]),
        (f"{ONE}early_terminate: {{type: hyperband, min_iter: 1.5}}\n", ["min_iter: got 1.5", "whole numbers"]),
        (
            f"{ONE}early_terminate: {{type: hyperband, min_iter: 1, eta: 1}}\n",
            ["eta: got 1, allowed are numbers above"],
        ),
        (
            f"{ONE}early_terminate: {{type: hyperband, max_iter: 2, s: 1, eta: 3}}\n",
            ["below 1, so no trial is stopped"],
        ),
        (
            f"{ONE}early_terminate: {{type: hyperband, min_iter: 1{'0' * 400}}}\n",
            ["min_iter: got a number of more than 100 digits, allowed are whole numbers from 1 to 1000000000"],
        ),
        (
            f"{ONE}early_terminate: {{type: hyperband, min_iter: 1, eta: 1{'0' * 400}}}\n",
            ["eta: got a number of more than 100 digits"],
        ),
        # A run of the sample has two evaluations, and one at its end cannot be given up.
        (f"{ONE}early_terminate: {{type: hyperband, min_iter: 2}}\n", ["from value 2 of val/mean/ndcg@10", "logs 2"]),
    ],
)
def test_errors_of_a_sweeps_file_name_key_and_what_is_allowed(make_sweep, body, messages):
    path = make_sweep(body, COMMAND)
    with pytest.raises(UserError) as caught:
        sweep(["moe", f"sweep={path}"])
    for message in messages:
        assert message in str(caught.value)


def test_the_metric_must_be_one_that_runs_log(make_sweep):
    path = Path(make_sweep("method: grid\nparameters: {optim.lr: {value: 1.0}}\n"))
    path.write_text(path.read_text().replace("val/mean/ndcg@10", "val/mean/ndgc@10"))
    with pytest.raises(UserError, match=r"no run logs 'val/mean/ndgc@10'; did you mean val/mean/ndcg@10\?"):
        sweep(["moe", f"sweep={path}"])
    path.write_text(path.read_text().replace("ndgc", "ndcg"))
    with pytest.raises(UserError, match="no run logs"):
        sweep(["moe", f"sweep={path}", "evaluation.every_n_steps=0"])
    with pytest.raises(UserError, match="did you mean seeds"):
        sweep(["moe", "sweep=sedes"])


def test_of_diagnostics_and_mining_only_what_they_log_is_a_metric(make_sweep):
    path = Path(make_sweep(ONE))
    given, text = ["diagnostics.every_n_steps=5", "mining.every_n_steps=5"], path.read_text()
    task = load_config("moe").tasks[0]
    logged = [f"diag/{task}/gradient_norm", f"diag/{task}/transplant/{task}", "diag/experts/a-b/distance"]
    for name in (*logged, f"mine/{task}/margin_p50", "diag/seconds"):
        path.write_text(text.replace("val/mean/ndcg@10", name))
        check_trials(read_sweep(str(path), "moe", given))
        with pytest.raises(UserError, match="no run logs"):
            check_trials(read_sweep(str(path), "moe"))
    for name in ("diag/nonsense", f"diag/{task}/gradient_nrom", f"mine/{task}/margin_p5"):
        path.write_text(text.replace("val/mean/ndcg@10", name))
        with pytest.raises(UserError, match=f"no run logs '{name}'"):
            check_trials(read_sweep(str(path), "moe", given))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("val/mean/ndcg@10", "null", "metric.name: got None"),
        ("val/mean/ndcg@10", "[a]", r"metric.name: got \['a'\]"),
        ("{optim.lr: {value: 0.1}}", "5", "parameters: got 5"),
        ("{optim.lr: {value: 0.1}}", "[a]", r"parameters: got \['a'\]"),
        ('[make, train, "${args_no_hyphens}"]', "5", "command: needs a list"),
        ('[make, train, "${args_no_hyphens}"]', "make train ${args_no_hyphens}", "command: needs a list"),
    ],
)
def test_parts_of_another_type_are_refused(make_sweep, old, new, told):
    path = Path(make_sweep(ONE, COMMAND))
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=told):
        read_sweep(str(path), "moe")


@pytest.mark.parametrize(
    "rows", [["NaN", "0.5", "0.7"], ["0.5", "NaN", "0.7"], ["0.7", "null", '"x"', "0.5", "Infinity"]]
)
def test_the_value_of_a_trial_is_its_best_finite_one(tmp_path, rows):
    trial, lines = Trial(0, {}, tmp_path), [f'{{"step": {i}, "m": {x}}}' for i, x in enumerate(rows)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, "7", "null", "[]", '{"m": 9}', '{"step": 9, "m"']))
    assert trial.value("m", maximize=True) == 0.7
    assert trial.value("m", maximize=False) == 0.5
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "m": 3}\n{"step": 1, "m": 2}')
    assert trial.values("m") == {1: 2}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "m": NaN}')
    assert trial.value("m", maximize=True) is None


@pytest.mark.parametrize(
    "value", [0.1, 1e-5, 3, True, None, [1, 2], ["a", None], {"T": 2.0}, "mod2", "null", "1", "it's: $x y", ""]
)
def test_values_arrive_with_their_type(value):
    text = as_override("x.y", value)
    assert OmegaConf.to_container(OmegaConf.from_dotlist([text])) == {"x": {"y": value}}


def test_what_wandb_writes_for_null_is_null():
    """Its agent gives values as Python prints them."""
    config = load_config(
        "moe",
        [
            "wandb.entity=None",
            "objective.temperature={'search': 0.1, 'classification': 0.2, 'link_prediction': 1}",
            "encoder.layers=[0, 1]",
        ],
    )
    assert config.wandb.entity is None
    assert config.encoder["layers"] == [0, 1]


def attempts(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("attempt-*"))]


SIX = """
method: grid
parameters:
  optim.lr: {values: [0.1, 0.3, 0.2]}
  data.cache: {values: [null, some where]}
"""


def test_preempted_trials_go_on_failed_ones_are_kept_and_the_best_is_told(
    make_sweep, tmp_path, caplog, capsys, monkeypatch
):
    caplog.set_level("INFO")
    monkeypatch.setattr(file, "CHECKED", 1)
    monkeypatch.setenv("MAKEFLAGS", " -- SWEEP=mine optim.lr=9")
    path, output = make_sweep(SIX), tmp_path / "out"
    plan = {"t001": [3], "t004": [75, 75], "t005": [75, 75]}  # of six trials, two are preempted twice, and one fails
    (tmp_path / "stub.py").write_text(STUB.replace("statuses = []", f"statuses = {plan}.get(folder.name, [])"))
    sweep(["moe", f"sweep={path}", f"output={output}", "parallel=2", "run.seed=3"])
    results = json.loads((output / "results.json").read_text())
    assert [row["value"] for row in results["trials"]] == [0.3, 0.3, 0.2, 0.2, 0.1, None]
    assert [row["state"] for row in results["trials"]] == ["finished"] * 5 + ["failed"]
    assert {len(attempts(output / f"t00{i}")) for i in (4, 5)} == {3}
    for given, variables in attempts(output / "t004"):
        assert given["optim"]["lr"] == 0.2
        assert given["data"]["cache"] is None
        assert given["EXP"] == "moe"
        assert given["run"] == {"seed": 3, "dir": str(output / "t004")}
        assert "MAKEFLAGS" not in variables
    assert attempts(output / "t001")[0][0]["data"]["cache"] == "some where"
    assert "The best is trial 2: optim.lr=0.3 data.cache=null" in caplog.text
    assert "trial 1 failed with status 3; its log is" in caplog.text
    assert "something went wrong in t001" in (output / "t001.log").read_text()
    assert "mine (moe): val/mean/ndcg@10" in capsys.readouterr().out

    sweep(["moe", f"sweep={path}", f"output={output}", "run.seed=3"])  # nothing is left, the failed one stays so
    assert len(attempts(output / "t000")) == len(attempts(output / "t001")) == 1
    sweep(["moe", f"sweep={path}", f"output={output}", "run.seed=3", "retry_failed=yes"])
    assert len(attempts(output / "t000")) == 1
    assert len(attempts(output / "t001")) == 2


@pytest.mark.parametrize("torn", ['{"trial": 1, "state": "fini', '{"trial": 1, "state": "\\xc3', "null"])
def test_a_line_that_was_cut_short_costs_one_row_and_not_the_sweep(make_sweep, tmp_path, torn):
    path, output = make_sweep("method: grid\nparameters: {optim.lr: {values: [0.1, 0.2, 0.3]}}\n"), tmp_path / "out"
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


def test_a_sweep_tells_how_far_a_trial_is_and_names_its_run_from_here(make_sweep, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(controller_module, "LOOKS_EVERY", 0.05)
    monkeypatch.setattr(controller_module, "TELLS_EVERY", 0.0)
    path = make_sweep(ONE)
    (tmp_path / "stub.py").write_text(STUB.replace("sys.exit", "time.sleep(0.5); sys.exit"))
    sweep(["moe", f"sweep={path}", "output=out"])
    assert "  trial 0: starting" in caplog.text
    assert "  trial 0: step 2, val/mean/ndcg@10 0.0000 at step 2" in caplog.text
    assert "1 trials of moe, in out\n" in caplog.text
    assert "Its run lies in out/t000. Next: make eval model=out/t000 split=dev" in caplog.text


def test_a_sweep_ends_when_the_first_trials_all_fail(make_sweep, tmp_path):
    path = make_sweep("method: grid\nparameters: {optim.lr: {values: [0.1, 0.2, 0.3, 0.4, 0.5]}}\n")
    (tmp_path / "stub.py").write_text("raise SystemExit('no such file')")
    with pytest.raises(UserError, match="the first 3 trials failed.*\n.*no such file"):
        sweep(["moe", f"sweep={path}", f"output={tmp_path / 'out'}"])
    states = [json.loads(line) for line in (tmp_path / "out" / "trials.jsonl").read_text().splitlines()]
    assert {row["trial"] for row in states} == {0, 1, 2}


def test_brackets_are_those_of_wandbs_documentation():
    assert read_hyperband({"type": "hyperband", "min_iter": 3}).brackets[:4] == (3, 9, 27, 81)
    assert read_hyperband({"type": "hyperband", "max_iter": 27, "s": 2}).brackets == (3, 9)
    assert read_hyperband({"type": "hyperband", "max_iter": 27, "s": 9, "eta": 2.5}).brackets == (1, 4, 10)
    assert read_hyperband({"type": "hyperband", "max_iter": 27, "s": 10**9}).brackets == (1, 3, 9)
    assert read_hyperband({"type": "hyperband", "min_iter": 1, "eta": 2000}).brackets == (1, 2000, 4_000_000)


@pytest.mark.parametrize(
    ("own", "others", "strict", "stopped"),
    [  # Worked out by hand: brackets 2 and 4, half of the trials go on, larger is better.
        ([0.1], [[0.9, 0.9]], False, False),  # before the first bracket
        ([0.1, 0.2], [], False, False),  # the first one there
        ([0.1, 0.2], [[0.9]], False, False),
        ([0.1, 0.2], [[0.1, 0.3]], False, True),  # one of two goes on
        ([0.1, 0.3], [[0.1, 0.3]], False, False),  # of equals both do
        ([0.1, 0.2], [[0, 0.3], [0, 0.1]], False, False),  # two of three do, rounded up
        ([0.1, 0.2], [[0, 0.3], [0, 0.4]], False, True),
        ([0.1, 0.2], [[0, 0.3], [0, 0.4], [0.5]], False, True),  # who is not there does not count
        ([0.5, 0.2], [[0, 0.3]], False, False),  # its best counts,
        ([0.5, 0.2], [[0, 0.3]], True, True),  # or if strict that at the bracket
        ([0.1, 0.2, 0.4], [[0, 0.3, 0.9]], False, False),
        ([0.1, 0.2, 0.4], [[0, 0.3, 0.9]], True, True),
        ([0.1, 0.2, 0.4, 0.5], [[0.9, 0.9, 0.9, 0.4]], True, False),  # at the last bracket alone
        ([0.1, float("nan")], [[0, 0.3]], True, True),
    ],
)
def test_who_is_not_among_the_best_is_stopped(own, others, strict, stopped):
    for sign, maximize in ((1, True), (-1, False)):
        signed = [[sign * value for value in values] for values in (own, *others)]
        assert bool(Hyperband((2, 4), 2, strict).reason(signed[0], signed[1:], maximize)) == stopped
    reason = Hyperband((2, 4), 2, False).reason([0.1, 0.2], [[0, 0.3]], True)
    assert reason == "0.2 at value 2; the best 1 of 2 have 0.3"


def test_a_trial_that_is_behind_is_stopped_and_stays_so(make_sweep, tmp_path, monkeypatch, caplog, capsys):
    caplog.set_level("INFO")
    monkeypatch.setattr(controller_module, "LOOKS_EVERY", 0.05)
    path = make_sweep(
        "method: grid\nparameters: {optim.lr: {values: [0.2, 0.1, 0.3]}}\n"
        "early_terminate: {type: hyperband, min_iter: 1, eta: 2}\n"
    )
    output, stub = tmp_path / "out", tmp_path / "stub.py"
    waiting = """
import signal
signal.signal(signal.SIGTERM, lambda *_: ((folder / "saved").touch(), sys.exit(75)))
(folder / "metrics.jsonl").write_text(json.dumps({"step": 7, "val/mean/ndcg@10": given["optim"]["lr"]}) + '\\n{"st')
while given["optim"]["lr"] == 0.1:
    time.sleep(0.02)
"""
    stub.write_text(STUB.replace("statuses = []", waiting + "statuses = []"))
    sweep(["moe", f"sweep={path}", f"output={output}"])
    assert (output / "t001" / "saved").exists()
    results = json.loads((output / "results.json").read_text())["trials"]
    assert [(row["trial"], row["state"]) for row in results] == [(2, "finished"), (0, "finished"), (1, "stopped")]
    assert (results[2]["step"], results[2]["value"]) == (7, 0.1)
    assert results[2]["reason"] == "0.1 at value 1; the best 1 of 2 have 0.2"
    assert "trial 1 is stopped early at step 7" in caplog.text
    assert "failed" not in caplog.text
    assert "stopped early at step 7" in " ".join(capsys.readouterr().out.split())
    sweep(["moe", f"sweep={path}", f"output={output}", "retry_failed=yes"])
    assert len(attempts(output / "t001")) == 1


@pytest.mark.slow
def test_a_training_that_is_behind_saves_and_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(controller_module, "LOOKS_EVERY", 0.1)
    path, output = tmp_path / "early.yaml", tmp_path / "out"
    path.write_text(
        "method: grid\nmetric: {name: train/search/loss, goal: minimize}\n"
        "parameters: {data.batch_size: {values: [2, 8]}}\n"  # the loss of few negatives is small
        "early_terminate: {type: hyperband, min_iter: 2}\n"
        f'command: [{sys.executable}, -m, experiments.train, moe, "${{args_no_hyphens}}"]\n'
    )
    quick = ["trainer.max_steps=150", "trainer.log_every_n_steps=10", "evaluation.every_n_steps=0", "tasks=[search]"]
    monkeypatch.setattr(file.Sweep, "command", lambda self, own: [*self.content["command"][:-1], *self.overrides, *own])
    sweep(["moe", f"sweep={path}", f"output={output}", *TINY[2:], *quick, "evaluation.baselines=false"])
    best, other = json.loads((output / "results.json").read_text())["trials"]
    assert (best["state"], best["parameters"]) == ("finished", {"data.batch_size": 2})
    assert (other["state"], other["step"] % 10) == ("stopped", 0)
    assert 20 <= other["step"] < 150
    saved = read_checkpoint(output / "t001" / "checkpoints" / "last.ckpt")["global_step"]
    assert other["step"] <= saved < 150
    assert not (output / "t001" / "results.json").exists()


def test_trials_beside_each_other_have_a_gpu_each(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert [environment(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["4", "7", "4"]
    assert environment(1, 1)["CUDA_VISIBLE_DEVICES"] == "4,7"


def forked(path, output):
    """A process with a controller of a sweep."""
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
    path = output / "trials.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_killed_controller_goes_on_when_its_trial_that_is_left_has_ended(make_sweep, tmp_path):
    path, output = make_sweep("method: grid\nparameters: {optim.lr: {values: [0.1, 0.2, 0.3]}}\n"), tmp_path / "out"
    stub = tmp_path / "stub.py"
    waiting = (
        "while given['optim']['lr'] == 0.1 and not Path('"
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


def test_a_signal_reaches_the_trials_and_the_sweep_goes_on_later(make_sweep, tmp_path):
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


def test_a_job_array_has_a_trial_in_each_task_where_make_sweep_finds_it(make_sweep, tmp_path, monkeypatch):
    path = make_sweep("method: grid\nparameters: {optim.lr: {values: [0.1, 0.2]}, wandb.entity: {value: null}}\n")
    monkeypatch.chdir(tmp_path)
    script = slurm("moe", ["TIME=60", "GPUS=0", f"SWEEP={path}", "run.seed=1"]).read_text()
    found = read_sweep(path, "moe", ["run.seed=1"])
    assert "#SBATCH --array=0-1" in script
    for number, lr in enumerate((0.1, 0.2)):
        given = f"run moe run.seed=1 optim.lr={lr} wandb.entity=null run.dir={found.folder / f't00{number}'}"
        assert f"{number}) {given}" in script
    with pytest.raises(UserError, match="SWEEP: its trials are the array"):
        slurm("moe", ["TIME=60", f"SWEEP={path}", "SEEDS=0,1"])


def test_the_status_of_a_training_comes_through_make(tmp_path, monkeypatch):
    monkeypatch.setenv("MAKELEVEL", "1")  # as below `make sweep`, and in the tests below `make test`
    trial = Trial(0, {}, tmp_path / "t")
    (tmp_path / "Makefile").write_text("train:\n\t@exit 75\n")
    with open(trial.log, "w") as output:
        started = subprocess.run(["make", "train"], cwd=tmp_path, env=environment(0, 1), stdout=output, stderr=output)
    status = started.returncode
    assert status == 2
    assert trial.status("make", status) == 75


@pytest.mark.parametrize(
    ("given", "meant"), [("PARALELL=2", "PARALLEL"), ("paralell=2", "parallel"), ("seed=1", "run.seed")]
)
def test_a_variable_of_make_that_is_misspelt_is_proposed(given, meant):
    with pytest.raises(UserError, match=rf"did you mean {meant}\?"):
        sweep(["moe", "sweep=lr", given])
