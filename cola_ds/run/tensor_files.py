"""Safetensors files that are larger than memory: written one tensor at a time, where safetensors itself wants all at once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes of weights, by the format's names."""


def write_tensors(path: Path, kinds: Mapping[str, tuple[str, list[int]]], read: Callable[[str], Tensor]) -> int:
    """Write a file of the named tensors, whose dtypes (of FLOATS) and shapes are known; `read` gives each as its turn
    comes. On the disk when this returns. Returns the bytes of the tensors."""
    # The format wants no gaps, and readers want each tensor at a multiple of its elements' size: the widest come first.
    names = sorted(kinds, key=lambda name: (-FLOATS[kinds[name][0]].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        dtype, shape = kinds[name]
        begin, end = end, end + FLOATS[dtype].itemsize * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    said = json.dumps(header).encode()
    said += b" " * (-len(said) % 8)
    with open(path, "wb") as out:
        out.write(len(said).to_bytes(8, "little") + said)
        for name in names:
            tensor = read(name)
            assert (tensor.dtype, list(tensor.shape)) == (FLOATS[kinds[name][0]], list(kinds[name][1])), name
            out.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        out.flush()
        os.fsync(out.fileno())
    return end
