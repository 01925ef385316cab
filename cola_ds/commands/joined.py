"""A chain as one adapter: its links side by side, or the nearest one of a lower LoRA rank. Plain torch; no matrix of a weight's
size is made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cola_ds.run.peft_files import is_bias, layers_of, lora_names

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm/config/lora.py, 0.33: what --max-lora-rank may be
_VLLM_RANK = 16  # unless it is told otherwise


def join(links: Sequence[dict[str, Tensor]], scalings: Sequence[float]) -> dict[str, Tensor]:
    """sum of scaling_i B_i A_i = [scaling_1 B_1, scaling_2 B_2, ..] [A_1; A_2; ..], in fp32, with a scaling of 1; and each bias
    as the last link that trained it left it. A layer that a link has not got has zeros in its place: one rank for all."""
    joined: dict[str, Tensor] = {}
    ranks = [max(len(link[lora_names(layer)[0]]) for layer in layers_of(link)) for link in links]
    for layer in dict.fromkeys(layer for link in links for layer in layers_of(link)):
        A, B = lora_names(layer)
        shapes = next((link[A].shape[1], link[B].shape[0]) for link in links if A in link)
        halves = [
            (link[A].float(), link[B].float() * scaling)
            if A in link
            else (torch.zeros(r, shapes[0]), torch.zeros(shapes[1], r))
            for link, scaling, r in zip(links, scalings, ranks, strict=True)
        ]
        joined |= {A: torch.cat([half[0] for half in halves]), B: torch.cat([half[1] for half in halves], dim=1)}
    for link in links:
        joined |= {name: tensor for name, tensor in link.items() if is_bias(name)}
    return joined


def truncated(
    lora_A: Tensor, lora_B: Tensor, lora_rank: int
) -> tuple[Tensor, Tensor, float, float]:  # (R, in), (out, R) -> (r, in), (out, r), fp32
    """The nearest B A of a lower rank, and the squares of the Frobenius norms of what is lost and of the whole.

    By QR of both: B A = Q_B (R_B R_A^T) Q_A^T, whose singular values are those of the (R, R) matrix within. They are halved
    between both factors.
    """
    Q_B, R_B = torch.linalg.qr(lora_B.double())
    Q_A, R_A = torch.linalg.qr(lora_A.double().T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    roots = S[:lora_rank].sqrt()
    kept_B, kept_A = (Q_B @ U[:, :lora_rank]) * roots, roots[:, None] * (Q_A @ Vh[:lora_rank].T).T
    room = lora_rank - len(roots)  # a layer may be smaller than that
    kept_A, kept_B = torch.nn.functional.pad(kept_A, (0, 0, 0, room)), torch.nn.functional.pad(kept_B, (0, room))
    squares = S.square()
    return (
        kept_A.float().contiguous(),
        kept_B.float().contiguous(),
        float(squares[lora_rank:].sum()),
        float(squares.sum()),
    )


def compress(joined: dict[str, Tensor], lora_rank: int) -> dict[str, Any]:
    """Put the nearest adapter of that LoRA rank in the place of a joined one; as it is where its rank is no higher. Returns the
    error, in the Frobenius norm, absolute and relative, by layer and of all layers together."""
    layers, lost, whole = {}, 0.0, 0.0
    before = max(len(joined[lora_names(layer)[0]]) for layer in layers_of(joined))
    for layer in layers_of(joined):
        A, B = lora_names(layer)
        cut, norm = 0.0, 0.0
        if lora_rank < before:
            joined[A], joined[B], cut, norm = truncated(joined[A], joined[B], lora_rank)
        else:
            norm = float(
                ((joined[B].T.double() @ joined[B].double()) * (joined[A].double() @ joined[A].T.double())).sum()
            )
        layers[layer] = _error(cut, norm)
        lost, whole = lost + cut, whole + norm
    return {
        "lora_rank": min(lora_rank, before),
        "lora_rank_before": before,
        "total": _error(lost, whole),
        "layers": layers,
    }


def _error(lost: float, whole: float) -> dict[str, float]:
    whole = max(whole, 0.0)
    return {"norm": whole**0.5, "error": lost**0.5, "relative_error": (lost / whole) ** 0.5 if whole else 0.0}


def describe(found: dict[str, Any]) -> Iterator[str]:
    """Lines for people: the error of each layer, and of all."""
    if found["lora_rank"] == found["lora_rank_before"]:
        yield f"the chain's LoRA rank is {found['lora_rank_before']}, which is not above --svd-rank: nothing was cut off"
        return
    for layer, error in found["layers"].items():
        yield f"  {layer}: error {error['error']:.4g} of {error['norm']:.4g} ({error['relative_error']:.2%})"
    total = found["total"]
    yield (
        f"LoRA rank {found['lora_rank_before']} -> {found['lora_rank']}: error {total['error']:.4g} of {total['norm']:.4g} "
        f"({total['relative_error']:.2%}) in the Frobenius norm, all layers together"
    )


def served(folder: Path) -> Iterator[str]:
    """Lines for people: what vLLM must be told, or does not take, of the adapters in an export."""
    said = [json.loads(path.read_bytes()) for path in sorted(folder.rglob("adapter_config.json"))]
    lora_rank = max((each["r"] for each in said), default=0)
    if lora_rank > _VLLM_RANKS[-1]:
        yield f"to serve it: vLLM takes no LoRA rank above {_VLLM_RANKS[-1]}, and this has {lora_rank}; see --svd-rank or hf"
    elif lora_rank > _VLLM_RANK:
        enough = min(rank for rank in _VLLM_RANKS if rank >= lora_rank)
        yield f"to serve it: vLLM takes LoRA rank {lora_rank} with --max-lora-rank {enough}, and {_VLLM_RANK} without"
    if any(each["bias"] != "none" for each in said):
        yield "to serve it: vLLM takes no adapter with trained biases, as this has; use --to hf"
