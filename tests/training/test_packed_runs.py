"""Whole runs whose sources are mixed by weight and whose rows are packed."""

import pytest

from cola_ds.errors import UserError
from tests.support.distributed import run_distributed
from tests.support.runs import record, run_once, three_links
from tests.support.toys import rows, save_model, save_run

PACKING = {"packing": "best_fit", "max_length": 32}  # rows of three or four sums
SIZES, WEIGHTS = (30, 10), (1.0, 1.0)


def packed(toy, **sections):
    config = three_links(toy, data=PACKING, **sections)
    optim = {key: value for key, value in config["optim"].items() if key != "global_batch_size"}
    return {**config, "optim": {**optim, "global_batch_tokens": 4 * 32 + 5, "micro_batch_size": 1}}


def mixed_here(process, path, stop):
    """A run in which the first 30 examples and the last 10 are half of an epoch each. Returns the weights' hash or "stopped", and
    the steps of the first two epochs."""
    import dataclasses

    from cola_ds.training import prepare, run

    load, inner, kept = prepare.load_split, run.begin, []

    def mixed(config, split, tokenizer):
        data = load(config, split, tokenizer)
        return dataclasses.replace(data, source_sizes=SIZES, source_weights=WEIGHTS) if split == "train" else data

    def begin(prepared, *args):
        kept.append(prepared.step_plan.epochs)
        return inner(prepared, *args)

    prepare.load_split, run.begin = mixed, begin
    return run_once(process, path, stop), [kept[0].steps(epoch) for epoch in range(2)]


def mixed_in(folder, config, world_sizes, stops=()):
    """As train_in, of mixed sources: what the last start returned."""
    folder.mkdir()
    path = save_run(folder / "run.yaml", {**config, "run": {**config["run"], "dir": str(folder / "run")}})
    for world_size, stop in zip(world_sizes, [*stops, None], strict=True):
        found = run_distributed(mixed_here, world_size, path, stop)
        assert len({weights for weights, _ in found}) == 1
        assert (found[0][0] == "stopped") == (stop is not None)
    return found[0]


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    found = mixed_in(folder, packed(toy), [2])
    return found, record(folder / "run")


def test_a_packed_run_learns_and_says_what_it_sees(whole, toy):
    (_, steps), found = whole
    metrics = found["metrics.jsonl"]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert found["result"]["steps"] == 12
    # Rows are nearly full: 12 steps of 4 rows of 32 tokens, but for the ends of epochs.
    assert found["result"]["tokens"] > 0.8 * 12 * 4 * 32
    assert found["result"]["examples"] > 2 * 12 * 4
    first, second = steps
    assert [row["step"] for row in found["evals.jsonl"]][:2] == [first, first + second]
    assert [row["epoch"] for row in found["evals.jsonl"]][:2] == [1, 2]


# The first and the second start are stopped inside an epoch.
@pytest.mark.parametrize("stops", [[("step", 2)], [("step", 3, 2), ("step", 4)]])
def test_a_packed_and_mixed_run_goes_on_with_the_same_bits(toy, whole, tmp_path, stops):
    (weights, steps), expected = whole
    assert mixed_in(tmp_path / "run", packed(toy), [2] * (len(stops) + 1), stops) == (weights, steps)
    assert record(tmp_path / "run/run") == expected


@pytest.mark.parametrize("world_sizes", [[1], [4], [4, 1]])
def test_every_world_size_sees_the_same_examples(toy, whole, tmp_path, world_sizes):
    config = packed(toy, lora={"dropout": 0.0})
    _, steps = mixed_in(tmp_path / "run", config, world_sizes, [("step", 2)] * (len(world_sizes) - 1))
    found, expected = record(tmp_path / "run/run"), whole[1]
    assert steps == whole[0][1]
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


def test_a_model_that_mixes_examples_is_refused_before_the_first_step(toy, tmp_path):
    config = packed((save_model(tmp_path / "opt", "opt"), *toy[1:]))
    path = save_run(tmp_path / "run.yaml", {**config, "run": {**config["run"], "dir": str(tmp_path / "run")}})
    said = "OPTForCausalLM: examples of a packed row see each other (attention sdpa); set data.packing=none"
    assert run_distributed(refused_here, 2, path) == [said, said]
    assert not (tmp_path / "run/metrics.jsonl").exists() or not rows(tmp_path / "run/metrics.jsonl")
