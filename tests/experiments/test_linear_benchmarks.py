"""Probe benchmarks on files of SciDocs and SciRepEval, compared with their programs' procedures in a few lines."""

import csv
import json
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from scipy.stats import kendalltau
from sklearn.metrics import f1_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.multiclass import OneVsRestClassifier
from sklearn.svm import LinearSVC, LinearSVR

from datamodules.records import Document, UserError
from experiments.build.benchmarks import suite_benchmarks
from experiments.evaluate import main
from experiments.results.comparison import open_systems
from lightning_modules.encoders.loading import load_encoder
from tests.conftest import text_of

NUM_CLASSES = 3
pytestmark = pytest.mark.filterwarnings("ignore:Liblinear failed to converge")  # with the largest C


@pytest.fixture
def scidocs(tmp_path):
    """Make papers of three classes, named 0 to 2, whose words overlap."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data" / "scidocs"
    papers, rows = {}, {}
    for split, count in (("train", 45), ("val", 9), ("test", 30)):
        rows[split] = [("pid", "class_label")]
        for number in range(count):
            words = rng.integers(0, 12, size=8) + 5 * (number % NUM_CLASSES)
            id = f"{split}{number}"
            papers[id] = {"paper_id": id, "title": text_of(*words[:3]), "abstract": text_of(*words[3:])}
            rows[split].append((id, number % NUM_CLASSES))
    for task in ("mag", "mesh"):
        (folder / task).mkdir(parents=True)
        for split, lines in rows.items():
            with open(folder / task / f"{split}.csv", "w", newline="") as file:
                csv.writer(file).writerows(lines)
    (folder / "paper_metadata_mag_mesh.json").write_text(json.dumps(papers))
    return folder


@pytest.mark.slow
def test_results_equal_those_of_scidocs(scidocs, make_encoder, tmp_path, caplog):
    encoder = make_encoder()
    encoder.save_pretrained(tmp_path / "model")
    models = f"model={tmp_path / 'model'},bm25"
    main([models, "benchmarks=mag_linear", f"data.root={scidocs.parent}", f"output={tmp_path / 'out'}"])

    papers = json.loads((scidocs / "paper_metadata_mag_mesh.json").read_text())
    splits = {
        s: list(csv.reader((scidocs / "mag" / f"{s}.csv").read_text().splitlines()))[1:] for s in ("train", "test")
    }
    vectors, labels = {}, {}
    for split, rows in splits.items():
        texts = [Document(id, papers[id]["title"], papers[id]["abstract"]) for id, _ in rows]
        vectors[split] = encoder.encode(texts, "classification").numpy().astype(float)
        labels[split] = [label for _, label in rows]
    svm = LinearSVC(loss="squared_hinge", random_state=42, fit_intercept=False)
    svm = GridSearchCV(svm, cv=3, param_grid={"C": np.logspace(-4, 2, 7)}).fit(vectors["train"], labels["train"])
    predicted = svm.predict(vectors["test"])
    expected = {f"{a}_f1": f1_score(labels["test"], predicted, average=a) for a in ("macro", "micro")}
    assert 0.34 < expected["macro_f1"] < 0.99, "neither chance nor trivial"

    result = json.loads((tmp_path / "out" / "results.json").read_text())["benchmarks"]["mag_linear"]
    assert result["systems"] == {"model": pytest.approx(expected, abs=1e-12)}
    assert result["measured"]["model"]["similarity"] == "svm"
    assert (result["protocol"], result["queries"], result["documents"]) == ("scidocs/mag/linear", 30, 3)
    assert "bm25 has no vectors, which a linear model needs" in caplog.text


COSTS = {"C": np.logspace(-2, 2, 5)}
DRAWS = 4  # instead of 50


def few_shot_classes(train, classes, test):
    """Train on each part of 64 papers."""
    parts = [part for _, part in StratifiedKFold(-(-len(train) // 64)).split(train, classes)][:50]
    return [LinearSVC(fit_intercept=False, random_state=42).fit(train[p], classes[p]).predict(test) for p in parts]


def few_shot_labels(train, labels, test):
    """Train on ten papers of each label, drawn with seeds from 42 on, in the order of a Python set."""
    predictions = []
    for draw in range(DRAWS):
        np.random.seed(42 + draw)
        chosen = set()
        for label in range(labels.shape[1]):
            chosen.update(np.random.choice(np.where(labels[:, label] == 1)[0], 10, replace=False).tolist())
        rows = list(chosen)
        svm = LinearSVC(loss="hinge", fit_intercept=False, max_iter=10000, random_state=42)
        model = OneVsRestClassifier(GridSearchCV(svm, COSTS, cv=3))
        predictions.append(model.fit(train[rows], labels[rows]).predict(test))
    return predictions


def regression(train, numbers, test):
    svr = LinearSVR(epsilon=0, fit_intercept=False, random_state=42, max_iter=1000)
    return [GridSearchCV(svr, {"C": np.logspace(-4, 2, 7)}, cv=3).fit(train, numbers).predict(test)]


def write_files(folder, config, test_config, papers, labels):
    """Write files like those on the hub: texts as a table, and judgements as in its converted branch."""
    (folder / "scirepeval" / config).mkdir(parents=True)
    texts = pyarrow.Table.from_pylist([{"doc_id": p.id, "title": p.title, "abstract": p.text} for p in papers])
    pyarrow.parquet.write_table(texts, folder / "scirepeval" / config / "evaluation-00000-of-00001.parquet")
    for split, rows in (("train", range(130)), ("test", range(130, 180))):
        judged = [{"paper_id": papers[row].id, "label": labels[row].tolist()} for row in rows]
        directory = folder / "scirepeval_test" / test_config / split
        directory.mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(judged), directory / "0000.parquet")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config", "test_config", "procedure", "metric", "score"),
    [
        ("biomimicry_64", "biomimicry", "biomimicry", few_shot_classes, "f1", f1_score),
        ("fos_10", "fos", "fos", few_shot_labels, "macro_f1", lambda a, b: f1_score(a, b, average="macro")),
        ("review_score", "peer_review_score_hIndex", "peer_review_score", regression, "kendall_tau", kendalltau),
    ],
)
def test_results_equal_those_of_scirepeval(
    name, config, test_config, procedure, metric, score, make_encoder, tmp_path, monkeypatch
):
    rng = np.random.default_rng(5)
    kinds = rng.integers(0, 3, 180)
    words = rng.integers(0, 12, (180, 8)) + 4 * kinds[:, None]
    papers = [Document(f"p{i}", text_of(*row[:3]), text_of(*row[3:])) for i, row in enumerate(words)]
    several = np.stack([kinds == 0, kinds > 0, rng.random(180) < 0.4], axis=1).astype(int)
    labels = {"f1": (kinds > 1).astype(int), "macro_f1": several, "kendall_tau": kinds + rng.normal(size=180).round(1)}
    write_files(tmp_path, config, test_config, papers, labels[metric])
    make_encoder().save_pretrained(tmp_path / "model")
    monkeypatch.setattr("experiments.evaluate.suite_benchmarks", fewer_draws)
    chosen = [f"benchmarks=scirepeval_{name}", f"data.root={tmp_path}", f"output={tmp_path / 'out'}"]
    main([f"model={tmp_path / 'model'}", *chosen])

    vectors = load_encoder(tmp_path / "model").encode(papers, "classification").numpy().astype(float)
    predictions = procedure(vectors[:130], labels[metric][:130], vectors[130:])
    scores = [score(labels[metric][130:], prediction) for prediction in predictions]
    scores = [getattr(value, "statistic", value) for value in scores]
    result = json.loads((tmp_path / "out" / "results.json").read_text())["benchmarks"][f"scirepeval_{name}"]
    assert 0.2 < np.mean(scores) < 0.99, "neither chance nor trivial"
    assert result["systems"]["model"] == {metric: pytest.approx(np.mean(scores), abs=1e-12)}
    measured = result["measured"]["model"]
    if len(predictions) > 1:
        lines = (tmp_path / "out" / "runs" / f"scirepeval_{name}.model.draws.tsv").read_text().splitlines()
        assert [float(line.split("\t")[1]) for line in lines[1:]] == pytest.approx(scores, abs=1e-12)
        with pytest.raises(UserError, match="is a mean over draws of training papers, not over queries"):
            open_systems("A", [str(tmp_path / "out")])[0].values(f"scirepeval_{name}", metric)
        assert measured["draws"] == len(predictions)
        assert measured["spread"][metric] == pytest.approx(np.std(scores))
    else:
        run = (tmp_path / "out" / "runs" / f"scirepeval_{name}.model.trec").read_text().splitlines()
        assert [float(line.split()[4]) for line in run] == pytest.approx(predictions[0], rel=1e-8)


def fewer_draws(options):
    for benchmark in suite_benchmarks(options):
        yield replace(benchmark, probe=replace(benchmark.probe, draws=min(DRAWS, benchmark.probe.draws)))
