"""Products with the gradient of the target layers' weights, which is made nowhere: a layer's is dy^T x over all tokens, and what
is wanted of it, dy^T (x omega) say, is as small as A. Collective."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from cola_ds.data.batch import AnyBatch, StepExamples
from cola_ds.distributed import accelerator, collectives, watchdog
from cola_ds.distributed.deepspeed_internals import loss_scale
from cola_ds.distributed.engine import evaluating
from cola_ds.distributed.engine_state import random_state, set_random_state
from cola_ds.errors import TrainingFailedError, UserError
from cola_ds.evaluation.fused_loss import unfused
from cola_ds.evaluation.loss import loss_sum
from cola_ds.lora.layers import LoRALinear, lora_layers
from cola_ds.training.state import Chain, step_examples

_STEPS = 6
"""At most so many steps' examples are tried: more than training leaves out in a row, by default."""
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
    Parameter gets a gradient, and engine, optimizer and random state stay what they were.

    The first product settles whose examples these are. Where a step's gradient is not finite, those of the next one take their
    place; where it does not reach every layer (an expert may have no token in a step), those of the next one are added; up to
    _STEPS in all. TrainingFailedError is raised if none is finite. For a layer that none reaches UserError is raised before the
    first step; later, when lora.init and lora.targets can be no others, its products are zeros, so that the link begins there at
    directions that mean nothing, and it is said. All processes do the same.
    """

    def __init__(self, chain: Chain):
        self._chain, self._engine = chain, chain.engine
        self._batches: list[AnyBatch] = []
        """What the sum is over."""
        self._factor = 1.0
        self._settled = False

    def times(self, right: dict[str, Tensor]) -> dict[str, Tensor]:  # by layer (in, k) -> (out, k), fp32
        """G @ right."""
        return self._of_examples(lambda x, dy, wanted: dy.T @ (x @ wanted), right, lambda layer: layer.out_features)

    def transposed_times(self, left: dict[str, Tensor]) -> dict[str, Tensor]:  # by layer (out, k) -> (in, k), fp32
        """G^T @ left."""
        return self._of_examples(lambda x, dy, wanted: x.T @ (dy @ wanted), left, lambda layer: layer.in_features)

    def _of_examples(
        self, multiply: _Product, by: dict[str, Tensor], height: Callable[[LoRALinear], int]
    ) -> dict[str, Tensor]:
        """Products of all layers, (height, k)."""
        product = partial(self._finite, multiply, by, height)
        if not self._settled:
            self._settled = True
            return self._settle(product)
        found, _ = product()
        return self._fail() if found is None else found

    def _settle(self, product: Callable[[], tuple[dict[str, Tensor] | None, list[str]]]) -> dict[str, Tensor]:
        """Find the steps whose examples the sum is over, each by itself. Returns the product with them."""
        first, end = self._chain.state.step, self._chain.step_plan.total_steps
        taken: dict[int, StepExamples] = {}
        found, unreached = None, list[str]()
        for step in range(first, min(first + _STEPS, end)):
            examples = step_examples(self._chain, step)
            self._take([examples])
            found, missed = product()
            if found is None:
                self._chain.logger.event("no first gradient", step=step, reason="it is not finite")
                continue
            unreached = [name for name in missed if name in unreached] if taken else missed
            taken[step] = examples
            if not unreached:
                break
            self._chain.logger.event("no first gradient", step=step, reason=f"none reaches {_some(unreached)}")
        if not taken:
            self._fail()
        if list(taken) != [step]:  # `found` is of another sum
            self._take(list(taken.values()))
            found, _ = product()
        if unreached:
            said = f"lora.init gradient: no example of steps {first} to {step} has a gradient that reaches {_some(unreached)}"
            if first == 0:
                raise UserError(f"{said}; leave it out of lora.targets, or use another lora.init")
            self._chain.logger.warn(f"{said}: the link that follows begins there at directions that mean nothing")
        return self._fail() if found is None else found

    def _take(self, of_steps: list[StepExamples]) -> None:
        self._batches = [batch.to(accelerator.device()) for examples in of_steps for batch in examples.micro_batches]
        # Of fp16's range, which a mean's gradients would be below.
        self._factor = loss_scale(self._engine) / max(sum(examples.loss_tokens for examples in of_steps), 1)

    def _fail(self) -> NoReturn:
        instead = (
            "; look at the data, or use another lora.init" if self._chain.state.step == 0 else "; look at the data"
        )
        raise TrainingFailedError(
            f"lora.init gradient: no gradient is finite from step {self._chain.state.step} on (steps tried: {_STEPS}){instead}"
        )

    def _finite(
        self, multiply: _Product, by: dict[str, Tensor], height: Callable[[LoRALinear], int]
    ) -> tuple[dict[str, Tensor] | None, list[str]]:
        """Products of all layers, with a smaller factor where the one of before makes fp16 overflow, None where none is finite;
        and the layers that are not reached."""
        for _ in range(_TRIES):
            found, missed = self._products(multiply, by, height)
            if bool(torch.stack([torch.isfinite(product).all() for product in found.values()]).all()):  # alike on all
                return found, missed
            del found
            self._factor /= _LESS
        return None, []

    def _products(
        self, multiply: _Product, by: dict[str, Tensor], height: Callable[[LoRALinear], int]
    ) -> tuple[dict[str, Tensor], list[str]]:
        model = self._engine.module
        layers = lora_layers(model)
        found = {name: right.new_zeros(height(layers[name]), right.shape[1]) for name, right in by.items()}
        reached: set[str] = set()

        def note(name: str, x: Tensor, dy: Tensor) -> None:
            found[name] += multiply(x.float(), dy.float(), by[name])
            reached.add(name)

        notes = {layers[name]: partial(note, name) for name in by}
        before = random_state()
        # A head whose loss is fused has no logits, whose gradient is what is wanted of it.
        with_logits = unfused(model) if model.get_output_embeddings() in notes else nullcontext()
        with evaluating(self._engine, gradients=True), with_logits, _noted(model, notes) as starts:
            for number, batch in enumerate(self._batches, start=1):
                watchdog.heartbeat(f"first gradient, micro batch {number}")
                loss = loss_sum(model, batch) * self._factor
                # Not to any Parameter: the engine would take their gradients for a step's.
                torch.autograd.grad(loss, starts.pop())
        set_random_state(before)
        names = list(by)
        seen = collectives.all_reduce_max([name in reached for name in names])  # an expert may be on some
        for product in found.values():
            collectives.all_reduce_sum(product)
        return found, [name for name, by_any in zip(names, seen, strict=True) if not by_any]


def _some(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if names[1:] else "")


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
