"""What a bf16 weight keeps of a chain: the table of launch/README.md, exact beside plain merges.

    python -m tests.bench.rounding

A base of std 0.02 gets a change of 1% or 0.1% of its norm and of LoRA rank 8, in 1, 8 or 32 equal links. The error is
norm(stored change - wanted change) / norm(wanted change).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from cola_ds.lora.layers import add_link, delta_weight

SIZE, LORA_RANK = 512, 8


def chain_of_merges(size: float, links: int, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The bf16 base, the stored weight after all merges, and the wanted change in float64; all (512, 512)."""
    draw = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(SIZE, SIZE, generator=draw)).bfloat16()
    lora_B, lora_A = torch.randn(SIZE, LORA_RANK, generator=draw), torch.randn(LORA_RANK, SIZE, generator=draw)
    delta = delta_weight(lora_A, lora_B, 1.0)
    delta *= size * base.float().norm() / (links * delta.norm())
    weight, remainder = base.clone(), torch.zeros(SIZE, SIZE)
    for _ in range(links):
        remainder = add_link(weight, delta, remainder, exact)
    return base, weight, delta.double() * links


def error(size: float, links: int, exact: bool) -> float:
    """The chain's relative error."""
    base, weight, wanted = chain_of_merges(size, links, exact)
    return float((weight.double() - base.double() - wanted).norm() / wanted.norm())


def table() -> Iterator[str]:
    """The page's rows."""
    yield "| change / base | links | exact | plain |"
    yield "| --- | --- | --- | --- |"
    for size in (0.01, 0.001):
        for links in (1, 8, 32):
            yield f"| {size:.1%} | {links} | {error(size, links, True):.1%} | {error(size, links, False):.1%} |"


if __name__ == "__main__":
    print("\n".join(table()))
