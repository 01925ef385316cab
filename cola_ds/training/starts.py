"""What a link begins with where a draw is not enough: orthogonal to what came before, or at factors of its own (lora.init).
Collective, as is all here."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cola_ds.distributed import accelerator, collectives, watchdog
from cola_ds.distributed.engine import restart_optimizer
from cola_ds.distributed.products import times, transposed_times
from cola_ds.errors import TrainingFailedError
from cola_ds.lora.layers import LoRALinear, draw_factors, lora_layers
from cola_ds.lora.starts import (
    draw_sketch,
    gradient_factors,
    orthogonal_rows,
    orthonormal,
    pissa_factors,
    singular,
    sketch_width,
)
from cola_ds.lora.tie import put_whole
from cola_ds.training.first_gradient import GradientProducts
from cola_ds.training.state import Chain

_WEIGHT_ROUNDS, _GRADIENT_ROUNDS = 4, 1
"""How often the iteration is repeated: a round costs two products with each weight, or two passes over a step's examples."""


def place_start(chain: Chain, link: int) -> None:
    """Give the link that has just been begun (drawn, and nothing else; the engine around it) what it begins with, and the
    optimizer masters of that. Parameters must be in their shards, and are so afterwards."""
    config = chain.config
    if config.lora.init == "orthogonal" and link > 1:
        _make_orthogonal(chain, link)
    elif config.starts_elsewhere:
        watchdog.heartbeat(f"start of link {link}")
        layers = lora_layers(chain.engine.module)
        directions = _of_gradient(chain, link) if config.lora.init == "gradient" else _of_weights(chain, link)
        for name, U, S, V in directions:
            _start_at(layers[name], *_factors(chain, link, layers[name], U, S, V))
    else:
        return
    restart_optimizer(chain.engine, keep_state=config.chain.optimizer_at_knot != "reset")


def _make_orthogonal(chain: Chain, link: int) -> None:
    """Whoever minds a layer's earlier links makes its A, and gives it to all."""
    config, lora_rank = chain.config, chain.config.lora_ranks[link - 1]
    for number, (name, layer) in enumerate(lora_layers(chain.engine.module).items()):
        shapes = (lora_rank, layer.in_features), (layer.out_features, lora_rank)
        lora_A = torch.zeros(shapes[0], device=accelerator.device())
        if collectives.falls_to_this_process(number):
            drawn, _ = draw_factors(config.run.seed, link, name, shapes, config.lora.init, config.lora_trains[link - 1])
            assert drawn is not None
            earlier = chain.state.earlier[name][0].to(accelerator.device())
            lora_A.copy_(orthogonal_rows(drawn.to(accelerator.device()), earlier))
        put_whole(layer.lora_A, collectives.all_reduce_sum(lora_A))  # zeros elsewhere: the same bits


def _of_weights(chain: Chain, link: int) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """The leading singular directions of each layer's weight, as it is: U, S, V."""
    for name, layer in lora_layers(chain.engine.module).items():
        Q = orthonormal(times(layer.weight, _sketch(chain, link, name, layer)))
        Z = transposed_times(layer.weight, Q)
        for _ in range(_WEIGHT_ROUNDS):
            Q = orthonormal(times(layer.weight, orthonormal(Z)))
            Z = transposed_times(layer.weight, Q)
        yield name, *singular(Q, Z)


def _of_gradient(chain: Chain, link: int) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Those of the gradient of each layer's weight, on the examples of the step that comes next."""
    layers = lora_layers(chain.engine.module)
    products = GradientProducts(chain)
    Y = products.times({name: _sketch(chain, link, name, layer) for name, layer in layers.items()})
    Q = {name: orthonormal(columns) for name, columns in Y.items()}
    Z = products.transposed_times(Q)
    for _ in range(_GRADIENT_ROUNDS):
        Y = products.times({name: orthonormal(columns) for name, columns in Z.items()})
        Q = {name: orthonormal(columns) for name, columns in Y.items()}
        Z = products.transposed_times(Q)
    if not all(bool(torch.isfinite(columns).all()) for columns in Z.values()):
        raise TrainingFailedError(
            f"lora.init gradient: the gradient at step {chain.state.step} is not finite; use another lora.init"
        )
    yield from ((name, *singular(Q[name], Z[name])) for name in layers)


def _sketch(chain: Chain, link: int, name: str, layer: LoRALinear) -> Tensor:  # -> (in, k)
    k = sketch_width(chain.config.lora_ranks[link - 1], (layer.in_features, layer.out_features))
    return draw_sketch(chain.config.run.seed, link, name, (layer.in_features, k)).to(accelerator.device())


def _factors(
    chain: Chain, link: int, layer: LoRALinear, U: Tensor, S: Tensor, V: Tensor
) -> tuple[Tensor, Tensor]:  # -> (r, in), (out, r)
    """A0 and B0: those of process 0, on all. (Other processors round otherwise.)"""
    lora_rank = chain.config.lora_ranks[link - 1]
    if chain.config.lora.init == "pissa":
        A0, B0 = pissa_factors(U, S, V, lora_rank, layer.scaling)
    else:
        A0, B0 = gradient_factors(U, V, lora_rank)
    mine = torch.cat([A0.flatten(), B0.flatten()])
    both = collectives.broadcast_tensor(mine, mine.numel())
    return both[: A0.numel()].view_as(A0), both[A0.numel() :].view_as(B0)


@torch.no_grad()
def _start_at(layer: LoRALinear, A0: Tensor, B0: Tensor) -> None:
    assert layer.start_A is not None and layer.start_B is not None
    layer.start_A.copy_(A0)
    layer.start_B.copy_(B0)
    put_whole(layer.lora_A, A0)
    put_whole(layer.lora_B, B0)
