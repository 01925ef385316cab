"""What working ahead saves: step time and waiting for data with it and without, in turns.

    python -m tests.bench.ahead [--length 512] [--steps 12] [--pairs 3]

Trains a toy of one layer on long rows, in a process of its own each time, as cola_ds.train does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.toys import run_config, save_model, save_run

_TRAIN = """
import sys
import cola_ds
from cola_ds.data import ahead
ahead.DEPTH = int(sys.argv[1])
cola_ds.train(cola_ds.load_config(sys.argv[2]))
"""


def main() -> None:
    """Train both ways, and print the means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    found: dict[int, list[tuple[float, float]]] = {2: [], 0: []}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
        model = save_model(scratch / "model", max_position_embeddings=args.length, **sizes)
        row = json.dumps({"prompt": "a" * (args.length - 102), "completion": "b" * 100}) + "\n"
        (scratch / "rows.jsonl").write_text(row * 64, encoding="utf-8")
        for pair in range(args.pairs):
            for depth in found:
                folder = scratch / f"{depth}-{pair}"
                optim = {"max_steps": args.steps, "global_batch_size": 32, "micro_batch_size": 8}
                config = run_config(
                    model, scratch / "rows.jsonl", folder, data={"max_length": args.length}, optim=optim,
                    chain={"length": 1}, deepspeed="zero3",
                )  # fmt: skip
                path = save_run(scratch / "run.yaml", config)
                subprocess.run([sys.executable, "-c", _TRAIN, str(depth), str(path)], check=True, capture_output=True)
                rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][3:]
                found[depth].append(
                    (statistics.median(r["step_s"] for r in rows), statistics.fmean(r["data_wait_s"] for r in rows))
                )
    print("| | median step, s | data_wait_s |\n| --- | --- | --- |")
    for depth, pairs in found.items():
        step_s, waited_s = (statistics.median(each) for each in zip(*pairs, strict=True))
        print(f"| {depth} steps ahead | {step_s:.4f} | {waited_s:.5f} |")


if __name__ == "__main__":
    main()
