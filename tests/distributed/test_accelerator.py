"""What a GPU would ask of the package, as far as a CPU can tell. tests/gpu runs on one."""

import importlib.metadata
import multiprocessing as mp
import os
import shutil
import subprocess
import sys
import threading
import time
import types

import pytest
import torch
from torch.utils import backend_registration

from cola_ds.config.loading import load_config
from cola_ds.distributed.launcher import Process
from cola_ds.errors import UserError
from tests.support.distributed import process_group, run_distributed
from tests.support.toys import REPOSITORY, run_config, save_model, save_run, save_sums


@pytest.fixture
def machine(monkeypatch):
    """A machine of so many GPUs; returns the numbers of those that were taken."""
    from cola_ds.distributed import accelerator as here

    def machine(count, visible=None):
        taken = []
        accelerator = types.SimpleNamespace(
            device_name=lambda: "cuda", device_count=lambda: count, set_device=taken.append,
            visible_devices_envs=lambda: ["CUDA_VISIBLE_DEVICES"],
        )  # fmt: skip
        monkeypatch.setattr(here, "get_accelerator", lambda: accelerator)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        for name, value in ({"CUDA_VISIBLE_DEVICES": visible} if visible else {}).items():
            monkeypatch.setenv(name, value)
        return taken

    return machine


@pytest.mark.parametrize(
    ("count", "visible", "local_rank", "taken"),
    [(8, None, 3, 3), (2, "4,5", 1, 1), (1, None, 0, 0), (1, "0", 3, 0), (1, "GPU-8932f937", 1, 0)],
)
def test_each_process_takes_its_own_device(machine, monkeypatch, count, visible, local_rank, taken):
    from cola_ds.distributed.accelerator import take_device

    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", str(local_rank))
    found = machine(count, visible)
    take_device(Process(local_rank + 4, local_rank, 16))
    assert found == [taken]
    assert os.environ["LOCAL_RANK"] == os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == str(taken)  # DeepSpeed goes by it


@pytest.mark.parametrize("path", [None, "/usr/bin:/bin"])
def test_the_environments_own_ninja_compiles(monkeypatch, tmp_path, path):
    """As ssh starts a process: without the environment's PATH."""
    from cola_ds.distributed.accelerator import prepare_compilation

    monkeypatch.setenv("PATH", path or "")
    if path is None:
        monkeypatch.delenv("PATH")
    (own := tmp_path / "ninja").touch(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    prepare_compilation()
    assert shutil.which("ninja") == str(own)
    assert shutil.which("sh")


@pytest.mark.parametrize(("count", "visible"), [(1, None), (2, "4,5")])
def test_more_processes_than_devices_are_refused(machine, count, visible):
    from cola_ds.distributed.accelerator import take_device

    found = machine(count, visible)
    with pytest.raises(UserError, match=f"process 9 is number 3 on its machine, which has {count} accelerators"):
        take_device(Process(9, 2, 16))
    assert found == []


def meet_on_one_gpu(process):
    """NCCL's words, where two processes have the same one."""
    import deepspeed

    def init_distributed(**options):
        raise RuntimeError(
            "NCCL error: invalid usage\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"
        )

    deepspeed.init_distributed = init_distributed
    torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE does
    try:
        process_group(process)
    except UserError as error:
        return str(error), torch.get_float32_matmul_precision()
    return "no error", ""


def test_two_processes_on_one_device_are_refused_and_fp32_is_fp32():
    said, precision = run_distributed(meet_on_one_gpu, 1)[0]
    assert said.startswith("process 0 on ")
    assert said.endswith("has the same accelerator as another process; start one process per accelerator")
    assert "\n" not in said
    assert precision == "highest"


def compute_elsewhere(process):
    from cola_ds.distributed import collectives
    from cola_ds.distributed.engine_state import random_state, set_random_state

    process_group(process)
    # What a checkpoint of a GPU holds: the host's state, and the sixteen bytes of the GPU's generator.
    torch.manual_seed(7)
    state = random_state()
    expected = torch.randn(3)
    set_random_state(torch.cat([state, torch.arange(16, dtype=torch.uint8)]))
    drawn = torch.equal(torch.randn(3), expected)
    mixed = [1 + process.rank, ~torch.isfinite(torch.tensor([1.0, float("nan")][process.rank])), 0.5]
    return drawn, collectives.all_reduce_max(mixed)


def test_random_states_of_another_device_and_numbers_on_the_device():
    for drawn, largest in run_distributed(compute_elsewhere, 2):
        assert drawn
        assert largest == [2.0, 1.0, 0.5]


def test_nothing_of_two_devices_meets():
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot have a device made in Python")
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.other_device"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "all on their devices" in done.stdout


def test_a_batch_is_pinned_for_a_gpu_alone():
    from cola_ds.data.batch import _move

    class Host:
        def __init__(self):
            self.calls = []

        def pin_memory(self):
            self.calls.append("pin")
            return self

        def to(self, device, **options):
            self.calls.append((device.type, options))
            return self

    assert _move(Host(), torch.device("cuda", 0)).calls == ["pin", ("cuda", {"non_blocking": True})]
    assert _move(Host(), torch.device("cpu")).calls == [("cpu", {})]


# -- the model before there is an engine ----------------------------------------------------------------------------------


def load_on_meta(process, path, engine_config):
    """Where a model is loaded to, with a device that is not the host: torch's meta device."""
    from cola_ds.distributed import loading

    process_group(process)
    loading.device = lambda: torch.device("meta")
    model = loading.load_model(load_config(path).model, engine_config)
    return sorted({tensor.device.type for tensor in (*model.parameters(), *model.buffers())})


def test_at_stage_2_the_model_is_on_the_device_before_links_are_tied_again(tmp_path):
    model = save_model(tmp_path / "model")
    config = run_config(model, save_sums(tmp_path / "train.jsonl", 8), tmp_path / "run")
    path = save_run(tmp_path / "run.yaml", config)
    assert run_distributed(load_on_meta, 1, path, {"zero_optimization": {"stage": 2}}) == [["meta"]]


# -- run.deterministic ----------------------------------------------------------------------------------------------------


@pytest.fixture
def torch_as_it_is(monkeypatch):
    from cola_ds.distributed import accelerator

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield accelerator.make_deterministic
    accelerator.make_deterministic(False)


def test_deterministic_kernels_are_asked_for_strictly(torch_as_it_is):
    torch_as_it_is(True)
    # Not warn_only: with it, torch takes the flash kernel's usual backward pass, and only warns.
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.backends.cudnn.deterministic
    assert torch.empty(1000).isnan().sum() < 1000  # nothing is filled
    torch_as_it_is(False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


def test_a_workspace_that_is_not_deterministic_is_refused(torch_as_it_is, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0" + "x" * 5000)
    with pytest.raises(
        UserError, match=r"^run.deterministic needs CUBLAS_WORKSPACE_CONFIG :4096:8 or :16:8; it is :0:0x"
    ) as caught:
        torch_as_it_is(True)
    assert len(str(caught.value)) < 200
    assert not torch.are_deterministic_algorithms_enabled()


def train_here(process, paths):
    from cola_ds.checkpoint.decide import ResumeOptions
    from cola_ds.training.prepare import prepare
    from cola_ds.training.run import run_prepared as train

    process_group(process)
    found = []
    for path in paths:
        train(prepare(load_config(path), process.world_size), process, ResumeOptions())
        found.append(torch.are_deterministic_algorithms_enabled())
    try:
        train(prepare(load_config(paths[0], ["run.deterministic=false"]), process.world_size), process, ResumeOptions())
    except UserError as error:
        found.append(str(error))
    return found


def test_on_the_cpu_it_changes_no_bit_and_a_run_keeps_to_it(tmp_path):
    """Odd sizes, so that shards have padding, which nobody fills."""
    from tests.support.runs import record

    sizes = {"hidden_size": 33, "word_embed_proj_dim": 33, "num_attention_heads": 3, "ffn_dim": 35}
    toy = save_model(tmp_path / "model", "opt", **sizes), save_sums(tmp_path / "train.jsonl", 20)
    paths = []
    for deterministic in (True, False):
        lora, run = {"rank": [4, 3], "dropout": 0.1}, {"deterministic": deterministic}
        config = run_config(*toy, tmp_path / f"run-{deterministic}", lora=lora, run=run)
        paths.append(str(save_run(tmp_path / f"{deterministic}.yaml", config)))
    for *enabled, said in run_distributed(train_here, 2, paths):
        assert enabled == [True, False]
        assert "run.deterministic True -> False" in said
    assert record(tmp_path / "run-True") == record(tmp_path / "run-False")


# -- found by PYTHONPATH alone --------------------------------------------------------------------------------------------


def test_a_package_that_is_not_installed_has_a_version_too(monkeypatch):
    from cola_ds.run.environment import describe_environment
    from cola_ds.training.preflight import versions

    metadata = importlib.metadata.version

    def of_others(name):
        if name == "cola_ds":
            raise importlib.metadata.PackageNotFoundError(name)
        return metadata(name)

    monkeypatch.setattr(importlib.metadata, "version", of_others)
    assert describe_environment(["here"], "cpu")["cola_ds"] == "unknown"
    assert versions()["cola_ds"].startswith("unknown (")


def end_in_a_compilation(folder, other):
    from torch.utils.file_baton import FileBaton

    from cola_ds.distributed.deepspeed_internals import end_process

    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    assert FileBaton(str(folder / "op/lock")).try_acquire()
    assert not FileBaton(str(other)).try_acquire()
    threading.Thread(target=end_process, args=(3,)).start()
    time.sleep(60)


def test_who_ends_in_a_compilation_leaves_no_lock(tmp_path):
    """torch takes one as each process begins; another's stays."""
    (tmp_path / "op").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/lock").touch()
    process = mp.get_context("spawn").Process(target=end_in_a_compilation, args=(tmp_path, tmp_path / "other/lock"))
    process.start()
    process.join(60)
    assert process.exitcode == 3
    assert not (tmp_path / "op/lock").exists()
    assert (tmp_path / "other/lock").exists()
