"""Fused loss: the output head gives each token's cross-entropy, and the logits of all tokens never stand in memory together.

They are computed for some tokens at a time. Where the head is a frozen nn.Linear, as under LoRA, the gradient of what goes into
it follows from the same logits, in the forward pass (as Liger's fused linear cross-entropy has it, arXiv 2410.10989): nothing is
computed twice, and what is kept for the backward pass is as large as the head's input. Another head is asked again there.

Shapes as in data/batch.py; N = B K labels, H the size of what goes into the head, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cola_ds.data.batch import IGNORED, AnyBatch
from cola_ds.data.collate import collate
from cola_ds.distributed import accelerator, collectives, watchdog
from cola_ds.distributed.engine import Engine, evaluating
from cola_ds.evaluation.logits import labelled_logits

_ELEMENTS_AT_ONCE = {"cpu": 2**23}
"""Logits that are computed together, by the kind of device: few enough for a CPU's caches."""
_ELEMENTS_AT_ONCE_ELSEWHERE = 2**26
"""Enough to keep a GPU busy: 256 MiB in fp32."""
_FP16_SCALE = 1024.0
"""What gradients in fp16 are multiplied by while they are kept: the probabilities of most ids are below what it can hold."""
_FUSED: WeakSet[nn.Module] = WeakSet()
"""Models whose logits are their head's own, as `allow` has found."""


def token_losses(model: nn.Module, batch: AnyBatch) -> Tensor:
    """The cross-entropy (nats) at each label, 0 where it is IGNORED. -> (B, K), fp32

    `model` is the engine, or the causal LM itself. Fused where `allow` has found that the model's logits are its head's own.
    """
    inner: Any = getattr(model, "module", model)
    if inner in _FUSED:
        with _head_of(inner, lambda hidden: _losses(inner.get_output_embeddings(), hidden, batch.labels)):
            return labelled_logits(model, batch).squeeze(-1)
    logits = labelled_logits(model, batch).flatten(0, 1).float()  # (N, V)
    losses = F.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(batch.labels)


def allow(engine: Engine) -> bool:
    """Have `token_losses` fuse head and loss, if the model's logits are what its head gives, to the bit: no scaling, no softcap.
    Collective; no gradients, and the engine is as before after it.

    It is tried: the head gives numbers that every rescaling changes, and the model must return them.
    """
    watchdog.heartbeat("proof of the loss")
    model = engine.module
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return False
    batch = collate([([1, 2, 3], [(0, 3)]), ([2, 1], [(0, 2)])]).to(accelerator.device())
    given: list[Tensor] = []

    def known(hidden: Tensor) -> Tensor:
        numbers = (torch.arange(head.out_features, device=hidden.device) % 97 - 60).to(hidden.dtype)
        given.append(numbers.expand(*hidden.shape[:-1], -1))
        return given[-1].clone()  # which a model may change in place

    with evaluating(engine), _head_of(model, known):
        logits = labelled_logits(engine, batch)
    is_its_own = len(given) == 1 and logits.shape == given[0].shape and torch.equal(logits, given[0])
    (differs,) = collectives.all_reduce_max([float(not is_its_own)])  # one answer for all
    if not differs:
        _FUSED.add(model)
    return not differs


@contextmanager
def as_fused(model: nn.Module, kind: str, fused: bool) -> Iterator[None]:
    """Take a model on the meta device for one that `allow` has found fit, if it is `fused`, on a device of that kind."""
    _ELEMENTS_AT_ONCE["meta"] = _ELEMENTS_AT_ONCE.get(kind, _ELEMENTS_AT_ONCE_ELSEWHERE)
    if fused:
        _FUSED.add(model)
    try:
        yield
    finally:
        del _ELEMENTS_AT_ONCE["meta"]
        _FUSED.discard(model)


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Passes inside the block have logits, which hooks of the head see."""
    was_fused = model in _FUSED
    _FUSED.discard(model)
    try:
        yield
    finally:
        if was_fused:
            _FUSED.add(model)


@contextmanager
def _head_of(model: Any, forward: Any) -> Iterator[None]:
    """The model with another forward function of its output head, whose hooks stay: under ZeRO-3 they gather its weight."""
    head = model.get_output_embeddings()
    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def _losses(head: nn.Linear, hidden: Tensor, labels: Tensor) -> Tensor:  # (B, K, H), (B, K) -> (B, K, 1)
    rows, wanted = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    at_once = max(1, _ELEMENTS_AT_ONCE.get(hidden.device.type, _ELEMENTS_AT_ONCE_ELSEWHERE) // head.out_features)
    if type(head) is nn.Linear and not any(param.requires_grad for param in head.parameters()):
        found = cast(Tensor, _FrozenHeadLoss.apply(rows, head.weight, head.bias, wanted, at_once))
    else:
        pieces = zip(rows.split(at_once), wanted.split(at_once), strict=True)
        found = torch.cat([checkpoint(_piece, head, *piece, use_reentrant=False) for piece in pieces])
    return found.view(*labels.shape, 1)


def _piece(head: nn.Linear, hidden: Tensor, labels: Tensor) -> Tensor:  # (n, H), (n,) -> (n,)
    logits = type(head).forward(head, hidden)  # not the instance's, which is this loss
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")


class _FrozenHeadLoss(torch.autograd.Function):
    """Each row's cross-entropy under a frozen linear head. Its gradient in `hidden` is (softmax - one-hot) W, times that of the
    loss itself, which is a factor of the row."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, at_once: int
    ) -> Tensor:  # (N, H), (V, H), (V,), (N,) -> (N,)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        grads = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        ctx.scale = _FP16_SCALE if hidden.dtype == torch.float16 else 1.0
        for start in range(0, len(hidden), at_once):
            piece = slice(start, start + at_once)
            log_softmax = F.log_softmax(F.linear(hidden[piece], weight, bias).float(), dim=-1)  # (n, V)
            rows, wanted = torch.arange(len(log_softmax), device=hidden.device), labels[piece].clamp(min=0)
            losses[piece] = -log_softmax[rows, wanted]
            if grads is not None:
                softmax = log_softmax.exp_()
                softmax[rows, wanted] -= 1.0
                if ctx.scale != 1.0:
                    softmax *= ctx.scale
                torch.mm(softmax.to(hidden.dtype), weight, out=grads[piece])
        ignored = labels == IGNORED
        ctx.save_for_backward(grads, ignored)
        return losses.masked_fill_(ignored, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads, ignored = ctx.saved_tensors
        factors = (grad.float() / ctx.scale).masked_fill(ignored, 0.0)
        return (grads * factors[:, None]).to(grads.dtype), None, None, None, None
