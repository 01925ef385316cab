"""Promise 3: every world size, with accumulation and without, follows the plain-torch reference of algorithm 1; so do
packed rows at the ladder's top rung."""

import json

import pytest
import torch
from safetensors.torch import load_file

from cola_ds.checkpoint.decide import ResumeOptions
from cola_ds.commands.export import export
from cola_ds.config.loading import load_config
from cola_ds.data.order import Order
from cola_ds.training.prepare import prepare
from cola_ds.training.run import run_prepared as train
from tests.support.distributed import process_group, run_distributed
from tests.support.reference import chain_of_lora
from tests.support.toys import TOP_RUNG, rows, run_config, save_model, save_run, save_sums, thorough

STEPS, KNOTS, LORA_RANKS = 33, (9, 17, 25, 33), [8, 8, 4, 2]  # the first extension is in place, the others rebuild
RATES = {"adamw": 1e-3, "sgd": 5e-2, "adagrad": 1e-2}
ROWS = 8  # a step


def packed(lengths, step):
    """The examples of a step of packed rows: those of the pipeline's rows."""
    order = Order(lengths, capacity=TOP_RUNG["data"]["max_length"])
    steps = [rows for epoch in range(step + 1) for rows in steps_of(order.rows(0, epoch), order.count(0, epoch))]
    return [index for row in steps[step] for index in row]


def steps_of(rows, count):
    return [rows.between(start, start + ROWS) for start in range(0, count, ROWS)]


def run_here(process, path):
    """What `cola-ds train` does."""
    process_group(process)
    train(prepare(load_config(path), process.world_size), process, ResumeOptions(fresh=True))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    return save_model(folder / "model"), save_sums(folder / "train.jsonl", 50)


@pytest.fixture(scope="module")
def references(toy):
    found = {}

    def reference(name, is_top):
        if (name, is_top) not in found:
            config = config_for(toy, name, micro_batch_size=8, run_dir=toy[0])
            found[name, is_top] = chain_of_lora(config, KNOTS, packed if is_top else None)
        return found[name, is_top]

    return reference


def config_for(toy, name, micro_batch_size, run_dir, is_top=False):
    # A gradient norm that clipping does cut: the toy's is around 0.3.
    optim = {
        "name": name,
        "lr": RATES[name],
        "max_steps": STEPS,
        "micro_batch_size": micro_batch_size,
        "max_grad_norm": 0.1,
    }
    top = TOP_RUNG if is_top else {}
    model = {**top.get("model", {}), "activation_checkpointing": micro_batch_size == 1}
    return run_config(
        *toy,
        run_dir,
        **{**top, "model": model},
        lora={"rank": LORA_RANKS, "alpha": 16},
        chain={"length": 4},
        optim=optim,
    )


SHAPES = [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (4, 1)]  # processes, micro batch


@pytest.mark.parametrize(
    ("name", "world_size", "micro_batch_size", "is_top"),
    [
        *(
            ("adamw", *shape, False)
            for shape in thorough([SHAPES[0], SHAPES[2], SHAPES[5]], [SHAPES[1], SHAPES[3], SHAPES[4]])
        ),
        *((name, *shape, False) for name in ("sgd", "adagrad") for shape in SHAPES[2::3]),
        *(("adamw", *shape, True) for shape in (SHAPES[0], SHAPES[3], SHAPES[4])),
    ],
)
def test_pipeline_follows_reference(toy, references, tmp_path, name, world_size, micro_batch_size, is_top):
    losses, model = references(name, is_top)
    path = save_run(tmp_path / "run.yaml", config_for(toy, name, micro_batch_size, tmp_path / "run", is_top))
    run_distributed(run_here, world_size, path)
    metrics = rows(tmp_path / "run/metrics.jsonl")
    found = [row["loss"] for row in metrics]
    assert max(row["grad_norm"] for row in metrics) > 0.1
    assert len(found) == STEPS
    environment = json.loads((tmp_path / "run/environment.json").read_text(encoding="utf-8"))
    assert (environment["zero_stage"], environment["attention"]) == (2 if is_top else 3, "varlen")
    torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=1e-5, atol=1e-5)
    assert [row["lora_rank"] for row in rows(tmp_path / "run/knots.jsonl")] == LORA_RANKS

    exported = load_file(export(tmp_path / "run", "hf", tmp_path / "merged") / "model.safetensors")
    expected = model.state_dict()
    base = load_file(toy[0] / "model.safetensors")
    for tensor_name, tensor in exported.items():
        torch.testing.assert_close(tensor, expected[tensor_name], rtol=1e-5, atol=1e-5)
        is_target = tensor_name.endswith(("q_proj.weight", "v_proj.weight"))
        assert torch.equal(tensor, base[tensor_name]) != is_target  # targets moved, the rest did not
