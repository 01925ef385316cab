"""Chains in the process of a test."""

import contextlib
import gc
import json
import os

import torch

from cola_ds.config.loading import load_config
from tests.support.toys import run_config, save_run

ON_CPU = os.environ.get("COLA_DS_GPU_TESTS_ON") == "cpu"
if ON_CPU:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # on a machine with a GPU too; read when deepspeed is imported
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# On the CPU, where the logic alone is looked at.
TINY = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1}
# Small buckets, so that they fill up; base weights are in shards between steps, adapters and norms stay whole.
_ZERO3 = {
    "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 50_000,
    "stage3_prefetch_bucket_size": 50_000, "stage3_param_persistence_threshold": 10_000,
    "stage3_max_live_parameters": 500_000, "stage3_max_reuse_distance": 100_000,
}  # fmt: skip
_HOST = {"device": "cpu", "pin_memory": True}
ENGINES = {
    "zero3": _ZERO3,
    "zero2": {"stage": 2, "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 50_000},
    "offload": {**_ZERO3, "offload_param": _HOST, "offload_optimizer": _HOST},
}
KNOTS, RANKS, ALPHA = (4, 8, 12), [8, 8, 4], 16


def three_links(toy, folder, engine, dtype, **sections):
    """The YAML of a chain of twelve steps and three links, whose LoRA rank changes once; and what it says."""
    folder.mkdir(exist_ok=True)
    said = {"zero_optimization": ENGINES[engine]}
    if dtype == "fp16":
        said["fp16"] = {"initial_scale_power": 10}  # not the 16 with which the first steps are left out
    (folder / "engine.json").write_text(json.dumps(said), encoding="utf-8")
    options = {
        "model": {"dtype": dtype},
        "lora": {"rank": RANKS, "alpha": ALPHA},
        "chain": {"length": 3},
        "data": {"eval": str(toy[2])},
        "optim": {"name": "adamw", "max_steps": 12, "lr": 2e-3, "micro_batch_size": 4, "max_grad_norm": 1.0},
        "eval": {"every": "end"},
        "checkpoint": {"every_steps": 3, "keep": 2, "best": False},
        "deepspeed": str(folder / "engine.json"),
    }
    for name, values in sections.items():
        options[name] = {**options.get(name, {}), **values} if isinstance(values, dict) else values
    config = run_config(toy[0], toy[1], folder / "run", **options)
    return save_run(folder / "run.yaml", config), config


@contextlib.contextmanager
def run(process, path, monkeypatch, changed=None, **words):
    """`cola-ds train` in this process: the chain as it ended (None where it stopped on a signal), with what was prepared."""
    from cola_ds.checkpoint.decide import ResumeOptions
    from cola_ds.distributed import signals
    from cola_ds.errors import StoppedError
    from cola_ds.training import start
    from cola_ds.training.prepare import prepare
    from cola_ds.training.run import run_prepared

    config = load_config(path) if changed is None else changed
    kept, build = [], start.build_chain
    prepared = prepare(config, 1)
    with monkeypatch.context() as patch:
        patch.setattr(start, "build_chain", lambda *args: kept.append(build(*args)) or kept[0])
        patch.setattr(signals, "_requested", 0)
        try:
            assert run_prepared(prepared, process, ResumeOptions(**words))
            ended = kept[0]
        except StoppedError:
            ended = None
    try:
        yield ended, prepared
    finally:
        take_down(kept)


def take_down(chains):
    """Free what the chains of a list hold, all of it."""
    from cola_ds.distributed.engine import take_down_engine

    while chains:
        take_down_engine(chains.pop().engine)
    gc.collect()
    gc.freeze()  # what is left stays: the next chains' knots need not look through it, which took a third of the time
    if not ON_CPU:
        torch.cuda.empty_cache()


def links_of(folder, count):
    """The tied links as they were saved, by layer: A and B in float64."""
    from safetensors.torch import load_file

    found = []
    for link in range(1, count + 1):
        tensors = load_file(folder / f"chain/link-{link:04d}/adapter_model.safetensors")
        tensors = {name.removeprefix("base_model.model."): value.double() for name, value in tensors.items()}
        layers = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
        assert layers
        found.append(
            {layer: (tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]) for layer in layers}
        )
    return found
