"""Remainders in 16 bits: the fp32 sum to the bit, whatever it is, and half the memory."""

import pytest
import torch

from cola_ds.lora.layers import add_link
from cola_ds.lora.remainders import Remainder

CPU = torch.device("cpu")
PIECE = 1000


def every_rounding():
    """fp32 numbers of every sign, exponent and way to be rounded to bf16: halfway ones of both kinds and subnormals, too."""
    upper = torch.arange(2**16, dtype=torch.int32)
    upper = upper[(upper & 0x7F80) != 0x7F80]  # neither infinite nor NaN
    upper = upper[(upper & 0x7FFF) != 0x7F7F]  # what rounding makes infinite is no weight
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    return ((upper[:, None] << 16) | lower).flatten().view(torch.float32)


def test_every_sum_comes_back_to_the_bit():
    total = every_rounding()
    weight = total.bfloat16()
    remainder = Remainder.of(weight, exact=True)
    assert remainder.kept.nbytes == weight.nbytes
    remainder.write(0, weight, total - weight.float())
    found = weight.float() + remainder.read(0, weight, CPU)
    assert torch.equal(found, total)  # +0 and -0 are equal here, and as sums
    # Halfway, and the bf16 number towards zero is even: a sixth of these numbers have the bits, half of them the parity.
    assert len(remainder.halfway[0]) == pytest.approx(len(total) / 12, rel=1e-3)


@pytest.mark.parametrize(("dtype", "exact"), [("bfloat16", True), ("bfloat16", False), ("float16", True)])
@pytest.mark.parametrize("scale", [1e-2, 1e-6])
def test_fifty_knots_have_the_bits_of_remainders_in_fp32(dtype, exact, scale):
    draw = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(3 * PIECE, generator=draw)).to(getattr(torch, dtype))
    expected, reference = weight.clone(), torch.zeros(len(weight))
    remainder, halfway = Remainder.of(weight, exact), 0
    assert remainder.kept.dtype == (torch.int16 if (dtype, exact) == ("bfloat16", True) else torch.float32)
    for knot in range(50):
        # Multiples of a power of two: sums are often halfway.
        delta = (scale * torch.randn(len(weight), generator=draw) * 2**22).round() / 2**22
        for start in range(0, len(weight), PIECE):
            piece = slice(start, start + PIECE)
            before = remainder.read(start, weight[piece], CPU) if knot else torch.zeros(())
            remainder.write(start, weight[piece], add_link(weight[piece], delta[piece], before, exact))
        reference = add_link(expected, delta, reference, exact)
        assert torch.equal(weight, expected)
        kept = [remainder.read(start, weight[start : start + PIECE], CPU) for start in range(0, len(weight), PIECE)]
        assert torch.equal(torch.cat(kept), reference)
        halfway += sum(map(len, remainder.halfway.values()))
    if remainder.kept.dtype == torch.int16:
        assert halfway > 10
