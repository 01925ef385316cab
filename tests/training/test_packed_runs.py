"""Whole runs whose sources are mixed by weight and whose rows are packed."""

import pytest

from cola_ds.config.loading import load_config
from cola_ds.errors import UserError
from cola_ds.training.prepare import prepare
from cola_ds.training.summary import summarize
from tests.support.distributed import run_distributed
from tests.support.runs import record, run_once, three_links, train_in
from tests.support.toys import rows, save_model, save_run


@pytest.fixture(scope="module")
def mixed(toy, tmp_path_factory):
    """A config of two sources, of 30 and of 10 sums, that are half of an epoch each: packed in rows of three or four."""
    train = toy[1]
    folder = tmp_path_factory.mktemp("mixed")
    lines = train.read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "a.jsonl").write_text("".join(lines[:30]), encoding="utf-8")
    (folder / "b.jsonl").write_text("".join(lines[30:]), encoding="utf-8")
    sources = [{"path": str(folder / f"{name}.jsonl"), "weight": 1.0} for name in "ab"]
    config = three_links(toy, data={"train": sources, "packing": "best_fit", "max_length": 32})
    del config["optim"]["global_batch_size"]
    config["optim"] |= {"global_batch_tokens": 4 * 32 + 5, "micro_batch_size": 1}
    return config


@pytest.fixture(scope="module")
def whole(mixed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return train_in(folder, mixed, 2), record(folder / "run"), load_config(folder / "run.yaml")


def test_a_packed_run_learns_and_says_what_it_sees(whole):
    _, found, config = whole
    metrics = found["metrics.jsonl"]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    # 12 steps of 4 rows of 32 tokens, nearly full but for the ends of epochs.
    assert found["result"]["steps"] == 12
    assert found["result"]["tokens"] > 0.8 * 12 * 4 * 32
    assert found["result"]["examples"] > 2 * 12 * 4
    prepared = prepare(config, 2)
    assert not prepared.step_plan.epochs.are_even
    ends = [prepared.step_plan.epochs.start(epoch) for epoch in (1, 2, 3)]
    assert [row["step"] for row in found["evals.jsonl"]] == [*(step for step in ends if step < 12), 12]
    assert [row["epoch"] for row in found["evals.jsonl"]][:2] == [1, 2]
    said = summarize(prepared, 2)
    assert "packed in " in said and "4 = 1 row of 32 tokens x 2 micro steps x 2 processes" in said
    assert f"steps       12 ({ends[0]} in the first epoch)" in said


@pytest.mark.parametrize("stops", [[("step", 2)], [("step", 3, 2), ("step", 4)]])  # inside an epoch
def test_a_packed_and_mixed_run_goes_on_with_the_same_bits(mixed, whole, tmp_path, stops):
    weights, expected, _ = whole
    assert train_in(tmp_path / "run", mixed, 2, stops=stops) == weights
    assert record(tmp_path / "run/run") == expected


@pytest.mark.parametrize("world_sizes", [[1], [4], [4, 1]])
def test_every_world_size_sees_the_same_examples(mixed, whole, tmp_path, world_sizes):
    train_in(tmp_path / "run", mixed, world_sizes, stops=[("step", 2)] * (len(world_sizes) - 1))
    found, expected = record(tmp_path / "run/run"), whole[1]
    for key in ("steps", "examples", "tokens"):
        assert found["result"][key] == expected["result"][key]
    assert [row["epoch"] for row in found["metrics.jsonl"]] == [row["epoch"] for row in expected["metrics.jsonl"]]


def refused_here(process, path):
    """What a run of OPT says that leaves its mask to Transformers."""
    from cola_ds.evaluation import logits

    logits._MASKS_WITHOUT_POSITIONS = ()
    try:
        return run_once(process, path)
    except UserError as error:
        return str(error)


def test_a_model_that_mixes_examples_is_refused_before_the_first_step(mixed, tmp_path):
    model = {"path": str(save_model(tmp_path / "opt", "opt")), "attention": "sdpa"}
    config = {**mixed, "model": {**mixed["model"], **model}}
    path = save_run(tmp_path / "run.yaml", {**config, "run": {**config["run"], "dir": str(tmp_path / "run")}})
    said = "OPTForCausalLM: examples of a packed row see each other (attention sdpa); set data.packing=none"
    assert run_distributed(refused_here, 2, path) == [said, said]
    assert not (tmp_path / "run/metrics.jsonl").exists() or not rows(tmp_path / "run/metrics.jsonl")
