"""A run before it starts: every check that needs no weights, and what is known of it beforehand."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cola_ds.checkpoint.decide import Identity, engine_facts
from cola_ds.config.deepspeed_json import check_compilable, complete, read_engine_config
from cola_ds.config.dtypes import DTYPES
from cola_ds.config.engine_sizes import Shapes, choose_stage, need, with_sizes
from cola_ds.config.schema import RunConfig
from cola_ds.config.steps import StepPlan, resolve
from cola_ds.data.candidates import check_joinable
from cola_ds.data.order import Order
from cola_ds.data.packing import check_packable
from cola_ds.data.tasks.dataset import TaskData, load_task
from cola_ds.data.text import TokenizedData, datasets_of, overlap
from cola_ds.data.tokenize import Found, check_sources, tokenize
from cola_ds.data.tokenizer import load_tokenizer
from cola_ds.data.tokens import LOSSES
from cola_ds.errors import UserError, cut, first_line
from cola_ds.evaluation.attention import VARLEN, choose_attention, shown_name, transformers_name
from cola_ds.lora.layers import find_targets
from cola_ds.run.model_files import check_folder
from cola_ds.run.model_folder import check_no_adapter
from cola_ds.training.kernels import check_kernels

TASK_LENGTH = 2048  # tokens of an example, as MeZO and COLA cut it


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A config whose DeepSpeed JSON, model and targets fit each other, and whose files are there. No data has been read but a
    task's."""

    config: RunConfig
    engine_json: dict[str, Any]
    tokenizer: Any
    skeleton: Any
    targets: list[str]
    attention: str | None
    """Transformers' name of the attention that the model gets; None: Transformers chooses."""
    kernels: bool
    """Whether the model gets Liger's kernels."""
    task: tuple[TaskData, TaskData, TaskData, str] | None
    """Its train, dev and test examples, and their sizes in one line."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that has passed every check that needs no weights."""

    config: RunConfig
    engine_json: dict[str, Any]
    """The DeepSpeed JSON as it was read."""
    engine_config: dict[str, Any]
    """What DeepSpeed's engine gets: the JSON, completed; its stage and sizes by `settle_engine`."""
    stage_reason: str = ""
    """Why the stage is what it is, where it was chosen."""
    step_plan: StepPlan
    tokenizer: Any
    skeleton: Any
    """The model on the meta device: its modules and shapes."""
    targets: list[str]
    attention: str | None
    kernels: bool
    train: TokenizedData | TaskData
    order: Order
    """Which examples of `train` each row of an epoch has."""
    held_out: TokenizedData | TaskData | None
    test: TaskData | None = None
    """Of a task: what is reported, once `held_out`, its dev split, has chosen."""
    sizes: str = ""
    """Of a task: how many examples each split has, and what was left out."""
    found: Found | None = None
    """Of text: what has been tokenized."""

    @functools.cached_property
    def fingerprints(self) -> dict[str, str | None]:
        """SHA-256 of all that the run reads of train, held_out and test, in order; None for a split that it has not."""
        splits = {"train": self.train, "held_out": self.held_out, "test": self.test}
        return {name: None if data is None else data.fingerprint() for name, data in splits.items()}

    @property
    def identity(self) -> Identity:
        """What the run is, apart from its config."""
        train, held_out = self.fingerprints["train"], self.fingerprints["held_out"]
        assert train is not None
        if self.test is not None:
            held_out = f"{held_out} {self.fingerprints['test']}"
        return Identity(engine_facts(self.engine_json), train, held_out)


def prepare(config: RunConfig, world_size: int) -> Prepared:
    """Check the DeepSpeed JSON, model, targets and data, and derive the step_plan and the engine's sizes; all by this process,
    as if all of them were on this machine. Raises UserError. No weight is read."""
    checked = check(config)
    prepared = with_data(checked, world_size, lambda: tokenize(config.data, checked.tokenizer, config.model))
    return settle_engine(prepared, world_size, partial(_memory_here, world_size))


def _memory_here(processes: int) -> tuple[int, int]:
    from cola_ds.distributed.accelerator import memory_bytes  # deepspeed takes seconds: only where it is asked

    return memory_bytes(processes)


def check(config: RunConfig) -> Checked:
    """Every check of a config that needs neither weights nor the rows of its data. Raises UserError."""
    engine_json = read_engine_config(config)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"path": _model_path(config.model.path)})}
    )
    tokenizer, skeleton = _describe_model(config)
    targets = find_targets(skeleton, config.lora.targets) if config.trains_lora else []
    limit = getattr(skeleton.config, "max_position_embeddings", None)
    limit = limit if isinstance(limit, int) else None
    max_length = config.data.max_length
    if config.data.task is not None and "max_length" not in config.data.model_fields_set:
        max_length = min(TASK_LENGTH, limit or TASK_LENGTH)
    if limit and max_length > limit:
        raise UserError(f"data.max_length {max_length} is more than the model's {limit} positions")
    task = None
    if config.data.task is not None:
        task = load_task(config, tokenizer, max_length)
        if task[0].task.objective == "classification" or any(example.candidates for example in task[2].examples):
            check_joinable(skeleton, max_length)
    else:
        if config.data.packing != "none" and config.trains:
            check_packable(skeleton)
        check_sources(config.data)
    attention = choose_attention(config.model, skeleton, max_length, is_text=task is None)
    if config.model.compile and config.trains and attention != VARLEN:
        raise UserError(
            f"model.compile needs text and model.attention varlen, and {type(skeleton).__name__} runs with "
            f"{'a task' if task is not None else shown_name(attention)} here; set model.compile=false"
        )
    return Checked(
        config=config, engine_json=engine_json, tokenizer=tokenizer, skeleton=skeleton, targets=targets, task=task,
        attention=attention,
        kernels=check_kernels(config.model, skeleton),
    )  # fmt: skip


def with_data(checked: Checked, world_size: int, tokenize: Callable[[], Found]) -> Prepared:
    """What runs: the checked config with its examples, which `tokenize` gives unless they are a task's. Raises UserError."""
    config, engine_json = checked.config, checked.engine_json
    train: TokenizedData | TaskData
    held_out: TokenizedData | TaskData | None
    test, sizes, found = None, "", None
    if checked.task is not None:
        train, held_out, test, sizes = checked.task
    else:
        found = tokenize()
        train, held_out = datasets_of(config.data, found)
    vocabulary = checked.skeleton.get_input_embeddings().weight.shape[0]
    splits: tuple[TokenizedData | TaskData | None, ...] = (train, held_out, test)
    for data in splits:
        if data is not None and data.largest_id >= vocabulary:
            raise UserError(
                f"model.path {config.model.path}: its tokenizer has id {data.largest_id}, its embedding ends at {vocabulary}"
            )
    order = order_of(train, config)
    seed = config.run.seed
    step_plan = resolve(config, order.count(seed, 0) if order.is_even else partial(order.count, seed), world_size)
    return Prepared(
        config=config, engine_json=engine_json, engine_config=complete(engine_json, config, step_plan), step_plan=step_plan,
        tokenizer=checked.tokenizer, skeleton=checked.skeleton, targets=checked.targets, attention=checked.attention,
        kernels=checked.kernels,
        train=train, order=order,
        held_out=held_out, test=test, sizes=sizes, found=found,
    )  # fmt: skip


def settle_engine(prepared: Prepared, world_size: int, memory: Callable[[], tuple[int, int]]) -> Prepared:
    """The same, its engine's stage and sizes known. `memory` says what the process with least has, in bytes: where it computes,
    and on its host. It is asked (collective, if it is) where the JSON leaves the stage to be chosen."""
    from cola_ds.distributed.accelerator import kind

    config, zero = prepared.config, prepared.engine_config["zero_optimization"]
    shapes, reason = _shapes(prepared), ""
    if zero["stage"] == "auto":
        remainders = bool(remainder_elements(prepared))
        needed = need(
            shapes, DTYPES[config.model.dtype].element_bytes, config.optim.micro_batch_size * _longest_row(prepared),
            recomputes=config.model.activation_checkpointing, keeps_remainders=remainders,
        )  # fmt: skip
        if config.method == "full":
            stage, reason = 3, "method full trains every weight"
        elif world_size == 1:
            stage, reason = 2, "one process has nothing to shard"  # nor does it need stage 3's hooks on every module
        else:
            stage, reason = choose_stage(needed, *memory(), one=kind() == "cpu")
        check_compilable(config, stage)
        zero = {**zero, "stage": stage}
    zero = with_sizes(zero, shapes, config.method == "full", prepared.step_plan.micro_steps)
    engine_config = {**prepared.engine_config, "zero_optimization": zero}
    return dataclasses.replace(prepared, engine_config=engine_config, stage_reason=reason)


def _longest_row(prepared: Prepared) -> int:
    return prepared.order.capacity or max(map(int, prepared.train.lengths))


def _shapes(prepared: Prepared) -> Shapes:
    config, skeleton = prepared.config, prepared.skeleton
    parameters = list(skeleton.parameters())
    layers = [skeleton.get_submodule(name) for name in prepared.targets]
    linear = [module for module in skeleton.modules() if isinstance(module, torch.nn.Linear)]
    links = range(1, config.chain.length + 1) if config.trains else ()
    vocabulary, hidden = skeleton.get_input_embeddings().weight.shape
    largest = max((max(layer.in_features, layer.out_features) for layer in layers), default=0)
    return Shapes(
        weights=tuple(p.numel() for p in parameters if p.dim() > 1),
        vectors=tuple(p.numel() for p in parameters if p.dim() < 2),
        adapter=max(config.lora_ranks) * largest,
        trained=max((count_trainable(prepared, link) for link in links), default=0),
        targets=sum(layer.weight.numel() for layer in layers),
        width=sum(layer.in_features + layer.out_features for layer in linear),
        vocabulary=vocabulary,
        hidden=hidden,
        blocks=max(1, getattr(skeleton.config, "num_hidden_layers", None) or 1),
    )


def order_of(train: TokenizedData | TaskData, config: RunConfig) -> Order:
    """The order of the training examples: mixed by their sources' weights, packed, or neither."""
    if isinstance(train, TaskData):
        return Order(train.lengths)
    capacity = None if config.data.packing == "none" else config.data.max_length
    return Order(train.lengths, train.source_sizes, train.source_weights, capacity)


def _model_path(path: str) -> str:
    """A local folder's absolute path, so that the run's folder can be used from elsewhere; a hub name as it is."""
    if not os.path.isdir(path):
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or len(path) > 96:
            raise UserError(
                f"model.path {cut(path)} is not a folder, and cannot be a name on the Hugging Face hub; where it lies now, say "
                "by model.path=FOLDER"
            )
        return path
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise UserError(f"model.path {cut(path)} has no config.json: it is not a model's folder")
    check_folder(Path(path))
    return str(Path(path).resolve())


def _describe_model(config: RunConfig) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = config.model
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    check_no_adapter(model)
    local = os.path.isdir(model.path)
    try:
        model_config = AutoConfig.from_pretrained(model.path, **options)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(
                model_config,
                trust_remote_code=model.trust_remote_code,
                attn_implementation=transformers_name(model.attention),
            )
    except Exception as error:  # whatever a folder's files or a missing package make transformers raise
        reason = first_line(error)
        where = "" if local else "is not a folder here, and the hub does not give it: "
        raise UserError(f"model.path {cut(model.path)}: {where}{reason}") from None
    if getattr(model_config, "quantization_config", None):
        raise UserError(f"model.path {model.path} is quantised, which is not supported; use the model it was made from")
    return load_tokenizer(model), skeleton


def summarize(prepared: Prepared, world_size: int) -> str:
    """The resolved run, for people: links, knots, batches, parameters."""
    config, step_plan = prepared.config, prepared.step_plan
    optim = config.optim
    total = sum(p.numel() for p in prepared.skeleton.parameters())
    layers = f", {len(prepared.targets)} target layers" if config.trains_lora else ""
    if prepared.test is not None:
        data = f"{prepared.test.task.name}: {prepared.sizes}"
    else:
        data = f"{len(prepared.train)} training examples"
        data += f", {len(prepared.held_out)} held out" if prepared.held_out is not None else ", none held out"
    order, seed = prepared.order, config.run.seed
    if config.trains and order.capacity is not None:
        data += f", packed in {order.count(seed, 0)} rows, {order.filled(seed):.1%} full"
    lost: collections.Counter[str] = collections.Counter()
    held_out = (
        None if config.data.holds_out else prepared.held_out
    )  # of the same rows as `train`, which counts them all
    for split in (prepared.train, held_out, prepared.test):
        lost.update(split.lost if split is not None else {})
    if lost:
        counts = ", ".join(f"{lost[what]} lost {what}" for what in LOSSES if lost[what])
        data += f"; {counts}, too long for data.max_length"
    data += "".join(f"; {what}" for what in _what_became_of(prepared))
    what = "examples" if order.capacity is None else f"rows of {order.capacity} tokens"
    batch = f"{optim.micro_batch_size} {what} x {step_plan.micro_steps} micro steps x {world_size} processes"
    lines = [
        f"model       {config.model.path} ({config.model.dtype}), {total:,} parameters",
        f"method      {config.method}{layers}",
        f"data        {data}",
    ]
    if config.model.links is not None:
        lines.insert(1, f"links       those of {config.model.links}")
    if config.trains:
        lines.append(f"batch       {step_plan.global_batch_size} = {batch}")
        per_epoch = "per epoch" if step_plan.epochs.are_even else "in the first epoch"
        lines.append(f"steps       {step_plan.total_steps} ({step_plan.epochs.steps(0)} {per_epoch})")
    if config.trains_lora:
        remainders = remainder_bytes(prepared, world_size)
        kept = f", {remainders / 2**20:,.1f} MiB of host memory for remainders" if remainders else ""
        lines.append(f"knots       {config.chain.tie} ties, {config.chain.merge} merges{kept}")
    for link, knot in enumerate(step_plan.knots, start=1) if config.trains else ():
        name = f"link {link:<7}" if config.trains_lora else "training    "
        lora_rank = f", LoRA rank {config.lora_ranks[link - 1]}" if config.trains_lora else ""
        steps = f"steps {knot - step_plan.link_steps(link) + 1}-{knot}"
        lines.append(f"{name}{steps}{lora_rank}, {count_trainable(prepared, link):,} trainable parameters")
    if prepared.stage_reason:
        stage = prepared.engine_config["zero_optimization"]["stage"]
        lines.append(f"engine      ZeRO stage {stage}: {prepared.stage_reason}")
    compiled = ", compiled blocks" if config.model.compile and config.trains else ""
    kernels = "Liger's" if prepared.kernels else "torch's"
    lines.append(f"kernels     {kernels}; attention: {shown_name(prepared.attention)}{compiled}")
    lines.append(f"run folder  {config.run.dir}")
    return "\n".join(lines)


def _what_became_of(prepared: Prepared) -> Iterator[str]:
    """What else is to be known of the rows of text: left out, there twice, on both sides; and of the chat template."""
    if prepared.found is None:
        return
    counts = [tokens.counts for each in prepared.found.splits.values() for tokens in each]
    dropped = sum((each.dropped for each in counts), collections.Counter())
    yield from (f"{number} left out: {why}" for why, number in dropped.items())
    duplicates = sum(tokens.duplicates for each in prepared.found.splits.values() for tokens in each)
    if duplicates:
        yield f"{duplicates} rows are there twice" + (
            ", and left out" if prepared.config.data.duplicates == "drop" else ""
        )
    if both := overlap(prepared.found):
        yield f"{both} rows of data.eval are in data.train too"
    yield from (
        f"{number} {what}" for what, number in sum((each.notes for each in counts), collections.Counter()).items()
    )
    yield from prepared.found.warnings


def count_trainable(prepared: Prepared, link: int) -> int:
    """Parameters that `link` trains: A and B (and biases, if asked), or all of them with method full."""
    config = prepared.config
    if config.method == "full":
        return sum(p.numel() for p in prepared.skeleton.parameters())
    biases = 0
    if config.lora.bias == "lora_only":
        layers = [prepared.skeleton.get_submodule(name) for name in prepared.targets]
        biases = sum(layer.bias.numel() for layer in layers if layer.bias is not None)
    return count_adapters(prepared, link) + biases


def count_adapters(prepared: Prepared, link: int) -> int:
    """Elements of A and B of all layers in `link`."""
    layers = [prepared.skeleton.get_submodule(name) for name in prepared.targets]
    return prepared.config.lora_ranks[link - 1] * sum(layer.in_features + layer.out_features for layer in layers)


def remainder_bytes(prepared: Prepared, world_size: int) -> int:
    """Host memory of the remainders of a chain, over all processes: fp32, for target weights stored in less than that."""
    copies = 1 if prepared.engine_config["zero_optimization"]["stage"] == 3 else world_size
    return 4 * remainder_elements(prepared) * copies


def remainder_elements(prepared: Prepared) -> int:
    """Elements of the remainders of a chain: those of the target weights; 0 where nothing is kept."""
    if prepared.config.model.dtype == "fp32" or prepared.config.chain.length == 1:
        return 0
    return sum(prepared.skeleton.get_submodule(name).weight.numel() for name in prepared.targets)
