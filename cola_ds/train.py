"""`cola-ds train`: from a prepared run to a finished run folder."""

from __future__ import annotations

import platform
import time
from functools import partial
from typing import Any

import torch

from cola_ds import zero
from cola_ds.chain import Chain, evaluate, run_chain
from cola_ds.data.batching import Batcher
from cola_ds.engine_config import complete
from cola_ds.journal import Journal
from cola_ds.launcher import Process
from cola_ds.lora import inject, start_link
from cola_ds.optim import make_optimizer
from cola_ds.prepare import Prepared, training_flops
from cola_ds.rundir import RunFolder, describe_environment


def build_chain(prepared: Prepared, process: Process, folder: RunFolder | None) -> Chain:
    """Load, inject, and wrap in an engine: a chain at its first step. Collective; `folder` is None on every process but 0."""
    config = prepared.config
    engine_config = complete(prepared.engine_json, config, prepared.timetable)
    zero.check_engine_config({**prepared.engine_json, **engine_config})
    torch.manual_seed(config.run.seed + process.rank)  # dropout alone draws from it, and differs by process
    model = zero.load_model(config.model, engine_config)
    if config.trains_lora:
        inject(model, prepared.targets, config.lora.dropout, train_bias=config.lora.bias == "lora_only")
        start_link(model, 1, config.lora_ranks[0], config.lora.alpha, config.run.seed, zero.device())
    else:
        model.requires_grad_(config.method == "full")
    engine = zero.build_engine(model, engine_config, partial(make_optimizer, config.optim))
    engine.train(config.method != "zero-shot")

    train = Batcher(prepared.train, process.rank, process.world_size)
    held_out = None
    if prepared.held_out is not None:
        held_out = Batcher(prepared.held_out, process.rank, process.world_size)
    steps = prepared.timetable.total_steps if config.method != "zero-shot" else 0
    journal = Journal(folder, zero.Monitor(prepared.engine_json), steps, config.run.log_every_steps)
    return Chain(
        config, prepared.timetable, engine, engine_config, process.world_size, train, held_out, journal, folder
    )


def train(prepared: Prepared, process: Process, fresh: bool) -> None:
    """Run the prepared config and write its folder. Collective.

    Raises UserError for a dtype that the accelerator lacks or a folder that holds a run, TrainingFailedError for a loss or
    an adapter that is not finite.
    """
    begin = time.perf_counter()
    zero.check_dtype(prepared.config.model.dtype)
    folder = RunFolder(prepared.config.run.dir) if process.rank == 0 else None
    if folder:
        data = prepared.config.data
        folder.check_is_free(
            fresh, [prepared.config.model.path, *filter(None, () if data.hub else (data.train, data.eval))]
        )
    zero.start_processes(process)
    chain = build_chain(prepared, process, folder)
    hosts = zero.texts_of_processes(platform.node())
    if folder:  # not before all that can be refused has been accepted
        folder.create(prepared.config, describe_environment(hosts, zero.accelerator_name()))
    loading_s = time.perf_counter() - begin
    if prepared.config.method == "zero-shot":
        evaluate(chain)
    else:
        run_chain(chain)
    if prepared.config.method == "full":
        _save_whole_model(chain, prepared, folder)
    chain.journal.close()
    peak = int(zero.max_over_processes(zero.peak_memory_bytes()))
    remainders = torch.tensor([sum(r.numel() for r in chain.state.remainders.values())], device=zero.device())
    remainder_bytes = 4 * int(zero.sum_over_processes(remainders))
    if folder:
        times = {"loading_s": loading_s, "wall_time_s": time.perf_counter() - begin}
        memory = {"peak_memory_bytes": peak, "remainder_bytes": remainder_bytes}
        folder.write_json("result.json", {**_result(prepared, chain, folder), **times, **memory})


def _result(prepared: Prepared, chain: Chain, folder: RunFolder) -> dict[str, Any]:
    config = prepared.config
    return {
        "method": config.method,
        "task": None,
        "seed": config.run.seed,
        "scores": _scores(folder),
        "steps": chain.state.step,
        "examples": chain.state.examples_seen,
        "links": config.chain.length if config.trains_lora else 0,
        "tokens": chain.state.tokens_seen,
        "skipped_steps": chain.state.skipped_steps,
        "world_size": chain.world_size,
        "training_flops": training_flops(prepared, chain.state.tokens_seen),
    }


def _scores(folder: RunFolder) -> dict[str, Any]:
    evaluations = folder.rows("evals.jsonl")
    return {key: evaluations[-1][key] for key in ("loss", "perplexity", "examples")} if evaluations else {}


def _save_whole_model(chain: Chain, prepared: Prepared, folder: RunFolder | None) -> None:
    model = chain.engine.module
    state = zero.whole_state_dict(model)
    if folder:
        model.save_pretrained(folder.path / "model", state_dict=state)
        prepared.tokenizer.save_pretrained(folder.path / "model")
