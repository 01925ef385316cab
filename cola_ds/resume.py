"""How a run starts: anew, from a checkpoint, or not at all because it is finished. And the way back from a checkpoint.

`choose_start` is process 0's decision, from files alone. `restore_model` and `restore_optimizer` are collective: process 0
reads, and sends to the others.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cola_ds import processes, zero
from cola_ds.checkpoint import (
    Checkpoint,
    CheckpointFolder,
    DamagedError,
    explain_damage,
    open_or_refuse,
    read_checkpoint,
)
from cola_ds.config import RunConfig, Timetable, flat_keys, is_free
from cola_ds.errors import UserError
from cola_ds.fingerprint import model_fingerprint
from cola_ds.learnt import read_learnt
from cola_ds.lora import inject, lora_layers, start_link
from cola_ds.rundir import RunFolder, read_link
from cola_ds.tie import tie_link

# Compared by what they name, which data.* is as well.
_BY_CONTENT = ("model.path", "deepspeed")
# Keys that the tied links and the optimizer's state were made with: not even --allow-change lets them through.
_FIXED = {
    "method", "model.dtype", "lora.rank", "lora.alpha", "lora.targets", "lora.bias", "chain.merge", "optim.name",
}  # fmt: skip
# Masters, and the moments of torch's AdamW and AdaGrad.
_KINDS = {"master", "exp_avg", "exp_avg_sq", "sum"}
# Facts about the engine's log, not about its numbers.
_ENGINE_LOG = {
    "tensorboard", "wandb", "csv_monitor", "comet", "comms_logger", "dump_state", "flops_profiler", "log_level",
    "memory_breakdown", "steps_per_print", "timers", "wall_clock_breakdown",
}  # fmt: skip


@dataclass(frozen=True)
class Wish:
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


def engine_facts(engine_json: dict[str, Any]) -> dict[str, Any]:
    """The DeepSpeed JSON without what cannot change a result."""
    return {key: value for key, value in engine_json.items() if key not in _ENGINE_LOG}


def choose_start(
    folder: RunFolder, config: RunConfig, identity: Identity, wish: Wish, timetable: Timetable
) -> Checkpoint | str:
    """The checkpoint to go on from, or "anew", or "finished".

    Raises UserError when the folder holds another run, a config that has changed, checkpoints of which none verifies, or a result
    that is not the run's own.
    """
    if wish.fresh and wish.resume not in ("auto", "never"):
        raise UserError(f"--fresh starts anew, --resume {wish.resume} goes on: give one of them")
    if wish.fresh or wish.resume == "never" or (wish.resume == "auto" and not folder.holds_a_run()):
        folder.check_is_free(config, wish.fresh)
        return "anew"
    checkpoints = CheckpointFolder(folder)
    folder.check_is_ours(config)
    if wish.resume != "auto":
        found = _asked_for(Path(wish.resume))
        here = found.path.resolve().parent == checkpoints.path.resolve()
        if here or not checkpoints.ever_written():
            _compare(found.path, found.state, config, identity, wish)
            return found
        _warn(f"{folder.path} has checkpoints of its own: it goes on from them, and not from {found.path}")
    more = False
    if (folder.path / "result.json").exists():
        read_learnt(folder.path)
        more = _compare(folder.path, _described(folder), config, identity, wish, finished=True)
        _check_base(folder, config)
        if not more:
            return "finished"
    newest = _newest(checkpoints)
    if newest is not None:
        _compare(newest.path, newest.state, config, identity, wish)
    if more:
        _check_more(folder, newest, timetable)
    if newest is not None:
        return newest
    if checkpoints.ever_written():
        raise UserError(
            f"run.dir {folder.path} has no checkpoint that can be used, but has had some; "
            "put one back, or start the run anew with --fresh"
        )
    _compare(folder.path, _described(folder), config, identity, wish)
    _warn(f"{folder.path} holds a run that ended before its first checkpoint: it starts again from step 0")
    return "anew"


def _check_more(folder: RunFolder, newest: Checkpoint | None, timetable: Timetable) -> None:
    """Raise UserError where a finished run that is asked for more, by --allow-change, would train nothing."""
    reason = None
    if newest is None:
        reason = "it has no checkpoint to go on from"
    elif newest.state.chain.ended_step is not None:
        reason = f"eval.patience has ended it at step {newest.state.chain.ended_step}"
    elif newest.step >= timetable.total_steps:
        reason = f"it is at step {newest.step}, where the changed config ends: a larger optim.epochs or optim.max_steps goes on"
    if reason:
        raise UserError(
            f"the run in {folder.path} has finished, and the change trains nothing: {reason}; else another run.dir, or --fresh"
        )


def _asked_for(path: Path) -> Checkpoint:
    if os.path.isdir(path / "checkpoints"):
        newest = _newest(CheckpointFolder(RunFolder(path)))
        if newest is None:
            raise UserError(f"--resume {path}: this run has no checkpoint that can be used")
        return newest
    return open_or_refuse(path)


def _newest(checkpoints: CheckpointFolder) -> Checkpoint | None:
    """The newest checkpoint that verifies. Those that do not are named."""
    latest, steps = checkpoints.pointer("latest"), checkpoints.steps()
    for path in steps:
        try:
            found = read_checkpoint(path)
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
    print(f"cola-ds: warning: {message}", file=sys.stderr, flush=True)


def _differences(saved: dict[str, Any], config: RunConfig) -> dict[str, str]:
    """By key: what the run began with, and what it says now."""
    before, now = flat_keys(saved), flat_keys(config.model_dump(mode="json"))
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


@dataclass
class _Described:
    config: dict[str, Any]
    engine: dict[str, Any]
    train: str
    eval: str | None


def _described(folder: RunFolder) -> _Described:
    """What run.json says."""
    facts = folder.mine.facts
    return _Described(facts["config"], **facts["identity"])


def _compare(
    where: Path, saved: Described, config: RunConfig, identity: Identity, wish: Wish, finished: bool = False
) -> bool:
    """Raise UserError for a config under which a run would not have come to where it is. Returns whether --allow-change has let
    anything through."""
    known = flat_keys(config.model_dump(mode="json")).keys()
    for key in wish.allow_change:
        if key not in known:
            raise UserError(f"--allow-change {key}: there is no such key")
    differences = _differences(saved.config, config)
    of_data = {key: text for key, text in differences.items() if key.startswith("data.")}
    changed = {
        key: text
        for key, text in differences.items()
        if not is_free(key) and key not in _BY_CONTENT and key not in of_data
    }
    let_through = False
    for key, before, now in (("data.train", saved.train, identity.train), ("data.eval", saved.eval, identity.eval)):
        mine = {k: text for k, text in of_data.items() if k == key or k not in ("data.train", "data.eval")}
        if before != now and (mine.keys() | {key}) & set(wish.allow_change):
            let_through = True
        elif before != now:
            changed |= mine or {key: f"{key}: its examples are not those that the run began with"}
    if saved.engine != identity.engine:
        changed["deepspeed"] = f"deepspeed: {config.deepspeed} does not say what the run began with"
    refused = [text for key, text in changed.items() if key not in wish.allow_change or key in _FIXED]
    if refused:
        fixed = sorted(_FIXED & changed.keys())
        remedy = f"{', '.join(fixed)} cannot change within a run; " if fixed else ""
        allow = " ".join(f"--allow-change {key}" for key in changed if key not in _FIXED)
        if finished and not {"optim.epochs", "optim.max_steps"} & changed.keys():  # there would be nothing to do
            allow = ""
        remedy += f"to go on in spite of it: {allow}; " if allow and not fixed else ""
        raise UserError(
            f"the config has changed since {where}: {'; '.join(refused)} "
            f"({remedy}to start anew: another run.dir, or --fresh)"
        )
    return let_through or bool(changed)


def _check_base(folder: RunFolder, config: RunConfig) -> None:
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
    if links_of(config) != held["base_links"]:
        raise UserError(
            f"model.links {config.model.links} has other links than when the run in {folder.path} was finished "
            "(another run.dir, or --fresh)"
        )


def links_of(config: RunConfig) -> list[str] | None:
    """The hashes of the links that are tied to the base before anything else; None where there are none."""
    return None if config.model.links is None else read_learnt(config.model.links).link_hashes


def check_fits(saved_knots: list[int], link: int, step: int, timetable: Timetable) -> None:
    """Raise UserError when an allowed change moved a knot that is past, or put the run's end before where it is."""
    tied = saved_knots[: link - 1]
    if link > len(timetable.knots) or list(timetable.knots[: link - 1]) != tied:
        raise UserError(
            f"the run has tied links at steps {tied}, the changed config would at {list(timetable.knots)}; "
            f"to keep its knots: chain.knots={{steps: {tied}}} --allow-change chain.knots, with those to come in the list; "
            "to start anew: another run.dir, or --fresh"
        )
    if step > timetable.knots[link - 1]:
        raise UserError(
            f"the run is at step {step} of link {link}, which the changed config ends at {timetable.knots[link - 1]}; "
            "let it end later, or start anew: another run.dir, or --fresh"
        )


# -- the way back ------------------------------------------------------------------------------------------------------


def restore_model(
    model: nn.Module, config: RunConfig, link: int, found: Checkpoint | None, remainders: dict[str, Tensor]
) -> None:
    """Tie the links before `link` again, in order, and give the trained parameters their values. Before the engine is built.

    The same arithmetic as at the knots, on the same shards: the same bits. `found` is None on every process but 0.
    """
    device = processes.device()
    processes.on_process_0(lambda: _check_links(model, config, link, found))
    exact = config.chain.merge == "exact"
    for past in range(1, link):
        tensors = read_link(found.link_path(past)) if found else {}
        lora_rank = config.lora_ranks[past - 1]
        _tie_again(
            model, lora_rank, config.lora.alpha / lora_rank, tensors, remainders, config.chain.tie == "local", exact
        )
    if config.trains_lora:
        start_link(model, link, config.lora_ranks[link - 1], config.lora.alpha, config.run.seed, device)
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    processes.on_process_0(lambda: _check_shapes(found, params))
    with torch.no_grad():
        for name, _, whole in _from_process_0(found, params, "master"):
            part, start = zero.own_part(params[name])
            part.copy_(whole[start : start + part.numel()])


def _tie_again(
    model: nn.Module, lora_rank: int, scaling: float, tensors: dict[str, Tensor], remainders: dict[str, Tensor],
    local: bool, exact: bool, last: bool = False,
) -> None:  # fmt: skip
    """Tie a link that process 0 has read, as the run did. Collective."""
    for name, layer in lora_layers(model).items():
        lora_A, lora_B = (
            processes.tensor_from_process_0(tensors.get(f"{name}.lora_{which}.weight"), count).view(shape)
            for which, shape in (("A", (lora_rank, layer.in_features)), ("B", (layer.out_features, lora_rank)))
            for count in [shape[0] * shape[1]]
        )
        layer.reset(lora_A, scaling, processes.device())
        layer.lora_B.data.copy_(lora_B)
    tie_link(model, remainders, local=local, exact=exact, last=last, keep_tensors=False)


def tie_run(model: nn.Module, run: str, base: str, reads: bool) -> None:
    """Give a run's base model, whose fingerprint is `base`, all that the run has learnt, and freeze it. Collective; the links are
    what process 0, which alone `reads`, finds.

    Raises UserError for a run that has not finished, a link that has changed, or another base model.
    """
    facts = processes.on_process_0(lambda: _facts_of_run(run, base))
    inject(model, facts["layers"], dropout=0.0, train_bias=False)
    remainders: dict[str, Tensor] = {}
    for link in facts["links"]:
        tensors = read_link(Path(link["file"])) if reads else {}
        last = link is facts["links"][-1]
        _tie_again(model, link["lora_rank"], link["scaling"], tensors, remainders, facts["local"], facts["exact"], last)
    if facts["biases"]:  # the last link's are the run's
        for name, layer in lora_layers(model).items():
            if layer.bias is not None:
                bias = processes.tensor_from_process_0(tensors.get(f"{name}.base_layer.bias"), layer.out_features)
                with zero.gathered([layer.bias], write=True):
                    part = zero.written_part(layer.bias)
                    part.copy_(bias[: part.numel()])
    model.requires_grad_(False)


def _facts_of_run(run: str, base: str) -> dict[str, Any]:
    learnt = read_learnt(run)
    config, links = learnt.config, learnt.links
    if not links:
        raise UserError(f"model.links {run} has no links: its method is {config.method}")
    if learnt.base != base:
        raise UserError(
            f"model.links {run} belongs to another base model: its fingerprint is {learnt.base[:16]}, model.path's {base[:16]}"
        )
    return {
        "links": [{"file": str(k.file), "lora_rank": k.lora_rank, "scaling": k.scaling} for k in links],
        "layers": links[0].layers,
        "local": config.chain.tie == "local",
        "exact": config.chain.merge == "exact",
        "biases": config.lora.bias == "lora_only",
    }


def _check_links(model: nn.Module, config: RunConfig, link: int, found: Checkpoint | None) -> None:
    assert found is not None
    for past in range(1, link):
        lora_rank = config.lora_ranks[past - 1]
        expected: dict[str, tuple[int, ...]] = {}
        for name, layer in lora_layers(model).items():
            expected[f"{name}.lora_A.weight"] = (lora_rank, layer.in_features)
            expected[f"{name}.lora_B.weight"] = (layer.out_features, lora_rank)
        shapes = {name: tuple(tensor.shape) for name, tensor in read_link(found.link_path(past)).items()}
        _refuse_misfit(found.link_path(past), {k: v for k, v in shapes.items() if not k.endswith(".bias")}, expected)


def _check_shapes(found: Checkpoint | None, params: dict[str, nn.Parameter]) -> None:
    assert found is not None
    shapes = found.shapes()
    kinds = {key.partition("/")[0] for key in shapes} | {"master"}
    if not kinds <= _KINDS:
        raise UserError(
            f"checkpoint {found.path} holds {', '.join(sorted(kinds - _KINDS))}, which no optimizer here keeps"
        )
    sizes = {name: tuple(getattr(param, "ds_shape", param.shape)) for name, param in params.items()}
    _refuse_misfit(found.path, shapes, {f"{kind}/{name}": size for kind in kinds for name, size in sizes.items()})


def _refuse_misfit(path: Path, shapes: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    wrong = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
    if wrong:
        raise UserError(
            f"checkpoint {path} does not fit the model: it has {wrong[0]} of shape {shapes.get(wrong[0])}, "
            f"the model wants {expected.get(wrong[0])}"
        )


def _from_process_0(found: Checkpoint | None, params: dict[str, nn.Parameter], kind: str | None) -> Any:
    """Name, kind and whole values (flat, fp32, on the device) of the trained tensors; of one kind if it is given. Collective."""
    keys = processes.from_process_0(list(found.shapes()) if found else None)
    held = found.trained() if found else None
    for expected in keys:
        key, tensor = next(held) if held else (expected, None)
        assert key == expected
        this, _, name = key.partition("/")
        if kind in (None, this):
            yield name, this, processes.tensor_from_process_0(tensor, zero.numel(params[name]))


def restore_optimizer(engine: zero.Engine, scalars: dict[str, float], found: Checkpoint | None) -> None:
    """Give a new engine the masters, moments and step counts that the checkpoint's had."""
    params = zero.trained(engine)
    for name, kind, whole in _from_process_0(found, params, None):
        zero.set_trained_tensor(engine, kind, params[name], whole)
    zero.set_optimizer_scalars(engine, scalars)
