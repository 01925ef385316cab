"""Deciding how a run starts: anew, from a checkpoint, or not at all because it is finished. From files alone, on process 0."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cola_ds import notices
from cola_ds.checkpoint.format import (
    Checkpoint,
    DamagedError,
    Hashing,
    SavedState,
    explain_damage,
    open_or_refuse,
    read_checkpoint,
)
from cola_ds.checkpoint.store import CheckpointFolder
from cola_ds.config.deepspeed_json import read_engine_config
from cola_ds.config.inputs import ready_configs
from cola_ds.config.keys import by_content, default_of, flat_keys, is_fixed, is_free
from cola_ds.config.schema import RunConfig
from cola_ds.config.steps import StepPlan
from cola_ds.errors import UserError
from cola_ds.run.earlier import find_earlier
from cola_ds.run.fingerprint import model_fingerprint
from cola_ds.run.folder import RunDir
from cola_ds.run.learnt import read_learnt

# Facts about the engine's log, not about its numbers.
_ENGINE_LOG = {
    "tensorboard", "wandb", "csv_monitor", "comet", "comms_logger", "dump_state", "flops_profiler", "log_level",
    "memory_breakdown", "steps_per_print", "timers", "wall_clock_breakdown",
}  # fmt: skip


@dataclass(frozen=True)
class ResumeOptions:
    """What the command line says about starting."""

    resume: str = "auto"
    """auto, never, or the path of a checkpoint (or of a run folder: then its newest that verifies)."""
    fresh: bool = False
    allow_change: tuple[str, ...] = ()


@dataclass(frozen=True)
class Identity:
    """What a run is, apart from its config: see SavedState."""

    engine: dict[str, Any]
    train: str
    eval: str | None
    watch: str | None = None


def engine_facts(engine_json: dict[str, Any]) -> dict[str, Any]:
    """The DeepSpeed JSON without what cannot change a result."""
    return {key: value for key, value in engine_json.items() if key not in _ENGINE_LOG}


def choose_start(
    folder: RunDir, config: RunConfig, identity: Identity, options: ResumeOptions, step_plan: StepPlan,
    hashing: Hashing | None = None,
) -> Checkpoint | str:  # fmt: skip
    """The checkpoint to go on from, or "anew", or "finished". `hashing` may share out what verifies one.

    Raises UserError when the folder holds another run, a config that has changed, checkpoints of which none verifies, or a result
    that is not the run's own.
    """
    if options.fresh and options.resume not in ("auto", "never"):
        raise UserError(f"--fresh starts anew, --resume {options.resume} goes on: give one of them")
    if options.fresh or options.resume == "never" or (options.resume == "auto" and not folder.holds_a_run()):
        folder.check_is_free(config, options.fresh)
        return "anew"
    checkpoints = CheckpointFolder(folder)
    folder.check_is_ours(config)
    if options.resume != "auto":
        found = _asked_for(Path(options.resume), hashing)
        here = found.path.resolve().parent == checkpoints.path.resolve()
        if here or not checkpoints.ever_written():
            _compare(found.path, found.state, config, identity, options)
            return found
        _warn(f"{folder.path} has checkpoints of its own: it goes on from them, and not from {found.path}")
    more = False
    if (folder.path / "result.json").exists():
        read_learnt(folder.path)
        more = _compare(folder.path, _described(folder), config, identity, options, finished=True)
        _check_base(folder, config)
        if not more:
            return "finished"
    newest = _newest(checkpoints, hashing)
    if newest is not None:
        _compare(newest.path, newest.state, config, identity, options)
    if more:
        _check_more(folder, newest, step_plan)
    if newest is not None:
        return newest
    if checkpoints.ever_written():
        raise UserError(
            f"run.dir {folder.path} has no checkpoint that can be used, but has had some; "
            "put one back, or start the run anew with --fresh"
        )
    _compare(folder.path, _described(folder), config, identity, options)
    _warn(f"{folder.path} holds a run that ended before its first checkpoint: it starts again from step 0")
    return "anew"


def _check_more(folder: RunDir, newest: Checkpoint | None, step_plan: StepPlan) -> None:
    """Raise UserError where a finished run that is asked for more, by --allow-change, would train nothing."""
    reason = None
    if newest is None:
        reason = "it has no checkpoint to go on from"
    elif newest.state.chain.ended_step is not None:
        reason = f"eval.patience has ended it at step {newest.state.chain.ended_step}"
    elif newest.step >= step_plan.total_steps:
        reason = f"it is at step {newest.step}, where the changed config ends: a larger optim.epochs or optim.max_steps goes on"
    if reason:
        raise UserError(
            f"the run in {folder.path} has finished, and the change trains nothing: {reason}; else another run.dir, or --fresh"
        )


def _asked_for(path: Path, hashing: Hashing | None) -> Checkpoint:
    if os.path.isdir(path / "checkpoints"):
        newest = _newest(CheckpointFolder(RunDir(path)), hashing)
        if newest is None:
            raise UserError(f"--resume {path}: this run has no checkpoint that can be used")
        return newest
    return open_or_refuse(path, hashing)


def _newest(checkpoints: CheckpointFolder, hashing: Hashing | None) -> Checkpoint | None:
    """The newest checkpoint that verifies. Those that do not are named."""
    latest, steps = checkpoints.pointer("latest"), checkpoints.steps()
    for path in steps:
        try:
            found = read_checkpoint(path, hashing)
        except DamagedError as error:
            _warn(f"{explain_damage(path, error)}; using the one before it")
            continue
        if latest != path.name:
            _warn(
                f"{checkpoints.path / 'latest'} says {latest or 'nothing'}; the newest that can be used is {path.name}"
            )
        return found
    return None


def _warn(message: str) -> None:
    notices.warning(message)


def _differences(saved: dict[str, Any], config: RunConfig) -> dict[str, str]:
    """By key: what the run began with, and what it says now. A key that came after the run began had its default."""
    before, now = flat_keys(saved), flat_keys(config.model_dump(mode="json"))
    before |= {key: default_of(key) for key in now.keys() - before.keys()}
    return {
        key: f"{key} {before.get(key)} -> {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }


class Described(Protocol):
    """What a run says of itself, in a checkpoint or in its folder."""

    config: dict[str, Any]
    engine: dict[str, Any]
    train: str
    eval: str | None
    watch: str | None


@dataclass
class _Described:
    config: dict[str, Any]
    engine: dict[str, Any]
    train: str
    eval: str | None
    watch: str | None = None


def _described(folder: RunDir) -> _Described:
    """What run.json says."""
    facts = folder.mine.facts
    return _Described(facts["config"], **facts["identity"])


def _ready(engine: Any, config: RunConfig) -> str:
    """Which ready DeepSpeed JSON does say it, for a message; nothing where none does."""
    for name in ready_configs():
        with contextlib.suppress(UserError):  # it is for another dtype
            if engine_facts(read_engine_config(config.model_copy(update={"deepspeed": name}))) == engine:
                return f", deepspeed={name} does"
    return ""


def _compare(
    where: Path, saved: Described, config: RunConfig, identity: Identity, options: ResumeOptions, finished: bool = False
) -> bool:
    """Raise UserError for a config under which a run would not have come to where it is. Returns whether --allow-change has let
    anything through."""
    known = flat_keys(config.model_dump(mode="json")).keys()
    for key in options.allow_change:
        if key not in known:
            raise UserError(f"--allow-change {key}: there is no such key")
    differences = _differences(saved.config, config)
    of_data = {key: text for key, text in differences.items() if key.startswith("data.")}
    changed = {key: text for key, text in differences.items() if not is_free(key) and not by_content(key)}
    let_through = False
    for split in ("train", "eval", "watch"):
        key, before, now = f"data.{split}", getattr(saved, split), getattr(identity, split)
        mine = {
            k: text for k, text in of_data.items() if k == key or k not in ("data.train", "data.eval", "data.watch")
        }
        if before != now and (mine.keys() | {key}) & set(options.allow_change):
            let_through = True
        elif before != now:
            changed |= mine or {key: f"{key}: its examples are not those that the run began with"}
    if saved.engine != identity.engine:
        changed["deepspeed"] = f"deepspeed: {config.deepspeed} does not say what the run began with" + _ready(
            saved.engine, config
        )
    refused = [text for key, text in changed.items() if key not in options.allow_change or is_fixed(key)]
    if refused:
        fixed = sorted(filter(is_fixed, changed))
        remedy = f"{', '.join(fixed)} cannot change within a run; " if fixed else ""
        allow = " ".join(f"--allow-change {key}" for key in changed if not is_fixed(key))
        if finished and not {"optim.epochs", "optim.max_steps"} & changed.keys():  # there would be nothing to do
            allow = ""
        remedy += f"to go on in spite of it: {allow}; " if allow and not fixed else ""
        raise UserError(
            f"the config has changed since {where}: {'; '.join(refused)} "
            f"({remedy}to start anew: another run.dir, or --fresh)"
        )
    return let_through or bool(changed)


def _check_base(folder: RunDir, config: RunConfig) -> None:
    """Raise UserError where a run that has finished was one of another base model, or of other links tied to it. A run that goes
    on is checked when its model is loaded.
    """
    held = folder.mine.facts
    hub_name = config.model.path == held["config"]["model"]["path"] and not Path(config.model.path).is_dir()
    base = held["base"] if hub_name else model_fingerprint(config.model)  # its weights need not be here any more
    if base != held["base"]:
        raise UserError(
            f"model.path {config.model.path} is not the base model of the run that has finished in {folder.path}: its "
            f"fingerprint is {base[:16]}, that run's {held['base'][:16]} (another run.dir, or --fresh)"
        )
    check_base_links(config, held["base_links"], f"the run in {folder.path} was finished")


def check_base_links(config: RunConfig, recorded: list[str] | None, when: str) -> None:
    """Raise UserError where what is tied to the base before the run's own links is not what was tied then."""
    earlier = find_earlier(config)
    if (None if earlier is None else earlier.hashes()) == recorded:
        return
    if earlier is None:
        raise UserError(
            f"model.links and model.adapter are not set, and when {when} one of them was; set it again "
            "(or another run.dir, or --fresh)"
        )
    raise UserError(
        f"{earlier.named} has other links than when {when}; put back what was there (a run that has begun needs it no more: "
        "it may be moved away), or another run.dir, or --fresh"
    )


def decided_knots(saved: SavedState) -> list[int]:
    """The knots that are not for the loss to place any more: of the links that are tied, whatever placed them then, and the one
    that is decided and comes next."""
    tied = saved.knots[: saved.chain.link - 1]
    return tied + [knot for knot in saved.chain.decided[len(tied) :] if knot == saved.chain.step]


def check_fits(saved_knots: list[int], link: int, step: int, step_plan: StepPlan) -> None:
    """Raise UserError when an allowed change moved a knot that is past, or put the run's end before where it is."""
    tied = saved_knots[: link - 1]
    if link > len(step_plan.knots) or list(step_plan.knots[: link - 1]) != tied:
        raise UserError(
            f"the run has tied links at steps {tied}, the changed config would at {list(step_plan.knots)}; "
            f"to keep its knots: chain.knots={{steps: {tied}}} --allow-change chain.knots, with those to come in the list; "
            "to start anew: another run.dir, or --fresh"
        )
    if step > step_plan.knots[link - 1]:
        raise UserError(
            f"the run is at step {step} of link {link}, which the changed config ends at {step_plan.knots[link - 1]}; "
            "let it end later, or start anew: another run.dir, or --fresh"
        )
