"""What the ladder's rungs are measured against: PEFT's LoRA, Hugging Face's Trainer and DeepSpeed, on the same rows.

    torchrun --nproc_per_node N -m tests.bench.trainer PLAN.json

It is what a user would write without cola_ds. The plan gives, so that losses can be compared, the ids and the examples of each
step; A begins as cola_ds draws it. tests/bench/arms.py writes the plan, and reads what is left: metrics.jsonl, with a row a step,
and result.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from cola_ds.distributed import collectives
from cola_ds.distributed.accelerator import peak_memory_bytes
from cola_ds.distributed.launcher import identify
from cola_ds.lora.layers import draw_lora_A

IGNORED = -100


def pad(examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Collate as the Trainer's own collators do: on the right, to the longest of the micro batch. Tensors of (B, T)."""
    width = max(len(each["input_ids"]) for each in examples)

    def padded(name: str, value: int) -> Tensor:
        return torch.tensor([each[name] + [value] * (width - len(each[name])) for each in examples])

    mask = [[1] * len(each["input_ids"]) + [0] * (width - len(each["input_ids"])) for each in examples]
    return {
        "input_ids": padded("input_ids", 0), "attention_mask": torch.tensor(mask), "labels": padded("labels", IGNORED),
    }  # fmt: skip


def deal(examples: list[int], micro_steps: int, world_size: int) -> list[list[list[int]]]:
    """A step's examples, in their order, as the micro batches of each process: the Trainer deals batch after batch to process
    after process. Where they do not come out even, as those of packed rows, the first batches have one more."""
    count = micro_steps * world_size
    sizes = [len(examples) // count + (number < len(examples) % count) for number in range(count)]
    starts = [sum(sizes[:number]) for number in range(count)]
    batches = [examples[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    return [batches[rank::world_size] for rank in range(world_size)]


class Rows(Dataset):
    """The plan's examples."""

    def __init__(self, path: str):
        self.rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


class PlannedTrainer(Trainer):
    """The Trainer, with the plan's micro batches, and with each step's loss kept."""

    def __init__(self, micro_batches: list[list[int]], **words: Any):
        super().__init__(**words)
        self.micro_batches = micro_batches
        self.shares: list[Tensor] = []  # of each micro batch's loss, () each

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_dataset, batch_sampler=self.micro_batches, collate_fn=pad)

    def training_step(self, *args: Any, **words: Any) -> Tensor:
        share = super().training_step(*args, **words)
        self.shares.append(share.detach())
        return share

    def losses(self, micro_steps: int) -> list[float]:
        """The loss of each step: the mean over its labelled tokens, of all processes. Collective."""
        mine = torch.stack(self.shares).float().reshape(-1, micro_steps).sum(dim=1)
        return self.accelerator.reduce(mine, "mean").tolist()


class Clock(TrainerCallback):
    """Writes a row when a step has ended: the seconds since the one before it."""

    def __init__(self, path: Path, tokens: list[int]):
        self.path, self.tokens, self.since = path, tokens, time.perf_counter()

    def on_train_begin(self, *args: Any, **words: Any) -> None:
        self.since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, *rest: Any, **words: Any) -> None:
        get_accelerator().synchronize()
        now = time.perf_counter()
        row = {"step": state.global_step, "step_s": now - self.since, "tokens": self.tokens[state.global_step - 1]}
        self.since = now
        if state.is_world_process_zero:
            with open(self.path, "a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")


def lora_model(plan: dict[str, Any], arguments: TrainingArguments) -> Any:
    """The model with PEFT's LoRA, its A drawn as cola_ds draws them. `arguments` exist: so it is loaded into shards."""
    model = AutoModelForCausalLM.from_pretrained(plan["model"], dtype=getattr(torch, plan["dtype"]))
    peft = LoraConfig(
        r=plan["lora_rank"], lora_alpha=plan["lora_alpha"], target_modules=plan["targets"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, peft)
    for name, param in model.named_parameters():
        if ".lora_A." in name:
            layer = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
            param.data.copy_(draw_lora_A(plan["seed"], 1, layer, (param.shape[0], param.shape[1])))
    return model


def check_counts(rows: Rows, steps: list[list[int]], plan: dict[str, Any]) -> None:
    """That a step has as many tokens, and labels, as cola_ds counts in it."""
    for number, (step, tokens, labels) in enumerate(zip(steps, plan["tokens"], plan["labels"], strict=True), 1):
        labels_here = sum(label != IGNORED for i in step for label in rows[i]["labels"][1:])
        found = [sum(len(rows[i]["input_ids"]) for i in step), labels_here]
        if found != [tokens, labels]:
            sys.exit(f"step {number} has {found} tokens and labels here, and {[tokens, labels]} in cola_ds")


def main() -> None:
    """Train what the plan says."""
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    collectives.init_process_group(identify())  # the same backend; and fp32 products have all their bits
    folder, steps = Path(plan["dir"]), plan["steps"]
    arguments = TrainingArguments(
        output_dir=str(folder), deepspeed=plan["deepspeed"], use_cpu=get_accelerator().device_name() == "cpu",
        per_device_train_batch_size=plan["micro_batch_size"], gradient_accumulation_steps=plan["micro_steps"],
        max_steps=len(steps), learning_rate=plan["lr"], lr_scheduler_type="linear", warmup_steps=0, weight_decay=0.0,
        max_grad_norm=plan["max_grad_norm"], bf16=plan["dtype"] == "bfloat16", fp16=plan["dtype"] == "float16",
        logging_steps=1, save_strategy="no", report_to=[],
        seed=plan["seed"], disable_tqdm=True,
    )  # fmt: skip
    rows = Rows(plan["rows"])
    check_counts(rows, steps, plan)
    dealt: Iterator[list[int]] = (
        batch for step in steps for batch in deal(step, plan["micro_steps"], world_size)[rank]
    )
    trainer = PlannedTrainer(
        list(dealt), model=lora_model(plan, arguments), args=arguments, train_dataset=rows,
        callbacks=[Clock(folder / "metrics.jsonl", plan["tokens"])],
    )  # fmt: skip
    trainer.train()
    losses = trainer.losses(plan["micro_steps"])
    peak = torch.tensor([float(peak_memory_bytes())], dtype=torch.float64, device=arguments.device)
    highest = int(trainer.accelerator.gather(peak).max())
    if rank == 0:
        (folder / "result.json").write_text(
            json.dumps({"losses": losses, "peak_memory_bytes": highest}), encoding="utf-8"
        )
    sys.stdout.flush()
    os._exit(0)  # as cola_ds does: gloo's threads could abort an interpreter that shuts down


if __name__ == "__main__":
    main()
