"""Files of sweeps: W&B's format, its distributions and its rule of early termination."""

import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from datamodules.records import UserError
from experiments.config.experiment import load_config
from experiments.config.sweep_file import Hyperband, as_override, check_trials, read_sweep
from experiments.config.sweep_parameters import (
    DISTRIBUTIONS,
    fixed_trials,
    read_parameters,
    suggest_trial,
)
from experiments.sweep import main as sweep

METRIC = "metric: {name: val/mean/ndcg@10, goal: maximize}\n"
COMMAND = 'command: [make, train, "${args_no_hyphens}"]\n'
ONE = "method: grid\nparameters: {optim.lr: {value: 0.1}}\n"
LR = "optim.lr: {distribution: log_uniform_values, min: 1e-4, max: 1e-2}"


def parameters_of(text):
    return read_parameters(OmegaConf.to_container(OmegaConf.create(text)))


@pytest.fixture
def make_file(tmp_path):
    """Return a function that writes a sweep's file and returns its path."""

    def make(body):
        path = tmp_path / "mine.yaml"
        path.write_text(body + METRIC + COMMAND)
        return str(path)

    return make


def test_draws_follow_the_named_distribution():
    """Compare 4,000 draws of each distribution with those of numpy."""
    generator = np.random.default_rng(0)
    expected = {
        "uniform": ({"min": 2.0, "max": 3.0}, generator.uniform(2, 3, 4000)),
        "int_uniform": ({"min": 1, "max": 4}, generator.integers(1, 5, 4000)),
        "q_uniform": ({"min": 0, "max": 1, "q": 0.25}, np.round(generator.uniform(0, 1, 4000) / 0.25) * 0.25),
        "log_uniform_values": ({"min": 1e-4, "max": 1e-1}, 10 ** generator.uniform(-4, -1, 4000)),
        "q_log_uniform_values": ({"min": 1, "max": 100}, np.exp(generator.uniform(0, math.log(100), 4000))),
        "normal": ({"mu": 5, "sigma": 0.5}, generator.normal(5, 0.5, 4000)),
        "q_normal": ({"mu": 0, "sigma": 9, "q": 2}, np.round(generator.normal(0, 9, 4000) / 2) * 2),
        "log_normal": ({"mu": 1, "sigma": 0.1}, generator.lognormal(1, 0.1, 4000)),
        "q_log_normal": ({"mu": 3, "sigma": 0.5, "q": 1}, np.round(generator.lognormal(3, 0.5, 4000))),
        "constant": ({"value": 7}, np.full(4000, 7)),
        "categorical": ({"values": [1, 2], "probabilities": [0.9, 0.1]}, generator.choice([1, 2], 4000, p=[0.9, 0.1])),
    }
    assert expected.keys() == DISTRIBUTIONS.keys()
    for name, (settings, wanted) in expected.items():
        (parameter,) = read_parameters({"x": {"distribution": name, **settings}})
        drawn = [parameter.draw(random.Random(f"{name}/{i}")) for i in range(4000)]
        spread = np.std(wanted) or 1
        assert abs(np.mean(drawn) - np.mean(wanted)) < 0.1 * spread, name
        assert abs(np.std(drawn) - np.std(wanted)) < 0.1 * spread, name
        assert {type(value) for value in drawn} <= {int, float}, name
        if "q" in settings:
            assert np.allclose(np.array(drawn) / settings["q"], np.round(np.array(drawn) / settings["q"])), name


def test_a_grid_has_every_combination_once():
    nested = "d: {value: x}, e: {distribution: q_uniform, min: 0.0, max: 0.2, q: 0.1}"
    text = f"a: {{values: [1, null]}}\nb: {{min: 0, max: 2}}\nc: {{parameters: {{{nested}}}}}"
    trials = list(fixed_trials("grid", parameters_of(text), None))
    combinations = {(t["a"], t["b"], t["c.d"], t["c.e"]) for t in trials}
    assert combinations == {(a, b, "x", e) for a in (1, None) for b in (0, 1, 2) for e in (0.0, 0.1, 0.2)}
    assert len(trials) == 18
    assert trials[0] == {"a": 1, "b": 0, "c.d": "x", "c.e": 0.0}
    assert len(list(fixed_trials("grid", parameters_of(text), 5))) == 5


def test_a_random_trial_depends_on_its_number_alone():
    three, five = (list(fixed_trials("random", parameters_of(LR), count)) for count in (3, 5))
    assert five[:3] == three
    assert len({trial["optim.lr"] for trial in five}) == 5
    # As in earlier versions, so that their sweeps can be resumed.
    assert three[0]["optim.lr"] == pytest.approx(0.00015409382214506446, rel=1e-12)


def test_bayes_moves_towards_the_best_values():
    text = "a: {min: 0.0, max: 1.0}\nb: {values: [x, [1, 2], null]}\nc: {value: 7}\nd: {min: 1, max: 4}"
    parameters, past = parameters_of(text), []
    for number in range(40):
        values = suggest_trial(parameters, past, maximize=True, number=number)
        assert values == suggest_trial(parameters, past, maximize=True, number=number)
        past.append((values, -abs(values["a"] - 0.3) - (values["b"] != [1, 2])))
    assert {values["c"] for values, _ in past} == {7}
    assert {type(values["d"]) for values, _ in past} == {int}
    last = past[-10:]
    assert sum(values["b"] == [1, 2] for values, _ in last) >= 5
    assert np.mean([abs(values["a"] - 0.3) for values, _ in last]) < 0.2


def test_bayes_accepts_running_trials_and_values_rounded_out_of_the_range():
    # It was an IndexError.
    with pytest.raises(UserError, match="parameters.a: no multiple of q=1 lies between min and max"):
        parameters_of("a: {distribution: q_uniform, min: 0.1, max: 0.9, q: 1}")[0].grid()
    parameters = parameters_of("a: {distribution: q_uniform, min: 0.04, max: 0.96, q: 0.1}")
    past = [({"a": a / 10}, -a) for a in range(11)]
    values = suggest_trial(parameters, [*past, ({"a": 0.2}, None)], maximize=True, number=12)
    assert values["a"] in [round(a / 10, 1) for a in range(11)]


@pytest.mark.parametrize(
    ("body", "messages"),
    [
        ("method: grid\nparameters: {optim.lrr: {value: 1}}\n", ["trial 0", "unknown key optim.lrr", "optim.lr?"]),
        ("method: grid\nparameters: {data.batch_size: {values: [8, 2.5]}}\n", ["trial 1", "data.batch_size", "2.5"]),
        ("method: grid\nparameters: {optim.lr: {min: 0.1, max: 1.0}}\n", ["optim.lr: uniform has no grid"]),
        ("method: random\nparameters: {optim.lr: {min: 0.1, max: 1.0}}\n", ["run_cap", "is missing"]),
        ("method: bayes\nparameters: {optim.lr: {min: 0.1, max: 1.0}}\n", ["run_cap", "is missing"]),
        (
            "method: bayes\nrun_cap: 3\nparameters: {optim.lr: {distribution: normal}}\n",
            ["parameters.optim.lr: method bayes needs min and max, or values"],
        ),
        ("method: hunt\nparameters: {optim.lr: {value: 1}}\n", ["method: ", "'hunt'", "grid", "random"]),
        (f"metod: grid\n{ONE}", ["unknown key metod", "method"]),
        ("method: grid\n", ["parameters: missing"]),
        ("method: grid\nparameters: {optim.lr: 0.1}\n", ["parameters.optim.lr", "got 0.1"]),
        (
            "method: grid\nparameters: {optim.lr: {min: 1, max: 2.0}}\n",
            ["both be whole numbers, or both have a decimal point"],
        ),
        ("method: grid\nparameters: {optim.lr: {min: 2, max: 1}}\n", ["min 2 is above max 1"]),
        ("method: grid\nparameters: {run.seed: {min: 1, max: 100000000000000000000}}\n", ["000 values; use method"]),
        ("method: grid\nparameters: {optim.lr: {values: []}}\n", ["a list of at least one"]),
        ("method: grid\nparameters: {optim.lr: {vales: [1]}}\n", ["expected value, values"]),
        (
            "method: grid\nparameters: {optim.lr: {distribution: log_uniform, min: -9, max: -1}}\n",
            ["got 'log_uniform', use log_uniform_values, whose min and max are values"],
        ),
        (
            "method: grid\nparameters: {optim.lr: {distribution: normal, mean: 1}}\n",
            ["unknown key 'mean'; normal has mu, sigma"],
        ),
        *(
            (
                f"method: random\nrun_cap: 1\nparameters: {{optim.lr: {{values: [0.1, 1], probabilities: {given}}}}}\n",
                ["optim.lr.probabilities: expected 2 non-negative numbers with the sum 1, got"],
            )
            for given in ("[0.5]", "[0.5, 0.6]", "[2, -1]", "[a, b]", "0.5")
        ),
        ("method: grid\nparameters: {optim.lr: {distribution: [normal]}}\n", ["distribution: got ['normal']"]),
        (f"{ONE}run_cap: 0\n", ["run_cap: expected a number of at least 1, got 0"]),
        (f"{ONE}early_terminate: {{type: hyperban, min_iter: 1}}\n", ["early_terminate.type: ", "'hyperban'"]),
        (f"{ONE}early_terminate: {{type: hyperband, min: 1}}\n", ["unknown key early_terminate.min", "min_iter"]),
        (f"{ONE}early_terminate: {{}}\n", ["no value for early_terminate.type"]),
        (
            f"{ONE}early_terminate: {{type: hyperband}}\n",
            ["expected either min_iter, or s with a max_iter above eta"],
        ),
        (
            f"{ONE}early_terminate: {{type: hyperband, max_iter: 9}}\n",
            ["expected either min_iter, or s with a max_iter above eta"],
        ),
        (
            f"{ONE}early_terminate: {{type: hyperband, min_iter: 3, max_iter: 9, s: 1}}\n",
            ["expected either min_iter, or s with a max_iter above eta"],
        ),
        (f"{ONE}early_terminate: {{type: hyperband, min_iter: 1.5}}\n", ["min_iter: ", "1.5", "Integer"]),
        (
            f"{ONE}early_terminate: {{type: hyperband, min_iter: 1, eta: 1}}\n",
            ["early_terminate.eta: expected a number above 1", "got 1"],
        ),
        (f"{ONE}early_terminate: {{type: hyperband, min_iter: 1, strict: 3.5}}\n", ["early_terminate.strict"]),
        (
            f"{ONE}early_terminate: {{type: hyperband, max_iter: 2, s: 1, eta: 3}}\n",
            ["expected either min_iter, or s with a max_iter above eta"],
        ),
        (
            f"{ONE}early_terminate: {{type: hyperband, min_iter: 1{'0' * 400}}}\n",
            ["min_iter: the number is too large"],
        ),
        (
            f"{ONE}early_terminate: {{type: hyperband, min_iter: 1, eta: 1{'0' * 400}}}\n",
            ["eta: the number is too large"],
        ),
        # A run of the sample has two evaluations, the second one at its end, when nothing is left to stop.
        (
            f"{ONE}early_terminate: {{type: hyperband, min_iter: 2}}\n",
            ["after 2 values of val/mean/ndcg@10", "logs only 2"],
        ),
    ],
)
def test_errors_name_the_key_the_value_and_what_is_expected(make_file, body, messages):
    path = make_file(body)
    with pytest.raises(UserError) as caught:
        sweep(["moe", f"sweep={path}"])
    for message in messages:
        assert message in str(caught.value)


def test_the_metric_must_be_one_that_runs_log(make_file):
    path = Path(make_file("method: grid\nparameters: {optim.lr: {value: 1.0}}\n"))
    path.write_text(path.read_text().replace("val/mean/ndcg@10", "val/mean/ndgc@10"))
    with pytest.raises(UserError, match=r"no run logs 'val/mean/ndgc@10'; did you mean val/mean/ndcg@10\?"):
        sweep(["moe", f"sweep={path}"])
    path.write_text(path.read_text().replace("ndgc", "ndcg"))
    with pytest.raises(UserError, match="no run logs"):
        sweep(["moe", f"sweep={path}", "evaluation.every_n_steps=0"])
    with pytest.raises(UserError, match="did you mean seeds"):
        sweep(["moe", "sweep=sedes"])


def test_the_metric_may_be_one_that_diagnostics_and_mining_log(make_file):
    path = Path(make_file(ONE))
    overrides, text = ["diagnostics.every_n_steps=5", "mining.every_n_steps=5"], path.read_text()
    task = load_config("moe").tasks[0]
    logged = [f"diag/{task}/gradient_norm", f"diag/{task}/transplant/{task}", "diag/experts/a-b/distance"]
    for name in (*logged, f"mine/{task}/margin_p50", "diag/seconds"):
        path.write_text(text.replace("val/mean/ndcg@10", name))
        check_trials(read_sweep(str(path), "moe", overrides))
        if name.startswith("mine/"):  # refused before
            check_trials(read_sweep(str(path), "moe", ["mining.every_n_epochs=1"]))
        with pytest.raises(UserError, match="no run logs"):
            check_trials(read_sweep(str(path), "moe"))
    for name in ("diag/nonsense", f"diag/{task}/gradient_nrom", f"mine/{task}/margin_p5"):
        path.write_text(text.replace("val/mean/ndcg@10", name))
        with pytest.raises(UserError, match=f"no run logs '{name}'"):
            check_trials(read_sweep(str(path), "moe", overrides))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("val/mean/ndcg@10", "null", "metric.name: "),
        ("val/mean/ndcg@10", "[a]", r"metric.name: .*\['a'\]"),
        ("{name: val/mean/ndcg@10, goal: maximize}", "x", "metric: expected keys with values, got 'x'"),
        ("{name: val/mean/ndcg@10, goal: maximize}", "{goal: maximize}", "no value for metric.name"),
        ("goal: maximize", "goal: up", "metric.goal: .*'up'"),
        ("{optim.lr: {value: 0.1}}", "5", "parameters: expected keys with values, got 5"),
        ("{optim.lr: {value: 0.1}}", "[a]", r"parameters: expected keys with values, got \['a'\]"),
        ("{value: 0.1}", "{parameters: x}", "parameters.optim.lr.parameters: expected keys with values, got 'x'"),
        ("{value: 0.1}", "{1: 0.1}", "parameters.optim.lr: expected value, values, .* got 1"),
        ("{value: 0.1}", "{min: 0.0, max: .inf}", "parameters.optim.lr.max: expected a number, got inf"),
        ("{value: 0.1}", "{values: [{a: 1, 2: 3}]}", "the keys of a mapping must be all texts"),
        ('[make, train, "${args_no_hyphens}"]', "5", "command: expected a list"),
        ('[make, train, "${args_no_hyphens}"]', "make train ${args_no_hyphens}", "command: expected a list"),
        ('[make, train, "${args_no_hyphens}"]', '["${args_no_hyphens}"]', "command: expected a list of a program"),
    ],
)
def test_values_of_another_type_are_refused(make_file, old, new, message):
    path = Path(make_file(ONE))
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}: .*{message}"):
        read_sweep(str(path), "moe")


@pytest.mark.parametrize(
    "value", [0.1, 1e-5, 3, True, None, [1, 2], ["a", None], {"T": 2.0}, "mod2", "null", "1", "it's: $x y", ""]
)
def test_overrides_keep_the_type_of_a_value(value):
    text = as_override("x.y", value)
    assert OmegaConf.to_container(OmegaConf.from_dotlist([text])) == {"x": {"y": value}}


def test_values_may_be_written_as_python_prints_them():
    """W&B's agent passes values this way."""
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


def test_brackets_are_those_of_wandbs_documentation():
    assert Hyperband("hyperband", min_iter=3).brackets()[:4] == [3, 9, 27, 81]
    assert Hyperband("hyperband", max_iter=27, s=2).brackets() == [3, 9]
    assert Hyperband("hyperband", max_iter=27, s=9, eta=2.5).brackets() == [1, 4, 10]
    assert Hyperband("hyperband", max_iter=27, s=10**9).brackets() == [1, 3, 9]
    assert Hyperband("hyperband", min_iter=1, eta=2000).brackets() == [1, 2000, 4_000_000]


@pytest.mark.parametrize(
    ("values", "others", "strict", "is_stopped"),
    [  # Worked out by hand: brackets 2 and 4, half of the trials continue, larger is better.
        ([0.1], [[0.9, 0.9]], False, False),  # before the first bracket
        ([0.1, 0.2], [], False, False),  # the first trial to reach the bracket
        ([0.1, 0.2], [[0.9]], False, False),
        ([0.1, 0.2], [[0.1, 0.3]], False, True),  # one of two continues
        ([0.1, 0.3], [[0.1, 0.3]], False, False),  # ties continue
        ([0.1, 0.2], [[0, 0.3], [0, 0.1]], False, False),  # two of three continue, rounded up
        ([0.1, 0.2], [[0, 0.3], [0, 0.4]], False, True),
        ([0.1, 0.2], [[0, 0.3], [0, 0.4], [0.5]], False, True),  # trials that have not reached it do not count
        ([0.5, 0.2], [[0, 0.3]], False, False),  # the best value counts,
        ([0.5, 0.2], [[0, 0.3]], True, True),  # or if strict, the value at the bracket
        ([0.1, 0.2, 0.4], [[0, 0.3, 0.9]], False, False),
        ([0.1, 0.2, 0.4], [[0, 0.3, 0.9]], True, True),
        ([0.1, 0.2, 0.4, 0.5], [[0.9, 0.9, 0.9, 0.4]], True, False),  # only the last bracket counts
        ([0.1, float("nan")], [[0, 0.3]], True, True),
    ],
)
def test_a_trial_outside_the_best_share_is_stopped(values, others, strict, is_stopped):
    rule = Hyperband("hyperband", min_iter=2, eta=2, strict=strict)
    for sign, maximize in ((1, True), (-1, False)):
        signed = [[sign * value for value in each] for each in (values, *others)]
        assert bool(rule.reason(signed[0], signed[1:], maximize)) == is_stopped
    reason = Hyperband("hyperband", min_iter=2, eta=2).reason([0.1, 0.2], [[0, 0.3]], True)
    assert reason == "0.2 at value 2; the best 1 of 2 trials reached 0.3"
