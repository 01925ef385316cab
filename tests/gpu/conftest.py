"""Tests of one process on one GPU, over NCCL, with the real engine: `python3 -m pytest tests/gpu`, four minutes at most.

Without a GPU they are skipped. COLA_DS_GPU_TESTS_ON=cpu runs the same tests on DeepSpeed's CPU accelerator over gloo, but for
fp16, which that lacks: what they say is checked so, not what a GPU does.
"""

import gc
import os

import pytest
import torch

from cola_ds.distributed.launcher import free_port
from tests.gpu.support import ON_CPU, TINY
from tests.support.toys import save_model, save_sums

_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_HERE = os.path.dirname(os.path.abspath(__file__))


def pytest_collection_modifyitems(items):
    mine = [item for item in items if str(item.path).startswith(_HERE)]
    if not mine:
        return
    missing = not ON_CPU and not torch.cuda.is_available()
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        item.add_marker(pytest.mark.beyond_ci)
        if missing:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU; COLA_DS_GPU_TESTS_ON=cpu runs these tests without"))


@pytest.fixture(scope="package")
def process():
    """This process, in a group of its own: one CUDA context serves all tests."""
    before = dict(os.environ)
    os.environ.update({name: "1" if "SIZE" in name else "0" for name in _NAMES})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), HF_HUB_OFFLINE="1")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before the first product of the first test
    import cola_ds.training.run  # noqa: F401
    from cola_ds.distributed import accelerator, collectives
    from cola_ds.distributed.launcher import identify

    one = identify()
    collectives.init_process_group(one)
    assert (accelerator.device().type == "cpu") == ON_CPU, accelerator.device()
    gc.collect()
    gc.freeze()  # what the imports have made is not looked through again at each knot
    yield one
    gc.unfreeze()
    collectives.destroy_process_group()
    accelerator.make_deterministic(False)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="package")
def toy(tmp_path_factory):
    """A model whose kernels are those of larger ones (heads of 64), with training and held-out data."""
    folder = tmp_path_factory.mktemp("gpu")
    sizes = (
        TINY
        if ON_CPU
        else {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
    )
    return (
        save_model(folder / "model", max_position_embeddings=256, **sizes),
        save_sums(folder / "train.jsonl", 40),
        save_sums(folder / "dev.jsonl", 12, seed=1),
    )
