"""`cola-ds train`: from a prepared run to a finished run folder."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cola_ds.checkpoint.decide import Identity, ResumeOptions, check_fits, choose_start, engine_facts, links_of
from cola_ds.checkpoint.format import Checkpoint, SavedState
from cola_ds.checkpoint.restore import restore_model, restore_optimizer, tie_run
from cola_ds.checkpoint.store import CheckpointFolder
from cola_ds.config.deepspeed_json import complete
from cola_ds.config.schema import RunConfig
from cola_ds.data.batcher import Batcher
from cola_ds.data.tasks.dataset import TaskData
from cola_ds.distributed import accelerator, collectives, signals, watchdog
from cola_ds.distributed.engine import Engine, build_engine, check_engine_config, load_model
from cola_ds.distributed.engine_state import set_loss_scale_state, set_random_state
from cola_ds.distributed.launcher import Process
from cola_ds.distributed.monitor import Monitor
from cola_ds.distributed.shards import whole_state_dict
from cola_ds.errors import UserError
from cola_ds.evaluation.evaluators import TaskScore, task_score
from cola_ds.lora.layers import inject, start_link
from cola_ds.run.environment import describe_environment
from cola_ds.run.fingerprint import model_fingerprint
from cola_ds.run.folder import RunDir
from cola_ds.run.lock import RunLock
from cola_ds.run.model_folder import write_model_folder
from cola_ds.run.peft_files import read_link
from cola_ds.training.flops import profiled_flops, training_flops
from cola_ds.training.loop import run_chain
from cola_ds.training.metrics import MetricLogger
from cola_ds.training.optim import make_optimizer
from cola_ds.training.preflight import check_ranks_agree, check_shared
from cola_ds.training.prepare import Prepared, count_trainable
from cola_ds.training.save import space_needed
from cola_ds.training.state import Chain, ChainState, Constant, from_counters
from cola_ds.training.validation import evaluate


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
    step_plan = prepared.step_plan if state.ended_step is None else prepared.step_plan.ending_at(state.ended_step)
    engine_config = complete(prepared.engine_json, config, prepared.step_plan)
    check_engine_config({**prepared.engine_json, **engine_config})
    accelerator.make_deterministic(config.run.deterministic)
    # Dropout alone draws from it, and differs by process.
    torch.manual_seed(config.run.seed + process.rank + process.world_size * state.step)
    model = load_model(config.model, engine_config)
    base = collectives.on_rank_0(lambda: _checked_model(config, found))
    if config.trains_lora:
        inject(model, prepared.targets, config.lora.dropout, train_bias=config.lora.bias == "lora_only")
    else:
        model.requires_grad_(config.method == "full")
    if config.model.links is not None:
        tie_run(model, config.model.links, base, reads=process.rank == 0)
    if restored:
        restore_model(model, config, state.link, found, state.remainders)
    elif config.trains_lora:
        start_link(model, 1, config.lora_ranks[0], config.lora.alpha, config.run.seed, accelerator.device())
    engine = build_engine(model, engine_config, partial(make_optimizer, config.optim))
    engine.train(config.trains)

    train = Batcher(prepared.train, process.rank, process.world_size)
    held_out = None
    if prepared.held_out is not None:
        held_out = Batcher(prepared.held_out, process.rank, process.world_size)
    steps = step_plan.total_steps if config.trains else 0
    logger = MetricLogger(folder, Monitor(prepared.engine_json), steps, config.run.log_every_steps)
    return Chain(
        config,
        base,
        step_plan,
        engine,
        engine_config,
        process.world_size,
        train,
        held_out,
        _scorer(prepared),
        logger,
        folder,
        state,
    )


def _scorer(prepared: Prepared) -> Callable[[Engine, str, Callable[[], bool]], TaskScore | None] | None:
    splits = {"dev": prepared.held_out, "test": prepared.test}
    if prepared.test is None or prepared.test.task.metric is None:
        return None
    batch_size = prepared.config.eval.batch_size or prepared.config.optim.micro_batch_size

    def score(engine: Engine, split: str, stop: Callable[[], bool]) -> TaskScore | None:
        data = splits[split]
        assert isinstance(data, TaskData)
        return task_score(engine, data, split, prepared.tokenizer, batch_size, stop)

    return score


def train(prepared: Prepared, process: Process, options: ResumeOptions) -> bool:
    """Run the prepared config, or what is left of it, and write its folder; whether there was anything to do. Collective, in a
    process group that has begun.

    Raises UserError for processes that disagree, a folder that holds another run or cannot be written; TrainingFailedError for
    losses, gradients or adapters that are not finite; StoppedError when a signal asked for it.
    """
    since = time.perf_counter()
    folder = RunDir(prepared.config.run.dir) if process.rank == 0 else None
    lock = RunLock(folder.path) if folder else None
    chain = None
    try:
        check_ranks_agree(prepared)
        start = _choose_start(prepared, folder, lock, options)
        if start.finished:
            return False
        chain = _begin(prepared, process, folder, start, since)
        loading_s = time.perf_counter() - since
        signals.steps_begin()
        if not prepared.config.trains:
            evaluate(chain)
        else:
            run_chain(chain)
        _finish(chain, prepared, loading_s, since, start.saved.elapsed_s if start.saved else 0.0)
        return True
    finally:
        if chain:
            chain.logger.close()  # what is said of an error gets a line of its own
        if lock:
            lock.release()


@dataclass(frozen=True)
class _Start:
    """How a run starts: anew, from what a checkpoint has saved, or not at all."""

    finished: bool
    saved: SavedState | None
    found: Checkpoint | None
    """The checkpoint itself, on process 0 alone."""


def _choose_start(prepared: Prepared, folder: RunDir | None, lock: RunLock | None, options: ResumeOptions) -> _Start:
    """Lock the run folder, and look what is in it. Collective."""
    config = prepared.config
    chosen: Checkpoint | str = ""

    def choose() -> Any:
        nonlocal chosen
        assert folder is not None and lock is not None
        lock.take()
        chosen = choose_start(folder, config, _identity(prepared), options, prepared.step_plan)
        if config.trains and chosen != "finished":
            trained = [count_trainable(prepared, link) for link in range(1, config.chain.length + 1)]
            folder.check_space(space_needed(config, trained))
        return chosen if isinstance(chosen, str) else chosen.state.model_dump()

    answer = collectives.on_rank_0(choose)
    check_shared(Path(config.run.dir))
    saved = SavedState.model_validate(answer) if isinstance(answer, dict) else None
    if saved:
        check_fits(saved.knots, saved.chain.link, saved.chain.step, prepared.step_plan)
    return _Start(answer == "finished", saved, chosen if isinstance(chosen, Checkpoint) else None)


def _begin(prepared: Prepared, process: Process, folder: RunDir | None, start: _Start, since: float) -> Chain:
    """Build the chain, put it where its checkpoint left it, and write down that it has begun."""
    config, saved = prepared.config, start.saved
    chain = build_chain(prepared, process, folder, from_counters(saved.chain) if saved else None, start.found)
    hosts = collectives.all_gather_texts(platform.node())
    found = start.found
    environment = describe_environment(hosts, accelerator.accelerator_name())
    if folder:  # not before all that can be refused has been accepted
        facts = {
            "identity": dataclasses.asdict(_identity(prepared)), "base": chain.base, "base_links": links_of(config),
        }  # fmt: skip
        if found:
            if not folder.holds_a_run():
                folder.create(config, environment, facts)
            folder.forget_result()
            folder.describe(config, environment, facts)
            found = _go_back(folder, prepared, found)
        else:
            folder.create(config, environment, facts)
        folder.keep_engine(engine_facts(prepared.engine_json))
        folder.event(
            "resumed" if saved else "started", step=chain.state.step, world_size=process.world_size, hosts=hosts
        )
    if saved:
        restore_optimizer(chain.engine, saved.scalars, found)
        set_loss_scale_state(chain.engine, saved.loss_scale)
        chain.logger.go_on(saved.journal.model_dump(), process.rank, process.world_size, chain.state.step)
        _restore_random_state(found, saved.world_size, process)
        chain.logger.say(f"going on from step {chain.state.step}, in link {chain.state.link}")
    constant = None
    if folder:
        versions = {**environment["packages"], "cola_ds": environment["cola_ds"]}
        elapsed_s = saved.elapsed_s if saved else 0.0
        constant = Constant(config, _identity(prepared), chain.base, versions, elapsed_s, since)
    if config.trains:
        chain.constant = constant
    return chain


def _finish(chain: Chain, prepared: Prepared, loading_s: float, since: float, elapsed_s: float) -> None:
    """Write what a finished run leaves, the result last."""
    watchdog.rest()
    if chain.config.method == "full":
        _save_whole_model(chain, prepared, chain.folder)
    chain.logger.close()
    peak = int(collectives.all_reduce_max_of_one(accelerator.peak_memory_bytes()))
    remainders = torch.tensor([sum(r.numel() for r in chain.state.remainders.values())], device=accelerator.device())
    remainder_bytes = 4 * int(collectives.all_reduce_sum(remainders))
    if chain.folder:
        times = {"loading_s": loading_s, "wall_time_s": elapsed_s + time.perf_counter() - since}
        memory = {"peak_memory_bytes": peak, "remainder_bytes": remainder_bytes}
        _write_result(chain, prepared, chain.folder, times | memory)


def _write_result(chain: Chain, prepared: Prepared, folder: RunDir, more: dict[str, Any]) -> None:
    """result.json, and beside it what is only reported: what of that fails costs no result."""
    try:
        folder.flush_rows()
    except OSError as error:
        chain.logger.say(f"warning: the last rows of {folder.path} are not written: {error.strerror or error}")
    result = {**_result(prepared, chain, folder), **more}
    folder.write_result(result)
    folder.event("finished", step=chain.state.step)
    # Counting runs the model's own code, which may do anything: the result is there already.
    tokens = chain.state.link_tokens
    counted = chain.logger.figure("profiled_flops", lambda: profiled_flops(prepared, tokens))
    if counted is not None:
        whole = {**result, "profiled_flops": counted}
        chain.logger.figure("profiled_flops", lambda: folder.write_result(whole))


def _identity(prepared: Prepared) -> Identity:
    train = prepared.train.fingerprint()
    held_out = prepared.held_out.fingerprint() if prepared.held_out is not None else None
    if prepared.test is not None:
        held_out = f"{held_out} {prepared.test.fingerprint()}"
    return Identity(engine_facts(prepared.engine_json), train, held_out)


def _checked_model(config: RunConfig, found: Checkpoint | None) -> str:
    """The base model's fingerprint. Raises UserError when it is not the one that the checkpoint's links belong to."""
    model = model_fingerprint(config.model)
    if found and found.state.model != model:
        raise UserError(
            f"model.path {config.model.path} is not the base model of {found.path}: its fingerprint is {model[:16]}, the "
            f"checkpoint's is {found.state.model[:16]} (the run began with {found.state.config['model']['path']})"
        )
    return model


def _go_back(folder: RunDir, prepared: Prepared, found: Checkpoint) -> Checkpoint:
    """Make the folder what it was when the checkpoint was written, with those before it. Returns the folder's own copy of it.

    Whatever is done of it when the process dies, the next start finds that checkpoint and does it again.
    """
    checkpoints = CheckpointFolder(folder)
    if found.path.parent.resolve() == checkpoints.path.resolve():
        checkpoints.set_aside(later_than=found.step)
    else:
        found = checkpoints.take_in(found)
    checkpoints.mark_best(found.state.chain.best_step)
    folder.go_back(found.state.rows.model_dump())
    for link in range(1, found.state.chain.link):
        folder.write_link(prepared.config, link, prepared.targets, read_link(found.link_path(link)))
    return found


def _restore_random_state(found: Checkpoint | None, world_size: int, process: Process) -> None:
    """Each process's own; at another world size they begin anew, from the seed and the step."""
    if world_size != process.world_size:
        return
    states = found.random_states() if found else []
    sizes = collectives.broadcast_object([state.numel() for state in states])
    for rank, size in enumerate(sizes):
        held = collectives.broadcast_bytes(states[rank] if states else None, size)
        if rank == process.rank:
            set_random_state(held)


def _result(prepared: Prepared, chain: Chain, folder: RunDir) -> dict[str, Any]:
    config = prepared.config
    return {
        "method": config.method,
        "task": prepared.test.task.name if prepared.test else None,
        "seed": config.run.seed,
        "scores": _task_scores(folder, chain.state.best_step) if chain.score else _scores(folder),
        "steps": chain.state.step,
        "examples": chain.state.examples_seen,
        "ended_early": chain.state.ended_step is not None,
        "links": chain.links if config.trains_lora else 0,
        "tokens": sum(chain.state.link_tokens),
        "skipped_steps": chain.state.skipped_steps,
        "world_size": chain.world_size,
        "training_flops": chain.logger.figure(
            "training_flops", lambda: training_flops(prepared, chain.state.link_tokens)
        ),
        "profiled_flops": None,  # it follows
        "link_sha256": chain.state.link_hashes,
    }


def _scores(folder: RunDir) -> dict[str, Any]:
    evaluations = folder.rows("evals.jsonl", skip_damaged=True)
    return {key: evaluations[-1][key] for key in ("loss", "perplexity", "examples")} if evaluations else {}


def _task_scores(folder: RunDir, best_step: int) -> dict[str, Any]:
    """Of the best step by dev. The rows of a step are written together."""
    evaluations = folder.rows("evals.jsonl", skip_damaged=True)
    rows = {row["split"]: row for row in evaluations if row["step"] == best_step}
    scores = {"metric": rows["dev"]["metric"], "best_step": best_step}
    for split, row in rows.items():
        scores |= {split: row["score"], f"{split}_examples": row["examples"]}
    return scores


def _save_whole_model(chain: Chain, prepared: Prepared, folder: RunDir | None) -> None:
    model = chain.engine.module
    state = whole_state_dict(model)
    if folder:
        folder.write_model(lambda out: write_model_folder(model, prepared.config.model, out, state))
