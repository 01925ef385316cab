"""A run that was stopped and went on is the run that was never stopped: equal bits, or the same within fp32 elsewhere."""

import json
import shutil
from types import SimpleNamespace

import pytest

from tests.support.distributed import CountedCollectives, process_group, run_distributed
from tests.support.runs import record, run_once, three_links, train_in
from tests.support.toys import REPOSITORY, TOP_RUNG, rows, thorough

SHARDED = str(REPOSITORY / "tests/support/zero3_sharded.json")


VARIANTS = {
    "fp32": {},
    "bf16": {"model": {"dtype": "bf16"}},
    "bf16 plain gathered": {"model": {"dtype": "bf16"}, "chain": {"merge": "plain", "tie": "gathered"}},
    "stage 2": {"deepspeed": str(REPOSITORY / "ds_configs/zero2.json")},
    "stage 2 bf16": {"deepspeed": str(REPOSITORY / "ds_configs/zero2.json"), "model": {"dtype": "bf16"}},
    "top rung": {**TOP_RUNG, "optim": {"global_batch_size": 4, "micro_batch_size": 1}},
    "top rung bf16": {
        **TOP_RUNG,
        "model": {**TOP_RUNG["model"], "dtype": "bf16"},
        "optim": {"global_batch_size": 4, "micro_batch_size": 1},
    },
    "offload": {"deepspeed": str(REPOSITORY / "ds_configs/zero3_offload_cpu.json")},
    "sgd": {"optim": {"name": "sgd"}},
    "adagrad": {"optim": {"name": "adagrad", "schedule_over": "link", "warmup_steps": 2}},
    "full": {"method": "full", "chain": {"length": 1}, "lora": {"rank": 8}},
}


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """The run that was never stopped, by variant: its weights and its record. Run when first asked for."""
    found = {}

    def run(variant):
        if variant not in found:
            folder = tmp_path_factory.mktemp("whole")
            weights = train_in(folder, three_links(toy, **VARIANTS[variant]))
            found[variant] = weights, record(folder / "run")
        return found[variant]

    return run


# Asked for in a step of a start: the checkpoint is after that step. A start's steps count from 1.
STOPS = {
    "first step": [("step", 1)],
    "inside an accumulation": [("step", 3, 2)],
    "at a knot, before the tie": [("step", 4)],
    "after a knot": [("step", 5)],
    "inside an evaluation": [("evaluation", 1)],
    "twice in an epoch, and in the last": [("step", 6), ("step", 2), ("step", 3)],
    "at the end, before the last tie": [("step", 12)],
    "in the last evaluation": [("evaluation", 3)],
    "after every step": [("step", 1)] * 12,
}


@pytest.mark.parametrize(
    "stops", [pytest.param(name, marks=pytest.mark.core if name == "after a knot" else ()) for name in STOPS]
)
def test_a_stopped_run_ends_with_the_same_bits(toy, whole, tmp_path, stops):
    weights, expected = whole("fp32")
    assert train_in(tmp_path, three_links(toy), stops=STOPS[stops]) == weights
    assert record(tmp_path / "run") == expected


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "fp32"])
def test_in_every_precision_engine_and_optimizer(toy, whole, tmp_path, variant):
    weights, expected = whole(variant)
    assert train_in(tmp_path, three_links(toy, **VARIANTS[variant]), stops=[("step", 3), ("step", 7)]) == weights
    assert record(tmp_path / "run") == expected


@pytest.mark.parametrize(
    ("sizes", "stop", "variant"),
    [
        *((sizes, 6, "fp32") for sizes in thorough([(2, 1), (2, 4)], [(1, 2), (4, 2)])),
        ((4, 1, 2), 3, "fp32"),
        ((4, 1, 2), 3, "top rung"),
    ],
)
def test_at_another_world_size(toy, tmp_path, sizes, stop, variant):
    """Within fp32's tolerance, with the same examples."""
    config = three_links(
        toy, **VARIANTS[variant], lora={"rank": [8, 4], "dropout": 0.0}, chain={"length": 2}, run={"log_every_steps": 1}
    )
    train_in(tmp_path / "straight", config, world_size=2)
    stops = [("step", stop), ("step", 2)][: len(sizes) - 1]
    train_in(tmp_path / "stopped", config, world_size=sizes, stops=stops)
    expected, found = (record(tmp_path / name / "run") for name in ("straight", "stopped"))
    assert [row["tokens"] for row in found["metrics.jsonl"]] == [row["tokens"] for row in expected["metrics.jsonl"]]
    for name, keys in (
        ("metrics.jsonl", ("loss", "grad_norm")),
        ("evals.jsonl", ("loss",)),
        ("knots.jsonl", ("delta_norm",)),
    ):
        for a, b in zip(found[name], expected[name], strict=True):
            assert (a["step"], a["link"]) == (b["step"], b["link"])
            for key in keys:
                assert a[key] == pytest.approx(b[key], rel=1e-5)
    from safetensors.torch import load_file

    for link in (1, 2):
        file = f"run/chain/link-000{link}/adapter_model.safetensors"
        a, b = (load_file(tmp_path / name / file) for name in ("straight", "stopped"))
        for key in a:
            assert (a[key] - b[key]).abs().max() <= 1e-5 * a[key].abs().max()


def test_a_finished_run_is_finished(toy, tmp_path):
    config = three_links(toy)
    train_in(tmp_path, config)
    before = record(tmp_path / "run")
    assert train_in(tmp_path, config) == "finished"
    assert record(tmp_path / "run") == before


def test_from_the_checkpoint_of_another_folder(toy, whole, tmp_path):
    """As a whole, after its run's folder has gone: a checkpoint holds its links."""
    config = three_links(toy, checkpoint={"every_steps": 3, "keep": 9})
    train_in(tmp_path / "first", config)
    kept = tmp_path / "elsewhere/step-00000006"
    shutil.copytree(tmp_path / "first/run/checkpoints/step-00000006", kept)
    shutil.rmtree(tmp_path / "first")
    weights, expected = whole("fp32")
    assert train_in(tmp_path / "second", config, words={"resume": str(kept)}) == weights
    found = record(tmp_path / "second/run")
    assert found["chain/link-0001/adapter_model.safetensors"] == expected["chain/link-0001/adapter_model.safetensors"]
    assert found["chain/link-0003/adapter_model.safetensors"] == expected["chain/link-0003/adapter_model.safetensors"]
    assert found["result"] == expected["result"]


def test_from_an_earlier_checkpoint_of_the_same_folder(toy, whole, tmp_path):
    """What the run did after it is forgotten, its result too."""
    config = three_links(toy, checkpoint={"every_steps": 3, "keep": 9})
    train_in(tmp_path, config)
    earlier = tmp_path / "run/checkpoints/step-00000003"
    weights, expected = whole("fp32")
    assert train_in(tmp_path, config, words={"resume": str(earlier)}) == weights
    assert record(tmp_path / "run") == expected
    assert not list((tmp_path / "run/checkpoints").glob("aside-*"))


def count_reads(process, path):
    """How often a resumed run goes through a checkpoint's trained tensors."""
    from cola_ds.checkpoint.format import Checkpoint

    reads, inner = [], Checkpoint.trained

    def trained(found):
        reads.append(found.step)
        return inner(found)

    Checkpoint.trained = trained
    run_once(process, path)
    return reads


def test_a_checkpoint_is_read_for_the_model_and_for_the_optimizer(toy, tmp_path):
    """Once each, with factors that are not trained, too."""
    config = three_links(toy, lora={"train": "B", "init": "pissa"})
    train_in(tmp_path, config, 1, stops=[("step", 5)], end=False)
    (reads,) = run_distributed(count_reads, 1, tmp_path / "run.yaml")
    assert reads == [5, 5]


def test_the_best_checkpoint_is_kept(toy, tmp_path):
    """Held-out answers that are no numbers grow less likely with training: the first evaluation is the best."""
    dev = tmp_path / "dev.jsonl"
    dev.write_text(json.dumps({"prompt": "1+1=", "completion": "zqx"}) + "\n", encoding="utf-8")
    options = {"lr": 5e-2, "max_steps": 20}
    config = three_links(toy, optim=options, data={"eval": str(dev)}, checkpoint={"every_steps": 1, "keep": 1})
    train_in(tmp_path, config)
    evaluations = rows(tmp_path / "run/evals.jsonl")
    best = min(evaluations, key=lambda row: row["loss"])["step"]
    assert best < 20
    checkpoints = tmp_path / "run/checkpoints"
    assert (checkpoints / "best").read_text(encoding="utf-8") == f"step-{best:08d}\n"
    assert {path.name for path in checkpoints.glob("*-*")} == {f"step-{best:08d}", "step-00000020"}
    state = json.loads((checkpoints / "step-00000020/state.json").read_text(encoding="utf-8"))["chain"]
    assert (state["best_step"], state["best"]) == (best, min(row["loss"] for row in evaluations))


def test_a_checkpoint_holds_no_more_than_it_needs(toy, tmp_path):
    """Twelve bytes for each element of A and B (fp32 master, two moments) and the stored size of each that is tied."""
    config = three_links(toy, model={"dtype": "bf16"}, checkpoint={"every_steps": 6})
    train_in(tmp_path, config)
    files = {path.name: path.stat().st_size for path in (tmp_path / "run/checkpoints/step-00000012").iterdir()}
    elements = 2 * (4 * (32 + 32) + 4 * (32 + 16))  # two layers, q_proj and v_proj, LoRA rank 4
    assert 12 * elements < files["trained-00001.safetensors"] < 12 * elements + 4096
    assert 2 * elements < files["link-0002.safetensors"] < 2 * elements + 4096
    assert set(files) == {
        "manifest.json", "state.json", "random.safetensors", "trained-00001.safetensors", "link-0001.safetensors",
        "link-0002.safetensors",
    }  # fmt: skip


# A learning rate of nothing: the second evaluation, after a link has been tied and the next begun, is no better than the first.
ENDS_EARLY = {"optim": {"lr": 1e-30}, "eval": {"every": 3, "patience": 1}}


@pytest.mark.parametrize(("every", "step", "world_size"), [(3, 6, 2), (4, 8, 1)])
def test_a_run_that_becomes_no_better_ends_early(toy, tmp_path, every, step, world_size):
    """In the middle of a link, which is tied; and after a knot, which begins no link. What is left is a whole run."""
    from cola_ds.commands.export import export

    config = three_links(toy, **{**ENDS_EARLY, "eval": {"every": every, "patience": 1}})
    weights = train_in(tmp_path, config, world_size)
    assert [row["step"] for row in rows(tmp_path / "run/evals.jsonl")] == [every, step]
    assert [row["step"] for row in rows(tmp_path / "run/knots.jsonl")] == [4, step]
    result = json.loads((tmp_path / "run/result.json").read_text(encoding="utf-8"))
    assert (result["ended_early"], result["steps"], result["links"]) == (True, step, 2)
    assert len(result["link_sha256"]) == 2 == len(list((tmp_path / "run/chain").iterdir()))
    assert exported_hash(export(tmp_path / "run", "hf", tmp_path / "model")) == exported_hash(
        toy[0]
    )  # nothing was learnt
    # Killed just before its end, it ends where it did.
    before = record(tmp_path / "run")
    (tmp_path / "run/result.json").unlink()
    assert train_in(tmp_path, config, world_size) == weights
    assert record(tmp_path / "run") == before


def exported_hash(folder):
    from safetensors.torch import load_file

    return {name: tensor.sum().item() for name, tensor in load_file(folder / "model.safetensors").items()}


def test_patience_begins_anew_with_every_best(toy, tmp_path):
    """Training helps at each evaluation: nothing ends. With a stop in between, the count goes on."""
    patient = three_links(toy, eval={"every": 2, "patience": 1})
    train_in(tmp_path / "better", patient, 1)
    assert not json.loads((tmp_path / "better/run/result.json").read_text(encoding="utf-8"))["ended_early"]
    never = three_links(toy, **{**ENDS_EARLY, "eval": {"every": 2, "patience": 3}})
    train_in(tmp_path / "never", never, 1, stops=[("step", 5)])
    assert [row["step"] for row in rows(tmp_path / "never/run/evals.jsonl")] == [2, 4, 6, 8]


def test_patience_counts_from_the_last_best(monkeypatch):
    """Losses 3, 4, 2, 5, 6: two in a row without a best are the last two, not the second and the fourth."""
    from types import SimpleNamespace as Part

    from cola_ds.config.steps import Epochs, StepPlan
    from cola_ds.training import state, validation

    losses = iter([3.0, 4.0, 2.0, 5.0, 6.0])
    monkeypatch.setattr(validation, "evaluate", lambda chain: next(losses))
    monkeypatch.setattr(validation, "save_checkpoint", lambda chain: True)
    chain = Part(
        config=Part(eval=Part(patience=2, every=1), checkpoint=Part(best=False), chain=Part(length=1, plateau=None)),
        state=state.ChainState(), links=1, held_out=True, folder=None,
        step_plan=StepPlan(epochs=Epochs(9, 9), global_batch_size=9, total_steps=9, knots=(9,), micro_steps=1),
        logger=Part(say=lambda message: None, event=lambda what, **facts: None),
    )  # fmt: skip
    for step in range(1, 6):
        assert chain.state.ended_step is None
        chain.state.step = step
        validation.evaluate_if_due(chain)
    assert (chain.state.ended_step, chain.state.best_step, chain.step_plan.knots) == (5, 3, (5,))


def restore_random_states(process):
    """How many numbers each process then draws as it would have, and what that took."""
    import torch

    from cola_ds.checkpoint.restore import _restore_random_state

    process_group(process)
    states, drawn = [], []
    for rank in range(process.world_size):
        torch.manual_seed(rank)
        states.append(torch.get_rng_state())
        drawn.append(torch.rand(3))
    found = SimpleNamespace(random_states=lambda: states) if process.rank == 0 else None
    torch.manual_seed(99)
    with CountedCollectives() as counted:
        _restore_random_state(found, process.world_size, process)
    return int((torch.rand(3) == drawn[process.rank]).sum()), len(counted.calls)


def test_random_states_take_as_many_messages_whatever_the_world_size():
    found = {size: run_distributed(restore_random_states, size) for size in (1, 4)}
    assert {same for each in found.values() for same, _ in each} == {3}
    assert {calls for each in found.values() for _, calls in each} == {3}  # how long a list is, the list, the states
