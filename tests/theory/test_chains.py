"""RAC-LoRA's counter-example: with the step 1 / L chains leave the numbers, and their variant converges."""

import re

import numpy
import pytest
import torch

from cola_ds.theory.chains import KINDS, losses_by_link, quadratic
from tests.support.toys import REPOSITORY

SEEDS, LINKS, COUNT = 5, 100, 20


def shares(kind, step, scale=4.0, links=LINKS):
    """Losses (links + 1, seeds), as shares of those at the start."""
    losses = losses_by_link(quadratic(0, SEEDS, scale), kind, step, links, COUNT, seed=0)
    return losses / losses[0]


def test_at_one_over_L_a_chain_never_ends_a_link_lower_than_it_began():
    for kind in ("lora", "cola"):
        assert shares(kind, 1.0)[1:].min() > 1
        assert numpy.isinf(shares(kind, 1.0)[-1]).all()


@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0, 1e3])
def test_at_one_over_L_the_variant_converges_at_every_scale(scale):
    losses = shares("rac-lora", 1.0, scale)
    assert losses[-1].max() < 1e-8
    assert (numpy.diff(losses, axis=0) <= 1e-12).all()  # and never rises


@pytest.mark.parametrize("step", [1.0, 1 / 4])
def test_a_single_draw_stalls_at_the_best_that_its_row_space_has(step):
    problem = quadratic(0, SEEDS, 4.0)
    A = numpy.random.default_rng(0).normal(size=(SEEDS, 3))  # its direction; the length does not matter
    for seed, last in enumerate(losses_by_link(problem, "one-draw", step, LINKS, COUNT, seed=0)[-1]):
        floor = 0.0
        for curvature, target in zip(problem.curvature[seed], problem.target[seed], strict=True):
            root = numpy.sqrt(curvature)
            floor += numpy.linalg.lstsq((root * A[seed])[:, None], root * target, rcond=None)[1][0] / 2
        assert last == pytest.approx(floor, rel=1e-6)
        assert last > 0.2 * problem.loss(numpy.zeros((1, 3, 3)))[seed]


def test_one_link_stalls_above_what_rank_one_can_reach():
    problem = quadratic(0, SEEDS, 4.0)
    reached = losses_by_link(problem, "lora", 1 / 16, LINKS, COUNT, seed=0)[-1]
    singular = numpy.linalg.svd(problem.target, compute_uv=False)
    assert (reached >= problem.curvature.min(axis=(1, 2)) * (singular[:, 1:] ** 2).sum(axis=1) / 2).all()
    assert shares("lora", 1 / 16)[-1].min() > 0.1


def test_with_a_step_small_enough_a_chain_converges_too():
    """What the counter-example does not show: that no step works."""
    assert shares("cola", 1 / 8)[-1].max() < 1e-8
    assert shares("cola", 1 / 8)[-1].max() < shares("rac-lora", 1 / 8)[-1].max()


def test_the_step_that_a_chain_survives_shrinks_with_the_solution():
    for scale, too_large in ((1.0, 1.0), (4.0, 1 / 4), (16.0, 1 / 16)):
        assert numpy.isinf(shares("cola", too_large, scale)[-1]).any()
        assert numpy.isfinite(shares("cola", too_large / 2, scale)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_torch(kind):
    """Three links of seed 0, by autograd and torch's own SGD."""
    problem = quadratic(3, 2, 1.0)
    expected = losses_by_link(problem, kind, 0.1, 3, COUNT, seed=8)
    random = numpy.random.default_rng(8)

    def fresh_A():
        return torch.tensor(random.normal(size=(2, 1, 3)) / numpy.sqrt(3))[1].requires_grad_(kind in ("lora", "cola"))

    Q, target = torch.tensor(problem.curvature[1]), torch.tensor(problem.target[1])
    weight, A = torch.zeros(3, 3, dtype=torch.float64), fresh_A()
    B = torch.zeros(3, 1, dtype=torch.float64, requires_grad=True)
    losses = []
    for link in range(3):
        if link and kind != "lora":
            weight = (weight + B @ A).detach()
            A = fresh_A() if kind != "one-draw" else A
            B = torch.zeros(3, 1, dtype=torch.float64, requires_grad=True)
        trained = [B, A] if kind in ("lora", "cola") else [B]
        optimizer = torch.optim.SGD(trained, lr=0.1 if len(trained) == 2 else 0.1 / float(A.detach().square().sum()))
        for _ in range(COUNT):
            optimizer.zero_grad()
            (Q * (weight + B @ A - target) ** 2 / 2).sum().backward()
            optimizer.step()
        losses.append((Q * (weight + B @ A - target) ** 2 / 2).sum().item())
    numpy.testing.assert_allclose(expected[1:, 1], losses, rtol=1e-10)


def test_the_page_s_table():
    """launch/theory/README.md, row by row: between the least and the greatest of the seeds, or below the greatest."""
    page = (REPOSITORY / "launch/theory/README.md").read_text(encoding="utf-8")
    rows = {
        line.split("|")[1].split()[0]: line for line in page.splitlines() if re.match(r"\| (lora|cola|one|rac)", line)
    }
    assert sorted(rows) == sorted(KINDS)
    number = r"(\d\S*?\d)"
    for kind, line in rows.items():
        for step, cell in zip((1.0, 1 / 8), line.split("|")[2:4], strict=True):
            last = shares(kind, step)[-1] if "the same" not in cell else shares(kind, 1.0)[-1]
            if "infinite" in cell:
                assert numpy.isinf(last).all()
            elif found := re.match(rf"{number} to {number}\b", cell.strip()):
                assert [float(text) for text in found.groups()] == [
                    float(f"{each:.2f}") for each in (min(last), max(last))
                ]
            elif found := re.match(r"below (\S+?)[;]?(\s|$)", cell.strip()):
                assert float(found[1]) / 3 < max(last) < float(found[1])
            else:
                assert cell.strip() == "the same"
                assert last == pytest.approx(shares(kind, step)[-1], rel=1e-6)
    (first, last) = re.search(r"below 1e-8 after (\d+) to (\d+) links", rows["rac-lora"]).groups()
    reached = (shares("rac-lora", 1.0) < 1e-8).argmax(axis=0)
    assert (min(reached), max(reached)) == (int(first), int(last))
    survives = []
    for scale in (1.0, 4.0, 16.0):
        survives.append(next(n for n in range(10) if numpy.isfinite(shares("cola", 2.0**-n, scale)[-1]).all()))
    assert "is 1/2, 1/8 and 1/32 of 1 / L for solutions of scale 1, 4 and 16" in page.replace("\n", " ")
    assert [2**n for n in survives] == [2, 8, 32]
