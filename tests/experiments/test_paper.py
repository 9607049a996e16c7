"""The paper's tables as data, and the command reproduce."""

import json

import pytest

from datamodules.records import UserError
from experiments.build.suite import load_suite
from experiments.config.structured import read_yaml
from experiments.reproduce import main
from experiments.results.paper import FOLDER, _read_table, compare_with_paper, figures, tables
from experiments.results.results import tables_from_json

TABLES = {table.name: table for table in tables()}
AVERAGES = {  # table -> system -> average of its row, as printed; a test alone reads them
    str(content["name"]): {
        system: float(average)
        for system, row in content["rows"].items()
        if (average := row.partition("|")[2].strip(" –"))
    }
    for content in map(read_yaml, FOLDER.glob("*.yaml"))
}


def test_malformed_cell_raises_user_error(tmp_path):
    columns = "columns: [{protocol: p, metrics: [f1]}]"
    (tmp_path / "one.yaml").write_text(f"name: One\ntitle: A table\n{columns}\nrows: {{SciBERT: 7x.9}}\n")
    with pytest.raises(UserError, match=r"one\.yaml: damaged, or not a table of cells .*'7x\.9'"):
        _read_table(tmp_path / "one.yaml")


def test_every_average_is_the_mean_of_its_row():
    """A value that was copied wrongly would change one of the printed averages."""
    assert sum(map(len, AVERAGES.values())) == 14 + 15 + 14 + 15 + 14 + 15
    for name, averages in AVERAGES.items():
        for system, average in averages.items():
            row = TABLES[name].rows[system]
            assert sum(cell.value for cell in row) / len(row) == pytest.approx(average, abs=0.00501)


def test_relative_changes_equal_table_9():
    changes = {
        "3": (3.15, -0.95, -0.51, 0.68),
        "4": (1.02, 0.33, 1.50, 0.93),
        "5": (4.06, 4.91, 3.46, 0.95),
        "7": (0.07, -0.37, -0.08, -0.95),
        "8": (0.86, -9.28, -1.25, -3.32),
    }
    for name, expected in changes.items():
        means = AVERAGES[name]
        variants = [means[f"SciMult-{kind}"] for kind in ("MHAExpert", "FFNExpert", "Prefix", "Instruction")]
        computed = [100 * (value / means["SciMult-Vanilla"] - 1) for value in variants]
        assert computed == pytest.approx(expected, abs=0.012)  # the means are rounded too


def test_every_column_is_in_the_suite():
    suite = {config.protocol: config.metrics for config in load_suite().values()}
    for table in tables():
        for column in table.columns:
            assert column.metric in suite[column.protocol], (table.name, column)


def test_figures_of_a_protocol_and_metric():
    cells = figures("scidocs/mag/linear", "macro_f1")
    assert (str(cells["SciBERT"]), cells["SciBERT"].mark) == ("79.7", "quoted")
    assert "BM25" not in cells
    assert len(cells) == 14
    assert {cell.mark for cell in figures("scimult/recommendation", "ndcg").values()} == {"", "computed"}
    assert figures("scimult/scifact/all-splits", "recall@100") == {}


def exact_results(system="SciMult-MHAExpert", similarity="dot", max_length=512):
    """Return the content of results.json if the paper were reproduced exactly."""
    benchmarks = {}
    for table in tables():
        for position, column in enumerate(table.columns):
            cell = table.rows.get(system, {position: None})[position]
            if cell is None:
                continue
            result = benchmarks.setdefault(
                column.protocol.replace("/", " "),
                {
                    "protocol": column.protocol,
                    "queries": column.queries or 7,
                    "documents": column.documents or 7,
                    "systems": {"ours": {}},
                    "measured": {"ours": {"similarity": column.similarity or similarity, "max_length": max_length}},
                },
            )
            result["systems"]["ours"][column.metric] = cell.value / 100
    return benchmarks


def compare(benchmarks, ours, system):
    return compare_with_paper(tables_from_json(benchmarks), ours, system)


def test_equal_values_are_reproduced():
    cells = compare(exact_results(), "ours", "SciMult-MHAExpert")
    assert len(cells) == 12 + 12 + 6 + 4 + 9 + 11 + 5
    assert {cell.verdict for cell in cells} == {"reproduced"}
    trained = "DPR (SciMult-MHAExpert)"  # another checkpoint, trained on PAR and PPR
    assert len(compare(exact_results(trained), "ours", trained)) == 4 * 4


@pytest.mark.parametrize(
    ("points", "verdict"),
    [(0.004, "reproduced"), (-0.006, "within 0.1"), (0.1, "within 0.1"), (-0.3, "within 0.5"), (0.51, "differs")],
)
def test_verdict_depends_on_the_difference(points, verdict):
    benchmarks = exact_results()
    benchmarks["scimult trec-covid beir"]["systems"]["ours"]["ndcg@10"] += points / 100
    cells = {cell.column.protocol: cell for cell in compare(benchmarks, "ours", "SciMult-MHAExpert")}
    cell = cells["scimult/trec-covid/beir"]
    assert (cell.verdict, cell.difference) == (verdict, pytest.approx(points))
    assert cells["scimult/scifact/all-splits"].verdict == "reproduced"


def test_quoted_value_is_compared_to_its_printed_digits():
    benchmarks = exact_results("SPECTER", "cosine")
    benchmarks["scidocs cite rerank"]["systems"]["ours"]["map"] += 0.0004
    cells = {(c.column.protocol, c.column.metric): c for c in compare(benchmarks, "ours", "SPECTER")}
    assert cells["scidocs/cite/rerank", "map"].verdict == "reproduced"


@pytest.mark.parametrize(
    ("change", "remark"),
    [
        (
            {"protocol": "beir/scifact/test", "queries": 300},
            "protocol beir/scifact/test; 300 queries (paper: 1,109)",
        ),
        ({"protocol": "scimult/scifact/all-splits/first-100-queries"}, "protocol scimult/scifact/all-splits/first-100"),
        ({"documents": 5000}, "5,000 documents (paper: 5,183)"),
        ({"measured": {"ours": {"similarity": "cosine", "max_length": 512}}}, "similarity cosine (paper: dot)"),
        ({"measured": {"ours": {"similarity": "dot", "max_length": 256}}}, "texts of up to 256 tokens (paper: 512)"),
    ],
)
def test_values_measured_differently_are_not_comparable(change, remark):
    benchmarks = exact_results()
    benchmarks["scimult scifact all-splits"] |= change
    cells = compare(benchmarks, "ours", "SciMult-MHAExpert")
    other = [cell for cell in cells if cell.verdict != "reproduced"]
    assert [cell.column.protocol for cell in other] == ["scimult/scifact/all-splits"]
    assert other[0].verdict == "not comparable"
    assert other[0].remark.startswith(remark)


def test_command_prints_a_row_per_cell(tmp_path, capsys, caplog):
    benchmarks = exact_results()
    del benchmarks["scimult nfcorpus all-splits"]
    benchmarks["scimult scifact all-splits"]["systems"]["ours"]["ndcg@10"] = 0.7
    (tmp_path / "results.json").write_text(json.dumps({"benchmarks": benchmarks}))
    caplog.set_level("INFO")
    main([f"results={tmp_path}"])
    line = next(line for line in capsys.readouterr().out.splitlines() if "scifact" in line)
    assert [part.strip() for part in line.split("│")[2:7]] == [
        "scimult/scifact/all-splits", "ndcg@10", "70.00", "70.67", "-0.67",
    ]  # fmt: skip
    assert "59 cells: 57 reproduced, 1 differs, 1 not measured" in caplog.text


def test_invalid_options_raise_user_error(tmp_path):
    with pytest.raises(UserError, match="expected a folder with results.json"):
        main([f"results={tmp_path}"])
    (tmp_path / "results.json").write_text(json.dumps({"benchmarks": {"x": {"systems": {"a": {}, "b": {}}}}}))
    with pytest.raises(UserError, match="ours: expected one of a, b, got nothing"):
        main([f"results={tmp_path}"])
    with pytest.raises(UserError, match="system: expected one of .*, got 'GPT'"):
        main([f"results={tmp_path}", "ours=a", "system=GPT"])
