"""From a configuration to the encoder, its objective and its optimizer."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable

from transformers import AutoModel

from datamodules.multitask import MultiTaskDataModule
from datamodules.records import ContrastiveBatch, Document, UserError
from datamodules.tasks import TaskDataModule
from datamodules.text import input_text
from experiments.config.schema import Config
from experiments.config.targets import accepted_arguments, instantiate
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.backbone import (
    PACKAGE,
    load_backbone,
    options_of,
    package_folder,
    random_backbone,
    set_dropout,
    word_vocabulary,
)
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.extend import add_tasks, check_new_tasks, losses_by_task
from lightning_modules.encoders.loading import continue_from, load_encoder
from lightning_modules.objective.frozen import FrozenEncoder
from lightning_modules.objective.options import GuideOptions, TeacherOptions

log = logging.getLogger(__name__)


def build_encoder(config: Config, texts: Iterable[Document]) -> Encoder:
    """The experiment's encoder. texts: what a random backbone takes its vocabulary from."""
    source = load_encoder(config.init_from, key="init_from") if config.init_from else None
    if source is not None:
        log.info("init_from brings backbone and tokenizer: backbone.name, .config and .vocab_size are not used")
        backbone, tokenizer = _fresh_copy(source)
    else:
        backbone, tokenizer = _backbone(config, texts)
    set_dropout(backbone, config.backbone.dropout, config.backbone.attention_dropout)
    given = {
        "backbone": backbone,
        "tokenizer": tokenizer,
        "tasks": {name: task.expert for name, task in config.task.items()},
        "instructions": {name: task.instruction for name, task in config.task.items()},
        "max_length": config.data.max_length,
    }
    encoder = instantiate(config.encoder, **{name: given[name] for name in accepted_arguments(config.encoder, given)})
    if source is not None:
        continue_from(source, encoder, config.init_from)
    encoder.gradient_checkpointing = config.trainer.gradient_checkpointing
    return encoder


def _fresh_copy(source: Encoder):
    """A backbone of the source's shape without its experts, and its tokenizer."""
    config = source.backbone.config
    return AutoModel.from_config(config, **options_of(config)), source.tokenizer


def _backbone(config: Config, texts: Iterable[Document]):
    name = config.backbone.name
    if name and name.startswith(PACKAGE):
        folder = package_folder(name)
        if folder is None:
            if not config.backbone.config:
                raise UserError(f"backbone.name: {name} is not installed, and backbone.config gives no shape to draw")
            log.warning(
                "backbone %s is not installed (make install EXTRAS=cpu,minilm): starting from random weights instead",
                name,
            )
        name = folder
    if name:
        return load_backbone(name)
    reads = accepted_arguments(config.encoder, ["instructions"])
    instructions = [task.instruction for task in config.task.values() if reads]
    words = (input_text(text, " ") for text in texts)
    vocabulary = word_vocabulary(words, config.backbone.vocab_size, required=instructions)
    return random_backbone(config.backbone.config, vocabulary)


def build_module(config: Config, data: MultiTaskDataModule) -> ContrastiveModule:
    if config.trainer.accumulate_grad_batches > 1:
        log.warning(
            "trainer.accumulate_grad_batches=%d does not enlarge the pool of negatives, which is a batch's documents. "
            "A larger data.batch_size does, and trainer.grad_cache=true gives it the memory of a small one.",
            config.trainer.accumulate_grad_batches,
        )
    if config.extend.model:
        return _extended(config, data)
    encoder = build_encoder(config, data.texts())
    check_lengths(config, encoder)
    data.tokenizer, data.prompts = encoder.tokenizer, encoder.prompts
    return _module(config, encoder)


def _extended(config: Config, data: MultiTaskDataModule) -> ContrastiveModule:
    """A trained encoder with new tasks."""
    if config.init_from:
        raise UserError("extend.model and init_from: the encoder comes from one of them")
    encoder = load_encoder(config.extend.model, key="extend.model")
    check_same_encoder(config, encoder)
    set_dropout(encoder.backbone, config.backbone.dropout, config.backbone.attention_dropout)
    encoder.gradient_checkpointing = config.trainer.gradient_checkpointing
    tasks, old = {name: task.expert for name, task in config.task.items()}, list(encoder.tasks)
    check_new_tasks(encoder, tasks)
    check_lengths(config, encoder)
    data.tokenizer = encoder.tokenizer
    like = config.extend.like
    if like != "nearest" and like not in old:
        raise UserError(f"extend.like: got {like!r}, allowed are nearest, {', '.join(old)}")
    chosen = dict.fromkeys(tasks, like)
    if like == "nearest":
        module, begun = _module(config, encoder), set()
        for part in data.tasks:
            losses = losses_by_task(module, first_batches(part, encoder.tokenizer, count=8))
            chosen[part.task.name] = min(losses, key=losses.__getitem__)
            if part.task.expert in begun:
                log.info("%s shares the expert %s", part.task.name, part.task.expert)
                continue
            begun.add(part.task.expert)
            shown = ", ".join(f"{task} {loss:.3f}" for task, loss in losses.items())
            log.info("%s begins as %s (loss as %s)", part.task.name, chosen[part.task.name], shown)
    add_tasks(encoder, tasks, chosen)
    return _module(config, encoder)


def check_lengths(config: Config, encoder: Encoder) -> None:
    """Raise UserError if texts, of any task, may be longer than the backbone has positions."""
    lengths = {"data.max_length": config.data.max_length}
    lengths |= {f"task.{name}.max_length": task.max_length or 0 for name, task in config.task.items()}
    for key, length in lengths.items():
        if length > encoder.family.max_positions:
            longest = encoder.family.max_positions
            raise UserError(f"{key}: got {length} tokens, but the backbone has positions for {longest}")


def check_same_encoder(config: Config, encoder: Encoder) -> None:
    """Raise UserError if the experiment says another encoder than extend.model brings."""
    kind = f"{type(encoder).__module__}.{type(encoder).__name__}"
    differ = {key: value for key, value in config.encoder.items() if encoder.config.get(key, kind) != value}
    if differ:
        has = {key: encoder.config.get(key, kind) for key in differ}
        raise UserError(f"extend.model brings an encoder with {has}, the experiment {config.experiment} says {differ}")


def first_batches(task: TaskDataModule, tokenizer, count: int) -> list[ContrastiveBatch]:
    """The first batches that a task would be trained on alone."""
    task.tokenizer, options = tokenizer, task.options
    task.options = dataclasses.replace(options, num_batches=count, num_workers=0)
    batches = list(task.train_dataloader())
    task.options = options
    return batches


def _module(config: Config, encoder: Encoder) -> ContrastiveModule:
    objective = config.objective
    judges: dict[str, GuideOptions | TeacherOptions] = {"guide": objective.guide, "teacher": objective.teacher}
    return ContrastiveModule(
        encoder,
        tasks=list(config.task),
        judges={name: _judge(config, name, options) for name, options in judges.items() if options.model},
        grad_cache=config.trainer.grad_cache,
        optim=config.optim,
        total_steps=config.trainer.max_steps,
        **vars(objective),
    )


def _judge(config: Config, name: str, options: GuideOptions | TeacherOptions) -> FrozenEncoder:
    """The guide or teacher of the objective. Raises UserError if it is no encoder of the run's tasks."""
    key, tasks = f"objective.{name}.model", {task: settings.expert for task, settings in config.task.items()}
    encoder = load_encoder(options.model, tasks=tasks, key=key)
    missing = [task for task in tasks if task not in encoder.tasks]
    if missing:
        raise UserError(f"{key}: has no task {', '.join(missing)} (it has {', '.join(encoder.tasks)})")
    return FrozenEncoder(encoder, options.similarity)
