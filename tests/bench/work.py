"""The ladder's work: rows of three kinds, and what the machine could do in the time that they take."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

MATRIX = 2048
RATE_S = 2.0
_WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "it",
    "was",
    "for",
    "on",
    "are",
    "as",
    "with",
    "his",
    "they",
    "at",
    "be",
)


@dataclass(frozen=True)
class Workload:
    """Rows of one kind, and how many make a step."""

    length: Callable[[random.Random], int]
    """Draws the tokens of a row."""
    max_length: int
    """Tokens of a row at most, and of a packed one."""
    global_batch_size: int
    micro_batch_size: int
    trained: float
    """The part of a row that is its completion."""


WORKLOADS = {
    # A task's prompts with their answers: two full packed rows hold as many tokens as a step.
    "short": Workload(lambda draw: draw.randint(20, 60), 160, 8, 4, 0.1),
    # Instructions: log-normal, with a median of a fifth of max_length.
    "mixed": Workload(lambda draw: max(int(draw.lognormvariate(math.log(512 / 5), 0.9)), 12), 512, 8, 4, 0.6),
    "long": Workload(lambda draw: 512, 512, 4, 2, 0.6),
}


def save_rows(path: Path, workload: Workload, count: int, tokenizer: Any) -> None:
    """Prompts and completions of random words, of so many tokens (give or take one where a text is cut inside a word)."""
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8") as out:
        for _ in range(count):
            length = min(workload.length(draw), workload.max_length)
            text = " ".join(draw.choices(_WORDS, k=length))
            ends = [end for _, end in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]]
            # A word has at least a token; one more than `length`, so that the longest rows are cut to exactly max_length.
            text = text[: ends[min(length + (length == workload.max_length), len(ends)) - 1]]
            at = len(text) - max(int(len(text) * workload.trained), 4)
            out.write(json.dumps({"prompt": text[:at], "completion": text[at:]}) + "\n")


def matrix_rate(processes: int) -> float:
    """Floating-point operations a second of fp32 matrix products, all processes at once, each with its own threads."""
    command = [sys.executable, "-m", "tests.bench.work"]
    pipe = subprocess.PIPE
    started = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(processes)]
    for process in started:
        assert process.stdout is not None
        process.stdout.readline()  # it is ready
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return sum(float(process.communicate()[0]) for process in started)


def _measure_rate() -> None:
    """One process's part of `matrix_rate`: it waits for the others."""
    device = get_accelerator().current_device_name()
    torch.set_float32_matmul_precision("highest")
    first, second = (torch.randn(MATRIX, MATRIX, device=device) for _ in range(2))
    first @ second
    print(flush=True)
    sys.stdin.readline()
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < RATE_S:
        first @ second
        get_accelerator().synchronize()
        count += 1
    print(2 * MATRIX**3 * count / (time.perf_counter() - begin))


if __name__ == "__main__":
    _measure_rate()
