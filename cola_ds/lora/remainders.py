"""Remainders: what rounding has kept out of stored weights, held on the host from one knot to the next.

The sum of a base weight and its links is an fp32 number, and what is stored is that number rounded. Under exact merges into bf16
the two differ by at most half a unit of bf16's last place, and bf16's bits are the upper half of fp32's: so the difference of
their bits, the stored ones shifted by 16, is a number from -2^15 to 2^15, and the fp32 sum is found again to the bit from 16 bits
beside the weight. One value is too many for that: 2^15, where the sum was exactly halfway and rounded towards zero (to even). It
is kept as -2^15, which is that of a sum rounded away from zero, and its place is written down: one weight in 131,072, about.

fp16 has subnormals within the range of weights, and a plain merge loses what this would hold: there remainders are fp32.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cola_ds.distributed.shards import host_room

_HALFWAY = 2**15


def remainder_dtype(weight: torch.dtype, exact: bool) -> torch.dtype:
    """What a remainder of a weight stored in `weight` is held in."""
    return torch.int16 if exact and weight == torch.bfloat16 else torch.float32


@dataclass
class Remainder:
    """The remainder of a flat part of a weight. Written and read in pieces, the same ones at every knot."""

    kept: Tensor
    """(n,) fp32, or int16: see above. Pinned where there is an accelerator; still to be written."""
    halfway: dict[int, Tensor] = field(default_factory=dict)
    """By the start of a piece, the places in it of what was rounded towards zero from halfway; on the device."""

    @classmethod
    def of(cls, weight: Tensor, exact: bool) -> Remainder:
        """Room for that of a flat part of a weight."""
        return cls(host_room(weight.numel(), remainder_dtype(weight.dtype, exact)))

    def write(self, start: int, weight: Tensor, left: Tensor) -> None:
        """Keep what is `left` (fp32, on the device) of the sum that has become a piece of the weight, the one that begins at
        `start`. The host does not wait for the copy."""
        room = self.kept[start : start + len(weight)]
        if room.dtype != torch.int16:
            room.copy_(left, non_blocking=True)
            return
        weight = weight.to(left.device)
        apart = (weight.float() + left).view(torch.int32) - _upper_half(weight)  # from -2^15 to 2^15
        self.halfway[start] = (apart == _HALFWAY).nonzero().squeeze(1)
        room.copy_(apart.to(torch.int16), non_blocking=True)

    def read(self, start: int, weight: Tensor, device: torch.device) -> Tensor:
        """What was left of the sum that a piece of the weight was rounded from. -> (len(weight),) fp32, on the device"""
        held = self.kept[start : start + len(weight)].to(device, non_blocking=True)
        if held.dtype != torch.int16:
            return held
        weight, apart = weight.to(device), held.int()
        apart[self.halfway[start]] = _HALFWAY
        return (_upper_half(weight) + apart).view(torch.float32) - weight.float()


def _upper_half(weight: Tensor) -> Tensor:  # bf16 -> int32: its bits as fp32
    return weight.view(torch.int16).int() << 16
