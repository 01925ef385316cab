"""One process of many, which are not there: the product itself at a large model's shapes, over torch's fake process group.

    python -m tests.scale.one_of_many FOLDER [--nodes 64] [--per-node 8] [--rank 37] [--layers 80] [--narrow 1] [--steps 0]
                                      [--targets q_proj,v_proj] [--lora-rank 8] [--shards auto]

Makes a model of Llama-2-70B's shapes (`--layers` of them, a `--narrow`-th as wide) whose weights are holes, and does in this
process what rank R of a run does: load, inject, build the engine, `--steps` steps, a checkpoint, a knot at which the next link
begins in place, and one at which the engine is rebuilt. Prints as JSON what each took, in seconds and bytes, beside what
`cola-ds plan` says of it.

Nothing arrives from the others: a gathered weight is zero elsewhere than in this process's shard, and what process 0 would say is
said here.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tests.plan.measured import status
from tests.scale.holes import LLAMA_2_70B, save_holes


def begin_group(rank: int, world_size: int, per_node: int) -> None:
    """A group of fake processes, in which an all-gather copies this process's part once, not for each of the others."""
    import deepspeed
    import torch
    from deepspeed.runtime.zero import partitioned_param_coordinator
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from cola_ds.distributed import collectives

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank % per_node), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(per_node),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="29999",
    )  # fmt: skip
    torch.distributed.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False, verbose=False)

    class Done:
        def wait(self, *args: Any, **words: Any) -> bool:
            return True

        def is_completed(self) -> bool:
            return True

    def all_gather(
        output_tensor: Any, input_tensor: Any, group: Any = None, async_op: bool = False, **words: Any
    ) -> Done | None:  # fmt: skip
        size = torch.distributed.get_world_size(group)
        GATHERED[size] = GATHERED.get(size, 0) + output_tensor.numel() * output_tensor.element_size()
        rows = output_tensor.view(-1).view(torch.uint8).view(size, -1)
        own = input_tensor.contiguous().view(-1).view(torch.uint8).clone()
        rows.zero_()
        rows[torch.distributed.get_rank(group)].copy_(own)
        return Done() if async_op else None

    deepspeed.comm.comm.cdb.all_gather_function = all_gather
    # It compares with what process 0 would have sent.
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda ints: None
    collectives.broadcast_object = lambda value: None
    collectives.on_rank_0 = lambda action: action()


GATHERED: dict[int, int] = {}
"""Bytes of all-gathers, by the size of the group."""


class Phases:
    """What each phase takes."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}
        self.before = status()["RssAnon"]

    def run(self, name: str, action: Any) -> Any:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the most so far is what there is now
        files, begun = status()["RssFile"], time.perf_counter()
        GATHERED.clear()
        result = action()
        at = status()
        self.found[name] = {
            "s": round(time.perf_counter() - begun, 2),
            "held": at["RssAnon"] - self.before,
            "most": at["VmHWM"] - min(files, at["RssFile"]) - at["RssShmem"] - self.before,
            "gathered": dict(GATHERED),
        }
        print(
            f"{name:<28} {self.found[name]['s']:8.2f} s, holds {self.found[name]['held'] / 2**20:10,.1f} MiB",
            file=sys.stderr,
        )
        return result


def main() -> None:
    """Be that process."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path)
    for name, default in (
        ("nodes", 64), ("per-node", 8), ("rank", 37), ("layers", 80), ("narrow", 1), ("steps", 0), ("lora-rank", 8),
        ("length", 64),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--targets", default="q_proj,v_proj")
    parser.add_argument("--shards", default="auto")
    args = parser.parse_args()
    world_size = args.nodes * args.per_node

    from cola_ds.config.loading import load_config
    from cola_ds.data.tokenize import tokenize
    from cola_ds.distributed.engine import evaluating
    from cola_ds.distributed.launcher import Process
    from cola_ds.plan.run import Cluster, plan_run
    from cola_ds.training import knot, loop, save
    from cola_ds.training.build import build_chain
    from cola_ds.training.prepare import check, describe, with_data
    from cola_ds.training.settle import settle_engine
    from cola_ds.training.state import step_examples
    from tests.support.toys import save_run

    path = save_run(args.folder / "run.yaml", run_config(args, world_size))
    config = load_config(path)
    checked = check(config)
    prepared = with_data(checked, world_size, lambda: tokenize(config.data, checked.tokenizer, config.model))
    hosts = [f"node-{rank // args.per_node}" for rank in range(world_size)]
    prepared = settle_engine(prepared, hosts, lambda: (80 * 2**30, 2**37))
    cluster = Cluster(
        nodes=args.nodes, per_node=args.per_node, device="cpu", memory=80 * 2**30, host_memory=None, network=50e9,
        node_network=300e9, disk=2e9,
    )  # fmt: skip
    plan = plan_run(describe(config), cluster)
    begin_group(args.rank, world_size, args.per_node)
    for option in (-3, -1):  # malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(option, 65536)

    phases = Phases()
    process = Process(args.rank, args.rank % args.per_node, world_size)
    chain = phases.run("load, inject, engine", lambda: build_chain(prepared, process, None))
    for option in (-3, -1):  # which loading has set as it is for a run
        ctypes.CDLL(None).mallopt(option, 65536)
    for step in range(args.steps):
        examples = step_examples(chain, step)
        phases.run(
            f"step {step + 1}", lambda examples=examples: loop.train_step(chain.engine, examples, 1e-4, world_size)
        )
    phases.run("checkpoint", lambda: save.save_chain(chain))
    with evaluating(chain.engine):  # as before a knot: what a step leaves gathered goes
        pass
    phases.run("tie", lambda: knot.tie_knot(chain))
    phases.run("extend in place", lambda: knot.extend_chain(chain))
    chain.state.link += 1
    phases.run("second tie", lambda: knot.tie_knot(chain))
    phases.run("extend, rebuilt", lambda: knot.extend_chain(chain))
    lines = {line.what: line.bytes for line in (*plan.memory.device, *plan.memory.host)}
    said = {
        "phases": phases.found, "plan": lines, "nodes": prepared.nodes is not None, "across": plan.across, "inside": plan.inside,
        "trained": plan.layout.trained * plan.layout.element_bytes,
    }  # fmt: skip
    print(json.dumps(said))
    sys.stdout.flush()
    os._exit(0)  # threads of a group that never was


def run_config(args: argparse.Namespace, world_size: int) -> dict[str, Any]:
    """Three links, the last of half the rank, so that it is rebuilt."""
    narrow = args.narrow
    sizes = {name: LLAMA_2_70B[name] // narrow for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    model = save_holes(args.folder / "model", {**LLAMA_2_70B, **sizes, "num_hidden_layers": args.layers})
    rows = args.folder / "rows.jsonl"
    text = "a" * (args.length - 3)
    rows.write_text(
        "".join(json.dumps({"prompt": f"{n % 10}", "completion": text}) + "\n" for n in range(2 * world_size))
    )
    targets = args.targets if args.targets == "all-linear" else args.targets.split(",")
    lora_ranks = [args.lora_rank, args.lora_rank, args.lora_rank // 2]
    return {
        "model": {"path": str(model), "dtype": "bf16", "shards": args.shards}, "method": "cola",
        "lora": {"rank": lora_ranks, "targets": targets}, "chain": {"length": 3},
        "data": {"train": str(rows), "max_length": args.length, "cache": "none"},
        "optim": {"lr": 1e-4, "max_steps": 30, "global_batch_size": world_size, "micro_batch_size": 1},
        "run": {"dir": str(args.folder / "run")}, "deepspeed": "zero3",
    }  # fmt: skip


if __name__ == "__main__":
    main()
