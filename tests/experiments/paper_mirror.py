"""Small files in the layouts of the recipe `scimult`, and the recipe with their checksums."""

from __future__ import annotations

import hashlib
import io
import json
import random
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from experiments.download.recipe import FOLDER

RECIPE = FOLDER / "scimult.yaml"
NUM_PAPERS = 320  # of each field of MAPLE
MESH = "<DescriptorRecordSet>{}</DescriptorRecordSet>"
DESCRIPTOR = """<DescriptorRecord><DescriptorUI>D{0}</DescriptorUI><DescriptorName><String>term {0}</String>
</DescriptorName><ConceptList><Concept PreferredConceptYN="Y"><ScopeNote>What {0} is.</ScopeNote></Concept>
</ConceptList></DescriptorRecord>"""


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def maple_papers(field: str, labels: list[str], seed: int) -> list[dict]:
    """Make papers that share their first label and have two others, cite three papers, and have one of 40 authors."""
    rng = random.Random(seed)
    ids = [f"{seed}{i:04}" for i in range(NUM_PAPERS)]
    return [
        {
            "paper": id,
            "venue": f"v{seed}{rng.randrange(4)}",
            "year": str(rng.randrange(1990, 2020)),
            "title": f"the {field} paper {id}",
            "label": [labels[0], *rng.sample(labels[1:], 2)],
            "author": [f"a{seed}{rng.randrange(40)}" for _ in range(2)],
            "reference": [*rng.sample(ids, 3), "elsewhere"],
            "abstract": f"about {rng.choice(labels)}",
            "title_raw": f"The {field} Paper {id}",
            "abstract_raw": f"About {rng.choice(labels)}",
        }
        for id in ids
    ]


def maple_zip() -> bytes:
    specification = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["sources"]["maple"]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("MAPLE/CSRankings/papers.json", b"not used")
        for number, member in enumerate(specification["members"], start=1):
            field = member.split("/")[1]
            if member.endswith("labels.txt"):
                archive.writestr(member, "".join(f"{i}\tname {i}\t2\n" for i in range(12)))
            elif field.endswith("_MeSH"):
                archive.writestr(member, lines(maple_papers(field, [f"D{i}" for i in range(12)], number)))
            else:
                archive.writestr(member, lines(maple_papers(field, [str(i) for i in range(12)], number)))
    return out.getvalue()


def micol_zip() -> bytes:
    out = io.BytesIO()
    rows = ({"label": str(i), "name": [f"name {i}", "n"], "definition": f"what {i} is"} for i in range(10))
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("MAG/MAG_label.json", lines(rows))
        archive.writestr("scibert_scivocab_uncased/pytorch_model.bin", b"not used")
    return out.getvalue()


def parquet(rows: list[dict]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def paper(id: int) -> dict:
    return {"doc_id": str(id), "corpus_id": id, "title": f"title {id}", "abstract": f"abstract {id}"}


def triplets(number: int) -> bytes:
    return parquet(
        [
            {"query": paper(10 * number + i), "pos": paper(1000 + i + j), "neg": paper(2000 + i + j)}
            for i in range(4)
            for j in range(3)
        ]
    )


def searches(number: int) -> bytes:
    rows = [
        {
            "query": f"words {number} {i}",
            "doc_id": f"{number}-{i}",
            "candidates": [paper(100 * number + i + j) | {"score": max(0, 2 - j)} for j in range(5)],
        }
        for i in range(4)
    ]
    return parquet(rows)


def write_mirror(by_hand: bool = True) -> dict[str, bytes]:
    """Return the content of each SOURCE/FILE. by_hand: include files that users must download by hand."""
    sources = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["sources"]
    files = {
        "maple/MAPLE.zip": maple_zip(),
        "mesh/desc2022.xml": MESH.format("".join(DESCRIPTOR.format(i) for i in range(12))).encode(),
    }
    if by_hand:
        files["micol/MICoL.zip"] = micol_zip()
    for source, make in (("cite_prediction", triplets), ("search", searches), ("search_test", searches)):
        for number, name in enumerate(sources[source]["files"]):
            files[f"{source}/{name}"] = make(number + (500 if source == "search_test" else 0))
    return files


def write_recipe(path: Path, files: dict[str, bytes]) -> Path:
    """Write the recipe with the checksums of the small files."""
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    for source, spec in recipe["sources"].items():
        for name, file in spec["files"].items():
            if file["sha256"] is not None:
                file["sha256"] = hashlib.sha256(files[f"{source}/{name}"]).hexdigest()
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path
