"""Products with the gradient of the target layers' weights, which is made nowhere: a layer's is dy^T x over all tokens, and what
is wanted of it, dy^T (x omega) say, is as small as A. Collective."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cola_ds.distributed import accelerator, collectives, watchdog
from cola_ds.distributed.engine import evaluating, fp16_scale
from cola_ds.distributed.engine_state import random_state, set_random_state
from cola_ds.evaluation.loss import loss_sum
from cola_ds.lora.layers import LoRALinear, lora_layers
from cola_ds.training.state import Chain, step_examples

_Note = Callable[[Tensor, Tensor], None]  # of (n, in), (n, out): a layer's inputs, and the gradient of its outputs


class GradientProducts:
    """Of the gradient G (out, in) of each layer's weight, summed over the examples of the step that comes next, on all processes.

    Each product takes a forward and a backward pass over them, without dropout, towards the output of the embeddings: no
    Parameter gets a gradient, and engine, optimizer and random state stay what they were.
    """

    def __init__(self, chain: Chain):
        self._engine = chain.engine
        examples = step_examples(chain, chain.state.step)
        self._batches = [batch.to(accelerator.device()) for batch in examples.micro_batches]
        # Directions do not depend on it: of fp16's range, which a mean's gradients would be below.
        self._factor = fp16_scale(chain.engine) / max(examples.loss_tokens, 1)

    def times(self, right: dict[str, Tensor]) -> dict[str, Tensor]:  # by layer (in, k) -> (out, k), fp32
        """G @ right."""
        return self._products(lambda x, dy, wanted: dy.T @ (x @ wanted), right)

    def transposed_times(self, left: dict[str, Tensor]) -> dict[str, Tensor]:  # by layer (out, k) -> (in, k), fp32
        """G^T @ left."""
        return self._products(lambda x, dy, wanted: x.T @ (dy @ wanted), left)

    def _products(
        self, multiply: Callable[[Tensor, Tensor, Tensor], Tensor], by: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def note(name: str, x: Tensor, dy: Tensor) -> None:
            product = multiply(x.float(), dy.float(), by[name])
            found[name] = found[name] + product if name in found else product

        notes = {layer: partial(note, name) for name, layer in lora_layers(self._engine.module).items()}
        before = random_state()
        with evaluating(self._engine, gradients=True), _noted(self._engine.module, notes) as starts:
            for number, batch in enumerate(self._batches, start=1):
                watchdog.heartbeat(f"first gradient, micro batch {number}")
                loss = loss_sum(self._engine.module, batch) * self._factor
                # Not to any Parameter: the engine would take their gradients for a step's.
                torch.autograd.grad(loss, starts.pop())
        set_random_state(before)
        return {name: collectives.all_reduce_sum(found[name]) for name in by}


class _Tap(torch.autograd.Function):
    """A layer's output, unchanged; its gradient, and the layer's input, are noted on the way back. The input is kept as autograd
    keeps tensors: activation checkpointing computes it again."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, note: _Note) -> Tensor:  # (..., out), (..., in) -> (..., out)
        ctx.save_for_backward(x)
        ctx.note = note
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        ctx.note(x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]))
        return grad, None, None


@contextmanager
def _noted(model: Any, notes: Mapping[LoRALinear, _Note]) -> Iterator[list[Tensor]]:
    """Passes inside the block tell each layer's note. Into the list goes, of each forward pass, where its gradients end: the
    output of the embeddings."""
    starts: list[Tensor] = []

    def begin(_: Any, args: Any, out: Tensor) -> Tensor:
        starts.append(out.detach().requires_grad_())
        return starts[-1]

    hooks = [model.get_input_embeddings().register_forward_hook(begin)]
    for layer, note in notes.items():
        hooks.append(
            layer.register_forward_hook(lambda _, args, out, note=note: _Tap.apply(out, args[0].detach(), note))
        )
    for module in model.modules():  # Transformers recomputes activations of what is in training alone
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
    try:
        yield starts
    finally:
        for hook in hooks:
            hook.remove()
