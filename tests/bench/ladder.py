"""The ladder: LoRA by cola_ds beside LoRA by PEFT, Hugging Face's Trainer and DeepSpeed, one thing added at a time.

    python -m tests.bench.ladder MODEL [--processes 2] [--workload short|mixed|long] [--rungs NAME ...] [--repeats 3]
                                 [--steps 20] [--timed-steps 6]

Rung 0 is the Trainer (tests/bench/trainer.py). Each next rung is cola_ds with all that the rungs below it have, and one thing
more. All train the same rows in fp32, of text that is written here, with the same batch, threads, learning rates, first adapters
and DeepSpeed JSON (where a rung does not say otherwise).

First every rung trains `--steps` steps, and its losses must be rung 0's to 1e-4, step by step; otherwise it has failed, has no
speed, and the script ends with status 1. The steps of a packed rung have other examples in them: its losses are compared to those
of a Trainer that trains in each step exactly the examples of the packed one, unpacked.
Then, `--repeats` times, each rung right before or after rung 0, over `--timed-steps` steps: medians, and medians of the ratios of
pairs.
Tokens are those of examples, without padding; GFLOP/s count what the examples need (cola_ds/training/work.py), beside what
products of fp32 matrices reach on the same threads in the same run. Memory is the highest of all processes, resident on the CPU.
At last, where the time of the top rung's steps goes. launch/bench.sh ladder runs it on SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy

from cola_ds.distributed.accelerator import accelerator_name
from cola_ds.errors import UserError
from tests.bench.arms import WARM_UP, Arm, Arms
from tests.bench.timed import ArmFailedError
from tests.bench.work import WORKLOADS, matrix_rate

TOLERANCE = 1e-4
"""Between the losses of a step, in nats."""
RUNGS: dict[str, tuple[str, list[str]]] = {
    "json": ("cola_ds, DeepSpeed's own sizes", []),
    "sizes": ("sizes from the model's shapes", ["deepspeed={same_json}"]),
    "stage": ("the smallest stage that fits", ["deepspeed=auto"]),
    "attention": ("attention chosen for the device", ["model.attention=auto"]),
    "kernels": ("kernels chosen for the device", ["model.kernels=auto"]),
    "packed": (
        "packed rows",
        ["data.packing=best_fit", "optim.global_batch_size={packed_rows}", "optim.micro_batch_size={packed_micro}"],
    ),
    "compiled": ("compiled blocks", ["model.compile=true"]),
}
"""What each rung adds: what it is called in the table, and the overrides that it brings, on top of PLAIN in arms.py."""
COLUMNS = (
    "rung", "adds", "tokens/s", "to rung 0", "to the one before", "step, s", "peak, MiB", "to rung 0", "first step, s",
    "to rung 0", "GFLOP/s", "of matrix products", "losses differ by",
)  # fmt: skip


@dataclass
class Rung:
    """A rung, and what became of it."""

    name: str
    adds: str
    overrides: list[str]
    failed: str = ""
    difference: float = 0.0
    pairs: list[tuple[Arm, Arm]] = field(default_factory=list)
    """Rung 0's run and its own, side by side."""


def check(arms: Arms, names: list[str]) -> list[Rung]:
    """Every rung's losses against the Trainer's. A rung that fails is not part of those above it, nor one that this version lacks
    a key for."""
    references: dict[str, list[float]] = {}  # the Trainer's losses, by the examples of the steps
    rungs, kept = [], list[str]()
    for name in names:
        adds, brings = RUNGS[name]
        overrides = [*kept, *arms.filled(brings)]
        try:
            plan = arms.plan(arms.prepared(overrides), arms.args.steps)
        except UserError as error:
            print(f"{name}: skipped: {error}", flush=True)
            continue
        rung = Rung(name, adds, overrides)
        rungs.append(rung)
        key = json.dumps([sorted(step) for step in plan.steps])
        if key not in references:
            references[key] = arms.run_trainer(plan).losses
        try:
            losses = arms.run_cola(overrides, plan).losses
        except ArmFailedError as error:
            rung.failed = f"it did not run:\n{error}"
        else:
            rung.difference = float(numpy.abs(numpy.subtract(losses, references[key])).max())  # NaN stays NaN
            if not rung.difference <= TOLERANCE:
                rung.failed = f"its losses differ from rung 0's by {rung.difference:.2g}, more than {TOLERANCE:g}"
        print(f"{name}: {rung.failed or f'losses are those of rung 0 to {rung.difference:.1e}'}", flush=True)
        if not rung.failed:
            kept = overrides
    return rungs


def measure(arms: Arms, rungs: list[Rung]) -> list[float]:
    """Pairs in turn, into the rungs. Returns the machine's rates, one a round. Raises ArmFailedError."""
    steps = arms.args.timed_steps
    padded = arms.plan(arms.prepared([]), steps)
    plans = {rung.name: arms.plan(arms.prepared(rung.overrides), steps) for rung in rungs}
    rates = []
    for repeat in range(arms.args.repeats):
        rates.append(matrix_rate(arms.args.processes))
        for at in range(0, len(rungs), 2):  # a run of rung 0 stands between those of two rungs, beside both
            before, *after = rungs[at : at + 2]
            own = arms.run_cola(before.overrides, plans[before.name])
            first = arms.run_trainer(padded)
            before.pairs.append((first, own))
            for rung in after:
                rung.pairs.append((first, arms.run_cola(rung.overrides, plans[rung.name])))
            for rung in (before, *after):
                times = rung.pairs[-1][1].tokens_per_s / first.tokens_per_s
                print(f"repeat {repeat + 1}, {rung.name}: {times:.2f} times the tokens/s of rung 0", flush=True)
    return rates


def ratio(rung: Rung, name: str) -> float:
    """The median of a figure's ratio to rung 0's."""
    return statistics.median(getattr(own, name) / getattr(first, name) for first, own in rung.pairs)


def report(arms: Arms, rungs: list[Rung], rates: list[float]) -> None:
    """The table, under the machine and the command that it is of."""
    args, workload = arms.args, arms.workload
    rate = statistics.median(rates)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers", "peft"))
    print(
        f"\n{accelerator_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, "
        f"{packages}; `{args.command}`"
    )
    print(
        f"{args.workload}: steps of {workload.global_batch_size} examples of at most {workload.max_length} tokens, micro batches "
        f"of {workload.micro_batch_size}; fp32, processes: {args.processes}, threads of each: {os.environ['OMP_NUM_THREADS']}; "
        f"matrix products: {rate / 1e9:.0f} GFLOP/s; medians of {args.repeats} pairs"
    )
    print(f"\n| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    firsts = [first for rung in rungs for first, _ in rung.pairs]
    print(line("0", "PEFT, Trainer, DeepSpeed", firsts, rate, ["1", "", "1", "1"], ""))
    before = 1.0
    for number, rung in enumerate(rungs, 1):
        speed = ratio(rung, "tokens_per_s")
        ratios = [speed, speed / before, ratio(rung, "peak_bytes"), ratio(rung, "first_step_s")]
        own = [own for _, own in rung.pairs]
        shown = [f"{each:.2f}" for each in ratios]
        print(line(f"{number} {rung.name}", rung.adds, own, rate, shown, f"{rung.difference:.0e}"), flush=True)
        before = speed


def line(name: str, adds: str, runs: list[Arm], rate: float, ratios: list[str], difference: str) -> str:
    """A row of the table: medians of runs."""
    found = {each: statistics.median(getattr(run, each) for run in runs) for each in vars(runs[0]) if each != "losses"}
    cells = [
        name, adds, f"{found['tokens_per_s']:.0f}", ratios[0], ratios[1], f"{found['step_s']:.3f}",
        f"{found['peak_bytes'] / 2**20:.0f}", ratios[2], f"{found['first_step_s']:.1f}", ratios[3],
        f"{found['flops_per_s'] / 1e9:.1f}", f"{found['flops_per_s'] / rate:.0%}", difference,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def profile(arms: Arms, rung: Rung) -> None:
    """Where the time of a rung's steps goes: a table. Raises ArmFailedError."""
    found = arms.where(rung.overrides)
    step_s = sum(found.values())
    print(
        f"\nWhere a step of {rung.name} goes: {step_s:.3f} s under the profiler, process 0\n\n| part | ms | of a step |"
    )
    print("| --- | --- | --- |")
    for part, seconds in sorted(found.items(), key=lambda each: -each[1]):
        print(f"| {part} | {1000 * seconds:.2f} | {seconds / step_s:.0%} |")


def arguments() -> argparse.Namespace:
    """Of the command line, checked."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="a model's folder")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="short")
    parser.add_argument(
        "--rungs", nargs="+", choices=list(RUNGS), default=list(RUNGS), metavar="NAME", help=", ".join(RUNGS)
    )
    parser.add_argument("--repeats", type=int, default=3, help="pairs of each rung and rung 0")
    parser.add_argument("--steps", type=int, default=20, help="steps whose losses are compared")
    parser.add_argument(
        "--timed-steps", type=int, default=6, help=f"steps of a timed run, the first {WARM_UP} left out"
    )
    args = parser.parse_args()
    args.command = " ".join(["python -m tests.bench.ladder", *sys.argv[1:]])
    args.rungs = [name for name in RUNGS if name in args.rungs]
    least = WARM_UP + 1
    if args.timed_steps < least or args.steps < least or args.repeats < 1 or args.processes < 1:
        parser.error(f"--steps and --timed-steps must be at least {least}, --repeats and --processes at least 1")
    workload = WORKLOADS[args.workload]
    if workload.global_batch_size % (workload.micro_batch_size * args.processes):
        parser.error(f"{args.processes} processes do not share steps of {workload.global_batch_size} examples evenly")
    return args


def main() -> None:
    """Check, measure, report, and show where the top rung's time goes."""
    args = arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.processes)))
    with tempfile.TemporaryDirectory() as scratch:
        try:
            arms = Arms(args, Path(scratch))
            rungs = check(arms, args.rungs)
            passed = [rung for rung in rungs if not rung.failed]
            if passed:
                report(arms, passed, measure(arms, passed))
                profile(arms, passed[-1])
        except (ArmFailedError, UserError) as error:
            sys.exit(f"ladder: {error}")
    failed = [f"{rung.name}: {rung.failed}" for rung in rungs if rung.failed]
    if failed:
        sys.exit("\n".join(["", "failed:", *failed]))


if __name__ == "__main__":
    main()
