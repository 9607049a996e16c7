"""Studies: what they run, that nothing runs twice, and that every number of a page is one of a file."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import yaml

from datamodules.locks import lock_file
from datamodules.readers.beir import write_beir
from datamodules.records import UserError
from experiments.config.arguments import parse
from experiments.config.experiment import load_config, parse_experiment
from experiments.config.study_file import read_study, studies
from experiments.evaluate import EvaluateOptions
from experiments.merge import MergeOptions
from experiments.mine import MineOptions
from experiments.results.interference import interference
from experiments.results.study_page import collect, page, plot_of, records
from experiments.run import jobs as jobs_module
from experiments.run.jobs import JobRunner, is_complete, seconds_of
from experiments.study import StudyOptions, _chosen, main, write_page
from experiments.sweep import main as sweep
from lightning_modules.distributed.signals import Preempted
from tests.conftest import toy_collection

ROOT = Path(__file__).parents[2]
SUITES = ROOT / "experiments" / "studies" / "benchmarks"
FILE = """
title: A study
seeds: [0, 1]
values: {steps: "3", train: "a=1 'b=two words' steps={steps}"}
arms:
  start: {model: "package:start"}
  one: {commands: ["train one {folder} seed={seed} {train}", "mine {folder}"]}
  both: {commands: ["merge model={one},{start} output={folder}"], seeds: [1]}
evaluate: eval {model} output={output}
start: start
held_out: [links]
transplants: {links_by_search: links}
compare: [[one, start], [both, one, search]]
"""
# A stand-in for all commands. It notes its arguments, and evaluates a model to numbers that its name determines.
STUB = """
import json, os, sys, time, zlib
from pathlib import Path
command, words = sys.argv[1], sys.argv[2:]
with open(Path(__file__).with_name("calls"), "a") as file:
    file.write(json.dumps([command, *words]) + chr(10))
if command == "train" and "sleep" in words[-1]:
    Path(__file__).with_name("asleep").touch()
    time.sleep(60)
if command == "train" and "fail" in words[-1]:
    sys.exit("no such luck")
if command == "train":
    Path(words[1]).mkdir(exist_ok=True)
    cosines = [zlib.crc32(f"{words[1]}{step}".encode()) % 200 / 100 - 1 for step in (1, 2)]
    rows = [json.dumps({"diag/search/gradient_cosine/link_prediction": cosine}) for cosine in cosines]
    (Path(words[1]) / "metrics.jsonl").write_text(chr(10).join(rows))
if command == "eval":
    output = Path(words[-1].partition("=")[2])
    (output / "runs").mkdir(parents=True)
    benchmarks = {}
    tasks = {"questions": "search", "links": "link_prediction", "links_by_search": "search"}
    for name, task in tasks.items():
        values = [zlib.crc32(f"{words[0]}{name}{query}".encode()) % 1000 / 1000 for query in range(30)]
        lines = [f"q{query}" + chr(9) + str(value) for query, value in enumerate(values)]
        lines.insert(0, "query" + chr(9) + "ndcg@10")
        (output / "runs" / f"{name}.encoder.queries.tsv").write_text(chr(10).join(lines))
        keys = {"task": task, "split": "test", "protocol": name, "data": name[0], "metrics": ["ndcg@10"]}
        keys |= {"queries": 30, "documents": 9}
        systems = {"systems": {"encoder": {"ndcg@10": sum(values) / 30}}, "measured": {"encoder": {"device": "a CPU"}}}
        benchmarks[name] = keys | systems
    content = {"model": words[0], "metrics": ["ndcg@10"], "benchmarks": benchmarks}
    (output / "results.json").write_text(json.dumps(content))
"""


@pytest.fixture
def make_study(tmp_path, monkeypatch):
    """Return a function that writes a study's file, whose commands run the stub, and reads it."""
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(jobs_module, "PROGRAM", (sys.executable, str(tmp_path / "stub.py")))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

    def make(text=FILE, **options):
        (tmp_path / "mine.yaml").write_text(text)
        return read_study(str(tmp_path / "mine.yaml"), tmp_path / "out", **options)

    yield make
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def calls(tmp_path):
    def read():
        return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]

    return read


def test_commands_of_each_job(make_study):
    study = make_study()
    folder = str(study.folder)
    assert [(job.name, job.needs) for job in study.jobs] == [
        ("start", set()),
        ("one-seed0", set()),
        ("one-seed1", set()),
        ("both-seed1", {"one-seed1"}),
    ]
    start, one, _, both = study.jobs
    assert start.commands == (("eval", "package:start", f"output={folder}/start.results"),)
    train = ("train", "one", f"{folder}/one-seed0", "seed=0", "a=1", "b=two words", "steps=3")
    evaluate = ("eval", f"{folder}/one-seed0", f"output={folder}/one-seed0.results")
    assert one.commands == (train, ("mine", f"{folder}/one-seed0"), evaluate)
    merge = ("merge", f"model={folder}/one-seed1,package:start", f"output={folder}/both-seed1")
    assert both.commands[0] == merge
    assert make_study(values=["steps=7"]).jobs[1].commands[0][-1] == "steps=7"
    titled = FILE.replace("title: A study", "title: After {steps} steps")
    assert make_study(titled, values=["steps=7"]).settings.title == "After 7 steps"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('commands: ["merge', 'model: x, commands: ["merge', "arms.both: expected model or commands, got both"),
        ('model: "package:start"', "about: nothing", "arms.start: expected model or commands, got neither"),
        ("{one},{start}", "{on},{start}", "arms.both: unknown placeholder 'on'"),
        ("seeds: [1]", "seeds: [2]", "arms.both: unknown placeholder 'one'"),
        ("seeds: [1]", "seeds: [1, 1]", "arms.both: expected different seeds"),
        ("  start:", "  ../start:", "arms.../start: expected a name"),
        ("start: start", "start: none", "start: unknown arm 'none'"),
        ("[one, start]", "[one]", "compare: expected pairs of arms"),
        ('steps: "3"', 'seed: "3", steps: "3"', "values.seed: this name is reserved"),
        ('steps: "3"', 'start: "3", steps: "3"', "values.start: this name is reserved"),
        ("  start:", "  here: {model: bm25}\n  start:", "arms.here: this name is reserved"),
        ("'b=two words'", "'b=two words", "cannot be split into words"),
        ("merge model={one}", "merge model={both}", "arms.both: unknown placeholder 'both'"),
        ("  start:", "  one-seed1: {model: bm25}\n  start:", "arms.one: one-seed1 also has a job called one-seed1"),
        ("seeds: [1]", "seeds: [1, {a: 2}]", "seeds: expected a list of whole numbers, but it contains {'a': 2}"),
        ('steps: "3"', "steps: [3]", "values: expected a mapping of texts, but it contains [3]"),
        ("title:", "titel:", "titel"),
        ("title: A study", "title: On {stops}", "title: unknown placeholder 'stops'"),
    ],
)
def test_errors_of_the_file(make_study, old, new, message):
    assert FILE.count(old) == 1
    with pytest.raises(UserError, match=re.escape(message)):
        make_study(FILE.replace(old, new))


def test_arms_that_need_each_other(make_study):
    other = '  other: {commands: ["merge {one}"]}\n  one: {'
    with pytest.raises(UserError, match="both, one, other need each other"):
        make_study(FILE.replace("  one: {", other).replace("mine {", "mine {other} {"))


def test_jobs_run_once_each_after_those_it_needs(make_study, calls):
    study = make_study()
    JobRunner(study.folder, study.jobs, parallel=3).run()
    assert len(calls()) == 1 + 3 + 3 + 2
    order = [" ".join(call) for call in calls()]
    merged = next(i for i, call in enumerate(order) if call.startswith("merge"))
    assert all(order.index(" ".join(command)) < merged for command in study.jobs[2].commands)
    JobRunner(study.folder, study.jobs).run()
    assert len(calls()) == 9
    with pytest.raises(UserError, match="one-seed0 was started with other commands \\(steps=3 then, steps=7 now\\)"):
        JobRunner(study.folder, make_study(values=["steps=7"]).jobs).run()


def test_a_command_that_does_not_exist_is_refused_before_anything_runs(make_study, tmp_path):
    """`evaluate` runs only after the training, and a job was not continued with another one."""
    for old, new, message in (
        ("evaluate: eval", "evaluate: evla", "mine: evaluate: unknown command 'evla'; did you mean eval?"),
        ('"mine {folder}"', '"mien {folder}"', "mine: arms.one: unknown command 'mien'; did you mean mine?"),
        ('"mine {folder}"', '""', "mine: arms.one: unknown command ''"),
    ):
        make_study(FILE.replace(old, new))
        with pytest.raises(UserError, match=re.escape(message)):
            main([f"study={tmp_path / 'mine.yaml'}", f"output={tmp_path / 'out'}"])


def test_a_job_continues_with_another_command_in_place_of_one_that_failed(make_study, calls):
    failing = make_study(FILE.replace("eval {model} output={output}", "train {model} {output} fail"))
    JobRunner(failing.folder, failing.jobs).run()
    assert all(seconds_of(failing.folder, job) for job in failing.jobs if job.arm == "one")
    before, study = len(calls()), make_study()
    JobRunner(study.folder, study.jobs).run()
    assert all(is_complete(study.folder, job) for job in study.jobs)
    assert [call[0] for call in calls()[before:] if "both-seed1" not in " ".join(call)] == ["eval"] * 3


def test_a_failed_job_stops_only_those_that_need_it_and_runs_again(make_study, calls, caplog):
    failing = FILE.replace('seed={seed} {train}"', 'seed={seed} fail{seed}"').replace("fail{seed}", "fail")
    study = make_study(failing)
    runner = JobRunner(study.folder, study.jobs)
    runner.run()
    assert [job.name for job in runner.failed] == ["one-seed0", "one-seed1"]
    assert "no such luck" in caplog.text
    assert [call[0] for call in calls()] == ["eval", "train", "train"]
    runner.run()
    assert [call[0] for call in calls()] == ["eval", *["train"] * 4]


def test_running_commands_end_when_the_time_is_up_and_continue_later(make_study, calls, tmp_path):
    study = make_study(FILE.replace("mine {folder}", "mine {folder} {seed}").replace('{train}"', 'sleep"'))
    started = time.monotonic()
    with pytest.raises(Preempted):
        JobRunner(study.folder, study.jobs, parallel=2, minutes=2 / 60).run()
    assert time.monotonic() - started < 30
    assert [call[0] for call in calls()].count("mine") == 0
    (tmp_path / "stub.py").write_text(STUB.replace("time.sleep(60)", ""))
    JobRunner(study.folder, study.jobs).run()
    assert all(is_complete(study.folder, job) for job in study.jobs)
    assert [call[0] for call in calls()].count("mine") == 2


def test_a_command_that_ends_well_during_the_stop_is_not_run_again(make_study, monkeypatch):
    """`make merge`, for one, refuses the folder that it has made."""
    study = make_study()
    runner = JobRunner(study.folder, study.jobs[1:2])
    monkeypatch.setattr(runner, "_run_command", lambda *_: runner.stop(signal.SIGTERM) or 0)
    with pytest.raises(Preempted):
        runner.run()
    assert len(seconds_of(study.folder, study.jobs[1])) == 1


def test_a_job_whose_results_were_deleted_is_evaluated_again(make_study, calls):
    study = make_study()
    job = study.jobs[1]
    JobRunner(study.folder, [job]).run()
    shutil.rmtree(job.output)
    assert not is_complete(study.folder, job)
    JobRunner(study.folder, [job]).run()
    assert is_complete(study.folder, job)
    assert [call[0] for call in calls()] == ["train", "mine", "eval", "eval"]


def test_two_runners_share_the_jobs_of_a_folder(make_study, calls):
    study = make_study()
    code = (
        "import sys; from experiments.run import jobs; from experiments.config.study_file import read_study; "
        "from pathlib import Path; jobs.PROGRAM = (sys.executable, sys.argv[2]); "
        "study = read_study(sys.argv[1], Path(sys.argv[3])); jobs.JobRunner(study.folder, study.jobs, 2).run()"
    )
    place = study.folder.parent
    command = [sys.executable, "-c", code, place / "mine.yaml", place / "stub.py", study.folder]
    processes = [subprocess.Popen(command, cwd=ROOT, env=dict(os.environ)) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert len(calls()) == 9


def test_a_job_that_another_machine_runs_does_not_hold_up_the_others(make_study):
    """A second machine waited for the job of the first one, so the two never ran jobs at the same time."""
    study = make_study()
    study.folder.mkdir()
    with lock_file(study.folder / "one-seed0.lock"), pytest.raises(Preempted):
        JobRunner(study.folder, study.jobs, minutes=4 / 60).run()
    complete = [job.name for job in study.jobs if is_complete(study.folder, job)]
    assert complete == ["start", "one-seed1", "both-seed1"]


def test_chosen_arms_and_seeds_bring_those_they_need(make_study):
    study = make_study()
    assert [job.name for job in _chosen(study, StudyOptions(arms=("both",)))] == ["one-seed1", "both-seed1"]
    assert [job.name for job in _chosen(study, StudyOptions(seeds=(0,)))] == ["start", "one-seed0"]
    with pytest.raises(UserError, match="arms: expected some of start, one, both, got none"):
        _chosen(study, StudyOptions(arms=("none",)))


@pytest.mark.parametrize("name", ["a #1", "a: b", "a,b", "${oc.env:HOME}"])
def test_an_output_that_commands_would_read_as_another_path_raises_user_error(name):
    with pytest.raises(UserError, match=f"output: commands would read .*{re.escape(name)}.* as another path"):
        read_study("sample", Path(name))
    if "$" in name:  # a sweep quotes the others
        with pytest.raises(UserError, match=f"output: trials would read .*{re.escape(name)}.* as another path"):
            sweep(["moe", "sweep=lr", f"output={name}"])


def test_a_replaced_value_may_have_commas(make_study):
    options = parse(StudyOptions, ["values=train=[search,links],seven,steps=7"])
    study = make_study(values=options.values)
    assert study.settings.values == {"train": "[search,links],seven", "steps": "7"}


def test_a_value_given_twice_raises_user_error(make_study):
    with pytest.raises(UserError, match="values: expected one value for steps, got '3' and '4'"):
        make_study(values=["steps=3", "steps=4"])


def numbers(text):
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d+", text)]


def section(text, heading):
    """Return first cells of a row and heading of a column -> numbers, for the table below a heading of the page."""
    lines = text.partition(f"## {heading}\n")[2].partition("##")[0].replace("\\", "").splitlines()
    head, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if line.startswith("|")]
    return {
        (*row[: head.index("benchmarks") + 1 if "benchmarks" in head else 1], name): numbers(cell)
        for row in rows
        for name, cell in zip(head, row, strict=True)
    }


def test_the_page_of_any_file_name_shows_its_plot(make_study, tmp_path):
    """A space or a bracket in the name broke the link to the plot."""
    study = make_study()
    JobRunner(study.folder, study.jobs).run()
    write_page(dataclasses.replace(study, name="my <1> study"), tmp_path)
    (link,) = re.findall(r"!\[.*\]\((.*)\)", (tmp_path / "my <1> study.md").read_text())
    assert link == "my%20%3C1%3E%20study.svg"
    assert (tmp_path / unquote(link)).is_file()


def test_every_number_of_the_page_is_that_of_a_file(make_study):
    study = make_study()
    JobRunner(study.folder, study.jobs).run()
    content = collect(study)
    values = {}
    for job in study.jobs:
        for benchmark in ("questions", "links", "links_by_search"):
            lines = (job.output / "runs" / f"{benchmark}.encoder.queries.tsv").read_text().splitlines()[1:]
            values[job.name, benchmark] = np.array([float(line.split("\t")[1]) for line in lines])
    text = page(content, "mine.svg")
    for benchmark, heading in (("questions", "search"), ("links", "link_prediction")):
        table = section(text, f"Each benchmark: {heading}")
        assert table["start", benchmark] == [round(100 * values["start", benchmark].mean(), 1)]
        seeds = [100 * values[f"one-seed{seed}", benchmark].mean() for seed in (0, 1)]
        assert table["one", benchmark] == pytest.approx([np.mean(seeds), np.std(seeds, ddof=1)], abs=0.05 + 1e-9)
    gains, tests = section(text, "Gain over start"), section(text, "Comparisons")
    for row in content["gains"] + content["tests"]:
        names = {"all": ("questions", "links"), "search": ("questions",), "link_prediction": ("links",)}[row["task"]]
        jobs = [study.jobs_of(row[side]) for side in "ab"]
        common = set.intersection(*({job.seed for job in arm} for arm in jobs)) or {None, 0, 1}
        means = [
            np.mean([values[job.name, name].mean() for job in arm if job.seed in common for name in names])
            for arm in jobs
        ]
        assert row["difference"] == pytest.approx(means[0] - means[1], abs=1e-12)
        assert row["a"] != "both" or row["b"] != "one" or common == {1}
        assert row["low"] < row["difference"] < row["high"]
        shown = (tests if "p_holm" in row else gains)[f"{row['a']} − {row['b']}", row["group"], row["task"]]
        assert shown == pytest.approx([100 * row[key] for key in ("difference", "low", "high")], abs=0.05 + 1e-9)
    assert {(row["group"], row["task"]) for row in content["gains"]} == {
        ("trained on", "search"),
        ("held out", "link_prediction"),
    }
    assert content["incomplete"] == []
    plot = plot_of(content)
    assert all(f"{100 * row['difference']:+.1f}" in plot for row in content["gains"])
    for record in records(content):
        job = record["arm"] if record["seed"] is None else f"{record['arm']}-seed{record['seed']}"
        assert record["value"] == pytest.approx(values[job, record["benchmark"]].mean(), abs=1e-12)


def test_interference_and_forgetting_are_those_of_the_files(make_study):
    study = make_study()
    JobRunner(study.folder, study.jobs).run()
    content = collect(study)

    def mean(arm, benchmark):
        runs = content["arms"][arm]["runs"]
        return np.mean([run["values"][benchmark] for run in runs])

    assert content["benchmarks"]["links_by_search"]["group"] == "other expert"
    rows = {(row["arm"], row["task"], row["other"]): row for row in content["interference"]}
    pairs = [("link_prediction", "search"), ("search", "link_prediction")]
    assert set(rows) == {("one", *pair) for pair in pairs} | {(arm, *pairs[0]) for arm in ("start", "both")}
    for arm in study.arms:
        row = rows[arm, *pairs[0]]
        assert (row["own"], row["transplanted"]) == pytest.approx((mean(arm, "links"), mean(arm, "links_by_search")))
        assert row["difference"] == pytest.approx(row["transplanted"] - row["own"])
        assert row["low"] < row["difference"] < row["high"]
    logged = "\n".join(path.read_text() for path in study.folder.glob("one-seed?/metrics.jsonl")).splitlines()
    cosine = np.mean([json.loads(line)["diag/search/gradient_cosine/link_prediction"] for line in logged])
    assert len(logged) == 4
    assert [rows["one", *pair]["cosine"] for pair in pairs] == pytest.approx([cosine] * 2)
    gained = {arm: 100 * (mean(arm, "links") - mean("start", "links")) for arm in ("one", "both")}
    table = page(content, "").partition("## Held out: the worst")[2].partition("##")[0]
    shown = {line.split("|")[1].strip(): numbers(line)[0] for line in table.splitlines() if "| links |" in line}
    assert list(shown) == sorted(gained, key=gained.get)
    assert shown == pytest.approx(gained, abs=0.05 + 1e-9)


def test_cosines_are_of_the_pairs_that_every_seed_logged():
    """A pair whose cosine was never finite in one seed ended the page in a KeyError."""
    runs = [{"cosines": {"a/b": 0.5, "a/c": 0.1}}, {"cosines": {"a/b": 0.3}}]
    rows = [(row["task"], row["other"], row["cosine"]) for row in interference("moe", runs, [], {}, {})]
    assert rows == [("a", "b", pytest.approx(0.4)), ("b", "a", pytest.approx(0.4))]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "links_by_search: links",
            "links_by_search: questions",
            "transplants.links_by_search: expected the same data .* as q",
        ),
        ("links_by_search: links", "links_by_serach: links", "transplants: no arm was evaluated on links_by_serach"),
        ("held_out: [links]", "held_out: [link]", "held_out: no arm was evaluated on link;"),
    ],
)
def test_benchmarks_that_do_not_fit_raise_user_error(make_study, old, new, message):
    study = make_study(FILE.replace(old, new))
    JobRunner(study.folder, study.jobs).run()
    with pytest.raises(UserError, match=message):
        collect(study)


def test_what_is_missing_is_named_by_arm_and_seed(make_study):
    study = make_study()
    chosen = {"start", "one-seed0"}
    JobRunner(study.folder, [job for job in study.jobs if job.name in chosen]).run()
    content = collect(study)
    assert content["incomplete"] == ["one (seed 1)", "both"]
    assert "**Not complete:** one (seed 1), both." in page(content, "mine.svg")


def test_a_benchmark_that_the_first_arm_lacks_has_the_values_of_the_others(make_study):
    """The first arm of a study may lack the task that the others add."""
    study = make_study()
    JobRunner(study.folder, study.jobs).run()
    expected = collect(study)
    path = study.jobs[0].output / "results.json"
    results = json.loads(path.read_text())
    del results["benchmarks"]["questions"]
    path.write_text(json.dumps(results))
    content = collect(study)
    described, arms = content["benchmarks"], content["arms"]
    assert {name: described[name] for name in expected["benchmarks"]} == expected["benchmarks"]
    assert "questions" not in arms["start"]["runs"][0]["values"]
    assert [arms[arm] for arm in ("one", "both")] == [expected["arms"][arm] for arm in ("one", "both")]
    table = section(page(content, plot_of(content)), "Each benchmark: search")
    assert table["start", "questions"] == []
    assert len(table["one", "questions"]) == 2


def test_arms_measured_on_other_data_are_refused(make_study):
    study = make_study()
    JobRunner(study.folder, study.jobs).run()
    path = study.jobs[1].output / "results.json"
    path.write_text(path.read_text().replace('"data": "q"', '"data": "r"', 1))
    with pytest.raises(UserError, match="questions: arms cannot be compared \\(different data: q and r\\)"):
        collect(study)


@pytest.mark.parametrize("name", studies())
def test_commands_of_every_study_can_be_read(name, tmp_path, monkeypatch):
    """In any folder, with folders in place of the collections that it needs."""
    monkeypatch.chdir(tmp_path)
    values = [f"data={tmp_path}"] if "data" in read_study(name).values else []
    for collection in yaml.safe_load((SUITES / "papers.yaml").read_text())["benchmarks"] if values else ():
        write_beir(toy_collection(), tmp_path / collection)
    study = read_study(name, values=values)
    jobs = [job for job in study.jobs if job.seed in (None, study.settings.seeds[0])]
    commands = {command for job in jobs for command in job.commands}
    assert any(command == "train" for command, *_ in commands)
    for command, *arguments in commands:
        if command == "train":
            config = load_config(arguments[0], arguments[1:])
            assert all(task.data for task in config.task.values())
        elif command == "bench":
            parse_experiment(import_module(f"experiments.bench.{arguments[0]}").BenchOptions, arguments[1:])
        elif command == "mine":
            parse_experiment(MineOptions, arguments)
        else:
            options = parse({"eval": EvaluateOptions, "merge": MergeOptions}[command], arguments)
            if command == "eval":
                options.check_suite()


@pytest.mark.slow
def test_a_small_study_trains_evaluates_and_writes_its_page(tmp_path):
    tiny = "backbone.config.hidden_size=32 backbone.config.intermediate_size=32 data.batch_size=8 trainer.max_steps=2"
    shared = "evaluation.every_n_steps=0 evaluation.baselines=no diagnostics.every_n_steps=1"
    values = f"values=train={shared} {tiny} {{papers}}"
    main(["study=sample", values, f"output={tmp_path / 'study'}"])
    content = json.loads((tmp_path / "study" / "sample.json").read_text())
    assert set(content["arms"]) == {"vanilla", "moe"}
    assert {row["arm"] for row in content["interference"]} == {"vanilla", "moe"}
    assert (tmp_path / "study" / "sample.md").read_text() == page(content, "sample.svg")
    for arm in content["arms"].values():
        for run in arm["runs"]:
            results = json.loads((tmp_path / "study" / run["results"]).read_text())
            for benchmark, value in run["values"].items():
                assert value == results["benchmarks"][benchmark]["systems"]["encoder"]["ndcg@10"]
    assert not [text for text in (tmp_path / "study").glob("sample.*") if str(tmp_path) in text.read_text()]


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_pages_of_the_documentation_are_made_from_their_files(path):
    content = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == page(content, f"{path.stem}.svg")
    if content["gains"]:  # the plot shows gains over the start
        assert path.with_suffix(".svg").read_text() == plot_of(content)
