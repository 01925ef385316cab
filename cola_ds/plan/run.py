"""A run on a cluster that is not there yet: what it needs, what it sends, and how long a step takes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from cola_ds.config.deepspeed_json import check_compilable
from cola_ds.config.dtypes import DTYPES
from cola_ds.config.plateau import least_steps
from cola_ds.config.steps import Epochs, micro_steps_of, place_knots, rows_per_step, with_longest_chain
from cola_ds.data.batch import StepExamples
from cola_ds.distributed.devices import KNOWN, peak_tflops
from cola_ds.errors import UserError, quoted
from cola_ds.evaluation.attention import VARLEN
from cola_ds.lora.starts import sketch_width
from cola_ds.lora.targets import sizes_of
from cola_ds.plan.memory import Layout, Memory, memory_of
from cola_ds.plan.micro_step import MicroStep, trace
from cola_ds.training.prepared import Described, frozen_of_links, tied_of_links, trained_of_links
from cola_ds.training.settle import Settled, bytes_a_remainder, settle
from cola_ds.training.work import work_of

FITS = 0.9
"""How much of a device's memory a plan may fill: the rest is CUDA's and NCCL's, and lost between blocks."""
OF_PEAK = 0.4
"""What a step reaches of a device's peak: 0.39 was seen on an H200 at Llama-3-8B's shapes with torch's kernels, 0.48 with Liger's
(launch/README.md)."""
LIBRARIES = 2 * 2**30
"""Host memory of a process for Python, torch and CUDA's libraries."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What the run is planned for; bytes, and bytes a second."""

    nodes: int
    per_node: int
    """Processes, each with a device of its own; on the CPU they share the node's memory."""
    device: str
    """Its name as torch gives it, such as H100; cpu."""
    memory: int
    """Of a device."""
    host_memory: int | None
    """Of a node."""
    network: float
    """Of a node, each way."""
    node_network: float
    """Of a device to the others of its node, each way."""
    disk: float
    """At which a node reads files."""
    host_link: float = 25e9
    """Of a device to its host, where weights are offloaded."""

    @property
    def processes(self) -> int:
        return self.nodes * self.per_node

    @property
    def on_host(self) -> bool:
        return self.device == "cpu"

    def memory_of_a_process(self) -> tuple[int, int]:
        """Where it computes, and on its host."""
        host = 2**62 if self.host_memory is None else self.host_memory // self.per_node
        return (self.memory, host)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run needs there."""

    described: Described
    cluster: Cluster
    settled: Settled
    layout: Layout
    memory: Memory
    micro_steps: int
    gathered_bytes: int
    """Of base weights, by a process in a step."""
    trained_bytes: int
    """Of gradients of what is trained and its new values, by a process in a step."""
    knot_bytes: int
    flops: float | None
    """Of a step on one device; None: not known (a model with experts)."""
    peak: float | None
    """FLOP/s of the device; None: not known."""

    @property
    def total_device(self) -> int:
        """Of a process where it computes; on the CPU that is all."""
        return self.memory.device_bytes + (self.memory.host_bytes + LIBRARIES // 4 if self.cluster.on_host else 0)

    @property
    def total_host(self) -> int:
        """Of a node's host."""
        each = self.total_device if self.cluster.on_host else self.memory.host_bytes + LIBRARIES
        return each * self.cluster.per_node

    @property
    def fullness(self) -> float:
        """How much of what may be filled it fills, of device or host, whichever is fuller; it fits up to 1."""
        device, host = self.total_device / self.cluster.memory, self.cluster.host_memory
        return max(device, 0 if host is None else self.total_host / host) / FITS

    @property
    def fits(self) -> bool:
        return self.fullness <= 1

    @property
    def across(self) -> int:
        """Bytes that a process has to do with between nodes in a step."""
        if self.cluster.nodes == 1:
            return 0
        return self.trained_bytes + (0 if self.layout.in_nodes else self.gathered_bytes)

    @property
    def inside(self) -> int:
        """And within its node."""
        if self.cluster.nodes == 1:
            return self.trained_bytes + self.gathered_bytes if self.cluster.processes > 1 else 0
        return self.gathered_bytes if self.layout.in_nodes else 0

    @property
    def seconds(self) -> dict[str, float]:
        """What a step takes of each, were there nothing else: computing (if it is known) and sending."""
        cluster, found = self.cluster, {}
        everyone = (cluster.processes - 1) / cluster.processes
        if self.flops is not None and self.peak is not None:
            found["computing"] = self.flops / (OF_PEAK * self.peak)
        # A ring over all of them carries what each gathers once over every edge, also between two nodes.
        found["between nodes"] = self.across * everyone / cluster.network
        among = (cluster.per_node - 1) / cluster.per_node
        found["within a node"] = self.inside * among / cluster.node_network
        if self.layout.offload_param:
            found["from the host"] = self.gathered_bytes / self.layout.shared_by / cluster.host_link
        return found

    @property
    def tokens(self) -> int:
        return rows_per_step(self.described.config) * self.described.max_length

    @property
    def load_s(self) -> float:
        """To read the base from disk: a node its processes' shards, or all of it."""
        held = getattr(self.described.skeleton.config, "dtype", None) or torch.bfloat16  # as the files have it
        base = sum(self.layout.base.values()) * held.itemsize
        share = 1.0 if self.layout.stage < 3 or self.layout.in_nodes else 1 / self.cluster.nodes
        return base * share / self.cluster.disk

    @property
    def checkpoint_bytes(self) -> int:
        """Of the largest one: masters, moments, and every link before."""
        links, size = trained_of_links(self.described), self.layout.element_bytes
        tied, frozen = tied_of_links(self.described), frozen_of_links(self.described)
        if not self.described.config.trains_lora:
            return 12 * links[0]
        before = itertools.accumulate([0, *tied[:-1]])
        return max(12 * link + size * (own + past) for link, own, past in zip(links, frozen, before, strict=True))


def plan_run(described: Described, cluster: Cluster) -> Plan:
    """Plan it. Raises UserError for a config that contradicts itself there, and for a model that cannot be traced."""
    config = described.config
    if not config.trains:
        raise UserError(f"method {config.method} trains nothing; a plan is of training: lora, cola or full")
    if cluster.device != "cpu" and peak_tflops(cluster.device, "fp32") is None:
        raise UserError(f"--device {quoted(cluster.device)} is not known; use cpu or one of {', '.join(KNOWN)}")
    micro_steps = micro_steps_of(config, cluster.processes)
    _check_knots(described)
    described = _with_longest_chain(described)
    check_compilable(config, described.engine_json["zero_optimization"]["stage"])
    hosts = [f"node {node}" for node in range(cluster.nodes) for _ in range(cluster.per_node)]
    settled = settle(
        described, described.engine_json["zero_optimization"], micro_steps, described.max_length, hosts,
        cluster.memory_of_a_process, cluster.on_host,
    )  # fmt: skip
    layout = _layout(described, cluster, settled)
    memory = memory_of(layout, _micro_step(described, cluster), _evaluation(described, cluster))
    gathered = 0
    if memory.gathers is not None:  # in each micro step; and once a step what stays whole within it
        gathered = (memory.gathers.moved * micro_steps + layout.resident) * layout.element_bytes
    trained = layout.trained * layout.element_bytes
    several = cluster.processes > 1
    knot = trained * (2 if layout.in_nodes else 1) + (
        2 * layout.targets * layout.element_bytes if layout.gathered_tie else 0
    )
    peak = peak_tflops(cluster.device, config.model.dtype)
    return Plan(
        described=described, cluster=cluster, settled=settled, layout=layout, memory=memory, micro_steps=micro_steps,
        gathered_bytes=gathered, trained_bytes=2 * trained if several else 0,
        knot_bytes=knot if several and config.trains_lora else 0,
        flops=_flops(described, cluster), peak=None if peak is None else peak * 1e12,
    )  # fmt: skip


def _check_knots(described: Described) -> None:
    """Raise UserError for knots that cannot be placed, as far as that is known without data."""
    chain, steps, size = described.config.chain, described.config.optim.max_steps, rows_per_step(described.config)
    if steps is not None and (chain.knots == "even" or "steps" in chain.knots):
        place_knots(chain.knots, chain.length, steps, Epochs(size * steps, size))


def _with_longest_chain(described: Described) -> Described:
    """Where the loss places the knots, the links that can begin, as far as that is known without data."""
    config = described.config
    if config.chain.plateau is None or config.optim.max_steps is None:
        return described
    least = least_steps(config.chain.plateau, config.eval.every, lambda: 1)  # an epoch has one step at least
    return replace(described, config=with_longest_chain(config, least, config.optim.max_steps))


def _layout(described: Described, cluster: Cluster, settled: Settled) -> Layout:
    config, zero, skeleton = described.config, settled.zero, described.skeleton
    size = DTYPES[config.model.dtype].element_bytes
    targets = [skeleton.get_submodule(name).weight.numel() for name in described.targets]
    links = trained_of_links(described)
    accumulates = described.engine_json.get("data_types", {}).get("grad_accum_dtype")
    weights = {
        name: [(id(weight), weight.numel()) for weight in module.parameters(recurse=False)]
        for name, module in skeleton.named_modules()
    }

    def offloads(key: str) -> bool:
        return (zero.get(key) or {}).get("device", "none") == "cpu"

    return Layout(
        processes=cluster.processes, per_node=cluster.per_node, stage=zero["stage"], in_nodes=settled.nodes is not None,
        offload_param=offloads("offload_param"), offload_optimizer=offloads("offload_optimizer"), zero=zero, element_bytes=size,
        gradient_bytes={"fp32": 4, "bf16": 2, "fp16": 2}.get(accumulates, size), optimizer=config.optim.name,
        full=config.method == "full", trained=max(links), tied=sum(tied_of_links(described)[:-1]),
        frozen=max(frozen_of_links(described)), start_bytes=_start_bytes(described),
        targets=sum(targets), largest_target=max(targets, default=0), gathered_tie=config.chain.tie == "gathered",
        remainder_bytes=bytes_a_remainder(config), over_gloo=cluster.on_host,
        weights={name: own for name, own in weights.items() if own},
    )  # fmt: skip


def _start_bytes(described: Described) -> int:
    """Of the product with the gradient of each target layer and what is multiplied by it, which stand side by side in fp32; and
    of what one layer has for a moment: its inputs and their gradients in fp32, and what a micro batch adds to its product. Where
    the output head is one of them, what its loss has of the logits on the way back, three times in fp32."""
    config, skeleton = described.config, described.skeleton
    if config.lora.init != "gradient" or not config.trains_lora:
        return 0
    tokens = config.optim.micro_batch_size * described.max_length
    copied = tokens if DTYPES[config.model.dtype].element_bytes < 4 else 0
    held, moment = 0, 0
    for name in described.targets:
        sizes = sizes_of(skeleton.get_submodule(name))
        k = sketch_width(max(config.lora_ranks), sizes)
        held += 4 * k * sum(sizes)
        moment = max(moment, 4 * copied * sum(sizes) + 4 * k * (tokens + max(sizes)))
        if skeleton.get_submodule(name) is skeleton.get_output_embeddings():
            held += 3 * 4 * tokens * sizes[1]
    return held + moment


def _micro_step(described: Described, cluster: Cluster) -> MicroStep:
    model = described.config.model
    facts = _Facts(described, "cpu" if cluster.on_host else "cuda", model.activation_checkpointing)
    return _traced(facts, described.config.optim.micro_batch_size)


def _evaluation(described: Described, cluster: Cluster) -> MicroStep | None:
    """The forward pass of an evaluation with more rows than a micro step; None where there is none, or it has no more."""
    config = described.config
    rows = config.eval.batch_size
    held_out = config.data.task is not None or config.data.eval is not None or config.data.holds_out
    held_out = held_out or config.data.watch is not None
    if not held_out or rows is None or rows <= config.optim.micro_batch_size:
        return None
    return _traced(_Facts(described, "cpu" if cluster.on_host else "cuda", False), rows, trains=False)


class _Facts:
    """What a trace depends on beside its rows; equal where a trace would be."""

    def __init__(self, described: Described, device: str, recomputes: bool):
        self.described, self.device, self.recomputes = described, device, recomputes

    def _key(self) -> tuple[Any, ...]:
        return (id(self.described.skeleton), self.described.max_length, self.device, self.recomputes)

    def __hash__(self) -> int:
        return hash(self._key())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Facts) and self._key() == other._key()


@lru_cache(maxsize=64)
def _traced(facts: _Facts, rows: int, trains: bool = True) -> MicroStep:
    config = facts.described.config
    joined = config.data.task is None and config.model.attention in ("auto", "varlen")
    return trace(
        facts.described.skeleton, facts.described.targets, max(config.lora_ranks) if config.trains_lora else None,
        (rows, facts.described.max_length), attention=VARLEN if joined else config.model.attention,
        dtype=getattr(torch, DTYPES[config.model.dtype].torch_name), dropout=config.lora.dropout,
        biases=config.lora.bias == "lora_only", recomputes=facts.recomputes, device=facts.device,
        trains=trains, started=config.starts_elsewhere,
    )  # fmt: skip


def _flops(described: Described, cluster: Cluster) -> float | None:
    config = described.config
    rows, width = rows_per_step(config), described.max_length
    examples = StepExamples(
        micro_batches=[], examples=rows, tokens=rows * width, loss_tokens=rows * (width - 1), predictions=rows * (width - 1),
        indices=[], lengths=[width] * rows,
    )  # fmt: skip
    try:
        work = max(link.of(examples) for link in work_of(described))
    except ValueError:
        return None
    again = (4 / 3 if config.method == "full" else 1.5) if config.model.activation_checkpointing else 1.0
    return work * again / cluster.processes
