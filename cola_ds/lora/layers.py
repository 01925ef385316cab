"""LoRA layers: low-rank adapters and the arithmetic of merging them. Plain torch, no collectives.

    before                          after inject(model, layers, r, alpha / r, ...)
    q_proj: Linear                  q_proj: LoRALinear
      weight (out, in)                weight (out, in)   the same Parameter, frozen
                                      lora_A (r, in)     Gaussian
                                      lora_B (out, r)    zero

A factor that is not trained is a buffer: on every process whole, as those that are trained are within a step. So are the
factors that a link starts at (lora.init pissa, gradient), from which A and B are the way then.

LoRALinear is an nn.Linear, so the names of the base weights in the state dict stay what they were. In the place of a Conv1D
(GPT-2) its weight is (in, out); A and B are what they are elsewhere, and so is all that follows from them.
"""

from __future__ import annotations

import hashlib
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cola_ds.lora.targets import is_transposed, sizes_of


def delta_weight(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:  # (r, in), (out, r) -> (out, in)
    """scaling * B @ A in fp32: what a link adds to its base weight."""
    return (lora_B.float() @ lora_A.float()) * scaling


def delta_slice(lora_A: Tensor, lora_B: Tensor, scaling: float, start: int, count: int) -> Tensor:  # -> (count,)
    """Elements `start` to `start + count` of the flattened delta_weight, from the rows of B that they need."""
    width = lora_A.shape[1]
    first, end = start // width, -(-(start + count) // width)
    rows = delta_weight(lora_A, lora_B[first:end], scaling)
    return rows.flatten().narrow(0, start - first * width, count)


def as_weight_lies(lora_A: Tensor, lora_B: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """The factors whose product lies as the weight does: A and B, or B^T (r, out) and A^T (in, r), as (B A)^T = A^T B^T."""
    return (lora_B.T.contiguous(), lora_A.T.contiguous()) if transposed else (lora_A, lora_B)


def add_link(weight: Tensor, delta: Tensor, remainder: Tensor, exact: bool) -> Tensor:
    """Merge: add a link's delta (fp32) to a weight of any dtype, in place. Returns the new remainder, fp32, on delta's device.

    All that merges goes through here, shards in pieces (tie.py) and the whole weights of an export alike: the same bits.
    The remainder is what rounding has kept out of the weight: weight + remainder is the base plus all links, in fp32. An exact
    merge rounds that sum; a plain one rounds the stored weight plus delta, and loses the remainder.
    """
    before = weight.to(delta)  # device and dtype
    wanted = before + remainder + delta  # the first sum is exact: the remainder is the bits that rounding cut off
    weight.copy_(wanted if exact else before + delta)
    return wanted - weight.to(delta)


def inner_product(
    first: tuple[Tensor, Tensor, float | Tensor], second: tuple[Tensor, Tensor, float]
) -> Tensor:  # (A, B, scaling) of one layer, twice -> ()
    """The sum over all elements of delta_weight(first) * delta_weight(second), in fp64, without making either. The first may be
    several links side by side, with a scaling (r, 1) of each row of A: then it is that of their sum."""
    (A1, B1, scaling1), (A2, B2, scaling2) = first, second
    return ((B1.double().T @ B2.double()) * (A1.double() @ A2.double().T) * (scaling1 * scaling2)).sum()


def draw_lora_A(seed: int, link: int, layer: str, shape: tuple[int, int], uniform: bool = False) -> Tensor:
    """The A (r, in) that `layer` starts `link` with, in fp32 on the CPU.

    Drawn from a seed that names (seed, link, layer): the same on every process, at every world size and in every order.
    Gaussian (COLA, algorithm 1), with the variance 1 / (3 in) of the uniform draw in LoRA's own code and PEFT's default; or that
    draw itself.
    """
    generator = generator_of(seed, link, layer)
    if uniform:
        return (2 * torch.rand(shape, generator=generator) - 1) / shape[1] ** 0.5
    return torch.randn(shape, generator=generator) / (3 * shape[1]) ** 0.5


def generator_of(seed: int, link: int, what: str) -> torch.Generator:
    """Random numbers of their own for what a link needs."""
    digest = hashlib.sha256(f"{seed}/{link}/{what}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def draw_factors(
    seed: int, link: int, layer: str, shapes: tuple[tuple[int, int], tuple[int, int]], init: str, train: str
) -> tuple[Tensor | None, Tensor | None]:  # the shapes of A (r, in) and B (out, r)
    """The A and B that `layer` starts `link` with, in fp32 on the CPU; None is zero, and one of them is.

    Where A alone is trained (`train`), B is drawn as A is otherwise, by its own inputs: variance 1 / (3 r), uniform or Gaussian.
    Both draws have every direction alike, as RAC-LoRA's convergence asks for (arXiv 2410.08305).
    """
    of_A, of_B = shapes
    if train == "A":
        return None, draw_lora_A(seed, link, f"{layer}.lora_B", of_B, init == "kaiming")
    return draw_lora_A(seed, link, layer, of_A, init == "kaiming"), None


class LoRALinear(nn.Linear):
    """y = W x + b + scaling * B A dropout(x), with W frozen.

    A link that starts elsewhere than at zero has (B0 + B) (A0 + A) - B0 A0 in the place of B A: A0 and B0 (`start_A`, `start_B`)
    stay what they are, and A and B are how far it has gone from there.
    """

    lora_A: Tensor  # (r, in)
    lora_B: Tensor  # (out, r)
    start_A: Tensor | None  # like them
    start_B: Tensor | None

    def __init__(self, base: nn.Module, dropout: float, train_bias: bool):
        super().__init__(*sizes_of(base), bias=False, device="meta")
        self.transposed = is_transposed(base)
        # Under ZeRO-3 a Parameter carries its shard with it: the object itself must move, not its values.
        self.weight = cast(nn.Parameter, base.weight)
        self.bias = cast(nn.Parameter, base.bias)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(train_bias)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.scaling = 0.0
        for name in ("start_A", "start_B"):
            self.register_buffer(name, None, persistent=False)

    def reset(
        self, lora_A: Tensor | None, scaling: float, device: torch.device, lora_B: Tensor | None = None, train: str = "both",
        started: bool = False,
    ) -> None:  # fmt: skip
        """Start a new link: A (r, in) and B (out, r), of which one may be None, zero; in the base weight's dtype.

        New Parameters rather than new values: the LoRA rank may change, and no gradient, hook or shard of the old link
        is carried over. `train`: both, A or B, the other is frozen. `started`: with room for factors that it starts at, zero yet.
        """
        lora_rank = lora_A.shape[0] if lora_A is not None else cast(Tensor, lora_B).shape[1]
        there: dict[str, Any] = {"device": device, "dtype": self.weight.dtype}
        # B = 0 keeps the outputs unchanged at birth; A is random, else both gradients would vanish. Or the other way round.
        zero_A, zero_B = (lora_rank, self.in_features), (self.out_features, lora_rank)
        for name, drawn, shape in (("lora_A", lora_A, zero_A), ("lora_B", lora_B, zero_B)):
            values = torch.zeros(shape, **there) if drawn is None else drawn.to(**there)
            if hasattr(self, name):
                delattr(self, name)
            if train in ("both", name[-1]):
                self.register_parameter(name, nn.Parameter(values))
            else:
                self.register_buffer(name, values, persistent=False)
        self.start_A = torch.zeros(zero_A, **there) if started else None
        self.start_B = torch.zeros(zero_B, **there) if started else None
        self.scaling = scaling

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of what the link adds, scaling * B @ A.

        One with a start adds B0 A + B (A0 + A): [A; A0 + A] (2r, in) and [B0, B] (out, 2r). As the difference of two products,
        [A0 + A; A0] and [B0 + B, -B0], it would be the same but in bf16, where a small A or B is lost beside what it is added to.
        """
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.start_A + self.lora_A]), torch.cat([self.start_B, self.lora_B], dim=1)

    def frozen(self) -> dict[str, Tensor]:
        """Factors of the link that are not trained, by name."""
        own = {name: getattr(self, name) for name in ("lora_A", "lora_B", "start_A", "start_B")}
        return {
            name: factor for name, factor in own.items() if factor is not None and not isinstance(factor, nn.Parameter)
        }

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        lora_A, lora_B = self.factors()
        if isinstance(self.dropout, nn.Dropout) and self.training:
            return self._base(x) + F.linear(F.linear(self.dropout(x), lora_A) * self.scaling, lora_B)
        return cast(
            Tensor, _LoRAProduct.apply(x, self.weight, self.bias, lora_A, lora_B, self.scaling, self.transposed)
        )

    def _base(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        """W x + b. Of a Conv1D as it does it itself: autograd would keep a view of the transposed weight, and with it the whole
        weight, which ZeRO-3 wants back when the layer is done; it keeps the Parameter alone."""
        if not self.transposed:
            return F.linear(x, self.weight, self.bias)
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class _LoRAProduct(torch.autograd.Function):
    """W x + b + scaling * B A x, with as few passes as there are over what is as large as x or the output.

    B A x is added by the product that makes it, forwards to the output and backwards to the gradient of x; the scaling is
    multiplied into what has r columns. W gets no gradient. It is kept as it lies, and turned where it is used (see `_base`).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float,
        transposed: bool,
    ) -> Tensor:  # fmt: skip
        small = F.linear(x, lora_A)  # (..., r)
        ctx.save_for_backward(x, weight, lora_A, lora_B, small)
        ctx.scaling, ctx.transposed = scaling, transposed
        out = F.linear(x, weight.T if transposed else weight, bias)
        out.view(-1, out.shape[-1]).addmm_(small.view(-1, small.shape[-1]), lora_B.T, alpha=scaling)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, small = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])  # (n, out)
        grad_small = (rows @ lora_B).mul_(ctx.scaling)  # (n, r)
        wanted = ctx.needs_input_grad
        weight = weight.T if ctx.transposed else weight  # (out, in)
        grad_x = (rows @ weight).addmm_(grad_small, lora_A).view_as(x) if wanted[0] else None
        grad_bias = rows.sum(0) if wanted[2] else None
        grad_A = grad_small.T @ x.reshape(-1, x.shape[-1]) if wanted[3] else None
        grad_B = (rows.T @ small.view(-1, small.shape[-1])).mul_(ctx.scaling) if wanted[4] else None
        return grad_x, None, grad_bias, grad_A, grad_B, None, None


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The injected layers by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def inject(model: nn.Module, names: list[str], dropout: float, train_bias: bool) -> None:
    """Freeze the model and replace the named layers, linear ones (targets.py), by LoRALinear, still without a link (`reset`)."""
    model.requires_grad_(False)
    for name in names:
        parent, _, child = name.rpartition(".")
        base = model.get_submodule(name)
        setattr(model.get_submodule(parent), child, LoRALinear(base, dropout, train_bias).train(base.training))


def set_scaling(model: nn.Module, scaling: float) -> None:
    """Have every injected layer weigh its link so."""
    for layer in lora_layers(model).values():
        layer.scaling = scaling


def frozen_factors(model: nn.Module) -> dict[str, Tensor]:
    """Of all injected layers, those factors of the link that are not trained, by names as Parameters have."""
    return {
        f"{name}.{part}": held for name, layer in lora_layers(model).items() for part, held in layer.frozen().items()
    }


def start_link(
    model: nn.Module, link: int, lora_rank: int, alpha: float, seed: int, device: torch.device, init: str = "gaussian",
    train: str = "both", started: bool = False,
) -> None:  # fmt: skip
    """Give every injected layer the A and B that `link` starts with, as far as they are drawn; `started`: zeros, with room for
    the factors that the link starts at (training/place_start.py)."""
    for name, layer in lora_layers(model).items():
        shapes = (lora_rank, layer.in_features), (layer.out_features, lora_rank)
        lora_A, lora_B = (
            (torch.zeros(shapes[0]), None) if started else draw_factors(seed, link, name, shapes, init, train)
        )
        layer.reset(lora_A, alpha / lora_rank, device, lora_B, train, started)
