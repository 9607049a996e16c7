"""Files for other evaluations: python -m experiments.harness format=scidocs model=M data=FOLDER output=FOLDER

format       scidocs (vectors for the program of SciDocs), scirepeval (vectors for that of SciRepEval, with tasks=), or
             pmc_patients (rankings for its leaderboard)
model        as for evaluate; each file is made with the expert that it is for
data         scidocs: the folder with paper_metadata_*.json. scirepeval: a folder of a folder for each config, such as
             fos, with the split evaluation. pmc_patients: the folder of the ReCDS benchmark
output       a new folder
tasks        of scirepeval: its scirepeval_tasks.jsonl (github.com/allenai/scirepeval)
only         names with commas between: of files (cls), of SciRepEval's tasks (Fields of study), PAR or PPR; by default
             all whose data are there
split, depth of pmc_patients: which split (test), and how many documents a query (1000)
similarity   of pmc_patients: dot, cosine or l2; by default that of the run, dot with backbone=, else cosine
vectors      a folder in which vectors are kept, to go on after an interruption
on_error     fail, or skip: bad lines go to quarantine.jsonl
token_budget, backbone, pooling, tower, adapters    as for evaluate
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from datamodules.readers.checks import BadLines
from datamodules.records import UserError
from experiments.build.models import MODEL_KEYS, default_similarity, load_model, run_of
from experiments.config.experiment import from_dict
from experiments.interop.harness_files import Job, write_pmc_patients, write_scidocs, write_scirepeval
from experiments.config.paths import read_config
from experiments.shared.console import choice, entry_point, key_values, token_budget, whole_number
from experiments.shared.output import whole_folder
from lightning_modules.retrieval.similarity import SIMILARITIES
from lightning_modules.retrieval.vector_cache import Vectors

log = logging.getLogger(__name__)

FORMATS = ("scidocs", "scirepeval", "pmc_patients")
KEYS = MODEL_KEYS | {
    "format": "",
    "data": "",
    "output": "",
    "tasks": "",
    "only": "",
    "split": "test",
    "depth": "1000",
    "similarity": "",
    "vectors": "",
    "on_error": "fail",
    "token_budget": "",
}


def main(arguments: Sequence[str]) -> None:
    values = key_values(arguments, KEYS)
    way = choice("format", values["format"], FORMATS)
    for key in ("data", "output", *(["tasks"] if way == "scirepeval" else [])):
        if not values[key]:
            raise UserError(f"{key}: is missing; format={way} needs it")
    choice("on_error", values["on_error"], BadLines.POLICIES)
    depth = whole_number("depth", values["depth"])
    budget = token_budget(values)
    run = run_of(values["model"])
    config = from_dict(read_config(run), str(run / "config.yaml")) if run else None
    similarity = choice("similarity", values["similarity"] or default_similarity(values, config), SIMILARITIES)
    encoder = load_model(values | {"task": ""}, config).to("cuda" if torch.cuda.is_available() else "cpu")
    kept = Path(values["vectors"]) if values["vectors"] else None
    vectors = Vectors(encoder, token_budget=budget, folder=kept)
    only = list(filter(None, values["only"].split(",")))
    output = Path(values["output"])
    with whole_folder(output) as folder:
        job = Job(encoder, vectors, Path(values["data"]), folder, only, values["on_error"], similarity, depth)
        if way == "scidocs":
            written = write_scidocs(job)
        elif way == "scirepeval":
            written = write_scirepeval(job, Path(values["tasks"]), output)
        else:
            written = write_pmc_patients(job, values["split"])
    log.info("%s: %s", output, ", ".join(path.name for path in written))


if __name__ == "__main__":
    entry_point(main)
