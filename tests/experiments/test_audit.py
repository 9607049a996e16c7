"""The audit command."""

import json

import pytest

from datamodules.readers.beir import BeirReader, write_beir
from datamodules.records import Collection, Document, UserError
from experiments.audit import _examples, main
from tests.experiments.test_train import TINY


def test_planted_documents_are_reported(tmp_path, beir_root, capsys):
    collection = BeirReader(str(beir_root / "scitldr")).read()
    used = {d for qrels in collection.qrels["train"].values() for d in qrels}
    planted = [collection.corpus[name] for name in sorted(used)[:7]]
    unrelated = {
        f"s{i}": Document(f"s{i}", f"nothing like it {i}", " ".join(f"w{i}x{j}" for j in range(30))) for i in range(9)
    }
    corpus = {
        f"p{i}": Document(f"p{i}", document.title, document.text) for i, document in enumerate(planted)
    } | unrelated
    query = {"q": Document("q", "", "some question of its own with many words in it")}
    write_beir(Collection(corpus, query, {"test": {"q": {"p0": 1}}}), tmp_path / "other")
    output = tmp_path / "leakage.json"
    main(["moe", *TINY, f"beir={tmp_path / 'other'}", f"output={output}", "examples=2"])
    report = json.loads(output.read_text())["evaluated"]
    overlaps = report[f"{tmp_path / 'other'}, corpus"]["overlaps"]
    assert overlaps["text"] == 7
    assert overlaps["title"] >= 7
    assert report[f"{tmp_path / 'other'}, queries"]["overlaps"] == {"title": 0, "text": 0}
    for name in ("topics", "citations"):
        assert report[f"{name}, test queries"]["overlaps"]["id"] == 0
    assert len(report[f"{tmp_path / 'other'}, corpus"]["examples"]) == 4
    assert "evaluation texts in the training data" in capsys.readouterr().out
    node = f"{{_target_: datamodules.readers.beir.BeirReader, folder: {tmp_path / 'other'}}}"
    write_beir(Collection(corpus, query, {"train": {"q": {"p0": 1}}}), tmp_path / "other")
    (tmp_path / "other" / "qrels" / "test.tsv").unlink()
    with pytest.raises(UserError, match="nothing to compare with: no task has a dev or test split"):
        main(["moe", *TINY[3:], "tasks=[search]", f"task.search.data={{searches: null, x: {node}}}"])
    with pytest.raises(UserError, match="experiment: expected one of adapters"):
        main([])
    with pytest.raises(UserError, match="examples: expected a whole number, got 'x'"):
        main(["moe", *TINY, "examples=x"])


def test_each_configuration_has_its_report_and_each_pair_is_shown_once(tmp_path, beir_root, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for further in ([], [f"beir={beir_root / 'scitldr'}"], []):
        main(["moe", *TINY, *further])
    assert [path.parent.name for path in tmp_path.rglob("*.json")] == ["audits"] * 2
    pairs = [f"'p{i}' ('a study by hand') is 'd{i}' ('a study by hand')" for i in range(3)]
    by_title, by_text = ([f"{pair} by {way}, similarity 1.00" for pair in pairs] for way in ("title", "text"))
    assert _examples({"id": [], "title": by_title[:1], "text": by_text}, 2) == [by_title[0], *by_text[1:]]
    assert _examples({"title": by_title, "text": by_text}, 0) == []
