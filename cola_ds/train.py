"""`cola-ds train`: from a checked config to a finished run folder."""

from __future__ import annotations

import platform
import re
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cola_ds.config import RunConfig, Timetable, resolve
from cola_ds.data.batching import Batcher
from cola_ds.data.sources import TokenizedData, load_split
from cola_ds.engine_config import complete, read_engine_config
from cola_ds.errors import UserError
from cola_ds.launcher import Process
from cola_ds.lora import find_targets, inject, start_link
from cola_ds.rundir import RunFolder, describe_environment


@dataclass(frozen=True)
class Prepared:
    """A run that has passed every check that needs no weights."""

    config: RunConfig
    engine_json: dict[str, Any]
    timetable: Timetable
    tokenizer: Any
    skeleton: Any
    """The model on the meta device: its modules and shapes."""
    targets: list[str]
    train: TokenizedData
    held_out: TokenizedData | None


def prepare(config: RunConfig, world_size: int) -> Prepared:
    """Check the DeepSpeed JSON, model, targets and data, and derive the timetable. Raises UserError. No weight is read."""
    engine_json = read_engine_config(config)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"path": _model_path(config.model.path)})}
    )
    tokenizer, skeleton = _describe_model(config)
    targets = find_targets(skeleton, config.lora.targets) if config.trains_lora else []
    limit = getattr(skeleton.config, "max_position_embeddings", None)
    if limit and config.data.max_length > limit:
        raise UserError(f"data.max_length {config.data.max_length} is more than the model's {limit} positions")
    train = load_split(config.data, "train", tokenizer)
    held_out = load_split(config.data, "eval", tokenizer) if config.data.eval is not None else None
    vocabulary = skeleton.get_input_embeddings().weight.shape[0]
    for data in filter(None, (train, held_out)):
        if data.largest_id >= vocabulary:
            raise UserError(
                f"model.path {config.model.path}: its tokenizer has id {data.largest_id}, its embedding ends at {vocabulary}"
            )
    timetable = resolve(config, len(train), world_size)
    complete(engine_json, config, timetable)
    return Prepared(config, engine_json, timetable, tokenizer, skeleton, targets, train, held_out)


def _model_path(path: str) -> str:
    """A local folder's absolute path, so that the run's folder can be used from elsewhere; a hub name as it is."""
    if not Path(path).is_dir():
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
            raise UserError(f"model.path {path} is not a folder, and cannot be a name on the Hugging Face hub")
        return path
    if not (Path(path) / "config.json").is_file():
        raise UserError(f"model.path {path} has no config.json: it is not a model's folder")
    return str(Path(path).resolve())


def _describe_model(config: RunConfig) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    model = config.model
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        model_config = AutoConfig.from_pretrained(model.path, **options)
        tokenizer = AutoTokenizer.from_pretrained(model.path, **options)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(model_config, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = "" if Path(model.path).is_dir() else "is not a folder here, and the hub does not give it: "
        raise UserError(f"model.path {model.path}: {where}{reason}") from None
    if Path(model.path).is_dir() and not any(Path(model.path).glob("*.safetensors")):
        raise UserError(
            f"model.path {model.path} has no *.safetensors; pickled weights are not read, so convert them first"
        )
    return tokenizer, skeleton


def summarize(prepared: Prepared, world_size: int) -> str:
    """The resolved run, for people: links, knots, batches, parameters."""
    config, timetable = prepared.config, prepared.timetable
    optim = config.optim
    total = sum(p.numel() for p in prepared.skeleton.parameters())
    shortened = f", {prepared.train.shortened} of them shortened to data.max_length" if prepared.train.shortened else ""
    lines = [
        f"model       {config.model.path} ({config.model.dtype}), {total:,} parameters",
        f"method      {config.method}, {len(prepared.targets)} target layers"
        if prepared.targets
        else f"method      {config.method}",
        f"data        {len(prepared.train)} training examples{shortened}; "
        + (f"{len(prepared.held_out)} held out" if prepared.held_out else "none held out"),
        f"batch       {optim.global_batch_size} = {optim.micro_batch_size} examples x {timetable.micro_steps} micro steps x {world_size} processes",
        f"steps       {timetable.total_steps} ({timetable.steps_per_epoch} per epoch)",
    ]
    for link, knot in enumerate(timetable.knots, start=1):
        steps = f"steps {knot - timetable.link_steps(link) + 1}-{knot}"
        trainable = count_trainable(prepared, link)
        what = (
            f"link {link:<6} {steps}, LoRA rank {config.lora_ranks[link - 1]}"
            if prepared.targets
            else f"training    {steps}"
        )
        if config.method != "zero-shot":
            lines.append(f"{what}, {trainable:,} trainable parameters")
    return "\n".join(lines)


def count_trainable(prepared: Prepared, link: int) -> int:
    """Parameters that `link` trains: A and B (and biases, if asked), or all of them with method full."""
    config = prepared.config
    if config.method == "full":
        return sum(p.numel() for p in prepared.skeleton.parameters())
    count = 0
    for name in prepared.targets:
        layer = prepared.skeleton.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        count += config.lora_ranks[link - 1] * (layer.in_features + layer.out_features)
        if config.lora.bias == "lora_only" and layer.bias is not None:
            count += layer.bias.numel()
    return count


def training_flops(prepared: Prepared, tokens: int) -> float:
    """Floating-point operations of training on `tokens`, spread evenly over the steps: matrix products of the weights alone.

    Per token and weight: 2 forward and 2 for the gradient of its input; 2 more for the gradient of the weight where it is
    trained. Attention scores and recomputed activations are left out.
    """
    config, timetable = prepared.config, prepared.timetable
    if config.method == "zero-shot":
        return 0.0
    embedding = prepared.skeleton.get_input_embeddings().weight.numel()
    weights = sum(p.numel() for p in prepared.skeleton.parameters())
    if not prepared.skeleton.config.tie_word_embeddings:
        weights -= embedding  # a table that is looked up, not multiplied
    if config.method == "full":
        return 6.0 * weights * tokens
    per_step = tokens / timetable.total_steps
    adapters = sum(
        count_trainable(prepared, link) * timetable.link_steps(link) for link in range(1, config.chain.length + 1)
    )
    return 4.0 * weights * tokens + 6.0 * adapters * per_step


def train(prepared: Prepared, process: Process, fresh: bool) -> dict[str, Any]:
    """Run the prepared config and write its folder. Returns what result.json holds. Collective."""
    from cola_ds import zero  # deepspeed takes seconds to import: not before every cheap check has passed
    from cola_ds.chain import Chain, evaluate, run_chain
    from cola_ds.journal import Journal
    from cola_ds.optim import make_optimizer

    begin = time.perf_counter()
    config, timetable = prepared.config, prepared.timetable
    zero.check_dtype(config.model.dtype)
    engine_config = complete(prepared.engine_json, config, timetable)
    folder = RunFolder.create(config, fresh) if process.rank == 0 else None
    zero.start_processes(process)
    zero.check_engine_config(engine_config)
    hosts = zero.texts_of_processes(platform.node())
    if folder:
        folder.write_json("environment.json", describe_environment(hosts, zero.accelerator_name()))

    torch.manual_seed(config.run.seed + process.rank)  # dropout alone draws from it, and differs by process
    model = zero.load_model(config.model, engine_config)
    if config.trains_lora:
        inject(model, prepared.targets, config.lora.dropout, train_bias=config.lora.bias == "lora_only")
        start_link(model, 1, config.lora_ranks[0], config.lora.alpha, config.run.seed, zero.device())
    else:
        model.requires_grad_(config.method == "full")
    engine = zero.build_engine(model, engine_config, partial(make_optimizer, config.optim))
    engine.train(config.method != "zero-shot")

    pad_id = prepared.tokenizer.pad_token_id or 0  # masked wherever it stands
    batchers = [
        Batcher(data, process.rank, process.world_size, pad_id) if data else None
        for data in (prepared.train, prepared.held_out)
    ]
    assert batchers[0] is not None
    steps = timetable.total_steps if config.method != "zero-shot" else 0
    journal = Journal(folder, zero.Monitor(prepared.engine_json), steps, config.run.log_every_steps)
    save_link = partial(_save_link, folder, config, prepared.targets) if folder else None
    chain = Chain(
        config, timetable, engine, engine_config, process.world_size, batchers[0], batchers[1], journal, save_link
    )
    loading_s = time.perf_counter() - begin

    if config.method == "zero-shot":
        evaluate(chain)
    else:
        run_chain(chain)
    if config.method == "full":
        _save_whole_model(chain.engine.module, prepared, folder)
    journal.close()
    result = {
        "method": config.method,
        "task": None,
        "seed": config.run.seed,
        "scores": _scores(folder) if folder else {},
        "steps": chain.state.step,
        "links": config.chain.length if config.trains_lora else 0,
        "tokens": chain.state.tokens_seen,
        "skipped_steps": chain.state.skipped_steps,
        "world_size": process.world_size,
        "loading_s": loading_s,
        "wall_time_s": time.perf_counter() - begin,
        "peak_memory_bytes": int(zero.max_over_processes(zero.peak_memory_bytes())),
        "training_flops": training_flops(prepared, chain.state.tokens_seen),
    }
    if folder:
        folder.write_json("result.json", result)
    return result


def _scores(folder: RunFolder) -> dict[str, Any]:
    evaluations = folder.rows("evals.jsonl")
    return {key: evaluations[-1][key] for key in ("loss", "perplexity", "examples")} if evaluations else {}


def _save_link(folder: RunFolder, config: RunConfig, targets: list[str], link: int, tensors: dict[str, Tensor]) -> None:
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.model.path,
        "revision": config.model.revision,
        "r": config.lora_ranks[link - 1],
        "lora_alpha": config.lora.alpha,
        "lora_dropout": config.lora.dropout,
        "target_modules": targets,
        "bias": config.lora.bias,
        "inference_mode": True,
    }
    folder.write_link(link, {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, adapter_config)


def _save_whole_model(model: Any, prepared: Prepared, folder: RunFolder | None) -> None:
    from cola_ds import zero

    state = zero.whole_state_dict(model)
    if folder:
        model.save_pretrained(folder.path / "model", state_dict=state)
        prepared.tokenizer.save_pretrained(folder.path / "model")
