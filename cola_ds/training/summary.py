"""A resolved run for people: what `--dry-run` says, and every start."""

from __future__ import annotations

import collections
from collections.abc import Iterator

from cola_ds.config.plateau import PlateauConfig, describe, longest_links
from cola_ds.config.switches import switches
from cola_ds.data.text import overlaps
from cola_ds.data.tokens import LOSSES
from cola_ds.errors import counted
from cola_ds.evaluation.attention import shown_name
from cola_ds.training.prepared import Prepared, count_trainable
from cola_ds.training.settle import remainder_bytes


def summarize(prepared: Prepared, world_size: int) -> str:
    """The resolved run, for people: links, knots, batches, parameters."""
    config, step_plan = prepared.config, prepared.step_plan
    optim = config.optim
    total = sum(p.numel() for p in prepared.skeleton.parameters())
    layers = f", {len(prepared.targets)} target layers" if config.trains_lora else ""
    order = prepared.order
    what = counted(optim.micro_batch_size, "example" if order.capacity is None else "row")
    what += "" if order.capacity is None else f" of {order.capacity} tokens"
    processes = counted(world_size, "process", "processes")
    batch = f"{what} x {counted(step_plan.micro_steps, 'micro step')} x {processes}"
    lines = [
        f"model       {config.model.path} ({config.model.dtype}), {total:,} parameters",
        f"method      {config.method}{layers}",
        f"data        {_of_data(prepared)}",
    ]
    if config.model.links is not None:
        lines.insert(1, f"links       those of {config.model.links}")
    if config.model.adapter is not None:
        lines.insert(1, f"links       that of {config.model.adapter}")
    if config.trains:
        lines.append(f"batch       {step_plan.global_batch_size} = {batch}")
        per_epoch = "per epoch" if step_plan.epochs.are_even else "in the first epoch"
        lines.append(f"steps       {step_plan.total_steps} ({step_plan.epochs.steps(0)} {per_epoch})")
    if config.trains_lora:
        remainders = remainder_bytes(prepared, world_size)
        kept = f", {remainders / 2**20:,.1f} MiB of host memory for remainders" if remainders else ""
        lines.append(f"knots       {config.chain.tie} ties, {config.chain.merge} merges{kept}")
    if config.trains_lora and (set_here := switches(config)):
        lines.append(f"switches    {', '.join(set_here)}")
    if config.trains_lora and config.chain.diagnostics:
        lines.append("diagnostics at each knot, to links.jsonl")
    if isinstance(config.chain.optimizer_at_knot, dict) and not optim.warmup_steps:
        lines.append(
            "warning     moments are pruned at knots without optim.warmup_steps; ReLoRA warms up after each, by 50 steps say"
        )
    plateau = config.chain.plateau if config.chain.length > 1 else None
    if plateau is not None:
        lines += _links_beforehand(prepared, plateau)
    for link, knot in enumerate(step_plan.knots, start=1) if config.trains and plateau is None else ():
        name = f"link {link:<7}" if config.trains_lora else "training    "
        steps = f"steps {knot - step_plan.link_steps(link) + 1}-{knot}"
        lines.append(f"{name}{steps}, {_what_is_trained(prepared, link)}")
    if prepared.stage_reason:
        stage = prepared.engine_config["zero_optimization"]["stage"]
        lines.append(f"engine      ZeRO stage {stage}: {prepared.stage_reason}")
    if prepared.nodes or prepared.shards_reason:
        where = prepared.shards_reason or f"in each of {counted(len(prepared.nodes or ()), 'node')}"
        lines.append(f"shards      {where}")
    compiled = ", compiled blocks" if config.model.compile and config.trains else ""
    kernels = "Liger's" if prepared.kernels else "torch's"
    lines.append(f"kernels     {kernels}; attention: {shown_name(prepared.attention)}{compiled}")
    lines.append(f"run folder  {config.run.dir}")
    return "\n".join(lines)


def _of_data(prepared: Prepared) -> str:
    """Rows by split, and what became of them."""
    config = prepared.config
    if prepared.test is not None:
        data = f"{prepared.test.task.name}: {prepared.sizes}"
    else:
        data = f"{len(prepared.train)} training examples"
        data += f", {len(prepared.held_out)} held out" if prepared.held_out is not None else ", none held out"
        data += f", {len(prepared.watched)} watched" if prepared.watched is not None else ""
    order, seed = prepared.order, config.run.seed
    if config.trains and order.capacity is not None:
        data += f", packed in {counted(order.count(seed, 0), 'row')}, {order.filled(seed):.1%} full"
    lost: collections.Counter[str] = collections.Counter()
    held_out = (
        None if config.data.holds_out else prepared.held_out
    )  # else `train` counts them all: they are of its rows
    for split in (prepared.train, held_out, prepared.watched, prepared.test):
        lost.update(split.lost if split is not None else {})
    if lost:
        counts = ", ".join(f"{lost[what]} lost {what}" for what in LOSSES if lost[what])
        data += f"; {counts}, too long for data.max_length"
    return data + "".join(f"; {what}" for what in _what_became_of(prepared))


def _links_beforehand(prepared: Prepared, plateau: PlateauConfig) -> Iterator[str]:
    """What is known beforehand of links that the loss ends."""
    config, step_plan = prepared.config, prepared.step_plan
    is_scored = prepared.test is not None and prepared.test.is_scored
    yield f"plateau     {describe(plateau, step_plan.least_steps, is_scored)}"
    every, epochs = config.eval.every, step_plan.epochs
    between = every if isinstance(every, int) else epochs.steps(0) if epochs.are_even else 1
    longest = longest_links(plateau, step_plan.least_steps, config.chain.length, step_plan.total_steps, between)
    if len(longest) == 1:
        yield (
            f"warning     the loss cannot end a link in {counted(step_plan.total_steps, 'step')}, of which each link has "
            f"{step_plan.least_steps} at least: there will be a single link"
        )
    for link, steps in enumerate(longest, start=1):
        yield f"link {link:<7}at most {counted(steps, 'step')}, {_what_is_trained(prepared, link)}"


def _what_is_trained(prepared: Prepared, link: int) -> str:
    config, said = prepared.config, f"{counted(count_trainable(prepared, link), 'trainable parameter')}"
    if not config.trains_lora:
        return said
    train = config.lora_trains[link - 1]
    alone = "" if train == "both" else f", {train} alone"
    return f"LoRA rank {config.lora_ranks[link - 1]}{alone}, {said}"


def _what_became_of(prepared: Prepared) -> Iterator[str]:
    """What else is to be known of the rows of text: left out, there twice, on both sides; and of the chat template."""
    if prepared.found is None:
        return
    counts = [tokens.counts for each in prepared.found.splits.values() for tokens in each]
    dropped = sum((each.dropped for each in counts), collections.Counter())
    yield from (f"{number} left out: {why}" for why, number in dropped.items())
    duplicates = sum(tokens.duplicates for each in prepared.found.splits.values() for tokens in each)
    if duplicates:
        yield f"{counted(duplicates, 'row')} there twice" + (
            ", and left out" if prepared.config.data.duplicates == "drop" else ""
        )
    yield from overlaps(prepared.found)
    yield from (
        f"{number} {what}" for what, number in sum((each.notes for each in counts), collections.Counter()).items()
    )
    yield from prepared.found.warnings
