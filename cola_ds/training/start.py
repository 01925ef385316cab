"""Starting a chain: the run folder locked and looked at, the chain built, and put where its checkpoint left it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cola_ds.checkpoint.decide import ResumeOptions, check_fits, choose_start, decided_knots, engine_facts
from cola_ds.checkpoint.format import Checkpoint, SavedState, hash_of
from cola_ds.checkpoint.restore import restore_engine, restore_folder
from cola_ds.config.steps import with_longest_chain
from cola_ds.data.tokenize import chat_template_of
from cola_ds.distributed import accelerator, collectives
from cola_ds.distributed.deepspeed_internals import end_process
from cola_ds.distributed.devices import peak_tflops
from cola_ds.distributed.launcher import Process
from cola_ds.run.earlier import find_earlier
from cola_ds.run.environment import describe_environment
from cola_ds.run.folder import RunDir
from cola_ds.run.lock import RunLock
from cola_ds.training.build import build_chain
from cola_ds.training.preflight import check_shared
from cola_ds.training.prepared import Prepared, frozen_of_links, tied_of_links, trained_of_links
from cola_ds.training.save import space_needed
from cola_ds.training.state import Chain, RunFacts, from_counters
from cola_ds.training.watch import looked_at_start
from cola_ds.training.work import work_of


@dataclass(frozen=True)
class Start:
    """How a run starts: anew, from what a checkpoint has saved, or not at all."""

    finished: bool
    saved: SavedState | None
    found: Checkpoint | None
    """The checkpoint itself, on process 0 alone."""
    fresh: bool = False
    """Whether nothing of an earlier run is kept: one that died before its first checkpoint has told why in its log."""


def lock_and_choose(
    prepared: Prepared, process: Process, folder: RunDir | None, lock: RunLock | None, options: ResumeOptions
) -> Start:
    """Lock the run folder, and look what is in it. Collective: all processes hash what there is to be verified."""
    config = prepared.config
    chosen: Checkpoint | str = ""

    def choose(hashed_by_all: Callable[[list[str]], list[str | None]]) -> Any:
        nonlocal chosen
        assert folder is not None and lock is not None
        lock.take(end_process)
        chosen = choose_start(
            folder, config, prepared.identity, options, prepared.step_plan,
            hashing=lambda paths: hashed_by_all([str(path) for path in paths]),
        )  # fmt: skip
        if config.trains and chosen != "finished":
            earlier = find_earlier(config)
            copies = earlier.size_bytes if earlier else 0
            folder.check_space(_space_needed(prepared, process.world_size) + copies)
        return chosen if isinstance(chosen, str) else chosen.state.model_dump()

    answer = collectives.on_rank_0_with_all(choose, hash_of)
    check_shared(Path(config.run.dir))
    saved = SavedState.model_validate(answer) if isinstance(answer, dict) else None
    if saved:
        if config.chain.plateau is not None:
            saved.chain.decided = decided_knots(saved)
        step_plan = prepared.step_plan.deciding(config.chain, saved.chain.decided)
        check_fits(saved.knots, saved.chain.link, saved.chain.step, step_plan)
    return Start(answer == "finished", saved, chosen if isinstance(chosen, Checkpoint) else None, options.fresh)


def _space_needed(prepared: Prepared, world_size: int) -> int:
    step_plan = prepared.step_plan
    longest = with_longest_chain(prepared.config, step_plan.least_steps, step_plan.total_steps)
    at_most = dataclasses.replace(prepared, config=longest)
    weights = len(list(prepared.skeleton.parameters()))
    tied, frozen = tied_of_links(at_most), max(frozen_of_links(at_most))
    return space_needed(longest, trained_of_links(at_most), weights, world_size, tied, frozen)


def begin(prepared: Prepared, process: Process, folder: RunDir | None, start: Start, since: float) -> Chain:
    """Build the chain, put it where its checkpoint left it, and write down that it has begun. Collective."""
    saved, found = start.saved, start.found
    chain = build_chain(prepared, process, folder, from_counters(saved.chain) if saved else None, found)
    hosts = collectives.hosts()
    environment = describe_environment(hosts, accelerator.accelerator_name())
    environment["zero_stage"] = prepared.engine_config["zero_optimization"]["stage"]
    environment["shards"] = "node" if prepared.nodes else "world"
    if folder:  # not before all that can be refused has been accepted
        found = _write_down(chain, prepared, folder, found, environment, keep_log=not start.fresh)
        what = "resumed" if saved else "started"
        folder.event(what, step=chain.state.step, world_size=process.world_size, hosts=hosts)
        folder.event("loaded", step=chain.state.step, **chain.loaded)
        chain.facts = RunFacts(
            config=prepared.config, identity=prepared.identity, model=chain.base,
            base_links=folder.mine.facts["base_links"],
            versions={**environment["packages"], "cola_ds": environment["cola_ds"]},
            elapsed_s=saved.elapsed_s if saved else 0.0, since=since,
        )  # fmt: skip
    _measure(chain, prepared, process)
    if saved:
        restore_engine(chain.engine, saved, found, process)
        chain.logger.go_on(saved.journal.model_dump(), process.rank, process.world_size, chain.state.step)
        chain.logger.say(f"going on from step {chain.state.step}, in link {chain.state.link}")
        if (
            folder
            and saved.watch != prepared.identity.watch
            and chain.state.step
            and not looked_at_start(chain, folder)
        ):
            how = "added" if saved.watch is None else "exchanged"
            chain.logger.say(f"data.watch was {how} under way: its loss before the first step is not known")
    return chain


def _measure(chain: Chain, prepared: Prepared, process: Process) -> None:
    """Find what turns the steps of a run into TFLOP/s and a share of the peak."""
    logger, dtype = chain.logger, prepared.config.model.dtype
    if not prepared.config.trains:
        return
    works = logger.figure("tflops", lambda: work_of(prepared))
    if works is not None:
        logger.work = lambda link, examples: works[link - 1].of(examples) / process.world_size
    logger.peak_tflops = logger.figure("peak_share", lambda: peak_tflops(accelerator.accelerator_name(), dtype))


def _write_down(
    chain: Chain, prepared: Prepared, folder: RunDir, found: Checkpoint | None, environment: dict[str, Any], keep_log: bool,
) -> Checkpoint | None:  # fmt: skip
    """Make the folder the run's, as it was at the checkpoint. Returns the folder's own copy of that. On process 0 alone."""
    config = prepared.config
    earlier = chain.earlier
    facts = {
        "identity": dataclasses.asdict(prepared.identity), "base": chain.base,
        "base_links": None if earlier is None else earlier.hashes(),
        "chat_template": chat_template_of(config.data),
    }  # fmt: skip
    if found:
        if not folder.holds_a_run():
            folder.create(config, environment, facts)
        folder.forget_result()
        if folder.mine.facts["base_links"] != facts["base_links"]:  # --resume from another run's checkpoint
            folder.forget_earlier()
        folder.describe(config, environment, facts)
        found = restore_folder(folder, prepared.skeleton, config, prepared.targets, found)
        if earlier is not None and not folder.keeps(earlier):
            folder.write_earlier(earlier.made(config))
    else:
        copies = earlier.made(config) if earlier is not None and config.trains else ()
        folder.create(config, environment, facts, keep_log)
        folder.write_earlier(copies)
    folder.keep_engine(engine_facts(prepared.engine_json))
    return found
