"""What knots cost: seconds, bytes and memory of tie and extend, and a chain of three links beside one link.

    python -m tests.bench.knots RUN.yaml [section.key=value ...] [--processes 2] [--knots 5] [--pairs 3] [--steps 120]
                                [--memory-pairs 9]

First, in one run and in turns, `--knots` times each and with four steps before each knot: a local tie and a gathered one, both
extended in place, and a local one whose extension changes the LoRA rank by one and so rebuilds the engine.
Then `--pairs` times, in turns: a whole run of one link and one of three, at `--steps` steps each and without evaluations, for
their wall time; and `--memory-pairs` times the same at 12 steps, for their peak memory, which the allocator makes vary more from
run to run than three links differ from one, and which does not depend on the number of steps.
launch/bench.sh runs it on SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from cola_ds.config.loading import load_config
from cola_ds.config.schema import RunConfig
from cola_ds.distributed import accelerator, collectives
from cola_ds.distributed.launcher import free_port, identify
from cola_ds.run.folder import RunDir
from cola_ds.training.build import build_chain
from cola_ds.training.knot import batch_loss, extend_chain, last_batch, tie_knot
from cola_ds.training.loop import train_step
from cola_ds.training.prepare import prepare
from cola_ds.training.state import Chain
from tests.support.distributed import CountedCollectives
from tests.support.toys import REPOSITORY

STEPS_PER_LINK = 4
MEMORY_STEPS = 12
WAYS = ("local", "gathered", "local, rebuilt")
ON_CPU = get_accelerator().device_name() == "cpu"


def reset_peak() -> None:
    """Forget the peak so far: of the device's memory, or of this process's resident memory where the device is the CPU."""
    if ON_CPU:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    else:
        get_accelerator().reset_peak_memory_stats()


def peak_mib() -> float:
    """The peak since `reset_peak`, the highest of all processes."""
    if ON_CPU:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        here = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]
    else:
        here = get_accelerator().max_memory_allocated() / 2**20
    return collectives.all_reduce_max([here])[0]


def timed(action, *args):
    """Seconds that all processes take for an action together, and what it returned."""
    collectives.all_reduce_sum(torch.zeros(1, device=accelerator.device()))
    get_accelerator().synchronize()
    begin = time.perf_counter()
    result = action(*args)
    get_accelerator().synchronize()
    return collectives.all_reduce_max([time.perf_counter() - begin])[0], result


def median(values: Iterable[float]) -> float:
    """Of those that were measured."""
    measured = [value for value in values if not math.isnan(value)]
    return statistics.median(measured) if measured else math.nan


def one_link(chain: Chain, way: str, remainders: dict[str, dict[str, torch.Tensor]]) -> dict[str, float]:
    """Train a link for some steps, tie it the given way, and start the next. Seconds, MiB and bytes."""
    config, state, tie = chain.config, chain.state, way.split(",")[0]
    chain.config = config.model_copy(update={"chain": config.chain.model_copy(update={"tie": tie})})
    state.remainders = remainders.setdefault(tie, {})  # of a shard, or of the whole weight: each way has its own
    reset_peak()
    seconds = []
    for _ in range(STEPS_PER_LINK):
        examples = chain.train.step(state.step, 0, config.optim.global_batch_size, config.optim.micro_batch_size)
        took, _ = timed(train_step, chain.engine, examples, config.optim.lr, chain.world_size)
        seconds.append(took)
        state.step += 1
    probe_s, _ = timed(batch_loss, chain, last_batch(chain))
    training_mib = peak_mib()
    reset_peak()
    with CountedCollectives() as counted:
        tie_s, _ = timed(tie_knot, chain)
        tied = counted.bytes
        extend_s, _ = timed(extend_chain, chain)
    state.link += 1
    return {
        "first_step_s": seconds[0], "step_s": statistics.median(seconds[1:]), "probe_s": probe_s, "tie_s": tie_s,
        "extend_s": extend_s, "training_mib": training_mib, "knot_mib": peak_mib(), "tie_bytes": tied,
        "extend_bytes": counted.bytes - tied,
    }  # fmt: skip


def measure_knots(config: RunConfig, knots: int) -> None:
    """Print the table of both ways to tie. Collective."""
    process = identify()
    lora_rank = config.lora_ranks[0]
    ranks = [lora_rank, *(lora_rank + turn % 2 for turn in range(knots) for _ in WAYS), lora_rank + knots % 2]
    changes = {
        "chain": config.chain.model_copy(update={"length": len(ranks), "knots": "even"}),
        "lora": config.lora.model_copy(update={"rank": ranks}),
        "optim": config.optim.model_copy(update={"max_steps": len(ranks) * STEPS_PER_LINK}),
    }
    config = config.model_copy(update=changes)
    collectives.init_process_group(process)
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunDir(scratch) if process.rank == 0 else None
        if folder:
            folder.create(config, {}, {})
        chain = build_chain(prepare(config, process.world_size), process, folder)
        chain.logger.close()
        remainders: dict[str, dict[str, torch.Tensor]] = {}
        before = one_link(chain, WAYS[0], remainders)  # fills caches
        rows: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(knots):
            for way, found in rows.items():
                row = one_link(chain, way, remainders)
                before["next_step_s"] = row["first_step_s"]
                found.append(row)
                before = row
        row["next_step_s"] = float("nan")  # no step followed
    if folder:
        report_knots(rows, config, process.world_size)
    collectives.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # as the command does: gloo's threads could abort an interpreter that shuts down


def report_knots(rows: dict[str, list[dict[str, float]]], config: RunConfig, world_size: int) -> None:
    """Medians of what `one_link` found, side by side."""
    medians = {way: {key: median(row[key] for row in rows[way]) for key in rows[way][0]} for way in rows}
    step = statistics.median(row["step_s"] for way in rows for row in rows[way])
    merge = "" if config.model.dtype == "fp32" else f"{config.chain.merge} merge, "  # in fp32 they are the same
    print(
        f"knots of {config.model.path}, {config.model.dtype}, {world_size} processes, LoRA rank {config.lora_ranks[0]}, "
        f"{merge}{len(rows['local'])} knots each way; one optimizer step: {step:.2f} s"
    )
    lines = [
        ("tie, s", lambda m: f"{m['tie_s']:.3f}"),
        ("tie, steps", lambda m: f"{m['tie_s'] / step:.3f}"),
        ("extend, s", lambda m: f"{m['extend_s']:.3f}"),
        ("extend, steps", lambda m: f"{m['extend_s'] / step:.3f}"),
        ("tie and extend, steps", lambda m: f"{(m['tie_s'] + m['extend_s']) / step:.3f}"),
        ("first step after it, steps", lambda m: f"{m['next_step_s'] / step:.3f}"),
        ("one loss probe, steps", lambda m: f"{m['probe_s'] / step:.3f}"),
        ("tie, KiB moved per process", lambda m: f"{m['tie_bytes'] / 1024:.0f}"),
        ("extend, KiB moved per process", lambda m: f"{m['extend_bytes'] / 1024:.0f}"),
        ("peak of the knot above training's, MiB", lambda m: f"{m['knot_mib'] - m['training_mib']:.0f}"),
    ]
    print(f"\n| | {' | '.join(WAYS)} |\n| --- | --- | --- | --- |")
    for name, value in lines:
        print(f"| {name} | {' | '.join(value(medians[way]) for way in WAYS)} |")


def run_quietly(command: list[str], env: dict[str, str]) -> str:
    """A command's stdout; where it fails, its stderr is shown and the benchmark ends with its status."""
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        sys.exit(done.returncode)
    return done.stdout


def compare_runs(
    run: str, overrides: list[str], processes: int, pairs: int, steps: int
) -> tuple[list[float], list[float]]:
    """Wall time (without loading) and peak memory of three links in units of one link's, pair by pair."""
    times, memories = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for pair in range(pairs):
            found = {}
            for length in (1, 3) if pair % 2 == 0 else (3, 1):
                folder = Path(scratch) / f"{length}-{pair}"
                words = [f"run.dir={folder}", f"chain.length={length}", f"optim.max_steps={steps}"]
                run_quietly(["./launch/local.sh", run, str(processes), *overrides, *words], dict(os.environ))
                found[length] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
            seconds = {length: result["wall_time_s"] - result["loading_s"] for length, result in found.items()}
            peaks = {length: result["peak_memory_bytes"] for length, result in found.items()}
            times.append(seconds[3] / seconds[1])
            memories.append(peaks[3] / peaks[1])
            print(
                f"pair {pair + 1}: {seconds[1]:.1f} s and {seconds[3]:.1f} s, "
                f"{peaks[1] / 2**20:.0f} MiB and {peaks[3] / 2**20:.0f} MiB",
                flush=True,
            )
    return times, memories


def main() -> None:
    """Start the process group's part under torchrun, then the whole runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--knots", type=int, default=5, help="knots each way")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of whole runs, or 0")
    parser.add_argument("--steps", type=int, default=120, help="steps of each whole run")
    parser.add_argument("--memory-pairs", type=int, default=9, help="pairs of short runs for their memory, or 0")
    parser.add_argument("--in-group", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    overrides = [*args.overrides, "data.eval=null"]
    if args.in_group:
        measure_knots(load_config(args.run, overrides), args.knots)
    here = ["-m", "tests.bench.knots", args.run, *overrides, "--knots", str(args.knots), "--in-group"]
    port = ["--master_port", str(free_port())]
    group = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(args.processes), *port, *here]
    env = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.processes)), **os.environ}
    print("knots of " + run_quietly(group, env).partition("knots of ")[2], flush=True)
    whole = args.run, overrides, args.processes
    times, memories = compare_runs(*whole, args.pairs, args.steps)
    if args.steps != MEMORY_STEPS:
        memories = []
    _, more = compare_runs(*whole, args.memory_pairs - len(memories), MEMORY_STEPS)
    memories += more
    print("\n| three links / one link | median | pairs |\n| --- | --- | --- |")
    for name, values in ((f"wall time, {args.steps} steps", times), (f"peak memory, {MEMORY_STEPS} steps", memories)):
        if values:
            print(f"| {name} | {statistics.median(values):.3f} | {', '.join(f'{value:.3f}' for value in values)} |")


if __name__ == "__main__":
    main()
