"""Ties: what they add to shards of every kind, how exactly, and what they move."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cola_ds.commands.merge import tie_saved_links
from cola_ds.lora.layers import add_link, delta_slice, delta_weight, inner_product
from tests.bench import rounding
from tests.support.distributed import CountedCollectives, run_distributed
from tests.support.toys import REPOSITORY, run_config, save_model, save_run, save_sums, thorough
from tests.training.test_chain import make_chain, next_batch, outputs, whole_weights

# Persistent parameters stay whole on every process between steps; with zero3_sharded base weights do not.
ENGINES = {
    "sharded": "tests/support/zero3_sharded.json",
    "persistent": "ds_configs/zero3.json",
    "offloaded": "ds_configs/zero3_offload_cpu.json",
    "zero2": "ds_configs/zero2.json",
}
# Neither 2 nor 4 divides a weight (33 x 33, 35 x 33, 33 x 35), nor A and B of LoRA rank 11: more than 300 elements, which
# zero3_sharded shards.
ODD_SIZES = {"hidden_size": 33, "word_embed_proj_dim": 33, "num_attention_heads": 3, "ffn_dim": 35}

ROUNDED = {"fp32": 1e-5, "bf16": 2e-2}  # what a knot may change of logits around 1: a rounding of each base weight


# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_slices_of_a_link_are_the_link():
    lora_A, lora_B = torch.randn(3, 7), torch.randn(5, 3)
    whole = delta_weight(lora_A, lora_B, 2.0).flatten()
    for start in range(35):
        for count in range(1, 36 - start):
            found = delta_slice(lora_A, lora_B, 2.0, start, count)
            torch.testing.assert_close(found, whole[start : start + count])


def test_inner_product_of_factors_is_that_of_the_links():
    first, second = (torch.randn(3, 7), torch.randn(5, 3), 2.0), (torch.randn(2, 7), torch.randn(5, 2), 0.5)
    expected = (delta_weight(*first) * delta_weight(*second)).sum()
    torch.testing.assert_close(inner_product(first, second).float(), expected)
    third = (torch.randn(4, 7), torch.randn(5, 4), 3.0)
    scalings = torch.tensor([2.0] * 3 + [3.0] * 4).unsqueeze(1)
    both = (torch.cat([first[0], third[0]]), torch.cat([first[1], third[1]], dim=1), scalings)
    expected = expected + (delta_weight(*third) * delta_weight(*second)).sum()
    torch.testing.assert_close(inner_product(both, second).float(), expected)


@pytest.mark.parametrize("size", [0.001, 0.01])
@pytest.mark.parametrize("links", [1, 8, 32])
def test_exact_merges_round_the_sum_once(size, links):
    base, weight, wanted = rounding.chain_of_merges(size, links, exact=True)
    once = (base.double() + wanted).bfloat16()
    differ = weight != once  # where the sum is halfway between two neighbours, fp32 and float64 may part
    assert differ.float().mean() < 1e-3
    apart = weight.view(torch.int16).int() - once.view(torch.int16).int()
    assert apart.abs().max() <= 1
    # One rounding, whatever the number of links; plain merges lose more with each.
    assert rounding.error(size, links, exact=True) == pytest.approx(rounding.error(size, 1, exact=True), rel=0.02)
    if links > 1:
        assert rounding.error(size, links, exact=False) > 1.2 * rounding.error(size, links, exact=True)


def test_remainder_of_a_plain_merge_is_what_the_chain_has_lost():
    draw = torch.Generator().manual_seed(1)
    base = (0.02 * torch.randn(1000, generator=draw)).bfloat16()
    weight, remainder, wanted = base.clone(), torch.zeros(1000), torch.zeros(1000, dtype=torch.float64)
    for _ in range(8):
        delta = 1e-5 * torch.randn(1000, generator=draw)
        wanted += delta.double()
        remainder = add_link(weight, delta, remainder, exact=False)
    lost = base.double() + wanted - weight.double()
    torch.testing.assert_close(remainder.double(), lost, rtol=0, atol=1e-8)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_export_rounds_as_its_merges_say(dtype, exact):
    """Exact: once, whatever the number of links. Plain: once a link."""
    draw = torch.Generator().manual_seed(2)
    base = (0.02 * torch.randn(5, 7, generator=draw)).to(dtype)
    links = [
        {"q.lora_A.weight": torch.randn(3, 7, generator=draw), "q.lora_B.weight": 1e-4 * torch.randn(5, 3, generator=draw)}
        for _ in range(4)
    ]  # fmt: skip
    model = nn.ModuleDict({"q": nn.Linear(7, 5, bias=False, dtype=dtype)})
    model["q"].weight.data.copy_(base)
    tie_saved_links(model, links, [2.0, 2.0, 0.5, 2.0], exact=exact)
    wanted = base.float()
    for link, scaling in zip(links, (2.0, 2.0, 0.5, 2.0), strict=True):
        wanted = wanted + (link["q.lora_B.weight"] @ link["q.lora_A.weight"]) * scaling
        wanted = wanted if exact else wanted.to(dtype).float()
    assert not torch.equal(wanted.to(dtype), base)
    assert torch.equal(model["q"].weight, wanted.to(dtype))


def test_readme_shows_the_roundings():
    def numbers(lines):
        return [[float(n) for n in re.findall(r"[\d.]+", line)] for line in lines if re.match(r"\| \d", line)]

    readme = (REPOSITORY / "launch/README.md").read_text(encoding="utf-8")
    shown = readme.split("| change / base |")[1].split("\n\n")[0].splitlines()
    found = numbers(rounding.table())
    assert len(found) == 6
    for row, expected in zip(numbers(shown), found, strict=True):
        assert row == pytest.approx(expected, abs=0.3)


# -- shards ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    return save_model(folder / "model", "opt", **ODD_SIZES), save_sums(folder / "train.jsonl", 20)


def tie_three_links(process, path):
    """Ties links with values of our choice. Returns the weights after each knot, each link, and the knots' figures."""
    from cola_ds.distributed.shards import local_shard, numel
    from cola_ds.lora.layers import lora_layers
    from cola_ds.training.knot import extend_chain, tie_knot

    chain = make_chain(process, path)
    batch = next_batch(chain)
    outputs(chain, batch)
    found = {"base": whole_weights(chain), "weights": [], "links": [], "knots": []}
    for link in (1, 2, 3):
        for index, layer in enumerate(lora_layers(chain.engine.module).values()):
            part, start = local_shard(layer.lora_B)
            draw = torch.Generator().manual_seed(100 * link + index)
            values = 5e-4 * torch.randn(numel(layer.lora_B), generator=draw)
            part.copy_(values[start : start + part.numel()])
        before = outputs(chain, batch)
        found["links"].append({name: value for name, value in whole_weights(chain).items() if "lora_" in name})
        found["knots"].append(tie_knot(chain))
        torch.testing.assert_close(outputs(chain, batch), before, rtol=1e-5, atol=ROUNDED[chain.config.model.dtype])
        found["weights"].append(whole_weights(chain))
        if link < 3:
            extend_chain(chain)
            chain.state.link += 1
    found["remainders"] = sum(r.kept.numel() for r in chain.state.remainders.values())
    found["earlier"] = {name: len(lora_A) for name, (lora_A, _, _) in chain.state.earlier.items()}
    return found


def tie_in_all_ways(process, paths):
    return {way: tie_three_links(process, path) for way, path in paths.items()}


WORLDS = [(1, "sharded"), (1, "zero2"), *((2, engine) for engine in ENGINES), (4, "sharded")]
CORE = (2, "sharded")


@pytest.fixture(
    scope="module",
    params=[pytest.param(world, marks=pytest.mark.core if world == CORE else ()) for world in WORLDS],
    ids="{0[1]}-{0[0]}".format,
)
def tied(request, odd, tmp_path_factory):
    """By dtype, tie and merge, what each process found; ranks change once, so that both kinds of extension are passed."""
    world_size, engine = request.param
    folder = tmp_path_factory.mktemp("tied")
    paths = {}
    for dtype, tie, merge in (
        ("fp32", "local", "exact"), ("fp32", "gathered", "exact"), ("bf16", "local", "exact"),
        ("bf16", "gathered", "exact"), ("bf16", "local", "plain"), ("bf16", "gathered", "plain"),
    ):  # fmt: skip
        name = f"{dtype} {tie} {merge}"
        config = run_config(
            *odd, folder / name, model={"dtype": dtype}, lora={"rank": [11, 11, 3], "targets": "all-linear"},
            chain={"length": 3, "tie": tie, "merge": merge}, optim={"max_steps": 3, "micro_batch_size": 2},
            deepspeed=str(REPOSITORY / ENGINES[engine]),
        )  # fmt: skip
        paths[name] = str(save_run(folder / f"{name}.yaml", config))
    return world_size, engine, run_distributed(tie_in_all_ways, world_size, paths)


def targets(found):
    return [name.removesuffix(".lora_A") + ".weight" for name in found["links"][0] if name.endswith("lora_A")]


def exact_sums(found):
    """Base plus links so far in float64, by target weight, after each knot."""
    sums = {name: found["base"][name].double() for name in targets(found)}
    for link in found["links"]:
        for name in sums:
            layer = name.removesuffix(".weight")
            lora_A, lora_B = link[f"{layer}.lora_A"].double(), link[f"{layer}.lora_B"].double()
            sums = sums | {name: sums[name] + 8 / lora_A.shape[0] * lora_B @ lora_A}
        yield sums


def test_local_ties_equal_gathered_ones(tied):
    _, _, processes = tied
    for found in processes:
        for kind in ("fp32 {} exact", "bf16 {} exact", "bf16 {} plain"):
            local, gathered = found[kind.format("local")], found[kind.format("gathered")]
            assert len(targets(local)) == 12
            for mine, whole in zip(local["weights"], gathered["weights"], strict=True):
                for name in mine:
                    assert torch.equal(mine[name], whole[name]), (kind, name)


def test_an_export_has_the_weights_of_the_run(tied):
    """Bit for bit, from the links alone."""
    _, _, processes = tied
    found = processes[0]
    for way in ("fp32 local exact", "bf16 local exact", "bf16 local plain"):
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[way.split()[0]]
        exported = {name: found[way]["base"][name].to(dtype, copy=True) for name in targets(found[way])}
        model = SimpleNamespace(get_parameter=exported.__getitem__, get_submodule=lambda name: nn.Linear(1, 1))
        links = [{f"{name}.weight": half.to(dtype) for name, half in link.items()} for link in found[way]["links"]]
        tie_saved_links(model, links, [8 / 11, 8 / 11, 8 / 3], exact=way.endswith("exact"))
        for name, weight in exported.items():
            assert torch.equal(weight.float(), found[way]["weights"][-1][name]), (way, name)


def test_every_process_has_the_base_plus_all_links_rounded_once(tied):
    _, _, processes = tied
    for found in processes:
        for way in ("fp32 local exact", "bf16 local exact"):
            for weights, sums in zip(found[way]["weights"], exact_sums(found[way]), strict=True):
                for name, wanted in sums.items():
                    if way.startswith("fp32"):
                        torch.testing.assert_close(weights[name].double(), wanted, rtol=1e-6, atol=1e-9)
                    else:
                        assert (weights[name] != wanted.bfloat16().float()).sum() <= 2, name  # halfway cases
                        apart = weights[name].bfloat16().view(torch.int16) - wanted.bfloat16().view(torch.int16)
                        assert apart.abs().max() <= 1
                for name in set(weights) - set(sums):
                    if "lora_" not in name:
                        assert torch.equal(weights[name], found[way]["base"][name])


def test_rounding_error_is_that_of_the_whole_chain(tied):
    _, _, processes = tied
    for way, found in processes[0].items():
        for knot, weights, sums in zip(found["knots"], found["weights"], exact_sums(found), strict=True):
            wanted = torch.cat([(sums[name] - found["base"][name].double()).flatten() for name in sums])
            stored = torch.cat([(weights[name].double() - found["base"][name].double()).flatten() for name in sums])
            expected = float((stored - wanted).norm() / wanted.norm())
            assert knot["rounding_error"] == pytest.approx(expected, rel=1e-3, abs=1e-5), way
    errors = {way: found["knots"][-1]["rounding_error"] for way, found in processes[0].items()}
    assert errors["fp32 local exact"] == 0
    assert 0.05 < errors["bf16 local exact"] < 0.8 * errors["bf16 local plain"]


def test_remainders_are_kept_once(tied):
    world_size, engine, processes = tied
    elements = 2 * (4 * 33 * 33 + 2 * 33 * 35)
    for way, copies in (("fp32 local exact", 0), ("bf16 local exact", world_size if engine == "zero2" else 1)):
        assert sum(found[way]["remainders"] for found in processes) == copies * elements


def test_earlier_links_are_kept_once_and_by_all_alike(tied):
    """What a knot multiplies them for grows with the links, on each process by its share of the layers; the last link is not
    kept, and the files of the others are not read again."""
    world_size, _, processes = tied
    for way in processes[0]:
        kept = [found[way]["earlier"] for found in processes]
        assert sum(map(len, kept)) == 12 == len(set().union(*kept))
        assert all(len(layers) == 12 / world_size for layers in kept)
        assert all(rows == 11 + 11 for layers in kept for rows in layers.values())


# -- what moves --------------------------------------------------------------------------------------------------------


def count_a_knot(process, path):
    from cola_ds.training.knot import extend_chain, tie_knot

    chain = make_chain(process, path)
    outputs(chain, next_batch(chain))
    with CountedCollectives() as counted:
        row = tie_knot(chain)
        tie_calls = list(counted.calls)
        extend_chain(chain)
    return row["bytes_moved"], tie_calls, counted.calls


@pytest.mark.parametrize(("world_size", "next_rank"), thorough([(2, 4), (4, 3)], [(2, 3)]))
def test_a_local_knot_moves_adapters_alone(odd, tmp_path, world_size, next_rank):
    found = {}
    for tie in ("local", "gathered"):
        config = run_config(
            *odd, tmp_path / tie, lora={"rank": [4, next_rank], "targets": "all-linear"}, chain={"length": 2, "tie": tie},
            optim={"max_steps": 3, "micro_batch_size": 2},
        )  # fmt: skip
        found[tie] = run_distributed(count_a_knot, world_size, save_run(tmp_path / f"{tie}.yaml", config))
    adapters = 2 * 4 * 4 * (4 * (33 + 33) + 2 * (33 + 35))  # layers, bytes, r (d + k)
    weights = 2 * 4 * (4 * 33 * 33 + 2 * 33 * 35)
    for reported, tie_calls, calls in found["local"]:
        assert reported == adapters
        assert adapters <= sum(size for _, size in tie_calls) <= 1.01 * adapters  # A and B once, and a few numbers
        assert max(size for _, size in calls) < 33 * 33 * 4  # no message could hold a base weight
        # In place nothing moves. A rebuilt engine sends the new A and B out, and gathers them once.
        assert sum(size for _, size in calls) <= (2 if next_rank == 4 else 3) * adapters
    for reported, tie_calls, _ in found["gathered"]:
        assert reported == adapters + 2 * weights
        assert sum(size for _, size in tie_calls) >= 2 * weights
