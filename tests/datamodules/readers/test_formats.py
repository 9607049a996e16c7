"""Details of single formats, beyond the contract of all readers."""

import gzip
import json
import sys
import types

import pyarrow
import pytest
from pyarrow import parquet

from datamodules.batches import BatchOptions
from datamodules.conversion import stored
from datamodules.readers.beir_hub import BeirHubReader
from datamodules.readers.csfcube import CsfCubeReader
from datamodules.readers.doris_mae import DorisMaeReader
from datamodules.readers.dpr import DprReader
from datamodules.readers.jsonl import JsonlReader
from datamodules.readers.maple import MapleReader
from datamodules.readers.pmc_patients import PmcPatientsReader
from datamodules.readers.scidocs import SciDocsReader
from datamodules.readers.scimult import SciMultReader
from datamodules.readers.scirepeval import SciRepEvalReader
from datamodules.readers.scirepeval_examples import SciRepEvalExamplesReader
from datamodules.readers.texts import text_files
from datamodules.records import Collection, Document, Task, UserError
from datamodules.tasks import SearchDataModule
from tests.datamodules.readers.test_contract import check_consistent, error_of, files
from tests.datamodules.readers.worlds import beir, doris_mae, maple, papers, put, search, triplets, written


def test_jsonl_file_may_be_one_list(tmp_path):
    put(tmp_path / "corpus.json", [{"_id": "d1", "text": "x"}, {"_id": 2, "text": "y"}])
    put(tmp_path / "test.json", [{"query": "w", "positives": [2]}])
    collection = JsonlReader(str(tmp_path)).read()
    assert list(collection.corpus) == ["d1", "2"]
    assert collection.qrels == {"test": {"test.1": {"2": 1}}}


def test_lines_with_the_same_query_are_joined(tmp_path):
    """In a file with one line per pair, the positives of one line were negatives of the others."""
    put(tmp_path / "corpus.jsonl", *({"id": id, "text": id} for id in "abcd"))
    text, other = {"title": "t", "text": "w"}, {"title": "t w", "text": ""}
    put(
        tmp_path / "train.jsonl",
        {"query": "w", "positives": ["a"], "negatives": ["b", "d"]},
        {"query": text, "positives": ["a"]},
        {"query": "a", "positives": {"b": 1}, "negatives": ["c"]},
        {"query": "w", "positives": {"b": 2}, "negatives": ["a"]},
        {"query": other, "positives": ["d"]},
        {"query": text, "positives": ["c"]},
        {"query": "a", "positives": {"c": 1, "b": 3}},
    )
    put(tmp_path / "test.jsonl", {"query": "w", "positives": ["c"]}, {"query": "w", "positives": ["d"]})
    reader = JsonlReader(str(tmp_path))
    expected = {
        "train": {"train.1": {"a": 1, "b": 2, "d": 0}, "train.2": {"a": 1, "c": 1}, "a": {"b": 3, "c": 1}}
        | {"train.5": {"d": 1}},
        "test": {"test.1": {"c": 1, "d": 1}},
    }
    actual = stored(reader, tmp_path / "cache")
    assert {split: actual.judged(split)[1] for split in actual.splits} == reader.read().qrels == expected
    assert list(actual.queries) == list(reader.read().queries) == ["train.1", "train.2", "a", "train.5", "test.1"]
    assert [e.positives for e in actual.table(False)[1]] == [(0, 1), (0, 2), (1, 2), (3,)]

    a, b, c = ({"title": "", "text": id, "psg_id": id} for id in "abc")
    first = {"question": "w", "positive_ctxs": [a], "hard_negative_ctxs": [b, c]}
    put(tmp_path / "dpr.json", [first, {"question": "w", "positive_ctxs": [b], "hard_negative_ctxs": [a]}])
    collection = DprReader(train=str(tmp_path / "dpr.json")).read()
    assert collection.qrels == {"train": {"train.1": {"a": 1, "b": 1, "c": 0}}}
    assert list(collection.queries) == ["train.1"]


def test_dpr_passages_without_ids_and_questions_without_positives(tmp_path, caplog):
    passage = {"title": "t", "text": "x"}
    both = {"question": "a", "positive_ctxs": [passage], "negative_ctxs": [passage, {"text": "y", "psg_id": 3}]}
    put(tmp_path / "train.json", [both, {"question": "b", "positive_ctxs": [], "hard_negative_ctxs": [passage]}])
    collection = DprReader(train=str(tmp_path / "train.json")).read()
    positive = next(iter(collection.corpus))
    assert collection.qrels == {"train": {"train.1": {positive: 1, "3": 0}}}
    assert list(collection.queries) == ["train.1"]
    assert "left out 1 questions without a positive passage" in caplog.text
    hard = DprReader(train=str(tmp_path / "train.json"), negatives=["hard_negative_ctxs"]).read()
    assert hard.qrels == {"train": {"train.1": {positive: 1}}}
    assert hard.corpus == collection.corpus
    with pytest.raises(UserError, match="negatives: expected one of hard_negative_ctxs, negative_ctxs, got 'x'"):
        DprReader(train="x", negatives=["x"])


def test_maple_hard_negatives_are_labels_of_neighbours(tmp_path):
    maple(tmp_path)
    records = {r["paper"]: r for r in map(json.loads, (tmp_path / "papers.json").read_text().splitlines())}
    arguments = {"folder": str(tmp_path), "train_until": 2015, "dev_percent": 0}
    plain = MapleReader(**arguments).read()
    train = set(plain.qrels["train"])
    for source in ("cited", "author", "venue"):
        collection = MapleReader(**arguments, negatives=[source], num_negatives=2).read()
        assert collection == MapleReader(**arguments, negatives=[source], num_negatives=2).read()
        assert collection.qrels["test"] == plain.qrels["test"]
        drawn = 0
        for paper, judged in collection.qrels["train"].items():
            record = records[paper]
            related = {
                "cited": [r for r in record["reference"] if r in train],
                "author": [o for o in train if set(records[o]["author"]) & set(record["author"])],
                "venue": list(train),
            }[source]
            offered = {label for other in related for label in records[other]["label"]} - set(record["label"])
            negatives = {label for label, grade in judged.items() if grade == 0}
            assert negatives <= offered
            assert len(negatives) <= 2
            assert {label for label, grade in judged.items() if grade} == set(record["label"])
            drawn += len(negatives)
        assert drawn


def test_maple_citation_negatives_are_not_cited(tmp_path):
    maple(tmp_path)
    reader = MapleReader(
        str(tmp_path), "citations", train_until=2015, dev_percent=0, negatives=["cited", "author", "venue"]
    )
    judged = reader.read().qrels["train"]
    assert any(0 in grades.values() for grades in judged.values())
    for paper, grades in judged.items():
        assert grades[f"p{int(paper[1:]) - 1}"] == 1
        assert paper not in grades


def test_maple_caps_pairs_per_label_only_in_training(tmp_path):
    documents = papers("p", 300)
    put(tmp_path / "labels_mesh.txt", "D1\tone\tuno", "D2\ttwo")
    put(
        tmp_path / "papers.json",
        *(written(p, label=["D1", "D2"] if i % 50 == 0 else ["D1"]) for i, p in enumerate(documents.values())),
    )
    collection = MapleReader(str(tmp_path), max_per_label=20, dev_percent=10, test_percent=10).read()
    counts = {split: sum("D1" in judged for judged in qrels.values()) for split, qrels in collection.qrels.items()}
    assert counts["train"] == 20
    assert 10 < counts["dev"] < 60
    assert 10 < counts["test"] < 60
    assert sum("D2" in judged for qrels in collection.qrels.values() for judged in qrels.values()) == 6
    every = MapleReader(str(tmp_path), max_per_label=0, dev_percent=10, test_percent=10).read()
    assert sum(map(len, every.qrels.values())) == 300
    assert collection.corpus["D1"].title == "one"


def test_maple_reads_definitions_and_counts_unknown_labels(tmp_path, caplog):
    expected = maple(tmp_path)
    rows = [{"label": f"l{i}", "name": f"name {i}", "combined_text": "x"} for i in range(3)]
    rows[1] = {"label": "l1", "name": ["name 1", "synonym"], "definition": "defined"}
    rows[2] = {"label": "l2", "combined_text": "name and definition"}
    put(tmp_path / "defined.json", *rows)
    collection = MapleReader(str(tmp_path), labels="defined.json", train_until=2015, dev_percent=0).read()
    assert collection.corpus["l1"] == Document("l1", "name 1", "defined")
    assert collection.corpus["l2"] == Document("l2", "", "name and definition")
    assert collection.qrels["test"]["p2"] == {"l2": 1}
    assert collection.qrels["train"].keys() == expected.qrels["train"].keys()
    assert "dropped 6 labels of papers, because they are not in this file; 0 papers have no other label" in caplog.text


def test_maple_raw_texts_are_preferred(tmp_path):
    put(tmp_path / "labels.txt", "l\tname")
    put(tmp_path / "papers.json", {"paper": "1", "title": "a b", "abstract": "", "title_raw": "A, b", "label": ["l"]})
    collection = MapleReader(str(tmp_path), dev_percent=0, test_percent=0).read()
    assert collection.queries["1"] == Document("1", "A, b", "")


def test_maple_folders_form_one_collection(tmp_path):
    """The cap holds for both folders together. A paper in both folders is one paper with the labels of both."""
    documents = list(papers("p", 60).values())
    put(tmp_path / "Biology" / "labels.txt", "D1\tone", "D2\ttwo")
    put(tmp_path / "Biology" / "papers.json", *(written(p, label=["D1"]) for p in documents[:40]))
    put(tmp_path / "Medicine" / "papers.json", *(written(p, label=["D1", "D2"]) for p in documents[35:]))
    both = {"folder": str(tmp_path / "Biology"), "further": [str(tmp_path / "Medicine")]}
    every = MapleReader(**both, max_per_label=0, dev_percent=0, test_percent=0).read()
    expected = {p.id: {"D1": 1} if i < 35 else {"D1": 1, "D2": 1} for i, p in enumerate(documents)}
    assert every.qrels == {"train": expected}
    assert every.queries == {p.id: p for p in documents}
    capped = MapleReader(**both, max_per_label=20, dev_percent=0, test_percent=0).read().qrels["train"]
    for label in ("D1", "D2"):
        assert sum(label in judged for judged in capped.values()) == 20


def test_maple_fields_are_labels_of_their_papers(tmp_path):
    """Each field has max_per_label papers, drawn by the seed. Hard negatives are fields of related papers."""
    names = ("Art", "Political_Science", "Physics")
    for number, name in enumerate(names):
        rows = (
            written(p, label=["x"], venue="shared", author=[f"{name}{i}"])
            for i, p in enumerate(papers(f"{number}-", 50).values())
        )
        put(tmp_path / name / "papers.json", *rows, written(Document("both", "of all", "fields"), label=["x"]))
    arguments = {
        "folder": str(tmp_path / names[0]),
        "view": "fields",
        "further": [str(tmp_path / name) for name in names[1:]],
        "dev_percent": 0,
        "test_percent": 0,
    }
    collection = MapleReader(**arguments, max_per_label=30).read()
    assert collection.corpus == {name: Document(name, name.replace("_", " ")) for name in names}
    for number, name in enumerate(names):
        chosen = [id for id, judged in collection.qrels["train"].items() if judged.get(name)]
        assert len(chosen) == 30
        assert all(id.startswith(f"{number}-") for id in chosen if id != "both")
    assert collection == MapleReader(**arguments, max_per_label=30).read()
    other = MapleReader(**arguments, max_per_label=30, seed=1).read()
    assert other.queries.keys() != collection.queries.keys()
    every = MapleReader(**arguments, max_per_label=0, negatives=["venue"], num_negatives=2).read().qrels["train"]
    assert len(every) == 151
    assert every["both"] == dict.fromkeys(names, 1)
    for id, judged in every.items():
        if id != "both":
            field = names[int(id[0])]
            assert judged[field] == 1
            assert {name for name, grade in judged.items() if grade == 0} <= set(names) - {field}
    assert sum(grade == 0 for judged in every.values() for grade in judged.values()) > 200


def test_maple_references_outside_training_do_not_reduce_negatives(tmp_path):
    """Only one of a thousand references is a training paper, but its label is still drawn."""
    elsewhere = [f"far{i}" for i in range(1000)]
    put(tmp_path / "labels.txt", "l0\tzero", "l1\tone")
    first, second = papers("p", 2).values()
    put(
        tmp_path / "papers.json",
        written(first, label=["l0"], reference=[*elsewhere, second.id]),
        written(second, label=["l1"], reference=elsewhere),
    )
    collection = MapleReader(str(tmp_path), negatives=["cited"], dev_percent=0, test_percent=0).read()
    assert collection.qrels["train"] == {"p0": {"l0": 1, "l1": 0}, "p1": {"l1": 1}}


MESH = """<?xml version="1.0"?>
<!DOCTYPE DescriptorRecordSet SYSTEM "https://www.nlm.nih.gov/databases/dtd/nlmdescriptorrecordset_20220101.dtd">
<DescriptorRecordSet LanguageCode = "eng">
<DescriptorRecord DescriptorClass = "1"><DescriptorUI>D000001</DescriptorUI>
 <DescriptorName><String>Calcimycin</String></DescriptorName>
 <PharmacologicalActionList><PharmacologicalAction><DescriptorReferredTo><DescriptorUI>D9</DescriptorUI>
 </DescriptorReferredTo></PharmacologicalAction></PharmacologicalActionList>
 <ConceptList><Concept PreferredConceptYN="N"><ScopeNote>Another concept.</ScopeNote></Concept>
  <Concept PreferredConceptYN="Y"><ScopeNote>An ionophorous, polyether antibiotic
    </ScopeNote></Concept></ConceptList></DescriptorRecord>
<DescriptorRecord><DescriptorUI>D000002</DescriptorUI><DescriptorName><String>Temefós</String></DescriptorName>
</DescriptorRecord>
</DescriptorRecordSet>
"""


@pytest.mark.parametrize("name", ["desc2022.xml", "desc2022.xml.gz"])
def test_mesh_descriptors_are_labels_with_scope_notes(tmp_path, name):
    content = MESH.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    put(tmp_path / "papers.json", written(Document("p", "t", "a"), label=["D000001"]))
    collection = MapleReader(str(tmp_path), labels=name, dev_percent=0, test_percent=0).read()
    assert collection.corpus == {
        "D000001": Document("D000001", "Calcimycin", "An ionophorous, polyether antibiotic"),
        "D000002": Document("D000002", "Temefós", ""),
    }


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (MESH[:300], "the XML file is damaged"),
        (MESH.replace("\u00f3", "\udcff"), "the XML file is damaged"),
        (MESH.replace("DescriptorUI>", "UI>"), "expected descriptors with DescriptorUI and DescriptorName, got none"),
        (MESH.replace("D000002", "D000001"), "duplicate id 'D000001', which an earlier line also has"),
        ("<DescriptorRecordSet></DescriptorRecordSet>", "contains no labels"),
    ],
)
def test_damaged_mesh_file_raises_user_error(tmp_path, content, reason):
    (tmp_path / "labels.xml").write_bytes(content.encode("utf-8", "surrogateescape"))
    put(tmp_path / "papers.json", written(Document("p", "t", "a"), label=["D000001"]))
    assert error_of(MapleReader(str(tmp_path), labels="labels.xml")).startswith(f"{tmp_path / 'labels.xml'}: {reason}")


def test_scirepeval_candidates_may_be_an_object_of_lists(tmp_path):
    expected = search(tmp_path)
    for path in files(tmp_path):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            candidates = row["candidates"]
            row["candidates"] = {key: [candidate[key] for candidate in candidates] for key in candidates[0]}
        put(path, *rows)
    assert SciRepEvalReader("search", folder=str(tmp_path)).read() == expected
    put(
        tmp_path / "train.jsonl",
        {"query": "w", "query_id": "x", "doc_id": ["a"], "title": ["t"], "abstract": [None], "score": [1]},
    )
    assert SciRepEvalReader("search", folder=str(tmp_path)).read().qrels["train"] == {"x": {"a": 1}}


def test_scirepeval_positive_of_one_row_overrides_negative_of_another(tmp_path):
    query, one, two = ({"doc_id": d.id, "title": d.title, "abstract": d.text} for d in papers("", 3).values())
    put(tmp_path / "train.jsonl", {"query": query, "pos": one, "neg": two}, {"query": query, "pos": two, "neg": one})
    collection = SciRepEvalReader("citations", folder=str(tmp_path)).read()
    assert collection.qrels == {"train": {"0": {"1": 1, "2": 1}}}


def test_scirepeval_missing_part_raises_user_error(tmp_path):
    triplets(tmp_path)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    expected = SciRepEvalReader("citations", folder=str(tmp_path)).read()
    (tmp_path / "train.jsonl").unlink()
    put(tmp_path / "train-00000-of-00002.jsonl", *lines[:3])
    assert "all parts of one file, got train-00000-of-00002" in error_of(
        SciRepEvalReader("citations", folder=str(tmp_path))
    )
    put(tmp_path / "train-00001-of-00002.jsonl", *lines[3:])
    assert SciRepEvalReader("citations", folder=str(tmp_path)).read() == expected


def test_scirepeval_reads_parquet(tmp_path):
    expected = search(tmp_path)
    for path in files(tmp_path):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        parquet.write_table(pyarrow.Table.from_pylist(rows), path.with_suffix(".parquet"))
        path.unlink()
    assert SciRepEvalReader("search", folder=str(tmp_path)).read() == expected
    (tmp_path / "train.parquet").write_bytes((tmp_path / "train.parquet").read_bytes()[:200])
    assert "the parquet file is damaged" in error_of(SciRepEvalReader("search", folder=str(tmp_path)))


def test_scirepeval_reads_the_hub(tmp_path, monkeypatch):
    expected = triplets(tmp_path)
    loaded = {
        split: [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "validation")
    }
    hub = types.SimpleNamespace(load_dataset=lambda name, config: {("ours", "triplets"): loaded}[name, config])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    reader = SciRepEvalReader("citations", dataset="ours", config="triplets")
    assert reader.read() == expected
    loaded["train"].insert(2, {"query": None})
    assert "ours/triplets/train, line 3, entry 3: query must be an object" in error_of(reader)
    hub.load_dataset = lambda name, config: (_ for _ in ()).throw(FileNotFoundError("no such data set"))
    assert "dataset ours, config triplets: cannot be loaded (no such data set)" in error_of(reader)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in error_of(reader)
    with pytest.raises(UserError, match="either folder or dataset"):
        SciRepEvalReader("citations")


@pytest.mark.parametrize("qrels", [None, "ours-qrels"])
def test_beir_hub_reader_reads_tables(monkeypatch, qrels):
    corpus = [{"_id": "4", "title": "t", "text": "x"}, {"_id": "5", "title": "", "text": "y"}]
    judged = {"test": [{"query-id": 1, "corpus-id": 4, "score": 1}], "validation": []}
    tables = {
        ("ours", "corpus"): {"corpus": corpus},
        ("ours", "queries"): {"queries": [{"_id": "1", "title": "", "text": "asks"}]},
        (qrels or "ours", None if qrels else "default"): judged,
    }
    hub = types.SimpleNamespace(load_dataset=lambda name, config: tables[name, config])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    reader = BeirHubReader("ours", qrels)
    assert "ours: the dev split is empty" in error_of(reader)
    judged["validation"].append({"query-id": 1, "corpus-id": 5, "score": 0})
    documents = {"4": Document("4", "t", "x"), "5": Document("5", "", "y")}
    queries = {"1": Document("1", "", "asks")}
    assert reader.read() == Collection(documents, queries, {"test": {"1": {"4": 1}}, "dev": {"1": {"5": 0}}})
    judged["test"].append({"query-id": 2, "corpus-id": 4, "score": 1})
    name = qrels or "ours"
    assert f"{name}/test: these query ids are not in ours/queries (1 lines, 1 different ids): '2'" in error_of(reader)
    del corpus[0]["_id"]
    assert "ours/corpus/corpus, line 1, entry 1: _id or id is missing" in error_of(reader)


def test_hub_readers_work_with_the_datasets_package(tmp_path):
    """Folders replace the hub. Errors of `datasets` become user errors."""
    pytest.importorskip("datasets")
    expected = triplets(tmp_path / "triplets")
    reader = SciRepEvalReader("citations", dataset=str(tmp_path / "triplets"))
    assert reader.read() == expected

    folder, expected = tmp_path / "beir", beir(tmp_path / "beir")
    for split, qrels in expected.qrels.items():
        rows = ({"query-id": q, "corpus-id": d, "score": g} for q, grades in qrels.items() for d, g in grades.items())
        put(folder / "judged" / f"{split}.jsonl", *rows)
    places = {"corpus": {"corpus": "corpus.jsonl"}, "queries": {"queries": "queries.jsonl"}}
    places["default"] = {split: f"judged/{split}.jsonl" for split in expected.qrels}
    configs = [
        {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in files.items()]}
        for name, files in places.items()
    ]
    put(folder / "README.md", "---", json.dumps({"configs": configs}), "---")
    assert BeirHubReader(str(folder)).read() == expected

    put(tmp_path / "triplets" / "train.jsonl", '{"query": ')
    assert "cannot be loaded (JSON parse error" in error_of(reader)
    assert "config nope: cannot be loaded" in error_of(
        SciRepEvalReader("citations", dataset=str(folder), config="nope")
    )


def test_jsonl_query_text_cannot_take_the_id_of_a_document(tmp_path):
    put(tmp_path / "corpus.jsonl", {"id": "train.1", "title": "a paper"}, {"id": "b", "title": "another"})
    put(tmp_path / "train.jsonl", {"query": "free words", "positives": ["b"]}, {"query": "train.1", "positives": ["b"]})
    message = "line 1: the query gets the id 'train.1' from its line number, but a document has that id"
    assert message in error_of(JsonlReader(str(tmp_path)))


def test_jsonl_citations_are_split_by_year(tmp_path):
    years = {f"p{i}": 2000 + i % 20 for i in range(200)}
    put(tmp_path / "corpus.jsonl", *({"id": id, "title": id, "year": year} for id, year in years.items()))
    put(tmp_path / "train.jsonl", *({"query": id, "positives": ["p0"]} for id in list(years)[1:150]))
    put(tmp_path / "dev.jsonl", *({"query": id, "positives": ["p0"]} for id in list(years)[150:]))
    collection = JsonlReader(str(tmp_path), train_until=2009, dev_percent=20).read()
    check_consistent(collection)
    assert set(collection.qrels["test"]) == {id for id, year in years.items() if year > 2009}
    train, dev = collection.qrels["train"], collection.qrels["dev"]
    assert set(train) | set(dev) == {id for id, year in years.items() if year <= 2009 and id != "p0"}
    assert 8 < len(dev) < 35
    assert not set(train) & set(dev)
    assert JsonlReader(str(tmp_path), train_until=2025, dev_percent=0).read().splits == {"train": 199}
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write('{"query": "words", "positives": ["p1"]}\n')
    message = "train.jsonl, line 150: train_until: query 'train.150' must be a corpus document with a year"
    assert message in error_of(JsonlReader(str(tmp_path), train_until=2009))


def test_scidocs_labels_without_names(tmp_path):
    put(
        tmp_path / "paper_metadata_mag_mesh.json",
        json.dumps({"a1": {"paper_id": "a1", "title": "t", "abstract": None}}),
    )
    put(tmp_path / "mesh" / "train.csv", "pid,class_label", '"a1","Heart, failing"')
    collection = SciDocsReader(str(tmp_path), "mesh").read()
    assert collection.corpus == {"Heart, failing": Document("Heart, failing", "Heart, failing")}
    put(tmp_path / "mesh" / "train.csv", "pid,class_label", "a1,3")
    assert "label '3' is a number, not a name; set `labels` to a file of names" in error_of(
        SciDocsReader(str(tmp_path), "mesh")
    )
    assert list(SciDocsReader(str(tmp_path), "mesh", unnamed=True).read().corpus) == ["3"]
    put(tmp_path / "mesh" / "train.csv", "pid,class_label", *(f"b{i},x" for i in range(7)))
    assert "these query ids are not in paper_metadata_mag_mesh.json (7 lines, 7 different ids): 'b0'" in error_of(
        SciDocsReader(str(tmp_path), "mesh")
    )


def test_pmc_patients_accepts_alternative_file_names(tmp_path):
    put(tmp_path / "PPR" / "PPR_corpus.jsonl", {"_id": "7-1", "title": "", "text": "x"})
    put(tmp_path / "queries" / "test_queries.jsonl", {"_id": "8-1", "text": "y"})
    put(tmp_path / "PPR" / "PPR_test_qrels.tsv", "query-id\tcorpus-id\tscore", "8-1\t7-1\t2")
    collection = PmcPatientsReader(str(tmp_path), "PPR").read()
    assert collection.qrels == {"test": {"8-1": {"7-1": 2}}}
    put(tmp_path / "PPR" / "PPR_test_qrels.tsv", "query-id\tcorpus-id\tscore", "8-1\t7-2\t2")
    assert "PPR_test_qrels.tsv: none of the judged documents is in the corpus: '7-2'" in error_of(
        PmcPatientsReader(str(tmp_path), "PPR")
    )


def test_scimult_links_to_unknown_papers_are_kept_for_the_evaluation(tmp_path, caplog):
    rows = [written(p, cite=["p1", "p99"] if p.id == "p0" else ["p1"], **{"co-cite": []}) for p in papers().values()]
    path = tmp_path / "link_prediction_retrieval" / "SciDocs_papers_test.json"
    put(path, *rows)
    arguments = (str(tmp_path), "link_prediction_retrieval", "SciDocs")
    collection = SciMultReader(*arguments).read()
    assert collection.qrels["test"]["p0"] == {"p1": 1, "p99": 1}
    assert f"{path}: 1 of 9 judgements are for documents that are not in the corpus (1 document, first 'p99')" in (
        caplog.text
    )


def test_scimult_counts_lines_that_are_not_text_among_all_lines(tmp_path):
    """Four bad lines of ten were reported as 4 of 6, more than half, because only readable lines counted."""
    rows = [json.dumps(written(p, cite=["p1"])).encode() for p in papers().values()][:6]
    path = tmp_path / "link_prediction_retrieval" / "SciDocs_papers_test.json"
    path.parent.mkdir()
    path.write_bytes(b"\n".join([*rows, *[b"\xff"] * 4]))
    arguments = (str(tmp_path), "link_prediction_retrieval", "SciDocs")
    collection = SciMultReader(*arguments, on_error="skip", quarantine=str(tmp_path / "quarantine.jsonl")).read()
    assert len(collection.corpus) == 6


def labelled(folder, view, *labels, split="test"):
    put(folder / "texts" / "evaluation.jsonl", *({"doc_id": f"p{i}", "title": f"t{i}"} for i in range(4)))
    rows = ({"paper_id": f"p{i}", "label": label} for i, label in enumerate(labels))
    put(folder / "judged" / f"{split}.jsonl", *rows)
    return SciRepEvalExamplesReader(str(folder / "texts"), str(folder / "judged"), view)


def test_scirepeval_examples_of_each_view(tmp_path):
    labels = labelled(tmp_path / "a", "labels", [1, 0, 1], [0, 0, 0]).read()
    assert list(labels.corpus) == ["0", "1", "2"]
    assert labels.qrels["test"] == {"p0": {"0": 1, "1": 0, "2": 1}, "p1": {"0": 0, "1": 0, "2": 0}}
    numbers = labelled(tmp_path / "b", "number", 0.5, -3).read()
    assert numbers.qrels["test"] == {"p0": {"number": 0.5}, "p1": {"number": -3}}
    words = labelled(tmp_path / "c", "class", "b", "a", 7).read()
    assert list(words.corpus) == ["7", "a", "b"]
    assert list(labelled(tmp_path / "c", "class", "b", "--1").read().corpus) == ["--1", "b"]
    for view, label, message in (
        ("labels", [1, 2], "label must be a list of 0 and 1"),
        ("labels", [1, 0, 0], "label has 3 values, but earlier ones have 2"),
        ("number", "7", "label must be a number from"),
        ("number", float("nan"), "label must be a number from -1e+100 to 1e+100, got nan"),
        ("number", 10**401, "label must be a number from -1e+100 to 1e+100, got 1000"),
        ("number", -1e308, "label must be a number from"),
    ):
        first = [1, 0] if view == "labels" else 1
        assert message in error_of(labelled(tmp_path / "d", view, first, label))
    labelled(tmp_path / "e", "labels", [1, 0], split="train")
    assert "splits have 2 and 3 labels" in error_of(labelled(tmp_path / "e", "labels", [1, 0, 0]))


def test_scirepeval_classes_have_a_fixed_order(tmp_path):
    """Sorted only by value, "9" and "09" would be in the order of a set, which differs between processes."""
    nines, tens = (["0" * zeros + number for zeros in range(10)] for number in ("9", "10"))
    assert labelled(tmp_path, "class")._corpus_ids([*tens, *nines, "-7"]) == ["-7", *sorted(nines), *sorted(tens)]


@pytest.mark.parametrize("cache", [True, False])
def test_training_on_numbers_raises_user_error(tmp_path, make_backbone, cache):
    """Rounded down, 0.5 would be a hard negative."""
    reader = labelled(tmp_path, "number", 2, 0.5, -3, split="train")
    options = BatchOptions(batch_size=1, num_batches=1, cache=str(tmp_path / "cache") if cache else None)
    data = SearchDataModule(Task("search", "search"), {"numbers": reader}, options, make_backbone()[1])
    with pytest.raises(UserError, match="numbers: .*'p1' and document 'number': grades must be whole .*, got 0.5"):
        data.setup()


def test_papers_without_text_are_left_out_with_a_warning(tmp_path, caplog):
    assert len(labelled(tmp_path, "number", *range(6)).read().queries) == 4
    assert "left out 2 papers without a text in" in caplog.text


def test_split_may_be_a_folder_of_parquet_parts(tmp_path):
    reader = labelled(tmp_path, "number", 1, 2, 3)
    (tmp_path / "judged" / "test.jsonl").unlink()
    folder = tmp_path / "judged" / "test"
    folder.mkdir()
    for part, papers_of_part in enumerate((("p0", "p1"), ("p2",))):
        rows = [{"paper_id": id, "label": 0.5} for id in papers_of_part]
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"000{part}.parquet")
    assert list(reader.read().queries) == ["p0", "p1", "p2"]
    (folder / "0000.parquet").unlink()
    assert "the test split must be one file, or all parts of one file, got test/0001.parquet" in error_of(reader)


@pytest.mark.parametrize(
    ("view", "expected"),
    [("relevant", {"0": 1, "1": 0, "2": 1}), ("sum", {"0": 3, "1": 2, "2": 3}), ("best", {"0": 1, "1": 0, "2": 1})],
)
def test_doris_mae_grades_depend_on_the_view(view, expected, tmp_path):
    doris_mae(tmp_path)
    reader = DorisMaeReader(str(tmp_path), view)
    assert reader.read().qrels["test"]["test.1"] == expected
    path = tmp_path / "DORIS-MAE_dataset_v1.json"
    path.write_text(path.read_text().replace('"candidate_pool": [3, 0]', '"candidate_pool": [3, 9]'))
    assert list(reader.read().qrels["test"]["test.2"]) == ["3", "9"]
    path.write_text(path.read_text().replace('"Annotation"', '"Annotations"'))
    assert f"{path}: the JSON object lacks the key Annotation" in error_of(reader)


@pytest.mark.parametrize(
    ("ids", "message"), [((0, 1, 0), "neg: '0'"), ((0, 0, 1), "pos: '0'"), ((0, 1, 1), "pos: '1'")]
)
def test_scirepeval_triplet_of_two_papers_raises_user_error(tmp_path, ids, message):
    texts = [{"doc_id": d.id, "title": d.title, "abstract": d.text} for d in papers("", 3).values()]
    put(tmp_path / "train.jsonl", dict(zip(("query", "pos", "neg"), (texts[i] for i in ids), strict=True)))
    assert f"{message} is also the" in error_of(SciRepEvalReader("citations", folder=str(tmp_path)))


def test_csfcube_candidate_with_two_grades_raises_user_error(tmp_path):
    put(tmp_path / "abstracts-csfcube-preds.jsonl", *({"paper_id": id, "title": id, "abstract": []} for id in "abc"))
    path = tmp_path / "test-pid2anns-csfcube-result.json"
    put(path, {"a": {"cands": ["b", "c", "b"], "relevance_adju": [2, 1, 2]}})
    reader = CsfCubeReader(str(tmp_path), facet="result")
    assert reader.read().qrels == {"test": {"a": {"b": 2, "c": 1}}}
    put(path, {"a": {"cands": ["b", "c", "b"], "relevance_adju": [2, 1, 0]}})
    assert error_of(reader) == f"{path}: query 'a' and document 'b' have score 0 here and 2 earlier"


def test_shards_of_several_folders_are_sorted_by_path(tmp_path):
    """Shards of the same name were in the order of the file system, so rows of another machine could be others."""
    shards = [tmp_path / folder / f"part-{number}.jsonl" for folder in ("a2", "a10") for number in (2, 10)]
    for path in reversed(shards):
        put(path, {"id": str(path), "text": "x"})
    assert text_files(tmp_path / "a*" / "part-*.jsonl") == shards


def test_doris_mae_candidates_outside_the_corpus_are_logged(tmp_path, caplog):
    """They were counted after the report of the gaps, so nothing was logged."""
    doris_mae(tmp_path)
    path = tmp_path / "DORIS-MAE_dataset_v1.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"candidate_pool": [3, 0]', '"candidate_pool": [3, 9]'))
    collection = DorisMaeReader(str(tmp_path), "sum").read()
    assert collection.qrels["test"]["test.2"] == {"3": 2, "9": 0}
    assert f"{path}: 1 of 5 judgements are for documents that are not in the corpus" in caplog.text
