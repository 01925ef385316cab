"""Whole runs in processes of a test: stopped at a chosen point, started again, and compared bit by bit."""

import hashlib
import itertools
import json
import signal
from functools import partial
from pathlib import Path

from cola_ds.config.loading import load_config
from tests.support.distributed import process_group, run_distributed
from tests.support.toys import rows, run_config, save_run

TIMES = {
    "tokens_per_s", "step_s", "data_wait_s", "tflops", "peak_share", "memory_bytes", "seconds", "tie_s", "rebuild_s",
    "peak_memory_bytes", "bytes_moved", "diagnostics_s", "loading_s",
}  # fmt: skip


def three_links(toy, **sections):
    """Twelve steps of two micro batches, with dropout, so that random states matter; evaluations at steps 5, 10 and 12."""
    model, train, dev = toy
    options = {
        "lora": {"rank": [8, 4, 4], "dropout": 0.1},
        "chain": {"length": 3},
        "optim": {"max_steps": 12, "lr": 5e-3},
        "data": {"eval": str(dev)},
        "eval": {"every": "epoch"},
        "checkpoint": {"every_steps": 100, "keep": 1},
        "run": {"log_every_steps": 5},
    }
    for name, values in sections.items():
        options[name] = {**options.get(name, {}), **values} if isinstance(values, dict) else values
    return run_config(model, train, "unused", **options)


def run_once(process, path, stop=None, words=None, hosts=None):
    """Train as the command does; `hosts` names that of every process, where they are not one node. `stop` asks process number 1
    (or the last) to stop inside the given place: ("step", 5, 2) in the second micro batch of the step after step 5;
    ("evaluation", 2) in the second evaluation, ("watch", 1) in the first look at data.watch. Returns the weights' hash, or
    "stopped".
    """
    from cola_ds.checkpoint.decide import ResumeOptions
    from cola_ds.distributed import signals
    from cola_ds.errors import StoppedError
    from cola_ds.training.prepare import prepare
    from cola_ds.training.run import run_prepared as train
    from cola_ds.training.settle import settle_engine

    process_group(process)
    if stop and process.rank == min(1, process.world_size - 1):
        _ask_to_stop(signals, *stop)
    kept = _keep_the_chain()
    try:
        prepared = prepare(load_config(path), process.world_size)
        if hosts:
            prepared = settle_engine(prepared, hosts, lambda: (2**40, 2**40))
        if not train(prepared, process, ResumeOptions(**(words or {}))):
            return "finished"
    except StoppedError:
        return "stopped"
    return weights_hash(kept[0])


def _keep_the_chain():
    from cola_ds.training import start

    kept, build = [], start.build_chain

    def keep(*args):
        kept.append(build(*args))
        return kept[0]

    start.build_chain = keep
    return kept


def _ask_to_stop(signals, place, number, micro_batch=1):
    from cola_ds.training import loop, validation, watch

    seen = {"steps": 0, "micro batches": 0, "evaluation": 0, "watch": 0}
    inner_step, inner_loss, inner_held_out = (
        loop.train_step, loop.loss_sum, validation.held_out_loss,
    )  # fmt: skip

    def step(*args):
        seen["micro batches"] = 0
        seen["steps"] += 1
        return inner_step(*args)

    def loss(*args):
        seen["micro batches"] += 1
        if place == "step" and (seen["steps"], seen["micro batches"]) == (number, micro_batch):
            signals._requested = signal.SIGTERM
        return inner_loss(*args)

    def held_out(engine, batcher, batch_size, stop, kind="evaluation"):
        seen[kind] += 1
        asked = iter(range(1000))

        def stop_in_the_second_batch():
            if place == kind and seen[kind] == number and next(asked) == 1:
                signals._requested = signal.SIGTERM
            return stop()

        return inner_held_out(engine, batcher, batch_size, stop_in_the_second_batch)

    loop.train_step, loop.loss_sum, validation.held_out_loss = step, loss, held_out
    watch.held_out_loss = partial(held_out, kind="watch")


def weights_hash(chain):
    """SHA-256 of every whole parameter's bits, and of what the remainders' bits sum to."""
    import torch

    from cola_ds.distributed import accelerator, collectives
    from cola_ds.distributed.shards import copies, gathered

    digest = hashlib.sha256()
    for name, param in chain.engine.module.named_parameters():
        with gathered([param]):
            digest.update(name.encode())
            digest.update(param.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    layers = {name: chain.engine.module.get_submodule(name) for name in chain.state.remainders}
    kept = [r.kept.double().abs().sum() / copies(layers[n].weight) for n, r in chain.state.remainders.items()]
    left = torch.tensor([float(sum(kept))], dtype=torch.float64)
    digest.update(str(float(collectives.all_reduce_sum(left.to(accelerator.device())))).encode())
    return digest.hexdigest()


def train_in(folder: Path, config: dict, world_size=2, stops=(), words=None, end=True, timeout_s=240, hosts=()):
    """Run a config in `folder/run`, stopping at each of `stops` and starting again, unless not to the `end`. `world_size` is a
    number, or one for each start; `hosts` names those of each start. Returns what the last start returned."""
    config = {**config, "run": {**config["run"], "dir": str(folder / "run")}}
    folder.mkdir(exist_ok=True)
    path = save_run(folder / "run.yaml", config)
    sizes = world_size if isinstance(world_size, (list, tuple)) else [world_size] * (len(stops) + 1)
    starts = itertools.zip_longest(sizes, [*stops, None], hosts)
    for size, stop, names in list(starts)[: None if end else -1]:
        found = run_distributed(run_once, size, path, stop, words, names, timeout_s=timeout_s)
        assert len(set(found)) == 1, found
        if stop:
            assert found[0] == "stopped", (stop, found[0])
    return found[0]


def record(run: Path) -> dict:
    """All that a run leaves that does not depend on time: rows, links bit by bit, scores."""
    found = {
        name: [{k: v for k, v in row.items() if k not in TIMES} for row in rows(run / name)]
        for name in ("metrics.jsonl", "evals.jsonl", "knots.jsonl", "links.jsonl", "watch.jsonl")
        if (run / name).exists()
    }
    for path in sorted((run / "chain").rglob("*.safetensors")) if (run / "chain").exists() else ():
        found[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    found["result"] = {k: result[k] for k in ("steps", "examples", "tokens", "links", "skipped_steps", "scores")}
    found["result"]["scores"] = {k: v for k, v in result["scores"].items() if k not in TIMES}
    return found
