"""Knots alone: local ties against gathered ones, and the memory of twenty of them."""

import gc

import pytest
import torch

from tests.gpu.support import DTYPES, ENGINES, ON_CPU, take_down, three_links
from tests.training.test_chain import make_chain, whole_weights


def tie_links_of_our_choice(process, path):
    """Weights after each of three knots at which the link is the same, whatever the training."""
    from cola_ds.distributed.shards import local_shard, numel
    from cola_ds.lora.layers import lora_layers
    from cola_ds.training.knot import extend_chain, tie_knot

    chain = make_chain(process, path)
    found = []
    for link in (1, 2, 3):
        for index, layer in enumerate(lora_layers(chain.engine.module).values()):
            part, start = local_shard(layer.lora_B)
            values = 5e-4 * torch.randn(numel(layer.lora_B), generator=torch.Generator().manual_seed(9 * link + index))
            part.copy_(values[start : start + part.numel()])
        tie_knot(chain)
        found.append({name: value for name, value in whole_weights(chain).items() if "lora_" not in name})
        if link < 3:
            extend_chain(chain)
            chain.state.link += 1
    kept = [chain]
    del chain
    take_down(kept)
    return found


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_local_ties_are_gathered_ones(process, toy, tmp_path, monkeypatch, engine, dtype):
    from cola_ds.lora import tie

    found = {}
    for way, elements in (("local", 5_000), ("gathered", 2**22)):  # from a few rows of B at a time, and from all
        monkeypatch.setattr(tie, "_ELEMENTS_AT_ONCE", elements)
        path, _ = three_links(toy, tmp_path / way, engine, dtype, chain={"tie": way}, lora={"targets": "all-linear"})
        found[way] = tie_links_of_our_choice(process, path)
    before = None
    for local, gathered in zip(found["local"], found["gathered"], strict=True):
        for name, value in local.items():
            if dtype == "fp32":  # a product of fewer rows may come from another kernel
                torch.testing.assert_close(value, gathered[name], rtol=1e-6, atol=1e-8)
            else:
                assert float((value != gathered[name]).float().mean()) < 2e-3, name
                torch.testing.assert_close(value, gathered[name], rtol=2**-7, atol=1e-8)
        assert before is None or any(not torch.equal(local[name], before[name]) for name in local)
        before = local


MEASURED = (6, 7, 12, 13, 20, 21)  # links; two of each LoRA rank


def measure_knots(process, path):
    """After some extensions: bytes that are allocated on the device, tensors, engines and hooks; and remainders' elements."""
    from cola_ds.distributed import accelerator, collectives
    from cola_ds.training.knot import batch_loss, extend_chain, last_batch, tie_knot
    from cola_ds.training.loop import tune_lora

    chain = make_chain(process, path)
    counts = []
    while True:
        tune_lora(chain)
        batch_loss(chain, last_batch(chain))
        tie_knot(chain)
        if chain.state.link == chain.config.chain.length:
            break
        extend_chain(chain)
        chain.state.link, chain.state.step_in_link = chain.state.link + 1, 0
        if chain.state.link not in MEASURED:
            continue
        gc.collect()
        collectives.all_reduce_sum(torch.zeros(1, device=accelerator.device())).item()
        allocated = 0 if ON_CPU else torch.cuda.memory_allocated()
        # No list of objects may outlive this: it would keep what it counts.
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        engines = sum(type(thing).__name__ in ("DeepSpeedEngine", "DeepSpeedZeRoOffload") for thing in gc.get_objects())
        modules = list(chain.engine.module.modules())
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules)
        counts.append(
            (allocated, tensors, engines, hooks, sum(r.kept.numel() for r in chain.state.remainders.values()))
        )
    kept = [chain]
    del chain
    take_down(kept)
    return counts


STEP_DOWN = [64, 32] * 10 + [64]


@pytest.mark.parametrize(
    ("engine", "dtype", "ranks"),
    [("zero3", "bf16", 64), ("zero3", "bf16", STEP_DOWN), ("zero2", "fp32", 64), ("offload", "bf16", STEP_DOWN)],
    ids=["in place", "rebuilt", "zero2", "offload"],
)
def test_memory_is_flat_over_twenty_knots(process, toy, tmp_path, engine, dtype, ranks):
    optim = {"max_steps": 21, "global_batch_size": 4, "micro_batch_size": 2}
    path, _ = three_links(toy, tmp_path, engine, dtype, chain={"length": 21}, lora={"rank": ranks}, optim=optim)
    counts = measure_knots(process, path)
    assert len(counts) == len(MEASURED)
    assert (counts[0][-1] > 0) == (DTYPES[dtype] != torch.float32)
    for alike in (counts[::2], counts[1::2]):  # of one LoRA rank
        assert {found[2:] for found in alike} == {alike[0][2:]}
        # A link that is kept is fifteen tensors or more, at each knot.
        assert max(found[1] for found in alike) - min(found[1] for found in alike) < 10
        # One link's A and B in bf16 with fp32 masters, moments and gradients take megabytes; a batch takes a few hundred bytes.
        assert max(found[0] for found in alike) - min(found[0] for found in alike) < 2**17
