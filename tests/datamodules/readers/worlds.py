"""A tiny folder in each data format, with the collection that it contains."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from datamodules.readers.beir import BeirReader
from datamodules.readers.csfcube import CsfCubeReader
from datamodules.readers.doris_mae import DorisMaeReader
from datamodules.readers.dpr import DprReader
from datamodules.readers.jsonl import JsonlReader
from datamodules.readers.litsearch import LitSearchReader
from datamodules.readers.maple import MapleReader
from datamodules.readers.mmsci import MATCHING, MMSciReader
from datamodules.readers.pmc_patients import PmcPatientsReader
from datamodules.readers.scidocs import SciDocsReader
from datamodules.readers.scimult import SciMultReader
from datamodules.readers.scirepeval import SciRepEvalReader
from datamodules.readers.scirepeval_examples import SciRepEvalExamplesReader
from datamodules.records import Collection, Document

NUM = 8


@dataclass(frozen=True)
class World:
    """A folder in one format.

    write: writes the folder, and returns its collection.
    reader: class of the reader and its arguments, in which "FOLDER" stands for the folder.
    file: file with one record per line.
    bad: bad lines for this file, each with a part of the reason that is reported.
    """

    name: str
    write: Callable[[Path], Collection]
    reader: tuple[type, dict]
    file: str
    bad: tuple[tuple[str, str], ...]

    def make(self, folder: Path, **policy):
        cls, arguments = self.reader
        return cls(
            **{k: v.replace("FOLDER", str(folder)) if isinstance(v, str) else v for k, v in arguments.items()} | policy
        )


def put(path: Path, *lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("".join(line + "\n" for line in written), encoding="utf-8")


def papers(prefix: str = "p", number: int = NUM) -> dict[str, Document]:
    return {f"{prefix}{i}": Document(f"{prefix}{i}", f"títle {prefix}{i}", f"abstract of {i}") for i in range(number)}


def written(document: Document, id: str = "paper", **more) -> dict:
    return {id: document.id, "title": document.title, "abstract": document.text} | more


def beir(folder: Path) -> Collection:
    corpus, queries = papers("d"), papers("q", 4)
    for name, documents in (("corpus", corpus), ("queries", queries)):
        put(folder / f"{name}.jsonl", *({"_id": d.id, "title": d.title, "text": d.text} for d in documents.values()))
    for split in ("train", "test"):
        put(folder / "qrels" / f"{split}.tsv", "query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t{i}" for i in range(4)))
    qrels = {f"q{i}": {f"d{i}": i} for i in range(4)}
    return Collection(corpus, queries, {"train": qrels, "test": qrels})


def jsonl(folder: Path) -> Collection:
    corpus = papers("d")
    put(folder / "corpus.jsonl", *({"id": d.id, "title": d.title, "text": d.text} for d in corpus.values()))
    put(
        folder / "train.jsonl",
        {"query": "d0", "positives": ["d1", "d2"], "negatives": ["d3"]},
        {"query": {"title": "t", "text": "x"}, "positives": {"d4": 2}},
        {"query": "words of mine", "positives": ["d5"], "negatives": None},
        {"query": {"id": "d6"}, "positives": ["d7"], "negatives": ["d0", "d0"]},
    )
    put(folder / "dev.jsonl", {"query": "other words", "positives": ["d1"]}, {"query": "d0", "positives": ["d1"]})
    queries = {
        "d0": corpus["d0"],
        "train.2": Document("train.2", "t", "x"),
        "train.3": Document("train.3", "", "words of mine"),
        "d6": corpus["d6"],
        "dev.1": Document("dev.1", "", "other words"),
    }
    train = {"d0": {"d1": 1, "d2": 1, "d3": 0}, "train.2": {"d4": 2}, "train.3": {"d5": 1}, "d6": {"d7": 1, "d0": 0}}
    return Collection(corpus, queries, {"train": train, "dev": {"dev.1": {"d1": 1}, "d0": {"d1": 1}}})


def dpr(folder: Path) -> Collection:
    corpus = {str(i): Document(str(i), f"wíki {i}", f"passage {i}") for i in range(NUM)}

    def passage(i: int) -> dict:
        return {"title": f"wíki {i}", "text": f"passage {i}", "score": 1.5, "title_score": 0, "passage_id": str(i)}

    def entry(i: int) -> dict:
        positive, negative, hard = i % NUM, (i + 1) % NUM, (i + 2) % NUM
        texts = {"question": f"who {i}?", "answers": ["x"], "dataset": "nq"}
        lists = ([passage(positive)], [passage(negative)], [passage(hard)])
        return texts | dict(zip(("positive_ctxs", "negative_ctxs", "hard_negative_ctxs"), lists, strict=True))

    qrels, queries = {}, {}
    for split, number in (("train", 6), ("dev", 3)):
        lines = [json.dumps(entry(i), ensure_ascii=False) for i in range(number)]
        put(folder / f"{split}.json", "[", *(line + "," for line in lines[:-1]), lines[-1], "]")
        for i in range(number):
            id = f"{split}.{i + 1}"
            queries[id] = Document(id, "", f"who {i}?")
            ids = (str(i % NUM), str((i + 1) % NUM), str((i + 2) % NUM))
            qrels.setdefault(split, {})[id] = dict(zip(ids, (1, 0, 0), strict=True))
    return Collection(corpus, queries, qrels)


def maple(folder: Path) -> Collection:
    """Papers of 2014 to 2017. Paper p cites p - 1 and an unknown paper, and has the labels p and p + 1."""
    documents = papers("p", 12)
    labels = {f"l{i}": Document(f"l{i}", f"name {i}") for i in range(4)}
    put(folder / "labels.txt", *(f"{label.id}\t{label.title}" for label in labels.values()))
    records, qrels = [], {"train": {}, "test": {}}
    for i, paper in enumerate(documents.values()):
        paper_labels = [f"l{i % 4}", f"l{(i + 1) % 4}"]
        more = {"venue": "v", "year": str(2014 + i % 4), "author": [f"a{i % 3}"], "label": paper_labels}
        records.append(written(paper, **more, reference=[f"p{i - 1}", "elsewhere"]))
        qrels["train" if i % 4 < 2 else "test"][paper.id] = dict.fromkeys(paper_labels, 1)
    put(folder / "papers.json", *records)
    queries = {id: documents[id] for judged in qrels.values() for id in judged}
    return Collection(labels, queries, qrels)


def maple_citations(folder: Path) -> Collection:
    maple(folder)
    documents = papers("p", 12)
    qrels = {"train": {}, "test": {}}
    for i in range(1, 12):
        qrels["train" if i % 4 < 2 else "test"][f"p{i}"] = {f"p{i - 1}": 1}
    return Collection(documents, {id: documents[id] for judged in qrels.values() for id in judged}, qrels)


def triplets(folder: Path) -> Collection:
    documents = papers("", NUM)

    def row(i: int) -> dict:
        three = (documents[str((i + shift) % NUM)] for shift in range(3))
        return {
            key: {"corpus_id": int(paper.id), "title": paper.title, "abstract": paper.text}
            for key, paper in zip(("query", "pos", "neg"), three, strict=True)
        }

    put(folder / "train.jsonl", *(row(i) for i in range(NUM)))
    put(folder / "validation.jsonl", row(0), row(1))
    qrels = {str(i): {str((i + 1) % NUM): 1, str((i + 2) % NUM): 0} for i in range(NUM)}
    corpus = {id: documents[id] for id in documents}
    return Collection(corpus, documents, {"train": qrels, "dev": {id: qrels[id] for id in ("0", "1")}})


def search(folder: Path) -> Collection:
    documents, queries, qrels = papers(), {}, {}
    for split, file in (("train", "train"), ("test", "evaluation")):
        rows = []
        for i in range(4):
            candidates = [written(documents[f"p{j}"], "doc_id", score=j - i, venue="v") for j in (i, i + 1, i + 2)]
            rows.append({"query": f"words {split} {i}", "doc_id": f"{split}{i}", "candidates": candidates})
            queries[f"{split}{i}"] = Document(f"{split}{i}", "", f"words {split} {i}")
            qrels.setdefault(split, {})[f"{split}{i}"] = {f"p{i + j}": j for j in range(3)}
        put(folder / f"{file}.jsonl", *rows)
    return Collection({f"p{i}": documents[f"p{i}"] for i in range(6)}, queries, qrels)


def fields_of_study(folder: Path) -> Collection:
    documents = papers()
    for split in ("train", "validation"):
        rows = [
            written(p, "doc_id", labels_text=["Física", f"Field {i % 2}"]) for i, p in enumerate(documents.values())
        ]
        put(folder / f"{split}.jsonl", *rows)
    labels = {name: Document(name, name) for name in ("Física", "Field 0", "Field 1")}
    qrels = {f"p{i}": {"Física": 1, f"Field {i % 2}": 1} for i in range(NUM)}
    return Collection(labels, documents, {"train": qrels, "dev": qrels})


def scidocs_labels(folder: Path) -> Collection:
    documents = papers("0a")
    put(
        folder / "paper_metadata_mag_mesh.json", *one_object({p.id: written(p, "paper_id") for p in documents.values()})
    )
    put(folder / "names.txt", "0\tArt", "1\tBiology", "2\tChemistry")
    qrels = {}
    for split, file in (("train", "train"), ("dev", "val"), ("test", "test")):
        put(folder / "mag" / f"{file}.csv", "pid,class_label", *(f"0a{i},{i % 3}" for i in range(NUM)))
        qrels[split] = {f"0a{i}": {str(i % 3): 1} for i in range(NUM)}
    labels = {str(i): Document(str(i), name) for i, name in enumerate(("Art", "Biology", "Chemistry"))}
    return Collection(labels, documents, qrels)


def scidocs_links(folder: Path) -> Collection:
    documents = papers("0a")
    records = {p.id: written(p, "paper_id", cites=[]) for p in documents.values()}
    records["0a7"]["abstract"] = None
    documents["0a7"] = Document("0a7", documents["0a7"].title, "")
    put(folder / "paper_metadata_view_cite_read.json", *one_object(records))
    for file in ("val", "test"):
        put(folder / "cite" / f"{file}.qrel", *(f"0a{i} 0 0a{j} {int(j == 5)}" for i in range(2) for j in range(3, 8)))
    qrels = {f"0a{i}": {f"0a{j}": int(j == 5) for j in range(3, 8)} for i in range(2)}
    return Collection(documents, {id: documents[id] for id in qrels}, {"dev": qrels, "test": qrels})


def one_object(records: dict) -> list[str]:
    """Return the lines of a JSON object with one record per line."""
    inner = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in records.items()]
    return ["{" + inner[0], *("," + line for line in inner[1:]), "}"]


def scimult_fine(folder: Path) -> Collection:
    labels = {f"l{i}": Document(f"l{i}", f"name {i}", f"definition {i}") for i in range(4)}
    subfolder = folder / "classification_fine"
    rows = ({"label": d.id, "name": [d.title, "synonym"], "definition": d.text} for d in labels.values())
    put(subfolder / "CSConference_label.json", *rows)
    rows = [{"title": f"t{i}", "abstract": f"a{i}", "label": [f"l{i % 4}", "l0"]} for i in range(NUM)]
    put(subfolder / "CSConference_papers_test.json", *rows)
    queries = {f"test.{i + 1}": Document(f"test.{i + 1}", f"t{i}", f"a{i}") for i in range(NUM)}
    qrels = {f"test.{i + 1}": {f"l{i % 4}": 1, "l0": 1} for i in range(NUM)}
    return Collection(labels, queries, {"test": qrels})


def scimult_coarse(folder: Path) -> Collection:
    labels = {str(i): Document(str(i), f"name {i}", "") for i in range(4)}
    subfolder = folder / "classification_coarse"
    rows = ({"label": int(d.id), "name": [d.title], "definition": ""} for d in labels.values())
    put(subfolder / "MAG_label.json", *rows)
    put(subfolder / "MAG_papers_test.json", *({"title": f"t{i}", "abstract": "", "label": i % 4} for i in range(NUM)))
    queries = {f"test.{i + 1}": Document(f"test.{i + 1}", f"t{i}", "") for i in range(NUM)}
    return Collection(labels, queries, {"test": {f"test.{i + 1}": {str(i % 4): 1} for i in range(NUM)}})


def scimult_retrieval(folder: Path) -> Collection:
    documents = papers()
    links = {f"p{i}": [f"p{i + 1}"] for i in range(NUM - 1)} | {f"p{NUM - 1}": []}
    rows = (written(p, **{"cite": [], "co-cite": links[p.id]}) for p in documents.values())
    put(folder / "link_prediction_retrieval" / "SciDocs_papers_test.json", *rows)
    qrels = {id: dict.fromkeys(ids, 1) for id, ids in links.items() if ids}
    return Collection(documents, {id: documents[id] for id in qrels}, {"test": qrels})


def scimult_patients(folder: Path) -> Collection:
    documents = papers("7-")
    subfolder = folder / "link_prediction_retrieval"
    put(subfolder / "PMCPatientsPPR_patients_test.json", *(written(p, "patient") for p in documents.values()))
    rows = [{"title": f"t{i}", "abstract": "", "patient": [f"7-{i}"]} for i in range(4)]
    put(subfolder / "PMCPatientsPPR_queries_test.json", *rows)
    queries = {f"test.{i + 1}": Document(f"test.{i + 1}", f"t{i}", "") for i in range(4)}
    return Collection(documents, queries, {"test": {f"test.{i + 1}": {f"7-{i}": 1} for i in range(4)}})


def scimult_reranking(folder: Path) -> Collection:
    documents = papers()
    scores = {"p0": {"p1": 5, "p2": 0}, "p3": {"p4": 1}}
    rows = (written(p, score=scores.get(p.id, {})) for p in documents.values())
    put(folder / "link_prediction_reranking" / "Recommendation_papers_test.json", *rows)
    return Collection(documents, {id: documents[id] for id in scores}, {"test": scores})


def scimult_search(folder: Path) -> Collection:
    documents = papers()
    put(folder / "search" / "Search_papers_test.json", *(written(p) for p in documents.values()))
    scores = {f"q{i}": {f"p{i}": 3, f"p{i + 1}": 0} for i in range(4)}
    rows = ({"query_id": q, "query": f"{q} [SEP] words", "score": score} for q, score in scores.items())
    put(folder / "search" / "Search_queries_test.json", *rows)
    queries = {q: Document(q, "", f"{q} [SEP] words") for q in scores}
    return Collection(documents, queries, {"test": scores})


def scimult_pmc(folder: Path) -> Collection:
    documents, queries = papers("9"), papers("8-", 4)
    subfolder = folder / "pmc_patients"
    put(subfolder / "PMCPatientsPAR_articles_test.json", *(written(p, "article") for p in documents.values()))
    put(subfolder / "PMCPatientsPAR_queries_test.json", *(written(p, "query") for p in queries.values()))
    qrels = {f"8-{i}": {f"9{i}": 1 + i % 2} for i in range(4)}
    rows = [f"{query}\t{id}\t{grade}" for query, judged in qrels.items() for id, grade in judged.items()]
    put(subfolder / "PMCPatients" / "PAR" / "PAR_test_qrels.tsv", "query-id\tcorpus-id\tscore", *rows)
    return Collection(documents, queries, {"test": qrels})


def pmc_patients(folder: Path) -> Collection:
    corpus = papers("3")
    rows = ({"_id": d.id, "title": d.title, "text": d.text} for d in corpus.values())
    put(folder / "PAR" / "corpus.jsonl", *rows)
    queries, qrels = {}, {}
    for split in ("train", "dev", "test"):
        split_queries = {f"{split}-{i}": Document(f"{split}-{i}", "", f"a patient, {split} {i}") for i in range(4)}
        put(
            folder / "queries" / f"{split}_queries.jsonl",
            *({"_id": d.id, "text": d.text} for d in split_queries.values()),
        )
        qrels[split] = {id: {f"3{i}": 1 + i % 2} for i, id in enumerate(split_queries)}
        rows = [f"{query}\t{id}\t{grade}" for query, judged in qrels[split].items() for id, grade in judged.items()]
        put(folder / "PAR" / f"qrels_{split}.tsv", "query-id\tcorpus-id\tscore", *rows)
        queries |= split_queries
    return Collection(corpus, queries, qrels)


def litsearch(folder: Path) -> Collection:
    documents = papers("20")
    put(folder / "corpus_clean" / "full.jsonl", *(written(p, "corpusid", citations=[]) for p in documents.values()))
    rows = [{"query_set": "inline_acl", "query": f"papers on {i}?", "corpusids": [f"20{i}", "207"]} for i in range(4)]
    put(folder / "query" / "full.jsonl", *rows)
    queries = {f"test.{i + 1}": Document(f"test.{i + 1}", "", f"papers on {i}?") for i in range(4)}
    return Collection(documents, queries, {"test": {f"test.{i + 1}": {f"20{i}": 1, "207": 1} for i in range(4)}})


def csfcube(folder: Path) -> Collection:
    documents = papers("30")
    rows = (written(p, "paper_id", pred_labels=[]) | {"abstract": p.text.split(" of ")} for p in documents.values())
    put(folder / "abstracts-csfcube-preds.jsonl", *rows)
    grades = {"300": {"301": 3, "302": 0}, "305": {"306": 1, "307": 2, "300": 0}}
    judged = {q: {"cands": list(g), "relevance_adju": list(g.values())} for q, g in grades.items()}
    put(folder / "test-pid2anns-csfcube-method.json", judged)
    documents = {id: Document(id, paper.title, paper.text.replace(" of ", " ")) for id, paper in documents.items()}
    return Collection(documents, {id: documents[id] for id in grades}, {"test": grades})


def examples(folder: Path) -> Collection:
    """One test paper is judged twice, and one judged paper has no text."""
    documents = papers("30")
    put(folder / "texts" / "evaluation.jsonl", *(written(p, "doc_id") for p in documents.values()))
    splits = {"train": {"300": 2, "301": 10, "305": 2}, "test": {"302": 10, "303": 2}}
    for split, classes in splits.items():
        rows = [{"paper_id": id, "label": label} for id, label in classes.items()]
        if split == "test":
            rows += [{"paper_id": "303", "label": 10}, {"paper_id": "999", "label": 2}]
        put(folder / "judged" / f"{split}.jsonl", *rows)
    qrels = {split: {id: {str(label): 1} for id, label in classes.items()} for split, classes in splits.items()}
    qrels["test"]["303#2"] = {"10": 1}
    documents["303#2"] = Document("303#2", documents["303"].title, documents["303"].text)
    corpus = {label: Document(label, label) for label in ("2", "10")}
    return Collection(corpus, {id: documents[id] for judged in qrels.values() for id in judged}, qrels)


def doris_mae(folder: Path) -> Collection:
    """Paper 2 is judged twice in one aspect. Paper 4 is not a candidate."""
    corpus = {str(i): Document(str(i), "", f"ábstract of {i}") for i in range(5)}
    rows = [{"original_abstract": p.text, "title": "t", "abstract_id": int(id)} for id, p in corpus.items()]
    questions = [
        {"query_text": "which", "candidate_pool": [0, 1, 2], "aspects": {"0": ["5"], "7": []}, "query_type": "x"},
        {"query_text": "whät", "candidate_pool": [3, 0], "aspects": {"9": []}},
    ]
    scores = [("0", 0, 2), ("5", 0, 1), ("0", 1, 1), ("7", 1, 1), ("5", 2, 1), ("5", 2, 2), ("9", 0, 0), ("9", 3, 2)]
    judged = [{"aspect_id": aspect, "abstract_id": paper, "score": score} for aspect, paper, score in scores]
    lines = ['{"aspect2aspect_id": {"a [b": "0"}, "version": 1,']
    for key, entries in (("Corpus", rows), ("Annotation", judged), ("Query", questions)):
        lines += [f'"{key}": [', *(json.dumps(entry, ensure_ascii=False) + "," for entry in entries[:-1])]
        lines += [json.dumps(entries[-1], ensure_ascii=False), "]}" if key == "Query" else "],"]
    put(folder / "DORIS-MAE_dataset_v1.json", *lines)
    queries = {
        f"test.{i}": Document(f"test.{i}", "", question["query_text"]) for i, question in enumerate(questions, 1)
    }
    qrels = {"test.1": {"0": 3, "1": 2, "2": 3}, "test.2": {"3": 2, "0": 0}}
    return Collection({id: corpus[id] for id in "0123"}, queries, {"test": qrels})


def object_of_lists(**members: object) -> list[str]:
    """Return the lines of a JSON object whose lists have one entry per line. The last member is a list."""
    lines = []
    for key, value in members.items():
        if isinstance(value, list):
            entries = [json.dumps(entry, ensure_ascii=False) for entry in value]
            lines += [f'"{key}": [', *(f"{entry}," for entry in entries[:-1]), *entries[-1:], "],"]
        else:
            lines.append(f'"{key}": {json.dumps(value, ensure_ascii=False)},')
    return ["{" + lines[0], *lines[1:-1], "]}"]


def put_article(folder: Path, place: str, id: str, last: str = "images", **members: object) -> None:
    """Write an article of MMSci. place: category and subject, with a slash between. last: list that comes last."""
    members = {"pdf_link": "x", "unique_id": id, "sections": [], "references": [], "images": [], **members}
    members[last] = members.pop(last)
    put(folder / "rawdata" / place / id / f"{id}_data.json", *object_of_lists(**members))


def put_splits(folder: Path, **splits: dict[str, list[str]]) -> None:
    """Write the published lists of a split: category/subject -> ids."""
    for split, places in splits.items():
        content: dict[str, dict[str, list[str]]] = {}
        for place, ids in places.items():
            category, subject = place.split("/")
            content.setdefault(category, {})[subject] = ids
        put(folder / "rawdata" / f"{split}_split_ids.json", json.dumps(content))


MMSCI = {  # article -> its figures: caption, description, and the caption without its number
    "n0": [("Figure 1: Spectra.", "(a) Of gold. (b) Of tin.", "Spectra. (a) Of gold. (b) Of tin.")],
    "n1": [("Fig. 1: Cells ä.", "No description available", "Cells ä."), ("", "As in Fig. 2.", "As in Fig. 2.")],
    "n2": [(None, None, ""), ("No caption available", "Rats.", "Rats."), ("Fig. 3: títle n2", "Mice.", "Mice.")],
    "n3": [("Growth", "Of wheat.", "Growth Of wheat.")],
}


def mmsci_articles(folder: Path, last: str = "images") -> dict[str, Document]:
    """Article n0 is in two subjects, and in the lists of train and test. n0 cites n1 by its id, n2 by its title."""
    documents = papers("n", 4)
    documents["n3"] = Document("n3", "Títle n3? A reply", "abstract of 3")
    references = {
        "n0": [
            ("Li, Q. Other.Cell1, 2 (2003).", "https://doi.org/10.1038%2Fn1"),
            ("Wu, Q. Title N2.Cell1 (2001).", None),
        ],
        "n1": [("Títle n1", ""), ("Ann, B. Unknown words.Cell1 (2001).", ""), (None, None)],
        "n3": [("Ann, B. & Jay, C. D. The reply.Nature7 (1999).", ""), ("títle: N0!", "x"), ("Cell1", None)],
        "n2": [("Wu, Q. & Li, R. Title n3? A reply.Science293, 1 (2001).", "")],
    }
    places = {"n0": "Life/Cells", "n1": "Life/Genes", "n2": "Matter/Optics", "n3": "Matter/Cells"}
    for id, document in documents.items():
        for place in (places[id], *(["Matter/Optics"] if id == "n0" else [])):
            put_article(
                *(folder, place, id, last),
                title=document.title,
                abstract=document.text,
                references=[{"idx": "1", "title": title, "link": link} for title, link in references[id]],
                sections=[
                    {"section": "x", "content": f"We see {id} in Fig. 1a. And Figs. 1 and {id}. Supplementary Fig. 1."},
                    {"section": "y", "content": f"Words. As in Fig. 2. See Fig. 2 of {id}."},
                ],
                images=[
                    {"image_filename": f"figure_{i}.png", "caption": caption, "description": description}
                    for i, (caption, description, _) in enumerate(MMSCI[id])
                ],
            )
    put_splits(folder, train={"Life/Cells": ["n0"], "Life/Genes": ["n1"]}, test={"Matter/Optics": ["n2", "n0"]})
    return documents


def mmsci_captions(folder: Path) -> Collection:
    documents = mmsci_articles(folder)
    queries, qrels = {}, {"train": {}, "test": {}}
    for id, figures in MMSCI.items():
        for i, (_, _, text) in enumerate(figures):
            if text:
                query = f"{id}_figure_{i}.png"
                queries[query] = Document(query, "", text)
                qrels["test" if id in ("n0", "n2") else "train"][query] = {id: 1}
    return Collection(documents, queries, qrels)


def mmsci_references(folder: Path) -> Collection:
    documents = mmsci_articles(folder, last="references")
    qrels = {"train": {"n3": {"n0": 1}}, "test": {"n0": {"n1": 1, "n2": 1}, "n2": {"n3": 1}}}
    return Collection(documents, {id: documents[id] for id in ("n0", "n2", "n3")}, qrels)


def mmsci_subjects(folder: Path) -> Collection:
    documents = mmsci_articles(folder)
    labels = {"Cells": "Life, Matter", "Optics": "Matter", "Genes": "Life"}
    corpus = {name: Document(name, name, text) for name, text in labels.items()}
    train, test = {"n1": {"Genes": 1}, "n3": {"Cells": 1}}, {"n0": {"Cells": 1, "Optics": 1}, "n2": {"Optics": 1}}
    return Collection(corpus, documents, {"train": train, "test": test})


def mmsci_choices(folder: Path) -> Collection:
    """Questions of setting 2 on a panel and a figure that the articles mention, and on two that they do not."""
    mmsci_articles(folder)
    asked = {
        "n0": (0, "what is in sub-figure (a)?", "We see n0 in Fig. 1a.", "#a"),
        "n1": (1, "what is in sub-figure (c)?", "See Fig. 2 of n1.", "#c"),
        "n2": (7, "what is in sub-figure (b)?", "n2_figure_7.png", "#b"),
        "n9": (0, "what is the whöle figure?", "n9_figure_0.png", ""),
    }
    questions = []
    corpus, queries, qrels = {}, {}, {}
    for number, (id, (figure, stem, text, panel)) in enumerate(asked.items()):
        image, answer = f"{id}_figure_{figure}.png", "ABCD"[number]
        query, options = image + panel, {letter: f"option {letter} of {id}" for letter in "ABCD"}
        question = stem + "".join(f"\n{letter}: {option}" for letter, option in options.items())
        questions.append({"uid": id, "category": "x", "question": question, "answer": answer, "image": image})
        corpus |= {f"{query}.{letter}": Document(f"{query}.{letter}", "", text) for letter, text in options.items()}
        queries[query] = Document(query, "", text)
        qrels[query] = {f"{query}.{letter}": int(letter == answer) for letter in options}
    rows = [json.dumps(question, ensure_ascii=False) for question in questions]
    put(folder / "benchmark" / "dev" / MATCHING, "[[], [", *(f"{row}," for row in rows[:-1]), rows[-1], "], []]")
    return Collection(corpus, queries, {"dev": qrels})


INVALID_JSON = ('{"paper": ', "invalid JSON")
NOT_AN_OBJECT = ("[1, 2]", "expected an object")
F = {"folder": "FOLDER"}
YEARS = {"train_until": 2015, "dev_percent": 0}
SCIMULT_PAPER = (INVALID_JSON, NOT_AN_OBJECT, ('{"paper": "x"}', "missing"), ('{"paper": 1.5, "title": "t"}', ""))
TSV = (("a b", "expected query-id, corpus-id and score"), ("8-0\t90\tx", "the score must be an integer, got 'x'"))

WORLDS = (
    World(
        "beir",
        beir,
        (BeirReader, F),
        "corpus.jsonl",
        (INVALID_JSON, ('{"_id": 1, "text": "x"}', "_id must be a string")),
    ),
    World(
        "jsonl",
        jsonl,
        (JsonlReader, F),
        "train.jsonl",
        (
            INVALID_JSON,
            NOT_AN_OBJECT,
            ('{"query": "d0"}', "positives is missing (keys here: query)"),
            ('{"query": "d0", "positives": []}', "positives is empty"),
            ('{"query": "d0", "positives": ["d1"], "negatives": ["d1"]}', "'d1' is both a positive and a negative"),
            ('{"query": "d0", "positives": ["d1", "d0"]}', "the query 'd0' is one of its own positives or negatives"),
            ('{"query": {"id": "x"}, "positives": ["d1"]}', "query: 'x' is not the id of a document in the corpus"),
            ('{"query": 7, "positives": ["d1"]}', "query: '7' is not the id of a document in the corpus"),
            ('{"query": " ", "positives": ["d1"]}', "query is empty"),
            ('{"query": "w", "positives": {"d1": 0}}', "grades must be above 0"),
            ('{"query": "w", "positives": "d1"}', "positives must be a list, got 'd1'"),
        ),
    ),
    World(
        "dpr",
        dpr,
        (DprReader, {"train": "FOLDER/train.json", "dev": "FOLDER/dev.json"}),
        "train.json",
        (
            ('{"question": nul}', "invalid JSON"),
            ("[1, 2]", "expected an object"),
            ("17", "expected an object"),
            ('{"question": "q"}', "positive_ctxs is missing"),
            ('{"positive_ctxs": []}', "question is missing"),
            ('{"question": "q", "positive_ctxs": ["x"]}', "positive_ctxs: expected objects with title and text"),
            ('{"question": "q", "positive_ctxs": [{"text": 3}]}', "positive_ctxs, passage 1: text must be a string"),
            (
                '{"question": "q", "positive_ctxs": [{"text": "other", "passage_id": "1"}]}',
                "document '1' has a different text on an earlier line",
            ),
        ),
    ),
    World(
        "maple",
        maple,
        (MapleReader, F | YEARS),
        "papers.json",
        (
            INVALID_JSON,
            ('{"paper": "x", "title": "t", "year": "2001"}', "label is missing"),
            ('{"paper": "x", "title": "t", "year": "y", "label": []}', "the year must be an integer, got 'y'"),
            ('{"paper": "x", "title": "t", "year": 2001, "label": "l1"}', "label must be a list"),
            ('{"paper": "x", "year": 2001, "label": []}', "neither title nor abstract"),
        ),
    ),
    World(
        "maple-citations",
        maple_citations,
        (MapleReader, F | YEARS | {"view": "citations"}),
        "papers.json",
        (INVALID_JSON, ('{"paper": "x", "title": "t", "year": 2001}', "reference is missing")),
    ),
    World(
        "scirepeval-triplets",
        triplets,
        (SciRepEvalReader, F | {"view": "citations"}),
        "train.jsonl",
        (
            INVALID_JSON,
            ("{}", "query must be an object, got None"),
            ('{"query": {"title": "t"}}', "query: doc_id or corpus_id"),
        ),
    ),
    World(
        "scirepeval-search",
        search,
        (SciRepEvalReader, F | {"view": "search"}),
        "train.jsonl",
        (
            INVALID_JSON,
            ('{"query": "w"}', "candidates must be a list of objects"),
            ('{"query": "w", "candidates": []}', "candidates is empty"),
            (
                '{"query": "w", "candidates": [{"doc_id": "z", "title": "t"}]}',
                "candidate 1: the score must be an integer",
            ),
            ('{"query": 5, "candidates": []}', "query must be a string, got 5"),
        ),
    ),
    World(
        "scirepeval-labels",
        fields_of_study,
        (SciRepEvalReader, F | {"view": "labels", "label_key": "labels_text"}),
        "train.jsonl",
        (
            INVALID_JSON,
            ('{"doc_id": "z", "title": "t"}', "labels_text is missing"),
            ('{"doc_id": "z", "title": "t", "labels_text": []}', "labels_text is empty"),
            ('{"doc_id": "z", "title": "t", "labels_text": [3]}', "'3' is not a name; set `labels` to a file of names"),
        ),
    ),
    World(
        "scirepeval-examples",
        examples,
        (SciRepEvalExamplesReader, {"folder": "FOLDER/texts", "judgements": "FOLDER/judged", "view": "class"}),
        "judged/test.jsonl",
        (
            INVALID_JSON,
            NOT_AN_OBJECT,
            ('{"label": 2}', "paper_id is missing"),
            ('{"paper_id": "302"}', "label is missing (keys here: paper_id)"),
            ('{"paper_id": "302", "label": 0.5}', "label must be an id"),
            ('{"paper_id": "302", "label": true}', "label must be an id"),
        ),
    ),
    World(
        "doris-mae",
        doris_mae,
        (DorisMaeReader, F | {"view": "sum"}),
        "DORIS-MAE_dataset_v1.json",
        (
            ('{"query_text": nul}', "invalid JSON"),
            ("[1, 2]", "expected an object"),
            ('{"candidate_pool": [1], "aspects": {"1": []}}', "query_text is missing"),
            ('{"query_text": "w", "aspects": {"1": []}}', "candidate_pool is missing"),
            ('{"query_text": "w", "candidate_pool": [1], "aspects": ["1"]}', "aspects must be an object"),
            ('{"query_text": "w", "candidate_pool": [1], "aspects": {}}', "or aspects is empty"),
            ('{"query_text": "w", "candidate_pool": [1], "aspects": {"1": 2}}', "1 must be a list"),
        ),
    ),
    World(
        "scidocs-labels",
        scidocs_labels,
        (SciDocsReader, F | {"task": "mag", "labels": "FOLDER/names.txt"}),
        "mag/train.csv",
        (("0a1", "expected a paper's id and its label"), ("", ""), ("0a1,1,1", "expected a paper's id and its label")),
    ),
    World(
        "scidocs-links",
        scidocs_links,
        (SciDocsReader, F | {"task": "cite"}),
        "cite/test.qrel",
        (
            ("0a1 0a2 1", "expected query, 0, document and grade"),
            ("0a1 0 0a7 x", "the grade must be an integer, got 'x'"),
            ("0a1 0 0a3 1", "have score 1 here and 0 earlier"),
        ),
    ),
    World(
        "litsearch",
        litsearch,
        (LitSearchReader, F),
        "query/full.jsonl",
        (
            INVALID_JSON,
            NOT_AN_OBJECT,
            ('{"query": "w", "corpusids": []}', "corpusids is empty"),
            ('{"corpusids": [200]}', "query is missing"),
        ),
    ),
    World(
        "csfcube",
        csfcube,
        (CsfCubeReader, F | {"facet": "method"}),
        "abstracts-csfcube-preds.jsonl",
        (
            INVALID_JSON,
            NOT_AN_OBJECT,
            ('{"paper_id": "x", "abstract": ["s", 1]}', "abstract must be a list of sentences"),
            ('{"paper_id": "x", "abstract": "s"}', "abstract must be a list, got 's'"),
            ('{"paper_id": "x"}', "neither title nor abstract"),
        ),
    ),
    World(
        "scimult-fine",
        scimult_fine,
        (SciMultReader, F | {"task": "classification_fine", "dataset": "CSConference"}),
        "classification_fine/CSConference_papers_test.json",
        (
            INVALID_JSON,
            ('{"title": "t"}', "label is missing"),
        ),
    ),
    World(
        "scimult-coarse",
        scimult_coarse,
        (SciMultReader, F | {"task": "classification_coarse", "dataset": "MAG"}),
        "classification_coarse/MAG_papers_test.json",
        (
            INVALID_JSON,
            ('{"title": "t", "label": true}', "label must be an id"),
        ),
    ),
    World(
        "scimult-retrieval",
        scimult_retrieval,
        (SciMultReader, F | {"task": "link_prediction_retrieval", "dataset": "SciDocs", "relation": "co-cite"}),
        "link_prediction_retrieval/SciDocs_papers_test.json",
        SCIMULT_PAPER,
    ),
    World(
        "scimult-patients",
        scimult_patients,
        (SciMultReader, F | {"task": "link_prediction_retrieval", "dataset": "PMCPatientsPPR"}),
        "link_prediction_retrieval/PMCPatientsPPR_queries_test.json",
        (
            INVALID_JSON,
            ('{"title": "t", "patient": []}', "has no judgements"),
            ('{"patient": ["7-0"]}', "neither title nor"),
        ),
    ),
    World(
        "scimult-reranking",
        scimult_reranking,
        (SciMultReader, F | {"task": "link_prediction_reranking", "dataset": "Recommendation"}),
        "link_prediction_reranking/Recommendation_papers_test.json",
        (*SCIMULT_PAPER[:2], ('{"paper": "x", "title": "t"}', "score must be an object that maps ids to scores")),
    ),
    World(
        "scimult-search",
        scimult_search,
        (SciMultReader, F | {"task": "search", "dataset": "Search"}),
        "search/Search_queries_test.json",
        (
            INVALID_JSON,
            ('{"query_id": "x", "query": "w", "score": {"p1": 0.5}}', "the score must be an integer, got 0.5"),
        ),
    ),
    World(
        "scimult-pmc",
        scimult_pmc,
        (SciMultReader, F | {"task": "pmc_patients", "dataset": "PMCPatientsPAR"}),
        "pmc_patients/PMCPatients/PAR/PAR_test_qrels.tsv",
        TSV,
    ),
    World(
        "pmc-patients",
        pmc_patients,
        (PmcPatientsReader, F | {"task": "PAR"}),
        "PAR/corpus.jsonl",
        (
            INVALID_JSON,
            ('{"text": "x"}', "_id is missing"),
            ('{"_id": "30", "text": "x"}', "which an earlier line also has"),
        ),
    ),
    World(
        "mmsci-captions",
        mmsci_captions,
        (MMSciReader, F | {"view": "captions"}),
        "rawdata/Matter/Optics/n2/n2_data.json",
        (
            ('{"image_filename": nul}', "invalid JSON"),
            NOT_AN_OBJECT,
            ('{"caption": "x"}', "image_filename is missing"),
            ('{"image_filename": "figure_9.png", "caption": 3}', "caption must be a string, got 3"),
            ('{"image_filename": "figure_1.png"}', "image_filename: an earlier image is also called 'figure_1.png'"),
        ),
    ),
    World(
        "mmsci-references",
        mmsci_references,
        (MMSciReader, F | {"view": "references"}),
        "rawdata/Matter/Cells/n3/n3_data.json",
        (
            ('{"title": nul}', "invalid JSON"),
            NOT_AN_OBJECT,
            ('{"title": 3}', "title must be a string, got 3"),
            ('{"title": "x", "link": ["x"]}', "link must be a string, got ['x']"),
        ),
    ),
    World(
        "mmsci-choices",
        mmsci_choices,
        (MMSciReader, F | {"view": "choices", "setting": 2}),
        f"benchmark/dev/{MATCHING}",
        (
            ('{"uid": nul}', "invalid JSON"),
            NOT_AN_OBJECT,
            ('{"uid": "n0", "question": "x"}', "image is missing"),
            ('{"uid": "n0", "image": "i", "question": "x", "answer": "A"}', "expected the four options A to D"),
            (
                '{"uid": "n0", "image": "i", "question": "x\\nA: 1\\nB: 2\\nC: 3\\nD: 4", "answer": "E"}',
                "answer: expected one of A, B, C, D, got 'E'",
            ),
        ),
    ),
)
