"""Shards of frozen weights in each node (model.shards: node): the bits of shards over all processes, no weight between nodes."""

import json

import pytest
import torch

from cola_ds.config.engine_sizes import Need, choose_shards, nodes_of, why_not_alike
from tests.config.test_engine_sizes import SMALL
from tests.support.distributed import CountedCollectives, process_group, run_distributed
from tests.support.jobs import run_job
from tests.support.runs import record, three_links, train_in
from tests.support.toys import REPOSITORY, rows, run_config, save_model, save_run, thorough

TWO_BY_TWO = ["a", "a", "b", "b"]
DEALT_IN_TURN = ["a", "b", "a", "b"]
ONE_EACH = ["a", "b", "c", "d"]
OFFLOAD = str(REPOSITORY / "ds_configs/zero3_offload_cpu.json")
VARIANTS = {
    "fp32": {},
    "bf16, all linear layers": {"model": {"dtype": "bf16"}, "lora": {"targets": "all-linear"}},
    "tied embeddings": {"model": {"architecture": "llama-tied"}},
    "OPT with biases": {"model": {"architecture": "opt"}, "lora": {"bias": "lora_only"}},
    "offloaded, gathered": {"deepspeed": OFFLOAD, "model": {"dtype": "bf16"}, "chain": {"tie": "gathered"}},
}


@pytest.fixture(scope="module")
def config_of(toy, tmp_path_factory):
    """Three links, one begun by a rebuilt engine and one in place; four processes take one example each."""
    models = {}

    def config(variant, shards):
        sections = {name: dict(s) if isinstance(s, dict) else s for name, s in VARIANTS[variant].items()}
        architecture = sections.get("model", {}).pop("architecture", "llama")
        if architecture not in models:
            models[architecture] = save_model(tmp_path_factory.mktemp(architecture), architecture)
        model = {"path": str(models[architecture]), "shards": shards, **sections.pop("model", {})}
        optim = {"max_steps": 6, "micro_batch_size": 2}
        return three_links(toy, **{**sections, "model": model}, optim=optim, run={"log_every_steps": 1})

    return config


@pytest.fixture(scope="module")
def world(config_of, tmp_path_factory):
    """By variant, the weights and the record of a run of four processes whose shards lie on all of them."""
    found = {}

    def run(variant):
        if variant not in found:
            folder = tmp_path_factory.mktemp("world")
            found[variant] = train_in(folder, config_of(variant, "world"), 4), record(folder / "run")
        return found[variant]

    return run


@pytest.mark.parametrize(
    ("variant", "hosts"),
    thorough(
        [
            ("fp32", DEALT_IN_TURN),
            ("bf16, all linear layers", TWO_BY_TWO),
            ("offloaded, gathered", TWO_BY_TWO),
            ("OPT with biases", ONE_EACH),
        ],
        [("fp32", ONE_EACH), ("fp32", TWO_BY_TWO), ("tied embeddings", TWO_BY_TWO), ("OPT with biases", TWO_BY_TWO)],
    ),
)
def test_losses_and_weights_are_those_of_shards_over_all_processes(config_of, world, tmp_path, variant, hosts):
    weights, expected = world(variant)
    assert train_in(tmp_path, config_of(variant, "node"), 4, hosts=[hosts]) == weights
    assert record(tmp_path / "run") == expected


@pytest.mark.parametrize("first", ["node", "world"])
def test_a_run_goes_on_with_its_shards_elsewhere(config_of, world, tmp_path, first):
    variant = "bf16, all linear layers"
    hosts = [TWO_BY_TWO, None] if first == "node" else [None, TWO_BY_TWO]
    weights, expected = world(variant)
    config = config_of(variant, "auto")  # over all processes, where all are on one node
    assert train_in(tmp_path, config, 4, stops=[("step", 3)], hosts=hosts) == weights
    assert record(tmp_path / "run") == expected


# -- which are nodes, and what fits ------------------------------------------------------------------------------------


def test_nodes_are_found_by_host_at_any_placement():
    assert nodes_of(TWO_BY_TWO) == [[0, 1], [2, 3]]
    assert nodes_of(DEALT_IN_TURN) == [[0, 2], [1, 3]]
    assert nodes_of(["b", "a", "a", "b"]) == [[0, 3], [1, 2]]
    assert why_not_alike(DEALT_IN_TURN) is None
    assert why_not_alike(["a", "b", "b"]) == "nodes have different numbers of processes: 1 on a, 2 on b"


def test_each_node_has_its_own_where_that_fits():
    weights, one = 2 * SMALL.total, 4 * max(SMALL.weights)
    needed = Need(device=weights + 1000, host=0, remainders=800)
    taken = 1000 + weights // 4 + one
    assert choose_shards(needed, SMALL, 2, 4, int(taken / 0.7) + 1, 10**9, one=False)[0]
    fits, why = choose_shards(needed, SMALL, 2, 4, int(taken / 0.7) - 1, 10**9, one=False)
    assert not fits and why.startswith("over all processes: in each node they need ")
    assert not choose_shards(needed, SMALL, 2, 4, int(taken / 0.7) + 1, 10**9, one=True)[0]  # remainders lie there too
    fits, why = choose_shards(needed, SMALL, 2, 4, 10**9, 285, one=False)
    assert not fits and "of its host" in why


def two_hosts(rank, names=("a", "a", "b", "b")):
    import socket

    socket.gethostname = lambda: names[rank]


@pytest.mark.parametrize(
    ("shards", "names", "said_of_them"),
    [
        ("auto", ("a", "a", "b", "b"), "in each node: "),
        ("node", ("a", "a", "b", "b"), "in each of 2 nodes"),
        ("node", ("a", "a", "a", "a"), "over all 4 processes: all are on a"),
    ],
)
def test_a_run_says_where_its_shards_are(toy, tmp_path, shards, names, said_of_them):
    config = run_config(*toy[:2], tmp_path / "run", model={"shards": shards}, optim={"max_steps": 2})
    words = ["train", save_run(tmp_path / "run.yaml", config)]
    statuses, said = run_job(tmp_path / "logs", words, world_size=4, sabotage=two_hosts, arguments=(names,))
    assert statuses == [0] * 4, said
    assert f"shards      {said_of_them}" in said
    kept = json.loads((tmp_path / "run/environment.json").read_text(encoding="utf-8"))["shards"]
    assert kept == ("node" if "b" in names else "world")
    (loaded,) = [row for row in rows(tmp_path / "run/events.jsonl") if row["event"] == "loaded"]
    assert loaded["bytes"] == (toy[0] / "model.safetensors").stat().st_size  # of all processes together
    assert loaded["gb_per_s"] == pytest.approx(loaded["bytes"] / 1e9 / loaded["seconds"])


@pytest.mark.parametrize(
    ("words", "names", "said"),
    [
        ([], ("a", "a", "b"), "nodes have different numbers of processes: 2 on a, 1 on b; start as many on each, or use world"),
        (["deepspeed=zero2"], ("a", "b", "c"), "model.shards node needs ZeRO stage 3, and zero2 means stage 2 here"),
    ],
)  # fmt: skip
def test_shards_that_nodes_cannot_have_are_refused(toy, tmp_path, words, names, said):
    optim = {"global_batch_size": 6, "micro_batch_size": 1}
    config = run_config(*toy[:2], tmp_path / "run", model={"shards": "node"}, optim=optim)
    command = ["train", save_run(tmp_path / "run.yaml", config), *words]
    statuses, text = run_job(tmp_path / "logs", command, world_size=3, sabotage=two_hosts, arguments=(names,))
    assert statuses == [2] * 3, text
    assert text.count(said) == 1 and "Traceback" not in text
    assert not (tmp_path / "run/metrics.jsonl").exists()


# -- what moves --------------------------------------------------------------------------------------------------------


def bytes_across(process, path, hosts):
    """What a step and a knot carry to other nodes and within this one, and the bytes of A and B."""
    from cola_ds.config.loading import load_config
    from cola_ds.distributed.engine import evaluating
    from cola_ds.training.build import build_chain
    from cola_ds.training.knot import extend_chain, tie_knot
    from cola_ds.training.loop import train_step
    from cola_ds.training.prepare import prepare
    from cola_ds.training.settle import settle_engine
    from cola_ds.training.state import step_examples

    process_group(process)
    config = load_config(path)
    prepared = settle_engine(prepare(config, process.world_size), hosts, lambda: (2**40, 2**40))
    chain = build_chain(prepared, process, None)
    trained = sum(p.ds_numel * p.element_size() for p in chain.engine.module.parameters() if p.requires_grad)

    def counted(action):
        with CountedCollectives() as found:
            action()
        return found.by_place(hosts, process.rank)

    def step():
        train_step(chain.engine, step_examples(chain, chain.state.step), 1e-3, process.world_size)
        chain.state.step += 1

    step()  # the first one records what is fetched when
    step_bytes = counted(step)
    with evaluating(chain.engine):  # which leaves parameters in their shards
        pass
    return trained, step_bytes, counted(lambda: (tie_knot(chain), extend_chain(chain)))


@pytest.mark.parametrize("shards", ["node", "world"])
def test_no_base_weight_crosses_a_node(toy, tmp_path, shards):
    config = run_config(
        *toy[:2], tmp_path / "run", model={"shards": shards}, lora={"targets": "all-linear"}, chain={"length": 2},
        optim={"micro_batch_size": 2},
    )  # fmt: skip
    found = run_distributed(bytes_across, 4, save_run(tmp_path / "run.yaml", config), TWO_BY_TWO)
    for trained, step, knot in found:
        print(shards, trained, step, knot)
        if shards == "node":
            assert step[0] <= 2.2 * trained  # their gradients, and the new values
            assert knot[0] <= 2.2 * trained
            assert step[1] > 0
        else:
            assert step[0] > 4 * trained


def gathered_and_limits(process, path, hosts):
    """The parameters of each gather of a step, by number and with the size of their group; and the least limit of all groups."""
    from deepspeed import comm as dist
    from torch.distributed import distributed_c10d as c10d

    from cola_ds.config.loading import load_config
    from cola_ds.distributed.engine import evaluating
    from cola_ds.training.build import build_chain
    from cola_ds.training.loop import train_step
    from cola_ds.training.prepare import prepare
    from cola_ds.training.settle import settle_engine
    from cola_ds.training.state import step_examples

    process_group(process)
    config = load_config(path)
    prepared = settle_engine(prepare(config, process.world_size), hosts, lambda: (2**40, 2**40))
    chain = build_chain(prepared, process, None)
    coordinator = chain.engine.optimizer.parameter_offload.get_param_coordinator()
    name, seen = "_PartitionedParameterCoordinator__all_gather_params_", []
    gather = getattr(coordinator, name)

    def seeing(params, forward, quantize=False):
        seen.append([(param.ds_id, dist.get_world_size(param.ds_process_group)) for param in params])
        gather(params, forward, quantize=quantize)

    setattr(coordinator, name, seeing)
    with evaluating(chain.engine):  # which leaves all parameters in their shards
        pass
    train_step(chain.engine, step_examples(chain, chain.state.step), 1e-3, process.world_size)
    cpu = torch.device("cpu")
    limits = [group._get_backend(cpu).options._timeout.total_seconds() for group in c10d._world.pg_map]
    return seen, (len(limits), min(limits))


def test_two_groups_are_gathered_in_one_order_and_none_is_given_up(toy, tmp_path):
    """As NCCL wants it; and what a group waits for may take longer than torch's ten minutes: the watch is what ends a run."""
    config = run_config(
        *toy[:2],
        tmp_path / "run",
        model={"shards": "node"},
        lora={"targets": "all-linear"},
        optim={"micro_batch_size": 2},
    )
    found = run_distributed(gathered_and_limits, 4, save_run(tmp_path / "run.yaml", config), TWO_BY_TWO)
    orders = [seen for seen, _ in found]
    assert sum({size for _, size in params} == {2, 4} for params in orders[0]) > 3
    assert all(params == sorted(params) for seen in orders for params in seen)
    assert all(seen == orders[0] for seen in orders[1:])
    for groups, least in (limits for _, limits in found):
        assert groups >= 4 and least > 10 * 24 * 3600


# -- what is trained is the same on all nodes --------------------------------------------------------------------------


def averaged_over_nodes_alone(rank):
    """What happens where A and B are given the base's group."""
    two_hosts(rank)
    from cola_ds.distributed import engine

    inner = engine.deepspeed.initialize

    def initialize(model, **words):
        group = next(p.ds_process_group for p in model.parameters() if hasattr(p, "ds_id"))
        for param in model.parameters():
            if param.requires_grad:
                param.ds_zero_partition_process_group = group
        return inner(model=model, **words)

    engine.deepspeed.initialize = initialize


def with_another_A(rank):
    """A factor that nobody trains, on process 3 alone: one bit of one number."""
    two_hosts(rank)
    from cola_ds.lora.layers import lora_layers
    from cola_ds.training import loop

    inner, steps = loop.train_step, []

    def train_step(engine, *rest):
        steps.append(len(steps))
        if rank == 3 and len(steps) == 2:
            *_, layer = lora_layers(engine.module).values()
            layer.lora_A.view(-1).view(torch.int32)[-1] ^= 1
        return inner(engine, *rest)

    loop.train_step = train_step


@pytest.mark.parametrize("every", [2, 100])
def test_a_frozen_factor_that_differs_is_found(toy, tmp_path, every):
    """Before a checkpoint, and before a tie: nothing of it is saved."""
    config = run_config(
        *toy[:2], tmp_path / "run", model={"shards": "node"}, lora={"train": "B"}, checkpoint={"every_steps": every}
    )
    words = ["train", save_run(tmp_path / "run.yaml", config)]
    statuses, said = run_job(tmp_path / "logs", words, world_size=4, sabotage=with_another_A)
    assert statuses == [3] * 4, said
    step = 2 if every == 2 else 3
    assert f"A and B on process 3 are not those of process 0 after step {step}: the nodes have drifted apart" in said
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
    assert not list((tmp_path / "run").glob("chain/link-*"))


def test_nodes_that_drift_apart_are_found(toy, tmp_path):
    config = run_config(*toy[:2], tmp_path / "run", model={"shards": "node"}, checkpoint={"every_steps": 2})
    words = ["train", save_run(tmp_path / "run.yaml", config)]
    statuses, said = run_job(tmp_path / "logs", words, world_size=4, sabotage=averaged_over_nodes_alone)
    assert statuses == [3] * 4, said
    assert "A and B on process 2 are not those of process 0 after step 2: the nodes have drifted apart" in said
    assert not list((tmp_path / "run/checkpoints").glob("step-*"))
