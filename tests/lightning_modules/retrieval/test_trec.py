"""Ids of any kind can be written in TREC's formats, and are read back by us and by pytrec_eval."""

from types import SimpleNamespace

import numpy as np
import pytest
import pytrec_eval

from experiments.results.comparison import MeasuredSystem
from experiments.results.results import BenchmarkTable, SystemResult
from lightning_modules.retrieval.metrics import Run
from lightning_modules.retrieval.trec import decode_id, encode_id, write_qrels, write_table, write_trec

WHITE_SPACE = [chr(number) for number in range(0x110000) if chr(number).isspace()]
IDS = (
    *("plain", "Computer science", "a\r\nb", " a", "a ", "100%", "%20", "a%20b", "50%25", "%", "%%", "%zz", "%e4"),
    *(f"a{space}b" for space in WHITE_SPACE),
    *("\x00", "\x1b[31m", "Größe", "中文 标题", "\ufeffbom", "a\u200bb", '"quoted"', "#", "\\n", "é\u0301"),
)


@pytest.mark.parametrize("id", IDS)
def test_an_encoded_id_is_one_word_and_is_decoded(id):
    assert encode_id(id).split() == [encode_id(id)]
    assert "\n" not in encode_id(id)
    assert len(encode_id(id).splitlines()) == 1
    assert decode_id(encode_id(id)) == id


def test_ordinary_ids_stay_as_they_are():
    for id in ("d1", "10.1000/182", "arXiv:2304.1", "Größe", "a_b-c", "https://x.org/a?b=c&d"):
        assert encode_id(id) == decode_id(id) == id
    for id in ("50%", "%zz", "100%x", "%e4"):  # in files of earlier versions
        assert decode_id(id) == id


def test_pytrec_eval_and_comparisons_read_what_is_written(tmp_path):
    random = np.random.default_rng(0)
    queries = [f"query {id}" for id in IDS]
    indices = np.array([random.permutation(len(IDS))[:20] for _ in queries])
    scores = np.sort(random.random(indices.shape), axis=1)[:, ::-1]
    qrels = {
        query: {IDS[i]: int(grade) for i, grade in enumerate(random.integers(0, 3, len(IDS)))} for query in queries
    }
    run = Run(queries, list(IDS), indices, scores)
    write_trec(run, tmp_path / "runs" / "set.my system.trec", "my system")
    write_qrels(qrels, tmp_path / "runs" / "set.qrels")
    values = {query: number / 7 for number, query in enumerate(queries)}
    rows = [(query, [value]) for query, value in values.items()]
    write_table(["query", "ndcg@10"], rows, tmp_path / "runs" / "set.my system.queries.tsv")

    with open(tmp_path / "runs" / "set.my system.trec", encoding="utf-8") as lines:
        read_run = pytrec_eval.parse_run(lines)
    with open(tmp_path / "runs" / "set.qrels", encoding="utf-8") as lines:
        read_qrels = pytrec_eval.parse_qrel(lines)
    assert {decode_id(q): {decode_id(d): g for d, g in grades.items()} for q, grades in read_qrels.items()} == qrels
    from_files = pytrec_eval.RelevanceEvaluator(read_qrels, {"ndcg_cut.10"}).evaluate(read_run)
    in_memory = {
        str(i): {str(d): float(s) for d, s in zip(row, line, strict=True)}
        for i, (row, line) in enumerate(zip(indices.tolist(), scores.tolist(), strict=True))
    }
    judged = {str(i): {str(IDS.index(d)): g for d, g in qrels[query].items()} for i, query in enumerate(queries)}
    expected = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10"}).evaluate(in_memory)
    assert {decode_id(query): value for query, value in from_files.items()} == {
        queries[int(number)]: value for number, value in expected.items()
    }

    mean = SystemResult(metrics={"ndcg@10": sum(values.values()) / len(values)})
    results = SimpleNamespace(benchmarks={"set": BenchmarkTable(systems={"my system": mean})})
    system = MeasuredSystem(tmp_path, "my system", results)
    ranking = system.ranking("set", queries)
    assert {q: [d for d, _ in ranked] for q, ranked in ranking.items()} == {
        query: [IDS[i] for i in row] for query, row in zip(queries, indices.tolist(), strict=True)
    }
    relevant = {q: {d: g for d, g in grades.items() if g} for q, grades in qrels.items()}
    assert system.judgements("set", queries) == relevant
    assert set(system.first_ranks("set", queries)) == set(queries)
    assert system.values("set", "ndcg@10") == values


def test_links_planted_at_the_files_of_an_evaluation_are_replaced_not_followed(tmp_path):
    (tmp_path / "victim").write_text("mine")
    for name in ("a.qrels", "a.queries.tsv"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    write_qrels({"q": {"d": 1}}, tmp_path / "a.qrels")
    write_table(["query", "ndcg"], [("q", [0.5])], tmp_path / "a.queries.tsv")
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "a.qrels").read_text() == "q 0 d 1\n"
    assert (tmp_path / "a.queries.tsv").read_text() == "query\tndcg\nq\t0.5\n"
