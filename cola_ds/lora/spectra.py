"""What a link has learnt, read from its factors: spectra, effective ranks, overlaps of its spaces. Plain torch in fp64, no
collectives, and no matrix of a weight's size but in `intruders`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cola_ds.lora.tie import Links

_NOTHING = 1e-10  # of the largest singular value: what is below is rounding, and its direction means nothing
TOP = 10
"""Singular vectors of a tuned weight that are looked at: the largest ones (arXiv 2410.21228 looks at 10, too)."""
EPSILON = 0.5
"""A vector is an intruder where its largest cosine to any of the base's is below this (epsilon of arXiv 2410.21228)."""


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """The singular values of a link, or of a sum of links, and the spaces that it has anything in; fp64."""

    values: Tensor
    """(min(r, out, in),), the largest first."""
    columns: Tensor
    """(out, k): an orthonormal basis, k being the number of values that are not nothing."""
    rows: Tensor
    """(in, k)"""


def spectrum(links: Links) -> Spectrum:
    """That of B diag(scalings) A, by QR of both factors: what is decomposed has r x r elements."""
    A, B, scalings = (each.double() for each in links)
    column_basis, of_columns = torch.linalg.qr(B)
    row_basis, of_rows = torch.linalg.qr((A * scalings).T)
    left, values, right = torch.linalg.svd(of_columns @ of_rows.T, full_matrices=False)
    some = values > _NOTHING * values[0]
    return Spectrum(values=values, columns=column_basis @ left[:, some], rows=row_basis @ right[some].T)


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of singular values (k,) that are scaled to a sum of 1 (Roy and Vetterli, 2007): k where all are alike, 1
    where one is all, 0 of nothing."""
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total > 0 else 0.0


def overlap(basis: Tensor, other: Tensor) -> float:
    """The share of a space that lies in another, given by orthonormal bases (n, k) and (n, l): |basis^T other|_F^2 / k, from 0
    to 1; NaN of no space."""
    return float((basis.T @ other).square().sum() / basis.shape[1]) if basis.shape[1] else float("nan")


def split(links: Links, lora_ranks: Sequence[int]) -> list[Links]:
    """Links that lie side by side, each by itself, in order."""
    ends = list(itertools.accumulate(lora_ranks, initial=0))
    A, B, scalings = links
    return [(A[a:b], B[:, a:b], scalings[a:b]) for a, b in itertools.pairwise(ends)]


def look(links: Links, lora_ranks: Sequence[int]) -> Tensor:
    """What the last of some links has learnt: numbers in a row, fp64, in the order of `width_of`'s parts. -> (width,)

    Its singular values, those of the sum so far, and how far its row and its column space lie in those of each link before it,
    and in those of their sum; zeros where a sum has fewer singular values than its ranks' sum.
    """
    *before, last = split(links, lora_ranks)
    mine, whole = spectrum(last), spectrum(links)
    found = [_padded(mine.values, lora_ranks[-1]), _padded(whole.values, sum(lora_ranks))]
    others = [spectrum(each) for each in before]
    if before:
        R = sum(lora_ranks[:-1])
        others.append(spectrum((links[0][:R], links[1][:, :R], links[2][:R])) if len(before) > 1 else others[0])
    rows = [overlap(mine.rows, other.rows) for other in others]
    columns = [overlap(mine.columns, other.columns) for other in others]
    return torch.cat([*found, torch.tensor([*rows, *columns], dtype=torch.float64, device=mine.values.device)])


def parts_of(lora_ranks: Sequence[int]) -> list[int]:
    """How many of `look`'s numbers are singular values of the link, of the sum, overlaps of rows and of columns."""
    overlaps = len(lora_ranks) if len(lora_ranks) > 1 else 0  # with each link before, and with their sum
    return [lora_ranks[-1], sum(lora_ranks), overlaps, overlaps]


def _padded(values: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, length - len(values)))


def intruders(tuned: Tensor, base: Tensor) -> int:
    """Intruder dimensions (arXiv 2410.21228): how many of the TOP left singular vectors of a tuned weight (out, in) are like none
    of its base's. Both are decomposed whole."""
    vectors, known = left_vectors(tuned)[:, :TOP], left_vectors(base)
    return int(((known.T @ vectors).abs().amax(0) < EPSILON).sum())


def left_vectors(weight: Tensor) -> Tensor:
    """Left singular vectors of a weight (out, in), the largest first, fp64. -> (out, k); k is min(out, in), or less if some of
    their singular values are nothing

    By the eigenvectors of its smaller Gram matrix, which take half the time of a decomposition of the weight.
    """
    weight = weight.double()
    out_features, in_features = weight.shape
    if out_features <= in_features:
        return torch.linalg.eigh(weight @ weight.T).eigenvectors.flip(1)
    found = weight @ torch.linalg.eigh(weight.T @ weight).eigenvectors.flip(1)
    norms = found.norm(dim=0)
    some = norms > 1e-7 * norms[0]  # the Gram matrix has lost the bits of those below
    return found[:, some] / norms[some]
