"""What a step takes on one GPU: tokens a second, seconds to the first step and memory, padded beside packed.

    python -m tests.bench.gpu [section.key=value ...] [--model llama-1b] [--steps 12] [--examples 64] [--max-length 1024]

Makes a model of random weights and of a real model's shape in bf16, and rows of random text whose lengths are mixed as those of
instructions are. Then it trains one epoch of LoRA on them, alone in a process of its own under ZeRO-3, once padded and once
packed. Both train the same examples; a packed step has as many rows as hold the examples of a padded one. Nothing is downloaded.
launch/bench.sh gpu runs it, for a minute or two; COLA_DS_GPU_TESTS_ON=cpu and --model toy run it without a GPU.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.bench.timed import ArmFailedError, json_rows, timed_run
from tests.gpu.support import ON_CPU  # before the project: it chooses the device before deepspeed is imported
from tests.support.toys import save_run, save_tokenizer

WARM_UP = 2
"""Steps that are left out of the figures: they compile, and fill what allocates."""
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
    "llama-3.1-8b": {
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


def save_rows(path: Path, count: int, max_length: int) -> list[int]:
    """Prompts and completions whose tokens (of save_tokenizer: bytes, BOS and EOS) are spread log-normally, with a median of a
    fifth of `max_length`. Returns their lengths in tokens."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz     "
    lengths = []
    with open(path, "w", encoding="utf-8") as out:
        for _ in range(count):
            length = min(max(int(draw.lognormvariate(math.log(max_length / 5), 0.9)), 12), max_length)
            text = "".join(draw.choices(letters, k=length - 2))
            at = len(text) * 2 // 5
            out.write(json.dumps({"prompt": text[:at], "completion": text[at:] or "a"}) + "\n")
            lengths.append(length)
    return lengths


def run_arm(config: dict[str, Any], folder: Path, overrides: list[str]) -> dict[str, float]:
    """Train in a process of its own, as a user does: what it took."""
    path = save_run(folder.with_suffix(".yaml"), config)
    metrics, log = folder / "metrics.jsonl", folder.with_suffix(".log")
    try:
        first_step_s = timed_run(["-m", "cola_ds", "train", str(path), *overrides], metrics, log)
    except ArmFailedError as error:
        sys.exit(str(error))
    rows = json_rows(metrics)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    warm = rows[WARM_UP:]
    seconds = sum(row["step_s"] for row in warm)
    return {
        "steps": len(rows),
        "examples": result["examples"],
        "tokens": result["tokens"],
        "step_s": statistics.median(row["step_s"] for row in warm),
        "tokens_per_s": sum(row["tokens"] for row in warm) / seconds,
        "examples_per_s": result["examples"] / len(rows) * len(warm) / seconds,
        "data_wait_s": statistics.fmean(row.get("data_wait_s", math.nan) for row in warm),
        "peak_gib": result["peak_memory_bytes"] / 2**30,
        "first_step_s": first_step_s,
        "loading_s": result["loading_s"],
        "loss": rows[-1]["loss"],
    }


def compare(args: argparse.Namespace, scratch: Path) -> tuple[dict[str, dict[str, float]], int]:
    """What both arms took, and the parameters that a token is multiplied by."""
    multiplied = save_model(scratch / "model", SHAPES[args.model], args.max_length)
    lengths = save_rows(scratch / "rows.jsonl", args.steps * args.examples, args.max_length)
    filled = max(1, round(args.examples * statistics.fmean(lengths) / args.max_length / args.micro_batch))
    arms = {"padded": ("none", args.examples), "packed": ("best_fit", filled * args.micro_batch)}
    found = {}
    for name, (packing, rows) in arms.items():
        config = {
            "model": {"path": str(scratch / "model"), "dtype": "bf16"},
            "method": "lora",
            "data": {
                "train": str(scratch / "rows.jsonl"), "max_length": args.max_length, "packing": packing, "cache": "none",
            },
            "optim": {"lr": 1e-4, "epochs": 1, "global_batch_size": rows, "micro_batch_size": args.micro_batch},
            "run": {"dir": str(scratch / name), "log_every_steps": 1},
            "deepspeed": "zero3_bf16",
        }  # fmt: skip
        found[name] = run_arm(config, scratch / name, args.overrides)
    return found, multiplied


def report(found: dict[str, dict[str, float]], multiplied: int, args: argparse.Namespace) -> None:
    """The table, under the machine and the command that it is of."""
    from cola_ds.distributed.accelerator import accelerator_name

    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    print(f"\n{accelerator_name()}; Python {sys.version.split()[0]}, {packages}; `{args.command}`")
    shape = SHAPES[args.model]
    head = shape["hidden_size"] // shape["num_attention_heads"]
    print(
        f"{args.model}, bf16, heads of {head}, N = {multiplied:,} parameters without embeddings, LoRA, one process, zero3_bf16, "
        f"micro batches of {args.micro_batch} rows of {args.max_length} tokens at most; without the first {WARM_UP} steps"
    )
    lines = [
        ("steps", lambda arm: f"{arm['steps']:.0f}"),
        ("examples", lambda arm: f"{arm['examples']:.0f}"),
        ("tokens, without padding", lambda arm: f"{arm['tokens']:.0f}"),
        ("step, s", lambda arm: f"{arm['step_s']:.3f}"),
        ("tokens a second", lambda arm: f"{arm['tokens_per_s']:.0f}"),
        ("examples a second", lambda arm: f"{arm['examples_per_s']:.1f}"),
        ("TFLOP/s, at 4 N a token", lambda arm: f"{4 * multiplied * arm['tokens_per_s'] / 1e12:.2f}"),
        ("waiting for data, s a step", lambda arm: f"{arm['data_wait_s']:.4f}"),
        ("peak memory, GiB", lambda arm: f"{arm['peak_gib']:.2f}"),
        ("seconds to the first step", lambda arm: f"{arm['first_step_s']:.1f}"),
        ("of these loading", lambda arm: f"{arm['loading_s']:.1f}"),
        ("loss of the last step", lambda arm: f"{arm['loss']:.3f}"),
    ]
    print(f"\n| | {' | '.join(found)} |\n| --- |{' --- |' * len(found)}")
    for name, value in lines:
        print(f"| {name} | {' | '.join(value(arm) for arm in found.values())} |")


def main() -> None:
    """Make the model and the rows, train both ways, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--model", choices=sorted(SHAPES), default="llama-1b")
    parser.add_argument("--steps", type=int, default=12, help="steps of the padded run")
    parser.add_argument("--examples", type=int, default=64, help="examples of a padded step")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=1024)
    args = parser.parse_intermixed_args()
    args.command = " ".join(["python -m tests.bench.gpu", *sys.argv[1:]])
    if args.steps <= WARM_UP or args.examples % args.micro_batch:
        parser.error(f"--steps must be more than {WARM_UP}, and --examples a multiple of --micro-batch")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    if not ON_CPU and not torch.cuda.is_available():
        sys.exit("gpu: no NVIDIA GPU here; COLA_DS_GPU_TESTS_ON=cpu and --model toy run it without")
    with tempfile.TemporaryDirectory() as scratch:
        found, multiplied = compare(args, Path(scratch))
    report(found, multiplied, args)


if __name__ == "__main__":
    main()
