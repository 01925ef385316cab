"""A micro step on the meta device: nothing is computed, and every tensor that it would hold is counted.

The model's own code runs forwards and backwards, with the LoRA layers, the loss and the activation checkpointing of a run, and
tensors that have shapes but no memory. What autograd keeps, what is there for a moment only, and the order in which modules want
their weights follow from that, for any architecture. Attention alone is a stand-in, which keeps what flash attention keeps: its
inputs, its output, and a number for each head and position.
"""

from __future__ import annotations

import copy
import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from cola_ds.data.batch import PackedBatch
from cola_ds.errors import UserError, cut, first_line
from cola_ds.evaluation.attention import VARLEN, repeats_keys, varlen_attention
from cola_ds.evaluation.fused_loss import as_fused
from cola_ds.evaluation.loss import loss_sum
from cola_ds.lora.layers import inject, lora_layers

_CAPS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""What configs call a change of the logits after the head, with which the loss is not fused."""


@dataclass
class MicroStep:
    """What a micro step holds beside weights, gradients and optimizer, in bytes, and the order in which modules run."""

    visits: list[tuple[bool, str]] = field(default_factory=list)
    """A module that has weights of its own, by name, begins (True) or has ended (False), forwards and then backwards."""
    peaks: list[int] = field(default_factory=list)
    """The most that is held after that many visits and before the next one; one more than visits."""
    kept: int = 0
    """What is kept for the backward pass when it begins."""

    @property
    def peak(self) -> int:
        return max(self.peaks)


class _Counting(TorchDispatchMode):
    """Counts the bytes of what operators make and somebody still has."""

    def __init__(self, step: MicroStep):
        super().__init__()
        self.step, self.held = step, 0
        self.alive: dict[int, int] = {}
        step.peaks.append(0)

    def known(self, tensors: Iterator[Tensor]) -> None:
        """Leave out what these are stored in."""
        for tensor in tensors:
            self.alive.setdefault(tensor.untyped_storage()._cdata, 0)

    def visit(self, begins: bool, name: str) -> None:
        self.step.visits.append((begins, name))
        self.step.peaks.append(self.held)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for made in tree_iter(found):
            if isinstance(made, Tensor) and made.device.type == "meta":
                self._count(made.untyped_storage())
        self.step.peaks[-1] = max(self.step.peaks[-1], self.held)
        return found

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        self.held += storage.nbytes()
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.held -= self.alive.pop(key, 0)


class _Attention(torch.autograd.Function):
    """Keeps what flash attention keeps."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # (..., T, heads, D) three times
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, repeats: bool = False, **options: Any
) -> tuple[Tensor, None]:
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    groups = query.shape[2] // key.shape[2]
    if groups > 1 and repeats:
        key, value = (part.repeat_interleave(groups, dim=2) for part in (key, value))
    return _Attention.apply(query, key, value), None


def trace(
    skeleton: Any, targets: list[str], lora_rank: int | None, rows: tuple[int, int], *, attention: str | None,
    dtype: torch.dtype, dropout: float = 0.0, biases: bool = False, recomputes: bool = False, device: str = "cuda",
    trains: bool = True, started: bool = False,
) -> MicroStep:  # fmt: skip
    """Trace a micro step of `rows` (rows, tokens each) of text whose every token is predicted, on a `device` of that kind.

    `lora_rank` None: every weight is trained (method full). `attention` is Transformers' name of it; None: its own choice.
    `started`: links start elsewhere than at zero. Without `trains` it is a forward pass alone, as an evaluation has.

    Raises UserError for a model whose code does not run on the meta device: it looks at values, which there are none of there.
    """
    model = copy.deepcopy(skeleton).to(dtype)
    if lora_rank is None:
        model.requires_grad_(True)
    else:
        inject(model, targets, dropout, biases)
        for layer in lora_layers(model).values():
            layer.reset(
                torch.empty(lora_rank, layer.in_features, device="meta"), 1.0, torch.device("meta"), started=started
            )
    if recomputes:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    count, width = (1, rows[0] * rows[1]) if attention == VARLEN else rows
    takes_it = getattr(model, "_supports_attention_backend", False)
    eager = (
        getattr(sys.modules[type(model).__module__], "eager_attention_forward", None) if attention == "eager" else None
    )
    step = MicroStep()
    fused = isinstance(model.get_output_embeddings(), nn.Linear) and not any(
        getattr(model.config.get_text_config(), name, None) for name in _CAPS
    )
    try:
        with as_fused(model, device, fused), _stand_in(model, device, eager) if takes_it else nullcontext():
            _run(model.train(trains), _batch(count, width), step, trains)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"{type(model).__name__} cannot be planned: its code does not run without weights, as where it looks at values "
            f"({cut(first_line(error), 120)}); measure a run of a few steps"
        ) from None
    return step


@contextmanager
def _stand_in(model: Any, device: str, eager: Any) -> Iterator[None]:
    """The stand-in, or a model's own `eager` attention, in varlen's place: a model with that is given no mask to make."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionMaskInterface.register(VARLEN, sdpa_mask)
    stand_in = partial(_attention, repeats=device == "cuda" and repeats_keys())
    AttentionInterface.register(VARLEN, eager or stand_in)
    model.config.get_text_config()._attn_implementation = VARLEN
    try:
        yield
    finally:
        AttentionInterface.register(VARLEN, varlen_attention)


def _batch(rows: int, width: int) -> PackedBatch:
    ids = torch.empty(rows, width, dtype=torch.long, device="meta")
    positions = torch.empty(width - 1, dtype=torch.long, device="meta")
    places = torch.tensor([0, rows * width], dtype=torch.int32, device="cpu")
    return PackedBatch(ids, ids, positions, ids[:, 1:], places, width)


def _run(model: Any, batch: PackedBatch, step: MicroStep, trains: bool) -> None:
    counting = _Counting(step)
    counting.known(iter([*model.parameters(), *model.buffers(), batch.input_ids]))
    with _told(model, counting), torch.set_grad_enabled(trains), counting:
        loss = loss_sum(model, batch)
        step.kept = counting.held
        if trains:
            loss.backward()


@contextmanager
def _told(model: nn.Module, counting: _Counting) -> Iterator[None]:
    """`counting` hears of every module with weights of its own as DeepSpeed's hooks do."""

    def hook(name: str, module: nn.Module) -> None:
        def begin(_: nn.Module, args: Any) -> None:
            counting.visit(True, name)
            for given in args:
                if isinstance(given, Tensor) and given.requires_grad:
                    given.register_hook(lambda grad: counting.visit(False, name))
                    break

        def end(_: nn.Module, args: Any, out: Any) -> None:
            counting.visit(False, name)
            made = next((each for each in tree_iter(out) if isinstance(each, Tensor) and each.requires_grad), None)
            if made is not None:
                made.register_hook(lambda grad: counting.visit(True, name))

        hooks.append(module.register_forward_pre_hook(begin))
        hooks.append(module.register_forward_hook(end))

    hooks: list[Any] = []
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            hook(name, module)
    try:
        yield
    finally:
        for each in hooks:
            each.remove()
