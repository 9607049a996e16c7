"""Tiny data for every benchmark, in its published layout below one folder, and the figures that follow by hand.

A text's vector is the sum of the whole numbers in it (see vector_of): a query of 1 ranks documents by their number.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from tests.datamodules.reader_worlds import one_object, put

SECOND = 1 / math.log2(3)  # gain at the second place
THIRD = 1 / 2


def number_of(title: str, text: str) -> int:
    return sum(map(int, re.findall(r"-?\d+", f"{title} {text}")))


def numbered(key: str, prefix: str, text: str = "abstract", **more) -> list[dict]:
    return [{key: f"{prefix}{i}", "title": f"paper {i}", text: "words", **more} for i in range(30)]


def fine_classification(root: Path) -> None:
    """l5 counts 30 with its definition and 5 without; l3 is named in the paper."""
    for name in ("CSConference", "ChemistryMeSH", "Geography", "Psychology"):
        labels = [{"label": f"l{i}", "name": [f"name {i}", "synonym 99"], "definition": "of it"} for i in range(30)]
        labels[5]["definition"] = "with 25 more"
        home = root / "scimult" / "classification_fine"
        put(home / f"{name}_label.json", *labels)
        put(home / f"{name}_papers_test.json", {"title": "1", "abstract": "a", "label": ["l5", "l3"]})
        put(home / f"{name}_matched.json", {"candidate": ["l3"]})


def coarse_classification(root: Path) -> None:
    """Predicted are 2, 2, 2 and 0."""
    for name in ("MAG", "MeSH"):
        home = root / "scimult" / "classification_coarse"
        put(home / f"{name}_label.json", *({"label": i, "name": [f"{i + 1}"], "definition": ""} for i in range(3)))
        papers = zip((1, 1, 1, -1), (2, 0, 1, 0), strict=True)
        put(home / f"{name}_papers_test.json", *({"title": f"{n}", "abstract": "", "label": c} for n, c in papers))


def linear_classification(root: Path) -> None:
    """Below 0 is class 0, above it class 1; one test paper is of the other class."""
    home = root / "scidocs"
    numbers = {"train": (-3, -2, -1, 1, 2, 3), "test": (5, 7, -5, 4)}
    classes = {"train": (0, 0, 0, 1, 1, 1), "test": (1, 1, 0, 0)}
    papers = {}
    for split, its in numbers.items():
        papers |= {f"{split}{n}": {"paper_id": f"{split}{n}", "title": f"{n}", "abstract": ""} for n in its}
        for task in ("mag", "mesh"):
            rows = (f"{split}{n},{c}" for n, c in zip(its, classes[split], strict=True))
            put(home / task / f"{split}.csv", "pid,class_label", *rows)
    put(home / "paper_metadata_mag_mesh.json", *one_object(papers))


def link_retrieval(root: Path) -> None:
    """p29 cites p9, the 20th after itself."""
    home = root / "scimult" / "link_prediction_retrieval"
    papers = numbered("paper", "p", cite=[])
    papers[29]["cite"] = ["p9"]
    put(home / "SciDocs_papers_test.json", *({**paper, "co-cite": paper["cite"]} for paper in papers))
    put(home / "PMCPatientsPPR_patients_test.json", *numbered("patient", "p"))
    put(home / "PMCPatientsPPR_queries_test.json", {"title": "1", "abstract": "", "patient": ["p29", "p5"]})


def pmc_patients(root: Path) -> None:
    """Relevant are the documents at places 2 and 25."""
    qrels = ("query-id\tcorpus-id\tscore", "q\tp28\t1", "q\tp5\t1")
    for task, kind in (("PAR", "article"), ("PPR", "patient")):
        home = root / "scimult" / "pmc_patients"
        put(home / f"PMCPatients{task}_{kind}s_test.json", *numbered(kind, "p"))
        put(home / f"PMCPatients{task}_queries_test.json", {"query": "q", "title": "1", "abstract": ""})
        put(home / "PMCPatients" / task / f"{task}_test_qrels.tsv", *qrels)
        put(root / "pmc_patients" / task / "corpus.jsonl", *numbered("_id", "p", "text"))
        put(root / "pmc_patients" / task / "qrels_test.tsv", *qrels)
    put(root / "pmc_patients" / "queries" / "test_queries.jsonl", {"_id": "q", "text": "1"})


def scidocs_reranking(root: Path) -> None:
    """The query is 10: 9 is nearer than the relevant 8, and 20 would be first by dot product."""
    papers = {f"p{i}": {"paper_id": f"p{i}", "title": f"{i}", "abstract": ""} for i in range(30)}
    put(root / "scidocs" / "paper_metadata_view_cite_read.json", *one_object(papers))
    for task in ("coview", "coread", "cite", "cocite"):
        put(root / "scidocs" / task / "test.qrel", "p10 0 p8 1", "p10 0 p9 0", "p10 0 p20 0")


def recommendation(root: Path) -> None:
    """Ranked are 7, 5 and 3 alone."""
    papers = numbered("paper", "p", score={})
    papers[1]["score"] = {"p5": 5, "p7": 0, "p3": 3}
    put(root / "scimult" / "link_prediction_reranking" / "Recommendation_papers_test.json", *papers)


def search(root: Path) -> None:
    home = root / "scimult" / "search"
    own, whole = {"p5": 2, "p7": 0, "p3": 1}, {"p28": 2, "p29": 0, "p5": 1}
    names = ("Search", "TRECCOVID_SciRepEval", "TRECCOVID_BEIR", "SciFact", "NFCorpus")
    for name, score in zip(names, (own, own, whole, whole, whole), strict=True):
        put(home / f"{name}_papers_test.json", *numbered("paper", "p"))
        put(home / f"{name}_queries_test.json", {"query_id": "q", "query": "1 [SEP] words", "score": score})


def beir(root: Path) -> None:
    """A query's document is the second in the test split, and the first in the others."""
    for name, splits in (("scifact", ("train",)), ("nfcorpus", ("train", "dev")), ("trec-covid", ())):
        home = root / "beir" / name
        put(home / "corpus.jsonl", *numbered("_id", "d", "text"))
        put(home / "queries.jsonl", *({"_id": split, "text": "1"} for split in (*splits, "test")))
        for split in (*splits, "test"):
            document = "d28" if split == "test" else "d29"
            put(home / "qrels" / f"{split}.tsv", "query-id\tcorpus-id\tscore", f"{split}\t{document}\t1")
    home = root / "beir" / "scidocs"
    put(home / "corpus.jsonl", *numbered("_id", "d", "text"))
    put(home / "queries.jsonl", {"_id": "d29", "text": "29"})
    put(home / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore", "d29\td27\t1")


def scirepeval(root: Path) -> None:
    """As SciDocs."""
    candidates = [
        {"doc_id": f"p{n}", "title": f"{n}", "abstract": "", "score": s} for n, s in ((8, 1), (9, 0), (20, 0))
    ]
    paper = {"doc_id": "q", "title": "10", "abstract": ""}
    configs = ("search", "trec_covid", "nfcorpus", "feeds_title", "feeds_1", "feeds_m", "same_author", "relish")
    for name in (*configs, "high_influence_cite"):
        query = paper if name not in configs[:4] else "10"
        row = {"query": query, "candidates": candidates, "doc_id": "q"}
        put(root / "scirepeval" / name / "evaluation.jsonl", row)


def literature(root: Path) -> None:
    """LitSearch's answers are at places 2 and 25. CSFCube's query is 10, and of 8, 9 and 20 the first is relevant."""
    put(root / "litsearch" / "corpus_clean" / "full.jsonl", *numbered("corpusid", "p"))
    put(root / "litsearch" / "query" / "full.jsonl", {"query": "1", "corpusids": ["p28", "p5"]})
    papers = ({"paper_id": f"p{i}", "title": f"{i}", "abstract": ["words"]} for i in range(30))
    put(root / "csfcube" / "abstracts-csfcube-preds.jsonl", *papers)
    judged = {"p10": {"cands": ["p8", "p9", "p20"], "relevance_adju": [1, 0, 0]}}
    for facet in ("background", "method", "result"):
        put(root / "csfcube" / f"test-pid2anns-csfcube-{facet}.json", judged)


WORLDS = (
    *(fine_classification, coarse_classification, link_retrieval, pmc_patients, scidocs_reranking),
    *(recommendation, search, beir, scirepeval, linear_classification, literature),
)

_recall = dict(zip(("recall@20", "recall@50", "recall@100"), (0.5, 1, 1), strict=True))
_first = dict.fromkeys(_recall, 1)
_own_counts = _recall | {"recall@20": 0}
_coarse = {"macro_f1": (2 / 3 + 0 + 1 / 2) / 3, "micro_f1": 1 / 2, "precision@1": 1 / 2}
_linear = {"macro_f1": (4 / 5 + 2 / 3) / 2, "micro_f1": 3 / 4}
_pmc = {"mrr@10000": 1 / 2, "precision@10": 1 / 10, "ndcg@10": SECOND / (1 + SECOND), "recall@1000": 1}
_rerank = {"map": 1 / 2, "ndcg": SECOND}
_graded = (5 * SECOND + 3 * THIRD) / (5 + 3 * SECOND)
_own = {"ndcg@10": (2 * SECOND + THIRD) / (2 + SECOND)}
_whole = {"ndcg@10": 2 * SECOND / (2 + SECOND)}
_beir = {"ndcg@10": SECOND, "recall@100": 1, "map@100": 1 / 2}

FIGURES: dict[str, dict[str, float]] = {
    **dict.fromkeys(("cs_conference", "chemistry_mesh", "geography", "psychology"), _recall),
    **{f"{name}_names": _first for name in ("cs_conference", "chemistry_mesh", "geography", "psychology")},
    **{f"{name}_names_title": _recall for name in ("cs_conference", "chemistry_mesh")},
    **dict.fromkeys(("mag_nearest", "mesh_nearest"), _coarse),
    **dict.fromkeys(("scidocs_cite", "scidocs_cocite"), _own_counts),
    **dict.fromkeys(("scidocs_cite_without_own", "scidocs_cocite_without_own"), _first),
    **dict.fromkeys(("mag_linear", "mesh_linear"), _linear),
    "litsearch": {"recall@5": 1 / 2, "recall@20": 1 / 2, "ndcg@10": SECOND / (1 + SECOND)},
    **{
        f"csfcube_{facet}": {"ndcg@20": THIRD, "ndcg": THIRD, "r_precision": 0}
        for facet in ("background", "method", "result")
    },
    "ppr_zero_shot": _recall,
    **dict.fromkeys(("par", "ppr", "par_recds", "ppr_recds"), _pmc),
    **{f"{task}_rerank": _rerank for task in ("coview", "coread", "cite", "cocite")},
    "recommendation": {"ndcg@5": _graded, "ndcg@10": _graded, "ndcg": _graded},
    **dict.fromkeys(("search_rerank", "trec_covid_rerank"), _own),
    **dict.fromkeys(("trec_covid", "scifact_all", "nfcorpus_all"), _whole),
    **dict.fromkeys(("scifact_beir", "nfcorpus_beir", "trec_covid_beir", "scidocs_beir"), _beir),
    "scifact_beir_all": {"ndcg@10": (1 + SECOND) / 2, "recall@100": 1, "map@100": 3 / 4},
    "nfcorpus_beir_all": {"ndcg@10": (2 + SECOND) / 3, "recall@100": 1, "map@100": 5 / 6},
    **{f"scirepeval_{name}": {"ndcg": SECOND} for name in ("search", "trec_covid", "nfcorpus", "relish")},
    **{
        f"scirepeval_{name}": {"map": 1 / 2}
        for name in ("feeds_title", "feeds_1", "feeds_m", "same_author", "influential")
    },
}
