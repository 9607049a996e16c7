"""Mine hard negatives for an experiment, with any model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from datamodules.hard_negatives import HardNegativeStore, check_replaceable, write_store
from datamodules.options import option
from datamodules.records import UserError, changes
from experiments.build.data import build_data
from experiments.build.mining import build_mining
from experiments.build.models import EncodingOptions, device_of
from experiments.config.arguments import option_keys
from experiments.config.experiment import ExperimentOptions, load_config, parse_overrides
from experiments.config.schema import Config
from experiments.config.targets import current_path
from experiments.run.endings import train_command
from experiments.run.folder import flat
from experiments.run.processes import run_on_ranks
from experiments.shared.console import entry_point
from experiments.shared.output import writable_folder
from lightning_modules.distributed.collectives import from_first_rank, rank
from lightning_modules.mining.mine import Mining, without_negatives
from lightning_modules.mining.mined import Mined, unrated
from lightning_modules.mining.report import check_false_negatives, read_values, reports_of, table, write_report
from lightning_modules.retrieval.compute import resolve_device
from lightning_modules.retrieval.vector_cache import VectorCache

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class MineOptions(ExperimentOptions, EncodingOptions):
    """Mine hard negatives for all tasks of an experiment. If the command is killed, running it again resumes.

    The model scores the candidates; some miners work without a model. The experiment's keys mining.k, mining.miner and
    so on set how to mine, and mining.judge sets how to relabel the mined negatives. With mining.store=FOLDER, the
    negatives of that store are relabelled, and nothing is mined.
    """

    output: Path = option(help="folder for the hard negatives and report.svg; train with mining.store=FOLDER")
    document_model: str = option(
        "", "model that encodes the documents, if model= only encodes queries (asymmetric distillation)"
    )
    vectors: Path | None = option(
        None, "folder for cached vectors, by default OUTPUT.vectors; you can delete it afterwards"
    )
    devices: int = option(1, "number of processes on this machine, one per GPU; leave it out with torchrun", minimum=1)


def main(arguments: Sequence[str]) -> None:
    options, overrides = parse_overrides(MineOptions, arguments)
    config = load_config(options.experiment, overrides, option_keys(MineOptions))
    vectors = options.vectors or Path(f"{options.output}.vectors")
    with (
        writable_folder("output", options.output.absolute().parent),
        writable_folder("vectors", vectors),
    ):
        run_on_ranks(lambda: mine(config, options, vectors), "experiments.mine", arguments, options.devices)
    others = [text for text in overrides if not text.startswith("mining.")]
    command = train_command(config.experiment, config, [*others, f"mining.store={options.output}"])
    log.info("Hard negatives: %s. Next: %s", options.output, command)


def mine(config: Config, options: MineOptions, vectors_folder: Path) -> None:
    """Mine on all ranks. The first one writes the store and its report."""
    device = device_of(config) if options.device == "auto" else resolve_device(options.device)
    mining = build_mining(config, vectors_folder, device)
    if config.mining.store:
        _relabel(config, options, mining)
        return
    vectors, document_vectors = None, None
    if options.model:
        vectors = _cache(options, config, mining, device)
        if options.document_model:
            documents = EncodingOptions(model=options.document_model, packages=options.packages)
            document_vectors = _cache(documents, config, mining, device)
    elif options.document_model:
        raise UserError("document_model: needs model= too, to encode the queries")
    elif mining.needs_encoder:
        raise UserError(
            "model: this miner or margin needs one; to mine without a model, choose another miner, and set "
            "mining.relative_margin=null mining.absolute_margin=null"
        )
    data = build_data(config, training=True)
    meta = {
        "miner": mining.description,
        "model": vectors.fingerprint if vectors else None,
        "document_model": document_vectors.fingerprint if document_vectors else None,
        "data": data.fingerprints(),
        "step": 0,
        "relabelled": None,
        **mining.judging,
    }
    if not _is_done(options.output, meta):
        mined = mining.run(vectors, data.pools(), document_vectors=document_vectors)
        _write(config, options, mined, meta, f"mined by {options.model or 'no model'}")


def _cache(options: EncodingOptions, config: Config, mining: Mining, device: torch.device) -> VectorCache:
    """Load the model on a device, and return the cache of its vectors. Raises UserError if it lacks a mined task."""
    encoder = options.load_on_device(config, device=device)
    for task in mining.miners:
        encoder.expert_of(task)
    return mining.cache(encoder)


def _relabel(config: Config, options: MineOptions, mining: Mining) -> None:
    """Relabel the negatives of mining.store on all ranks."""
    if not mining.judges or options.model or options.document_model:
        raise UserError(
            "mining.store: make mine relabels the negatives of this store, so it needs mining.judge and no model; "
            "leave mining.store out to mine new ones"
        )
    data = build_data(config, training=True)
    store, pools = data.rounds.at(0), data.pools()
    meta = {key: store.meta.get(key) for key in ("miner", "model", "document_model", "data", "step")}
    meta |= {"relabelled": store.hash} | mining.judging
    if _is_done(options.output, meta):
        return
    mined = {
        task: unrated(negatives, [pool for pool in pools if pool.task == task])
        for task, negatives in store.tasks.items()
        if task in config.task
    }
    _write(config, options, mining.relabelled(mined, pools), meta, f"of {config.mining.store}, relabelled")


def _is_done(output: Path, meta: dict[str, Any]) -> bool:
    """Return whether an intact store exists with its report.

    Raises UserError if the store was mined with other settings, or if the output is not a store.
    """
    if not from_first_rank(output.exists()):
        return False
    try:
        stored = HardNegativeStore(output).meta
    except UserError as error:
        check_replaceable(output)
        log.warning("%s", error)
        return False
    _check_same(output, stored, meta)
    if not from_first_rank(_has_report(output)):
        return False
    log.info("%s: these hard negatives were already mined", output)
    return True


def _write(config: Config, options: MineOptions, mined: Mapping[str, Mined], meta: dict[str, Any], origin: str) -> None:
    """Write the store and its report on the first rank. origin: where the negatives come from, for the title.

    Raises UserError if a task has no negatives, or too many that look like positives.
    """
    for problem in without_negatives(mined):
        raise UserError(problem)
    reports = reports_of(mined, step=0)
    for line in table(reports):
        log.info("%s", line)
    check_false_negatives({task: report.values for task, report in reports.items()}, config.mining.stop_at)
    if rank() > 0:
        return
    path = write_store(options.output, {task: result.negatives for task, result in mined.items()}, meta).path
    write_report(path, reports, f"hard negatives {origin}")


def _has_report(output: Path) -> bool:
    """Return whether a mining has finished. It is repeated if it was killed, or if its report is damaged."""
    try:
        return bool(read_values(output / "report.json"))
    except UserError as error:
        log.warning("%s; mining again", error)
        return False


def _check_same(output: Path, stored: dict[str, Any], meta: dict[str, Any]) -> None:
    """Raise UserError if a store was mined with other settings. stored: its settings."""
    then, now = dict(flat({key: stored.get(key) for key in meta})), dict(flat(meta))
    then = {key: current_path(value) if isinstance(value, str) else value for key, value in then.items()}
    if changed := changes(then, now):
        raise UserError(
            f"output: {output} contains hard negatives mined with other settings ({'; '.join(changed)}); choose "
            "another folder, or delete this one"
        )


if __name__ == "__main__":
    entry_point(main)
