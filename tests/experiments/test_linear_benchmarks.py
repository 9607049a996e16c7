"""mag_linear and mesh_linear, in SciDocs's files, against a few lines of its own program's procedure."""

import csv
import json

import numpy as np
import pytest
from sklearn.metrics import f1_score
from sklearn.model_selection import GridSearchCV
from sklearn.svm import LinearSVC

from datamodules.records import Document
from experiments.evaluate import main
from tests.conftest import text_of

NUM_CLASSES = 3


@pytest.fixture
def scidocs(tmp_path):
    """Papers of three classes, named 0 to 2, whose words overlap."""
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


def test_figures_are_those_of_the_harness(scidocs, make_encoder, tmp_path, caplog):
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
    assert "bm25 has no vectors for a linear model" in caplog.text
