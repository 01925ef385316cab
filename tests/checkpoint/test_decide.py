"""Deciding how a run starts, from files alone."""

import dataclasses
from types import SimpleNamespace as Part

import pytest

from cola_ds.checkpoint.decide import Identity, ResumeOptions, check_fits, choose_start, decided_knots
from cola_ds.checkpoint.format import Counters, Rows
from cola_ds.config.deepspeed_json import read_engine_config
from cola_ds.config.keys import default_of, flat_keys
from cola_ds.config.schema import RunConfig
from cola_ds.errors import UserError
from cola_ds.run.folder import RunDir
from cola_ds.run.marker import Marker
from cola_ds.training.state import ChainState, counters, from_counters
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
    default = RunConfig.model_validate({**BEFORE, "deepspeed": "auto"})  # what a YAML without the key says now
    by_default = dataclasses.replace(same, engine=read_engine_config(default))
    with pytest.raises(UserError, match="deepspeed: auto does not say what the run began with, deepspeed=zero3 does"):
        choose_start(RunDir(tmp_path), default, by_default, ResumeOptions(), None)


def test_keys_that_came_later_had_their_defaults(tmp_path):
    """A run of a version without model.attention goes on with what it is by default, and with nothing else."""
    now = RunConfig.model_validate(BEFORE)
    engine = read_engine_config(now)
    marker = Marker.read(recorded(tmp_path))
    saved = now.model_dump(mode="json")
    for name in ("attention", "kernels", "compile"):
        del saved["model"][name]
    marker.facts |= {"config": saved, "identity": {"engine": engine, "train": "x", "eval": None}}
    marker.write()
    same = Identity(engine, "x", None)
    assert choose_start(RunDir(tmp_path), now, same, ResumeOptions(), None) == "anew"
    other = RunConfig.model_validate({**BEFORE, "model": {"path": "m", "attention": "sdpa"}})
    with pytest.raises(UserError, match=r"model.attention auto -> sdpa"):
        choose_start(RunDir(tmp_path), other, same, ResumeOptions(), None)


def test_knots_that_are_not_for_the_loss_to_place_any_more():
    """Of tied links, whatever placed them, and of the one whose knot comes next: a chain of even knots may go on by its loss."""
    from cola_ds.config.steps import Epochs, StepPlan

    def saved(knots, link, step, decided):
        return Part(knots=knots, chain=Part(link=link, step=step, decided=decided))

    assert decided_knots(saved([50, 100, 150], 2, 70, [])) == [50]
    assert decided_knots(saved([40, 60, 150], 2, 60, [40, 60])) == [40, 60]
    assert decided_knots(saved([50, 100, 150], 2, 70, [40, 60])) == [50]
    config = RunConfig.model_validate({**BEFORE, "chain": {"length": 3, "knots": {"plateau": {}}}})
    plan = StepPlan(epochs=Epochs(9, 9), global_batch_size=9, total_steps=150, knots=(150,), micro_steps=1)
    check_fits([50, 100, 150], 2, 70, plan.deciding(config.chain, [50]))
    with pytest.raises(UserError, match=r"has tied links at steps \[50\], the changed config would at \[150\]"):
        check_fits([50, 100, 150], 2, 70, plan)


def test_a_checkpoint_of_before_the_loss_could_place_knots():
    known = ("decided", "link_losses", "window_loss", "window_steps")
    before = {name: value for name, value in counters(ChainState()).items() if name not in known}
    assert from_counters(Counters.model_validate(before)) == ChainState()


def test_a_run_goes_on_with_what_it_has_watched(tmp_path):
    """Runs of versions without data.watch have watched nothing; another file would put two texts into one curve."""
    now = RunConfig.model_validate({**BEFORE, "data": {"train": "t", "watch": "w"}})
    engine = read_engine_config(now)
    marker = Marker.read(recorded(tmp_path))
    facts = {
        "config": RunConfig.model_validate(BEFORE).model_dump(mode="json"),
        "identity": {"engine": engine, "train": "x"},
    }
    marker.facts |= {**facts, "identity": {**facts["identity"], "eval": None}}
    marker.write()
    with pytest.raises(
        UserError, match=r"data\.watch None -> w \(to go on in spite of it: --allow-change data\.watch;"
    ):
        choose_start(RunDir(tmp_path), now, Identity(engine, "x", None, "y"), ResumeOptions(), None)
    allowed = ResumeOptions(allow_change=("data.watch",))
    assert choose_start(RunDir(tmp_path), now, Identity(engine, "x", None, "y"), allowed, None) == "anew"
    facts["config"] = now.model_dump(mode="json")
    marker.facts |= {**facts, "identity": {**facts["identity"], "eval": None, "watch": "y"}}
    marker.write()
    assert choose_start(RunDir(tmp_path), now, Identity(engine, "x", None, "y"), ResumeOptions(), None) == "anew"
    with pytest.raises(UserError, match=r"data\.watch: its examples are not those that the run began with"):
        choose_start(RunDir(tmp_path), now, Identity(engine, "x", None, "z"), ResumeOptions(), None)


def test_rows_of_versions_without_links_and_watch():
    rows = Rows.model_validate({"metrics": 1, "evals": 2, "knots": 3})
    assert (rows.links, rows.watch) == (0, 0)


def test_the_default_of_every_key():
    """As a config of nothing but what must be said is dumped."""
    least = RunConfig.model_validate(BEFORE)
    for key, value in flat_keys(least.model_dump(mode="json")).items():
        if key not in ("model.path", "data.train", "optim.lr", "optim.epochs", "run.dir", "deepspeed"):
            assert default_of(key) == value, key
