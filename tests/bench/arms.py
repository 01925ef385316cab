"""The arms of the ladder: runs of the Trainer and of cola_ds over the same rows, and what they took."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cola_ds.config.loading import load_config
from cola_ds.config.schema import RunConfig
from cola_ds.data.batcher import Batcher
from cola_ds.errors import UserError
from cola_ds.training.prepare import prepare
from cola_ds.training.prepared import Prepared
from cola_ds.training.work import work_of
from tests.bench.timed import ArmFailedError, json_rows, timed_run, torchrun
from tests.bench.work import WORKLOADS, Workload, save_rows
from tests.support.toys import REPOSITORY, save_run

WARM_UP = 2
"""Steps that are left out of a run's speed: they compile, and fill what allocates."""
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
    """What each step needs: cola_ds/training/work.py."""


class Arms:
    """The rows, the JSONs and the runs of one comparison, in a folder."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        if not Path(args.model, "config.json").is_file():
            raise UserError(f"{args.model} is no model's folder")
        self.args, self.folder = args, folder
        self.model = str(Path(args.model).resolve())
        self.workload: Workload = WORKLOADS[args.workload]
        self.runs = 0
        self.places = self._save_jsons()
        self.config = save_run(folder / "run.yaml", self._config())
        from transformers import AutoTokenizer

        count = max(args.steps, args.timed_steps) * self.workload.global_batch_size
        save_rows(folder / "rows.jsonl", self.workload, count, AutoTokenizer.from_pretrained(self.model))
        self.base = self._kept(PLAIN)
        prepared = self.prepared([])
        self.places |= self._packed_sizes(prepared)
        save_ids(prepared, folder / "ids.jsonl")

    def _save_jsons(self) -> dict[str, Any]:
        """The JSON that the Trainer has, whose sizes it derives itself; and the same with DeepSpeed's own sizes."""
        engine = json.loads((REPOSITORY / "ds_configs/zero3.json").read_text(encoding="utf-8"))
        zero = engine["zero_optimization"]
        follows = (
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "gradient_clipping",
        )
        sizes = {
            "reduce_bucket_size": 500_000_000, "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 100_000,
        }  # fmt: skip
        fixed = {"stage3_max_live_parameters": 1_000_000_000, "stage3_max_reuse_distance": 1_000_000_000}
        engine |= dict.fromkeys(follows, "auto")
        for name, found in (("same_json", dict.fromkeys(sizes, "auto")), ("plain_json", sizes | fixed)):
            path = self.folder / f"{name}.json"
            path.write_text(json.dumps({**engine, "zero_optimization": {**zero, **found}}, indent=2), encoding="utf-8")
        return {name: str(self.folder / f"{name}.json") for name in ("same_json", "plain_json")}

    def _config(self) -> dict[str, Any]:
        return {
            "model": {"path": self.model, "dtype": "fp32"},
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

    def filled(self, overrides: Iterable[str]) -> list[str]:
        """With the names of the JSONs and the sizes of a packed step put in."""
        return [override.format_map(self.places) for override in overrides]

    def prepared(self, overrides: list[str]) -> Prepared:
        """The checked run. Raises UserError."""
        return prepare(load_config(self.config, [*self.base, *overrides]), self.args.processes)

    def plan(self, prepared: Prepared, steps: int) -> Plan:
        """What the first steps of a run have in them."""
        return plan_of(prepared, steps)

    def _new_folder(self, name: str) -> Path:
        self.runs += 1
        return self.folder / f"{self.runs:03}-{name}"

    def run_trainer(self, plan: Plan) -> Arm:
        """Rung 0, over a plan. Raises ArmFailedError."""
        folder = self._new_folder("trainer")
        folder.mkdir()
        config = load_config(self.config)
        said = trainer_plan(
            config, plan, model=str(Path(self.args.model).resolve()), dtype="float32", dir=str(folder),
            rows=str(self.folder / "ids.jsonl"), deepspeed=self.places["same_json"], targets=config.lora.targets,
        )  # fmt: skip
        path = folder.with_suffix(".plan.json")
        path.write_text(json.dumps(said), encoding="utf-8")
        words = torchrun(self.args.processes, "tests.bench.trainer", str(path))
        first_step_s = timed_run(words, folder / "metrics.jsonl", folder.with_suffix(".log"))
        return self._arm(folder, plan, first_step_s)

    def run_cola(self, overrides: list[str], plan: Plan) -> Arm:
        """A rung, over its plan. Raises ArmFailedError."""
        folder, first_step_s = self._train("cola_ds", overrides, len(plan.steps))
        return self._arm(folder, plan, first_step_s)

    def where(self, overrides: list[str]) -> dict[str, float]:
        """Seconds of each part of a rung's step. Raises ArmFailedError."""
        folder, _ = self._train("tests.bench.where", overrides, 6)
        found: dict[str, float] = json.loads((folder / "where.json").read_text(encoding="utf-8"))
        return found

    def _train(self, module: str, overrides: list[str], steps: int) -> tuple[Path, float]:
        folder = self._new_folder("cola")
        words = ["train", str(self.config), *self.base, *overrides, f"run.dir={folder}", f"optim.max_steps={steps}"]
        metrics, log = folder / "metrics.jsonl", folder.with_suffix(".log")
        return folder, timed_run(torchrun(self.args.processes, module, *words), metrics, log)

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


def save_ids(prepared: Prepared, path: Path) -> None:
    """The examples as cola_ds has encoded them, as the Trainer takes them: a label is the id at its own place."""
    with open(path, "w", encoding="utf-8") as out:
        for index in range(len(prepared.train)):
            batch: Any = prepared.train.collate([index])
            ids = batch.input_ids[0].tolist()
            labels = [-100] * len(ids)
            for position, label in zip(batch.positions.tolist(), batch.labels[0].tolist(), strict=True):
                labels[position + 1] = label
            out.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")


def plan_of(prepared: Prepared, steps: int) -> Plan:
    """What the first steps of a run have in them."""
    optim, train = prepared.config.optim, prepared.train
    batcher = Batcher(train, 0, 1, prepared.order)
    size = prepared.step_plan.global_batch_size
    found = [batcher.step(step, prepared.config.run.seed, size, size) for step in range(steps)]
    (work,) = work_of(prepared)
    return Plan(
        # Inside a step cola_ds sorts by length; the Trainer takes examples as they come.
        steps=[sorted(each.indices, key=lambda index: index * 2_654_435_761 % 2**32) for each in found],
        micro_batch_size=optim.micro_batch_size,
        micro_steps=prepared.step_plan.micro_steps,
        tokens=[each.tokens for each in found],
        labels=[each.loss_tokens for each in found],
        flops=[work.of(each) for each in found],
    )


def trainer_plan(config: RunConfig, plan: Plan, **more: Any) -> dict[str, Any]:
    """What tests/bench/trainer.py reads."""
    return {
        "seed": config.run.seed, "lora_rank": config.lora_ranks[0], "lora_alpha": config.lora.alpha, "lr": config.optim.lr,
        "max_grad_norm": config.optim.max_grad_norm, "steps": plan.steps, "micro_batch_size": plan.micro_batch_size,
        "micro_steps": plan.micro_steps, "tokens": plan.tokens, "labels": plan.labels, **more,
    }  # fmt: skip
