"""What a link has learnt, found at its knot: chain.diagnostics. Off the hot path, and nothing of it can fail a run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cola_ds.distributed import accelerator, collectives, watchdog
from cola_ds.distributed.shards import gathered
from cola_ds.lora.layers import LoRALinear, lora_layers
from cola_ds.lora.spectra import effective_rank, intruders, look, parts_of
from cola_ds.lora.tie import Links
from cola_ds.training.state import Chain

_DENSE = 1024
"""The smaller side of the largest weights that are decomposed whole."""


def diagnose(chain: Chain) -> dict[str, Any]:
    """Look at the link that has just been tied, layer by layer, each on the process that minds it (`tie_link`). Collective.

    Process 0 writes a row a layer into links.jsonl; one sum over all processes brings it the numbers. Returns what the knot's
    row says: means over the layers, and how long it took.
    """
    begin, state = time.perf_counter(), chain.state
    layers = lora_layers(chain.engine.module)
    lora_ranks = [chain.config.tied_rank(link) for link in range(1, state.link + 1)]
    is_last = state.link == chain.links
    found = torch.zeros(len(layers), sum(parts_of(lora_ranks)) + 1, dtype=torch.float64, device=accelerator.device())
    for number, name in enumerate(layers):
        if collectives.falls_to_this_process(number):
            watchdog.heartbeat("diagnostics")
            seen = chain.logger.figure(f"spectra of {name}", partial(_look, state.earlier.get(name), lora_ranks))
            found[number, :-1] = math.nan if seen is None else seen
    if is_last:
        _count_intruders(chain, layers, found[:, -1])
    collectives.all_reduce_sum(found)
    rows = list(_rows(layers, found.cpu(), lora_ranks, is_last))
    if chain.folder:
        for row in rows:
            chain.folder.append(
                "links.jsonl",
                {"link": state.link, "step": state.step, "lora_rank": chain.config.lora_ranks[state.link - 1], **row},
            )
    return {**_summary(rows, is_last), "diagnostics_s": time.perf_counter() - begin}


def _look(links: Links | None, lora_ranks: list[int]) -> Tensor:
    assert links is not None
    return look(_here(links), lora_ranks)


def _here(links: Links) -> Links:
    A, B, scalings = (each.to(accelerator.device()) for each in links)
    return A, B, scalings


def _count_intruders(chain: Chain, layers: dict[str, LoRALinear], found: Tensor) -> None:
    """Put each layer's number of intruder dimensions into `found` (layers,), on the process that minds it; NaN where the weight
    is too large to be decomposed. Collective.

    The base is taken to be the weight as it is stored less the sum of the links: in bf16 its rounding is in both, so that none of
    what is found is rounding's.
    """
    held: tuple[int, str, Tensor] | None = None
    for number, (name, layer) in enumerate(layers.items()):
        mine = collectives.falls_to_this_process(number)
        if min(layer.in_features, layer.out_features) <= _DENSE:
            with gathered([layer.weight]):
                if mine:
                    held = number, name, layer.weight.detach().to(accelerator.device(), torch.float64, copy=True)
        elif mine:
            found[number] = math.nan
        # In rounds: each process has one weight, and all decompose theirs at once.
        if held and (number % chain.world_size == chain.world_size - 1 or number == len(layers) - 1):
            at, which, tuned = held
            watchdog.heartbeat("diagnostics")
            count = chain.logger.figure(f"intruder dimensions of {which}", partial(_intruders, chain, which, tuned))
            found[at] = math.nan if count is None else count
            held = None


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
        summary |= {"intruders": sum(counted), "intruder_layers": len(counted)}
    return summary
