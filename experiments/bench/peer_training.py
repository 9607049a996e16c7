"""Train sentence-transformers on the pairs of an experiment, as an arm of a study."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.batches import MultiTaskDataModule
from datamodules.options import option
from datamodules.progress_lines import ProgressLines
from datamodules.records import UserError
from datamodules.text import input_text
from experiments.bench.peer import losses, peer_version
from experiments.bench.timing import DEVICES
from experiments.build.data import build_data
from experiments.build.module import build_module
from experiments.config.experiment import ExperimentOptions, parse_experiment
from experiments.config.schema import Config
from experiments.shared.console import entry_point, relative_path
from experiments.shared.output import whole_folder
from lightning_modules.encoders.export import save_dense
from lightning_modules.retrieval.compute import resolve_device

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class BenchOptions(ExperimentOptions):
    """Train sentence-transformers on the pairs of an experiment.

    It starts from the experiment's weights, and trains on the same pairs with the same batch size, number of steps,
    learning rate and warmup. Batches have no duplicates. The experiment must not have experts; vanilla works.
    """

    output: Path = option(help="new folder for the model, in the format of sentence-transformers")
    batches: str = option(
        "task",
        "task: one data set per task, in turns, whose batches mix the collections; collection: one data set per "
        "collection, in proportion to their pairs",
        choices=("task", "collection"),
    )
    guide: str | None = option(None, "guide model: train with GISTEmbedLoss instead of MultipleNegativesRankingLoss")
    device: str = option("auto", DEVICES)


def main(arguments: Sequence[str]) -> None:
    options, config = parse_experiment(BenchOptions, arguments)
    if peer_version() is None:
        raise UserError("sentence-transformers is not installed (make install EXTRAS=cpu,sentence-transformers)")
    device = resolve_device(options.device)
    data = build_data(config, training=True)
    data.options = dataclasses.replace(data.options, carry_texts=True, num_workers=0)
    encoder = build_module(config, data).encoder
    with whole_folder(options.output) as folder, tempfile.TemporaryDirectory() as start:
        save_dense(encoder, config.tasks[0], Path(start) / "start", config.objective.similarity)
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(Path(start) / "start"), device=str(device))
        model.max_seq_length = config.data.max_length
        began = time.monotonic()
        _train(model, config, data, options, device.type == "cpu", start)
        log.info("%d steps in %.0f s", config.trainer.max_steps, time.monotonic() - began)
        model.save_pretrained(str(folder))
    log.info("The model is in %s", relative_path(options.output))


def pairs_of(config: Config, data: MultiTaskDataModule, by_collection: bool = False) -> dict[str, dict[str, list[str]]]:
    """Return task -> columns in batch order: anchor, positive, and negative if every query has one.

    by_collection: return TASK.COLLECTION -> columns.
    """
    separator, tasks = data.tokenizer.sep_token, {task.task.name: task for task in data.tasks}
    pairs: dict[str, dict[str, list[str]]] = {}
    steps = config.trainer.max_steps * config.trainer.accumulate_grad_batches
    data.options = dataclasses.replace(data.options, num_batches=steps)
    for batch in data.train_dataloader():
        texts = [input_text(document, separator) for document in batch.texts]
        for row, query in enumerate(batch.queries.tolist()):
            collection = tasks[batch.task].collection_of(int(batch.rows[query]))
            key = f"{batch.task}.{collection}" if by_collection else batch.task
            columns = pairs.setdefault(key, {"anchor": [], "positive": [], "negative": []})
            columns["anchor"].append(texts[query])
            for name, chosen in (("positive", batch.positives), ("negative", batch.hard_negatives)):
                columns[name] += [texts[batch.documents[c]] for c in chosen[row].tolist() if c >= 0][:1]
    for columns in pairs.values():
        if len(columns["negative"]) < len(columns["anchor"]):
            del columns["negative"]
    return pairs


def _train(
    model: Any, config: Config, data: MultiTaskDataModule, options: BenchOptions, on_cpu: bool, folder: str
) -> None:
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from transformers import TrainerCallback

    temperature, by_collection = config.objective.temperature, options.batches == "collection"
    if options.guide is None:
        loss = losses().MultipleNegativesRankingLoss(model, scale=1 / temperature)
    else:
        loss = losses().GISTEmbedLoss(
            model, SentenceTransformer(options.guide, device=str(model.device)), temperature=temperature
        )
    settings = SentenceTransformerTrainingArguments(
        output_dir=folder,
        max_steps=config.trainer.max_steps,
        per_device_train_batch_size=config.data.batch_size,
        learning_rate=config.optim.lr,
        warmup_steps=config.optim.warmup,
        weight_decay=config.optim.weight_decay,
        max_grad_norm=config.trainer.gradient_clip_val or 0.0,
        batch_sampler="no_duplicates",
        multi_dataset_batch_sampler="proportional" if by_collection else "round_robin",
        bf16=not on_cpu,
        use_cpu=on_cpu,
        seed=config.run.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    progress = ProgressLines("training", "steps", config.trainer.max_steps)

    class Progress(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            progress.advance(1)

    pairs = pairs_of(config, data, by_collection)
    datasets = {name: Dataset.from_dict(columns) for name, columns in pairs.items()}
    trainer = SentenceTransformerTrainer(
        model=model, args=settings, train_dataset=datasets, loss=loss, callbacks=[Progress()]
    )
    trainer.train()


if __name__ == "__main__":
    entry_point(main)
