"""Between two rows of metrics.jsonl: what comes to the host, and what waits for the device, counted by torch's profiler."""

import collections
import contextlib
import warnings

import pytest
import torch

from tests.gpu.support import ON_CPU, run, three_links

FIRST, STEPS = 4, 4
"""Steps are counted once ZeRO-3 has its trace, and the optimizer its states."""
OURS = 1
"""Numbers that a step brings to the host: the answer of all processes (loop.tune_lora)."""
# And those that DeepSpeed brings, read in 0.19.8:
# at stage 2 has_overflow and is_invalid_grad_norm (both left out by bf16.check_grad_overflow: false), the same again where the
# norm is clipped (left out by optim.max_grad_norm: null), and the -1 that mask_nan_or_inf_with_val_inplace fills in;
# at stage 3 is_invalid_grad_norm, and in fp16 has_overflow.
DEEPSPEEDS = {("zero2", "bf16"): 4, ("zero2", "fp16"): 4, ("zero3", "bf16"): 1, ("zero3", "fp16"): 2}
UNPINNED = 1
"""Copies to the device from memory that is not pinned: the -1 that stands for a norm that is none, of DeepSpeed as well."""
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
DEVICE_WAITS = 4
"""Of a step at stage 2 with overlap_comm, before a bucket of gradients is summed and after the last: DeepSpeed's."""


def profiled(process, path, monkeypatch):
    """The profiler's events of STEPS whole turns of the loop, none of which writes a row; and on CUDA the lines that waited."""
    from torch.profiler import ProfilerActivity, profile

    from cola_ds.distributed import watchdog

    activities = [ProfilerActivity.CPU] if ON_CPU else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    profiler, beat, seen = profile(activities=activities, acc_events=True), watchdog.heartbeat, []

    def counted(doing, **step):
        if doing == "examples":
            seen.append(step["step"])
            if len(seen) == FIRST:
                told("warn")
                profiler.start()
            elif len(seen) == FIRST + STEPS:
                profiler.stop()
                told("default")
        beat(doing, **step)

    def told(mode):
        if not ON_CPU:
            torch.cuda.set_sync_debug_mode(mode)

    monkeypatch.setattr(watchdog, "heartbeat", counted)
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        stack.callback(told, "default")
        stack.enter_context(run(process, path, monkeypatch))
    assert len(seen) > FIRST + STEPS
    waited = collections.Counter(
        f"{line.filename}:{line.lineno}" for line in lines if "synchroniz" in str(line.message)
    )
    return profiler.events(), waited


def is_in_optimizer(event):
    """Whether an event is torch's optimizer's, whose step counts are numbers of the host on every device."""
    while event is not None and "Optimizer.step" not in event.name:
        event = event.cpu_parent
    return event is not None


@pytest.mark.parametrize(("engine", "dtype"), DEEPSPEEDS)
def test_a_step_brings_few_numbers_to_the_host(process, toy, tmp_path, monkeypatch, engine, dtype):
    if dtype == "fp16" and ON_CPU:
        pytest.skip("DeepSpeed's CPU accelerator lacks fp16")
    path, _ = three_links(
        toy, tmp_path, engine, dtype, chain={"length": 1}, lora={"rank": 8}, run={"log_every_steps": 12},
        checkpoint={"every_steps": 100},
    )  # fmt: skip
    events, waited = profiled(process, path, monkeypatch)
    names = collections.Counter(event.name for event in events)
    if ON_CPU:  # without copies, what asks for a number is counted; ours asks for a list
        asked = [event for event in events if event.name == "aten::item" and not is_in_optimizer(event)]
        assert len(asked) == STEPS * DEEPSPEEDS[engine, dtype]
        return
    copies = {name: count for name, count in names.items() if name.startswith("Memcpy")}
    to_host = sum(count for name, count in copies.items() if "DtoH" in name)
    unpinned = sum(count for name, count in copies.items() if "HtoD" in name and "Pageable" in name)
    waits = {name: names[name] for name in (*WAITS, "cudaDeviceSynchronize")}
    said = f"in {STEPS} steps: {copies}, {waits}, at {dict(waited)}"
    assert to_host == STEPS * (OURS + DEEPSPEEDS[engine, dtype]), said
    assert unpinned <= STEPS * UNPINNED, said
    if engine == "zero2":  # stage 3 waits at each gather of a single process, and at the end of each backward pass
        of_the_profiler = 1  # as it ends
        assert sum(names[name] for name in WAITS) <= to_host + unpinned, said
        assert names["cudaDeviceSynchronize"] <= STEPS * DEVICE_WAITS + of_the_profiler, said
