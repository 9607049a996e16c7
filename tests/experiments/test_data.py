"""`make data`: the recipes on small files from a local server."""

import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import yaml

from datamodules.readers.beir import BeirReader
from datamodules.records import Collection, UserError
from experiments import data
from experiments.data import main
from experiments.download import fetch, sources
from experiments.download.recipe import load_recipe
from experiments.train import train
from tests.experiments.loopback import loopback
from tests.experiments.paper_mirror import NUM_PAPERS, RECIPE, maple_papers, write_mirror, write_recipe
from tests.experiments.test_train import check_complete, two_steps

ROOT = Path(__file__).parents[2]
FIELDS = 18
OUTPUTS = ("maple_cs", "maple_mesh", "maple_coarse", "cite_prediction", "scirepeval_search", "scirepeval_search_test")
BEIR_FILES = {
    "corpus": "".join(json.dumps({"_id": f"d{i}", "title": "t", "text": "x"}) + "\n" for i in range(4)),
    "queries": "".join(json.dumps({"_id": id, "text": "x"}) + "\n" for id in ("train", "dev", "test")),
}
COARSE = "outputs.maple_coarse.reader.max_per_label=50"


@pytest.fixture(scope="module")
def files():
    return write_mirror()


@pytest.fixture
def server(files, monkeypatch):
    monkeypatch.setattr(fetch, "PAUSES", (0.01, 0.01))
    with loopback() as state:
        state.files = dict(files)
        yield state


@pytest.fixture
def recipe(files, tmp_path):
    return str(write_recipe(tmp_path / "scimult.yaml", files))


def make(recipe, server, root, *more):
    main([recipe, f"data.root={root}", f"mirror={server.url}", COARSE, *more])


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture(scope="module")
def built(files, tmp_path_factory):
    """The built mixture, its recipe, and the requests to the server."""
    folder = tmp_path_factory.mktemp("mixture")
    recipe = str(write_recipe(folder / "scimult.yaml", files))
    with loopback() as server:
        server.files = dict(files)
        make(recipe, server, folder / "root")
        return folder / "root", recipe, list(server.requests)


def positives(qrels):
    return {query: {id for id, grade in judged.items() if grade > 0} for query, judged in qrels.items()}


def test_each_row_of_table_a1_becomes_a_folder(built, files):
    root, _, requests = built
    assert {path.name for path in root.iterdir() if path.is_dir()} == {*OUTPUTS, "downloads", "unpacked"}
    assert [path for path, _ in requests] == list(dict.fromkeys(path for path, _ in requests))
    assert {path for path, _ in requests} == files.keys()
    assert not [path for path in root.rglob("*") if path.name.endswith((".part", ".sign", ".partial"))]
    for name in OUTPUTS:
        collection = BeirReader(str(root / name)).read()
        assert list(collection.qrels) == (["test"] if name.endswith("_test") else ["train"])
        counts = json.loads((root / name / "built.json").read_text())["counts"]
        judged = next(iter(collection.qrels.values()))
        grades = [grade for grades_of_query in judged.values() for grade in grades_of_query.values()]
        assert counts == {
            "documents": len(collection.corpus),
            "queries": len(judged),
            "pairs": sum(grade > 0 for grade in grades),
            "negatives": grades.count(0),
        }


@pytest.mark.parametrize(
    ("name", "fields"), [("maple_cs", {"Computer_Science": 1}), ("maple_mesh", {"Biology_MeSH": 3, "Medicine_MeSH": 4})]
)
def test_labels_are_capped_and_have_negatives_from_related_papers(built, name, fields):
    """Names, definitions, 100 pairs per label, and sources of negatives are as in a plain reading of the papers."""
    root = built[0]
    mesh = name == "maple_mesh"
    collection = BeirReader(str(root / name)).read()
    known = {f"D{i}" for i in range(12)} if mesh else {str(i) for i in range(10)}
    assert collection.corpus.keys() == known
    assert collection.corpus["D3" if mesh else "3"].text == ("What 3 is." if mesh else "what 3 is")
    papers = {
        row["paper"]: row
        for field, seed in fields.items()
        for row in maple_papers(field, [f"D{i}" if mesh else str(i) for i in range(12)], seed)
    }
    kinds = {"reference": 0, "author": 0, "venue": 0}
    per_label = dict.fromkeys(known, 0)
    for id, judged in collection.qrels["train"].items():
        record = papers[id]
        assert collection.queries[id].title == record["title_raw"]
        for label in positives({id: judged})[id]:
            assert label in record["label"]
            per_label[label] += 1
        for label in [label for label, grade in judged.items() if grade == 0]:
            assert label not in record["label"]
            related = {
                "reference": [papers[other] for other in record["reference"] if other in papers],
                "author": [other for other in papers.values() if set(other["author"]) & set(record["author"])],
                "venue": [other for other in papers.values() if other["venue"] == record["venue"]],
            }
            having = {kind for kind, others in related.items() if any(label in other["label"] for other in others)}
            assert having
            if len(having) == 1:
                kinds[having.pop()] += 1
    total = {label: sum(label in row["label"] for row in papers.values()) for label in known}
    assert per_label == {label: min(100, number) for label, number in total.items()}
    assert max(total.values()) == NUM_PAPERS * len(fields)
    assert kinds["venue"]


def test_coarse_fields_have_equally_many_papers(built):
    collection = BeirReader(str(built[0] / "maple_coarse")).read()
    assert len(collection.corpus) == FIELDS
    assert "Computer_Science" not in collection.corpus
    assert collection.corpus["Political_Science"].title == "Political Science"
    counts = dict.fromkeys(collection.corpus, 0)
    for id, labels in positives(collection.qrels["train"]).items():
        for label in labels:
            counts[label] += 1
            assert f"The {label} Paper {id}" == collection.queries[id].title
    assert set(counts.values()) == {50}


def test_train_and_validation_are_merged_for_citations_and_search(built):
    cited = BeirReader(str(built[0] / "cite_prediction")).read().qrels["train"]
    assert len(cited) == 8 * 4
    assert cited["0"] == {"1000": 1, "1001": 1, "1002": 1, "2000": 0, "2001": 0, "2002": 0}
    searched = BeirReader(str(built[0] / "scirepeval_search")).read().qrels["train"]
    assert len(searched) == 17 * 4
    assert searched["16-1"] == {"1601": 2, "1602": 1, "1603": 0, "1604": 0, "1605": 0}


def test_second_command_does_nothing(built, server, caplog):
    root, recipe, _ = built
    before = tree(root)
    with caplog.at_level("INFO"):
        make(recipe, server, root)
    assert server.requests == []
    assert tree(root) == before
    assert caplog.text.count("exists already") == len(OUTPUTS)


@pytest.mark.slow
def test_training_runs_on_the_built_data(built, tmp_path, make_backbone):
    backbone, tokenizer = make_backbone(max_position_embeddings=256)
    backbone.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    overrides = ["scale=paper", f"data.root={built[0]}", f"backbone.name={tmp_path / 'bert'}", "data.num_workers=0"]
    train("moe", two_steps(tmp_path / "run", *overrides, f"data.cache={tmp_path / 'cache'}"))
    check_complete(tmp_path / "run", benchmarks=1, start="start")


def test_counts_are_shown_next_to_published_ones(built, server, capsys, caplog):
    root, recipe, _ = built
    with caplog.at_level("INFO"):
        make(recipe, server, root, "only=maple_coarse")
    table = capsys.readouterr().out
    assert "900,000 (-99.9%)" in table
    assert (
        "maple_coarse: differs from the published counts by more than 2% in queries, pairs. A paper that was drawn"
        in caplog.text
    )
    assert "maple_cs" not in table
    assert f"Next: make train EXP=moe SCALE=paper data.root={root}" in caplog.text


def test_downloads_and_archives_may_be_deleted_once_built(files, server, tmp_path, recipe):
    root = tmp_path / "root"
    make(recipe, server, root, "only=maple_cs")
    assert {path for path, _ in server.requests} == {"maple/MAPLE.zip", "micol/MICoL.zip"}
    subprocess.run(["rm", "-r", root / "downloads", root / "unpacked"], check=True)
    server.requests.clear()
    make(recipe, server, root, "only=maple_cs")
    assert server.requests == []
    make(recipe, server, root, "only=maple_cs", "outputs.maple_cs.reader.seed=1")
    assert {path for path, _ in server.requests} == {"maple/MAPLE.zip", "micol/MICoL.zip"}


def test_changed_argument_rebuilds_only_its_folder(server, tmp_path, recipe):
    root = tmp_path / "root"
    make(recipe, server, root, "only=maple_cs,cite_prediction")
    old = {name: tree(root / name) for name in ("maple_cs", "cite_prediction")}
    make(recipe, server, root, "only=maple_cs,cite_prediction", "outputs.maple_cs.reader.dev_percent=10")
    assert tree(root / "cite_prediction") == old["cite_prediction"]
    assert set(BeirReader(str(root / "maple_cs")).read().qrels) == {"train", "dev"}
    apart = ["outputs.cite_prediction.splits.train=[train]", "outputs.cite_prediction.splits.dev=[dev]"]
    make(recipe, server, root, "only=cite_prediction", *apart)
    collection = BeirReader(str(root / "cite_prediction")).read()
    assert {split: len(judged) for split, judged in collection.qrels.items()} == {"train": 6 * 4, "dev": 2 * 4}


def test_missing_optional_source_is_replaced_until_placed_by_hand(files, server, tmp_path, recipe, caplog):
    root = tmp_path / "root"
    del server.files["micol/MICoL.zip"]
    make(recipe, server, root, "only=maple_cs")
    assert len(BeirReader(str(root / "maple_cs")).read().corpus) == 12
    assert f"place it as {root / 'downloads' / 'micol' / 'MICoL.zip'}" in caplog.text
    path = root / "downloads" / "micol" / "MICoL.zip"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(files["micol/MICoL.zip"])
    make(recipe, server, root, "only=maple_cs")
    corpus = BeirReader(str(root / "maple_cs")).read().corpus
    assert len(corpus) == 10
    assert corpus["1"].text == "what 1 is"


def test_files_to_place_by_hand_are_listed_before_any_download(server, tmp_path, recipe):
    with pytest.raises(UserError) as caught:
        main(
            [
                recipe,
                f"data.root={tmp_path / 'root'}",
                "only=cite_prediction,scirepeval_search_test",
                "sources.search_test.url=null",
                "sources.cite_prediction.url=null",
            ]
        )
    for source in ("cite_prediction", "search_test"):
        assert f"{source} cannot be downloaded automatically: get it from https://huggingface.co/datasets" in str(
            caught.value
        )
    assert server.requests == []


def test_file_placed_by_hand_is_verified_and_used(files, server, tmp_path, recipe):
    path = tmp_path / "root" / "downloads" / "search_test" / "evaluation-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match="the recipe has sha256 [0-9a-f]{64}, the file has [0-9a-f]{64}. Replace it"):
        make(recipe, server, tmp_path / "root", "only=scirepeval_search_test")
    assert path.read_bytes() == b"something else"
    path.write_bytes(files["search_test/evaluation-00000-of-00001.parquet"])
    make(recipe, server, tmp_path / "root", "only=scirepeval_search_test")
    assert server.requests == []


def test_wrong_download_raises_user_error_with_both_checksums(server, tmp_path):
    """The original recipe has other checksums than the small files."""
    with pytest.raises(UserError) as caught:
        make("scimult", server, tmp_path / "root", "only=scirepeval_search_test")
    message = str(caught.value)
    assert (
        "evaluation-00000-of-00001.parquet.part: the recipe has sha256 7ea437366c9820991ff0918a4f399d6493901a1a"
        in message
    )
    assert "place the file yourself as" in message
    assert not list((tmp_path / "root" / "downloads").rglob("*.parquet*"))


def test_part_of_another_version_is_downloaded_from_the_beginning(files, server, tmp_path, recipe, caplog):
    server.tags = False
    path = tmp_path / "root" / "downloads" / "search_test" / "evaluation-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    path.with_name(f"{path.name}.part").write_bytes(b"of an older edition")
    make(recipe, server, tmp_path / "root", "only=scirepeval_search_test")
    assert path.read_bytes() == files["search_test/evaluation-00000-of-00001.parquet"]
    assert [wanted for _, wanted in server.requests] == ["bytes=19-", None]
    assert "did not match the rest; downloading it from the beginning" in caplog.text


def test_first_download_without_checksum_is_pinned(files, server, tmp_path, recipe, caplog):
    root = tmp_path / "root"
    make(recipe, server, root, "only=maple_mesh")
    assert "mesh/desc2022.xml: the recipe has no checksum, so this first download is trusted, and" in caplog.text
    path = root / "downloads" / "mesh" / "desc2022.xml"
    path.unlink()
    server.files["mesh/desc2022.xml"] = files["mesh/desc2022.xml"].replace(b"What 3 is", b"What 3 was")
    make(recipe, server, root, "only=maple_mesh")  # built, so nothing is needed
    with pytest.raises(UserError, match="first download had sha256 .* remove mesh/desc2022.xml from .*checksums.json"):
        make(recipe, server, root, "only=maple_mesh", "outputs.maple_mesh.reader.seed=3")
    path.write_bytes(server.files["mesh/desc2022.xml"])
    with pytest.raises(UserError, match="first download had sha256"):
        make(recipe, server, root, "only=maple_mesh")
    ledger = json.loads((root / "checksums.json").read_text())
    del ledger["mesh/desc2022.xml"]
    (root / "checksums.json").write_text(json.dumps(ledger))
    make(recipe, server, root, "only=maple_mesh")
    assert BeirReader(str(root / "maple_mesh")).read().corpus["D3"].text == "What 3 was."


def test_checksum_of_an_invalid_archive_is_forgotten(files, server, tmp_path, recipe):
    root = tmp_path / "root"
    server.files["maple/MAPLE.zip"] = b"an error page"
    with pytest.raises(UserError, match="MAPLE.zip: the archive is damaged .*; delete it to download it again"):
        make(recipe, server, root, "only=maple_cs")
    (root / "downloads" / "maple" / "MAPLE.zip").unlink()
    server.files["maple/MAPLE.zip"] = files["maple/MAPLE.zip"]
    make(recipe, server, root, "only=maple_cs")


@pytest.mark.slow
def test_killed_download_resumes(files, server, tmp_path, recipe):
    """Another process is killed with SIGKILL while it downloads from a slow server."""
    root = tmp_path / "root"
    server.waits = 0.3
    command = [
        sys.executable,
        "-m",
        "experiments.data",
        recipe,
        f"data.root={root}",
        f"mirror={server.url}",
        "only=maple_mesh",
    ]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True)
    part = root / "downloads" / "maple" / "MAPLE.zip.part"
    deadline = time.monotonic() + 120
    while not (part.exists() and part.stat().st_size):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    received = part.stat().st_size
    assert 0 < received < len(files["maple/MAPLE.zip"])
    server.waits = 0
    server.requests.clear()
    make(recipe, server, root, "only=maple_mesh")
    assert server.requests[0] == ("maple/MAPLE.zip", f"bytes={received}-")
    assert (root / "downloads" / "maple" / "MAPLE.zip").read_bytes() == files["maple/MAPLE.zip"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "function", "call"),
    [(fetch, "_write_member", 3), (data, "write_beir", 1), (data, "write_json", 1), (data, "count", 2)],
)
def test_interrupted_command_resumes_anywhere(built, server, tmp_path, monkeypatch, recipe, module, function, call):
    """The result is the same, and finished steps are not repeated."""
    original, calls = getattr(module, function), []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(module, function, interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(recipe, server, tmp_path / "root")
    monkeypatch.setattr(module, function, original)
    make(recipe, server, tmp_path / "root")
    assert len({path for path, _ in server.requests}) == len(server.requests)
    for name in OUTPUTS:
        assert BeirReader(str(tmp_path / "root" / name)).read() == BeirReader(str(built[0] / name)).read()
    assert not [
        path for path in (tmp_path / "root").rglob("*") if path.name.endswith(".part") or "maple_cs-" in path.name
    ]


def test_command_interrupted_during_verification_does_not_download_again(server, tmp_path, monkeypatch, recipe):
    """Without a known checksum, the server confirms the version of the file, and sends nothing."""

    def interrupted(path):
        raise KeyboardInterrupt

    measure = sources._measure
    monkeypatch.setattr(sources, "_measure", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            make(recipe, server, tmp_path / "root", "only=maple_mesh")
    monkeypatch.setattr(sources, "_measure", measure)
    make(recipe, server, tmp_path / "root", "only=maple_mesh")
    size = len(server.files["maple/MAPLE.zip"])
    wanted = [wanted for path, wanted in server.requests if path == "maple/MAPLE.zip"]
    assert wanted == [None, f"bytes={size}-", f"bytes={size}-"]
    assert not list((tmp_path / "root" / "downloads").rglob("*.sign"))


def test_folder_of_the_user_is_not_overwritten(server, tmp_path, recipe):
    user_file = tmp_path / "root" / "maple_cs" / "precious.txt"
    user_file.parent.mkdir(parents=True)
    user_file.write_text("mine")
    with pytest.raises(UserError, match="maple_cs: already exists, but was not built by a recipe"):
        make(recipe, server, tmp_path / "root", "only=maple_cs")
    assert user_file.read_text() == "mine"


def test_the_only_copy_of_a_folder_survives_a_build_that_fails(tmp_path, monkeypatch):
    """A command that is killed while it replaces a folder may leave the old one as the only copy."""
    copy = tmp_path / ".maple_cs-12345678.partial.old"
    copy.mkdir()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data, "write_beir", full)
    with pytest.raises(UserError, match="maple_cs: cannot be written .*No space left"):
        data.Output(tmp_path / "maple_cs", None, None, [])._write(Collection({}, {}, {}), {})
    assert copy.is_dir()


def test_bad_lines_can_be_skipped(server, tmp_path, recipe):
    root = tmp_path / "root"
    make(recipe, server, root, "only=maple_cs")
    papers = root / "unpacked" / "maple" / "MAPLE" / "Computer_Science" / "papers.json"
    papers.write_text(papers.read_text() + "{not a paper}\n")
    again = ["only=maple_cs", "outputs.maple_cs.reader.seed=1"]
    with pytest.raises(UserError, match=f"papers.json, line {NUM_PAPERS + 1}: invalid JSON"):
        make(recipe, server, root, *again)
    make(recipe, server, root, *again, "data.on_error=skip")
    assert "invalid JSON" in (root / "maple_cs.quarantine.jsonl").read_text()


def test_only_one_command_runs_at_a_time(server, tmp_path, recipe):
    with data._locked(tmp_path / "root"), pytest.raises(UserError, match="another command is working in"):
        make(recipe, server, tmp_path / "root")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "recipe: required; expected a name (beir_sci, scimult) or a YAML file"),
        (["data.root=x"], "recipe: required; expected a name (beir_sci, scimult) or a YAML file"),
        (
            ["simult"],
            "recipe: unknown recipe 'simult'; did you mean scimult? Expected one of beir_sci, scimult, a YAML",
        ),
        (
            ["scimult", "root=x"],
            "unknown key 'root'; did you mean data.root? Expected one of recipe, data.root, mirror, only",
        ),
        (["scimult", "only=maple"], "only: expected one of maple_cs, maple_mesh"),
        (["scimult", "mirror=/files"], "mirror: expected http:// or https:// and a host, got '/files'"),
        (["scimult", "data.on_error=x"], "data.on_error: expected one of fail, skip, got 'x'"),
        (
            ["scimult", "outputs.maple_cs.readr=x"],
            "scimult.yaml: unknown key outputs.maple_cs.readr; did you mean outputs.maple_cs.reader?",
        ),
        (["scimult", "outputs.maple_cs.reader.max=1"], "outputs.maple_cs.reader: MapleReader has no argument 'max'"),
        (["scimult", "outputs.mag=[1"], "command line: 'outputs.mag=[1' cannot be read"),
        (["scimult", "outputs.mag=${x"], "command line: 'outputs.mag=${x' cannot be read"),
        (["scimult", "sources.mag"], "command line: expected key=value, got 'sources.mag'"),
        (
            ["scimult", "outputs.maple_cs.reader.folder=mapel:x"],
            "unknown source 'mapel'; did you mean maple? Expected one of maple, micol",
        ),
        (
            ["scimult", "outputs.maple_cs.expected.pears=1"],
            "outputs.maple_cs.expected: unknown key 'pears'; did you mean pairs?",
        ),
        (
            ["scimult", "outputs.maple_cs.splits.validation=[dev]"],
            "outputs.maple_cs.splits: unknown key 'validation'; expected one of train, dev, test",
        ),
        (
            ["scimult", "sources.mesh.url=ftp://x"],
            "sources.mesh.url: expected http:// or https:// and a host, got 'ftp://x'",
        ),
        (["scimult", "sources.mesh.unpack=rar"], "sources.mesh.unpack:"),
        (
            ["scimult", "sources.mesh.files={../x: {sha256: null}}"],
            "sources.mesh.files.../x: '..': cannot be part of a file's name",
        ),
        (
            ["scimult", "sources.mesh.files={x: {sha256: 12}}"],
            "sha256: expected 64 digits from 0 to f, or null, got '12'",
        ),
        (["scimult", "sources.mesh.files={x: {}}"], "no value for"),
        (["nowhere.yaml"], "nowhere.yaml: "),
    ],
)
def test_invalid_argument_raises_user_error_with_its_key(tmp_path, arguments, message):
    with pytest.raises(UserError) as caught:
        main([*arguments, *([f"data.root={tmp_path}"] if arguments else [])])
    assert message in str(caught.value)


def test_unknown_split_of_the_reader_raises_user_error(server, tmp_path, recipe):
    with pytest.raises(UserError, match=r"cite_prediction.splits.dev: the reader has no split 'test', only train, dev"):
        make(recipe, server, tmp_path, "only=cite_prediction", "outputs.cite_prediction.splits.dev=[test]")


def test_paper_recipe_builds_the_folders_that_tasks_read():
    tasks = "".join(path.read_text() for path in (ROOT / "experiments" / "tasks").glob("*.yaml"))
    assert list(load_recipe(str(RECIPE)).outputs) == list(OUTPUTS)
    for output in OUTPUTS:
        assert f"${{data.root}}/{output}\n" in tasks


def test_evaluation_sets_are_verified_by_md5_and_merged(tmp_path, server):
    """The second recipe, on archives in BEIR layout."""
    recipe = yaml.safe_load((ROOT / "experiments" / "recipes" / "beir_sci.yaml").read_text())
    for source, spec in recipe["sources"].items():
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as opened:
            for member in (member.replace("*", "dev") for member in spec["members"]):
                opened.writestr(
                    member,
                    BEIR_FILES.get(Path(member).stem, f"query-id\tcorpus-id\tscore\n{Path(member).stem}\td1\t2\n"),
                )
            if source == "nfcorpus":
                for split in ("train", "test"):
                    opened.writestr(f"nfcorpus/qrels/{split}.tsv", f"query-id\tcorpus-id\tscore\n{split}\td2\t1\n")
        (file,) = spec["files"]
        server.files[f"{source}/{file}"] = archive.getvalue()
        spec["files"][file] = {"sha256": None, "md5": hashlib.md5(archive.getvalue()).hexdigest()}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    arguments = [str(tmp_path / "mine.yaml"), f"data.root={tmp_path / 'root'}", f"mirror={server.url}"]
    main(arguments)
    qrels = {name: BeirReader(str(tmp_path / "root" / name)).read().qrels for name in recipe["outputs"]}
    assert qrels["scifact"] == {"test": {"train": {"d1": 2}, "test": {"d1": 2}}}
    assert qrels["nfcorpus"] == {"test": {"train": {"d2": 1}, "dev": {"d1": 2}, "test": {"d2": 1}}}
    assert qrels["trec_covid"] == {"test": {"test": {"d1": 2}}}
    with pytest.raises(UserError, match="expected a file of 2,816,079 bytes, but the server has"):
        main(["beir_sci", f"data.root={tmp_path / 'other'}", f"mirror={server.url}"])
    recipe["sources"]["scifact"]["files"]["scifact.zip"]["md5"] = "0" * 32
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match="scifact.zip: the recipe has md5 0{32}, the file has [0-9a-f]{32}"):
        main(arguments)
