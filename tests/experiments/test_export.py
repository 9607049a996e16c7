"""The export command: all formats, their README.md, and what overwrite=yes replaces."""

import shutil

import pytest
import torch

from datamodules.records import UserError
from experiments.export import main
from experiments.train import train
from lightning_modules.encoders.loading import load_encoder
from tests.experiments.test_train import TINY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    train("moe", [*TINY, f"run.dir={folder}", "trainer.max_steps=2", "evaluation.baselines=false"])
    return folder


def test_each_task_is_exported_with_a_readme(run, capsys):
    main([f"model={run}"])
    trained = load_encoder(run)
    for task in trained.tasks:
        folder = run / "export" / "tasks" / task
        plain = load_encoder(folder, pooling="mean")
        ours = trained.encode(["some words"], task)
        torch.testing.assert_close(plain.encode(["some words"], task), ours, atol=1e-5, rtol=1e-5)
        card = (folder / "README.md").read_text()
        assert f"# Encoder for {task.replace('_', ' ')}" in card
        assert "SentenceTransformer" in card
        assert "2 steps of" in card
        assert "| topics | classification |" in card  # data
        benchmarks = {"classification": "topics", "link_prediction": "citations", "search": "searches"}
        for name, benchmark in benchmarks.items():  # only the results of this task
            assert (f"| {benchmark} | trained |" in card) == (name == task)
        assert "synthetic" in card
        assert str(run) in card
        assert "dot" not in card.split("## Encoder")[0]  # the sample scale uses cosine
    assert not list((run / "export").glob(".*"))


def test_whole_encoder_average_and_authors_layout_are_exported(run, tmp_path):
    main([f"model={run}", "format=pretrained", f"output={tmp_path / 'whole'}"])
    trained = load_encoder(run)
    whole = load_encoder(tmp_path / "whole")
    assert torch.equal(whole.encode(["some words"], "search"), trained.encode(["some words"], "search"))
    assert "load_encoder" in (tmp_path / "whole" / "README.md").read_text()
    main([f"model={tmp_path / 'whole'}", "task=average", f"output={tmp_path / 'general'}"])
    assert "mean of all its experts" in (tmp_path / "general" / "README.md").read_text()
    main([f"model={run}", "task=average"])
    assert "did not evaluate the average of its experts" in (run / "export" / "average" / "README.md").read_text()
    trained.normalize = True  # the authors' format supports only normalized means
    trained.save_pretrained(tmp_path / "normal")
    main([f"model={tmp_path / 'normal'}", "format=reference", f"output={tmp_path / 'authors.ckpt'}"])
    again = load_encoder(tmp_path / "authors.ckpt", backbone=tmp_path / "general")
    assert torch.equal(again.encode(["some words"], "search"), trained.encode(["some words"], "search"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["format=onnx"], "format: expected one of plain, pretrained, reference, got 'onnx'"),
        (["task=serach"], "unknown task 'serach'"),
        (["onnx=maybe"], "onnx: expected yes or no, got 'maybe'"),
        (["onnx=yes", "format=pretrained"], "onnx: needs format=plain, got format=pretrained"),
        (["similarity=euclid"], "similarity: expected one of dot, cosine, got 'euclid'"),
        (["taks=search"], "unknown key 'taks'"),
        (["adapters=search"], "adapters: expected task:FOLDER"),
        (["format=reference"], "not pooling mean with normalize false"),
        (["format=pretrained", "task=search"], "task: needs format=plain"),
        (["pooling=cls"], "pooling: only plain models take it"),
    ],
)
def test_invalid_options_raise_user_error_and_write_nothing(run, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        main([f"model={run}", f"output={tmp_path / 'out'}", *arguments])
    assert not list(tmp_path.iterdir())


def test_existing_files_are_not_replaced_without_overwrite(run, tmp_path):
    (tmp_path / "mine").write_text("mine")
    for format in ("plain", "pretrained"):
        with pytest.raises(UserError, match="already exists"):
            main([f"model={run}", f"output={tmp_path}", f"format={format}"])
    with pytest.raises(UserError, match="already exists"):
        main([f"model={run}", f"output={tmp_path / 'mine'}", "format=reference"])
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(UserError, match="model: required"):
        main([])


def test_overwrite_replaces_an_earlier_export(run, tmp_path):
    arguments = [f"model={run}", "task=all", f"output={tmp_path / 'out'}"]
    main(arguments)
    stale = tmp_path / "out" / "search" / "stale.txt"
    stale.write_text("from the first export")
    with pytest.raises(UserError, match="already exists; overwrite=yes replaces an earlier export"):
        main(arguments)
    assert stale.is_file()
    main([*arguments, "overwrite=yes"])
    assert not stale.exists()
    assert (tmp_path / "out" / "search" / "modules.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(run, output, message, *arguments):
    """Check that overwrite=yes refuses the output and changes nothing around it."""
    before = files_of(output.parent)
    with pytest.raises(UserError, match=message):
        main([f"model={run}", "task=search", f"output={output}", "overwrite=yes", *arguments])
    assert files_of(output.parent) == before


def test_overwrite_never_replaces_a_folder_it_did_not_write(run, tmp_path):
    repository = tmp_path / "repository"
    (repository / ".git").mkdir(parents=True)
    (repository / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (repository / "README.md").write_text("# My software")
    assert_refused(run, repository, "was not written by this command .it has no .scimult-export file")
    projects = tmp_path / "projects"  # every folder in it has a README
    for name in ("one", "two"):
        (projects / name).mkdir(parents=True)
        (projects / name / "README.md").write_text("# My software")
    assert_refused(run, projects, "was not written by this command")
    main([f"model={run}", "task=search", f"output={tmp_path / 'published'}"])
    (tmp_path / "published" / ".git").mkdir()
    assert_refused(run, tmp_path / "published", "is an export, but contains .*git")


def test_overwrite_never_replaces_a_link(run, tmp_path):
    main([f"model={run}", "task=search", f"output={tmp_path / 'out'}"])
    (tmp_path / "link").symlink_to(tmp_path / "out")
    assert_refused(run, tmp_path / "link", "is a symbolic link")


def test_overwrite_never_replaces_the_model_or_the_working_directory(run, tmp_path, monkeypatch):
    copied = shutil.copytree(run, tmp_path / "runs" / "copied", ignore=shutil.ignore_patterns("export"))
    for folder in (copied, copied.parent):
        (folder / "README.md").write_text("notes")
        (folder / ".scimult-export").touch()
    assert_refused(copied, copied, "is or contains .*copied")
    assert_refused(copied, copied.parent, "is or contains .*copied")
    assert_refused(copied / "checkpoints" / "last.ckpt", copied.parent, "is or contains .*last.ckpt")
    (tmp_path / "work" / "here").mkdir(parents=True)
    (tmp_path / "work" / ".scimult-export").touch()
    monkeypatch.chdir(tmp_path / "work" / "here")
    assert_refused(run, tmp_path / "work", "is or contains .*here")


def test_overwrite_replaces_only_its_own_checkpoints(run, tmp_path):
    whole = load_encoder(run)
    whole.normalize = True
    whole.save_pretrained(tmp_path / "model")
    output = tmp_path / "authors.ckpt"
    arguments = [f"model={tmp_path / 'model'}", "format=reference", f"output={output}", "overwrite=yes"]
    main(arguments)
    main(arguments)
    checkpoint = torch.load(output, weights_only=True)
    del checkpoint["encoder_params"]["max_length"]  # as in the authors' own files
    torch.save(checkpoint, output)
    for content in (output.read_bytes(), b"thesis"):
        output.write_bytes(content)
        with pytest.raises(UserError, match="not a checkpoint of format=reference"):
            main(arguments)
        assert output.read_bytes() == content


def test_overwrite_replaces_unmarked_exports_of_older_versions(run, tmp_path):
    output = tmp_path / "out"
    main([f"model={run}", f"output={output}"])
    for marker in output.rglob(".scimult-export"):
        marker.unlink()
    main([f"model={run}", f"output={output}", "overwrite=yes"])
    for marker in output.rglob(".scimult-export"):
        marker.unlink()
    (output / "search" / "notes.txt").write_text("mine")
    assert_refused(run, output, "was not written by this command")
    assert_refused(run, output / "search", "was not written by this command")


def test_output_can_be_a_link(run, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, target in (("a", tmp_path / "empty"), ("b", tmp_path / "new")):
        (tmp_path / name).symlink_to(target)
        main([f"model={run}", "task=search", f"output={tmp_path / name}"])
        assert (tmp_path / name / "modules.json").is_file()
        assert (tmp_path / name).is_symlink()


def test_checkpoint_outside_of_its_run_is_exported(run, tmp_path, monkeypatch):
    shutil.copy(run / "checkpoints" / "last.ckpt", tmp_path / "mine.ckpt")
    monkeypatch.chdir(tmp_path)
    main([f"model={tmp_path / 'mine.ckpt'}", "task=search"])
    assert (tmp_path / "exports" / "mine" / "search" / "modules.json").is_file()
