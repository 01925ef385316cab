"""DeepSpeed's hpZ beside shards over all processes and shards in each node: the table of ds_configs/README.md. About two minutes.

    python -m tests.bench.hpz [--rounds 3] [--steps 12]

Four processes as two nodes of two, over gloo on this machine, train LoRA on a frozen toy base that is gathered as a large one is:
anew in each pass; norms and the small ones of A and B are resident. Everything is alike in the three arms but where shards lie:
LoRA, rows, engine. hpZ's arm gets zero_hpz_partition_size=2 behind the back of the check that refuses it, and Transformers' own
loader for ZeRO-3, since its second copies are made as weights are sent. Counted are the payloads of collectives by the processes
that take part (what a process ends up with or gives), and the bytes of the base's shards that a process holds. Arms take turns,
`--rounds` times; step times are medians, on one machine, whose "nodes" are no further apart than the processes of a node: they
say what is computed and copied, and nothing of a network.

At the end every arm ties its link, and makes three more steps: the losses say who has noticed the tie.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tests.support.distributed import CountedCollectives, process_group, run_distributed
from tests.support.toys import run_config, save_model, save_run, save_sums

HOSTS = ["a", "a", "b", "b"]
ARMS = ("world", "node", "hpz")
AFTER = 3
"""Steps after the knot."""
ZERO = {
    "stage": 3,
    "stage3_param_persistence_threshold": 3000,  # norms, and A and B but for those of the MLP
    "stage3_max_live_parameters": 100_000,
    "stage3_max_reuse_distance": 1000,
    "stage3_prefetch_bucket_size": 30_000,
}


def save_arm(folder: Path, model: Path, train: Path, steps: int) -> Path:
    """A run's YAML: two links, the first of so many steps and two more (in which nothing is counted)."""
    (folder / "zero3.json").write_text(json.dumps({"zero_optimization": ZERO}), encoding="utf-8")
    config = run_config(
        model, train, folder / "run", lora={"rank": 8, "targets": "all-linear"}, chain={"knots": {"steps": [steps + 2]}},
        optim={"max_steps": steps + 2 + AFTER, "lr": 5e-3}, deepspeed=str(folder / "zero3.json"),
    )  # fmt: skip
    return save_run(folder / "run.yaml", config)


def build(process: Any, path: Path, arm: str) -> Any:
    """The arm's chain, at its first step."""
    from cola_ds.config.loading import load_config
    from cola_ds.distributed import loading
    from cola_ds.training.build import build_chain
    from cola_ds.training.prepare import prepare
    from cola_ds.training.settle import settle_engine

    shards = "world" if arm == "hpz" else arm
    prepared = prepare(load_config(path, [f"model.shards={shards}"]), process.world_size)
    prepared = settle_engine(prepared, HOSTS, lambda: (2**40, 2**40))
    if arm == "hpz":
        prepared.engine_config["zero_optimization"]["zero_hpz_partition_size"] = 2
        loading._into_shards = lambda nodes, sent: nullcontext()
    return build_chain(prepared, process, None)


def held_bytes(model: Any) -> int:
    """Bytes of the base's shards on this process, hpZ's second ones with them."""
    found = 0
    for param in model.parameters():
        if not param.requires_grad:
            for shard in (param.ds_tensor, param.ds_secondary_tensor):
                found += 0 if shard is None else shard.numel() * shard.element_size()
    return found


def measured(process: Any, path: Path, arm: str, steps: int) -> dict[str, Any]:
    """What the arm's steps move, hold and take on this process; and its losses, the last of each list after the knot."""
    from cola_ds.training.knot import batch_loss, extend_chain, last_batch, tie_knot
    from cola_ds.training.loop import train_step
    from cola_ds.training.state import step_examples

    process_group(process)
    chain = build(process, path, arm)
    losses, seconds = [], []

    def step() -> None:
        begin = time.perf_counter()
        examples = step_examples(chain, chain.state.step)
        losses.append(float(train_step(chain.engine, examples, 5e-3, process.world_size)))
        seconds.append(time.perf_counter() - begin)
        chain.state.step += 1

    step()  # the first one records what is fetched when
    with CountedCollectives() as counted:
        step()
    seconds.clear()
    for _ in range(steps):
        step()
    taken = statistics.median(seconds)
    held = held_bytes(chain.engine.module)
    batch = last_batch(chain)
    knot = [batch_loss(chain, batch)]
    tie_knot(chain)
    knot.append(batch_loss(chain, batch))
    extend_chain(chain)
    for _ in range(AFTER):
        step()
    across, within = counted.by_place(HOSTS, process.rank)
    return {"across": across, "within": within, "held": held, "step_s": taken, "losses": losses, "knot": knot}


def run_arms(rounds: int, steps: int, folder: Path) -> dict[str, list[list[dict[str, Any]]]]:
    """By arm, for every round, what each process has measured."""
    model = save_model(
        folder / "model", hidden_size=128, num_hidden_layers=4, intermediate_size=512, num_key_value_heads=4
    )
    path = save_arm(folder, model, save_sums(folder / "train.jsonl", 200), steps)
    found: dict[str, list[list[dict[str, Any]]]] = {arm: [] for arm in ARMS}
    for _ in range(rounds):
        for arm in ARMS:
            found[arm].append(run_distributed(measured, len(HOSTS), path, arm, steps))
    return found


def table(found: dict[str, list[list[dict[str, Any]]]]) -> list[str]:
    """The rows of ds_configs/README.md: of process 0, but the step, which is the slowest process's."""
    lines = ["| | step, between nodes | step, within the node | held of the base | step / that of node |"]
    lines.append("| --- | --- | --- | --- | --- |")
    times = {arm: [max(one["step_s"] for one in each) for each in found[arm]] for arm in ARMS}
    for arm in ARMS:
        first = found[arm][0][0]
        ratios = [mine / theirs for mine, theirs in zip(times[arm], times["node"], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| `{arm}` | {first['across']:,} | {first['within']:,} | {first['held']:,} | {spread} |")
    return lines


def after_the_knot(found: dict[str, list[list[dict[str, Any]]]]) -> list[str]:
    """A line for each arm: losses around the knot, and of the steps that follow; summed over the processes."""
    lines = []
    for arm in ARMS:
        processes = found[arm][0]
        steps = [sum(values) for values in zip(*(one["losses"] for one in processes), strict=True)]
        before, after = (sum(values) for values in zip(*(one["knot"] for one in processes), strict=True))
        said = " ".join(f"{loss:.6f}" for loss in steps[-AFTER:])
        lines.append(
            f"{arm}: before the tie {before:.6f}, after it {after:.6f}; last step {steps[-AFTER - 1]:.6f}, then {said}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run_arms(args.rounds, args.steps, Path(folder))
    print("\n".join([*table(found), "", *after_the_knot(found)]))


if __name__ == "__main__":
    main()
