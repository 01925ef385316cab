"""The ladder: LoRA by cola_ds beside LoRA by PEFT, Hugging Face's Trainer and DeepSpeed, one thing added at a time.

    python -m tests.bench.ladder MODEL [--processes 2] [--workload short|mixed|long] [--rungs NAME ...] [--repeats 3] [--steps 20]
                                 [--timed-steps 6]

Rung 0 is the Trainer (tests/bench/trainer.py). Each next rung is cola_ds with all that the rungs below it have, and one thing more.
All train the same rows in fp32, with the same batch, threads, learning rates and first adapters, of text that is written here.

First every rung trains `--steps` steps, and its losses must be rung 0's to 1e-4, step by step; otherwise it has failed, has no speed,
and the script ends with status 1. The steps of a packed rung have other examples in them: its losses are compared to those of a
Trainer that trains in each step exactly the examples of the packed one, unpacked.
Then, `--repeats` times, each rung in turn beside rung 0, over `--timed-steps` steps: medians, and medians of the ratios of pairs.
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
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cola_ds.config.loading import load_config
from cola_ds.data.batcher import Batcher
from cola_ds.errors import UserError
from cola_ds.training.prepare import Prepared, count_adapters, prepare
from tests.bench.arms import ArmFailedError, json_rows, run_arm, torchrun
from tests.bench.work import WORKLOADS, Work, Workload, matrix_rate, save_rows, work_of
from tests.support.toys import REPOSITORY, save_run

WARM_UP = 2
"""Steps that are left out of a run's speed: they compile, and fill what allocates."""
TOLERANCE = 1e-4
"""Between the losses of a step, in nats."""
RUNGS: dict[str, tuple[str, list[str]]] = {
    "json": ("cola_ds, the same JSON", []),
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
"""What each rung adds: what it is called in the table, and the overrides that it brings."""
PLAIN = ["deepspeed={plain_json}", "model.attention=sdpa", "model.kernels=torch", "model.compile=false"]
"""Where the rungs start: what they add, switched off. Those that a version has no key for are left out."""


@dataclass
class Arm:
    """What one run took."""

    losses: list[float]
    step_s: float
    tokens_per_s: float
    flops_per_s: float
    peak_bytes: float
    first_step_s: float


@dataclass
class Plan:
    """What a config trains: the examples of each step, as the Trainer is given them."""

    steps: list[list[int]]
    micro_batch_size: int
    micro_steps: int
    tokens: list[int]
    labels: list[int]
    flops: list[int]


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


class Ladder:
    """The rows, the JSONs and the runs of one comparison, in a folder."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder = args, folder
        self.workload: Workload = WORKLOADS[args.workload]
        self.runs = 0
        self.places = self._save_jsons()
        self.config = save_run(folder / "run.yaml", self._config())
        from transformers import AutoTokenizer

        count = max(args.steps, args.timed_steps) * self.workload.global_batch_size
        save_rows(folder / "rows.jsonl", self.workload, count, AutoTokenizer.from_pretrained(args.model))
        self.base = self._kept(PLAIN)
        prepared = self.prepared([])
        self.work: Work = work_of(prepared.skeleton, count_adapters(prepared, 1))
        self.places |= self._packed_sizes(prepared)
        self._save_ids(prepared)

    def _save_jsons(self) -> dict[str, Any]:
        """The JSON that the Trainer has, whose sizes it derives itself; and the same with DeepSpeed's own sizes."""
        engine = json.loads((REPOSITORY / "ds_configs/zero3.json").read_text(encoding="utf-8"))
        zero = engine["zero_optimization"]
        batches = (
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "gradient_clipping",
        )
        sizes = {
            "reduce_bucket_size": 500_000_000, "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 100_000,
        }  # fmt: skip
        engine |= dict.fromkeys(batches, "auto")
        for name, found in (("same_json", dict.fromkeys(sizes, "auto")), ("plain_json", sizes)):
            path = self.folder / f"{name}.json"
            path.write_text(json.dumps({**engine, "zero_optimization": {**zero, **found}}, indent=2), encoding="utf-8")
        return {name: str(self.folder / f"{name}.json") for name in ("same_json", "plain_json")}

    def _config(self) -> dict[str, Any]:
        return {
            "model": {"path": self.args.model, "dtype": "fp32"},
            "method": "lora",
            "lora": {"rank": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]},
            "data": {"train": str(self.folder / "rows.jsonl"), "max_length": self.workload.max_length, "cache": "none"},
            "optim": {
                "lr": 5e-4, "max_steps": self.args.steps, "global_batch_size": self.workload.global_batch_size,
                "micro_batch_size": self.workload.micro_batch_size,
            },
            "checkpoint": {"every_steps": None},
            "run": {"dir": str(self.folder / "unused"), "log_every_steps": 1},
        }  # fmt: skip

    def _kept(self, overrides: list[str]) -> list[str]:
        """Those whose key this version has."""
        kept = []
        for override in self.filled(overrides):
            try:
                load_config(self.config, [override])
            except UserError:
                continue
            kept.append(override)
        return kept

    def _packed_sizes(self, prepared: Prepared) -> dict[str, Any]:
        """As many packed rows as hold the examples of a step, the same for each process."""
        processes = self.args.processes
        tokens = sum(map(int, prepared.train.lengths)) / len(prepared.train.lengths) * self.workload.global_batch_size
        each = max(1, round(tokens / self.workload.max_length / processes))
        micro = max(size for size in range(1, self.workload.micro_batch_size + 1) if each % size == 0)
        return {"packed_rows": each * processes, "packed_micro": micro}

    def _save_ids(self, prepared: Prepared) -> None:
        """The examples as cola_ds has encoded them, as the Trainer takes them: a label is the id at its own place."""
        with open(self.folder / "ids.jsonl", "w", encoding="utf-8") as out:
            for index in range(len(prepared.train)):
                batch: Any = prepared.train.collate([index])
                ids = batch.input_ids[0].tolist()
                labels = [-100] * len(ids)
                for position, label in zip(batch.positions.tolist(), batch.labels[0].tolist(), strict=True):
                    labels[position + 1] = label
                out.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")

    def filled(self, overrides: Iterable[str]) -> list[str]:
        """With the names of the JSONs and the sizes of a packed step put in."""
        return [override.format_map(_Later(self.places)) for override in overrides]

    def prepared(self, overrides: list[str]) -> Prepared:
        """The checked run. Raises UserError."""
        return prepare(load_config(self.config, [*self.base, *overrides]), self.args.processes)

    def plan(self, prepared: Prepared, steps: int) -> Plan:
        """What the first steps of a run have in them."""
        optim, train = prepared.config.optim, prepared.train
        batcher = Batcher(train, 0, 1, prepared.order)
        found = [
            batcher.step(step, prepared.config.run.seed, prepared.step_plan.global_batch_size, 1)
            for step in range(steps)
        ]
        # Inside a step cola_ds sorts by length; the Trainer takes examples as they come.
        chosen = [sorted(each.indices, key=lambda index: (index * 2_654_435_761) % 2**32) for each in found]
        return Plan(
            chosen, optim.micro_batch_size, prepared.step_plan.micro_steps, [each.tokens for each in found],
            [each.loss_tokens for each in found],
            [
                self.work.of([int(train.lengths[i]) for i in each], sum(int(train.loss_tokens[i]) for i in each))
                for each in chosen
            ],
        )  # fmt: skip

    def _new_folder(self, name: str) -> Path:
        self.runs += 1
        return self.folder / f"{self.runs:03}-{name}"

    def run_trainer(self, plan: Plan) -> Arm:
        """Rung 0, over a plan. Raises ArmFailedError."""
        folder = self._new_folder("trainer")
        folder.mkdir()
        config = load_config(self.config)
        said = {
            "model": str(Path(self.args.model).resolve()), "dtype": "float32", "rows": str(self.folder / "ids.jsonl"),
            "dir": str(folder), "deepspeed": self.places["same_json"], "seed": config.run.seed,
            "lora_rank": config.lora_ranks[0], "lora_alpha": config.lora.alpha, "targets": config.lora.targets,
            "lr": config.optim.lr, "max_grad_norm": config.optim.max_grad_norm, "steps": plan.steps,
            "micro_batch_size": plan.micro_batch_size, "micro_steps": plan.micro_steps, "tokens": plan.tokens,
            "labels": plan.labels, "activation_checkpointing": False,
        }  # fmt: skip
        path = folder.with_suffix(".plan.json")
        path.write_text(json.dumps(said), encoding="utf-8")
        words = torchrun(self.args.processes, "tests.bench.trainer", str(path))
        first_step_s = run_arm(words, folder / "metrics.jsonl", folder.with_suffix(".log"))
        return self._arm(folder, plan, first_step_s)

    def run_cola(self, overrides: list[str], plan: Plan, module: str = "cola_ds") -> Arm:
        """A rung, over its plan. Raises ArmFailedError."""
        folder = self._new_folder("cola")
        words = ["train", str(self.config), *self.base, *overrides]
        words += [f"run.dir={folder}", f"optim.max_steps={len(plan.steps)}"]
        first_step_s = run_arm(
            torchrun(self.args.processes, module, *words), folder / "metrics.jsonl", folder.with_suffix(".log")
        )
        return self._arm(folder, plan, first_step_s)

    def _arm(self, folder: Path, plan: Plan, first_step_s: float) -> Arm:
        rows = json_rows(folder / "metrics.jsonl")
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        if [row["tokens"] for row in rows] != plan.tokens:
            raise ArmFailedError(f"it trained {[row['tokens'] for row in rows]} tokens, not {plan.tokens}")
        warm = rows[WARM_UP:]
        seconds = sum(row["step_s"] for row in warm)
        return Arm(
            losses=result["losses"] if "losses" in result else [row["loss"] for row in rows],
            step_s=statistics.median(row["step_s"] for row in warm),
            tokens_per_s=sum(row["tokens"] for row in warm) / seconds,
            flops_per_s=sum(plan.flops[WARM_UP:]) / seconds,
            peak_bytes=result["peak_memory_bytes"],
            first_step_s=first_step_s,
        )


class _Later(dict):
    """Leaves a name that is not known yet as it stands."""

    def __missing__(self, name: str) -> str:
        return f"{{{name}}}"


def check(ladder: Ladder, names: list[str]) -> list[Rung]:
    """Every rung's losses against the Trainer's. A rung that fails is not part of those above it, nor one that this version lacks
    a key for."""
    steps = ladder.args.steps
    references: dict[str, list[float]] = {}
    rungs, kept = [], list[str]()
    for name in names:
        adds, brings = RUNGS[name]
        overrides = [*kept, *ladder.filled(brings)]
        try:
            plan = ladder.plan(ladder.prepared(overrides), steps)
        except UserError as error:
            if name == names[0]:
                raise
            print(f"{name}: skipped: {error}", flush=True)
            continue
        rung = Rung(name, adds, overrides)
        rungs.append(rung)
        key = json.dumps([sorted(step) for step in plan.steps])
        try:
            if key not in references:
                references[key] = ladder.run_trainer(plan).losses
        except ArmFailedError as error:
            sys.exit(f"rung 0 failed:\n{error}")
        try:
            losses = ladder.run_cola(overrides, plan).losses
        except ArmFailedError as error:
            rung.failed = f"it did not run:\n{error}"
        else:
            rung.difference = max(abs(a - b) for a, b in zip(losses, references[key], strict=True))
            if not rung.difference <= TOLERANCE:
                rung.failed = f"its losses differ from rung 0's by {rung.difference:.2g}, more than {TOLERANCE:g}"
        print(f"{name}: {rung.failed or f'losses are those of rung 0 to {rung.difference:.1e}'}", flush=True)
        if not rung.failed:
            kept = overrides
    return rungs


def measure(ladder: Ladder, rungs: list[Rung]) -> list[float]:
    """Pairs in turn, into the rungs. Returns the machine's rates, one a round."""
    steps = ladder.args.timed_steps
    padded = ladder.plan(ladder.prepared([]), steps)
    plans = {rung.name: ladder.plan(ladder.prepared(rung.overrides), steps) for rung in rungs}
    rates = []
    for repeat in range(ladder.args.repeats):
        rates.append(matrix_rate(ladder.args.processes))
        for rung in rungs:
            try:
                pair = ladder.run_trainer(padded), ladder.run_cola(rung.overrides, plans[rung.name])
            except ArmFailedError as error:
                sys.exit(f"{rung.name} or rung 0 failed in repeat {repeat + 1}:\n{error}")
            rung.pairs.append(pair)
            ratio = pair[1].tokens_per_s / pair[0].tokens_per_s
            print(f"repeat {repeat + 1}, {rung.name}: {ratio:.2f} times the tokens/s of rung 0", flush=True)
    return rates


def median(pairs: list[tuple[Arm, Arm]], which: int, name: str) -> float:
    """Of one figure of one side of the pairs."""
    return statistics.median(getattr(pair[which], name) for pair in pairs)


def ratio(rung: Rung, name: str) -> float:
    """The median of a figure's ratio to rung 0's."""
    return statistics.median(getattr(own, name) / getattr(first, name) for first, own in rung.pairs)


def report(ladder: Ladder, rungs: list[Rung], rates: list[float]) -> None:
    """The table, under the machine and the command that it is of."""
    args, workload = ladder.args, ladder.workload
    from cola_ds.distributed.accelerator import accelerator_name

    rate = statistics.median(rates)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers", "peft"))
    print(
        f"\n{accelerator_name()}, {os.cpu_count()} cores; Python {platform.python_version()}, {packages}; `{args.command}`"
    )
    print(
        f"{args.workload}: steps of {workload.global_batch_size} examples of at most {workload.max_length} tokens in micro batches "
        f"of {workload.micro_batch_size}; {args.processes} processes of {os.environ['OMP_NUM_THREADS']} threads, fp32; matrix "
        f"products reach {rate / 1e9:.0f} GFLOP/s; medians of {args.repeats} pairs; load {os.getloadavg()[0]:.1f}"
    )
    print("\n| rung | adds | tokens/s | to rung 0 | to the rung before | step, s | peak, MiB | to rung 0 | first step, s | to rung 0 |"
          " GFLOP/s | of matrix products | losses differ by |")  # fmt: skip
    print("|" + " --- |" * 13)
    every = [pair for rung in rungs for pair in rung.pairs]

    def line(
        name: str, adds: str, pairs: list[tuple[Arm, Arm]], which: int, ratios: list[str], difference: str
    ) -> None:
        found = {each: median(pairs, which, each) for each in Arm.__annotations__ if each != "losses"}
        cells = [
            name, adds, f"{found['tokens_per_s']:.0f}", ratios[0], ratios[1], f"{found['step_s']:.3f}",
            f"{found['peak_bytes'] / 2**20:.0f}", ratios[2], f"{found['first_step_s']:.1f}", ratios[3],
            f"{found['flops_per_s'] / 1e9:.1f}", f"{found['flops_per_s'] / rate:.0%}", difference,
        ]  # fmt: skip
        print(f"| {' | '.join(cells)} |")

    line("0", "PEFT, Trainer, DeepSpeed", every, 0, ["1", "", "1", "1"], "")
    before = 1.0
    for number, rung in enumerate(rungs, 1):
        speed = ratio(rung, "tokens_per_s")
        ratios = [
            f"{speed:.2f}",
            f"{speed / before:.2f}",
            f"{ratio(rung, 'peak_bytes'):.2f}",
            f"{ratio(rung, 'first_step_s'):.2f}",
        ]
        line(f"{number} {rung.name}", rung.adds, rung.pairs, 1, ratios, f"{rung.difference:.0e}")
        before = speed


def main() -> None:
    """Check, measure, report, and show where the top rung's time goes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
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
    if args.timed_steps <= WARM_UP or args.repeats < 1 or args.steps < 1:
        parser.error(f"--timed-steps must be more than {WARM_UP}, --repeats and --steps at least 1")
    args.rungs = [name for name in RUNGS if name in args.rungs]
    if (
        args.workload != "short"
        and args.processes * WORKLOADS[args.workload].micro_batch_size > WORKLOADS[args.workload].global_batch_size
    ):
        parser.error("too many processes for the workload's batch")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.processes)))
    with tempfile.TemporaryDirectory() as scratch:
        ladder = Ladder(args, Path(scratch))
        rungs = check(ladder, args.rungs)
        passed = [rung for rung in rungs if not rung.failed]
        if passed:
            report(ladder, passed, measure(ladder, passed))
    failed = [f"{rung.name}: {rung.failed}" for rung in rungs if rung.failed]
    if failed:
        sys.exit("\n".join(["", "failed:", *failed]))


if __name__ == "__main__":
    main()
