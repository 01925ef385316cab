"""A run before it starts: every check that needs no weights, and what is known of it beforehand."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cola_ds import notices
from cola_ds.config.deepspeed_json import complete, read_engine_config
from cola_ds.config.schema import ModelConfig, RunConfig
from cola_ds.config.steps import resolve
from cola_ds.data.candidates import check_joinable
from cola_ds.data.order import Order
from cola_ds.data.packing import check_packable
from cola_ds.data.tasks.dataset import TaskData, find_task, load_task
from cola_ds.data.text import TokenizedData, datasets_of, watched_of
from cola_ds.data.tokenize import Found, check_sources, tokenize
from cola_ds.data.tokenizer import load_tokenizer
from cola_ds.errors import UserError, cut, first_line
from cola_ds.evaluation.attention import VARLEN, check_anywhere, choose_attention, shown_name, transformers_name
from cola_ds.lora.starts import check_starts
from cola_ds.lora.targets import find_targets
from cola_ds.run.earlier import find_earlier
from cola_ds.run.model_files import check_folder
from cola_ds.run.model_folder import check_no_adapter
from cola_ds.training.earlier import check_earlier
from cola_ds.training.kernels import check_kernels
from cola_ds.training.prepared import Checked, Described, Prepared
from cola_ds.training.settle import UNKNOWN, settle_engine

TASK_LENGTH = 2048  # tokens of an example, as MeZO and COLA cut it


def prepare(config: RunConfig, world_size: int) -> Prepared:
    """Check the DeepSpeed JSON, model, targets and data, and derive the step_plan and the engine's sizes; all by this process,
    as if all of them were on this machine. Raises UserError. No weight is read."""
    checked = check(config)
    with notices.Progress("tokenizing", "row") as progress:
        prepared = with_data(
            checked, world_size, lambda: tokenize(config.data, checked.tokenizer, config.model, progress=progress.at)
        )
    return settle_engine(prepared, [UNKNOWN] * world_size, partial(_memory_here, world_size))


def _memory_here(processes: int) -> tuple[int, int]:
    from cola_ds.distributed.accelerator import memory_bytes  # deepspeed takes seconds: only where it is asked

    return memory_bytes(processes)


def describe(config: RunConfig, weights: bool = False) -> Described:
    """Every check of a config that needs neither tokenizer nor data; with `weights`, also that a folder of the model has some.
    Raises UserError."""
    engine_json = read_engine_config(config)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"path": _model_path(config.model.path, weights)})}
    )
    skeleton = _skeleton_of(config.model)
    targets = find_targets(skeleton, config.lora.targets) if config.trains_lora else []
    check_earlier(config, skeleton, find_earlier(config))
    check_starts(config, {name: skeleton.get_submodule(name) for name in targets})
    limit = getattr(skeleton.config, "max_position_embeddings", None)
    limit = limit if isinstance(limit, int) else None
    max_length = config.data.max_length
    if config.data.task is not None and "max_length" not in config.data.model_fields_set:
        max_length = min(TASK_LENGTH, limit or TASK_LENGTH)
    if limit and max_length > limit:
        raise UserError(f"data.max_length {max_length} is more than the model's {limit} positions")
    is_text = config.data.task is None
    if config.data.task is not None:
        find_task(config.data.task)
    elif config.data.packing != "none" and config.trains:
        check_packable(skeleton)
    _check_compile(config, skeleton, check_anywhere(config.model, skeleton, max_length, is_text))
    return Described(config=config, engine_json=engine_json, skeleton=skeleton, targets=targets, max_length=max_length)


def check(config: RunConfig) -> Checked:
    """Every check of a config that needs neither weights nor the rows of its data. Raises UserError."""
    described = describe(config, weights=True)
    config, skeleton, max_length = described.config, described.skeleton, described.max_length
    tokenizer = load_tokenizer(config.model)
    task = None
    if config.data.task is not None:
        task = load_task(config, tokenizer, max_length)
        if task[0].task.objective == "classification" or any(example.candidates for example in task[2].examples):
            check_joinable(skeleton, max_length)
    else:
        check_sources(config.data)
    attention = choose_attention(config.model, skeleton, max_length, is_text=task is None)
    _check_compile(config, skeleton, attention)
    return Checked(
        config=config, engine_json=described.engine_json, tokenizer=tokenizer, skeleton=skeleton, targets=described.targets,
        task=task, attention=attention,
        kernels=check_kernels(config.model, skeleton),
    )  # fmt: skip


def _check_compile(config: RunConfig, skeleton: Any, attention: str | None) -> None:
    if not config.model.compile or not config.trains or attention == VARLEN:
        return
    is_task = config.data.task is not None
    raise UserError(
        f"model.compile needs text and model.attention varlen, and {type(skeleton).__name__} runs with "
        f"{'a task' if is_task else shown_name(attention)} here; set "
        f"{'' if is_task or config.model.attention == 'auto' else 'model.attention=auto or '}model.compile=false"
    )


def with_data(checked: Checked, world_size: int, tokenize: Callable[[], Found]) -> Prepared:
    """What runs: the checked config with its examples, which `tokenize` gives unless they are a task's. Raises UserError."""
    config, engine_json = checked.config, checked.engine_json
    train: TokenizedData | TaskData
    held_out: TokenizedData | TaskData | None
    watched, test, sizes, found = None, None, "", None
    if checked.task is not None:
        train, held_out, test, sizes = checked.task
    else:
        found = tokenize()
        train, held_out = datasets_of(config.data, found)
        watched = watched_of(config.data, found)
    vocabulary = checked.skeleton.get_input_embeddings().weight.shape[0]
    splits: tuple[TokenizedData | TaskData | None, ...] = (train, held_out, watched, test)
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
        held_out=held_out, watched=watched, test=test, sizes=sizes, found=found,
    )  # fmt: skip


def order_of(train: TokenizedData | TaskData, config: RunConfig) -> Order:
    """The order of the training examples: mixed by their sources' weights, packed, or neither."""
    if isinstance(train, TaskData):
        return Order(train.lengths)
    capacity = None if config.data.packing == "none" else config.data.max_length
    return Order(train.lengths, train.source_sizes, train.source_weights, capacity)


def _model_path(path: str, weights: bool) -> str:
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
    if weights:
        check_folder(Path(path))
    return str(Path(path).resolve())


def _on_meta(model_config: Any, model: ModelConfig) -> Any:
    """The model without its weights. Raises UserError where the attention is why Transformers does not make it."""
    from transformers import AutoModelForCausalLM

    def make(attention: str | None) -> Any:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                model_config, trust_remote_code=model.trust_remote_code, attn_implementation=attention
            )

    name = transformers_name(model.attention)
    try:
        return make(name)
    except Exception as error:  # ImportError of a package that is missing, ValueError of a model that does not take it
        if name is None:
            raise
        make(None)  # where that fails as well, it is the model
        said = cut(first_line(error), 200)
        raise UserError(f"model.attention {model.attention} is not for this run: {said}; use auto") from None


def _skeleton_of(model: ModelConfig) -> Any:
    from transformers import AutoConfig

    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    check_no_adapter(model)
    local = os.path.isdir(model.path)
    try:
        model_config = AutoConfig.from_pretrained(model.path, **options)
        skeleton = _on_meta(model_config, model)
    except UserError:
        raise
    except Exception as error:  # whatever a folder's files or a missing package make transformers raise
        reason = first_line(error)
        where = "" if local else "is not a folder here, and the hub does not give it: "
        raise UserError(f"model.path {cut(model.path)}: {where}{reason}") from None
    if getattr(model_config, "quantization_config", None):
        raise UserError(f"model.path {model.path} is quantised, which is not supported; use the model it was made from")
    return skeleton
