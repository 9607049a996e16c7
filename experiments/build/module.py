"""Build the encoder of an experiment, and the module that trains it."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable

from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from datamodules.batches import MultiTaskDataModule
from datamodules.packed import ContrastiveBatch
from datamodules.records import Document, UserError, prefixed
from datamodules.tasks import TaskDataModule
from datamodules.text import input_text
from experiments.build.data import resolve_epochs
from experiments.build.models import device_of
from experiments.config.schema import Config
from experiments.config.targets import accepts, instantiate
from lightning_modules.auxiliary.auxiliary_loss import AuxiliaryLoss
from lightning_modules.contrastive import START_TEACHER, ContrastiveModule
from lightning_modules.encoders.backbone import (
    PACKAGE,
    installed,
    load_backbone,
    options_of,
    package_folder,
    random_backbone,
    set_dropout,
    word_vocabulary,
)
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.extend import add_tasks, check_new_tasks, losses_by_task
from lightning_modules.encoders.loading import check_serves, continue_from, load_encoder
from lightning_modules.encoders.lora import add_lora
from lightning_modules.frozen import FrozenEncoder
from lightning_modules.objective_options import (
    GuideOptions,
    ObjectiveOptions,
    TeacherOptions,
    VectorTeacherOptions,
    check_objective,
)
from lightning_modules.optim import ExpertDecay
from lightning_modules.optim_options import OptimOptions
from lightning_modules.parts import check_parts
from lightning_modules.retrieval.compute import describe_device

log = logging.getLogger(__name__)

NEAREST_BATCHES = 8  # number of batches that decide which expert a new task copies


def build_module(config: Config, data: MultiTaskDataModule) -> ContrastiveModule:
    """Build the encoder and its training module. Set the tokenizer and prompts of the data, and trainer.max_steps."""
    if config.trainer.accumulate_grad_batches > 1:
        log.warning(
            "trainer.accumulate_grad_batches=%d does not add negatives: they come from a single batch. For more "
            "negatives, raise data.batch_size; trainer.grad_cache=true keeps the memory small.",
            config.trainer.accumulate_grad_batches,
        )
    if config.extend.model:
        return _extend(config, data)
    encoder = build_encoder(config, data.texts())
    check_lengths(config, encoder)
    data.tokenizer, data.prompts = encoder.tokenizer, encoder.prompts
    with prefixed("encoder."):
        encoder.prepare(data)
    resolve_epochs(config, data)
    module = _training_module(config, encoder)
    module.prepare_losses(data)
    return module


def build_encoder(config: Config, texts: Iterable[Document]) -> Encoder:
    """Build the encoder of the experiment. texts: training texts, which give a random backbone its vocabulary."""
    allowed = config.extend.packages
    source = load_encoder(config.init_from, key="init_from", packages=allowed) if config.init_from else None
    if source is not None:
        log.info(
            "init_from provides the backbone and the tokenizer; backbone.name, .config and .vocab_size are ignored"
        )
        shape, tokenizer = source.backbone.config, source.tokenizer
        backbone = AutoModel.from_config(shape, **options_of(shape))  # random weights, until continue_from
    else:
        backbone, tokenizer = _build_backbone(config, texts)
    set_dropout(backbone, config.backbone.dropout, config.backbone.attention_dropout)
    encoder = instantiate(
        config.encoder,
        "encoder",
        backbone=backbone,
        tokenizer=tokenizer,
        tasks={name: task.expert for name, task in config.task.items()},
        instructions={name: task.instruction for name, task in config.task.items()},
        max_length=config.data.max_length,
    )
    if source is not None:
        continue_from(source, encoder, config.init_from)
    _add_lora(config, encoder)
    encoder.gradient_checkpointing = config.trainer.gradient_checkpointing
    return encoder


def _add_lora(config: Config, encoder: Encoder) -> None:
    if config.backbone.lora.rank:
        with prefixed("backbone."):
            add_lora(encoder, config.backbone.lora)


def start_of(config: Config) -> str | None:
    """Return the model an experiment starts from: an absolute path, hub name or package:NAME, or None if random."""
    name = config.extend.model or config.init_from or config.backbone.name
    if not name or (name.startswith(PACKAGE) and package_folder(name) is None):
        return None
    return os.path.abspath(name) if os.path.exists(name) else name


def _build_backbone(config: Config, texts: Iterable[Document]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    name = config.backbone.name
    if name and name.startswith(PACKAGE):
        folder = package_folder(name)
        if folder is None:
            if not config.backbone.config:
                raise UserError(f"backbone.name: {name} is not installed; install it, or set backbone.config")
            log.warning(
                "backbone %s is not installed (make install EXTRAS=cpu,minilm): starting from random weights instead",
                name,
            )
        name = folder
    if name:
        return load_backbone(name, key="backbone.name")
    reads_instructions = accepts(config.encoder, "instructions")
    instructions = [task.instruction for task in config.task.values() if reads_instructions]
    words = (input_text(text, " ") for text in texts)
    vocabulary = word_vocabulary(words, config.backbone.vocab_size, required=instructions)
    return random_backbone(config.backbone.config, vocabulary)


def _extend(config: Config, data: MultiTaskDataModule) -> ContrastiveModule:
    """Add the experiment's tasks to a trained encoder. Their experts start as copies, chosen by extend.like."""
    if config.init_from:
        raise UserError("extend.model and init_from: set only one of them")
    encoder = load_encoder(config.extend.model, key="extend.model", packages=config.extend.packages)
    check_same_encoder(config, encoder)
    set_dropout(encoder.backbone, config.backbone.dropout, config.backbone.attention_dropout)
    encoder.gradient_checkpointing = config.trainer.gradient_checkpointing
    tasks = {name: task.expert for name, task in config.task.items()}
    check_new_tasks(encoder, tasks)
    check_lengths(config, encoder)
    data.tokenizer = encoder.tokenizer
    resolve_epochs(config, data)
    like = config.extend.like
    if like != "nearest" and like not in encoder.tasks:
        raise UserError(f"extend.like: expected one of nearest, {', '.join(encoder.tasks)}, got {like!r}")
    nearest = _nearest_tasks(config, data, encoder) if like == "nearest" else dict.fromkeys(tasks, like)
    add_tasks(encoder, tasks, nearest, config.extend.freeze)
    _add_lora(config, encoder)
    module = _training_module(config, encoder)
    module.prepare_losses(data)
    return module


def _nearest_tasks(config: Config, data: MultiTaskDataModule, encoder: Encoder) -> dict[str, str]:
    """Return, for each new task, the encoder's task with the lowest loss on the new task's first batches."""
    without_teacher = dataclasses.replace(config.objective, vector_teacher=VectorTeacherOptions())
    only_losses = dataclasses.replace(config, optim=OptimOptions())  # optim may name experts that do not exist yet
    module = _training_module(only_losses, encoder, without_teacher).to(device_of(config))
    nearest, experts = {}, set()
    log.info("finding the nearest tasks on %s", describe_device(encoder.device))
    for task in data.tasks:
        name, expert = task.task.name, task.task.expert
        losses = losses_by_task(module, first_batches(task, encoder.tokenizer, NEAREST_BATCHES))
        nearest[name] = min(losses, key=losses.__getitem__)
        if expert in experts:
            log.info("%s shares the expert %s", name, expert)
            continue
        experts.add(expert)
        shown = ", ".join(f"{task} {loss:.3f}" for task, loss in losses.items())
        log.info("%s starts as %s (loss as %s)", name, nearest[name], shown)
    return nearest


def check_lengths(config: Config, encoder: Encoder) -> None:
    """Raise UserError if a maximum length exceeds the backbone's positions."""
    lengths = {"data.max_length": config.data.max_length}
    lengths |= {f"task.{name}.max_length": task.max_length or 0 for name, task in config.task.items()}
    for key, length in lengths.items():
        if length > encoder.family.max_positions:
            longest = encoder.family.max_positions
            raise UserError(f"{key}: got {length} tokens, but the backbone has positions for {longest}")


def check_same_encoder(config: Config, encoder: Encoder) -> None:
    """Raise UserError if the experiment's encoder or similarity differs from extend.model's."""
    similarity = encoder.similarity
    if similarity not in (None, config.objective.similarity):
        raise UserError(
            f"objective.similarity: extend.model was trained with {similarity}, and its old tasks need it; got "
            f"{config.objective.similarity}"
        )
    kind = f"{type(encoder).__module__}.{type(encoder).__name__}"
    differing = {key: value for key, value in config.encoder.items() if encoder.config.get(key, kind) != value}
    if differing:
        actual = {key: encoder.config.get(key, kind) for key in differing}
        raise UserError(
            f"extend.model: the checkpoint has {actual}, but experiment {config.experiment} asks for {differing}"
        )


def first_batches(task: TaskDataModule, tokenizer: PreTrainedTokenizerBase, count: int) -> list[ContrastiveBatch]:
    """Return the first batches that training this task alone would use."""
    task.tokenizer, options = tokenizer, task.options
    task.options = dataclasses.replace(options, num_batches=count, num_workers=0)
    batches = list(task.train_dataloader())
    task.options = options
    return batches


def _training_module(config: Config, encoder: Encoder, objective: ObjectiveOptions | None = None) -> ContrastiveModule:
    """Build the module. objective: by default, the experiment's objective with its further losses."""
    losses = _build_losses(config, encoder) if objective is None else None
    objective = objective or config.objective
    check_objective(objective, list(config.task), "objective.", encoder.dimension)
    if objective.vector_teacher.model == START_TEACHER and start_of(config) is None:
        log.warning("objective.vector_teacher.model=start has no effect: the weights before training are random")
        objective = dataclasses.replace(objective, vector_teacher=VectorTeacherOptions())
    check_parts("optim.lr_scale", config.optim.lr_scale, encoder.state_dict())
    if config.optim.expert_decay:
        with prefixed("optim."):
            ExpertDecay(encoder, config.optim.expert_decay)  # raises UserError without experts
    vector_teacher = objective.vector_teacher
    has_file = vector_teacher.model not in (None, START_TEACHER)
    module = ContrastiveModule(
        encoder,
        tasks=list(config.task),
        guide_model=_load_frozen(config, "guide", objective.guide) if objective.guide.model else None,
        teacher_model=_load_frozen(config, "teacher", objective.teacher) if objective.teacher.model else None,
        vector_teacher_model=_load_frozen(config, "vector_teacher", vector_teacher) if has_file else None,
        grad_cache=config.trainer.grad_cache,
        losses=losses,
        optim=config.optim,
        total_steps=config.trainer.max_steps,
        **vars(objective),
    )
    if module.objective.projection is not None and config.trainer.strategy == "fsdp":
        raise UserError(
            "objective.vector_teacher: fsdp does not support the projection to vectors of another size; set "
            f"trainer.strategy=ddp, or choose a teacher with {encoder.dimension} dimensions"
        )
    return module


def _build_losses(config: Config, encoder: Encoder) -> dict[str, AuxiliaryLoss]:
    """Build the losses that are added to InfoNCE."""
    provided = {"tasks": list(config.task), "dimension": encoder.dimension, "objective": config.objective}
    return {name: instantiate(node, f"losses.{name}", **provided) for name, node in config.losses.items()}


def describe_parameters(module: ContrastiveModule) -> str:
    """Return a line that says how many parameters are trained."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
    return f"training {trained:,} of {total:,} parameters ({trained / total:.2%})"


def _load_frozen(
    config: Config, name: str, options: GuideOptions | TeacherOptions | VectorTeacherOptions
) -> FrozenEncoder:
    """Load the guide or a teacher of the objective. Raises UserError if it does not serve all tasks of the run."""
    key, tasks = f"objective.{name}.model", {task: settings.expert for task, settings in config.task.items()}
    encoder = load_encoder(installed(options.model, key), tasks=tasks, key=key, packages=config.extend.packages)
    check_serves(encoder, tasks, key)
    return FrozenEncoder(encoder, getattr(options, "similarity", "cosine"))
