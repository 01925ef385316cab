"""Attention on the CPU of examples laid end to end: an operator, so that torch.compile does not look at their lengths."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

_aten = torch.ops.aten
_LONG = 256
"""Positions up to which torch's operator is as fast."""
_BLOCK = 64


def each_alone(query: Tensor, key: Tensor, value: Tensor, places: Tensor, scaling: float | None) -> Tensor:
    """Causal attention within each stretch [places[i], places[i + 1]). (N, heads, D), (N, key heads, D) twice -> (N, heads, D)"""
    found, _ = _forward(query, key, value, places, scaling)
    return cast(Tensor, found)


def _alone(parts: tuple[Tensor, ...], groups: int) -> list[Tensor]:  # (t, heads, D) each -> (1, heads, t, D)
    q, k, v, *others = (part.transpose(0, 1)[None] for part in parts)
    if groups > 1:
        k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))
    return [q, k, v, *others]


@torch.library.custom_op("cola_ds::each_alone", mutates_args=(), device_types="cpu")
def _forward(
    query: Tensor, key: Tensor, value: Tensor, places: Tensor, scaling: float | None
) -> tuple[Tensor, Tensor]:  # -> (N, heads, D), and (heads, N) for the backward pass
    lengths = places.diff().tolist()
    outs, sums = [], []
    for parts in zip(*(part.split(lengths) for part in (query, key, value)), strict=True):
        q, k, v = _alone(parts, query.shape[1] // key.shape[1])
        out, logsumexp = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scaling)
        outs.append(out[0].transpose(0, 1))
        sums.append(logsumexp[0])
    return torch.cat(outs), torch.cat(sums, dim=1)


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, places: Tensor, scaling: float | None) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[1], query.shape[0], dtype=dtype)


def _by_blocks(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, out: Tensor, sums: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:  # (t, heads, D), (t, key heads, D) twice, (t, heads, D) twice, (heads, t)
    """The gradients in query, key and value, for a block of positions at a time, in the same memory as torch's own operator.

    The heads that share a key are rows of one product: at 512 positions in fp32 it takes two thirds of the operator's time.
    """
    groups = key.shape[1]

    def rows(part: Tensor) -> Tensor:  # (n, heads, d) -> (key heads, heads / key heads * n, d)
        return part.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)

    keys, values = key.transpose(0, 1), value.transpose(0, 1)  # (key heads, t, D)
    of_query, of_keys, of_values = torch.empty_like(query), torch.zeros_like(keys), torch.zeros_like(values)
    shares = (grad * out).sum(-1, keepdim=True)  # (t, heads, 1)
    for begin in range(0, len(query), _BLOCK):
        end = min(begin + _BLOCK, len(query))
        seen, here = slice(0, end), slice(begin, end)
        q, above = rows(query[here]), rows(grad[here])
        weights = torch.baddbmm(rows(sums.T[here, :, None]), q, keys[:, seen].mT, beta=-1, alpha=scaling)
        hidden = torch.full((end - begin, end - begin), float("-inf")).triu(1)
        weights.unflatten(1, (-1, end - begin))[..., begin:] += hidden
        weights.exp_()
        of_values[:, seen].baddbmm_(weights.mT, above)
        weights *= torch.baddbmm(rows(shares[here]), above, values[:, seen].mT, beta=-1)
        found = torch.bmm(weights, keys[:, seen]).mul_(scaling)
        of_query[here] = found.unflatten(1, (-1, end - begin)).permute(2, 0, 1, 3).flatten(1, 2)
        of_keys[:, seen].baddbmm_(weights.mT, q, alpha=scaling)
    return of_query, of_keys.transpose(0, 1), of_values.transpose(0, 1)


@torch.library.custom_op("cola_ds::each_alone_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    places: Tensor,
    scaling: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = places.diff().tolist()
    groups = query.shape[1] // key.shape[1]
    grads = []
    pieces = zip(*(part.split(lengths) for part in (query, key, value, grad, out)), strict=True)
    for parts, logsumexp in zip(pieces, sums.split(lengths, dim=1), strict=True):
        if len(parts[0]) > _LONG and query.dtype == torch.float32:
            q, k, v, from_above, found = parts
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            grads.append(_by_blocks(q, k, v, from_above, found, logsumexp, scale))
            continue
        q, k, v, from_above, found = _alone(parts, groups)
        of_all = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            from_above, q, k, v, found, logsumexp[None], 0.0, True, scale=scaling
        )
        of_q, of_k, of_v = (each[0].transpose(0, 1) for each in of_all)  # (t, heads, D)
        if groups > 1:
            of_k, of_v = (each.unflatten(1, (-1, groups)).sum(2) for each in (of_k, of_v))
        grads.append((of_q, of_k, of_v))
    of_query, of_key, of_value = (torch.cat(each) for each in zip(*grads, strict=True))
    return of_query, of_key, of_value


@_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    query, key, value, places, ctx.scaling = inputs
    ctx.save_for_backward(query, key, value, *output, places)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, out, sums, places = ctx.saved_tensors
    return (*_backward(grad, query, key, value, out, sums, places, ctx.scaling), None, None)


_forward.register_autograd(_gradients, setup_context=_keep)
