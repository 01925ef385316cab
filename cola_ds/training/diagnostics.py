"""What a link has learnt, found at its knot: chain.diagnostics. Off the hot path; a figure that cannot be found fails no run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from cola_ds.distributed import accelerator, collectives, watchdog
from cola_ds.distributed.shards import gathered
from cola_ds.errors import cut, first_line
from cola_ds.lora.layers import LoRALinear, lora_layers
from cola_ds.lora.spectra import effective_rank, intruders, look, parts_of
from cola_ds.lora.tie import Links
from cola_ds.training.state import Chain

T = TypeVar("T")
Lost = tuple[str, str]
"""A figure that was not found, and why."""
_DENSE = 1024
"""The smaller side of the largest weights that are decomposed whole."""
_ENTRIES = 2**24
"""Elements, out * in, of all weights that are. On SmolLM2-135M they took less than a step of 8 rows of 200 tokens."""
_GOLDEN = (5**0.5 - 1) / 2


def diagnose(chain: Chain) -> dict[str, Any]:
    """Look at the link that has just been tied, layer by layer, each on the process that minds it (`tie_link`). Collective.

    Process 0 writes a row a layer into links.jsonl; one sum over all processes brings it the numbers. Returns what the knot's
    row says: means over the layers, and how long it took.
    """
    begin, state = time.perf_counter(), chain.state
    layers = lora_layers(chain.engine.module)
    lora_ranks = [chain.config.tied_rank(link) for link in range(1, state.link + 1)]
    is_last, lost = state.link == chain.links, list[Lost]()
    found = torch.zeros(len(layers), sum(parts_of(lora_ranks)) + 1, dtype=torch.float64, device=accelerator.device())
    for number, name in enumerate(layers):
        watchdog.heartbeat("diagnostics")  # of each layer on every process: the watch compares how many there were
        if collectives.falls_to_this_process(number):
            seen = _find(f"spectra of {name}", partial(_look, state.earlier.get(name), lora_ranks), lost)
            found[number, :-1] = math.nan if seen is None else seen
    if is_last:
        _count_intruders(chain, layers, found[:, -1], lost)
    collectives.all_reduce_sum(found)
    _tell(chain, lost)
    rows = list(_rows(layers, found.cpu(), lora_ranks, is_last))
    if chain.folder:
        for row in rows:
            chain.folder.append(
                "links.jsonl",
                {"link": state.link, "step": state.step, "lora_rank": chain.config.lora_ranks[state.link - 1], **row},
            )
    return {**_summary(rows, is_last), "diagnostics_s": time.perf_counter() - begin}


def _find(name: str, find: Callable[[], T], lost: list[Lost]) -> T | None:
    """What `find` returns; None where it fails, on this process alone: `lost` says why, for `_tell`."""
    try:
        return find()
    except Exception as error:
        lost.append((name, cut(first_line(error), 200)))
        return None


def _tell(chain: Chain, lost: list[Lost]) -> None:
    """Say which figures no process has found: of each process the first, and how many more. Collective."""
    for rank, theirs in enumerate(collectives.all_gather_objects([*lost[0], len(lost) - 1] if lost else None)):
        if theirs:
            name, reason, more = theirs
            chain.logger.warn(f"no {name}{f', and {more} more,' if more else ''} on process {rank}: {reason}")
            chain.logger.event("no figure", figure=name, more=more, process=rank, reason=reason)


def _look(links: Links | None, lora_ranks: list[int]) -> Tensor:
    assert links is not None
    return look(_here(links), lora_ranks)


def _here(links: Links) -> Links:
    A, B, scalings = (each.to(accelerator.device()) for each in links)
    return A, B, scalings


def _count_intruders(chain: Chain, layers: dict[str, LoRALinear], found: Tensor, lost: list[Lost]) -> None:
    """Put each layer's number of intruder dimensions into `found` (layers,), on the process that minds it; NaN where the weight
    is not looked at (`_decomposed`). Collective.

    The base is taken to be the weight as it is stored less the sum of the links: in bf16 its rounding is in both, so that none of
    what is found is rounding's. Plain merges have rounded some of that sum away: the base is not known then.
    """
    is_whole = chain.config.chain.merge == "exact" or all(
        layer.weight.dtype == torch.float32 for layer in layers.values()
    )
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    chosen = _decomposed(shapes) if is_whole else []
    chain.logger.event("intruder dimensions", layers=chosen, of_layers=len(layers))
    numbers = {name: number for number, name in enumerate(layers)}
    for number in numbers.values():
        if collectives.falls_to_this_process(number):
            found[number] = math.nan
    for names in _rounds(chosen, numbers, chain.world_size):
        which, tuned = "", None
        for name in names:
            with gathered([layers[name].weight]):
                if collectives.falls_to_this_process(numbers[name]):
                    which = name
                    tuned = _find(f"intruder dimensions of {name}", partial(_copied, layers[name]), lost)
        watchdog.heartbeat("diagnostics")
        if tuned is not None:
            count = _find(f"intruder dimensions of {which}", partial(_intruders, chain, which, tuned), lost)
            found[numbers[which]] = math.nan if count is None else count


def _copied(layer: LoRALinear) -> Tensor:
    """Its gathered weight in fp64. -> (out, in)"""
    weight = layer.weight.detach()
    return (weight.T if layer.transposed else weight).to(accelerator.device(), torch.float64, copy=True)


def _decomposed(shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """The layers, in order, whose weights (out, in) are decomposed whole: of those that are small enough (_DENSE) as many as have
    _ENTRIES elements together. Spread over the depth and over the kinds of layers alike, by multiples of the golden ratio modulo
    1: where every n-th was taken, they might all be of one kind."""
    small = [name for name, shape in shapes.items() if min(shape) <= _DENSE and math.prod(shape) <= _ENTRIES]
    spread = sorted(range(len(small)), key=lambda number: number * _GOLDEN % 1)
    left, chosen = _ENTRIES, set[int]()
    for number in spread:
        left -= math.prod(shapes[small[number]])
        if left < 0:
            break
        chosen.add(number)
    return [small[number] for number in sorted(chosen)]


def _rounds(names: list[str], numbers: Mapping[str, int], world_size: int) -> Iterable[list[str]]:
    """Layers in order, in rounds in which each process minds one at most: all decompose theirs at once."""
    mine: dict[int, str] = {}
    for name in names:
        if numbers[name] % world_size in mine:
            yield list(mine.values())
            mine = {}
        mine[numbers[name] % world_size] = name
    if mine:
        yield list(mine.values())


def _intruders(chain: Chain, name: str, tuned: Tensor) -> int:
    A, B, scalings = (each.double() for each in _here(chain.state.earlier[name]))
    return intruders(tuned, tuned - B @ (A * scalings))


def _rows(
    layers: dict[str, LoRALinear], found: Tensor, lora_ranks: list[int], is_last: bool
) -> Iterable[dict[str, Any]]:
    """What links.jsonl says of each layer; overlaps are with each link before, in order, and with their sum."""
    for (name, layer), numbers in zip(layers.items(), found, strict=True):
        values, of_sum, rows, columns = numbers[:-1].split(parts_of(lora_ranks))
        most = min(layer.in_features, layer.out_features)
        row = {
            "layer": name,
            "norm": float(values.norm()),
            "effective_rank": effective_rank(values) if values.isfinite().all() else None,
            "sum_norm": float(of_sum.norm()),
            "sum_effective_rank": effective_rank(of_sum) if of_sum.isfinite().all() else None,
            "row_overlap": float(rows[-1]) if len(rows) else None,
            "column_overlap": float(columns[-1]) if len(columns) else None,
            "singular_values": values[:most].tolist(),
            "sum_singular_values": of_sum[:most].tolist(),
            "row_overlaps": rows[:-1].tolist(),
            "column_overlaps": columns[:-1].tolist(),
        }
        yield {**row, "intruders": int(numbers[-1]) if numbers[-1].isfinite() else None} if is_last else row


def _summary(rows: list[dict[str, Any]], is_last: bool) -> dict[str, Any]:
    """Means over the layers that have a figure; of intruder dimensions their number, and that of the layers looked at."""
    summary: dict[str, Any] = {}
    for key in ("effective_rank", "sum_effective_rank", "row_overlap", "column_overlap"):
        seen = [row[key] for row in rows if row[key] is not None and math.isfinite(row[key])]
        summary[key] = statistics.fmean(seen) if seen else None
    if is_last:
        counted = [row["intruders"] for row in rows if row["intruders"] is not None]
        summary |= {"intruders": sum(counted) if counted else None, "intruder_layers": len(counted)}
    return summary
