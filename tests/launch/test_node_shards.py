"""Shards of frozen weights in each node, on a real cluster of two nodes with two processes each (mini-slurm.sh): the bits of
shards over all processes under every launcher, and what the nodes' network interfaces say of the bytes between them."""

import json
import os
import shlex
import shutil
import subprocess
from contextlib import ExitStack

import pytest

from tests.support import forked
from tests.support.jobs import run_job
from tests.support.launching import Cluster, clean_environment
from tests.support.runs import record, three_links
from tests.support.toys import REPOSITORY, rows, run_config, save_model, save_run


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm"), MS_GPUS="2") as cluster:  # GPUs by name only
        yield cluster


@pytest.fixture(scope="module")
def forking(cluster, tmp_path_factory):
    """A command that is `cola-ds` on either node, forked from a server there that has made the imports."""
    folder = tmp_path_factory.mktemp("forked")
    with ExitStack() as servers:
        for node in ("n1", "n2"):
            within = ("env", f"MS_DIR={cluster.own['MS_DIR']}", cluster.head[0], "on", node)
            server = servers.enter_context(forked.Server(folder, node, within))
        yield ["bash", "-c", f'exec {shlex.join(server.command[:-1])} "$0/$(hostname).socket" "$@"', str(folder)]


@pytest.fixture(scope="module")
def config(toy):
    """Three links: one begun by a rebuilt engine, one in place."""
    optim = {"max_steps": 6, "micro_batch_size": 2}
    return three_links(toy, optim=optim, run={"log_every_steps": 1}, eval={"every": "end"})


@pytest.fixture(scope="module")
def world(config, tmp_path_factory):
    """What such a run leaves whose shards lie on all of four processes, on one machine and without a launcher."""
    folder = tmp_path_factory.mktemp("world")
    statuses, text = run_job(folder / "job", ["train", run_file(config, folder, "world")], world_size=4)
    assert statuses == [0] * 4, text
    return record(folder / "run")


def run_file(config, folder, shards, **sections):
    config = {
        **config,
        "model": {**config["model"], "shards": shards},
        "run": {**config["run"], "dir": str(folder / "run")},
    }
    for name, values in sections.items():
        config[name] = {**config[name], **values}
    return save_run(folder / "run.yaml", config)


def environment(cluster):
    names = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**clean_environment(), **cluster.own, **names}


def finished(processes):
    """The statuses of running commands, and what they said."""
    said = [process.communicate(timeout=300)[0] for process in processes]
    return [process.returncode for process in processes], "\n".join(said)


def started(words, cluster, **env):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(list(map(str, words)), cwd=REPOSITORY, env={**environment(cluster), **env}, **options)


def srun(cluster, forking, *words, in_turn=False):
    """Status and output of `cola-ds WORDS`, by Slurm on both nodes."""
    cluster.wait_for_nodes()
    options = ["--ntasks-per-node=2", f"--distribution={'cyclic' if in_turn else 'block'}"]
    command = [*cluster.head, "srun", "-N2", *options, "--kill-on-bad-exit=1", "--chdir", REPOSITORY, *forking, *words]
    statuses, said = finished([started(command, cluster)])
    return statuses[0], said


def launch(way, cluster, path, folder):
    """Start a run on both nodes as the documents say. Returns the statuses of all that was started, and what it said."""
    if way == "slurm/submit.sh":
        job, frozen = cluster.submit(clean_environment(), "--nodes", "2", "--gpus", "2", path)
        state = cluster.wait_for(job, "COMPLETED", "FAILED")
        return [int(state == "FAILED")], "\n".join(log.read_text() for log in frozen.rglob("*.log"))
    if way == "launch/torchrun.sh":
        words = [f"./{way}", path, "2"]
        variables = {"NNODES": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "29511"}
        nodes = [[cluster.head[0], "on", node, *words] for node in ("n1", "n2")]
        return finished([started(node, cluster, NODE_RANK=str(i), **variables) for i, node in enumerate(nodes)])
    if way == "launch/mpirun.sh":
        return mpirun(cluster, path, "n1:2", "n2:2")
    need_ssh()
    (folder / "hosts").write_text("n1 slots=2\n# the second\nn2 slots=2\n", encoding="utf-8")
    return finished([started([*cluster.head, f"./{way}", path, folder / "hosts"], cluster)])


def mpirun(cluster, path, *hosts):
    need_ssh()
    count = sum(int(host.partition(":")[2]) for host in hosts)
    words = ["./launch/mpirun.sh", path, count, "--", "--host", ",".join(hosts)]
    return finished([started([*cluster.head, *words], cluster)])


def need_ssh():
    if shutil.which("pdsh") is None or not os.path.exists("/usr/sbin/sshd"):
        pytest.skip("ssh between nodes is not installed: apt-get install openssh-server pdsh")


@pytest.mark.parametrize("way", ["slurm/submit.sh", "launch/hostfile.sh", "launch/torchrun.sh", "launch/mpirun.sh"])
def test_the_bits_of_the_world_under_every_launcher(cluster, config, world, tmp_path, way):
    statuses, said = launch(way, cluster, run_file(config, tmp_path, "auto"), tmp_path)
    assert not any(statuses), said
    found = json.loads((tmp_path / "run/environment.json").read_text(encoding="utf-8"))
    assert (found["world_size"], found["hosts"], found["shards"]) == (4, ["n1", "n2"], "node"), said
    assert record(tmp_path / "run") == world


def test_ranks_that_are_dealt_to_the_nodes_in_turn(cluster, forking, config, world, tmp_path):
    path = run_file(config, tmp_path, "node")
    status, said = srun(cluster, forking, "train", path, in_turn=True)
    assert status == 0, said
    assert "in each of 2 nodes" in said
    assert record(tmp_path / "run") == world


def test_nodes_with_different_numbers_of_processes_are_refused(cluster, config, tmp_path):
    path = run_file(config, tmp_path, "node", optim={"global_batch_size": 6})
    statuses, said = mpirun(cluster, path, "n1:2", "n2:1")
    assert statuses == [2], said
    line = "nodes have different numbers of processes: 2 on n1, 1 on n2; start as many on each, or use world"
    assert said.count(line) == 1
    assert "Traceback" not in said
    assert not (tmp_path / "run/metrics.jsonl").exists()


# -- what the network carries ------------------------------------------------------------------------------------------

STEPS = (2, 8)
LORA_RANK, WIDTH, LAYERS = 64, 256, 2
WIDER = (512, 2048)
"""Of the MLP, in two bases: no adapter touches it."""
TRAINED = 4 * 2 * 2 * LAYERS * LORA_RANK * WIDTH  # bytes of A and B, of q and v
GROWTH = 4 * 3 * LAYERS * WIDTH * (WIDER[1] - WIDER[0])


@pytest.fixture(scope="module")
def bytes_a_step(cluster, forking, toy, tmp_path_factory):
    """`bytes_a_step(shards, wide)`: what a step carries between the nodes. It is the difference of two runs, in which all that a
    run carries beside its steps is the same. A and B are resident, as they are with the sizes that follow from a model."""
    engine = json.loads((REPOSITORY / "tests/support/zero3_sharded.json").read_text(encoding="utf-8"))
    engine["zero_optimization"]["stage3_param_persistence_threshold"] = LORA_RANK * WIDTH
    (json_file := tmp_path_factory.mktemp("engine") / "zero3.json").write_text(json.dumps(engine), encoding="utf-8")
    models = {}

    def count(shards, wide, in_turn=False):
        if wide not in models:
            models[wide] = save_model(
                tmp_path_factory.mktemp("model"), hidden_size=WIDTH, num_hidden_layers=LAYERS, num_key_value_heads=4,
                intermediate_size=wide,
            )  # fmt: skip
        totals = []
        for steps in STEPS:
            folder = tmp_path_factory.mktemp("counted")
            config = run_config(
                models[wide], toy[1], folder / "run", model={"shards": shards}, lora={"rank": LORA_RANK},
                chain={"length": 1}, optim={"max_steps": steps}, deepspeed=str(json_file),
            )  # fmt: skip
            cluster.wait_for_nodes()
            before = cluster.carried()
            status, said = srun(cluster, forking, "train", save_run(folder / "run.yaml", config), in_turn=in_turn)
            totals.append(cluster.carried() - before)
            assert status == 0, said
            assert len(rows(folder / "run/metrics.jsonl")) == steps
        a_step = (totals[1] - totals[0]) / (STEPS[1] - STEPS[0])
        print(f"{shards}, {'in turn, ' * in_turn}{wide} wide: {a_step:,.0f} bytes a step between nodes")
        return a_step

    return count


def test_no_byte_of_the_base_goes_from_node_to_node(bytes_a_step):
    """gloo's ring over 0 1 | 2 3 crosses twice: a gather of n bytes carries 3/4 n over each crossing, a reduction twice that."""
    print(f"A and B: {TRAINED:,} bytes; the MLP grows by {GROWTH:,}")
    narrow, wide = (bytes_a_step("node", each) for each in WIDER)
    assert wide - narrow == pytest.approx(0, abs=0.01 * GROWTH)
    assert wide == pytest.approx(4.5 * TRAINED, rel=0.05)  # gradients reduced, new values gathered; and headers
    narrow, wide = (bytes_a_step("world", each) for each in WIDER)
    assert wide - narrow == pytest.approx(3 * GROWTH, rel=0.05)  # gathered in the forward pass and in the backward pass


def test_nor_where_ranks_are_dealt_in_turn(bytes_a_step):
    """The ring of A and B crosses at every edge; those of the base do not cross at all."""
    assert bytes_a_step("node", WIDER[1], in_turn=True) == pytest.approx(9 * TRAINED, rel=0.05)
