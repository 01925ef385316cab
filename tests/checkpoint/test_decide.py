"""Deciding how a run starts, from files alone."""

import dataclasses

import pytest

from cola_ds.checkpoint.decide import Identity, ResumeOptions, choose_start
from cola_ds.config.deepspeed_json import read_engine_config
from cola_ds.config.schema import RunConfig
from cola_ds.errors import UserError
from cola_ds.run.folder import RunDir
from cola_ds.run.marker import Marker
from tests.support.recorded import recorded

BEFORE = {
    "model": {"path": "m"}, "data": {"train": "t"}, "optim": {"lr": 1.0, "epochs": 1}, "run": {"dir": "r"},
    "deepspeed": "ds_configs/zero3.json",
}  # fmt: skip


def test_a_run_that_named_a_ready_json_by_its_path_goes_on_by_its_name(tmp_path):
    """Its run.json says ds_configs/zero3.json, a path in the folder that it was started from: what that said is compared."""
    now = RunConfig.model_validate({**BEFORE, "deepspeed": "zero3"})
    engine = read_engine_config(now)
    marker = Marker.read(recorded(tmp_path))
    marker.facts |= {
        "config": RunConfig.model_validate(BEFORE).model_dump(mode="json"),
        "identity": {"engine": engine, "train": "x", "eval": None},
    }
    marker.write()
    same = Identity(engine, "x", None)
    assert choose_start(RunDir(tmp_path), now, same, ResumeOptions(), None) == "anew"  # it had no checkpoint yet
    other = dataclasses.replace(same, engine={**engine, "prescale_gradients": True})
    with pytest.raises(UserError, match="deepspeed: zero3 does not say what the run began with"):
        choose_start(RunDir(tmp_path), now, other, ResumeOptions(), None)
