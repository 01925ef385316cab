"""The memory of a process, line by line: what DeepSpeed 0.19.8 allocates (stage3.py, stage_1_and_2.py), what a micro step holds,
what a knot takes, and what the host keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cola_ds.plan.gathers import Gathers, Sizes, gathers
from cola_ds.plan.micro_step import MicroStep

_REUSE = _LIVE = 1_000_000_000  # DeepSpeed's own
_PREFETCH = 50_000_000
_STATES = {"adamw": 2, "adagrad": 1, "sgd": 0}
_TIE_PIECE = 2**22  # elements that a tie takes at once (lora/tie.py) ...
_TIE_COPIES = 7  # ... and how many fp32 copies of them it has


@dataclass(frozen=True)
class Line:
    """A share of the memory."""

    what: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a run's tensors lie: what of a config and its engine the memory follows from."""

    processes: int
    per_node: int
    stage: int
    in_nodes: bool
    offload_param: bool
    offload_optimizer: bool
    zero: Mapping[str, Any]
    """zero_optimization, with its sizes."""
    element_bytes: int
    gradient_bytes: int
    """Of an element of the gradients that are summed over micro steps."""
    optimizer: str
    full: bool
    trained: int
    """Elements that the link with most parameters trains."""
    targets: int
    """Elements of the target layers' base weights, and of the largest of them."""
    largest_target: int
    gathered_tie: bool
    remainder_bytes: int
    """Of an element of a target; 0: none is kept."""
    tied: int
    """Elements of A and B of all links but the last: each layer's are kept on the host of one process."""
    frozen: int = 0
    """Elements of the factors that are not trained, in the link that has most: on every process whole."""
    start_bytes: int = 0
    """Of what is there while products with the first gradient are found, where links start at its directions."""
    over_gloo: bool
    """On the CPU. A gather is there twice then, as was measured."""
    weights: Mapping[str, Sequence[tuple[int, int]]]
    """By module, an identity of each of its own weights of the base, and its elements."""

    @property
    def shared_by(self) -> int:
        """Processes that a shard of the base is one of."""
        if self.stage < 3:
            return 1
        return self.per_node if self.in_nodes else self.processes

    @property
    def sizes(self) -> Sizes:
        """The engine's, of DeepSpeed's own where neither the JSON nor the shapes say any."""

        def size(name: str, default: int) -> int:
            return int(self.zero.get(f"stage3_{name}", self.zero.get(name, default)))

        return Sizes(
            resident=size("param_persistence_threshold", 100_000),
            prefetch=size("prefetch_bucket_size", _PREFETCH),
            live=size("max_live_parameters", _LIVE),
            reuse=size("max_reuse_distance", _REUSE),
        )

    @property
    def base(self) -> dict[int, int]:
        """Elements of each weight of the base, a tied one once."""
        return {which: numel for module in self.weights.values() for which, numel in module}

    @property
    def resident(self) -> int:
        """Elements of the weights that stay whole within a step."""
        return sum(numel for numel in self.base.values() if numel <= self.sizes.resident)


@dataclass(frozen=True)
class Memory:
    """What a process needs, at its worst moment, where it computes and on its host."""

    device: list[Line]
    host: list[Line]
    gathers: Gathers | None
    """None below stage 3, and for a single process: nothing is gathered."""

    @property
    def device_bytes(self) -> int:
        return sum(line.bytes for line in self.device)

    @property
    def host_bytes(self) -> int:
        return sum(line.bytes for line in self.host)


def memory_of(layout: Layout, step: MicroStep, evaluation: MicroStep | None) -> Memory:
    """What a process of the run needs while it trains, evaluates, and at a knot."""
    device, host = _standing(layout)
    gathered = None
    if layout.stage == 3 and (layout.shared_by > 1 or layout.offload_param):
        gathered = gathers(step, layout.weights, layout.sizes, layout.element_bytes)
        if layout.over_gloo:
            device.append(Line("gloo's copy of the largest gather", max(layout.base.values()) * layout.element_bytes))
    passing = _passing(step, gathered)
    updating = [Line("at the update: gradients in fp32, and the optimizer's own", _update_bytes(layout))]
    tying = [Line("at a knot", _knot_bytes(layout))]
    evaluating = _evaluating(layout, evaluation, gathered is not None)
    starting = [*passing, Line("at a link's start: products with the first gradient", layout.start_bytes)]
    worst = max((passing, updating, tying, evaluating, starting), key=lambda lines: sum(line.bytes for line in lines))
    return Memory([line for line in (*device, *worst) if line.bytes], [line for line in host if line.bytes], gathered)


def _standing(layout: Layout) -> tuple[list[Line], list[Line]]:
    """What is there all the time, where it computes and on its host."""
    frozen = Line("A or B that is not trained, and where a link starts", layout.frozen * layout.element_bytes)
    device, host = [*_weights(layout), frozen], list[Line]()
    states = _STATES[layout.optimizer]
    mine = -(-layout.trained // layout.processes)
    bucket = int(layout.zero.get("reduce_bucket_size", 500_000_000)) * layout.element_bytes
    buffers = bucket * (2 if layout.stage < 3 and layout.zero.get("overlap_comm") else 1)
    optimizer = [
        Line("gradients, this process's part", mine * layout.gradient_bytes),
        Line("masters in fp32", 0 if layout.stage < 3 and layout.element_bytes == 4 else mine * 4),
        Line(f"{layout.optimizer}'s states", mine * 4 * states),
    ]
    (host if layout.offload_optimizer else device).extend(optimizer)
    device.append(Line("buffer in which gradients are summed", buffers))
    if layout.offload_param:
        shards = sum(-(-numel // layout.shared_by) for numel in layout.base.values()) * layout.element_bytes
        host.append(Line("base weights, in shards", shards))
    host.append(Line("tied links", -(-layout.tied // layout.processes) * layout.element_bytes))
    host.append(Line("remainders", layout.remainder_bytes * -(-layout.targets // layout.shared_by)))
    return device, host


def _weights(layout: Layout) -> list[Line]:
    size, base = layout.element_bytes, layout.base
    if layout.stage < 3:
        return [
            Line("base weights, whole", sum(base.values()) * size),
            Line("A and B", 0 if layout.full else layout.trained * size),
        ]
    shards = sum(-(-numel // layout.shared_by) for numel in base.values())
    several = layout.processes > 1
    return [
        Line("base weights, in shards", 0 if layout.offload_param else shards * size),
        Line("base weights that stay whole", layout.resident * size if layout.shared_by > 1 else 0),
        Line("A and B, whole", layout.trained * size if several and not layout.full else 0),
        Line("A and B, in shards", 0 if layout.full else -(-layout.trained // layout.processes) * size),
    ]


def _passing(step: MicroStep, gathered: Gathers | None) -> list[Line]:
    if gathered is None:
        return [Line("activations", step.kept), Line("loss, and what is there for a moment", step.peak - step.kept)]
    beside = gathered.peak - gathered.whole
    kept = min(step.kept, beside)
    return [
        Line("activations", kept),
        Line("loss, and what is there for a moment", beside - kept),
        Line("base weights, gathered", gathered.whole),
    ]


def _evaluating(layout: Layout, evaluation: MicroStep | None, gathers_weights: bool) -> list[Line]:
    if evaluation is None:
        return []
    largest = max(layout.base.values()) * layout.element_bytes
    lines = [Line("an evaluation", evaluation.peak)]
    return [*lines, Line("base weights, gathered", 2 * largest)] if gathers_weights else lines  # and the next one ahead


def _update_bytes(layout: Layout) -> int:
    """At the update of some of the masters at a time: sub_group_size at stage 3."""
    if layout.offload_optimizer:
        return 0
    at_once = -(-layout.trained // layout.processes)
    if layout.stage == 3:
        at_once = min(at_once, int(layout.zero.get("sub_group_size", 1_000_000_000)))
    return at_once * 4 * (1 if layout.optimizer == "adamw" else 2)  # AdamW's passes are fused


def _knot_bytes(layout: Layout) -> int:
    if layout.full:
        return 0
    piece = min(_TIE_PIECE, layout.largest_target) * 4 * _TIE_COPIES
    return piece + (layout.largest_target * layout.element_bytes if layout.gathered_tie else 0)
