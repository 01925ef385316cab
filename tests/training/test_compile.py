"""Compiled blocks (model.compile): eager's losses, compiled once a LoRA rank, the same bits after a stop."""

import pytest
import torch

from cola_ds.config.loading import load_config
from cola_ds.errors import UserError
from cola_ds.training.prepare import prepare
from tests.support.distributed import run_distributed
from tests.support.runs import record, run_once, three_links, train_in
from tests.support.toys import REPOSITORY, rows, save_run


@pytest.fixture(scope="module")
def chain(toy):
    """Three links of LoRA ranks 4, 4 and 2, six steps of two micro batches, packed; the model is one of two blocks."""
    return three_links(
        toy,
        model={"compile": True},
        lora={"rank": [4, 4, 2], "dropout": 0.0},
        optim={"max_steps": 6},
        data={"packing": "best_fit", "max_length": 32},
        run={"log_every_steps": 1},
        deepspeed=str(REPOSITORY / "ds_configs/zero2.json"),
    )


def run_and_count(process, path):
    """Train, and the graphs that were compiled by the end of each step."""
    from torch._dynamo.utils import counters

    from cola_ds.training import loop

    inner, before, counts = loop.train_step, [], []

    def step(*args):
        before.append(counters["stats"]["unique_graphs"])  # the check of the compiler has compiled as well
        found = inner(*args)
        counts.append(counters["stats"]["unique_graphs"] - before[0])
        return found

    loop.train_step = step
    return run_once(process, path), counts


@pytest.fixture(scope="module")
def whole(chain, tmp_path_factory):
    """A run that nothing stopped: its folder, its weights, and the graphs that it had compiled after each step."""
    folder = tmp_path_factory.mktemp("compiled")
    config = {**chain, "run": {**chain["run"], "dir": str(folder / "run")}}
    ((weights, counts),) = run_distributed(run_and_count, 1, save_run(folder / "run.yaml", config), timeout_s=400)
    return folder / "run", weights, counts


def test_losses_are_those_of_a_run_that_compiles_nothing(chain, whole, tmp_path):
    train_in(tmp_path / "eager", {**chain, "model": {**chain["model"], "compile": False}}, 1)
    for name, keys in (("metrics.jsonl", ["loss", "grad_norm"]), ("knots.jsonl", ["loss_before", "loss_after"])):
        pairs = zip(rows(whole[0] / name), rows(tmp_path / "eager/run" / name), strict=True)
        for mine, eager in pairs:
            torch.testing.assert_close([mine[key] for key in keys], [eager[key] for key in keys], rtol=1e-5, atol=1e-6)


def test_blocks_are_compiled_once_a_lora_rank(whole):
    """The first block, whose input needs no gradient, and all others: two graphs; two more with another rank. Evaluations, the
    knots' losses and batches of other examples compile nothing."""
    assert whole[2] == [2, 2, 2, 2, 4, 4]


@pytest.mark.parametrize("stop", [("step", 2), ("step", 5)])  # before a knot; after the rank has changed
def test_a_compiled_run_goes_on_with_the_same_bits(chain, whole, tmp_path, stop):
    assert train_in(tmp_path / "stopped", chain, 1, stops=[stop]) == whole[1]
    assert record(tmp_path / "stopped/run") == record(whole[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"deepspeed": "zero3"}, "model.compile needs ZeRO stage 2"),
        ({"model": {"attention": "eager"}}, "model.compile needs text and model.attention varlen"),
    ],
)
def test_what_cannot_be_compiled_is_refused(chain, tmp_path, change, said):
    config = {name: {**chain[name], **value} if isinstance(value, dict) else value for name, value in change.items()}
    path = save_run(tmp_path / "run.yaml", {**chain, **config})
    with pytest.raises(UserError, match=said) as raised:
        prepare(load_config(path), 1)
    assert "\n" not in str(raised.value) and "model.compile=false" in str(raised.value)


def test_stage_3_where_the_stage_is_chosen_is_refused(chain, tmp_path):
    from cola_ds.data.tokenize import tokenize
    from cola_ds.training.prepare import check, with_data
    from cola_ds.training.settle import settle_engine

    config = load_config(save_run(tmp_path / "run.yaml", {**chain, "deepspeed": "auto"}))
    checked = check(config)
    prepared = with_data(checked, 2, lambda: tokenize(checked.config.data, checked.tokenizer, checked.config.model))
    with pytest.raises(UserError, match="needs ZeRO stage 2"):
        settle_engine(prepared, ["here"] * 2, lambda: (1, 1))


def _without_a_compiler(process):
    import os

    from cola_ds.distributed import compilation

    os.environ["CXX"] = "/no/such/compiler"
    import torch._inductor.config as inductor

    inductor.cpp.cxx = ("/no/such/compiler",)
    inductor.force_disable_caches = True
    try:
        compilation.check_compiler()
    except UserError as error:
        return str(error)
    return "compiled"


def test_without_a_compiler_one_line_says_so():
    (said,) = run_distributed(_without_a_compiler, 1)
    assert said.startswith("model.compile: torch cannot compile here, it needs a C++ compiler") and "\n" not in said
