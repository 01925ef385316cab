"""`cola-ds plan`: what a run will need on a cluster, from its YAML and the model's config.json alone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from cola_ds.config.schema import RunConfig
from cola_ds.errors import UserError, counted, quoted
from cola_ds.evaluation.attention import shown_name
from cola_ds.plan.recommend import nodes_that_fit, recommend, smallest
from cola_ds.plan.run import FITS, LIBRARIES, OF_PEAK, Cluster, Plan, plan_run
from cola_ds.training.prepare import describe
from cola_ds.training.prepared import Described

_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_GIB = 2**30
_MOST = 9_999_999


def size_of(text: str, option: str, rate: bool = False) -> float:
    """Bytes, such as 80GiB or 1.5TB; with `rate` bytes a second, such as 50GB/s. Raises UserError, also without a unit, and for
    bits."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+) ?([KMGT]?i?)B" + ("/s" if rate else ""), str(text).strip())
    number = float(found[1]) * _UNITS.get(found[2], 0) if found else 0.0
    if not number or number == float("inf"):
        like = "50GB/s, in bytes a second" if rate else "80GiB"
        raise UserError(f"{option} {quoted(text)} must be a size like {like}")
    return number


def count_of(text: str, option: str) -> int:
    """A whole number from 1 to _MOST. Raises UserError."""
    word = str(text).strip()
    if not re.fullmatch("[0-9]{1,7}", word) or int(word) < 1:
        raise UserError(f"{option} {quoted(text)} must be a whole number from 1 to {_MOST:,}")
    return int(word)


def counts_of(text: str, option: str) -> list[int]:
    """Several, with commas between them. Raises UserError."""
    try:
        return [count_of(word, option) for word in str(text).split(",")]
    except UserError:
        raise UserError(f"{option} {quoted(text)} must be whole numbers from 1 to {_MOST:,}, such as 1,2,4") from None


def plan(config: RunConfig, cluster: Cluster, table: Sequence[int] = ()) -> tuple[str, str | None]:
    """What a run needs there, for people, and what keeps it from fitting, with what would; None: it fits. Raises UserError for a
    config that contradicts itself there."""
    described = describe(config)
    if table:
        clusters = [dataclasses.replace(cluster, nodes=nodes) for nodes in table]
        return _table(described, clusters)
    found = plan_run(described, cluster)
    lines = [*_head(found), *_memory(found), *_traffic(found), *_time(found)]
    choice = recommend(found)
    if found.fits:
        if choice is None:
            lines.append("recommended as it is")
        else:
            lines.append(f"recommended {' '.join(choice.overrides)}: {_needs(choice.plan)}, {_step(choice.plan)}")
        return "\n".join([*lines, *_assumed(found)]), None
    return "\n".join([*lines, *_assumed(found)]), _why_not(found)


def _why_not(found: Plan) -> str:
    cluster, choice, said = found.cluster, recommend(found), f"this does not fit: {_needs(found)}"
    if choice is not None:
        return f"{said}; with {' '.join(choice.overrides)} it does: {_needs(choice.plan)}"
    least, more = smallest(found), nodes_that_fit(found)
    if least is not None and least.overrides:
        said += f", and the least that it can do with is {_needs(least.plan)} ({' '.join(least.overrides)})"
    if more is not None:
        nodes, way = more
        return f"{said}; --nodes {nodes} would do" + (f" with {' '.join(way.overrides)}" if way.overrides else "")
    if found.total_device <= FITS * cluster.memory:
        plain = ", or chain.merge=plain, which keeps no remainders" if found.layout.remainder_bytes else ""
        return f"{said}; use nodes with more host memory, or fewer processes on each{plain}"
    return f"{said}; use devices with more memory, or a smaller data.max_length"


def _needs(plan: Plan) -> str:
    cluster = plan.cluster
    said = (
        f"{_gib(plan.total_device)} a process, of {_gib(cluster.memory * FITS)} ({FITS:.0%} of {_gib(cluster.memory)})"
    )
    if cluster.host_memory is not None or plan.layout.offload_param:
        said += f", and {_gib(plan.total_host)} of a node's host"
        said += f", which has {_gib(cluster.host_memory)}" if cluster.host_memory is not None else ""
    return said


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / 2**20:.1f} MiB"


def _head(plan: Plan) -> list[str]:
    config, cluster, layout, settled = plan.described.config, plan.cluster, plan.layout, plan.settled
    total, nodes = sum(layout.base.values()), counted(cluster.nodes, "node")
    stage = f"ZeRO stage {layout.stage}" + (f": {settled.stage_reason}" if settled.stage_reason else "")
    each = counted(cluster.per_node, "process", "processes")
    batch = f"{counted(config.optim.micro_batch_size, 'row')} of {plan.described.max_length} tokens"
    lines = [
        f"cluster     {nodes} x {each}, on {cluster.device} with {_gib(cluster.memory)}",
        f"model       {config.model.path} ({config.model.dtype}), {total:,} parameters",
        f"method      {config.method}, {layout.trained:,} trainable parameters at most",
        f"batch       {batch} x {counted(plan.micro_steps, 'micro step')} x {counted(cluster.processes, 'process', 'processes')}",
        f"engine      {stage}",
    ]
    if config.chain.plateau is not None and config.chain.length > 1:
        lines.insert(3, f"links       at most {config.chain.length}, which the loss ends")
    if layout.stage == 3 and cluster.nodes > 1:
        where = "in each node" if layout.in_nodes else "over all processes"
        lines.append(f"shards      {settled.shards_reason or where}")
    return lines


def _memory(plan: Plan) -> list[str]:
    cluster, memory = plan.cluster, plan.memory
    lines = ["", f"memory of a process, of {_gib(cluster.memory)}, {FITS:.0%} of which may be filled"]
    here = [*memory.device, *memory.host] if cluster.on_host else memory.device
    lines += [_line(line.what, line.bytes) for line in here]
    if cluster.on_host:
        lines.append(_line("Python and libraries", LIBRARIES // 4))
    lines.append(_line("in all", plan.total_device))
    if not cluster.on_host:
        lines += ["", "on the host, a process"]
        lines += [_line(line.what, line.bytes) for line in memory.host]
        lines.append(_line("Python and libraries", LIBRARIES))
    of = "" if cluster.host_memory is None else f" of {_gib(cluster.host_memory)}"
    return [*lines, f"a node's host: {_gib(plan.total_host)}{of}"]


def _line(what: str, size: int) -> str:
    return f"{size / 2**20:13,.1f} MiB  {what}"


def _traffic(plan: Plan) -> list[str]:
    knot_inside, knot_across = (0, plan.knot_bytes) if plan.cluster.nodes > 1 else (plan.knot_bytes, 0)
    return [
        "",
        "sent for a process, in bytes",
        f"  a step    {plan.inside:,} within its node, {plan.across:,} between nodes",
        f"  of it     {plan.gathered_bytes:,} base weights, {plan.trained_bytes:,} gradients and new values of what is trained",
        f"  a knot    {knot_inside:,} within its node, {knot_across:,} between nodes",
        f"checkpoint  {plan.checkpoint_bytes:,} bytes at most",
        "",
    ]


def _time(plan: Plan) -> list[str]:
    lines = [f"loading     {plan.load_s:.1f} s of reading"]
    seconds = plan.seconds
    if "computing" in seconds:
        lines.append(
            f"step        {_step(plan)}: " + ", ".join(f"{taken:.3g} s {what}" for what, taken in seconds.items())
        )
    else:
        said = ", ".join(f"{taken:.3g} s {what}" for what, taken in seconds.items())
        what = f"the peak of {plan.cluster.device}" if plan.peak is None else "the work of this model"
        lines.append(f"step        {said}; computing is not known, as {what} is not")
    return lines


def _step(plan: Plan) -> str:
    """The seconds of a step: where all overlaps, and where nothing does."""
    if "computing" not in plan.seconds:
        return "a step of unknown length"
    least, most = max(plan.seconds.values()), sum(plan.seconds.values())
    each = f"{least:.2f} s" if most < 1.05 * least else f"{least:.2f} to {most:.2f} s"
    return f"{each} a step, {plan.tokens / most:,.0f} tokens/s" + ("" if most < 1.05 * least else " at least")


def _assumed(plan: Plan) -> list[str]:
    cluster, config = plan.cluster, plan.described.config
    attention = "attention as flash attention keeps it"
    if config.model.attention == "eager":
        attention = f"attention {shown_name('eager')}"
    said = [
        f"every row has {plan.described.max_length} tokens, all of which are predicted",
        f"{attention}, torch's kernels (Liger's keep less)",
        *([f"{OF_PEAK:.0%} of the peak of {cluster.device}"] if plan.peak is not None else []),
        *([f"{cluster.host_link / 1e9:g} GB/s from the host to a device"] if plan.layout.offload_param else []),
        "rings: what a process gathers crosses each edge between nodes once, for all",
        f"{cluster.network / 1e9:g} GB/s between nodes, {cluster.node_network / 1e9:g} GB/s within one, "
        f"{cluster.disk / 1e9:g} GB/s from disk",
    ]
    return [f"assumed     {said[0]}", *(f"            {each}" for each in said[1:])]


def _table(described: Described, clusters: list[Cluster]) -> tuple[str, str | None]:
    columns = (
        "nodes", "processes", "stage, shards", "a process", "fits", "a node's host", "between nodes, GB a step and process",
        "step, s", "tokens/s",
    )  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    fits, wrong = False, None
    for cluster in clusters:
        begin = [str(cluster.nodes), str(cluster.processes)]
        try:
            plan = plan_run(described, cluster)
        except UserError as error:
            wrong = str(error)
            lines.append(f"| {' | '.join([*begin, f'no: {wrong}', *[''] * 6])} |")
            continue
        fits = fits or plan.fits
        where = "" if plan.layout.stage < 3 else ", node" if plan.layout.in_nodes else ", world"
        known = "computing" in plan.seconds
        most = sum(plan.seconds.values())
        cells = [
            *begin, f"{plan.layout.stage}{where}", _gib(plan.total_device), "yes" if plan.fits else "no", _gib(plan.total_host),
            f"{plan.across / 1e9:.3f}", f"{max(plan.seconds.values()):.2f} to {most:.2f}" if known else "?",
            f"{plan.tokens / most:,.0f}" if known else "?",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    if not fits:
        wrong = wrong or "it fits on none of these; without --table a plan says what would"
    return "\n".join(lines), None if fits else wrong
