"""What the data of a run costs at its start: seconds of a first and of a second start, and memory of a process.

    python -m tests.bench.data MODEL [--rows 20000 100000] [--workers N] [--chat]

Makes rows of 60 + 120 words, and loads them with MODEL's tokenizer as a run does: tokenized into a cache of its own, then from
it, each in a process of its own. Memory is what the process has for itself (anonymous: what is mapped of the cache is shared by
all), beyond what it had before, with the rows of the first epoch planned, unpacked and packed. A million rows take 2 GB of room.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_WORDS = [
    f"{first}{last}"
    for first in ("the", "of", "and", "to", "in", "a", "is", "that", "for", "it")
    for last in ("", "n", "s")
]


def save_rows(path: Path, count: int, chat: bool) -> None:
    """Rows that all differ, of common words and numbers."""
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8") as out:
        for number in range(count):
            prompt = f"{number} " + " ".join(draw.choices(_WORDS, k=55))
            answer = " ".join(draw.choices(_WORDS, k=118))
            talk = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": talk} if chat else {"prompt": prompt, "completion": answer}) + "\n")


def own_mib() -> float:
    """Anonymous memory of this process."""
    (line,) = [
        line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("Anonymous:")
    ]
    return int(line.split()[1]) / 1024


def load(model: str, path: str, cache: str, workers: int | None) -> dict[str, float]:
    """Load the rows in this process, and plan an epoch of them."""
    from cola_ds.config.schema import DataConfig, ModelConfig
    from cola_ds.data.order import Order
    from cola_ds.data.tokenizer import load_tokenizer
    from tests.support.data import load_splits

    chosen = ModelConfig(path=model, dtype="fp32")
    tokenizer = load_tokenizer(chosen)
    tokenizer("a")
    before, begin = own_mib(), time.perf_counter()
    train, _ = load_splits(DataConfig(train=path, cache=cache, workers=workers), tokenizer, chosen)
    train.fingerprint()
    seconds = time.perf_counter() - begin
    held = own_mib() - before
    Order(train.lengths, capacity=512).rows(0, 0)
    return {
        "seconds": seconds,
        "MiB": held,
        "MiB with an epoch packed": own_mib() - before,
        "tokens": int(train.lengths.sum()),
    }


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 100_000])
    parser.add_argument("--workers", type=int)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(load(args.model, *args.load, args.workers)))
        return
    words = [sys.executable, "-m", "tests.bench.data", args.model]
    words += ["--workers", str(args.workers)] if args.workers else []
    print("| rows | tokens | first start, s | rows/s | second start, s | own memory, MiB | with an epoch packed, MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for count in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            path, cache = Path(folder, "rows.jsonl"), Path(folder, "cache")
            save_rows(path, count, args.chat)
            first, second = (
                json.loads(subprocess.run([*words, "--load", path, cache], check=True, capture_output=True).stdout)
                for _ in range(2)
            )
        print(
            f"| {count:,} | {second['tokens']:,} | {first['seconds']:.1f} | {count / first['seconds']:,.0f} | "
            f"{second['seconds']:.2f} | {second['MiB']:.0f} | {second['MiB with an epoch packed']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
