"""DeepSpeed's private parts: each piece is where it is looked for, and one that is gone is one line that names two versions."""

import gc
import os
import subprocess
import sys
import weakref
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch import nn

from cola_ds.distributed import collectives
from cola_ds.distributed import deepspeed_internals as internals
from cola_ds.distributed.engine import build_engine
from cola_ds.errors import UserError
from tests.support.distributed import process_group, run_distributed

INSTALLED = f"DeepSpeed {version('deepspeed')} "


def expect_gone(action, *names):
    """One line, of the piece, the version that is installed and the one that was read."""
    with pytest.raises(UserError) as raised:
        action()
    said = str(raised.value)
    assert said.startswith(INSTALLED)
    assert said.endswith("pip install deepspeed==0.19.8")
    assert "\n" not in said
    for name in names:
        assert name in said, said


def trained_engine(stage):
    """An engine after one step, with what is frozen and what is trained."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    model[0].requires_grad_(False)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    engine = build_engine(model, config, lambda params: torch.optim.AdamW(params, lr=0.1))
    step(engine)
    return engine


def step(engine):
    loss = engine(torch.ones(2, 5)).square().mean()
    engine.backward(loss)
    engine.step()


def at_stage_3(process):
    process_group(process)
    engine = trained_engine(3)
    model, optimizer = engine.module, engine.optimizer
    weight, bias = model[2].weight, model[2].bias

    # What this process keeps of a parameter, and of its master, is the same part.
    shard, start = internals.shard(weight)
    part = internals.master_part(optimizer, weight)
    assert (part.start, part.count) == (start, shard.numel())
    assert torch.equal(part.of(part.flat.detach()), shard)
    assert any(part.flat is flat for flat in internals.flat_masters(optimizer))
    sizes = [start, shard.numel()]
    for name in ("grad_position", "fp32_partitioned_groups_flat"):
        kept = optimizer.__dict__.pop(name)
        expect_gone(lambda: internals.master_part(optimizer, weight), name)
        setattr(optimizer, name, kept)
    kept = optimizer.__dict__.pop("fp32_partitioned_groups_flat")
    expect_gone(lambda: internals.flat_masters(optimizer), "flat fp32 groups")
    optimizer.fp32_partitioned_groups_flat = kept
    for name in ("ds_tensor", "ds_status"):
        kept = bias.__dict__.pop(name)
        expect_gone(lambda: internals.shard(bias), name)
        setattr(bias, name, kept)

    offload = optimizer.__dict__.pop("parameter_offload")
    expect_gone(internals.steps_traced_alone(engine).__enter__, "parameter_offload")
    optimizer.parameter_offload = offload

    # Each of the four places keeps the old engine, and none does afterwards.
    assert "pre_bwd_fn" in model[2].__dict__
    assert "_z3_optimizer" in weight.__dict__
    handle = engine.__dict__.pop("module_forward_pre_hook")
    expect_gone(lambda: internals.remove_root_hooks(engine), "module_forward_pre_hook")
    engine.module_forward_pre_hook = handle
    seen = weakref.ref(engine.optimizer)
    internals.take_down_engine(engine)
    assert "pre_bwd_fn" not in model[2].__dict__
    assert "post_bwd_fn" not in model[2].__dict__
    assert "_z3_optimizer" not in weight.__dict__
    assert not [hook for hook in model._forward_pre_hooks.values() if "engine" in repr(hook).lower()]
    expect_gone(lambda: internals.forget_backward_functions(model, expected=True), "pre_bwd_fn")
    expect_gone(lambda: internals.forget_optimizer(model.parameters(), expected=True), "_z3_optimizer")
    engine = optimizer = part = handle = None
    gc.collect()
    assert seen() is None
    return sizes


def test_at_stage_3():
    """21 weights of two processes: 11 are the first one's, 10 the second one's."""
    assert run_distributed(at_stage_3, 2) == [[0, 11], [11, 10]]


def at_stage_2(process):
    process_group(process)
    engine = trained_engine(2)
    optimizer, counts = engine.optimizer, 0
    for param in engine.module[2].parameters():
        part = internals.master_part(optimizer, param)
        if part:
            assert torch.equal(part.of(part.flat.detach()), param.data.view(-1)[part.start :][: part.count])
            assert any(part.flat is flat for flat in internals.flat_masters(optimizer))
            counts += part.count
    kept = optimizer.__dict__.pop("single_partition_of_fp32_groups")
    expect_gone(lambda: internals.flat_masters(optimizer), "flat fp32 groups")
    optimizer.single_partition_of_fp32_groups = kept
    param = engine.module[2].weight
    kept = param.__dict__.pop("_hp_mapping")
    expect_gone(lambda: internals.master_part(optimizer, param), "_hp_mapping")
    param._hp_mapping = kept
    internals.take_down_engine(engine)
    return counts


def test_at_stage_2():
    """24 trained elements, each of one process."""
    assert sum(run_distributed(at_stage_2, 2)) == 24


def test_the_cache_behind_the_name_is_cleared_or_missed(monkeypatch):
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    internals.clear_release_cache()
    name = "_PartitionedParameterCoordinator__params_to_release"
    monkeypatch.setattr(PartitionedParameterCoordinator, name, lambda self: None)
    expect_gone(internals.clear_release_cache, "__params_to_release")
    monkeypatch.delattr(PartitionedParameterCoordinator, name)
    expect_gone(internals.clear_release_cache, "__params_to_release")


def test_the_stack_of_modules_is_emptied_or_missed(monkeypatch):
    from deepspeed.runtime.zero import parameter_offload

    monkeypatch.setattr(parameter_offload, "FWD_MODULE_STACK", ["the root of the last model"])
    internals.forget_modules()
    assert parameter_offload.FWD_MODULE_STACK == []
    monkeypatch.delattr(parameter_offload, "FWD_MODULE_STACK")
    expect_gone(internals.forget_modules, "FWD_MODULE_STACK")


def scaler_of(**more):
    given = {"init_scale": 2.0**8, "scale_window": 10, "min_scale": 1.0, "delayed_shift": 2}
    scaler = DynamicLossScaler(**given, consecutive_hysteresis=False, raise_error_at_min_scale=False, dtype=torch.half)
    return SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler, **more))


def test_the_loss_scale(monkeypatch):
    """DeepSpeed's own scaler goes on from what another one was."""
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 1)  # it tells of an overflow on process 0
    first, second = scaler_of(loss_scale=256.0), scaler_of()
    first.optimizer.loss_scaler.update_scale(True)
    first.optimizer.loss_scaler.update_scale(True)
    state = internals.loss_scale_state(first)
    assert state == {"cur_scale": 128.0, "cur_iter": 2.0, "last_overflow_iter": 1.0, "cur_hysteresis": 1.0}
    internals.set_loss_scale_state(second, state)
    for each in (first, second):
        each.optimizer.loss_scaler.update_scale(True)
    assert internals.loss_scale_state(second) == internals.loss_scale_state(first)
    assert internals.loss_scale(first) == 256.0
    assert internals.loss_scale_state(SimpleNamespace(optimizer=SimpleNamespace())) == {}
    expect_gone(lambda: internals.loss_scale(second), "loss_scale")
    del second.optimizer.loss_scaler.cur_iter
    expect_gone(lambda: internals.loss_scale_state(second), "cur_iter")
    expect_gone(lambda: internals.set_loss_scale_state(second, state), "cur_iter")


def with_shared_memory(process):
    os.environ["LOCAL_SIZE"] = str(process.world_size)  # as DeepSpeed's launcher sets it: only then is there a buffer
    process_group(process)
    collectives.all_gather_numbers(0)  # each has removed its own
    names = [path.name for path in Path("/dev/shm").iterdir() if os.environ["MASTER_PORT"] in path.name]
    return [int(Path("/proc/self/maps").read_text(encoding="utf-8").count("deepspeed_allreduce_buffer")), len(names)]


def test_no_name_is_left_in_shared_memory():
    """The buffers are there, without names; where DeepSpeed calls them otherwise, this finds one."""
    for buffers, names in run_distributed(with_shared_memory, 2):
        assert names == 0
        assert buffers >= 2


def test_a_process_ends_with_its_status_and_its_words():
    """Without exit handlers; and neither torch nor deepspeed is needed for that."""
    code = (
        "import atexit, sys; from cola_ds.distributed.deepspeed_internals import end_process; "
        "atexit.register(print, 'a handler'); sys.stdout.write('the last words'); "
        "end_process(7 if not {'torch', 'deepspeed'} & sys.modules.keys() else 8)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (7, "the last words", "")


def bad_gradients(process):
    """After a backward pass with one number of one process's gradient replaced: what each process is told, and whether the step
    is left out."""
    process_group(process)
    found = []
    for bad in (None, float("nan"), float("inf"), -float("inf"), 3e38):
        engine = trained_engine(2)
        before = engine.module[2].weight.detach().clone()
        loss = engine(torch.ones(2, 5)).square().mean()
        engine.backward(loss)
        grads = [grad for group in engine.optimizer.averaged_gradients.values() for grad in group]
        if bad is not None and process.rank == 1:
            grads[-1].view(-1)[-1] = bad
        mine = bool(engine.optimizer.has_overflow_partitioned_grads_serial())
        theirs = bool(type(engine.optimizer).has_overflow_partitioned_grads_serial(engine.optimizer))
        engine.step()
        found.append((mine, theirs, torch.equal(engine.module[2].weight, before)))
        internals.take_down_engine(engine)
    return found


def test_gradients_that_are_not_finite_are_seen_together():
    first, second = run_distributed(bad_gradients, 2)
    assert [(mine, theirs) for mine, theirs, _ in first] == [(False, False)] * 5
    assert [(mine, theirs) for mine, theirs, _ in second] == [(False, False), *[(True, True)] * 3, (False, False)]
    for each in (first, second):
        assert [left_out for _, _, left_out in each][1:4] == [True] * 3
        assert not each[0][2]


def test_where_gradients_are_looked_at_is_where_it_was():
    engine = SimpleNamespace(optimizer=SimpleNamespace(has_overflow_partitioned_grads_serial=None))
    expect_gone(lambda: internals.look_at_gradients_together(engine), "averaged_gradients")
