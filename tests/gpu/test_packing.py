"""Packed rows on a GPU: the losses of padded ones, and examples that do not see each other."""

import pytest

from cola_ds.data.order import Order
from tests.gpu.support import run, three_links
from tests.gpu.test_chains import LOSS
from tests.support.toys import rows


@pytest.mark.parametrize(("engine", "dtype"), [("zero3", "fp32"), ("zero3", "bf16"), ("zero2", "bf16")])
def test_packed_rows_have_the_losses_of_padded_ones(process, toy, tmp_path, monkeypatch, engine, dtype):
    """Every step trains all forty examples: padded in micro batches of eight, or packed, as many rows as they fill."""
    path, _ = three_links(toy, tmp_path / "none", engine, dtype, data={"max_length": 32}, optim=_steps(40, 8))
    with run(process, path, monkeypatch) as (_, prepared):
        count = Order(prepared.train.lengths, capacity=32).count(0, 0)
    assert count < 20
    data = {"max_length": 32, "packing": "best_fit"}
    path, _ = three_links(toy, tmp_path / "packed", engine, dtype, data=data, optim=_steps(count, 1))
    with run(process, path, monkeypatch) as (_, prepared):
        assert len(prepared.order.rows(0, 0)) == count
    expected, found = (
        [row["loss"] for row in rows(tmp_path / name / "run/metrics.jsonl")] for name in ("none", "packed")
    )
    assert len(expected) == 12
    assert found == pytest.approx(expected, abs=LOSS[dtype])


def _steps(rows_a_step, rows_a_micro_batch):
    return {"global_batch_size": rows_a_step, "micro_batch_size": rows_a_micro_batch}
