"""The engine's stage and sizes: pure functions of a model's shapes."""

import dataclasses

import pytest

from cola_ds.config.engine_sizes import SHARE, Need, Shapes, choose_stage, need, with_sizes

SMALL = Shapes(
    weights=(400, 100, 900, 400), vectors=(20,), adapter=160, trained=320, targets=800, width=200, vocabulary=50, hidden=20,
    blocks=2,
)  # fmt: skip
LARGE = dataclasses.replace(SMALL, weights=(10**8,) * 70, vectors=(8192,), adapter=28672 * 16, trained=2 * 10**8)


@pytest.mark.parametrize("device, host", [(0, 0), (1, 0), (0, 1)])
def test_the_smallest_stage_that_fits(device, host):
    """To the byte: what fills its share fits, and a byte more, where it computes or on its host, does not."""
    stage, reason = choose_stage(Need(device=700 + device, host=700 + host), 1000, 1000, one=False)
    assert SHARE == 0.7
    assert stage == (3 if device or host else 2)
    assert ("of its host" in reason, "more than 70%" in reason) == (bool(host), bool(device or host))


def test_on_the_cpu_remainders_lie_beside_what_is_computed_with():
    needed = Need(device=600, host=500, remainders=101)
    assert choose_stage(needed, 1000, 1000, one=False)[0] == 2
    assert choose_stage(needed, 1000, 1000, one=True)[0] == 3


def test_what_stage_2_needs():
    least = need(SMALL, 2, 0)
    assert least == Need(device=2 * SMALL.total + 24 * SMALL.trained, host=2 * SMALL.total)
    assert need(SMALL, 4, 0).host == 4 * SMALL.total
    assert need(SMALL, 2, 0, remainder_bytes=2).host == 2 * SMALL.total + 2 * SMALL.targets
    assert need(SMALL, 2, 10).device - least.device == int(10 * (1.5 * 200 * 2 + 3 * 50 * 4))
    assert need(SMALL, 2, 10, recomputes=True).device < need(SMALL, 2, 10).device


def test_a_small_frozen_base_stays_resident():
    """Between its uses lies less than DeepSpeed's reuse distance: it is whole at the end of a forward pass anyway."""
    largest = dataclasses.replace(SMALL, weights=(10**6, 4 * 10**8))
    assert with_sizes({"stage": 3}, largest, full=False, micro_steps=2) == {
        "stage": 3, "reduce_bucket_size": 320, "stage3_param_persistence_threshold": 4 * 10**8,
        "stage3_prefetch_bucket_size": 50_000_000, "stage3_max_live_parameters": 1_000_500_000,
    }  # fmt: skip
    beyond = dataclasses.replace(SMALL, weights=(10**6, 5 * 10**8))
    for shapes, full, more, micro_steps in (
        (beyond, False, {}, 2), (SMALL, True, {}, 2), (largest, False, {"offload_param": {"device": "cpu"}}, 2),
        (largest, False, {}, 1),
    ):  # fmt: skip
        sizes = with_sizes({"stage": 3, **more}, shapes, full=full, micro_steps=micro_steps)
        assert sizes["stage3_param_persistence_threshold"] == 100_000


def test_adapters_biases_and_norms_are_resident_whatever_their_size():
    assert (
        with_sizes({"stage": 3}, LARGE, full=False, micro_steps=2)["stage3_param_persistence_threshold"] == 28672 * 16
    )
    wide = dataclasses.replace(LARGE, vectors=(10**6,))
    assert with_sizes({"stage": 3}, wide, full=False, micro_steps=2)["stage3_param_persistence_threshold"] == 10**6


def test_the_bucket_is_what_is_trained():
    assert with_sizes({"stage": 2}, LARGE, full=False, micro_steps=2) == {"stage": 2, "reduce_bucket_size": 2 * 10**8}
    assert with_sizes({"stage": 2}, dataclasses.replace(LARGE, trained=10**10), full=False, micro_steps=2)[
        "reduce_bucket_size"
    ] == (5 * 10**8)
    assert (
        with_sizes({"stage": 2}, dataclasses.replace(LARGE, trained=0), full=False, micro_steps=2)["reduce_bucket_size"]
        == 1
    )
    assert with_sizes({"stage": 3}, SMALL, full=True, micro_steps=2)["reduce_bucket_size"] == 400


def test_what_the_json_says_stays():
    said = {
        "stage": 3, "reduce_bucket_size": 7, "stage3_param_persistence_threshold": 0, "prefetch_bucket_size": 9,
    }  # fmt: skip
    assert with_sizes(said, SMALL, full=False, micro_steps=2) == {**said, "stage3_max_live_parameters": 10**9}
    said["stage3_max_live_parameters"] = 11
    assert with_sizes(said, SMALL, full=False, micro_steps=2) == said


def test_a_large_table_does_not_end_what_is_fetched_ahead():
    """DeepSpeed fetches nothing ahead while as much is whole as stage3_max_live_parameters says."""
    wide = dataclasses.replace(SMALL, weights=(10**6, 10**6, 2 * 10**9))
    assert with_sizes({"stage": 3}, wide, full=False, micro_steps=1)["stage3_max_live_parameters"] == 4 * 10**9 + 10**6
