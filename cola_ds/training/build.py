"""Building a chain: the model loaded and injected, links tied again where a checkpoint has some, an engine around it."""

from __future__ import annotations

import time

import torch

from cola_ds.checkpoint.decide import check_base_links
from cola_ds.checkpoint.format import Checkpoint
from cola_ds.checkpoint.restore import restore_model
from cola_ds.config.schema import RunConfig
from cola_ds.data.batcher import Batcher
from cola_ds.distributed import accelerator, collectives, compilation
from cola_ds.distributed.engine import build_engine, check_engine_config
from cola_ds.distributed.launcher import Process
from cola_ds.distributed.loading import load_model
from cola_ds.distributed.monitor import Monitor
from cola_ds.distributed.nodes import make_groups
from cola_ds.errors import UserError
from cola_ds.evaluation.attention import VARLEN
from cola_ds.lora.layers import inject
from cola_ds.lora.starts import begin_link
from cola_ds.run.fingerprint import model_fingerprint
from cola_ds.run.folder import RunDir
from cola_ds.run.model_files import weight_files
from cola_ds.run.model_folder import model_folder
from cola_ds.training.earlier import tie_earlier
from cola_ds.training.kernels import use_kernels
from cola_ds.training.metrics import MetricLogger
from cola_ds.training.optim import optimizer_of
from cola_ds.training.prepared import Prepared
from cola_ds.training.state import Chain, ChainState


def build_chain(
    prepared: Prepared,
    process: Process,
    folder: RunDir | None,
    state: ChainState | None = None,
    found: Checkpoint | None = None,
) -> Chain:
    """Load, inject, and wrap in an engine: a chain at its first step, or with `state` where a checkpoint left it.

    Collective; `folder`, and the checkpoint `found`, are None on every process but 0.
    """
    config, restored = prepared.config, state is not None
    state = state or ChainState()
    step_plan = prepared.step_plan.deciding(config.chain, state.decided)
    step_plan = step_plan if state.ended_step is None else step_plan.ending_at(state.ended_step)
    check_engine_config({**prepared.engine_json, **prepared.engine_config}, config.deepspeed)
    accelerator.make_deterministic(config.run.deterministic)
    # Dropout alone draws from it, and differs by process.
    torch.manual_seed(config.run.seed + process.rank + process.world_size * state.step)
    compiles = config.model.compile and config.trains
    if compiles:
        compilation.check_compiler()
    nodes = make_groups(prepared.nodes) if prepared.nodes else None
    begun = time.perf_counter()
    model = load_model(config.model, prepared.engine_config, prepared.attention, nodes)
    loading_s = time.perf_counter() - begun
    if prepared.kernels:
        use_kernels(model)
    base = collectives.on_rank_0(lambda: _checked_model(config, found))
    if config.trains_lora:
        inject(model, prepared.targets, config.lora.dropout, train_bias=config.lora.bias == "lora_only")
    else:
        model.requires_grad_(config.method == "full")
    before, earlier = 0, None
    if config.has_earlier:
        before, earlier = tie_earlier(model, config, base, prepared.targets, state.remainders, reads=process.rank == 0)
    if restored:
        restore_model(model, config, state.link, found, state.remainders, state.earlier, process, before)
    elif config.trains_lora:
        begin_link(model, config, 1, accelerator.device(), before)
    if compiles:
        compilation.compile_blocks(model)
    engine = build_engine(model, prepared.engine_config, optimizer_of(config.optim, model))
    engine.train(config.trains)

    joined = prepared.attention == VARLEN
    train = Batcher(prepared.train, process.rank, process.world_size, prepared.order, joined, fixed=compiles)
    data = prepared.held_out
    held_out = None if data is None else Batcher(data, process.rank, process.world_size, joined=joined)
    data = prepared.watched
    watched = None if data is None else Batcher(data, process.rank, process.world_size, joined=joined)
    steps = step_plan.total_steps if config.trains else 0
    return Chain(
        config=config, base=base, earlier=earlier, drawn_before=before, step_plan=step_plan, engine=engine,
        engine_config=prepared.engine_config, world_size=process.world_size,
        train=train, held_out=held_out, watched=watched, test=prepared.test,
        tokenizer=prepared.tokenizer, folder=folder, state=state, in_nodes=nodes is not None, restored=restored,
        loaded=_loaded(config, loading_s) if folder else {},
        logger=MetricLogger(folder, Monitor(prepared.engine_json), steps, config.run.log_every_steps),
    )  # fmt: skip


def _loaded(config: RunConfig, seconds: float) -> dict[str, float]:
    """How fast the weights have come: the bytes of their files, whichever process has read which."""
    size = sum(path.stat().st_size for path in weight_files(model_folder(config.model)))
    return {"seconds": seconds, "bytes": size, "gb_per_s": size / 1e9 / max(seconds, 1e-9)}


def _checked_model(config: RunConfig, found: Checkpoint | None) -> str:
    """The base model's fingerprint. Raises UserError when it is not the one that the checkpoint's links belong to."""
    model = model_fingerprint(config.model)
    if found and found.state.model != model:
        raise UserError(
            f"model.path {config.model.path} is not the base model of {found.path}: its fingerprint is {model[:16]}, the "
            f"checkpoint's is {found.state.model[:16]} (the run began with {found.state.config['model']['path']})"
        )
    if found:
        check_base_links(config, found.state.base_links, f"{found.path} was written")
    return model
