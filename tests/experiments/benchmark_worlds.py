"""Tiny data for every benchmark, in its published layout below one folder, and their metrics by hand.

The vector of a text is the sum of its whole numbers (see number_of). A query of 1 ranks documents by their number.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from datamodules.readers.mmsci import MATCHING
from tests.datamodules.readers.worlds import one_object, put, put_article, put_splits

SECOND = 1 / math.log2(3)  # gain at rank 2
THIRD = 1 / 2


def number_of(title: str, text: str) -> int:
    return sum(map(int, re.findall(r"-?\d+", f"{title} {text}")))


def numbered(key: str, prefix: str, text: str = "abstract", **more) -> list[dict]:
    return [{key: f"{prefix}{i}", "title": f"paper {i}", text: "words", **more} for i in range(30)]


def fine_classification(root: Path) -> None:
    """The number of label l5 is 30 with its definition and 5 without; the paper names label l3."""
    for name in ("CSConference", "ChemistryMeSH", "Geography", "Psychology"):
        labels = [{"label": f"l{i}", "name": [f"name {i}", "synonym 99"], "definition": "of it"} for i in range(30)]
        labels[5]["definition"] = "with 25 more"
        folder = root / "scimult" / "classification_fine"
        put(folder / f"{name}_label.json", *labels)
        put(folder / f"{name}_papers_test.json", {"title": "1", "abstract": "a", "label": ["l5", "l3"]})
        put(folder / f"{name}_matched.json", {"candidate": ["l3"]})


def coarse_classification(root: Path) -> None:
    """The predicted classes are 2, 2, 2 and 0."""
    for name in ("MAG", "MeSH"):
        folder = root / "scimult" / "classification_coarse"
        put(folder / f"{name}_label.json", *({"label": i, "name": [f"{i + 1}"], "definition": ""} for i in range(3)))
        papers = zip((1, 1, 1, -1), (2, 0, 1, 0), strict=True)
        put(folder / f"{name}_papers_test.json", *({"title": f"{n}", "abstract": "", "label": c} for n, c in papers))


def linear_classification(root: Path) -> None:
    """Numbers below 0 are class 0, others class 1; one test paper has the other class."""
    folder = root / "scidocs"
    numbers = {"train": (-3, -2, -1, 1, 2, 3), "test": (5, 7, -5, 4)}
    classes = {"train": (0, 0, 0, 1, 1, 1), "test": (1, 1, 0, 0)}
    papers = {}
    for split, values in numbers.items():
        papers |= {f"{split}{n}": {"paper_id": f"{split}{n}", "title": f"{n}", "abstract": ""} for n in values}
        for task in ("mag", "mesh"):
            rows = (f"{split}{n},{c}" for n, c in zip(values, classes[split], strict=True))
            put(folder / task / f"{split}.csv", "pid,class_label", *rows)
    put(folder / "paper_metadata_mag_mesh.json", *one_object(papers))


def link_retrieval(root: Path) -> None:
    """Paper p29 cites p9, which comes 20th after itself."""
    folder = root / "scimult" / "link_prediction_retrieval"
    papers = numbered("paper", "p", cite=[])
    papers[29]["cite"] = ["p9"]
    put(folder / "SciDocs_papers_test.json", *({**paper, "co-cite": paper["cite"]} for paper in papers))
    put(folder / "PMCPatientsPPR_patients_test.json", *numbered("patient", "p"))
    put(folder / "PMCPatientsPPR_queries_test.json", {"title": "1", "abstract": "", "patient": ["p29", "p5"]})


def pmc_patients(root: Path) -> None:
    """The relevant documents have ranks 2 and 25."""
    qrels = ("query-id\tcorpus-id\tscore", "q\tp28\t1", "q\tp5\t1")
    for task, kind in (("PAR", "article"), ("PPR", "patient")):
        folder = root / "scimult" / "pmc_patients"
        put(folder / f"PMCPatients{task}_{kind}s_test.json", *numbered(kind, "p"))
        put(folder / f"PMCPatients{task}_queries_test.json", {"query": "q", "title": "1", "abstract": ""})
        put(folder / "PMCPatients" / task / f"{task}_test_qrels.tsv", *qrels)
        put(root / "pmc_patients" / task / "corpus.jsonl", *numbered("_id", "p", "text"))
        put(root / "pmc_patients" / task / "qrels_test.tsv", *qrels)
    put(root / "pmc_patients" / "queries" / "test_queries.jsonl", {"_id": "q", "text": "1"})


def scidocs_reranking(root: Path) -> None:
    """The query is 10. 9 is nearer than the relevant 8, and by dot product 20 would come first."""
    papers = {f"p{i}": {"paper_id": f"p{i}", "title": f"{i}", "abstract": ""} for i in range(30)}
    put(root / "scidocs" / "paper_metadata_view_cite_read.json", *one_object(papers))
    for task in ("coview", "coread", "cite", "cocite"):
        put(root / "scidocs" / task / "test.qrel", "p10 0 p8 1", "p10 0 p9 0", "p10 0 p20 0")


def recommendation(root: Path) -> None:
    """Only papers 7, 5 and 3 are ranked."""
    papers = numbered("paper", "p", score={})
    papers[1]["score"] = {"p5": 5, "p7": 0, "p3": 3}
    put(root / "scimult" / "link_prediction_reranking" / "Recommendation_papers_test.json", *papers)


def search(root: Path) -> None:
    folder = root / "scimult" / "search"
    judged, whole = {"p5": 2, "p7": 0, "p3": 1}, {"p28": 2, "p29": 0, "p5": 1}
    names = ("Search", "TRECCOVID_SciRepEval", "TRECCOVID_BEIR", "SciFact", "NFCorpus")
    for name, score in zip(names, (judged, judged, whole, whole, whole), strict=True):
        put(folder / f"{name}_papers_test.json", *numbered("paper", "p"))
        put(folder / f"{name}_queries_test.json", {"query_id": "q", "query": "1 [SEP] words", "score": score})


def beir(root: Path) -> None:
    """The relevant document comes second in the test split, and first in the others."""
    for name, splits in (("scifact", ("train",)), ("nfcorpus", ("train", "dev")), ("trec-covid", ())):
        folder = root / "beir" / name
        put(folder / "corpus.jsonl", *numbered("_id", "d", "text"))
        put(folder / "queries.jsonl", *({"_id": split, "text": "1"} for split in (*splits, "test")))
        for split in (*splits, "test"):
            document = "d28" if split == "test" else "d29"
            put(folder / "qrels" / f"{split}.tsv", "query-id\tcorpus-id\tscore", f"{split}\t{document}\t1")
    folder = root / "beir" / "scidocs"
    put(folder / "corpus.jsonl", *numbered("_id", "d", "text"))
    put(folder / "queries.jsonl", {"_id": "d29", "text": "29"})
    put(folder / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore", "d29\td27\t1")


def scirepeval(root: Path) -> None:
    """The same queries and candidates as in scidocs_reranking."""
    candidates = [
        {"doc_id": f"p{n}", "title": f"{n}", "abstract": "", "score": s} for n, s in ((8, 1), (9, 0), (20, 0))
    ]
    paper = {"doc_id": "q", "title": "10", "abstract": ""}
    configs = ("search", "trec_covid", "nfcorpus", "feeds_title", "feeds_1", "feeds_m", "same_author", "relish")
    for name in (*configs, "high_influence_cite"):
        query = paper if name not in configs[:4] else "10"
        row = {"query": query, "candidates": candidates, "doc_id": "q"}
        put(root / "scirepeval" / name / "evaluation.jsonl", row)


def scirepeval_probes(root: Path) -> None:
    """Numbers above 0 are class 1 and label 0, others class 0 and label 1.

    One test paper has the other class and label, and one has no label. Numbers to predict are twice those of the texts;
    those of two test papers are swapped.
    """
    train = {f"t{n}": n for n in range(-64, 65) if n}
    sides = {"five": (5, 1), "seven": (7, 1), "below": (-5, 0), "other": (4, 0)}
    orders = {"one": (1, 0.5), "two": (2, 3.25), "three": (3, 2), "four": (4, 4)}
    numbers = train | {id: n for id, (n, _) in (sides | orders).items()} | {"none": -6}
    papers = [{"doc_id": id, "title": f"{n}", "abstract": ""} for id, n in numbers.items()]
    configs = ("biomimicry", "drsm", "fos", "mesh_descriptors", "cite_count", "pub_year", "tweet_mentions")
    for name in (*configs, "peer_review_score_hIndex"):
        put(root / "scirepeval" / name / "evaluation.jsonl", *papers)
    for name in ("biomimicry", "drsm", "mesh_descriptors"):
        folder = root / "scirepeval_test" / name
        words = ("C01.1", "C04.5") if name == "mesh_descriptors" else (0, 1)
        put(folder / "train.jsonl", *({"paper_id": id, "label": words[n > 0]} for id, n in train.items()))
        put(folder / "test.jsonl", *({"paper_id": id, "label": words[c]} for id, (_, c) in sides.items()))
    folder = root / "scirepeval_test" / "fos"
    put(folder / "train.jsonl", *({"paper_id": id, "label": [int(n > 0), int(n < 0)]} for id, n in train.items()))
    rows = [{"paper_id": id, "label": [c, 1 - c]} for id, (_, c) in sides.items()]
    put(folder / "test.jsonl", *rows, {"paper_id": "none", "label": [0, 0]})
    for name in ("cite_count", "pub_year", "tweet_mentions", "peer_review_score", "hIndex"):
        folder = root / "scirepeval_test" / name
        put(folder / "train.jsonl", *({"paper_id": id, "label": 2 * n} for id, n in train.items()))
        put(folder / "test.jsonl", *({"paper_id": id, "label": label} for id, (_, label) in orders.items()))


def doris_mae(root: Path) -> None:
    """The query of 1 ranks 4, 3, 2, 1, 0; their scores, summed over its three aspects, are 2, 0, 3, 4, 0."""
    papers = [{"original_abstract": f"{n}", "title": "9"} for n in range(6)]
    scores = {("7", 4): 2, ("7", 2): 1, ("8", 2): 2, ("7", 1): 2, ("9", 1): 2, ("8", 3): 0, ("6", 3): 2}
    content = {
        "aspect2aspect_id": {},
        "Corpus": papers,
        "Annotation": [{"aspect_id": a, "abstract_id": p, "score": s} for (a, p), s in scores.items()],
        "Query": [{"query_text": "1", "candidate_pool": [0, 1, 2, 3, 4], "aspects": {"7": ["8"], "9": []}}],
    }
    put(root / "doris_mae" / "DORIS-MAE_dataset_v1.json", content)


def literature(root: Path) -> None:
    """LitSearch: the answers have ranks 2 and 25. CSFCube: the query is 10, and of 8, 9 and 20 only 8 is relevant."""
    put(root / "litsearch" / "corpus_clean" / "full.jsonl", *numbered("corpusid", "p"))
    put(root / "litsearch" / "query" / "full.jsonl", {"query": "1", "corpusids": ["p28", "p5"]})
    papers = ({"paper_id": f"p{i}", "title": f"{i}", "abstract": ["words"]} for i in range(30))
    put(root / "csfcube" / "abstracts-csfcube-preds.jsonl", *papers)
    judged = {"p10": {"cands": ["p8", "p9", "p20"], "relevance_adju": [1, 0, 0]}}
    for facet in ("background", "method", "result"):
        put(root / "csfcube" / f"test-pid2anns-csfcube-{facet}.json", judged)


def mmsci(root: Path) -> None:
    """The caption is 1, its article 2; other articles are 1 and 3. The article cites 1. Its subject is 5, another is 7.

    Of the options of a question, B is the largest. It is right in one of two, two of three, and one of four questions.
    """
    folder = root / "mmsci"
    images = [{"image_filename": "figure_0.png", "caption": "Figure 9: 1", "description": "words"}]
    put_article(folder, "Life/Cells 5", "a", title="2", images=images, references=[{"title": "Li, Q. 1.Cell (2001)"}])
    put_article(folder, "Life/Genes 7", "b", title="1")
    put_article(folder, "Life/Genes 7", "c", title="3")
    put_splits(folder, train={"Life/Genes 7": ["b", "c"]}, test={"Life/Cells 5": ["a"]})
    questions = []
    for setting in ("AB", "BBC", "ABCD"):
        text = "what is 1?\nA: of 3\nB: of 4\nC: of 0\nD: of 2"
        questions.append(
            [{"uid": "b", "image": f"1{i}.png", "question": text, "answer": answer} for i, answer in enumerate(setting)]
        )
    put(folder / "benchmark" / "dev" / MATCHING, questions)


WORLDS = (
    *(fine_classification, coarse_classification, link_retrieval, pmc_patients, scidocs_reranking),
    *(recommendation, search, beir, scirepeval, linear_classification, literature),
    *(scirepeval_probes, doris_mae, mmsci),
)

_recall = dict(zip(("recall@20", "recall@50", "recall@100"), (0.5, 1, 1), strict=True))
_first = dict.fromkeys(_recall, 1)
_own_counts = _recall | {"recall@20": 0}
_coarse = {"macro_f1": (2 / 3 + 0 + 1 / 2) / 3, "micro_f1": 1 / 2, "precision@1": 1 / 2}
_linear = {"macro_f1": (4 / 5 + 2 / 3) / 2, "micro_f1": 3 / 4}
_pmc = {"mrr@10000": 1 / 2, "precision@10": 1 / 10, "ndcg@10": SECOND / (1 + SECOND), "recall@1000": 1}
_rerank = {"map": 1 / 2, "ndcg": SECOND}
_graded = (5 * SECOND + 3 * THIRD) / (5 + 3 * SECOND)
_labels = {"macro_f1": (4 / 5 + 1 / 2) / 2}
_doris = {"recall@5": 1, "recall@20": 1, "r_precision": 0, "map": (1 / 3 + 2 / 4) / 2}
_sums = (2 + 3 * THIRD + 4 / math.log2(5)) / (4 + 3 * SECOND + 2 * THIRD)
_judged = {"ndcg@10": (2 * SECOND + THIRD) / (2 + SECOND)}
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
    **dict.fromkeys(("search_rerank", "trec_covid_rerank"), _judged),
    **dict.fromkeys(("trec_covid", "scifact_all", "nfcorpus_all"), _whole),
    **dict.fromkeys(("scifact_beir", "nfcorpus_beir", "trec_covid_beir", "scidocs_beir"), _beir),
    "scifact_beir_all": {"ndcg@10": (1 + SECOND) / 2, "recall@100": 1, "map@100": 3 / 4},
    "nfcorpus_beir_all": {"ndcg@10": (2 + SECOND) / 3, "recall@100": 1, "map@100": 5 / 6},
    **{f"scirepeval_{name}": {"ndcg": SECOND} for name in ("search", "trec_covid", "nfcorpus", "relish")},
    **{
        f"scirepeval_{name}": {"map": 1 / 2}
        for name in ("feeds_title", "feeds_1", "feeds_m", "same_author", "influential")
    },
    **{f"scirepeval_biomimicry{few}": {"f1": 4 / 5} for few in ("", "_64", "_16")},
    **{f"scirepeval_{name}": {"macro_f1": _linear["macro_f1"]} for name in ("drsm", "drsm_64", "drsm_24", "mesh")},
    **dict.fromkeys(("scirepeval_fos", "scirepeval_fos_10", "scirepeval_fos_5"), _labels),
    **{
        f"scirepeval_{name}": {"kendall_tau": (5 - 1) / 6}
        for name in ("citation_count", "publication_year", "review_score", "h_index", "tweets")
    },
    "doris_mae": _doris,
    "doris_mae_sum": {"ndcg@10": _sums},
    "doris_mae_best": {"mrr@10": 1 / 4},
    "mmsci_captions": {"ndcg@10": SECOND, "recall@100": 1},
    "mmsci_subjects": {"ndcg@10": SECOND, "recall@20": 1},
    "mmsci_references": {"ndcg@10": SECOND, "recall@100": 1},
    "mmsci_choice_figures": {"precision@1": 1 / 2},
    "mmsci_choice_panels": {"precision@1": 2 / 3},
    "mmsci_choice_same_figure": {"precision@1": 1 / 4},
}
