"""Ties under ZeRO: W takes the link up in its shards, and A and B start anew. Collectives stand in `tie_link` and
`link_is_finite` alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cola_ds.distributed import accelerator, collectives
from cola_ds.distributed.shards import (
    collective_bytes,
    copies,
    gathered,
    local_shard,
    numel,
    writable_part,
)
from cola_ds.lora.layers import (
    LoRALinear,
    add_link,
    as_weight_lies,
    delta_slice,
    draw_factors,
    inner_product,
    lora_layers,
)
from cola_ds.lora.remainders import Remainder
from cola_ds.lora.targets import is_transposed
from cola_ds.run.peft_files import bias_name, lora_names

Links = tuple[Tensor, Tensor, Tensor]
"""Links of one layer side by side: A (R, in), B (out, R), R being the sum of their LoRA ranks, and the scaling of each row of A,
(R, 1) in fp64."""

_ELEMENTS_AT_ONCE = 2**22  # bounds what a tie takes on the device: about 100 MiB of fp32 temporaries


@dataclass(kw_only=True)
class TiedLink:
    """What tying a link has found, over all processes."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Host copies of A, B and trained biases by PEFT's names without their prefix; empty unless wanted."""
    delta_square: float = 0.0
    """Squared norm of the link: of the change that was wanted."""
    shared: float = 0.0
    """Inner product of the link and the sum of those before it: |sum + link|^2 = |sum|^2 + |link|^2 + 2 <sum, link>."""
    remainder_square: float = 0.0
    """Squared norm of what rounding has kept out of the weights, over the whole chain."""
    bytes_moved: int = 0
    """Payload of the collectives, per process."""


@torch.no_grad()
def link_is_finite(model: nn.Module) -> bool:
    """Whether every A, B and trained bias is, on every process. Collective; parameters must be in their shards."""
    trained = [param for param in model.parameters() if param.requires_grad]
    finite = [torch.isfinite(local_shard(param)[0]).all().to(accelerator.device()) for param in trained]
    return not collectives.all_reduce_max([~torch.stack(finite).all()])[0]


@torch.no_grad()
def tie_link(
    model: nn.Module, remainders: dict[str, Remainder], earlier: dict[str, Links], local: bool, exact: bool, last: bool,
    keep_tensors: bool, looked_at: bool = False,
) -> TiedLink:  # fmt: skip
    """Tie (merge): W <- W + scaling * B A in every injected layer, one layer at a time, and B <- 0. Collective.

    `local` gathers A and B alone; otherwise W is gathered too, and process 0 changes it for all. `remainders` holds, for
    each layer in bf16 or fp16, the remainder of this process's part on the host. It is filled at the first knot, unless that is
    the `last` one: then nothing would use it. `earlier`, on the host too, has the links tied before of each layer
    that this process minds: layers go round the processes, so that none has all of them to multiply at each knot. It takes this
    link in, unless that is the last and nobody looks at it there (`looked_at`).
    """
    tied = TiedLink()
    delta_squares: list[Tensor] = []
    squares: list[Tensor] = []  # this process's share of the remainders'
    shared: list[Tensor] = []  # and of what the link has in common with those before it
    for number, (name, layer) in enumerate(lora_layers(model).items()):
        learnt = [layer.lora_A, layer.lora_B]
        if layer.bias is not None and layer.bias.requires_grad:
            learnt.append(layer.bias)
        whole = [] if local else [layer.weight]
        with gathered(learnt), gathered(whole, write=True):
            lora_A, lora_B = layer.factors()
            weight, start = local_shard(layer.weight) if local else (writable_part(layer.weight), 0)
            before = remainders.get(name)
            if weight.dtype != torch.float32 and before is None and not last:
                remainders[name] = Remainder.of(weight, exact)
            factors = (lora_A, lora_B, layer.scaling)
            square = _add_link(factors, layer.transposed, weight, start, before, remainders.get(name), exact)
            squares.append(square / copies(layer.weight))
            delta_squares.append(inner_product(factors, factors))
            if collectives.falls_to_this_process(number):
                if name in earlier:
                    A, B, scalings = (each.to(accelerator.device()) for each in earlier[name])
                    shared.append(inner_product((A, B, scalings), factors))
                if not last or looked_at:
                    earlier[name] = _joined(earlier.get(name), factors)
            if keep_tensors:
                names = (*lora_names(name), bias_name(name))
                tied.tensors |= {
                    key: p.detach().to("cpu", copy=True)
                    for key, p in zip(names, (lora_A, lora_B, *learnt[2:]), strict=False)
                }
        _forget(layer)
        tied.bytes_moved += collective_bytes(learnt) + collective_bytes(whole, write=True)
    # Reading a number from the device below also waits for the copies of remainders to the host.
    nothing = torch.zeros((), dtype=torch.float64, device=accelerator.device())
    over_all = collectives.all_reduce_sum(torch.stack([sum(squares, nothing), sum(shared, nothing)]))
    tied.remainder_square, tied.shared = over_all.tolist()
    tied.delta_square = float(sum(delta_squares, nothing))
    return tied


def _forget(layer: LoRALinear) -> None:
    """Have the link add nothing any more: what began at zero is zero again. (A frozen factor, and one that is drawn anew, may
    stay; so may a start, from which there is no way then.)"""
    began_at_zero = [layer.lora_B if layer.lora_B.requires_grad else layer.lora_A]
    for factor in began_at_zero if layer.start_A is None else (layer.lora_A, layer.lora_B):
        local_shard(factor)[0].zero_()


def _joined(before: Links | None, factors: tuple[Tensor, Tensor, float]) -> Links:
    """A layer's links on the host, with the one that it has now."""
    A, B = (half.detach().to("cpu", copy=True) for half in factors[:2])
    scalings = torch.full((len(A), 1), factors[2], dtype=torch.float64)
    if before is None:
        return A, B, scalings
    return torch.cat([before[0], A]), torch.cat([before[1], B], dim=1), torch.cat([before[2], scalings])


def _add_link(
    factors: tuple[Tensor, Tensor, float], transposed: bool, weight: Tensor, start: int, before: Remainder | None,
    after: Remainder | None, exact: bool,
) -> Tensor:  # fmt: skip
    """Add a layer's link, (A, B, scaling), to a flat part of its weight that begins at `start`, with the remainder of `before`;
    the new one goes to `after`. `transposed`: the weight is (in, out). None: there is none.
    -> (), the new remainder's squared norm"""
    device, scaling = factors[0].device, factors[2]
    lying = as_weight_lies(*factors[:2], transposed)
    nothing = torch.zeros((), device=device)
    square = nothing.double()
    for begin in range(0, weight.numel(), _ELEMENTS_AT_ONCE):
        piece = slice(begin, min(begin + _ELEMENTS_AT_ONCE, weight.numel()))
        delta = delta_slice(*lying, scaling, start + begin, piece.stop - begin)
        remainder = nothing if before is None else before.read(begin, weight[piece], device)
        left = add_link(weight[piece], delta, remainder, exact)
        square += torch.linalg.vector_norm(left, dtype=torch.float64).square()
        if after is not None:
            after.write(begin, weight[piece], left)
    return square


@torch.no_grad()
def tie_saved(
    model: nn.Module, name: str, factors: tuple[Tensor, Tensor, float], remainders: dict[str, Remainder], local: bool,
    exact: bool, last: bool,
) -> None:  # fmt: skip
    """Tie a saved link of one layer, whose A, B (whole, on the device) and scaling are `factors`: the arithmetic of `tie_link`,
    without a link in the model. Collective."""
    layer = model.get_submodule(name)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    with gathered([] if local else [weight], write=True):
        part, start = local_shard(weight) if local else (writable_part(weight), 0)
        before = remainders.get(name)
        if part.dtype != torch.float32 and before is None and not last:
            remainders[name] = Remainder.of(part, exact)
        _add_link(factors, is_transposed(layer), part, start, before, remainders.get(name), exact)


@torch.no_grad()
def put_bias(layer: nn.Module, bias: Tensor) -> None:
    """Give a layer's bias, wherever it lies, new values (out,). Collective."""
    own = layer.bias
    assert isinstance(own, Tensor)
    with gathered([own], write=True):
        part = writable_part(own)
        part.copy_(bias[: part.numel()])


@torch.no_grad()
def restart_link(
    model: nn.Module, link: int, alpha: float, seed: int, init: str = "gaussian", train: str = "both"
) -> None:  # fmt: skip
    """Give every injected layer what `link` starts with, at the same LoRA rank, in its shards. What begins at zero is zero since
    the tie."""
    for name, layer in lora_layers(model).items():
        lora_rank = numel(layer.lora_A) // layer.in_features
        layer.scaling = alpha / lora_rank  # a tie may have weighed the link before otherwise
        if layer.start_A is not None:
            continue  # nothing is drawn
        shapes = (lora_rank, layer.in_features), (layer.out_features, lora_rank)
        drawn = draw_factors(seed, link, name, shapes, init, train)
        for factor, values in zip((layer.lora_A, layer.lora_B), drawn, strict=True):
            if values is not None:
                put_whole(factor, values)


@torch.no_grad()
def put_whole(factor: Tensor, values: Tensor) -> None:
    """Give A or B, wherever it lies, new values: what of them this process keeps."""
    part, start = local_shard(factor)
    part.copy_(values.flatten()[start : start + part.numel()])
