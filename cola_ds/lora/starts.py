"""What a link begins with beyond a draw: mathematics of lora.init orthogonal, pissa and gradient. Plain torch, no collectives.

Singular directions are found from products with the matrix alone, by randomised subspace iteration (Halko, Martinsson, Tropp
2011): nobody needs the matrix whole. W (out, in) below is a weight, or its gradient; k columns are a few more than directions are
wanted, and where they are as many as W has rows or columns the directions are exact.

    Y = W omega                (out, k)   omega (in, k) drawn
    Q = orthonormal(Y);  Z = W^T Q        (in, k)
    Q = orthonormal(W orthonormal(Z));  Z = W^T Q       again, where directions are close to each other
    W is about Q Z^T: its singular values are those of Z
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cola_ds.config.schema import RunConfig
from cola_ds.errors import UserError
from cola_ds.lora.layers import frozen_factors, generator_of, start_link
from cola_ds.lora.targets import sizes_of

GAMMA = 16.0
"""LoRA-GA's: its link begins with the norm sqrt(out r) / gamma (arXiv 2407.05000, algorithm 1, and its authors' code)."""


def begin_link(model: nn.Module, config: RunConfig, link: int, device: torch.device, drawn_before: int = 0) -> None:
    """Give every injected layer the A and B that `link` starts with, as far as they are drawn: `place_start` does the rest.

    So many links have been `drawn_before` the run's first, by a run that this one continues: under the same seed, too, a link is
    drawn as none of these.
    """
    start_link(
        model, drawn_before + link, config.lora_ranks[link - 1], config.alpha_of(link), config.run.seed, device, config.lora.init,
        config.lora_trains[link - 1], config.starts_elsewhere,
    )  # fmt: skip


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The factors of a link that are not trained, as a checkpoint keeps them: `frozen/NAME`, in host memory."""
    return {f"frozen/{name}": held.detach().to("cpu", copy=True) for name, held in frozen_factors(model).items()}


def check_starts(config: RunConfig, layers: dict[str, nn.Module]) -> None:
    """Raise UserError where a target layer is too small for what lora.init asks of it."""
    init, ranks = config.lora.init, config.lora_ranks
    wanted = {"orthogonal": sum(ranks), "pissa": max(ranks), "gradient": 2 * max(ranks)}.get(init, 0)
    for name, layer in layers.items():
        there = sizes_of(layer)[0] if init == "orthogonal" else min(sizes_of(layer))
        if wanted > there:
            what = f"the links' ranks add up to {wanted}" if init == "orthogonal" else f"{wanted} directions are wanted"
            raise UserError(
                f"lora.init {init}: {what}, and {name} has {there}; use a lower lora.rank, or another lora.init"
            )


def orthogonal_rows(drawn: Tensor, earlier: Tensor) -> Tensor:  # (r, in), (R, in) -> (r, in), fp32
    """What of drawn rows is orthogonal to all of `earlier`, with the norm that was drawn."""
    wanted = drawn.double()
    basis = torch.linalg.qr(earlier.double().T)[0]  # (in, R)
    found = wanted
    for _ in range(2):  # what rounding leaves of the first time, the second takes
        found = found - (found @ basis) @ basis.T
    return (found * (wanted.norm() / found.norm())).float()


def sketch_width(lora_rank: int, shape: tuple[int, ...]) -> int:
    """k: twice the rank, as LoRA-GA takes directions to 2 r, and some more, which make the wanted ones accurate."""
    return min(2 * lora_rank + 16, *shape)


def draw_sketch(seed: int, link: int, layer: str, shape: tuple[int, int]) -> Tensor:  # -> (in, k), fp32 on the CPU
    """omega of a layer: the same on every process."""
    return torch.randn(shape, generator=generator_of(seed, link, f"{layer}.sketch"))


def orthonormal(columns: Tensor) -> Tensor:  # (n, k) -> (n, k), fp32
    """An orthonormal basis of what the columns span."""
    return torch.linalg.qr(columns.double())[0].float()


def singular(
    Q: Tensor, Z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # (out, k), (in, k) -> (out, k), (k,), (in, k), fp64
    """U, S, V of Q Z^T: singular directions, those of the largest values first. Their signs: V's largest entries are positive."""
    V, S, rotation = torch.linalg.svd(Z.double(), full_matrices=False)
    U = Q.double() @ rotation.T
    signs = torch.sign(V.gather(0, V.abs().argmax(dim=0, keepdim=True)))  # (1, k)
    return U * signs, S, V * signs


def pissa_factors(
    U: Tensor, S: Tensor, V: Tensor, lora_rank: int, scaling: float
) -> tuple[Tensor, Tensor]:  # (out, k), (k,), (in, k) -> (r, in), (out, r), fp32
    """A0 and B0 of PiSSA: scaling * B0 A0 is the part of W of rank r that is nearest to it, its values halved between both."""
    roots = (S[:lora_rank] / scaling).sqrt()
    return (roots[:, None] * V[:, :lora_rank].T).float(), (U[:, :lora_rank] * roots).float()


def gradient_factors(
    U: Tensor, V: Tensor, lora_rank: int
) -> tuple[Tensor, Tensor]:  # (out, k), (in, k) -> (r, in), (out, r), fp32
    """A0 and B0 of LoRA-GA: right singular directions 1 to r of the gradient, and left ones r + 1 to 2 r, so that the first step
    of A and B together moves B A along the gradient's 2 r leading ones."""
    size = len(U) ** 0.25 / GAMMA**0.5
    return (size * V[:, :lora_rank].T).float(), (size * U[:, lora_rank : 2 * lora_rank]).float()
