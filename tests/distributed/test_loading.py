"""Loading under ZeRO-3 goes straight into shards: no process holds the whole model, none sends a weight, all of it arrives."""

import ctypes
import mmap
import os
import re
import threading
import time

import pytest
import torch

from cola_ds.config.schema import ModelConfig
from cola_ds.errors import UserError
from tests.support.distributed import CountedCollectives, process_group, run_distributed
from tests.support.toys import save_model


def private_bytes():
    """Memory of this process alone: pages of mapped files, which the kernel drops at will, are not among it."""
    with open("/proc/self/status", encoding="ascii") as status:
        return int(re.search(r"RssAnon:\s+(\d+)", status.read())[1]) * 1024


def load_and_watch(process, path):
    from cola_ds.distributed.loading import load_model
    from cola_ds.distributed.shards import gathered

    process_group(process)
    engine_config = {
        "zero_optimization": {"stage": 3},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
    }
    engine_config["train_batch_size"] = process.world_size
    # A first load of a small model, so that what is imported and set up once does not count.
    load_model(ModelConfig(path=str(path / "small"), dtype="fp32"), engine_config)
    before, peak, done = private_bytes(), [0], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], private_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(ModelConfig(path=str(path / "large"), dtype="fp32"), engine_config)
    done.set()
    watcher.join()
    digest = {}
    for name, param in model.named_parameters():
        with gathered([param]):
            digest[name] = param.detach().double().sum().item()
    return {"peak": peak[0] - before, "kept": private_bytes() - before, "digest": digest}


def test_no_process_holds_the_whole_model(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12}
    save_model(tmp_path / "small")
    save_model(tmp_path / "large", **sizes)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "large", dtype=torch.float32)
    whole = sum(p.numel() * 4 for p in model.parameters())
    largest = max(p.numel() * 4 for p in model.parameters())
    expected = {name: p.detach().double().sum().item() for name, p in model.named_parameters()}
    del model
    for found in run_distributed(load_and_watch, 4, tmp_path, timeout_s=300):
        assert found["digest"] == pytest.approx(expected, rel=1e-9)
        shard = whole / 4
        assert shard * 0.9 < found["peak"] < shard + 8 * largest < whole * 0.55, (found["peak"], whole)


MIXTRAL = {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}
MODELS = {
    "llama": ("llama", {}),
    "llama-tied": ("llama-tied", {}),
    "opt": ("opt", {}),
    "qwen2": ("qwen2", {}),
    "gpt2": ("gpt2", {}),
    "mixtral": ("llama", MIXTRAL),
}


def load_and_compare(process, models, groups):
    """By model and dtype: the names of what is not as Transformers loads it, the bytes that collectives carried, and those
    of the model."""
    from transformers import AutoModelForCausalLM

    from cola_ds.distributed.loading import load_model
    from cola_ds.distributed.nodes import make_groups
    from cola_ds.distributed.shards import gathered

    process_group(process)
    nodes = make_groups(groups) if groups else None
    config = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    config["train_batch_size"] = process.world_size
    found = {}
    for name, folder in models.items():
        for dtype in ("fp32", "bf16"):
            config["bf16"] = {"enabled": dtype == "bf16"}
            with CountedCollectives() as counted:
                model = load_model(ModelConfig(path=folder, dtype=dtype), config, nodes=nodes)
            plain = AutoModelForCausalLM.from_pretrained(
                folder, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
            )
            expected = dict(plain.named_parameters()) | dict(plain.named_buffers())
            held = dict(model.named_parameters()) | dict(model.named_buffers())
            wrong = sorted(held.keys() ^ expected.keys())
            for key, value in held.items():
                with gathered([value] if hasattr(value, "ds_id") else []):
                    if value.dtype != expected[key].dtype or not torch.equal(value.detach(), expected[key].detach()):
                        wrong.append(key)
            assert model.generation_config.to_dict() == plain.generation_config.to_dict()
            assert not model.training
            whole = sum(p.numel() * p.element_size() for p in plain.parameters())
            found[f"{name} {dtype}"] = (wrong, counted.bytes, whole)
    return found


@pytest.mark.parametrize("groups", [None, [[0, 2], [1, 3]]], ids=["world", "nodes"])
def test_what_is_loaded_is_what_transformers_loads(tmp_path, groups):
    """Mixtral's experts lie in the files one by one, and are fused as they are loaded: these are read on process 0 and sent."""
    models = {name: str(save_model(tmp_path / name, kind, **sizes)) for name, (kind, sizes) in MODELS.items()}
    for found in run_distributed(load_and_compare, 4 if groups else 2, models, groups, timeout_s=300):
        for name, (wrong, moved, whole) in found.items():
            assert not wrong, (name, wrong)
            assert (moved > 0.1 * whole) == name.startswith("mixtral"), (name, moved, whole)
            assert moved < 0.01 * whole or name.startswith("mixtral"), (name, moved, whole)


def test_a_piece_of_transformers_that_is_gone_is_one_line(monkeypatch):
    from transformers import modeling_utils

    from cola_ds.distributed.loading import _into_shards

    monkeypatch.delattr(modeling_utils, "_load_state_dict_into_zero3_model")
    with pytest.raises(
        UserError, match=r"has no modeling_utils\._load_state_dict_into_zero3_model as 5\.24\.0 has; pip install"
    ):
        _into_shards(None, []).__enter__()


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (RuntimeError("sizes differ"), UserError),
        (torch.AcceleratorError("an illegal memory access", 700), torch.AcceleratorError),
        (torch.distributed.DistBackendError("unhandled cuda error"), torch.distributed.DistBackendError),
        (torch.OutOfMemoryError("of 2 GiB"), torch.OutOfMemoryError),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_a_device_that_fails_is_no_mistake_in_the_weights(monkeypatch, raised, expected):
    from cola_ds.distributed import loading

    def fails(*words, **options):
        raise raised

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fails)
    monkeypatch.setattr(loading.dist, "get_rank", lambda: 0)
    with pytest.raises(expected):
        loading.load_model(ModelConfig(path="nowhere"), {"zero_optimization": {"stage": 2}})


def load_and_listen(process, folder, tells_every_s):
    """What process 0 says of it."""
    import contextlib
    import io

    from cola_ds import notices
    from cola_ds.distributed import loading

    process_group(process)
    notices.TELLS_EVERY_S = tells_every_s
    config = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    config["train_batch_size"] = process.world_size
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        loading.load_model(ModelConfig(path=folder, dtype="fp32"), config)
    return [line for line in said.getvalue().splitlines() if line.startswith("cola-ds")]


def test_what_is_said_while_a_model_loads(tmp_path):
    """How far it is, as often as is due; and where Transformers' own loader reads and sends some of it."""
    llama = str(save_model(tmp_path / "llama", hidden_size=512, vocab_size=50_000))
    assert run_distributed(load_and_listen, 2, llama, 30.0) == [[], []]
    said, silent = run_distributed(load_and_listen, 2, llama, 0.0)
    assert not silent
    assert len(said) == 2 + 2 * 9 + 1  # as often as there are tensors
    said = [re.sub(r"after \d+ s", "after N s", line) for line in said]
    assert {re.sub(r"0\.[012]", "X", line) for line in said} == {"cola-ds ... loading: X of X GB after N s"}
    assert said[-1] == "cola-ds ... loading: 0.2 of 0.2 GB after N s"
    (line,), silent = run_distributed(load_and_listen, 2, str(save_model(tmp_path / "mixtral", **MIXTRAL)), 30.0)
    assert not silent
    assert re.fullmatch(
        r"cola-ds: process 0 reads and sends what is converted as it is loaded: \d+ weights, such as \S+", line
    )


def resident(tensor):
    """Whether each page of a mapped tensor is in memory, whoever has read it."""
    pages = (ctypes.c_ubyte * -(-tensor.nbytes // mmap.PAGESIZE))()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes), pages) == 0
    return [bool(page & 1) for page in pages]


def test_a_part_of_a_mapped_file_is_read_at_once(tmp_path):
    from cola_ds.distributed.loading import _announce

    path, size = tmp_path / "weights", 16 * 2**20
    path.write_bytes(bytes(size))
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    if any(resident(mapped)):
        pytest.skip("a file system that has no other place than memory")
    part = mapped[4 * 2**20 + 100 : 8 * 2**20]
    pages = [number * mmap.PAGESIZE for number in range(size // mmap.PAGESIZE)]
    deadline = time.monotonic() + 60
    _announce(part)
    while not all(resident(mapped)[at // mmap.PAGESIZE] for at in pages if 4 * 2**20 <= at < 8 * 2**20):
        assert time.monotonic() < deadline
        time.sleep(0.5)
        _announce(part)  # it is advice: a busy disk may have dropped some
    assert not all(resident(mapped)[: 2**20 // mmap.PAGESIZE])
