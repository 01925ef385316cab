"""Which process am I: what each launcher sets, and what is refused. Real launchers are in test_launchers.py."""

import socket

import pytest

from cola_ds.distributed import launcher
from cola_ds.distributed.launcher import Process, first_host, identify
from cola_ds.errors import UserError

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
HYDRA = {"PMI_RANK": "3", "MPI_LOCALRANKID": "1", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "2"}
SRUN = {
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu-[07,09]", "SLURM_NTASKS": "4",
}  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    """Sets an environment without any launcher but the given one; what `identify` sets is undone."""
    import os

    def use(values):
        for name in [*NAMES, *(n for n in os.environ if n.startswith(("OMPI_", "PMI_", "MPI_", "SLURM_")))]:
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    yield use
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("values", "process", "address"),
    [
        ({}, Process(0, 0, 1), "127.0.0.1"),
        ({"MASTER_ADDR": "lingering", "MASTER_PORT": "1"}, Process(0, 0, 1), "lingering"),
        (dict(zip(NAMES, ("5", "1", "8", "host", "29500"), strict=True)), Process(5, 1, 8), "host"),
        (MPIRUN, Process(1, 1, 2), "127.0.0.1"),
        ({**HYDRA, "MASTER_ADDR": "first", "MASTER_PORT": "29501"}, Process(3, 1, 4), "first"),
        (SRUN, Process(3, 1, 4), "gpu-07"),
        ({**SRUN, "MASTER_ADDR": "ib-07"}, Process(3, 1, 4), "ib-07"),  # explicit settings win
        ({**SRUN, **MPIRUN}, Process(1, 1, 2), "127.0.0.1"),  # mpirun inside a Slurm job
        (
            {"SLURM_PROCID": "0", "SLURM_JOB_ID": "77", "SLURM_NTASKS": "4"},
            Process(0, 0, 1),
            "127.0.0.1",
        ),  # a batch script
    ],
)
def test_each_launcher(environment, values, process, address):
    import os

    environment(values)
    assert identify() == process
    assert os.environ["MASTER_ADDR"] == address
    assert [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == [
        str(number) for number in (process.rank, process.local_rank, process.world_size)
    ]


def test_every_task_of_a_step_derives_the_same_port_and_another_job_another(environment):
    import os

    ports = []
    for changes in ({}, {"SLURM_PROCID": "0"}, {"SLURM_JOB_ID": "78"}):
        environment({**SRUN, **changes})
        identify()
        ports.append(int(os.environ["MASTER_PORT"]))
    assert ports[0] == ports[1] != ports[2]
    assert all(20000 <= port < 30000 for port in ports)


@pytest.mark.parametrize(
    ("values", "missing"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR, MASTER_PORT"),
    ],
)
def test_a_half_set_environment_is_refused(environment, values, missing):
    environment(values)
    with pytest.raises(UserError, match=f"but not {missing}$"):
        identify()


@pytest.mark.parametrize("values", [HYDRA, {**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}])
def test_several_machines_without_mpi4py(environment, monkeypatch, values):
    """Which of them is the first, mpirun's variables do not say."""
    import sys

    environment(values)
    monkeypatch.setattr(launcher, "_ENDED_WITHIN_S", 0)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UserError, match=r"pip install 'cola_ds\[mpi\]' .* or set MASTER_ADDR and MASTER_PORT"):
        identify()


def test_numbers_that_are_none_are_refused(environment):
    environment(dict(zip(NAMES, ("zero", "0", "1", "host", "1"), strict=True)))
    with pytest.raises(UserError, match="RANK must be a whole number from 0 to 1000000; it is 'zero'"):
        identify()


ALONE = dict(zip(NAMES, ("0", "0", "1", "host", "1"), strict=True))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"RANK": "-1"}, "RANK must be a whole number from 0 to 1000000; it is '-1'"),
        ({"RANK": "1"}, "RANK 1 is not below WORLD_SIZE 1"),
        ({"WORLD_SIZE": "0"}, "RANK 0 is not below WORLD_SIZE 0"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE must be a whole number from 0 to 1000000; it is '999"),
        ({"LOCAL_RANK": "1.0"}, "LOCAL_RANK must be a whole number from 0 to 1000000; it is '1.0'"),
        ({"LOCAL_RANK": "²"}, "LOCAL_RANK must be a whole number from 0"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT must be a whole number from 0 to 65535; it is '99999'"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT 0 is no port"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT must be a whole number"),
        ({"MASTER_ADDR": "a b"}, "MASTER_ADDR 'a b' is no host's name or address"),
        ({"MASTER_ADDR": "h\n" * 500}, "MASTER_ADDR 'h"),
    ],
)
def test_values_that_no_launcher_sets(environment, values, message):
    environment({**ALONE, **values})
    with pytest.raises(UserError) as caught:
        identify()
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**SRUN, "SLURM_JOB_ID": "x"}, "SLURM_JOB_ID must be a whole number from 0 on; it is 'x'"),
        ({**SRUN, "SLURM_STEP_ID": "batch"}, "SLURM_STEP_ID must be a whole number from 0 on; it is 'batch'"),
        ({**SRUN, "SLURM_PROCID": "four"}, "RANK must be a whole number"),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": ""}, "but not WORLD_SIZE"),
        ({**SRUN, "SLURM_STEP_NODELIST": "[1-"}, "but not MASTER_ADDR"),
        (
            {**MPIRUN, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
            "RANK 1 is not below WORLD_SIZE 1",
        ),
        ({**MPIRUN, "OMPI_COMM_WORLD_RANK": "x"}, "RANK must be a whole number"),
    ],
)
def test_schedulers_variables_that_say_nothing(environment, values, message):
    environment(values)
    with pytest.raises(UserError) as caught:
        identify()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("a1,b[2-3]", "a1"),
        ("rack-[07-09,12]-ib,x", "rack-07-ib"),
        ("gpu[003]", "gpu003"),
        ("", ""),
        ("[1-", ""),
        ("a[", "a"),
        (",", ""),
    ],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


def test_a_free_port_is_nobodys(monkeypatch):
    """Of those that the system hands out to whoever asks for any, only where all others are taken."""
    held = [socket.socket() for _ in range(3)]
    try:
        taken = []
        for each in held:
            each.bind(("", launcher.free_port()))
            taken.append(each.getsockname()[1])
        assert all(10_000 <= port < 20_000 for port in taken)
        monkeypatch.setattr("random.SystemRandom.sample", lambda self, among, count: taken)
        assert launcher.free_port() not in taken
    finally:
        for each in held:
            each.close()
