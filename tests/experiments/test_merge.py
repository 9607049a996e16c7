"""The command merge: fixed weights and weights chosen on dev data, and what can be done with a merged model."""

import json
import shutil

import pytest
import torch

from datamodules.readers.beir import write_beir
from datamodules.records import UserError
from experiments.evaluate import main as evaluate
from experiments.export import main as export
from experiments.merge import main as merge
from experiments.train import train
from lightning_modules.encoders.loading import load_encoder
from lightning_modules.merging import Weights
from lightning_modules.merging import merge as merged_encoder
from tests.conftest import TASKS, toy_collection
from tests.experiments.test_train import TINY
from tests.lightning_modules.encoders.test_checkpoints import scrambled

SHORT = [*TINY, "trainer.max_steps=2", "evaluation.baselines=false"]


@pytest.fixture
def models(make_encoder, make_backbone, tmp_path):
    """Folders of two trained encoders with experts, their plain start, and dev data, one set for each of two tasks."""
    for name, encoder in {"a": scrambled(make_encoder(), 1), "b": scrambled(make_encoder(), 2)}.items():
        encoder.save_pretrained(tmp_path / name)
    backbone, tokenizer = make_backbone()
    backbone.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    for name in ("held_out", "other"):
        write_beir(toy_collection(papers=name == "other"), tmp_path / name)
    return tmp_path


def recipe_of(folder):
    return json.loads((folder / "merge.json").read_text())


def test_fixed_weights_with_a_pretrained_start(models):
    merge(
        [f"model={models / 'a'},{models / 'start'}", "weights=0.7,0.3", f"output={models / 'new'}", "parts=search:1:0"]
    )
    a, start, new = (load_encoder(models / name) for name in ("a", "start", "new"))
    assert new.tasks == a.tasks
    name = "backbone.encoder.layer.1.attention.output.dense"
    ours, plain = new.state_dict(), start.state_dict()[f"{name}.weight"]
    theirs = a.state_dict()
    assert torch.equal(ours[f"{name}.experts.search.weight"], theirs[f"{name}.experts.search.weight"])
    expected = 0.7 * theirs[f"{name}.experts.classification.weight"] + 0.3 * plain
    torch.testing.assert_close(ours[f"{name}.experts.classification.weight"], expected)
    card = (models / "new" / "README.md").read_text()
    assert "| a | 0.7 |" in card
    assert "search: 1.0 0.0" in card
    assert recipe_of(models / "new")["parts"] == {"search": [1.0, 0.0]}


def test_a_merge_that_is_repeated_changes_nothing(models, caplog):
    """A study whose runner was killed during a merge could not continue, because the folder already existed."""
    command = [f"model={models / 'a'},{models / 'b'}", f"output={models / 'new'}"]
    merge(command)
    before = {path: path.stat().st_mtime_ns for path in models.rglob("*")}
    caplog.set_level("INFO")
    merge(command)
    assert {path: path.stat().st_mtime_ns for path in models.rglob("*")} == before
    assert "new is complete: the same command has merged the same models" in caplog.text
    with pytest.raises(UserError, match="already exists"):
        merge([*command, "weights=0.7,0.3"])
    shutil.rmtree(models / "a")
    shutil.copytree(models / "b", models / "a")  # the command is the same, but the model is another one
    with pytest.raises(UserError, match="already exists"):
        merge(command)


def dev_score(model, folder, task):
    """Return the nDCG@10 of a saved model, from the command eval."""
    output = model / f"eval-{task}"
    evaluate([f"model={model}", f"beir={folder}", f"task={task}", "split=dev", f"output={output}", "metrics=ndcg@10"])
    (table,) = json.loads((output / "results.json").read_text())["benchmarks"].values()
    return table["systems"]["encoder"]["ndcg@10"]


def test_weights_are_chosen_by_the_mean_over_dev_sets(models, capsys):
    """The recipe has the scores that make eval gives to the merged models, and the chosen weights are the best ones."""
    sets = f"search:{models / 'held_out'},link_prediction:{models / 'other'}"
    arguments = [f"model={models / 'a'},{models / 'start'}", f"dev={sets}"]
    merge([*arguments, "choose=sweep", "sweep=0,0.5,1", f"output={models / 'swept'}"])
    recipe = recipe_of(models / "swept")
    assert [trial["weights"] for trial in recipe["tried"]] == ["0 1", "0.5 0.5", "1 0"]
    for trial, weights in zip(recipe["tried"], ("0,1", "0.5,0.5", "1,0"), strict=True):
        folder = models / f"fixed-{weights.replace(',', '-')}"
        merge([*arguments, f"weights={weights}", f"output={folder}"])
        expected = {
            "held_out": dev_score(folder, models / "held_out", "search"),
            "other": dev_score(folder, models / "other", "link_prediction"),
        }
        assert trial["scores"] == pytest.approx(expected)
        assert trial["mean"] == pytest.approx(sum(expected.values()) / 2)
        assert recipe_of(folder)["tried"] == [trial]
    best = max(recipe["tried"], key=lambda trial: trial["mean"])
    assert recipe["chosen"] == best["weights"]
    printed = capsys.readouterr().out
    assert f"{best['weights']} *" in printed
    card = (models / "swept" / "README.md").read_text()
    assert r"other (link\_prediction, dev)" in card
    assert all(f"| {trial['weights']} | {trial['mean']:.4f} |" in card for trial in recipe["tried"])


def test_weights_are_chosen_for_each_part(models):
    arguments = [f"model={models / 'a'},{models / 'b'}", f"dev=search:{models / 'held_out'}", "sweep=0,1"]
    merge([*arguments, "choose=parts", "method=slerp", f"output={models / 'new'}"])
    recipe = recipe_of(models / "new")
    chosen_parts, tried = set(recipe["parts"]), {trial["weights"].split("; ")[-1] for trial in recipe["tried"]}
    assert len(recipe["tried"]) == 2 + 5  # the other weight for each of the five parts
    assert chosen_parts <= {"embeddings", "shared", *TASKS} == {text.split(" ")[0] for text in tried} - {"0", "1"}
    (chosen,) = [trial for trial in recipe["tried"] if trial["weights"] == recipe["chosen"]]
    assert chosen["mean"] == max(trial["mean"] for trial in recipe["tried"])


def test_greedy_soup_of_three_models(models):
    names = [str(models / name) for name in ("a", "b", "start")]
    merge(
        [f"model={','.join(names)}", "choose=greedy", f"dev=search:{models / 'held_out'}", f"output={models / 'new'}"]
    )
    recipe = recipe_of(models / "new")
    assert [trial["weights"] for trial in recipe["tried"][:3]] == ["1 0 0", "0 1 0", "0 0 1"]
    (chosen,) = [trial for trial in recipe["tried"] if trial["weights"] == recipe["chosen"]]
    assert chosen["mean"] >= max(trial["mean"] for trial in recipe["tried"][:3])


@pytest.mark.slow
def test_runs_and_checkpoints_are_merged_and_the_result_is_used_like_any_model(tmp_path):
    train("vanilla", [*SHORT, f"run.dir={tmp_path / 'vanilla'}", "optim.lr=0.01"])
    train("moe", [*SHORT, f"run.dir={tmp_path / 'moe'}", "optim.lr=0.01", f"init_from={tmp_path / 'vanilla'}"])
    checkpoint = tmp_path / "vanilla" / "checkpoints" / "last.ckpt"
    merge([f"model={tmp_path / 'moe'},{checkpoint}", "choose=sweep", "sweep=0,0.5,1", f"output={tmp_path / 'merged'}"])
    recipe = recipe_of(tmp_path / "merged")
    assert [entry["name"] for entry in recipe["dev"]] == ["topics", "citations", "searches"]
    merged = load_encoder(tmp_path / "merged")
    assert merged.similarity == "cosine"
    card = (tmp_path / "merged" / "README.md").read_text()
    for name, path in {"moe": tmp_path / "moe", "last.ckpt": checkpoint}.items():
        assert f"| {name}, {load_encoder(path).origin} |" in card
    assert "| checkpoint |" not in card

    evaluate([f"model={tmp_path / 'merged'}", f"run={tmp_path / 'moe'}", "split=dev", f"output={tmp_path / 'eval'}"])
    tables = json.loads((tmp_path / "eval" / "results.json").read_text())["benchmarks"]
    scores = {name: table["systems"]["encoder"]["ndcg@10"] for name, table in tables.items()}
    (chosen,) = [trial for trial in recipe["tried"] if trial["weights"] == recipe["chosen"]]
    assert scores == pytest.approx(chosen["scores"], abs=1e-6)
    export([f"model={tmp_path / 'merged'}", "task=search", f"output={tmp_path / 'plain'}"])
    assert "## Merge" in (tmp_path / "plain" / "README.md").read_text()
    train("moe", [*SHORT, f"run.dir={tmp_path / 'next'}", f"init_from={tmp_path / 'merged'}", "optim.lr=1e-12"])
    again = load_encoder(tmp_path / "next").encode(["a study"], "search")
    torch.testing.assert_close(again, merged.encode(["a study"], "search"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model={a}"], "model: expected two or more different models"),
        (["model={a},{a}"], "model: expected two or more different models"),
        (["model={a},{b},{start}", "choose=sweep"], "choose: sweep needs two models, got 3; use greedy"),
        (["model={a},{b}", "choose=greedy", "method=slerp"], "method: greedy soups are linear"),
        (["model={a},{b}", "choose=sweep", "weights=1,2"], "weights, parts: leave them out, because choose=sweep"),
        (["model={a},{b}", "choose=sweep"], "dev: none of the models belongs to a run"),
        (["model={a},{b}", "choose=sweep", "dev=held_out"], "dev: expected run or TASK:FOLDER"),
        (["model={a},{b}", "dev=search:{held_out},search:{held_out}"], "dev: two dev sets are called held_out"),
        (["model={a},{b}", "dev=serach:{held_out}"], "unknown task 'serach'"),
        (["model={a},{b}", "benchmarks=all"], "benchmarks, data.root: set both"),
        (["model={a},{b}", "suite={held_out}"], "suite: .*held_out is not a file"),
        (["model={a},{b}", "suite={held_out}/corpus.jsonl"], "suite: set benchmarks=all"),
        (["model={a},{b}", "metric=ndgc"], "ndgc"),
        (["model={a},{b}", "weights=1"], "weights: expected 2 weights"),
        (["model={a},{b}", "parts=search:x:1"], "parts: expected PART:WEIGHT:WEIGHT"),
        (["model={a},{b}", "parts=search:1:0,search:0:1"], "parts: expected one value for search, got '1:0' and '0:1'"),
        (["model={a},{b}", "parts=serach:1:1"], "unknown part 'serach'"),
        (["model={start},{a}"], "name the MoEEncoder first"),
    ],
)
def test_impossible_merges_are_refused_and_leave_no_folder(models, arguments, message):
    names = {name: models / name for name in ("a", "b", "start", "held_out")}
    with pytest.raises(UserError, match=message):
        merge([argument.format(**names) for argument in arguments] + [f"output={models / 'new'}"])
    assert not (models / "new").exists()


def test_a_training_ends_with_an_average_with_its_start(models, tmp_path):
    """A resumed run still averages with the model that it began from, even if its folder holds another one by now."""
    run, start = tmp_path / "run", load_encoder(models / "a")
    shared = [*TINY, "evaluation.split=none", "encoder.pooling=cls", f"init_from={models / 'a'}", f"run.dir={run}"]
    shared += ["evaluation.every_n_steps=0", "trainer.start_share=0.25", "trainer.ema=0.5"]
    for steps in (2, 4):
        train("moe", [*shared, f"trainer.max_steps={steps}"])
        trained = load_encoder(run / "checkpoints" / "last.ckpt")
        expected = merged_encoder({"trained": trained, "start": start}, Weights((0.75, 0.25))).state_dict()
        found = load_encoder(run).state_dict()
        assert load_encoder(run).origin.startswith(f"checkpoints/merged.ckpt of step {steps} (average of")
        assert all(torch.equal(expected[name], found[name]) for name in expected | found)
        assert any(not torch.equal(found[name], tensor) for name, tensor in trained.state_dict().items())
        results = json.loads((run / "results.json").read_text())
        assert (results["checkpoint"], results["checkpoint_step"]) == ("merged.ckpt", steps)
        shutil.rmtree(models / "a")
        load_encoder(models / "b").save_pretrained(models / "a")
    with pytest.raises(UserError):  # the batches of a longer training differ
        train("moe", [*shared, "trainer.max_steps=6", "data.batch_size=3"])
    assert all(torch.equal(found[name], tensor) for name, tensor in load_encoder(run).state_dict().items())
    (run / "checkpoints" / "start.ckpt").unlink()
    with pytest.raises(UserError, match=r"start_share: .*start\.ckpt.*No such file.*Restore it, or use make merge"):
        train("moe", [*shared, "trainer.max_steps=6"])


def test_random_weights_are_not_averaged_with_their_start(tmp_path, caplog):
    train("vanilla", [*SHORT, f"run.dir={tmp_path}", "trainer.start_share=0.25"])
    assert "trainer.start_share has no effect: the weights before training are random" in caplog.text
    assert not (tmp_path / "checkpoints" / "merged.ckpt").exists()
    with pytest.raises(UserError, match=r"trainer\.start_share: does not support backbone\.lora; use make merge"):
        train("lora", [*SHORT, f"run.dir={tmp_path / 'lora'}", "trainer.start_share=0.25"])
