"""Where the time of training steps goes: the words of cola_ds with a profiler around some steps.

    torchrun --nproc_per_node N -m tests.bench.where train RUN.yaml [section.key=value ...]

Process 0 writes where.json beside its metrics: the seconds of each part, of a step. On the CPU they are those of the thread that
trains, and waiting for another process is a part of its own; elsewhere those of the device.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch.profiler import profile, record_function

from cola_ds.cli import main
from cola_ds.training import loop

SKIPPED, STEPS = 3, 3
"""Steps before those that are looked at, and how many these are."""
_MARK, _WAIT = "a step of the ladder", "waiting for processes"
PARTS = (
    ("loss", r"log_softmax|nll_loss|cross_entropy"),
    ("attention", r"attention|flash|softmax|sdp|flex"),
    ("matrix products", r"aten::(_?addmm|mm|bmm|baddbmm|linear|matmul)|mkl|onednn|gemm"),
    ("waiting for processes", _WAIT),
    ("collectives", r"c10d|gloo|nccl|all_?gather|all_?reduce|reduce_scatter|broadcast"),
    ("optimizer", r"Optimizer|_foreach|_fused_adam"),
    ("compiled, element-wise", r"Compiled|triton|graph_|cpp_fused"),
    ("copies", r"aten::(copy_|_to_copy|to|clone|cat|contiguous|fill_|zero_|index|embedding|empty|zeros)"),
    ("element-wise", r"aten::"),
)
"""Each part with what its operations are called; the first that fits has it."""
REST = "Python, and what has no name"


def part_of(name: str) -> str:
    """The part that an operation belongs to."""
    return next((part for part, pattern in PARTS if re.search(pattern, name)), REST)


def _is_attentions(event: Any) -> bool:
    """Whether it is part of the package's own attention on the CPU (evaluation/each_alone.py), matrix products and all."""
    while event is not None:
        if "each_alone" in event.name:
            return True
        event = getattr(event, "cpu_parent", None)
    return False


def seconds_of(events: Any, wall_s: float, on_cpu: bool) -> dict[str, float]:
    """Seconds of each part in all of the steps, from the profiler's events."""
    found = dict.fromkeys([*(part for part, _ in PARTS), REST], 0.0)
    trains = {event.thread for event in events if event.name == _MARK}
    for event in events:
        if on_cpu and event.thread not in trains:
            continue  # it runs beside the one that trains
        micros = event.self_cpu_time_total if on_cpu else event.self_device_time_total
        found["attention" if _is_attentions(event) else part_of(event.name)] += micros / 1e6
    found[REST] += wall_s - sum(found.values())
    return found


def watch(folder: Path) -> None:
    """Put the profiler around some steps, on process 0."""
    inner, seen = loop.train_step, Counter[str]()
    profiler = profile(acc_events=True)

    def train_step(*words: Any) -> Any:
        if seen["steps"] == SKIPPED:
            get_accelerator().synchronize()
            profiler.start()
            seen["began"] = time.perf_counter_ns()
        with record_function(_MARK):
            loss = inner(*words)
        seen["steps"] += 1
        if seen["steps"] == SKIPPED + STEPS:
            get_accelerator().synchronize()
            wall_s = (time.perf_counter_ns() - seen["began"]) / 1e9
            profiler.stop()
            found = seconds_of(profiler.events(), wall_s, get_accelerator().device_name() == "cpu")
            each = {part: seconds / STEPS for part, seconds in found.items()}
            (folder / "where.json").write_text(json.dumps(each), encoding="utf-8")
        return loss

    loop.train_step = train_step  # type: ignore[assignment]
    work = torch._C._distributed_c10d.Work
    wait = work.wait

    def named_wait(*args: Any, **words: Any) -> Any:
        with record_function(_WAIT):
            return wait(*args, **words)

    work.wait = named_wait  # type: ignore[method-assign]


if __name__ == "__main__":
    if os.environ["RANK"] == "0":
        watch(Path(next(word for word in reversed(sys.argv) if word.startswith("run.dir=")).removeprefix("run.dir=")))
    sys.exit(main(sys.argv[1:]))
