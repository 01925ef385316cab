"""The plan's memory against what real runs take, on the CPU, beyond what a run of next to nothing takes."""

import json
import os
import random
import subprocess
import sys

import pytest

from cola_ds.config.loading import load_config
from cola_ds.distributed.launcher import free_port
from cola_ds.plan.run import Cluster, plan_run
from cola_ds.training.prepare import describe
from tests.plan.measured import ENVIRONMENT
from tests.support.toys import REPOSITORY, save_model, save_run, thorough

WIDTH = 128
MODELS = {
    "toy": ("llama", {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 300}),
    "llama": ("llama", {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 12_000,
    }),
    "opt": ("opt", {
        "hidden_size": 512, "word_embed_proj_dim": 512, "ffn_dim": 2048, "num_hidden_layers": 6, "num_attention_heads": 8,
        "vocab_size": 12_000,
    }),
    "qwen2": ("qwen2", {
        "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6,
        "num_key_value_heads": 2, "vocab_size": 20_000, "tie_word_embeddings": True,
    }),
}  # fmt: skip
CHECKPOINTING = {"model": {"activation_checkpointing": True}}
BF16 = {"model": {"dtype": "bf16"}}
CASES = [
    ("llama", 1, {"deepspeed": "zero2"}),
]
MORE = [
    ("opt", 2, {**BF16, "deepspeed": "zero3_bf16_offload_cpu"}),
    ("qwen2", 4, {}),
    ("llama", 2, {}),
    ("opt", 2, CHECKPOINTING),
    ("opt", 1, {**BF16, "deepspeed": "zero2"}),
    ("qwen2", 2, {**BF16, "deepspeed": "zero3_bf16"}),
    ("llama", 2, {"deepspeed": "zero3_offload_cpu"}),
    ("llama", 2, {"lora": {"init": "gradient", "rank": 64}}),
    ("qwen2", 4, CHECKPOINTING),
    ("llama", 4, {"deepspeed": "zero2"}),
    ("llama", 2, {"method": "full", "optim": {"lr": 1e-5}}),
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """By model, processes and sections: what the plan says, and the most that a process of the run took, in bytes."""
    folder, models = tmp_path_factory.mktemp("measured"), {}
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefgh ijk", k=WIDTH - 3)) for _ in range(48)]
    train = folder / "rows.jsonl"
    train.write_text(
        "".join(json.dumps({"prompt": "a", "completion": text}) + "\n" for text in texts), encoding="utf-8"
    )

    def measure(name, processes, sections):
        if name not in models:
            architecture, sizes = MODELS[name]
            models[name] = save_model(folder / name, architecture, max_position_embeddings=512, **sizes)
        config = {
            "model": {"path": str(models[name]), "dtype": "fp32"}, "method": "lora", "lora": {"targets": "all-linear"},
            "data": {"train": str(train), "max_length": WIDTH, "cache": "none"},
            "optim": {"lr": 1e-4, "max_steps": 3, "global_batch_size": 16, "micro_batch_size": 16 // processes},
            "checkpoint": {"every_steps": None}, "deepspeed": "zero3",
        }  # fmt: skip
        for section, values in sections.items():
            config[section] = {**config.get(section, {}), **values} if isinstance(values, dict) else values
        out = folder / f"{len(list(folder.iterdir()))}"
        out.mkdir()
        path = save_run(out / "run.yaml", config | {"run": {"dir": str(out / "run")}})
        cluster = Cluster(
            nodes=1,
            per_node=processes,
            device="cpu",
            memory=2**34,
            host_memory=None,
            network=1e9,
            node_network=1e9,
            disk=1e9,
        )
        plan = plan_run(describe(load_config(path)), cluster)
        return plan.memory.device_bytes + plan.memory.host_bytes, max(grown(out, path, processes))

    return measure


def grown(out, path, processes):
    """How far the memory of each process of a run grows."""
    port, started = str(free_port()), []
    words = [sys.executable, "-m", "tests.plan.measured", str(out), "train", str(path)]
    for rank in range(processes):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        env = {**os.environ, **ENVIRONMENT, **{name: str(value) for name, value in names.items()}}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
        with open(out / f"log-{rank}", "wb") as log:
            started.append(subprocess.Popen(words, env=env, cwd=REPOSITORY, stdout=log, stderr=log))
    try:
        for rank, process in enumerate(started):
            assert process.wait(timeout=300) == 0, (out / f"log-{rank}").read_text(encoding="utf-8")
    finally:
        for process in started:
            process.kill()
    return [json.loads((out / f"memory-{rank}.json").read_text(encoding="utf-8"))["peak"] for rank in range(processes)]


@pytest.fixture(scope="module")
def next_to_nothing(measured):
    """What a run takes that has nothing to do with its model: Python's objects, libraries, connections."""
    planned, found = measured("toy", 2, {})
    return found - planned


@pytest.mark.parametrize(("name", "processes", "sections"), thorough(CASES, MORE))
def test_a_plan_is_within_a_tenth_of_what_a_run_takes(measured, next_to_nothing, name, processes, sections):
    planned, found = measured(name, processes, sections)
    print(f"{name}, {processes} processes, {sections}: planned {planned / 2**20:.0f} MiB, "
          f"measured {(found - next_to_nothing) / 2**20:.0f}")  # fmt: skip
    assert planned == pytest.approx(found - next_to_nothing, rel=0.1)
