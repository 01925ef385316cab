"""What a link has learnt, from its factors: held to dense decompositions of whole matrices."""

import math

import pytest
import torch

from cola_ds.lora.spectra import effective_rank, intruders, left_vectors, look, overlap, parts_of, spectrum, split

SHAPES = [
    (12, 9, [4, 2, 3]),
    (6, 20, [4, 4]),
    (20, 6, [4, 4]),
    (9, 9, [3]),
]  # out, in, ranks: some sums have more than out or in


def dense(links, lora_ranks):
    """The deltas of the links, whole."""
    return [B.double() @ (A.double() * scalings) for A, B, scalings in split(links, lora_ranks)]


def spaces(delta):
    """Singular values, and bases of the column and the row space, of a whole matrix."""
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    some = values > 1e-10 * values[0]
    return values, left[:, some], right[some].T


def expected_look(deltas, lora_ranks):
    """What `look` says, from whole matrices: projectors instead of bases."""

    def padded(values, length):
        return torch.cat([values, torch.zeros(length)])[:length]

    values, columns, rows = spaces(deltas[-1])
    found = [padded(values, lora_ranks[-1]), padded(spaces(sum(deltas))[0], sum(lora_ranks))]
    others = [*deltas[:-1], *([sum(deltas[:-1])] if len(deltas) > 1 else [])]
    for mine, which in ((rows, 2), (columns, 1)):
        projectors = [basis @ basis.T for basis in (spaces(other)[which] for other in others)]
        found.append(torch.tensor([float((p @ mine).square().sum()) / mine.shape[1] for p in projectors]))
    return torch.cat(found)


def random_links(out, in_, lora_ranks, dtype=torch.float32):
    draw = torch.Generator().manual_seed(out * in_)
    R = sum(lora_ranks)
    A, B = torch.randn(R, in_, generator=draw).to(dtype), torch.randn(out, R, generator=draw).to(dtype)
    return A, B, torch.cat([torch.full((r, 1), 2.0 / r, dtype=torch.float64) for r in lora_ranks])


@pytest.mark.parametrize(("out", "in_", "lora_ranks"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_look_at_factors_is_one_at_whole_matrices(out, in_, lora_ranks, dtype):
    links = random_links(out, in_, lora_ranks, dtype)
    found = look(links, lora_ranks)
    assert len(found) == sum(parts_of(lora_ranks))
    torch.testing.assert_close(
        found.float(), expected_look(dense(links, lora_ranks), lora_ranks).float(), rtol=1e-5, atol=1e-5
    )


def test_a_direction_of_nothing_is_in_no_space():
    A, B, scalings = random_links(12, 9, [3])
    B[:, 1] = B[:, 0]  # two rows of A that go one way
    assert spectrum((A, B, scalings)).columns.shape == (12, 2)
    B.zero_()
    nothing = spectrum((A, B, scalings))
    assert (nothing.rows.shape, effective_rank(nothing.values)) == ((9, 0), 0.0)
    assert math.isnan(overlap(nothing.rows, torch.eye(9)))


def test_effective_rank():
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([3.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )


def test_overlap_is_a_share_of_the_first_space():
    eye = torch.eye(6, dtype=torch.float64)
    assert overlap(eye[:, :2], eye[:, 1:5]) == pytest.approx(0.5)
    assert overlap(eye[:, :4], eye[:, 3:]) == pytest.approx(0.25)
    assert overlap(eye[:, :2], eye[:, :5]) == pytest.approx(1.0)


def expected_intruders(tuned, base):
    left, known = (torch.linalg.svd(weight.double(), full_matrices=False).U for weight in (tuned, base))
    return int(((known.T @ left[:, :10]).abs().amax(0) < 0.5).sum())


@pytest.mark.parametrize("shape", [(40, 40), (24, 60), (60, 24)])
def test_intruders(shape):
    """As whole decompositions count them; none where nothing was added, and a strong direction outside of all of the base's is
    one."""
    draw = torch.Generator().manual_seed(3)
    base = torch.randn(shape, generator=draw)
    column, row = torch.randn(shape[0], 1, generator=draw), torch.randn(1, shape[1], generator=draw)
    found = []
    for size in (0.0, 0.1, 1.0, 3.0):
        tuned = base + size * column @ row
        found.append(intruders(tuned, base))
        assert found[-1] == expected_intruders(tuned, base)
    assert found[0] == 0
    assert found[-1] >= 1


@pytest.mark.parametrize("shape", [(7, 7), (5, 9), (9, 5)])
def test_left_vectors_are_those_of_the_weight(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, expected = left_vectors(weight), torch.linalg.svd(weight, full_matrices=False).U
    torch.testing.assert_close((found * expected).sum(0).abs(), torch.ones(min(shape), dtype=torch.float64))
