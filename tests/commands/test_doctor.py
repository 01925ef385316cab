"""`cola-ds doctor`, and how processes meet: healthy, and with each of the faults that it is there to name."""

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from cola_ds.commands import machine
from cola_ds.commands.doctor import slow_pairs, some_rounds, tournament
from cola_ds.distributed.launcher import slurm_nodes
from cola_ds.errors import some_of
from tests.support.jobs import Job, at_call, run_job
from tests.support.launching import Cluster, clean_environment
from tests.support.runs import three_links
from tests.support.toys import REPOSITORY, save_run

HOST = socket.gethostname()
CHECKS = [
    "arrival", "group", "versions", "accelerator", "compilation", "folder", "temporary files", "shared memory", "memory",
    "shared folder", "clocks", "names", "collectives", "pairs of hosts",
]  # fmt: skip


def examine(folder, *words, **options):
    """Exit statuses, what was printed, and of each row what was found and what was said of it."""
    statuses, said = run_job(folder / "job", ["doctor", *words], **options)
    return statuses, said, table(said)


def table(said):
    lines = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| ")]
    return {check: (found, result) for check, found, result in lines[2:]}


def faults(found):
    return {check: result for check, (_, result) in found.items() if result != "ok"}


@pytest.fixture
def folder(tmp_path):
    """Where runs would be: what is in it must stay as it is."""
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "other").write_text("as it was", encoding="utf-8")
    yield folder
    assert [path.name for path in folder.iterdir()] == ["other"]
    assert (folder / "other").read_text(encoding="utf-8") == "as it was"


@pytest.fixture
def run_file(toy, tmp_path):
    config = three_links(toy)
    config["run"]["dir"] = str(tmp_path / "runs/a/b")
    return save_run(tmp_path / "run.yaml", config)


# -- healthy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2])
def test_healthy(folder, tmp_path, world_size):
    statuses, said, found = examine(tmp_path, "--dir", folder, world_size=world_size)
    assert statuses == [0] * world_size, said
    assert list(found) == CHECKS
    assert not faults(found)
    assert said.count("a run would work here") == 1
    processes = {1: "1 process", 2: "2 processes"}[world_size]
    assert found["arrival"][0].startswith(f"all of {processes}, after ")
    assert found["group"][0].startswith(f"gloo, on {HOST}, after ")
    assert found["folder"][0].startswith(f"{folder}: ")
    assert re.search(r"all-reduce \d+\.\d ms, all-gather \d+\.\d ms$", found["collectives"][0])
    assert found["compilation"][0].startswith("deepspeed_shm_comm compiled before, in ")


def test_healthy_with_a_run(run_file, folder, tmp_path):
    """Its folder is still to be made, and is not made here: the one above it is looked at."""
    statuses, said, found = examine(tmp_path, run_file, "optim.lr=0.003")
    assert statuses == [0, 0], said
    assert list(found) == [*CHECKS[:3], "config", *CHECKS[3:]]
    assert not faults(found)
    assert found["folder"][0].startswith(f"{folder}: ")
    assert found["shared folder"][0].startswith(f"{folder}, ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--wait", "0"], "--wait must be a positive number of seconds"),
        (["RUN.yaml", "--dir", "."], "--dir goes without RUN.yaml"),
        (["RUN.yaml", "lora.rnk=4"], "did you mean lora.rank?"),
        (["RUN.yaml", "deepspeed=nowhere.json"], "cannot read the DeepSpeed JSON nowhere.json"),
    ],
)
def test_a_mistake_in_the_call(run_file, tmp_path, words, message):
    words = [run_file if word == "RUN.yaml" else word for word in words]
    statuses, said, found = examine(tmp_path, *words, world_size=1)
    assert statuses == [2], said
    assert message in said
    assert not found


# -- folders, versions, configs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["/sys/kernel", "missing"])
def test_a_folder_that_cannot_be_written(tmp_path, where):
    statuses, said, found = examine(tmp_path, "--dir", tmp_path / where, world_size=1)
    assert statuses == [1], said
    assert list(faults(found)) == ["folder", "shared folder"]
    reason = "No such file or directory" if where == "missing" else "(Permission denied|Read-only file system)"
    assert re.match(f"FAILED: {tmp_path / where} on {HOST}: {reason}; name another folder", found["folder"][1])
    assert "a run would fail here" in said
    assert not (tmp_path / "missing").exists()


def work_elsewhere(rank, folder):
    """The second process finds relative paths in a folder of its own, as a node with its own disk does."""
    from cola_ds.commands import doctor

    doctor.SHARED_WITHIN_S = 2
    os.chdir(folder / f"node-{rank}")


def test_a_folder_that_one_node_does_not_see(tmp_path):
    for rank in range(2):
        (tmp_path / f"node-{rank}/runs").mkdir(parents=True)
    statuses, said, found = examine(tmp_path, "--dir", "runs", sabotage=work_elsewhere, arguments=(tmp_path,))
    assert statuses == [1, 1], said
    assert list(faults(found)) == ["shared folder"]
    assert found["shared folder"][1].startswith(f"FAILED: not the same folder on {HOST} (process 1); name one on a")
    assert not [*tmp_path.glob("node-*/runs/*"), *tmp_path.glob("node-*/runs/.*")]


def install(rank, folder):
    """The second process has another version of a package."""
    if rank == 1:
        sys.path.insert(0, str(folder))


def another_datasets(folder):
    (folder / "datasets-9.9.9.dist-info").mkdir(parents=True)
    metadata = "Metadata-Version: 2.1\nName: datasets\nVersion: 9.9.9\n"
    (folder / "datasets-9.9.9.dist-info/METADATA").write_text(metadata, encoding="utf-8")
    return folder


def test_another_package_version_on_one_node(folder, tmp_path):
    other = another_datasets(tmp_path / "other")
    statuses, said, found = examine(tmp_path, "--dir", folder, sabotage=install, arguments=(other,))
    assert statuses == [1, 1], said
    assert list(faults(found)) == ["versions"]
    expected = f"FAILED: process 1 on {HOST} differs from process 0 on {HOST}: datasets 9.9.9 / "
    assert found["versions"][1].startswith(expected)


def test_another_config_on_one_node(run_file, folder, tmp_path):
    for rank, rate in enumerate(("0.002", "0.003")):
        (tmp_path / f"node-{rank}").mkdir()
        text = run_file.read_text(encoding="utf-8")
        (tmp_path / f"node-{rank}/run.yaml").write_text(re.sub(r"lr: \S+", f"lr: {rate}", text), encoding="utf-8")
    statuses, said, found = examine(tmp_path, "run.yaml", sabotage=work_elsewhere, arguments=(tmp_path,))
    assert statuses == [1, 1], said
    assert list(faults(found)) == ["config"]
    assert found["config"][1].startswith(f"FAILED: process 1 on {HOST} differs from process 0 on {HOST}: config ")


def another_machine(rank):
    """The second process's accelerator is another one, which has no bf16; and no C++ compiler is there."""
    from cola_ds.distributed import accelerator

    if rank == 1:
        compilation = accelerator.compilation_facts()
        accelerator._dtypes = lambda: ["fp32"]
        accelerator.accelerator_name = lambda: "abacus"
        accelerator.compilation_facts = lambda: {**compilation, "compiled": False, "compiler": None}


def test_another_machine(run_file, folder, tmp_path):
    statuses, said, found = examine(
        tmp_path, run_file, "model.dtype=bf16", sabotage=unlike, arguments=(another_machine,)
    )
    assert statuses == [1, 1], said
    assert list(faults(found)) == ["accelerator", "compilation"]
    assert found["accelerator"][1] == (
        "FAILED: no bf16 on node-1; set model.dtype to one of fp32; "
        "warning: process 1 on node-1 differs from process 0 on node-0: accelerator abacus / cpu"
    )
    assert found["compilation"][1] == "FAILED: no C++ compiler on node-1; install g++, or set CXX"


def no_ninja(rank):
    os.environ["PATH"] = "/nowhere"
    sys.executable = "/nowhere/python"  # beside which one would lie


def test_nothing_to_compile_with(folder, tmp_path):
    statuses, said, found = examine(tmp_path, "--dir", folder, world_size=1, sabotage=no_ninja)
    assert statuses == [1], said
    assert list(faults(found)) == ["arrival", "compilation"]
    assert found["arrival"][1].startswith(f"FAILED: no group of processes on {HOST}: ")
    assert found["compilation"][1].startswith(f"FAILED: no ninja on {HOST}; activate the virtual environment")


def little_room(rank):
    from cola_ds.commands import machine

    for name, (_, remedy) in machine._ROOM.items():
        machine._ROOM[name] = (2**60, remedy)


def test_little_room(folder, tmp_path):
    statuses, said, found = examine(tmp_path, "--dir", folder, world_size=1, sabotage=little_room)
    assert statuses == [0], said
    assert list(faults(found)) == ["folder", "temporary files", "shared memory", "memory"]
    assert found["memory"][1] == f"warning: little on {HOST}; start fewer processes, or ask for more memory"


# -- hosts, clocks and the network between them ------------------------------------------------------------------------


def unlike(rank, more=None):
    """Each process is on a host of its own."""
    socket.gethostname = lambda: f"node-{rank}"
    if more:
        more(rank)


def slow_between_1_and_2(rank):
    """One process measures so; and the third one's clock is late."""
    from cola_ds.distributed import collectives

    collectives.time_exchange = lambda peer, size: (5 if {rank, peer} == {1, 2} else 1) * 1e-9 * size
    if rank == 2:
        true_time = time.time
        time.time = lambda: true_time() - 5


def test_a_slow_pair_and_a_slow_clock(folder, tmp_path):
    arguments = (slow_between_1_and_2,)
    statuses, said, found = examine(tmp_path, "--dir", folder, world_size=3, sabotage=unlike, arguments=arguments)
    assert statuses == [0, 0, 0], said
    assert list(faults(found)) == ["clocks", "pairs of hosts"]
    assert found["clocks"][1] == "warning: node-2 by -5.0 s; synchronize its clock (NTP)"
    assert found["pairs of hosts"] == (
        "3, each way: median 8.00 Gbit/s, least node-1 - node-2 1.60 Gbit/s",
        "warning: slow: node-1 - node-2 1.60 Gbit/s; look at the network between them",
    )


def few_rounds_and_bytes(rank):
    """As with many hosts; and each process says what it holds of an all-gather."""
    from cola_ds.commands import doctor

    doctor._MOST_ROUNDS, doctor._GATHERED_BYTES = 1, 2**20
    doctor.collectives.time_exchange = lambda peer, size: 1e-9 * size
    from deepspeed import comm

    inner = comm.all_gather

    def all_gather(theirs, mine, *args, **words):
        if mine.nbytes > 2**16:
            print(f"holds {sum(each.nbytes for each in theirs)}", flush=True)
        return inner(theirs, mine, *args, **words)

    comm.all_gather = all_gather


def test_what_grows_with_processes_is_bounded(folder, tmp_path):
    arguments = (few_rounds_and_bytes,)
    statuses, said, found = examine(tmp_path, "--dir", folder, world_size=4, sabotage=unlike, arguments=arguments)
    assert statuses == [0] * 4, said
    assert found["collectives"][0].startswith("4 MiB of each of 4 processes (all-gather: 256 KiB): all-reduce ")
    assert set(re.findall(r"holds (\d+)", said)) == {str(2**20)}
    assert found["pairs of hosts"] == ("2 of 6, each way: median 8.00 Gbit/s, least node-0 - node-3 8.00 Gbit/s", "ok")


def slow_names(rank):
    """The second process's machine asks a server of names that does not answer for a second, and then says that there is none."""
    if rank == 1:

        def ask(address, flags):
            time.sleep(1)
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

        socket.getnameinfo = ask


def test_slow_names(folder, tmp_path):
    statuses, said, found = examine(tmp_path, "--dir", folder, sabotage=unlike, arguments=(slow_names,))
    assert statuses == [0, 0], said
    assert list(faults(found)) == ["names"]
    assert re.fullmatch(r"at most 1\.\d\d s for that of another host's address", found["names"][0])
    assert found["names"][1] == (
        "warning: slow on node-1; connections wait for them as a run begins: repair the reverse DNS, or write lines "
        "::ffff:ADDRESS HOST into /etc/hosts"
    )


def test_names_that_never_come(monkeypatch):
    """Are waited for so long; those that do come, one after another."""
    monkeypatch.setattr(machine, "_LOOKS_UP_S", 0.3)
    asked = []
    monkeypatch.setattr(socket, "getnameinfo", lambda address, flags: asked.append(address[0]))
    assert machine.name_lookup_s([]) == 0
    assert machine.name_lookup_s(["10.0.0.1", "fe80::2"]) < 0.3
    assert asked == ["::ffff:10.0.0.1", "fe80::2"]
    monkeypatch.setattr(socket, "getnameinfo", lambda address, flags: time.sleep(1 if address[0] == "::b" else 0))
    assert 0.2 < machine.name_lookup_s(["::a", "::b", "::c"]) < 0.9


def test_an_own_address():
    assert machine.address_of("127.0.0.1") == machine.address_towards("127.0.0.1") == "127.0.0.1"
    assert machine.address_of("no such host") == machine.address_towards("no such host") == ""


def test_pairs_are_measured(folder, tmp_path):
    statuses, said, found = examine(tmp_path, "--dir", folder, world_size=3, sabotage=unlike)
    assert statuses == [0, 0, 0], said
    assert re.match(r"3, each way: median \d+\.\d\d Gbit/s, least node-\d - node-\d \d", found["pairs of hosts"][0])


@pytest.mark.parametrize("teams", range(2, 10))
def test_a_tournament_has_every_pair_once(teams):
    rounds = tournament(teams)
    assert len(rounds) == teams - 1 + teams % 2
    for pairs in rounds:
        assert len({team for pair in pairs for team in pair}) == 2 * (teams // 2)  # nobody twice, at most one rests
    met = sorted(tuple(sorted(pair)) for pairs in rounds for pair in pairs)
    assert met == list(itertools.combinations(range(teams), 2))


def test_one_host_meets_nobody():
    assert not [pair for pairs in tournament(1) for pair in pairs]
    assert not [pair for pairs in some_rounds(tournament(1)) for pair in pairs]


@pytest.mark.parametrize("hosts", [2, 12, 13, 14, 64, 512])
def test_of_many_hosts_each_meets_twelve(hosts):
    """Rounds take as long as there are; of a few hosts all pairs are tried."""
    rounds = some_rounds(tournament(hosts))
    assert len(rounds) == min(12, len(tournament(hosts)))
    if hosts <= 12:
        assert rounds == tournament(hosts)
    met = [tuple(sorted(pair)) for pairs in rounds for pair in pairs]
    assert len(set(met)) == len(met)
    times = [sum(host in pair for pair in met) for host in range(hosts)]
    assert min(times) >= min(11, hosts - 1)


def test_slow_pairs():
    assert slow_pairs({"a - b": 1.0}) == []
    assert slow_pairs({"a - b": 1.0, "a - c": 1.9, "b - c": 1.0}) == []
    assert slow_pairs({"a - b": 1.0, "a - c": 2.1, "b - c": 1.0}) == ["a - c"]


def test_names_for_messages():
    assert some_of(list("abcdef")) == "a, b, c, d, e, f"
    assert some_of(list("abcdefgh")) == "a, b, c, d, e, f, and 2 more"


def test_the_nodes_of_a_slurm_list():
    assert slurm_nodes("") == []
    assert slurm_nodes("n1") == ["n1"]
    assert slurm_nodes("a1,b[2-3,07]-ib,c") == ["a1", "b2-ib", "b3-ib", "b07-ib", "c"]
    assert slurm_nodes("rack[08-10]") == ["rack08", "rack09", "rack10"]


# -- arrival -----------------------------------------------------------------------------------------------------------


def never_arrive(rank, absent):
    from cola_ds import cli

    cli._PATIENCE_S = 4  # no launcher ends it
    if rank in absent:
        os._exit(7)


def test_a_process_that_does_not_arrive(folder, tmp_path):
    begin = time.monotonic()
    statuses, said, found = examine(
        tmp_path, "--dir", folder, "--wait", 3, world_size=3, sabotage=never_arrive, arguments=((2,),)
    )
    assert statuses == [1, 1, 7], said
    assert time.monotonic() - begin < 40
    assert list(found) == [CHECKS[0], *CHECKS[2:9]]  # what is known without the others
    assert list(faults(found)) == ["arrival"]
    message = f"process 2 did not arrive within 3 s; 2 of 3 did, from {HOST}; look at what the others printed"
    assert found["arrival"][1].startswith(f"FAILED: {message}")
    # Process 1 has heard of it, as its status says; it is silent where process 0, whose table has it, ends soon enough.


def lead_astray(rank):
    """The second process looks for process 0 where nobody is."""
    if rank == 1:
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="9", LOCAL_RANK="0")


def test_a_process_that_cannot_reach_process_0(folder, tmp_path):
    statuses, said, found = examine(tmp_path, "--dir", folder, "--wait", 2, sabotage=lead_astray)
    assert statuses == [1, 1], said
    assert found["arrival"][1].startswith("FAILED: process 1 did not arrive within 2 s")
    assert f"cola-ds: process 1 on {HOST} cannot reach process 0 at localhost (" in said
    assert "127.0.0.1), port 9, within 2 s: Connection refused; see that process 0 runs" in said
    assert "GLOO_SOCKET_IFNAME" in said
    assert f"(process 1 on {HOST})" not in said  # it has not waited for process 0 to say so
    assert "Traceback" not in said


def take_the_port(rank):
    """Somebody else's, and nobody listens."""
    os.environ["LOCAL_RANK"] = "0"
    if rank == 0:
        global _taken
        _taken = socket.socket()
        _taken.bind(("", int(os.environ["MASTER_PORT"])))


def test_a_port_in_use(folder, tmp_path):
    statuses, said, found = examine(tmp_path, "--dir", folder, "--wait", 2, sabotage=take_the_port)
    assert statuses == [1, 1], said
    assert re.match(rf"FAILED: MASTER_PORT \d+ on {HOST}: Address already in use; set another", found["arrival"][1])
    assert f"process 1 on {HOST} cannot reach process 0 at 127.0.0.1" in said


def wait_less(rank):
    """In training nobody waits for long; the second process is never there."""
    never_arrive(rank, (1,))
    from cola_ds.distributed import collectives

    inner = collectives.init_process_group
    collectives.init_process_group = lambda process, **options: inner(process, wait_s=1, **options)


def test_training_without_a_process(run_file, tmp_path):
    statuses, said = run_job(tmp_path / "job", ["train", run_file], sabotage=wait_less)
    assert statuses == [2, 7], said
    assert f"cola-ds: process 1 did not arrive within 1 s; 1 of 2 did, from {HOST}" in said
    assert "Traceback" not in said
    assert not (tmp_path / "runs").exists()


def test_training_when_a_process_dies_before_the_group_begins(run_file, tmp_path):
    """After all have arrived: the watch is there already."""
    arguments = ((1,), "deepspeed", "init_distributed", 1, signal.SIGKILL)
    begin = time.monotonic()
    statuses, said = run_job(tmp_path / "job", ["train", run_file], sabotage=at_call, arguments=arguments)
    assert statuses == [3, -signal.SIGKILL], said
    assert time.monotonic() - begin < 30
    assert re.search(r"cola-ds: process 1 on .* died; it was at starting", said)


# -- in the middle -----------------------------------------------------------------------------------------------------


def test_a_process_that_dies(folder, tmp_path):
    """While the file is there that all must see."""
    arguments = ((1,), "cola_ds.distributed.collectives", "all_gather_numbers", 1, signal.SIGKILL)
    statuses, said, found = examine(tmp_path, "--dir", folder, sabotage=at_call, arguments=arguments)
    assert statuses == [1, -signal.SIGKILL], said
    assert re.search(rf"cola-ds: process 1 on {HOST} \(pid \d+\) died; it was at ", said)
    assert list(found) == CHECKS[:9]


def hang(rank):
    """As a network file system does whose server is gone."""
    from cola_ds.commands import doctor

    doctor._HANG_S = 3
    at_call(rank, (1,), "cola_ds.commands.machine", "_room_in", 1, ("sleep", 300))


def test_a_process_that_hangs(folder, tmp_path):
    statuses, said, found = examine(tmp_path, "--dir", folder, "--wait", 3, sabotage=hang)
    assert statuses == [1, 1], said
    assert re.search(rf"process 1 on {HOST} \(pid \d+\) made no progress for \d+ s, at what the machines have", said)
    assert "in called" in said  # its stack
    assert list(found) == ["arrival"]


def test_a_signal(folder, tmp_path):
    """As a launcher sends it to all: that ends it, and leaves nothing behind, also while process 0 waits in a collective."""
    words = ["doctor", "--dir", folder]
    arguments = ((1,), "cola_ds.distributed.collectives", "all_gather_numbers", 1, ("sleep", 300))
    with Job(tmp_path / "job", words, sabotage=at_call, arguments=arguments) as job:
        deadline = time.monotonic() + 120
        while not list(folder.glob(".cola-ds-doctor-*")):
            assert time.monotonic() < deadline, job.text()
            time.sleep(0.05)
        for rank in range(2):
            job.send(rank, signal.SIGTERM)
        assert job.wait(60) == [1, 1], job.text()


# -- on two machines ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """/var/tmp is each node's own."""
    options = {"MS_PRIVATE": "/var/tmp", "MS_NET": "10.214.0", "MS_TIMEOUT": "60"}
    with Cluster(tmp_path_factory.mktemp("slurm"), **options) as cluster:
        yield cluster


def on_two_nodes(cluster, folder, *words, before="true", meanwhile=None):
    """Exit status, what was printed, and the table, of one process on each node. `before` is a shell command on each."""
    script = f'{before}; exec "$0" -m cola_ds doctor "$@"'
    srun = ["srun", "-N2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--chdir", str(REPOSITORY)]
    command = [*cluster.head, *srun, "bash", "-c", script, sys.executable, *map(str, words)]
    env = {**clean_environment(), **cluster.own}
    with open(folder / "out.txt", "w", encoding="utf-8") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        if meanwhile:
            meanwhile()
        status = process.wait(180)
    finally:
        process.kill()
    said = (folder / "out.txt").read_text(encoding="utf-8")
    return status, said, table(said)


def wait_until(happened, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_two_nodes(cluster, folder, tmp_path):
    status, said, found = on_two_nodes(cluster, tmp_path, "--dir", folder)
    assert status == 0, said
    assert list(found) == CHECKS
    assert not faults(found)
    assert found["group"][0].startswith("gloo, on n1, n2, after ")
    assert re.match(r"1, each way: median \d+\.\d\d Gbit/s, least n1 - n2 \d", found["pairs of hosts"][0])


def test_a_folder_that_is_each_nodes_own(cluster, tmp_path):
    status, said, found = on_two_nodes(cluster, tmp_path, "--dir", "/var/tmp")
    assert status == 1, said
    assert list(faults(found)) == ["shared folder"]
    assert found["shared folder"][1].startswith("FAILED: not the same folder on n2 (process 1); ")


def test_a_node_with_another_package_version(cluster, folder, tmp_path):
    another_datasets(tmp_path / "other")
    before = f'[ "$SLURM_PROCID" = 0 ] || export PYTHONPATH={tmp_path / "other"}'
    status, said, found = on_two_nodes(cluster, tmp_path, "--dir", folder, before=before)
    assert status == 1, said
    assert list(faults(found)) == ["versions"]
    assert found["versions"][1].startswith("FAILED: process 1 on n2 differs from process 0 on n1: datasets 9.9.9 / ")


def test_a_node_without_its_network(cluster, folder, tmp_path):
    """Cut off when its process has begun. Its own words arrive when the network is back."""

    def cut():
        wait_until(lambda: all((tmp_path / f"begun-{rank}").exists() for rank in range(2)))
        cluster.do("cut", "n2")
        try:
            wait_until(lambda: "a run would fail here" in (tmp_path / "out.txt").read_text(encoding="utf-8"))
        finally:
            cluster.do("heal", "n2")

    before = f"touch {tmp_path}/begun-$SLURM_PROCID; sleep 1"
    status, said, found = on_two_nodes(cluster, tmp_path, "--dir", folder, "--wait", 4, before=before, meanwhile=cut)
    assert status == 1, said
    assert list(faults(found)) == ["arrival"]
    assert found["arrival"][1].startswith(
        "FAILED: process 1 did not arrive within 4 s (none from n2); 1 of 2 did, from n1; "
    )
    assert "cola-ds: process 1 on n2 cannot reach process 0 at n1 (10.214.0.11), port " in said


def test_an_interface_that_leads_nowhere(cluster, folder, tmp_path):
    """All have arrived, but the group does not begin: gloo would keep one of them waiting for five times its ten minutes."""
    begin = time.monotonic()
    status, said, found = on_two_nodes(cluster, tmp_path, "--dir", folder, before="export GLOO_SOCKET_IFNAME=lo")
    assert status == 1, said
    assert time.monotonic() - begin < 150
    assert found["arrival"][1] == "ok"
    assert re.search(r"no group of processes on n\d: Gloo connectFullMesh failed", said)
    assert "GLOO_SOCKET_IFNAME name the interface between them" in said
