"""What a step takes on one GPU: LoRA on all linear layers of a model with Llama-3-8B's shapes, in bf16, rung by rung.

    python -m tests.bench.gpu [section.key=value ...] [--model llama-3-8b] [--rungs NAME ...] [--rows 2] [--max-length 4096]
                              [--steps 12] [--chain-steps 30]

Makes a model of random weights, and rows of random text whose lengths are spread log-normally, as those of instructions are; they
are packed. Each rung adds one thing to those before it, and trains `--steps` steps of `--rows` packed rows in a process of its
own, through `cola-ds train`; `--rungs trainer ...` begins with PEFT and Hugging Face's Trainer on padded rows. Then, with the
fastest rung, `--chain-steps` steps as a chain of three links beside one link.
Tokens are those of examples; FLOPs count what they need (launch/README.md, "What a run says of its speed"), and the share is that
of the device's peak. Nothing is downloaded. launch/bench.sh gpu runs it, about seven minutes on an H200;
COLA_DS_GPU_TESTS_ON=cpu and --model toy run it without a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.gpu.support import ON_CPU  # isort: skip  first: it chooses the device before deepspeed is imported
from cola_ds.config.loading import load_config
from cola_ds.distributed.accelerator import accelerator_name, memory_bytes
from cola_ds.distributed.accelerator import kind as accelerator_kind
from cola_ds.distributed.devices import peak_tflops
from cola_ds.plan.run import Cluster, plan_run
from cola_ds.training.prepare import describe, prepare
from tests.bench.arms import plan_of, save_ids, trainer_plan
from tests.bench.timed import ArmFailedError, json_rows, timed_run, torchrun
from tests.support.toys import REPOSITORY, save_run, save_tokenizer

WARM_UP = 3
"""Steps that are left out of the figures: they compile, and fill what allocates."""
TRAINER = "trainer"
TRAINER_MICRO_STEPS = 4
RUNGS: dict[str, list[str]] = {
    TRAINER: [],
    "zero3, sdpa": ["deepspeed=zero3_bf16", "model.attention=sdpa", "model.kernels=torch"],
    "stage": ["deepspeed=auto"],
    "attention": ["model.attention=auto"],
    "kernels": ["model.kernels=auto"],
    "compiled": ["model.kernels=torch", "model.compile=true"],
}
"""What each rung adds. The first is PEFT with Hugging Face's Trainer."""
COLUMNS = (
    "rung",
    "tokens/s",
    "to the first",
    "step, s",
    "TFLOP/s",
    "of peak",
    "peak, GiB",
    "planned, GiB",
    "waits, s",
    "first step, s",
    "loss",
)
SHAPES: dict[str, dict[str, Any]] = {
    "toy": {
        "model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    },
    "llama-1b": {  # Llama-3.2-1B with heads of 128, and Llama-2's vocabulary
        "model_type": "llama", "vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 4,
    },
    "qwen2.5-1.5b": {
        "model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        "model_type": "llama", "vocab_size": 128_256, "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "llama-3-8b": {  # 3.1 has the same
        "model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip


def save_model(folder: Path, shape: dict[str, Any], positions: int) -> int:
    """A model of random bf16 weights, made where they are fast to draw. Returns its parameters without the table of embeddings:
    those that a token is multiplied by."""
    import torch
    from deepspeed.accelerator import get_accelerator
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "max_position_embeddings": positions}
    config = AutoConfig.for_model(**{**sizes, **shape})
    torch.manual_seed(0)
    with torch.device(get_accelerator().current_device_name()):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    table = 0 if config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    multiplied = model.num_parameters() - table
    model.save_pretrained(folder)
    save_tokenizer(folder)
    del model
    get_accelerator().empty_cache()
    return int(multiplied)


def save_rows(path: Path, tokens: int, max_length: int) -> None:
    """Prompts and completions of `tokens` tokens in all (of save_tokenizer: bytes, BOS and EOS), whose lengths are spread
    log-normally, with a median of a fifth of `max_length`."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz     "
    with open(path, "w", encoding="utf-8") as out:
        while tokens > 0:
            length = min(max(int(draw.lognormvariate(math.log(max_length / 5), 0.9)), 12), max_length)
            text = "".join(draw.choices(letters, k=length - 2))
            at = len(text) * 2 // 5
            out.write(json.dumps({"prompt": text[:at], "completion": text[at:] or "a"}) + "\n")
            tokens -= length


def base_config(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The run that all rungs are variants of."""
    return {
        "model": {"path": str(scratch / "model"), "dtype": "bf16"},
        "method": "lora",
        "lora": {"rank": 16, "alpha": 32, "targets": "all-linear"},
        "data": {
            "train": str(scratch / "rows.jsonl"), "max_length": args.max_length, "packing": "best_fit", "cache": "none",
        },
        "optim": {
            "lr": 1e-4, "max_steps": args.steps, "global_batch_size": args.rows, "micro_batch_size": args.rows,
        },
        "checkpoint": {"every_steps": None},
        "run": {"dir": str(scratch / "unused"), "log_every_steps": 1},
    }  # fmt: skip


def run_arm(name: str, config: dict[str, Any], scratch: Path, overrides: list[str]) -> dict[str, Any]:
    """Train in a process of its own, as a user does: what it took. Raises ArmFailedError."""
    folder = scratch / name.replace(", ", "-").replace(" ", "-")
    path = save_run(folder.with_suffix(".yaml"), config)
    metrics = folder / "metrics.jsonl"
    words = ["-m", "cola_ds", "train", str(path), *overrides, f"run.dir={folder}"]
    first_step_s = timed_run(words, metrics, folder.with_suffix(".log"))
    rows = json_rows(metrics)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    warm = rows[WARM_UP:]
    seconds = sum(row["step_s"] for row in warm)
    knots = json_rows(folder / "knots.jsonl") if (folder / "knots.jsonl").exists() else []

    def median(key: str) -> float:
        found = [row[key] for row in warm if row.get(key) is not None]
        return statistics.median(found) if found else math.nan

    return {
        "step_s": median("step_s"),
        "tokens_per_s": sum(row["tokens"] for row in warm) / seconds,
        "tflops": median("tflops"),
        "share": median("peak_share"),
        "peak_gib": result["peak_memory_bytes"] / 2**30,
        "planned_gib": planned_gib(config, scratch, overrides),
        "data_wait_s": statistics.fmean(row["data_wait_s"] for row in warm),
        "first_step_s": first_step_s,
        "loss": rows[-1]["loss"],
        "training_s": result["wall_time_s"] - result["loading_s"],
        "knots": knots,
    }


def planned_gib(config: dict[str, Any], scratch: Path, overrides: list[str]) -> float:
    """What `cola-ds plan` says that the run needs of the device, with torch's kernels."""
    on_cpu = accelerator_kind() == "cpu"
    cluster = Cluster(
        nodes=1, per_node=1, device="cpu" if on_cpu else accelerator_name(), memory=memory_bytes(1)[0], host_memory=None,
        network=50e9, node_network=400e9, disk=2e9,
    )  # fmt: skip
    found = plan_run(describe(load_config(save_run(scratch / "planned.yaml", config), overrides)), cluster)
    return found.total_device / 2**30


def run_trainer(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """What a user has without cola_ds: PEFT, the Trainer and DeepSpeed's ZeRO-3, in each step the examples of a packed one,
    padded, a few at a time. Raises ArmFailedError."""
    config = load_config(save_run(scratch / "base.yaml", base_config(args, scratch) | {"deepspeed": "zero3_bf16"}), [])
    prepared = prepare(config, 1)
    plan = plan_of(prepared, args.steps)
    save_ids(prepared, scratch / "ids.jsonl")
    engine = json.loads((REPOSITORY / "ds_configs/zero3_bf16.json").read_text(encoding="utf-8"))
    batches = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    engine |= dict.fromkeys(batches, "auto")
    sizes = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    engine["zero_optimization"] |= dict.fromkeys(sizes, "auto")
    (scratch / "trainer.json").write_text(json.dumps(engine), encoding="utf-8")
    folder = scratch / "trainer"
    folder.mkdir()
    plan.micro_steps, plan.micro_batch_size = min(TRAINER_MICRO_STEPS, *map(len, plan.steps)), 1
    said = trainer_plan(
        config, plan, model=str(scratch / "model"), dtype="bfloat16", dir=str(folder), rows=str(scratch / "ids.jsonl"),
        deepspeed=str(scratch / "trainer.json"), targets=sorted({name.rpartition(".")[2] for name in prepared.targets}),
    )  # fmt: skip
    (scratch / "plan.json").write_text(json.dumps(said), encoding="utf-8")
    words = torchrun(1, "tests.bench.trainer", str(scratch / "plan.json"))
    first_step_s = timed_run(words, folder / "metrics.jsonl", folder.with_suffix(".log"))
    warm = json_rows(folder / "metrics.jsonl")[WARM_UP:]
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    seconds = sum(row["step_s"] for row in warm)
    tflops = sum(plan.flops[WARM_UP:]) / seconds / 1e12
    peak = peak_tflops(accelerator_name(), "bf16")
    return {
        "step_s": statistics.median(row["step_s"] for row in warm),
        "tokens_per_s": sum(row["tokens"] for row in warm) / seconds,
        "tflops": tflops,
        "share": tflops / peak if peak else math.nan,
        "peak_gib": result["peak_memory_bytes"] / 2**30,
        "planned_gib": math.nan,
        "data_wait_s": math.nan,
        "first_step_s": first_step_s,
        "loss": result["losses"][-1],
    }


def climb(args: argparse.Namespace, scratch: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What each rung took, printed as it comes, and the overrides of the best that ran."""
    found: dict[str, dict[str, Any]] = {}
    overrides: list[str] = []
    best: list[str] = []
    print(f"\n| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
    for name, adds in RUNGS.items():
        overrides = [*overrides, *adds]
        if name not in args.rungs:
            continue
        try:
            if name == TRAINER:
                arm = run_trainer(args, scratch)
            else:
                arm = run_arm(name, base_config(args, scratch), scratch, [*overrides, *args.overrides])
        except ArmFailedError as error:
            print(f"| {name} | failed |\n{error}", flush=True)
            continue
        if name != TRAINER and arm["tokens_per_s"] > max(
            (other["tokens_per_s"] for other in found.values()), default=0
        ):
            best = list(overrides)
        found[name] = arm
        first = next(iter(found.values()))
        cells = [
            name, f"{arm['tokens_per_s']:.0f}", f"{arm['tokens_per_s'] / first['tokens_per_s']:.2f}", f"{arm['step_s']:.3f}",
            f"{arm['tflops']:.4g}", f"{arm['share']:.1%}", f"{arm['peak_gib']:.2f}",
            f"{arm['planned_gib']:.2f}", f"{arm['data_wait_s']:.4f}",
            f"{arm['first_step_s']:.1f}", f"{arm['loss']:.3f}",
        ]  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)
    return found, best


def chain(args: argparse.Namespace, scratch: Path, overrides: list[str]) -> None:
    """Three links beside one, over as many steps: a table."""
    arms = {}
    for length in (1, 3):
        config = base_config(args, scratch)
        config["method"], config["chain"] = "cola", {"length": length}
        config["optim"]["max_steps"] = args.chain_steps
        arms[length] = run_arm(f"{length} links", config, scratch, [*overrides, *args.overrides])
    one, three = arms[1], arms[3]
    knots = [(knot["tie_s"], knot["rebuild_s"]) for knot in three["knots"]]
    print(f"\n| {args.chain_steps} steps | one link | three links | ratio |\n| --- | --- | --- | --- |")
    for what, key in (
        ("seconds of training, knots included", "training_s"),
        ("step, s", "step_s"),
        ("peak, GiB", "peak_gib"),
    ):
        print(f"| {what} | {one[key]:.3f} | {three[key]:.3f} | {three[key] / one[key]:.4f} |")
    shown = ", ".join(f"{tie:.2f} + {0 if extend is None else extend:.2f}" for tie, extend in knots)
    print(f"\nknots, s to tie + to extend: {shown}; the one link's tie: {one['knots'][0]['tie_s']:.2f}", flush=True)


def main() -> None:
    """Make the model and the rows, climb the rungs, and compare a chain with one link."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--model", choices=sorted(SHAPES), default="llama-3-8b")
    parser.add_argument(
        "--rungs", nargs="+", choices=list(RUNGS), default=[name for name in RUNGS if name != TRAINER], metavar="NAME"
    )
    parser.add_argument("--rows", type=int, default=2, help="packed rows of a step, all in one micro batch")
    parser.add_argument("--max-length", type=int, default=4096, help="tokens of a packed row")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument(
        "--chain-steps", type=int, default=30, help="steps of the chain and of its one link; 0: neither"
    )
    args = parser.parse_intermixed_args()
    command = " ".join(["python -m tests.bench.gpu", *sys.argv[1:]])
    if args.steps <= WARM_UP:
        parser.error(f"--steps must be more than {WARM_UP}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    if not ON_CPU and not torch.cuda.is_available():
        sys.exit("gpu: no NVIDIA GPU here; COLA_DS_GPU_TESTS_ON=cpu and --model toy run it without")
    with tempfile.TemporaryDirectory() as scratch:
        since = time.perf_counter()
        multiplied = save_model(Path(scratch) / "model", SHAPES[args.model], args.max_length)
        steps = max(args.steps, args.chain_steps) + 1  # of one epoch: its last step may have fewer rows
        save_rows(Path(scratch) / "rows.jsonl", steps * args.rows * args.max_length, args.max_length)
        packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
        print(f"{accelerator_name()}; Python {sys.version.split()[0]}, {packages}; `{command}`")
        print(
            f"{args.model}, random weights, bf16, N = {multiplied:,} parameters without embeddings, LoRA r 16 on all linear "
            f"layers, steps of {args.rows} packed rows of {args.max_length}, without the first {WARM_UP} (made in "
            f"{time.perf_counter() - since:.0f} s)"
        )
        found, best = climb(args, Path(scratch))
        if not found:
            sys.exit("gpu: no rung ran")
        if args.chain_steps:
            try:
                chain(args, Path(scratch), best)
            except ArmFailedError as error:
                sys.exit(f"gpu: the chain did not run:\n{error}")


if __name__ == "__main__":
    main()
