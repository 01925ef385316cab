"""Products with the gradient of the target layers' weights, which is made nowhere: a layer's is dy^T x over all tokens, and what
is wanted of it, dy^T (x omega) say, is as small as A. Collective."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cola_ds.distributed import accelerator, collectives, watchdog
from cola_ds.distributed.deepspeed_internals import loss_scale
from cola_ds.distributed.engine import evaluating
from cola_ds.distributed.engine_state import random_state, set_random_state
from cola_ds.errors import TrainingFailedError, UserError
from cola_ds.evaluation.loss import loss_sum
from cola_ds.lora.layers import LoRALinear, lora_layers
from cola_ds.training.state import Chain, step_examples

_TRIES, _LESS = 5, 16.0
"""How often a pass is tried where the gradient overflows, and by how much the loss is divided then: at last by 2^16, which is the
loss scale that DeepSpeed begins with in fp16."""

_Product = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # of a layer's inputs, gradients of its outputs, and what they meet
_Note = Callable[[Tensor, Tensor], None]  # of (n, in), (n, out): a layer's inputs, and the gradient of its outputs


class GradientProducts:
    """Of the gradient G (out, in) of each layer's weight, summed over the examples of the step that comes next, on all processes,
    but for a positive factor: what is wanted are directions.

    Each product takes a forward and a backward pass over them, without dropout, towards the output of the embeddings: no
    Parameter gets a gradient, and engine, optimizer and random state stay what they were. Both raise UserError, on all processes,
    for a layer that no gradient reaches, and TrainingFailedError where the gradient is not finite.
    """

    def __init__(self, chain: Chain):
        self._engine = chain.engine
        self._step = chain.state.step
        examples = step_examples(chain, chain.state.step)
        self._batches = [batch.to(accelerator.device()) for batch in examples.micro_batches]
        # Of fp16's range, which a mean's gradients would be below.
        self._factor = loss_scale(chain.engine) / max(examples.loss_tokens, 1)

    def times(self, right: dict[str, Tensor]) -> dict[str, Tensor]:  # by layer (in, k) -> (out, k), fp32
        """G @ right."""
        return self._finite(lambda x, dy, wanted: dy.T @ (x @ wanted), right, lambda layer: layer.out_features)

    def transposed_times(self, left: dict[str, Tensor]) -> dict[str, Tensor]:  # by layer (out, k) -> (in, k), fp32
        """G^T @ left."""
        return self._finite(lambda x, dy, wanted: x.T @ (dy @ wanted), left, lambda layer: layer.in_features)

    def _finite(
        self, multiply: _Product, by: dict[str, Tensor], height: Callable[[LoRALinear], int]
    ) -> dict[str, Tensor]:
        """Products of all layers, (height, k), with a smaller factor where the one of before makes fp16 overflow."""
        for _ in range(_TRIES):
            found = self._products(multiply, by, height)
            if bool(torch.stack([torch.isfinite(product).all() for product in found.values()]).all()):  # alike on all
                return found
            del found
            self._factor /= _LESS
        raise TrainingFailedError(
            f"lora.init gradient: the gradient at step {self._step} is not finite; use another lora.init"
        )

    def _products(
        self, multiply: _Product, by: dict[str, Tensor], height: Callable[[LoRALinear], int]
    ) -> dict[str, Tensor]:
        layers = lora_layers(self._engine.module)
        found = {name: right.new_zeros(height(layers[name]), right.shape[1]) for name, right in by.items()}
        reached: set[str] = set()

        def note(name: str, x: Tensor, dy: Tensor) -> None:
            found[name] += multiply(x.float(), dy.float(), by[name])
            reached.add(name)

        notes = {layers[name]: partial(note, name) for name in by}
        before = random_state()
        with evaluating(self._engine, gradients=True), _noted(self._engine.module, notes) as starts:
            for number, batch in enumerate(self._batches, start=1):
                watchdog.heartbeat(f"first gradient, micro batch {number}")
                loss = loss_sum(self._engine.module, batch) * self._factor
                # Not to any Parameter: the engine would take their gradients for a step's.
                torch.autograd.grad(loss, starts.pop())
        set_random_state(before)
        self._check_reached(reached, by)
        for product in found.values():
            collectives.all_reduce_sum(product)
        return found

    def _check_reached(self, reached: set[str], wanted: Iterable[str]) -> None:
        """Raise UserError on all processes where a layer was reached on none. (An expert may be on some.)"""
        names = list(wanted)
        seen = collectives.all_reduce_max([name in reached for name in names])
        missed = [name for name, by_any in zip(names, seen, strict=True) if not by_any]
        if missed:
            others = f" (and {len(missed) - 1} more)" if missed[1:] else ""
            raise UserError(
                f"lora.init gradient: no example of step {self._step} has a gradient that reaches {missed[0]}{others}; leave it "
                "out of lora.targets, or use another lora.init"
            )


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
    with _recomputing(model):
        try:
            yield starts
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def _recomputing(model: nn.Module) -> Iterator[None]:
    """With activation checkpointing activations are computed again, without dropout, in passes inside the block.

    Transformers does so for what is in training alone; and such a module may drop by a number of its own then (OPT's blocks do),
    which is 0 for the time. The nn.Dropout in it are modules, and not in training.
    """
    numbers = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if "drop" in name and isinstance(value, float)
    ]
    for module, name, _ in numbers:
        setattr(module, name, 0.0)
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
    try:
        yield
    finally:
        for module, name, value in numbers:
            setattr(module, name, value)
