"""Mine hard negatives for an experiment: python -m experiments.mine EXPERIMENT model=M output=FOLDER [key=value ...]

model       what mines: a run's folder, a checkpoint, an exported folder, a plain BERT (folder or hub name); none for
            miners that do without one
output      the store: mining.store=FOLDER trains with it. report.json and report.svg lie in it
vectors     folder of cached vectors, by default OUTPUT.vectors; mining that was killed goes on with them, and they may
            be deleted afterwards
backbone, pooling    of the model, as in experiments.evaluate
devices     processes on this machine that share the work, one for each GPU; torchrun and srun start their own
key=value   of the experiment: its data, and how to mine (mining.k, mining.miner, ...)
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from datamodules.hard_negatives import HardNegativeStore, write_store
from datamodules.records import UserError
from experiments.build.data import build_data
from experiments.build.mining import build_mining
from experiments.build.models import load_model
from experiments.config.experiment import experiments, load_config
from experiments.config.schema import Config
from experiments.run.folder import flat
from experiments.run.ranks import ranks
from experiments.shared.console import entry_point, key_values
from experiments.shared.files import writable_folder
from lightning_modules.callbacks.hard_negatives import compare, write_report
from lightning_modules.distributed.collectives import from_first_rank, rank
from lightning_modules.mining.report import gate, table

log = logging.getLogger(__name__)

KEYS = {"model": "", "backbone": "", "pooling": "", "output": "", "vectors": "", "devices": "1"}


def mine(experiment: str, arguments: Sequence[str]) -> None:
    """Mine with one model, for all tasks of an experiment."""
    own = [text for text in arguments if text.partition("=")[0] in KEYS]
    values = key_values(own, KEYS)
    if not values["output"]:
        raise UserError("output: where does the store go? Give output=FOLDER")
    config = load_config(experiment, [text for text in arguments if text not in own], list(KEYS))
    output = Path(values["output"])
    vectors = Path(values["vectors"] or f"{output}.vectors")
    with (
        writable_folder("output", output.absolute().parent),
        writable_folder("vectors", vectors),
        ranks("experiments.mine", [experiment, *arguments], values["devices"]),
    ):
        _mine(config, values, output, vectors)


def _mine(config: Config, values: dict[str, str], output: Path, vectors: Path) -> None:
    """With all ranks; the first one writes and tells."""
    mining = build_mining(config, vectors)
    cache = None
    if values["model"]:
        encoder = load_model(values | {"task": "", "tower": "", "adapters": ""}, config)
        for task in mining.miners:
            encoder.expert_of(task)
        cache = mining.cache(encoder.to("cuda" if torch.cuda.is_available() else "cpu"))
    data = build_data(config, training=True)
    meta = {
        "miner": mining.about,
        "model": cache.fingerprint if cache else None,
        "data": data.fingerprints(),
        "step": 0,
    }
    if from_first_rank(output.exists()):
        _refuse_other(output, meta)
        log.info("%s: these hard negatives were mined already", output)
        return
    mined = mining.run(cache, data.pools())
    reports = compare(mined, step=0)
    for line in table(reports):
        log.info("%s", line)
    gate({task: found.values for task, found in reports.items()}, config.mining.stop_at)
    if rank() > 0:
        return
    path = write_store(output, {task: part.negatives for task, part in mined.items()}, meta).path
    write_report(path, reports, f"hard negatives mined by {values['model'] or 'no model'}")
    log.info("The store lies in %s. Next: make train EXP=%s mining.store=%s", path, config.experiment, path)


def _refuse_other(output: Path, meta: dict[str, Any]) -> None:
    """Raise UserError if a store was made otherwise."""
    store = HardNegativeStore(output)
    then, now = dict(flat({key: store.meta.get(key) for key in meta})), dict(flat(meta))
    changed = [
        f"{key}: {then.get(key)} there, {now.get(key)} now"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]
    if changed:
        raise UserError(
            f"output: {output} holds hard negatives that were mined otherwise ({'; '.join(changed)}); name another "
            "folder, or remove it"
        )


def main(arguments: Sequence[str]) -> None:
    if not arguments or "=" in arguments[0]:
        raise UserError(
            f"which experiment? There are {', '.join(experiments())}: python -m experiments.mine moe model=M"
        )
    mine(arguments[0], arguments[1:])


if __name__ == "__main__":
    entry_point(main)
