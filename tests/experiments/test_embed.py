"""Embedding a corpus gives the same bits for any division of the work, also after kills and damage."""

import gzip
import json
import re
import signal
import sys
import time

import numpy as np
import pytest
import torch

from datamodules.readers.beir import write_beir
from datamodules.records import Document, UserError
from experiments import embed as embed_entry
from experiments import find as find_entry
from experiments.embed import main
from lightning_modules.encoders.loading import load_encoder
from lightning_modules.retrieval.embedding import open_matrix
from tests.conftest import packed, text_of, toy_collection
from tests.forked import Forked, run

PAPERS = [{"id": f"p{i}", "title": text_of(i), "text": text_of(*range(i, i + i % 9))} for i in range(23)]


@pytest.fixture
def model(make_encoder, tmp_path):
    make_encoder("attention").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def papers(tmp_path):
    path = tmp_path / "papers.jsonl"
    path.write_text("".join(json.dumps(paper) + "\n" for paper in PAPERS))
    return path


@pytest.fixture
def embed(model, papers, tmp_path):
    def run(output, *more, task="search", source=papers):
        arguments = [f"model={model}", f"task={task}", f"input={source}", f"output={tmp_path / output}", "shard_size=5"]
        main([*arguments, *more])
        return tmp_path / output

    return run


def expected(model, task="search"):
    """Encode one text at a time, independently of batches."""
    encoder = load_encoder(model)
    texts = [f"{paper['title']} [SEP] {paper['text']}" if paper["text"] else paper["title"] for paper in PAPERS]
    with torch.inference_mode():
        tokens = [encoder.tokenizer(text, return_tensors="pt", truncation=True, max_length=32) for text in texts]
        return torch.cat([encoder.eval()(packed(t.input_ids, t.attention_mask), task) for t in tokens]).numpy()


@pytest.mark.parametrize("by", ["folder", "pattern"])
def test_shards_of_a_corpus_are_one_corpus(embed, papers, tmp_path, by, caplog, capsys):
    """A folder or a pattern of files gives the vectors of their concatenation, ordered by number."""
    lines = papers.read_text().splitlines(keepends=True)
    folder = tmp_path / "shards of a corpus"
    folder.mkdir()
    for number, start in enumerate(range(0, len(lines), 2)):
        text = "".join(lines[start : start + 2])
        if number % 2:
            (folder / f"part-{number}.jsonl").write_text(text)
        else:
            (folder / f"part-{number}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "about.json").write_text("{}")
    (folder / "README.md").write_text("shards")
    whole = open_matrix(embed("whole"))
    shards = open_matrix(embed("parts", source=folder if by == "folder" else folder / "part-*"))
    assert shards.ids == whole.ids
    np.testing.assert_array_equal(np.load(shards.path), np.load(whole.path))
    find_entry.main([f"embeddings={tmp_path / 'parts'}", "query=some words", "k=3"])
    shown = capsys.readouterr().out
    assert sum(paper["title"] in shown for paper in PAPERS if paper["title"]) >= 3


@pytest.mark.parametrize("name", ["nothing-*.jsonl", "empty", "missing", "queries"])
def test_input_without_texts_says_what_is_expected(embed, tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "queries").mkdir()
    (tmp_path / "queries" / "queries.jsonl").write_text('{"_id": "q", "text": "x"}\n')
    with pytest.raises(UserError, match="^input: .*expected"):
        embed("out", source=tmp_path / name)


def test_matrix_rows_are_the_vectors_of_the_texts_in_file_order(embed, model):
    matrix = open_matrix(embed("out", "similarity=dot"), "search")
    assert matrix.ids == [paper["id"] for paper in PAPERS]
    np.testing.assert_allclose(matrix.vectors[0], expected(model), atol=1e-5)
    assert matrix.metadata["similarity"] == "dot"


def test_several_tasks_cosine_and_half_precision(embed, model, capsys):
    folder = embed("out", "dtype=float16", task="all")
    for task in ("classification", "link_prediction", "search"):
        expected_vectors = expected(model, task)
        vectors = open_matrix(folder, task).vectors[0]
        assert vectors.dtype == np.float16
        np.testing.assert_allclose(
            vectors, expected_vectors / np.linalg.norm(expected_vectors, axis=1, keepdims=True), atol=2e-3
        )
    with pytest.raises(UserError, match="task: expected one of classification, link_prediction, search, .* got none"):
        open_matrix(folder)


def test_any_parts_in_any_order_give_the_bits_of_one_process(embed, monkeypatch):
    whole = embed("whole.npy")
    parts = whole.with_name("parts.npy")
    for part in ("2/3", "3/3", "1/3"):
        assert not parts.exists()
        embed("parts.npy", f"part={part}")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "4")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    for number in (4, 5):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number))
        embed("array.npy")
    for path in (parts, whole.with_name("array.npy")):
        assert path.read_bytes() == whole.read_bytes()
        assert path.with_name(f"{path.name}.ids.txt").read_text() == "".join(f"{p['id']}\n" for p in PAPERS)


def test_a_part_does_not_merge_shards_of_texts_that_have_changed(embed, papers, caplog):
    """After a change of the input, the first part merged its new vectors with old vectors of the other part."""
    output = embed("out")
    before = (output / "search.npy").read_bytes()
    papers.write_text(papers.read_text().replace('"p1"', '"first"').replace('"p6"', '"sixth"'))
    with caplog.at_level("INFO"):
        embed("out", "part=1/2")
    assert "1 of 5 shards are still missing or outdated (first: shard 1)" in caplog.text
    assert (output / "search.npy").read_bytes() == before
    embed("out", "part=2/2")
    assert [open_matrix(output).ids[i] for i in (1, 6)] == ["first", "sixth"]


def test_speed_is_logged(embed, model, caplog):
    """The tokens are those of the tokenizer, and both speeds are per the same seconds."""
    with caplog.at_level("INFO"):
        embed("out")
    count, texts, tokens = re.search(
        r"([\d,]+) texts embedded, ([\d,.]+) texts/s, ([\d,]+) tokens/s, MFU \d+%", caplog.text
    ).groups()
    assert int(count) == len(PAPERS)
    encoder = load_encoder(model)
    encoder.encode([Document(p["id"], p["title"], p["text"]) for p in PAPERS], "search")
    ratio = float(tokens.replace(",", "")) / float(texts.replace(",", ""))
    assert ratio == pytest.approx(encoder.encoded["tokens"] / len(PAPERS), rel=0.01)


def test_only_missing_damaged_and_changed_shards_are_embedded_again(embed, papers, monkeypatch, caplog):
    output, made = embed("out"), []
    before = (output / "search.npy").read_bytes()
    original = embed_entry.embed_shards

    def recorded(encoder, shards, *arguments, **options):
        for shard in original(encoder, shards, *arguments, **options):
            made.append(shard[1][0].id)
            yield shard

    monkeypatch.setattr(embed_entry, "embed_shards", recorded)
    embed("out")
    assert made == []
    damaged = output / "shards" / "00001.search.npy"
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    (output / "shards" / "00003.search.npy").write_bytes(b"half")
    (output / "shards" / "00004.json").write_text('{"ids": [')
    (output / "search.npy").unlink()
    embed("out")
    assert made == ["p5", "p15", "p20"]
    assert "00001.search.npy: damaged" in caplog.text
    assert (output / "search.npy").read_bytes() == before
    lines = papers.read_text().splitlines()
    papers.write_text(
        "\n".join([*lines[:6], lines[6].replace("p6", "new"), *lines[7:], lines[0].replace("p0", "last")])
    )
    embed("out")
    assert made[3:] == ["p5", "p20"]
    assert open_matrix(output).ids[6] == "new"
    assert len(open_matrix(output).ids) == 24


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_an_id_on_two_lines_is_refused_before_anything_is_embedded(embed, papers, tmp_path, on_error):
    """It was only a warning, after hours, and `make find` showed the same id twice. The lines may be in two files."""
    lines = papers.read_text().splitlines()
    folder = tmp_path / "shards_of_texts"
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(lines[:9]))
    (folder / "b.jsonl").write_text("\n".join([*lines[9:], lines[7]]))
    with pytest.raises(UserError, match=r"b.jsonl, line \d+: the id 'p7' is also in \S+a.jsonl, line 8; remove one"):
        embed("out", f"on_error={on_error}", source=folder)
    assert not list((tmp_path / "out").glob("shards/*.npy"))


def test_shards_with_other_settings_raise_user_errors(embed, model, make_encoder, monkeypatch):
    folder = embed("out")
    with pytest.raises(UserError, match="contains vectors made with different settings .*dtype: float32 then"):
        embed("out", "dtype=float16")
    with pytest.raises(UserError, match="different settings .precision: fp32 then, bf16 now"):
        embed("out", "precision=bf16")
    with pytest.raises(UserError, match="precision: expected one of auto, fp32, tf32, bf16, fp16, got 'float32'"):
        embed("out", "precision=float32")
    about = folder / "shards" / "about.json"
    about.write_text(about.read_text().replace('"fp32"', '"float32"'))  # as earlier versions wrote it
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    embed("out", "precision=auto")
    make_encoder("attention", seed=1).save_pretrained(model)
    with pytest.raises(UserError, match="different settings .model: "):
        embed("out")


def test_sources_and_bad_lines(embed, papers, tmp_path):
    with gzip.open(tmp_path / "papers.jsonl.gz", "wt") as file:
        file.write(papers.read_text())
    write_beir(toy_collection(), tmp_path / "beir")
    assert open_matrix(embed("gz", source=tmp_path / "papers.jsonl.gz")).ids == [paper["id"] for paper in PAPERS]
    assert open_matrix(embed("beir", source=tmp_path / "beir")).ids == [f"d{i}" for i in range(10)]
    lines = papers.read_text().splitlines()
    lines[7] = '{"id": "p7"}'
    papers.write_text("\n".join(lines))
    with pytest.raises(UserError, match="papers.jsonl, line 8: document 'p7' has neither title nor text"):
        embed("bad")
    folder = embed("bad2", "on_error=skip")
    assert open_matrix(folder).ids == [paper["id"] for paper in PAPERS if paper["id"] != "p7"]
    assert json.loads((folder / "shards" / "quarantine-1.jsonl").read_text())["line"] == 8


@pytest.mark.slow
def test_processes_of_one_machine_divide_its_part(embed, model, papers, tmp_path):
    whole = embed("whole.npy")
    arguments = [f"model={model}", "task=search", f"input={papers}", f"output={tmp_path / 'parts.npy'}", "shard_size=5"]
    command = [sys.executable, "-m", "experiments.embed", *arguments]
    done = run([*command, "part=1/2", "devices=2"])
    assert (done.returncode, done.stderr) == (0, "")
    shards = {path.stem for path in (tmp_path / "parts.npy.shards").glob("0*.json")}
    assert shards == {"00000", "00001", "00004"}  # of five: processes 1 and 2 of four
    embed("parts.npy")
    assert (tmp_path / "parts.npy").read_bytes() == whole.read_bytes()
    papers.write_text("{")
    done = run([*command, "devices=2"])
    assert done.returncode == 2
    assert "papers.jsonl" in done.stderr


@pytest.mark.slow
def test_bits_do_not_depend_on_killed_processes(embed, model, papers, tmp_path):
    """SIGKILL two of three processes as they write. The third finishes, and the next command does the rest."""
    many = [{"id": f"m{i}", "text": text_of(*range(i % 50, i % 50 + 2 + i % 13))} for i in range(4000)]
    papers.write_text("".join(json.dumps(paper) + "\n" for paper in many))
    arguments = [f"model={model}", "task=search", f"input={papers}", f"output={tmp_path / 'parts'}", "shard_size=50"]
    command = [sys.executable, "-m", "experiments.embed", *arguments]
    workers = [Forked([*command, f"part={i}/3"]) for i in (1, 2, 3)]
    shards, doomed = tmp_path / "parts" / "shards", {0, 1}
    deadline = time.monotonic() + 120
    while doomed and time.monotonic() < deadline:
        writers = {int(path.stem) % 3 for path in shards.glob("0*.json")}
        for number in doomed & writers:
            workers[number].kill()
        doomed -= writers
        time.sleep(0.002)
    codes = [worker.wait(timeout=120) for worker in workers]
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert not (tmp_path / "parts" / "search.npy").exists()
    embed("parts", "shard_size=50")
    whole = embed("whole", "shard_size=50")
    assert (tmp_path / "parts" / "search.npy").read_bytes() == (whole / "search.npy").read_bytes()
    assert open_matrix(whole).ids == [paper["id"] for paper in many]


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0" * 8)


def alter(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 8
    path.write_bytes(bytes(content))


def swap_lines(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[1], lines[0], *lines[2:]]))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("search.npy", cut),
        ("search.npy", lengthen),
        ("search.npy", alter),
        ("search.npy", lambda path: path.write_bytes(b"")),
        ("search.npy.ids.txt", cut),
        ("search.npy.ids.txt", swap_lines),
        ("search.npy.ids.txt", lambda path: path.unlink()),
        ("search.npy.ids.txt", lambda path: path.write_bytes(b"\xff\n" * 23)),
        ("search.npy.json", cut),
        ("search.npy.json", lambda path: path.write_text("[]")),
        ("shards/00001.json", lambda path: path.write_text("[1]")),
        ("shards/00001.json", lambda path: path.write_text('{"ids": 3, "texts": "x", "vectors": {}}')),
    ],
)
def test_damaged_matrix_is_merged_again_by_the_same_command(embed, caplog, file, damage):
    """A truncated or altered matrix was accepted as complete."""
    folder = embed("out")
    good = {path.name: path.read_bytes() for path in folder.glob("search.npy*")}
    damage(folder / file)
    embed("out")
    assert {path.name: path.read_bytes() for path in folder.glob("search.npy*")} == good
    assert "damaged" in caplog.text or "cannot be read" in caplog.text or "expected" in caplog.text
    written = (folder / "search.npy").stat().st_mtime_ns
    embed("out")  # intact: not written again
    assert (folder / "search.npy").stat().st_mtime_ns == written


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"', '{"precision": []}', "{", "", "[" * 100_000])
def test_settings_of_shards_that_are_not_an_object_raise_user_error(embed, content):
    about = embed("out") / "shards" / "about.json"
    about.write_text(content)
    with pytest.raises(UserError, match=r"about.json: |different settings"):
        embed("out")


@pytest.mark.parametrize("content", ["[]", "3", "null", "{}", '{"ids": 3, "texts": "a", "vectors": {}}'])
def test_damaged_record_of_a_shard_is_replaced(embed, content, caplog):
    folder = embed("out")
    before = (folder / "search.npy").read_bytes()
    (folder / "shards" / "00001.json").write_text(content)
    embed("out")
    assert (folder / "search.npy").read_bytes() == before
    assert "00001.json: " in caplog.text
    assert "embedding its texts again" in caplog.text


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_precision_of_the_encoder_is_used_and_recorded(embed, model, precision):
    exact = open_matrix(embed("exact"), "search").vectors[0]
    matrix = open_matrix(embed("rounded", f"precision={precision}"), "search")
    assert matrix.metadata["precision"] == precision
    error = np.abs(matrix.vectors[0] - exact).max()
    assert 0 < error < (0.004 if precision == "fp16" else 0.03)


def test_similarity_of_the_training_is_the_default(embed, model):
    encoder = load_encoder(model)
    for similarity in ("dot", "cosine"):
        encoder.similarity = similarity
        encoder.save_pretrained(model)
        assert open_matrix(embed(similarity), "search").metadata["similarity"] == similarity
