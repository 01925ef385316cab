"""Shard files: masters and moments of method full, in the pieces in which the processes keep them.

shard-RANK-NNNNN.safetensors holds flat fp32 tensors (n,) by names such as `master/NAME` and `exp_avg/NAME`. `shard` in its
header's metadata is JSON: `kinds`, what the checkpoint has of every parameter (master, exp_avg, ...), and `parts`, of each tensor
the element of the whole parameter, flattened, at which it begins, and the whole parameter's shape. Padding is in none; over all
files of a checkpoint every element is there once. Any number of processes reads them, each the ranges that it keeps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

if TYPE_CHECKING:
    from cola_ds.distributed.shards import Part

SHARD = re.compile(r"shard-(\d{5})-\d{5}\.safetensors")
_ELEMENTS_A_FILE = 2**26  # 256 MiB: a process holds one file's content, and a copy of it, on the host at a time


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    kinds: list[str]
    parts: dict[str, tuple[NonNegativeInt, list[NonNegativeInt]]]


@dataclass(frozen=True)
class Placed:
    """Where a tensor of a shard file lies in the whole parameter."""

    start: int
    count: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Read:
    """Elements of a tensor of a shard file, and where they go."""

    file: Path
    key: str
    begin: int
    into: Tensor


def first_of(rank: int) -> str:
    """The name of the shard file that every process of a checkpoint has, if it keeps nothing."""
    return f"shard-{rank:05d}-00001.safetensors"


def shard_files(rank: int, parts: Iterable[Part], kinds: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a process's shard files, one at a time, each of bounded size."""
    for number, piece in enumerate(_pieces(parts), 1):
        header = _Header(kinds=list(kinds), parts={key: (placed.start, list(placed.shape)) for key, placed, _ in piece})
        tensors = {key: values.detach().to("cpu", torch.float32, copy=True) for key, _, values in piece}
        yield f"shard-{rank:05d}-{number:05d}.safetensors", save(tensors, {"shard": header.model_dump_json()})


def _pieces(parts: Iterable[Part]) -> Iterator[list[tuple[str, Placed, Tensor]]]:
    """What goes into each file; one at least."""
    piece: list[tuple[str, Placed, Tensor]] = []
    room = _ELEMENTS_A_FILE
    for part in parts:
        for begin in range(0, part.values.numel(), _ELEMENTS_A_FILE):
            values = part.values[begin : begin + _ELEMENTS_A_FILE]
            if values.numel() > room:
                yield piece
                piece, room = [], _ELEMENTS_A_FILE
            piece.append((part.key, Placed(part.start + begin, values.numel(), part.shape), values))
            room -= values.numel()
    yield piece


def read_header(file: Path) -> tuple[list[str], dict[str, Placed]]:
    """The kinds of its checkpoint, and where each tensor of a shard file lies. Raises ValueError where it does not say so, and
    SafetensorError for what is no safetensors file."""
    with safe_open(file, framework="pt") as tensors:
        try:
            header = _Header.model_validate_json((tensors.metadata() or {})["shard"])
        except (KeyError, ValidationError):
            raise ValueError("its header does not say where its tensors lie") from None
        if header.parts.keys() != set(tensors.keys()):
            raise ValueError("its header does not place the tensors that it holds")
        found = {}
        for key, (start, shape) in header.parts.items():
            held = tensors.get_slice(key)
            size = held.get_shape()
            if held.get_dtype() != "F32" or len(size) != 1 or start + size[0] > math.prod(shape):
                raise ValueError(f"{key} in it is no part of a tensor of shape {tuple(shape)}")
            if key.partition("/")[0] not in header.kinds:
                raise ValueError(f"{key} is of none of the kinds that its header names")
            found[key] = Placed(start, size[0], tuple(shape))
    return header.kinds, found


def nearest_first(names: Iterable[str], rank: int, world_size: int, saved_size: int) -> list[str]:
    """Shard files in the order in which a process is likely to find what it keeps: at the world size that wrote them its own
    come first, and it need not open another."""
    middle = (rank + 0.5) / world_size

    def distance(name: str) -> float:
        found = SHARD.fullmatch(name)
        assert found
        return abs((int(found[1]) + 0.5) / saved_size - middle)

    return sorted(names, key=lambda name: (distance(name), name))


def find(files: Iterable[Path], wanted: Iterable[Part], shapes: Mapping[str, tuple[int, ...]]) -> list[Read]:
    """Where all elements lie that are `wanted`; the files are opened in their order, until all are found, and no value is read.
    `shapes` are those of everything that the model has. Raises ValueError for files that do not fit it.
    """
    sought = {part.key: part for part in wanted}
    left = sum(part.values.numel() for part in sought.values())
    spans: dict[str, list[tuple[int, int, Path, int]]] = {key: [] for key in sought}
    for file in files:
        if left <= 0:
            break
        for key, placed in read_header(file)[1].items():
            if placed.shape != shapes.get(key):
                raise ValueError(f"it has {key} of shape {placed.shape}, the model wants {shapes.get(key)}")
            if key not in sought:
                continue
            part = sought[key]
            begin = max(part.start, placed.start)
            end = min(part.start + part.values.numel(), placed.start + placed.count)
            if begin < end:
                spans[key].append((begin, end, file, placed.start))
                left -= end - begin
    return [read for key, found in spans.items() for read in _joined(sought[key], sorted(found))]


def _joined(part: Part, spans: list[tuple[int, int, Path, int]]) -> Iterator[Read]:
    """Reads of spans (first element, end, file, the file's first element) that make up a part, one after another."""
    at, end = part.start, part.start + part.values.numel()
    for begin, stop, file, first in spans:
        if begin != at:
            break
        yield Read(file, part.key, begin - first, part.values[begin - part.start : stop - part.start])
        at = stop
    if at != end:
        twice = any(begin < at < stop for begin, stop, *_ in spans)
        raise ValueError(f"it has elements of {part.key} {'twice' if twice else 'not at all'}, from number {at} on")


@torch.no_grad()
def take(reads: Iterable[Read]) -> None:
    """Read what `find` has found, a range at a time."""
    by_file: dict[Path, list[Read]] = {}
    for read in reads:
        by_file.setdefault(read.file, []).append(read)
    for file, theirs in by_file.items():
        with safe_open(file, framework="pt") as tensors:
            for read in theirs:
                read.into.copy_(tensors.get_slice(read.key)[read.begin : read.begin + read.into.numel()])
