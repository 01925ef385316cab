"""The plan of steps where epochs differ in their rows, and where a step is so many tokens."""

import itertools

import pytest
import yaml

from cola_ds.config.loading import load_config
from cola_ds.config.steps import Epochs, place_knots, resolve
from cola_ds.errors import UserError

ROWS = [10, 7, 12, 9]  # 3, 2, 3 and 3 steps of 4


def uneven():
    asked = []

    def rows(epoch):
        asked.append(epoch)
        return ROWS[epoch % 4]

    return Epochs(rows, 4), asked


def test_uneven_epochs():
    epochs, asked = uneven()
    assert [epochs.locate(step) for step in range(9)] == [
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 0)
    ]  # fmt: skip
    assert [epochs.start(epoch) for epoch in range(6)] == [0, 3, 5, 8, 11, 14]
    assert [epochs.passed(step) for step in (0, 1, 3, 4, 5, 8)] == [0, 1 / 3, 1, 1.5, 2, 3]
    assert asked == [0, 1, 2, 3, 4]  # each once
    assert not epochs.are_even


def test_even_epochs_are_not_counted_one_by_one():
    epochs = Epochs(10, 4)
    assert epochs.locate(2**31) == divmod(2**31, 3)
    assert (epochs.start(2**31), epochs.steps(7), epochs.passed(2**31 - 1)) == (3 * 2**31, 3, (2**31 - 1) / 3)
    assert epochs._starts == [0]


@pytest.mark.parametrize("rows", [10, lambda epoch: 10])
def test_both_kinds_agree(rows):
    epochs, even = Epochs(rows, 4), Epochs(10, 4)
    for step in range(20):
        assert epochs.locate(step) == even.locate(step)
        assert epochs.passed(step) == pytest.approx(even.passed(step), rel=1e-15)
    assert [epochs.start(epoch) for epoch in range(9)] == [even.start(epoch) for epoch in range(9)]


def test_knots_at_uneven_epochs():
    epochs, asked = uneven()
    assert place_knots({"epochs": [1, 3]}, 3, 10, epochs) == (3, 8, 10)
    with pytest.raises(UserError, match=r"chain.knots: epoch 4 \(step 11\) is at or past the end .* 10 steps"):
        place_knots({"epochs": [1, 4]}, 3, 10, epochs)
    with pytest.raises(UserError, match=r"chain.knots: epoch 1000000000 .* is at or past the end"):
        place_knots({"epochs": [1, 10**9]}, 3, 10, epochs)
    assert len(asked) <= 11


@pytest.fixture
def load(tmp_path):
    def load(**sections):
        config = {
            "model": {"path": "model"}, "data": {"train": "t.jsonl", "max_length": 128}, "run": {"dir": "run"}, **sections
        }  # fmt: skip
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return load_config(path)

    return load


PACKED = {"train": "t.jsonl", "max_length": 128, "packing": "best_fit"}


def test_steps_of_uneven_epochs(load):
    config = load(optim={"lr": 1.0, "epochs": 3, "global_batch_size": 4, "micro_batch_size": 2}, data=PACKED)
    plan = resolve(config, lambda epoch: ROWS[epoch], world_size=2)
    assert (plan.total_steps, plan.knots, plan.micro_steps, plan.global_batch_size) == (8, (8,), 1, 4)
    config = load(optim={"lr": 1.0, "max_steps": 2**31 - 1, "global_batch_size": 4, "micro_batch_size": 2}, data=PACKED)
    counted = itertools.count()
    assert resolve(config, lambda epoch: next(counted) + 1, world_size=1).total_steps == 2**31 - 1
    assert next(counted) == 0  # no epoch was counted


def test_a_step_of_so_many_tokens(load):
    def plan(tokens, world_size, micro_batch_size=2):
        optim = {"lr": 1.0, "epochs": 1, "global_batch_tokens": tokens, "micro_batch_size": micro_batch_size}
        return resolve(load(optim=optim, data=PACKED), 100, world_size)

    assert (plan(1024, 2).global_batch_size, plan(1024, 2).micro_steps, plan(1024, 2).total_steps) == (8, 2, 13)
    assert plan(1024 + 127, 4).global_batch_size == 8
    said = (
        r"^optim.global_batch_tokens 1024 has room for 8 rows of data.max_length 128, which do not divide into micro batches of "
        r"2 on 3 processes; use 768 or 1536, or another optim.micro_batch_size$"
    )
    with pytest.raises(UserError, match=said):
        plan(1024, 3)
    with pytest.raises(UserError, match=r"use 2048, or another optim.micro_batch_size"):
        plan(1024, 8)
    with pytest.raises(
        UserError, match=r"optim.global_batch_tokens 127 has no room for a row of data.max_length 128; use at"
    ):
        plan(127, 1)
    for fitting in (768, 1536):
        assert plan(fitting, 3).micro_steps == fitting // 768
