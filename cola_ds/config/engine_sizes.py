"""ZeRO's stage and sizes: what follows for DeepSpeed from a model's shapes, for all that the JSON leaves out.

DeepSpeed's own sizes are made for pretraining large models. What they cost where the base is frozen (read in 0.19.8):

- A weight that is not resident ("persistent") is gathered anew in every micro step, and in each pass of it where the next use is
  more than stage3_max_reuse_distance elements away. Gathered together with others, as a prefetch does, it is copied twice more.
- A resident one is gathered once a step, frozen or not: each step parts all of them, and gathers them again one by one at its
  end, where nothing is computed meanwhile. That pays where a step has several micro steps.
- A contiguous buffer of reduce_bucket_size elements is allocated, however few are trained.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cola_ds.errors import some_of

SHARE = 0.7
"""How much of a process's memory the estimate of stage 2 may fill: it knows neither fragmentation nor what else is held."""
_PERSISTENT = 100_000  # elements; this and the next ones are DeepSpeed's own values (0.19.8)
_REUSE = _LIVE = 1_000_000_000
_BUCKET = 500_000_000
_KEPT_PER_WIDTH = 1.5  # beside in- and outputs of linear layers: norms, activation functions, residuals
_TRAINED_BYTES = (
    24  # an element of A or B, its gradient in model dtype and fp32, the fp32 master, two moments, the bucket
)


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What of a model's shapes, and of what is trained, the engine's sizes follow from. All but the last are elements."""

    weights: tuple[int, ...]
    """Each parameter with two dimensions or more, a tied one once."""
    vectors: tuple[int, ...]
    """Each bias and norm."""
    adapter: int
    """The largest A or B of any link; 0 where no adapter is trained."""
    trained: int
    """What is trained in the link that trains most."""
    frozen: int = 0
    """Factors that are not, in the link that has most of them."""
    targets: int
    """The base weights of the target layers."""
    width: int
    """In- and outputs of all linear layers, for one token: about what a forward pass keeps for the backward pass."""
    vocabulary: int
    hidden: int
    blocks: int
    """Transformer blocks."""

    @property
    def total(self) -> int:
        return sum(self.weights) + sum(self.vectors)


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes that a process needs at stage 2: where it computes, and on its host."""

    device: int
    host: int
    remainders: int = 0
    """Of what the host needs."""


def need(
    shapes: Shapes, element_bytes: int, tokens: int, *, recomputes: bool = False, remainder_bytes: int = 0
) -> Need:
    """What one process needs at stage 2, estimated with care: whole base weights, the adapters' states as if they were not
    sharded, and activations of a micro batch of `tokens` tokens.

    `recomputes`: activation checkpointing. `remainder_bytes`: what a remainder of a target layer's weight takes, which each
    process then keeps on its host. The host also holds the weights once, as they are loaded.
    """
    width = shapes.width
    if recomputes:  # one block's, and the input of each
        width = width // shapes.blocks + shapes.blocks * shapes.hidden
    kept = int(
        tokens * (_KEPT_PER_WIDTH * width * element_bytes + 3 * shapes.vocabulary * 4)
    )  # logits, and theirs, in fp32
    weights = shapes.total * element_bytes
    device = weights + shapes.trained * _TRAINED_BYTES + shapes.frozen * element_bytes + kept
    remainders = remainder_bytes * shapes.targets
    return Need(device=device, host=weights + remainders, remainders=remainders)


def choose_stage(needed: Need, device_bytes: int, host_bytes: int, one: bool) -> tuple[int, str]:
    """The smallest stage that fits into a process's memory, and why, for people.

    `device_bytes` and `host_bytes`: what the process with least has of both. `one`: it computes on the host, where remainders
    lie beside what is computed with.
    """
    if one:
        needed = Need(device=needed.device + needed.remainders, host=needed.host)
    for what, wanted, there in (("", needed.device, device_bytes), (" of its host", needed.host, host_bytes)):
        of = f"{wanted / 2**30:.1f} GiB a process, of {there / 2**30:.1f} GiB{what}"
        if wanted > SHARE * there:
            return 3, f"stage 2 needs {of}: more than {SHARE:.0%}"
    return 2, f"needs {needed.device / 2**30:.1f} GiB a process, of {device_bytes / 2**30:.1f} GiB"


def nodes_of(hosts: Sequence[str]) -> list[list[int]]:
    """The ranks on each host, `hosts` naming that of every rank. Nodes are in the order of their first ranks, ranks in theirs: at
    any placement."""
    found: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        found.setdefault(host, []).append(rank)
    return list(found.values())


def why_not_alike(hosts: Sequence[str]) -> str | None:
    """Why nodes cannot keep shards each for itself, where they have different numbers of processes; None: they can."""
    sizes = {hosts[ranks[0]]: len(ranks) for ranks in nodes_of(hosts)}
    if len(set(sizes.values())) == 1:
        return None
    return (
        f"nodes have different numbers of processes: {some_of([f'{count} on {host}' for host, count in sizes.items()])}"
    )


def choose_shards(
    needed: Need, shapes: Shapes, element_bytes: int, node_size: int, device_bytes: int, host_bytes: int, one: bool
) -> tuple[bool, str]:
    """Whether every node keeps the base in shards of its own at stage 3, as each process has the memory for that; and why, for
    people. `needed` is what stage 2 needs; the others are as for `choose_stage`. `node_size`: processes on a node.
    """
    weights = shapes.total * element_bytes
    gathered = (
        2 * max(shapes.weights, default=0) * element_bytes
    )  # what is computed with, and what is fetched meanwhile
    remainders = needed.remainders // node_size
    device = needed.device - weights + weights // node_size + gathered + (remainders if one else 0)
    for what, wanted, there in (("", device, device_bytes), (" of its host", remainders, host_bytes)):
        if wanted > SHARE * there:
            of = f"{wanted / 2**30:.1f} GiB a process, of {there / 2**30:.1f} GiB{what}"
            return False, f"over all processes: in each node they need {of}: more than {SHARE:.0%}"
    return True, f"in each node: {device / 2**30:.1f} GiB a process, of {device_bytes / 2**30:.1f} GiB"


def with_sizes(zero: dict[str, Any], shapes: Shapes, full: bool, micro_steps: int) -> dict[str, Any]:
    """The zero_optimization of an engine, its stage known, with sizes for all that it does not say.

    `full`: every weight is trained, not adapters beside a frozen base.
    """
    square = int(statistics.median(shapes.weights)) if shapes.weights else 1  # hidden x hidden, in most models
    derived = {"reduce_bucket_size": _bounded(square if full else shapes.trained, _BUCKET)}
    if zero["stage"] == 3:
        # Adapters, biases and norms always: gathers so small cost their latency, and several of them may start in another
        # order on each process.
        resident = max(_PERSISTENT, shapes.adapter, *shapes.vectors, 0)
        offloaded = (zero.get("offload_param") or {}).get("device", "none") != "none"
        if micro_steps > 1 and not full and not offloaded and 2 * shapes.total <= _REUSE:
            # Between its two uses in a micro step lies less than DeepSpeed's own reuse distance, for every weight: all of them
            # are whole at the end of the forward pass anyway. They stay so from one micro step to the next.
            resident = max(resident, *shapes.weights, 0)
        derived |= {
            "stage3_param_persistence_threshold": resident,
            # One weight ahead, so that a gather seldom holds several and is then copied apart again.
            "stage3_prefetch_bucket_size": _bounded(square, 50_000_000),
            # Beyond it nothing is fetched ahead: one table of embeddings may be larger than DeepSpeed's own.
            "stage3_max_live_parameters": max(_LIVE, 2 * max(shapes.weights, default=0) + square),
        }
    return {**{key: value for key, value in derived.items() if not _says(zero, key)}, **zero}


def _bounded(size: int, limit: int) -> int:
    return max(1, min(size, limit))


def _says(zero: dict[str, Any], key: str) -> bool:
    """Whether the JSON has the key, also by the name that DeepSpeed has for it within."""
    return key in zero or key.removeprefix("stage3_") in zero
