"""Damaged files of a run, a sweep or a build are named, left out or made again; they never end in a traceback."""

import shutil

import pytest

from datamodules.files import read_json, read_rows
from datamodules.readers.beir import write_beir
from datamodules.records import UserError
from experiments import audit, find, index, mine, report, runs
from experiments.download.sources import Sources
from experiments.reporting.run_files import RunFiles
from experiments.results.results import read_results
from experiments.run.folder import manifest_of
from experiments.run.trials import Controller
from experiments.train import main, train
from lightning_modules.encoders.loading import load_encoder
from tests.conftest import toy_collection
from tests.experiments.test_changed_data import ARGUMENTS

CONTENTS = [
    *(b"", b"[]", b"3", b"null", b'"x"', b"{", b"{}", b"\xff\xfe\x00", b"[" * 100_000, b"NaN", b'{"a": 1}'),
    *(b'{"attempts": 3}', b'{"attempts": [1]}', b'{"data": []}', b'{"data": {"set": 3}, "attempts": []}'),
    *(b'{"benchmarks": []}', b'{"benchmarks": {"set": 3}, "metrics": ["ndcg@10"], "split": "test", "steps": 2}'),
    *(b'{"split": "test", "metrics": 3, "steps": 2}', b'{"split": "test", "metrics": ["ndcg@10"], "steps": "2"}'),
    *(b'{"benchmarks": {}, "metrics": []}', b'{"benchmarks": {"set": {"systems": {}, "metrics": []}}}'),
]


def message_of(function, *arguments):
    """Call a function, and return its message or "". Only a UserError is accepted."""
    try:
        function(*arguments)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("expected", [dict, list, {"a": int}, {"a": int, "b": dict}])
def test_read_json_returns_the_expected_type_or_raises_user_error(tmp_path, content, expected):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    if message := message_of(read_json, path, expected):
        assert message.startswith(f"{path}: ")
        return
    result = read_json(path, expected)
    assert isinstance(result, expected if isinstance(expected, type) else dict)
    assert isinstance(expected, type) or all(isinstance(result[key], kind) for key, kind in expected.items())


@pytest.mark.parametrize(
    ("command", "arguments", "output", "replaced"),
    [
        (find, ["embeddings=vectors", "queries=papers.jsonl"], "papers.jsonl", "papers.jsonl"),
        (find, ["embeddings=vectors", "query=words"], "library.bib", "library.bib"),
        (index, ["embeddings=vectors"], "library.bib", "library.bib"),
        (index, ["embeddings=vectors"], "papers", "papers.json"),
        (report, ["RUN=run"], "library.bib", "library.bib"),
        (report, ["RUN=run"], "page.html", "report.json"),
        (audit, ["moe"], "papers.json", "papers.json"),
    ],
)
def test_output_never_replaces_a_file_of_another_kind(tmp_path, monkeypatch, command, arguments, output, replaced):
    """make find queries=papers.jsonl output=papers.jsonl replaced the papers with their ranking."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / replaced).write_text('{"id": "p1", "title": "words"}\n')
    message = message_of(command.main, [*arguments, f"output={output}"])
    assert message.startswith(f"output: {replaced} exists and is not ")
    assert (tmp_path / replaced).read_text() == '{"id": "p1", "title": "words"}\n'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    write_beir(toy_collection(), root / "set")
    arguments = [*ARGUMENTS, f"task.search.data={root / 'set'}", "data.cache=null", "trainer.max_steps=2"]
    train("vanilla", [*arguments, f"run.dir={root / 'run'}"])
    return root / "run", arguments


@pytest.mark.slow
@pytest.mark.parametrize("name", ["results.json", "manifest.json", "config.yaml", "metrics.jsonl"])
def test_damaged_files_of_a_run_are_named(run, tmp_path, name):
    source, arguments = run
    folder = tmp_path / "runs" / "run"
    good = (source / name).read_bytes()
    for content in [*CONTENTS, good[: len(good) // 2], good.decode().encode("utf-16")]:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        (folder / name).write_bytes(content)
        message = message_of(train, "vanilla", [*arguments, f"run.dir={folder}"])
        assert not message or name in message or "configuration" in message, message
        message_of(runs.main, [f"root={tmp_path / 'runs'}"])
        message_of(report.main, [f"RUN={folder}", f"output={tmp_path / 'page.html'}", "map=0"])


@pytest.fixture(scope="module")
def merged_run(run, tmp_path_factory):
    """A run that mines negatives and ends with an average with its start, and its arguments."""
    start, arguments = run
    folder = tmp_path_factory.mktemp("merged") / "run"
    arguments = [*arguments, f"init_from={start}", "trainer.start_share=0.3", "mining.every_n_steps=1"]
    arguments += [
        "mining.first_step=0",
        "mining.relative_margin=null",
        "mining.k=5",
        "task.search.num_hard_negatives=1",
    ]
    train("vanilla", [*arguments, f"run.dir={folder}"])
    return folder, arguments


def damaged(content):
    """Return a file's content cut short, emptied, zeroed, with a bit flipped, and replaced by that of another file."""
    half = len(content) // 2
    flipped = content[:half] + bytes([content[half] ^ 8]) + content[half + 1 :]
    return [content[:half], b"", bytes(len(content)), flipped, b'{"version": 99}\n']


def state_of(folder):
    return {path.name: path.read_bytes() for path in (folder / "checkpoints").iterdir()}, load_encoder(folder).origin


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("checkpoints/merged.ckpt", ""),
        ("results.json", "Delete it"),
        ("manifest.json", "Delete it to use the run without a check that its data are unchanged"),
        ("config.yaml", "--cfg"),
    ],
)
def test_a_complete_run_restores_derived_files_or_says_how(merged_run, tmp_path, capsys, caplog, name, advice):
    """advice: what the error says, "" if the command that trained the run repairs the file itself."""
    source, arguments = merged_run
    folder = tmp_path / "run"
    arguments = [*arguments, f"run.dir={folder}"]
    repaired = 0
    for content in damaged((source / name).read_bytes()):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        (folder / name).write_bytes(content)
        if advice:
            message = message_of(train, "vanilla", arguments)
            assert not message or (advice in message and name in message) or "another configuration" in message
            if "Delete it" in message:
                (folder / name).unlink()
            elif message:
                capsys.readouterr()
                with pytest.raises(SystemExit):
                    main(["vanilla", *arguments, "--cfg"])
                (folder / name).write_text(capsys.readouterr().out)
            repaired += bool(message)
        caplog.clear()
        train("vanilla", arguments)
        assert "computing it again from best.ckpt" in caplog.text or "merged" not in name
        assert state_of(folder) == state_of(source)
        results = [read_results(path / "results.json").means() for path in (folder, source)]
        assert results[0] == pytest.approx(results[1], abs=1e-6)
    assert repaired or not advice


@pytest.mark.slow
def test_an_average_that_cannot_be_made_again_raises_user_error(merged_run, tmp_path):
    source, arguments = merged_run
    shutil.copytree(source, tmp_path / "run")
    for name in ("merged.ckpt", "best.ckpt"):
        (tmp_path / "run" / "checkpoints" / name).write_bytes(b"")
    with pytest.raises(
        UserError, match=r"merged\.ckpt: not a checkpoint.* you can name .*last\.ckpt\. To recreate merged"
    ):
        load_encoder(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "start.ckpt").write_bytes(b"")
    for more in ("trainer.max_steps=2", "trainer.max_steps=4"):
        with pytest.raises(UserError, match=r"start\.ckpt"):
            train("vanilla", [*arguments, f"run.dir={tmp_path / 'run'}", more])


@pytest.mark.slow
def test_a_report_leaves_out_damaged_files(merged_run, tmp_path, caplog):
    source, _ = merged_run
    mined = "negatives/step-00000001/report.json"
    for name in (mined, "runs/set.trained.queries.tsv"):
        for content in damaged((source / name).read_bytes()):
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            shutil.copytree(source, tmp_path / "run")
            (tmp_path / "run" / name).write_bytes(content)
            caplog.clear()
            report.main([f"RUN={tmp_path / 'run'}", f"output={tmp_path / 'page.html'}", "map=0"])
            assert name in caplog.text


@pytest.mark.slow
def test_mining_again_replaces_a_damaged_store(run, tmp_path, caplog):
    _, arguments = run
    arguments = ["vanilla", *arguments, "mining.miner._target_=lightning_modules.mining.miners.BM25Miner"]
    arguments += ["mining.relative_margin=null", "mining.k=5", f"output={tmp_path / 'store'}"]
    (tmp_path / "store").mkdir()
    mine.main(arguments)
    good = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    for name in ("meta.json", "search.documents.npy"):
        contents = damaged(good[name])
        if name == "meta.json":
            del contents[3]  # with a bit flipped, it may be that of other settings, which mining refuses to replace
        for content in contents:
            (tmp_path / "store" / name).write_bytes(content)
            mine.main(arguments)
            assert {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()} == good
    (tmp_path / "store" / "mine.txt").write_text("mine")
    (tmp_path / "store" / "meta.json").write_text("")
    with pytest.raises(UserError, match="is not a store of hard negatives"):
        mine.main(arguments)


@pytest.mark.slow
def test_rows_of_lines_of_metrics_that_are_not_objects_are_skipped(run, tmp_path):
    source, _ = run
    folder = tmp_path / "run"
    shutil.copytree(source, folder)
    rows = [
        b"[1, 2]",
        b'{"loss": 1}',
        b'{"step": "x"}',
        b'{"step": [1]}',
        b'{"step": 1',
        b"\xff\xfe",
        b"3",
        b"[" * 9999,
    ]
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b"\n".join(rows) + b'\n{"step": 77, "train/search/loss": 0.5}\n')
    assert 77 in RunFiles(folder).metrics
    report.main([f"RUN={folder}", f"output={tmp_path / 'page.html'}", "map=0"])
    runs.main([f"root={tmp_path}"])


def test_torn_rows_of_trials_are_skipped(tmp_path):
    path = tmp_path / "trials.jsonl"
    path.write_bytes(b'[1]\n{"trial": 0, "sta\n\xff\n' + b"[" * 100_000 + b'\n{"trial": 1}\n')
    assert read_rows(path) == [{"trial": 1}]
    rows = ['{"trial": [1]}', '{"trial": 0}', '{"trial": 0, "state": 3, "parameters": {}}']
    good = {"trial": 2, "state": "failed", "parameters": {"a": 1}}
    path.write_text("\n".join(rows) + '\n{"trial": 2, "state": "failed", "parameters": {"a": 1}}\n')
    controller = Controller.__new__(Controller)
    controller.folder = tmp_path
    assert controller.states() == {2: good}


@pytest.mark.parametrize("content", CONTENTS)
def test_damaged_manifest_raises_user_error(tmp_path, content):
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    message = message_of(manifest_of, tmp_path)
    is_manifest = content in (b"{}", b'{"a": 1}') or b'"split"' in content or b'"benchmarks"' in content
    assert message.startswith(str(path)) != is_manifest


@pytest.mark.parametrize("content", [b"[]", b"3", b"", b'{"a": 1}', b'{"a": []}'])
def test_checksums_of_another_type_raise_user_error(tmp_path, content):
    (tmp_path / "checksums.json").write_bytes(content)
    with pytest.raises(UserError, match="checksums.json"):
        Sources(tmp_path, {})
