"""The export command: all formats, their README.md, and what overwrite=yes replaces."""

import base64
import json
import os
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from markdown_it import MarkdownIt
from sentence_transformers import SentenceTransformer

from datamodules.records import UserError
from experiments.export import ExportOptions, main, push
from experiments.results.model_card import write_card
from experiments.train import train
from lightning_modules.encoders.loading import load_encoder
from tests.experiments.loopback import serving
from tests.experiments.shared.test_plain import HOSTILE
from tests.experiments.test_train import TINY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    train("moe", [*TINY, f"run.dir={folder}", "trainer.max_steps=2", "evaluation.baselines=false"])
    return folder


def test_each_task_is_exported_with_a_readme(run, capsys):
    main([f"model={run}"])
    trained, results = load_encoder(run), json.loads((run / "results.json").read_text())
    for task in trained.tasks:
        folder = run / "export" / "tasks" / task
        plain = load_encoder(folder, pooling="mean")
        ours = trained.encode(["some words"], task)
        torch.testing.assert_close(plain.encode(["some words"], task), ours, atol=1e-5, rtol=1e-5)
        card = (folder / "README.md").read_text()
        assert f"# Encoder for {task.replace('_', ' ')}" in card
        assert "SentenceTransformer" in card
        assert "2 steps of" in card
        assert f"| checkpoint | checkpoints/{results['checkpoint']} of step {results['checkpoint_step']} (" in card
        assert "| topics | classification |" in card  # data
        library = SentenceTransformer(str(folder), device="cpu")
        vectors = torch.from_numpy(library.encode(["some words"]))
        torch.testing.assert_close(vectors, ours, atol=1e-5, rtol=1e-5)
        benchmarks = {"classification": "topics", "link_prediction": "citations", "search": "searches"}
        for name, benchmark in benchmarks.items():  # only the results of this task
            assert (f"| {benchmark} | trained |" in card) == (name == task)
        assert "synthetic" in card
        assert str(run) not in card
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
    for marker in [*output.rglob(".scimult-export"), *output.rglob("checksum.json")]:
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


def test_front_matter_is_complete_and_has_the_measured_figures(run, tmp_path):
    details = ["license=apache-2.0", "language=en,de", "base_model=allenai/scibert_scivocab_uncased"]
    main([f"model={run}", f"output={tmp_path / 'tasks'}", *details])
    main([f"model={run}", f"output={tmp_path / 'whole'}", "format=pretrained"])
    measured = json.loads((run / "results.json").read_text())["benchmarks"]
    folders = {folder.name: folder for folder in (tmp_path / "tasks").iterdir() if folder.is_dir()}
    assert set(folders) == {"classification", "link_prediction", "search"}
    for task, folder in (folders | {"": tmp_path / "whole"}).items():
        data = ModelCard.load(folder / "README.md").data
        assert data.library_name == ("sentence-transformers" if task else "transformers")
        assert data.pipeline_tag == ("sentence-similarity" if task else "feature-extraction")
        assert data.pipeline_tag in data.tags
        assert data.datasets == ["topics", "citations", "searches"]
        figures = {}
        for result in data.eval_results:
            assert task in ("", result.task_name)
            assert result.dataset_split == "test"
            figures.setdefault(result.dataset_name, {})[result.metric_name] = result.metric_value
        expected = {
            name: table["systems"]["trained"] for name, table in measured.items() if task in ("", table["task"])
        }
        assert figures == expected
        index = eval_results_to_model_index(data.model_name, data.eval_results)
        assert model_index_to_eval_results(index) == (run.name, data.eval_results)
        if task:
            assert (data.license, data.language) == ("apache-2.0", ["en", "de"])
            assert data.base_model == "allenai/scibert_scivocab_uncased"
        else:
            assert (data.license, data.language, data.base_model) == ("unknown", ["en"], None)
        assert "@inproceedings{zhang2023scimult" in (folder / "README.md").read_text()


def test_results_of_another_encoder_are_not_in_the_card(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    results["benchmarks"]["searches"]["measured"]["trained"]["fingerprint"] = "another checkpoint"
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    main([f"model={tmp_path / 'run'}", f"output={tmp_path / 'tasks'}"])
    main([f"model={run}", f"output={tmp_path / 'dot'}", "task=search", "similarity=dot"])
    for folder in (tmp_path / "tasks" / "search", tmp_path / "dot"):
        card = ModelCard.load(folder / "README.md")
        assert card.data.eval_results is None
        assert "measured another checkpoint" in card.text
    assert ModelCard.load(tmp_path / "tasks" / "classification" / "README.md").data.eval_results


def test_exported_folders_have_no_local_path(run, tmp_path, monkeypatch):
    """Paths are in the configuration, the commands and the start model of a run."""
    home = tmp_path / "home of [bob] 'x' #1, é"
    moved = home / "secret lab" / "my run"
    shutil.copytree(run, moved, ignore=shutil.ignore_patterns("export"))
    (home / "starts" / "bert").mkdir(parents=True)
    (home / "starts" / "bert" / "README.md").write_text("---\nlicense: bsd-3-clause\n---\n")
    manifest = json.loads((moved / "manifest.json").read_text())
    command = ["train.py", f"{home}/own lab/own.yaml", f"run.dir={moved}", f"init_from={home}/starts/bert"]
    command += [f"data.root={home}/data", f"task.search.data={{mine: {{folder: {home}/mine, x: 1}}}}", "optim.lr=0.1"]
    manifest |= {"attempts": [{"command": command, "seconds": 1.0}], "start": f"{home}/starts/bert"}
    (moved / "manifest.json").write_text(json.dumps(manifest))
    config = (moved / "config.yaml").read_text().replace(str(run), "OLD").replace("OLD", json.dumps(str(moved)))
    (moved / "config.yaml").write_text(config)
    monkeypatch.chdir(home)
    main([f"model={moved}"])
    main([f"model={moved}", "format=pretrained"])
    main([f"model={moved / 'checkpoints' / 'best.ckpt'}", "task=search", f"output={home / 'out'}"])
    texts = {}
    for folder in (moved / "export", home / "out"):
        for path in folder.rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                for part in (str(home), str(run), str(tmp_path), "secret lab", "own lab", "home of", "starts"):
                    assert part.encode() not in content, (path, part)
                texts[path] = content
    card = texts[home / "out" / "README.md"].decode()
    assert "python -m experiments.train own.yaml init_from=bert data.root=data" in card
    assert "optim.lr=0.1" in card
    assert "The run started from bert." in card
    data = ModelCard(card).data
    assert (data.license, data.base_model, data.model_name) == ("bsd-3-clause", None, "my run")


def test_base_model_is_that_of_the_first_of_several_runs(run, tmp_path):
    for name, start in (("one", "allenai/scibert"), ("two", str(tmp_path / "one"))):
        shutil.copytree(run, tmp_path / name, ignore=shutil.ignore_patterns("export"))
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest | {"start": start}))
    main([f"model={tmp_path / 'two'}", "task=search", f"output={tmp_path / 'out'}"])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "allenai/scibert"
    assert "The run started from one." in card.text


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({}, "expected a list as members"),
        ({"members": [], "tried": [], "dev": [], "parts": {}}, "'method' is missing"),
        ({"members": [3], "tried": [], "dev": [], "parts": {}, "method": "linear"}, "damaged, or not the recipe"),
    ],
)
def test_damaged_recipe_of_a_merge_raises_user_error(run, tmp_path, recipe, message):
    """A recipe without a key ended the export of a merged model in KeyError."""
    (tmp_path / "merge.json").write_text(json.dumps(recipe))
    with pytest.raises(UserError, match=rf"merge\.json: .*{message}"):
        write_card(tmp_path, load_encoder(run), "merged", None, "dot")


def test_text_that_is_not_ours_is_escaped_in_the_card(run, tmp_path, monkeypatch):
    encoder = load_encoder(run)
    hostile = "| </td> *b* _i_ [l](http://evil) `c` <script> ![x](y) $z$ &amp; --- ``` #"
    encoder.tasks = {hostile: hostile}
    monkeypatch.setattr(type(encoder), "prompts", {hostile: f"{hostile} {HOSTILE}"})
    monkeypatch.setattr(encoder.tokenizer, "_sep_token", None, raising=False)
    write_card(tmp_path, encoder, hostile, None, "dot", hostile)
    text = (tmp_path / "README.md").read_text()
    card = ModelCard(text)
    tokens = MarkdownIt("commonmark").enable("table").parse(card.text)
    inline = [token for token in tokens if token.type == "inline"]
    links = [child.attrs["href"] for token in inline for child in token.children if child.type == "link_open"]
    assert links == ["https://arxiv.org/abs/2305.14232"]
    assert not [token for token in tokens if token.type.startswith("html")]
    kinds = {child.type for token in inline for child in token.children}
    assert not kinds & {"html_inline", "image", "em_open"}
    cells = ["".join(child.content for child in token.children) for token in inline]
    assert f"{hostile} ({hostile})" in cells
    code = next(token.content for token in tokens if token.type == "fence")
    assert code.startswith("from sentence_transformers")
    compile(code, "card", "exec")


class Hub(BaseHTTPRequestHandler):
    """A stub of the hub that keeps what is uploaded: repository -> file -> content."""

    requests, files, private, status = [], {}, {}, 200

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.requests.append((self.path, self.headers.get("Authorization")))
        content, place = {}, self.path.partition("?")[0].split("/")
        address = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            self.private.setdefault(name, wanted.get("private") or wanted.get("visibility") == "private")
            content = {"url": f"{address}/{name}"}
        elif self.path == "/api/validate-yaml":
            content = {"errors": [], "warnings": []}
        elif "preupload" in place:
            files = [file["path"] for file in json.loads(body)["files"]]
            content = {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]}
        elif "commit" in place:
            lines = [json.loads(line) for line in body.splitlines()]
            files = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
            name = "/".join(place[3:5])
            self.files.setdefault(name, {}).update(files)
            content = {"commitUrl": f"{address}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}
        elif self.path.startswith("/api/models/"):
            name = "/".join(place[3:5])
            content = {"id": name, "private": self.private.get(name, False)}
        answer = json.dumps(content).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


@pytest.fixture
def hub(monkeypatch):
    Hub.requests, Hub.files, Hub.private, Hub.status = [], {}, {}, 200
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(Hub) as endpoint:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        yield endpoint


def exported(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".scimult-export"
    }


def test_exported_folder_and_nothing_else_is_pushed(run, tmp_path, hub):
    (tmp_path / "secret.txt").write_text("not exported")
    main([f"model={run}", "task=search", f"output={tmp_path / 'out'}", "push=lab/model", "private=yes"])
    assert Hub.files == {"lab/model": exported(tmp_path / "out")}
    assert Hub.private == {"lab/model": True}
    assert {token for _, token in Hub.requests} <= {"Bearer hf_secret", None}
    assert b'SentenceTransformer("lab/model")' in Hub.files["lab/model"]["README.md"]


def test_each_task_is_pushed_to_a_repository_of_its_own(run, tmp_path, hub):
    main([f"model={run}", f"output={tmp_path / 'out'}", "push=lab/model"])
    tasks = ("classification", "link_prediction", "search")
    assert Hub.files == {f"lab/model-{task}": exported(tmp_path / "out" / task) for task in tasks}
    assert not any(Hub.private.values())


def test_endpoint_comes_from_the_environment(run, tmp_path, hub):
    command = [sys.executable, "-m", "experiments.export", f"model={run}", "format=pretrained"]
    command += [f"output={tmp_path / 'out'}", "push=lab/whole"]
    environment = os.environ | {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert Hub.files == {"lab/whole": exported(tmp_path / "out")}
    assert "lab/whole: uploaded" in done.stdout
    assert "hf_secret" not in done.stdout + done.stderr


def test_private_model_is_not_pushed_to_a_public_repository(run, tmp_path, hub):
    Hub.private["lab/model"] = False
    with pytest.raises(UserError, match="lab/model already exists and is public"):
        main([f"model={run}", "task=search", f"output={tmp_path / 'out'}", "push=lab/model", "private=yes"])
    assert Hub.files == {}


def test_failed_upload_names_the_server_and_keeps_the_export(run, tmp_path, hub):
    Hub.status = 403
    message = f"push: lab/model: the upload to {hub} failed .*403.* The export is complete in {tmp_path / 'out'}"
    with pytest.raises(UserError, match=message):
        main([f"model={run}", "task=search", f"output={tmp_path / 'out'}", "push=lab/model"])
    assert (tmp_path / "out" / "modules.json").is_file()


def test_unreachable_hub_raises_user_error(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match="the upload to http://127.0.0.1:9 failed"):
        push(tmp_path, "lab/model", private=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["push=lab/model"], "push: you are not logged in"),
        (["push=model"], "push: expected OWNER/NAME, got 'model'"),
        (["push=lab/../model"], "push: "),
        (["push=lab/model", "format=reference"], "push: needs a folder"),
        (["private=yes"], "private: needs push=OWNER/NAME"),
        (["license=my own"], "license: expected an id from the hub, got 'my own'"),
        (["base_model=/home/bob/bert"], "base_model: expected an id from the hub"),
        (["language=en,x: y"], "language: expected an id from the hub, got 'x: y'"),
    ],
)
def test_invalid_options_of_the_hub_are_refused_before_the_model_is_loaded(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("experiments.export.get_token", lambda: None)
    monkeypatch.setattr(ExportOptions, "load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=message):
        main(["model=nowhere", f"output={tmp_path / 'out'}", *arguments])
    assert not list(tmp_path.iterdir())
