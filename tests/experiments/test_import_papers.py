"""make import: every format, and every count of the table against what was written."""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from datamodules.readers.beir import BeirReader
from datamodules.readers.papers import PapersReader
from datamodules.records import UserError
from experiments.import_papers import main
from tests.datamodules.papers.worlds import (
    WITHOUT_TEXT,
    WORLDS,
    Truth,
    World,
    in_file,
    papers,
    semantic_scholar_bulk,
)

world = pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
NOT_IN_FILES = "references to papers that are not in the files"


def split_of(id: str) -> str:
    """Return the split of 80/10/10, computed here again."""
    percent = int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "big") % 100
    return "dev" if percent < 10 else "test" if percent < 20 else "train"


def by_split(world: World, numbers: list[int]) -> dict[str, int]:
    counts = Counter(split_of(world.id(number)) for number in numbers)
    return {split: counts[split] for split in ("train", "dev", "test") if counts[split]}


def expected_tasks(world: World, truths: list[Truth]) -> dict[str, dict]:
    kept = [truth for truth in truths if truth.number != WITHOUT_TEXT]
    sizes = Counter(label for truth in kept for label in world.labels(truth))
    frequent = {label for label, size in sizes.items() if size >= 5}
    pairs = [t.number for t in kept for label in world.labels(t) if label in frequent]
    classification = {
        "documents": len(frequent),
        "kind": "label",
        "queries": by_split(world, sorted(set(pairs))),
        "pairs": by_split(world, pairs),
        "left_out": {"labels of fewer than 5 papers": len(sizes) - len(frequent)},
        "problem": "",
    }
    citing = [t.number for t in kept for number in t.references if number not in (None, WITHOUT_TEXT)]
    dropped = len(truths[WITHOUT_TEXT].references)
    links = {
        "documents": len(kept),
        "kind": "paper",
        "queries": by_split(world, sorted(set(citing))),
        "pairs": by_split(world, citing),
        "left_out": {
            NOT_IN_FILES: sum(len(t.references) for t in kept) - len(citing),
            "citations of papers that are not in the files": dropped,
        },
        "problem": "",
    }
    found = [t.number for t in kept if t.title and t.abstract]
    search = {
        "documents": sum(bool(t.abstract) for t in kept),
        "kind": "abstract",
        "queries": by_split(world, found),
        "pairs": by_split(world, found),
        "left_out": {"papers without title or abstract, as queries": len(kept) - len(found)},
        "problem": "",
    }
    for task in (classification, links, search):
        task["left_out"] = {reason: count for reason, count in task["left_out"].items() if count}
    return {"classification": classification, "link_prediction": links, "search": search}


def imported(source, output, *arguments: str) -> dict:
    main([str(source), f"output={output}", *arguments])
    return json.loads((output / "import.json").read_text(encoding="utf-8"))


@world
def test_counts_of_the_import_are_those_of_the_papers_that_were_written(world: World, tmp_path, capsys):
    truths = papers()
    world.write(tmp_path / world.file, in_file(truths))
    summary = imported(tmp_path / world.file, tmp_path / "out")
    expected = expected_tasks(world, truths)
    if not world.has_references:
        problem = "no reference from one paper of the files to another"
        expected["link_prediction"] = {"documents": 0, "kind": "", "queries": {}, "pairs": {}, "left_out": {}} | {
            "problem": problem
        }
    assert summary["tasks"] == expected
    assert summary["records"] == len(truths) + 1 + world.extra
    assert summary["papers"] == len(truths) - 1
    left_out = {"papers with the id of an earlier one, but another title": 1, "papers without title and abstract": 1}
    if world.extra:
        left_out["not papers (notes, attachments, unknown ids)"] = world.extra
    assert summary["left_out"] == left_out
    table = capsys.readouterr().out
    for task in expected.values():
        for count in (
            task["documents"],
            sum(task["pairs"].values()),
            *task["queries"].values(),
            *task["left_out"].values(),
        ):
            assert f"{count:,}" in table
    assert not (tmp_path / "out.quarantine.jsonl").exists()


@world
def test_folders_have_the_texts_and_judgements_that_were_written(world: World, tmp_path):
    truths = papers(60)
    world.write(tmp_path / world.file, in_file(truths))
    main([str(tmp_path / world.file), f"output={tmp_path / 'out'}", "min_papers=1"])
    kept = {world.id(t.number): t for t in truths if t.number != WITHOUT_TEXT}

    labelled = BeirReader(str(tmp_path / "out" / "classification")).read()
    assert {id: (d.title, d.text) for id, d in labelled.queries.items()} == {
        id: (t.title, t.abstract) for id, t in kept.items()
    }
    names = {
        id: sorted(labelled.corpus[label].title for label in labels)
        for q in labelled.qrels.values()
        for id, labels in q.items()
    }
    assert names == {id: sorted(world.label_names(t)) for id, t in kept.items()}

    if world.has_references:
        linked = BeirReader(str(tmp_path / "out" / "link_prediction")).read()
        links = {id: set(cited) for qrels in linked.qrels.values() for id, cited in qrels.items()}
        within = {id: {world.id(n) for n in t.references if n not in (None, WITHOUT_TEXT)} for id, t in kept.items()}
        assert links == {id: cited for id, cited in within.items() if cited}
        assert linked.queries.items() <= linked.corpus.items()

    searched = BeirReader(str(tmp_path / "out" / "search")).read()
    assert {id: (d.title, d.text) for id, d in searched.corpus.items()} == {
        id: ("", t.abstract) for id, t in kept.items() if t.abstract
    }
    for qrels in searched.qrels.values():
        for query, grades in qrels.items():
            (id,) = grades
            assert searched.queries[query].text == kept[id].title


@world
def test_reader_of_the_file_gives_the_collections_of_the_import(world: World, tmp_path, caplog):
    world.write(tmp_path / world.file, in_file(papers(60)))
    main([str(tmp_path / world.file), f"output={tmp_path / 'out'}"])
    for kind, view in (("classification", "labels"), ("link_prediction", "citations"), ("search", "searches")):
        if (tmp_path / "out" / kind).exists():
            collection = BeirReader(str(tmp_path / "out" / kind)).read()
            assert PapersReader(str(tmp_path / world.file), view).read() == collection
    assert "left out: papers with the id of an earlier one, but another title: 1" in caplog.text


def test_papers_file_can_be_imported_again(tmp_path):
    WORLDS[0].write(tmp_path / "works.jsonl", in_file(papers()))
    first = imported(tmp_path / "works.jsonl", tmp_path / "first")
    again = imported(tmp_path / "first" / "papers.jsonl", tmp_path / "again", "split=given")
    for kind in ("queries", "pairs", "documents"):
        assert [t[kind] for t in again["tasks"].values()] == [t[kind] for t in first["tasks"].values()]


def test_bulk_data_of_semantic_scholar_is_joined_by_id(tmp_path):
    truths = papers()
    semantic_scholar_bulk(tmp_path / "bulk", truths)
    summary = imported(tmp_path / "bulk", tmp_path / "out")
    bulk = World("", semantic_scholar_bulk, str, b"", "fields", True)
    expected = expected_tasks(bulk, truths)
    assert summary["tasks"] == expected
    assert summary["papers"] == len(truths) - 1


def test_files_of_several_formats_are_one_library(tmp_path):
    by_name = {world.name: world for world in WORLDS}
    truths = papers(100)
    by_name["bibtex"].write(tmp_path / "a.bib", truths[:50])
    by_name["ris"].write(tmp_path / "b, c.ris", truths[50:])
    summary = imported(tmp_path, tmp_path / "out")
    assert summary["formats"] == {"bibtex": 1, "ris": 1}
    assert summary["papers"] == 99
    assert imported(tmp_path / "b, c.ris", tmp_path / "ris")["papers"] == 50


def test_files_may_be_several_arguments(tmp_path, monkeypatch):
    """import *.bib ended with an error, and so did many names with commas between them, as one long name."""
    monkeypatch.chdir(tmp_path)
    names = [f"library {number} with a long, long name.json" for number in range(12)]
    for name in names:
        Path(name).write_text(json.dumps([{"id": name, "title": "A title", "abstract": "Text"}]))
    main(["output=out", *names])
    assert len(Path("out/papers.jsonl").read_text().splitlines()) == 12
    short = [f"a rather long name of a library {number}.json" for number in range(12)]
    for old, new in zip(names, short, strict=True):
        Path(old).rename(new)
    assert imported(",".join(short), Path("joined"))["papers"] == 12


def test_paper_of_two_databases_is_one_paper(tmp_path):
    """It was two, one of which could be in the train split, and the other one in the test split."""
    export = [
        {"id": "a", "title": "On <i>cells</i>", "doi": "10.1234/X", "keywords": ["x"], "references": ["w"]},
        {"id": "w", "title": "Proceedings: one", "abstract": "First.", "doi": "10.1234/volume"},
        {"id": "v", "title": "Proceedings: two", "abstract": "Second.", "doi": "10.1234/volume"},
    ]
    other = [
        {"id": "b", "title": "On Cells.", "abstract": "Text.", "year": 2001, "doi": "https://doi.org/10.1234/x"},
        {"id": "c", "title": "Citing", "abstract": "It cites.", "references": ["b"]},
        {"id": "w", "title": "Another paper", "abstract": "With the same key."},
    ]
    other[0] |= {"keywords": ["y"], "references": ["c"]}
    for name, records in (("1.json", export), ("2.json", other)):
        (tmp_path / name).write_text(json.dumps(records))
    summary = imported(tmp_path / "1.json", tmp_path / "out", str(tmp_path / "2.json"))
    assert summary["left_out"] == {
        "papers with DOI and title of an earlier one (joined with it)": 1,
        "papers with the id of an earlier one, but another title": 1,
    }
    lines = (tmp_path / "out" / "papers.jsonl").read_text().splitlines()
    by_id = {paper["id"]: paper for paper in map(json.loads, lines)}
    assert list(by_id) == ["a", "w", "v", "c"]
    assert (by_id["a"]["abstract"], by_id["a"]["year"], by_id["a"]["keywords"]) == ("Text.", 2001, ["x", "y"])
    assert sorted(by_id["a"]["references"]) == ["c", "w"]
    links = {(paper["id"], cited) for paper in by_id.values() for cited in paper["references"]}
    assert links == {("a", "w"), ("a", "c"), ("c", "b")}
    assert summary["tasks"]["link_prediction"]["pairs"] == {"train": 3}


def test_folder_can_be_imported_twice(tmp_path, monkeypatch):
    """The second import read the output of the first one, and a file of bad records that it had just removed."""
    monkeypatch.chdir(tmp_path)
    rows = [{"id": number, "title": f"Title {number}", "abstract": "Text", "keywords": ["a"]} for number in range(20)]
    Path("papers.json").write_text(json.dumps([*rows, {"title": 5}]))
    for output in ("first", "second"):
        assert imported(".", Path(output))["records"] == 21
    assert imported("first", Path("third"))["papers"] == 20
    shutil.rmtree("first")
    assert imported(".", Path("first"))["records"] == 21


def test_papers_are_split_by_year(tmp_path):
    truths = papers()
    WORLDS[0].write(tmp_path / "works.jsonl", truths)
    years = {f"W{t.number}": t.year for t in truths}
    imported(tmp_path / "works.jsonl", tmp_path / "out", "split=2010/2015")
    collection = BeirReader(str(tmp_path / "out" / "search")).read()
    for split, first, last in (("train", 2000, 2010), ("dev", 2011, 2015), ("test", 2016, 2019)):
        assert {years[id] for grades in collection.qrels[split].values() for id in grades} == set(
            range(first, last + 1)
        )


def test_queries_of_a_file_find_papers(tmp_path):
    truths = papers(50)
    WORLDS[0].write(tmp_path / "works.jsonl", truths)
    queries = [
        {
            "query": "graphs",
            "positives": ["W1", "doi:10.1234/x1", "doi:10.1234/x2"],
            "negatives": ["W3"],
            "split": "train",
        },
        {"query": "cells", "positives": {"W4": 2, "W999": 1}, "split": "validation"},
        {"query": "nothing", "positives": ["W999"], "split": "test"},
        {"query": 5, "positives": ["W1"]},
        {"query": "soil", "positives": ["W6"], "split": "train"},
    ]
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    summary = imported(tmp_path / "works.jsonl", tmp_path / "out", f"search={tmp_path / 'queries.jsonl'}")
    collection = BeirReader(str(tmp_path / "out" / "search")).read()
    texts = {
        split: {collection.queries[q].text: g for q, g in qrels.items()} for split, qrels in collection.qrels.items()
    }
    assert texts == {"train": {"graphs": {"W1": 1, "W2": 1, "W3": 0}, "soil": {"W6": 1}}, "dev": {"cells": {"W4": 2}}}
    assert summary["records"] == 50
    assert summary["tasks"]["search"]["left_out"] == {
        "ids of papers that are not in the files": 2,
        "queries without a positive in the files": 1,
    }
    (tmp_path / "queries.csv").write_text(
        "query,positives,negatives,split\ngraphs,W1;W2,,train\ngraphs,W3;W2,W1;W4,train\n"
    )
    imported(tmp_path / "works.jsonl", tmp_path / "csv", f"search={tmp_path / 'queries.csv'}")
    collection = BeirReader(str(tmp_path / "csv" / "search")).read()
    assert collection.qrels == {"train": {"query.1": {"W1": 1, "W2": 1, "W3": 1, "W4": 0}}}


@pytest.mark.parametrize(
    ("judged", "message"),
    [
        ({"positives": {"W1": 2, "W3": 0}}, "positives: grades must be above 0, got {'W1': 2, 'W3': 0}"),
        ({"positives": ["W1", "W3"], "negatives": ["W3"]}, "'W3' is both a positive and a negative"),
        ({"positives": ["W1"], "negatives": {"W3": 2}}, "negatives must be a list, got {'W3': 2}"),
        ({"positives": ["W1"], "negatives": ["doi:10.1234/x1"]}, "the paper 'W1' has two grades"),
    ],
)
def test_contradictory_judgements_of_a_query_raise_user_error(tmp_path, judged, message):
    """A positive that was a negative, too, got grade 0, and a grade of -3 was written."""
    WORLDS[0].write(tmp_path / "works.jsonl", papers(20))
    (tmp_path / "queries.jsonl").write_text(json.dumps({"query": "graphs"} | judged))
    with pytest.raises(UserError) as caught:
        main(
            [
                *map(str, (tmp_path / "works.jsonl", f"output={tmp_path / 'out'}")),
                "on_error=fail",
                f"search={tmp_path / 'queries.jsonl'}",
            ]
        )
    assert str(caught.value).startswith(f"{tmp_path / 'queries.jsonl'}, line 1: {message}")


def test_keywords_of_a_paper_find_it(tmp_path):
    truths = papers(50)
    WORLDS[0].write(tmp_path / "works.jsonl", truths)
    imported(tmp_path / "works.jsonl", tmp_path / "out", "search=keywords")
    collection = BeirReader(str(tmp_path / "out" / "search")).read()
    by_text = {
        ", ".join(sorted(t.keywords)): {f"W{u.number}" for u in truths if sorted(u.keywords) == sorted(t.keywords)}
        - {f"W{WITHOUT_TEXT}"}
        for t in truths
    }
    found = {collection.queries[q].text: set(g) for qrels in collection.qrels.values() for q, g in qrels.items()}
    assert found == {text: ids for text, ids in by_text.items() if ids}
    assert len(collection.corpus) == 49


def test_labels_get_definitions_from_a_file(tmp_path):
    by_name = {world.name: world for world in WORLDS}
    by_name["pubmed"].write(tmp_path / "pubmed.xml", papers())
    records = [{"label": "D1", "name": "cell biology", "definition": "About cells."}]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, records)))
    imported(tmp_path / "pubmed.xml", tmp_path / "out", f"definitions={tmp_path / 'labels.jsonl'}")
    corpus = BeirReader(str(tmp_path / "out" / "classification")).read().corpus
    assert {d.title: d.text for d in corpus.values() if d.text} == {"Cell Biology": "About cells."}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("split=80/10", "split: expected three percentages that add up to 100"),
        ("split=2015/2010", "split: expected three percentages"),
        ("labels=topic", "labels: expected one of topics, mesh, fields, keywords"),
        (f"search={'words ' * 60}", "search: expected title, keywords, or a file of queries"),
        ("search=titel", "search: expected title, keywords, or a file of queries, got 'titel'"),
        ("columns=title", "columns: expected NAME:COLUMN, such as title:Titel, got 'title'"),
        ("columns=titel:Titel", "columns: expected one of id, title"),
        ("format=bib", "format: expected one of "),
        ("definitions=nowhere", "definitions: nowhere is not a file"),
    ],
)
def test_wrong_option_raises_user_error(tmp_path, argument, message):
    WORLDS[0].write(tmp_path / "works.jsonl", papers(20))
    with pytest.raises(UserError) as caught:
        main([str(tmp_path / "works.jsonl"), f"output={tmp_path / 'out'}", argument])
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_records_are_counted_and_saved(tmp_path):
    WORLDS[0].write(tmp_path / "works.jsonl", papers(50))
    with open(tmp_path / "works.jsonl", "a") as file:
        file.write('{"id": "https://openalex.org/W77", "title": 5}\n{"id": "https://openalex.org/W78"')
    summary = imported(tmp_path / "works.jsonl", tmp_path / "out")
    assert summary["records"] == 52
    assert sum(summary["left_out"].values()) == 3
    assert len((tmp_path / "out.quarantine.jsonl").read_text().splitlines()) == 2
    with pytest.raises(UserError, match=r"works.jsonl, line 51: title must be a string, got 5"):
        main([str(tmp_path / "works.jsonl"), f"output={tmp_path / 'other'}", "on_error=fail"])
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("year", "split"), [(2010, "train"), (2020, "test")])
def test_printed_command_evaluates_on_a_split_that_has_queries(tmp_path, caplog, year, split):
    rows = [{"title": f"Title {number}", "abstract": f"Text {number}.", "year": 2010} for number in range(3)]
    rows.append({"title": "Last title", "abstract": "Last text.", "year": year})
    (tmp_path / "papers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with caplog.at_level("INFO"):
        imported(tmp_path / "papers.jsonl", tmp_path / "out", "split=2015")
    (command,) = [message for message in caplog.messages if message.startswith("Next: make train")]
    assert command.endswith(f"evaluation.split={split}") == (split != "test")
