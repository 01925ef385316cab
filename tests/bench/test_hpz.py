"""What is said of hpZ is so: that it needs no network for a frozen base either, and why it is refused all the same."""

import pytest

from tests.bench.hpz import AFTER, ARMS, run_arms


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    """By arm, what each process measured."""
    found = run_arms(1, 1, tmp_path_factory.mktemp("hpz"))
    return {arm: found[arm][0] for arm in ARMS}


def total(processes, key):
    """Step by step, summed over the processes."""
    return [sum(values) for values in zip(*(one[key] for one in processes), strict=True)]


def test_node_shards_are_the_world_bit_for_bit(arms):
    for key in ("losses", "knot"):
        assert [one[key] for one in arms["node"]] == [one[key] for one in arms["world"]]


def test_hpz_holds_the_base_once_more(arms):
    held = {arm: sum(one["held"] for one in arms[arm]) for arm in ARMS}
    assert held["node"] == pytest.approx(2 * held["world"], rel=0.01)
    assert held["hpz"] == pytest.approx(3 * held["world"], rel=0.01)


def test_a_knot_goes_wrong_in_silence_under_hpz(arms):
    """Steps before it have the losses of the others."""
    right, wrong = (total(arms[arm], "losses") for arm in ("world", "hpz"))
    assert wrong[:-AFTER] == pytest.approx(right[:-AFTER], rel=1e-5)
    assert wrong[-AFTER:] != pytest.approx(right[-AFTER:], rel=1e-3)
