"""The engine's stage and sizes, in real runs: what is gathered, and that neither changes what is learnt."""

import json

import pytest

from cola_ds.config.loading import load_config
from tests.support.distributed import process_group, run_distributed
from tests.support.jobs import run_job
from tests.support.toys import REPOSITORY, rows, run_config, save_model, save_run, save_sums


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizes")
    return save_model(folder / "model"), save_sums(folder / "train.jsonl", 50)


def engine(path, **zero):
    path.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
    return str(path)


def gathers_of_a_step(process, path):
    """The names of the parameters that are gathered in the fourth step, whose micro steps are two."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    from cola_ds.training import loop
    from cola_ds.training.build import build_chain
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
    """With derived sizes not in a later micro step either; a large LoRA rank's A and B are no exception."""
    config = run_config(
        *toy, tmp_path / "run", lora={"rank": 2000}, chain={"length": 1}, deepspeed=engine(tmp_path / "ds.json", **zero)
    )
    found = run_distributed(gathers_of_a_step, 2, save_run(tmp_path / "run.yaml", config))
    kinds = {"adapters" if "lora_" in name else "base" for name in found[0]}
    assert kinds == expected, found[0]
