"""The engine's stage and sizes, in real runs: what is gathered, and that neither changes what is learnt."""

import json

import pytest

from cola_ds.config.loading import load_config
from tests.support.distributed import process_group, run_distributed
from tests.support.jobs import run_job
from tests.support.toys import rows, run_config, save_model, save_run, save_sums


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizes")
    return save_model(folder / "model"), save_sums(folder / "train.jsonl", 50)


def engine(path, **zero):
    path.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
    return str(path)


def gathers_of_a_step(process, path, evaluations=()):
    """The names of the parameters that passes gather in the fourth step. (What is resident is gathered once, at a step's end, and
    not by a pass.) Before the steps of those numbers there is an evaluation."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    from cola_ds.distributed import accelerator
    from cola_ds.training import loop
    from cola_ds.training.build import build_chain
    from cola_ds.training.knot import batch_loss
    from cola_ds.training.prepare import prepare
    from cola_ds.training.state import step_examples

    config = load_config(path)
    process_group(process)
    chain = build_chain(prepare(config, process.world_size), process, None)
    names = {param.ds_id: name for name, param in chain.engine.module.named_parameters()}
    gathered = []
    inner = Coordinator._PartitionedParameterCoordinator__all_gather_params_

    def gather(self, params, *args, **words):
        gathered.extend(names[p.ds_id] for p in params if p.ds_status.name == "NOT_AVAILABLE")
        return inner(self, params, *args, **words)

    Coordinator._PartitionedParameterCoordinator__all_gather_params_ = gather
    for step in range(4):
        for _ in range(evaluations.count(step)):
            batch_loss(chain, step_examples(chain, step).micro_batches[0].to(accelerator.device()))
        gathered.clear()
        loop.train_step(chain.engine, step_examples(chain, step), 1e-3, chain.world_size)
    return sorted(gathered)


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({"stage": 3}, set()),
        ({"stage": 3, "stage3_param_persistence_threshold": 100}, {"adapters", "base"}),
    ],
)
def test_nothing_is_gathered_twice(toy, tmp_path, zero, expected):
    """With derived sizes no pass gathers anything; a large LoRA rank's A and B are no exception."""
    config = run_config(
        *toy, tmp_path / "run", lora={"rank": 2000}, chain={"length": 1}, deepspeed=engine(tmp_path / "ds.json", **zero)
    )
    found = run_distributed(gathers_of_a_step, 2, save_run(tmp_path / "run.yaml", config))
    kinds = {"adapters" if "lora_" in name else "base" for name in found[0]}
    assert kinds == expected, found[0]


@pytest.mark.parametrize("evaluations", [(), (0, 0, 0), (0, 1, 2), (0, 3), (3, 3, 3)])
def test_a_step_gathers_once_whatever_was_evaluated_before(toy, tmp_path, evaluations):
    """Weights that are not resident stay whole from the forward pass to the backward pass: also where DeepSpeed has seen forward
    passes alone, which it would otherwise take for what a step is."""
    sizes = {"stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 2000}
    config = run_config(
        *toy, tmp_path / "run", chain={"length": 1}, optim={"micro_batch_size": 4},
        deepspeed=engine(tmp_path / "ds.json", stage=3, **sizes),
    )  # fmt: skip
    found = run_distributed(gathers_of_a_step, 2, save_run(tmp_path / "run.yaml", config), evaluations)
    assert found[0] == found[1]
    assert len(found[0]) > 10
    assert len(set(found[0])) == len(found[0])


def losses(folder):
    return [row["loss"] for row in rows(folder / "metrics.jsonl")]


def test_stages_and_sizes_do_not_change_what_is_learnt(toy, tmp_path):
    engines = {
        "auto": "auto",
        "derived": "zero3",
        "DeepSpeed's": engine(
            tmp_path / "ds.json", stage=3, stage3_param_persistence_threshold=100_000, reduce_bucket_size=5 * 10**8,
            stage3_prefetch_bucket_size=5 * 10**7,
        ),
    }  # fmt: skip
    found = {}
    for name, words in engines.items():
        config = run_config(*toy, tmp_path / name, lora={"rank": [8, 4]}, deepspeed=words)
        statuses, said = run_job(tmp_path / f"log {name}", ["train", save_run(tmp_path / "run.yaml", config)])
        assert statuses == [0, 0], said
        found[name] = losses(tmp_path / name)
        assert ("ZeRO stage 2: needs" in said) == (name == "auto")
        environment = json.loads((tmp_path / name / "environment.json").read_text(encoding="utf-8"))
        assert environment["zero_stage"] == (2 if name == "auto" else 3)
    for name in engines:
        assert found[name] == pytest.approx(found["auto"], rel=1e-5), name


def little_memory(rank):
    """Only one process has little: all of them choose by it."""
    from cola_ds.distributed import collectives

    if rank == 1:
        collectives.memory_bytes = lambda processes: (1000, 10**12)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_goes_on_at_another_stage(toy, tmp_path, dtype):
    """Stopped at stage 2 within its second link; gone on with at stage 3, as where the memory is another."""
    config = run_config(*toy, tmp_path / "run", model={"dtype": dtype}, deepspeed="auto", checkpoint={"every_steps": 2})
    path = save_run(tmp_path / "run.yaml", config)
    statuses, said = run_job(tmp_path / "whole", ["train", path, f"run.dir={tmp_path / 'whole run'}"])
    assert statuses == [0, 0], said
    statuses, said = run_job(tmp_path / "first", ["train", path], sabotage=stop_after_step_4)
    assert statuses == [75, 75], said
    statuses, said = run_job(tmp_path / "second", ["train", path], sabotage=little_memory)
    assert statuses == [0, 0], said
    assert "ZeRO stage 3: stage 2 needs" in said
    assert "going on from step 4, in link 2" in said
    assert json.loads((tmp_path / "run" / "environment.json").read_text(encoding="utf-8"))["zero_stage"] == 3
    tolerance = 1e-5 if dtype == "fp32" else 2e-2
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole run"), rel=tolerance)


def stop_after_step_4(rank):
    from cola_ds.distributed import signals
    from cola_ds.training import loop

    inner, steps = loop.train_step, []

    def step(*args):
        steps.append(args)
        if len(steps) == 4:
            signals._requested = 15
        return inner(*args)

    loop.train_step = step


def test_offload_leaves_nothing_to_choose(toy, tmp_path):
    from cola_ds.config.deepspeed_json import read_engine_config
    from cola_ds.errors import UserError

    named = engine(tmp_path / "ds.json", stage="auto", offload_optimizer={"device": "cpu"})
    config = load_config(save_run(tmp_path / "run.yaml", run_config(*toy, tmp_path / "run", deepspeed=named)))
    with pytest.raises(UserError, match="offload_optimizer leaves nothing to choose; set the stage to 3"):
        read_engine_config(config)


@pytest.mark.parametrize(
    ("sections", "processes", "stage"),
    [
        ({}, 1, 2),
        ({}, 2, 2),
        ({"method": "full", "chain": {"length": 1}}, 2, 3),
        ({"deepspeed": "zero3"}, 1, 3),
        ({"model": {"shards": "node"}}, 1, 3),
    ],
)
def test_the_stage_of_a_plan(toy, tmp_path, sections, processes, stage):
    """A stage that the JSON says stays, for one process as well."""
    from cola_ds.training.prepare import prepare
    from cola_ds.training.summary import summarize

    config = run_config(*toy, tmp_path / "run", **{"deepspeed": "auto", **sections})
    prepared = prepare(load_config(save_run(tmp_path / "run.yaml", config)), processes)
    assert prepared.engine_config["zero_optimization"]["stage"] == stage
    chosen = "deepspeed" not in sections
    assert (f"ZeRO stage {stage}: " in summarize(prepared, processes)) == chosen
