"""GPT-2's Conv1D, whose weight is (in, out): all that a link does on it is what it does on an nn.Linear of the same weight."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cola_ds.commands.merge import tie_saved_links
from cola_ds.lora.layers import LoRALinear
from cola_ds.run.peft_files import lora_names
from tests.lora.test_spectra import expected_intruders
from tests.lora.test_tie import tie_in_all_ways
from tests.support.distributed import run_distributed
from tests.support.runs import three_links, train_in
from tests.support.toys import rows, run_config, save_model, save_run, save_sums, thorough
from tests.training.test_chain import make_chain, whole_weights

CPU = torch.device("cpu")
# c_proj of attention is square, (33, 33): only what is known of the layer can say how it lies. 2 divides none of the weights.
ODD = {"n_embd": 33, "n_head": 3, "n_inner": 35}
KINDS = ("c_attn", "c_proj", "c_fc")


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transposed")
    return save_model(folder / "model", "gpt2", **ODD), save_sums(folder / "train.jsonl", 40)


def twins(dropout, train_bias=False):
    """A layer on a Conv1D and one on its twin, with the same link."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv, linear = Conv1D(7, 5), nn.Linear(5, 7)
    linear.weight.data.copy_(conv.weight.T)
    conv.bias.data.copy_(linear.bias)
    A, B = torch.randn(3, 5), torch.randn(7, 3)
    found = [LoRALinear(each, dropout, train_bias) for each in (conv, linear)]
    for layer in found:
        layer.reset(A, 2.0, CPU, B)
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_outputs_and_gradients_are_those_of_its_twin(dropout):
    found = []
    for layer in twins(dropout, train_bias=True):
        torch.manual_seed(1)
        x = torch.randn(2, 4, 5, requires_grad=True)
        out = layer(x)
        wanted = [x, layer.bias, layer.lora_A, layer.lora_B]
        found.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_backward_pass_takes_the_weight_as_it_is_then(dropout):
    """Under ZeRO-3 the Parameter's values go after the forward pass and come back. A view would hold on to all of a model."""
    layer, _ = twins(dropout)
    layer.lora_B.data.zero_()
    x = torch.randn(4, 5, requires_grad=True)
    out = layer(x)
    layer.weight.data = torch.randn(5, 7)
    (found,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(found, torch.ones(4, 7) @ layer.weight.T)


# -- shards ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tied(odd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    paths = {}
    for dtype, tie in thorough([("fp32", "local"), ("bf16", "local"), ("bf16", "gathered")], [("fp32", "gathered")]):
        config = run_config(
            *odd, folder / f"{dtype} {tie}", model={"dtype": dtype}, lora={"rank": [11, 11, 3], "targets": "all-linear"},
            chain={"length": 3, "tie": tie}, optim={"max_steps": 3, "micro_batch_size": 2},
        )  # fmt: skip
        paths[f"{dtype} {tie}"] = str(save_run(folder / f"{dtype} {tie}.yaml", config))
    return run_distributed(tie_in_all_ways, 2, paths)


def test_shards_take_up_the_link_as_the_weight_lies(tied):
    """Base + sum of scaling A^T B^T, rounded once, at two processes; gathered ties and exports have the same bits."""
    for found in tied:
        for way, way_found in found.items():
            names = [name.removesuffix(".lora_A") for name in way_found["links"][0] if name.endswith("lora_A")]
            assert len(names) == 8
            for name in names:
                wanted = way_found["base"][f"{name}.weight"].double()
                for link, weights in zip(way_found["links"], way_found["weights"], strict=True):
                    A, B = (link[f"{name}.lora_{half}"].double() for half in "AB")
                    wanted = wanted + 8 / len(A) * A.T @ B.T
                    stored = weights[f"{name}.weight"]
                    if way.startswith("fp32"):
                        torch.testing.assert_close(stored.double(), wanted, rtol=1e-6, atol=1e-9)
                    else:
                        assert (stored != wanted.bfloat16().float()).sum() <= 2, (way, name)  # halfway cases
    for name, bits in tied[0]["bf16 local"]["weights"][-1].items():
        assert torch.equal(bits, tied[0]["bf16 gathered"]["weights"][-1][name]), name


def test_a_merge_of_saved_links_has_the_same_bits(tied, odd):
    from transformers import AutoModelForCausalLM

    for way in ("fp32 local", "bf16 local"):
        found = tied[0][way]
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[way.split()[0]]
        model = AutoModelForCausalLM.from_pretrained(odd[0], dtype=dtype)
        links = [{f"{name}.weight": half.to(dtype) for name, half in link.items()} for link in found["links"]]
        tie_saved_links(model, links, [8 / 11, 8 / 11, 8 / 3], exact=True)
        for name, weight in model.named_parameters():
            assert torch.equal(weight.float(), found["weights"][-1][name]), (way, name)


# -- what is found from the weight itself --------------------------------------------------------------------------------


def start_of(process, path):
    from cola_ds.training.place_start import place_start

    chain = make_chain(process, path)
    place_start(chain, 1)
    layers = {name: module for name, module in chain.engine.module.named_modules() if isinstance(module, LoRALinear)}
    starts = {name: layer.scaling * (layer.start_B @ layer.start_A) for name, layer in layers.items()}
    return {**{f"{name}.start": start.detach() for name, start in starts.items()}, **whole_weights(chain)}


def test_pissa_starts_at_the_leading_directions_of_the_weight(odd, tmp_path):
    config = run_config(*odd, tmp_path / "run", lora={"rank": 4, "targets": list(KINDS), "init": "pissa"})
    found, other = run_distributed(start_of, 2, str(save_run(tmp_path / "run.yaml", config)))
    starts = [name for name in found if name.endswith(".start")]
    assert len(starts) == 8
    for name in starts:
        U, S, V = torch.linalg.svd(found[name.replace(".start", ".weight")].T)  # (out, in)
        torch.testing.assert_close(found[name], (U[:, :4] * S[:4]) @ V[:4], rtol=1e-3, atol=1e-3)
        assert torch.equal(found[name], other[name])


@pytest.mark.parametrize("init", ["gradient", *thorough([], ["orthogonal", "pissa"])])
def test_diagnostics_and_starts_in_a_whole_run(odd, tmp_path, init):
    """Stopped and started again across the first knot, too: the same bits. Intruders are those of (out, in)."""
    toy = (*odd, save_sums(tmp_path / "dev.jsonl", 8, seed=1))
    config = three_links(
        toy, lora={"rank": [4, 4, 2], "targets": ["c_attn", "c_fc"], "init": init}, chain={"diagnostics": True},
        optim={"max_steps": 6},
    )  # fmt: skip
    straight = train_in(tmp_path / "straight", config)
    assert train_in(tmp_path / "stopped", config, stops=[("step", 3)]) == straight
    run = tmp_path / "straight/run"
    links = [load_file(path) for path in sorted(run.glob("chain/*/adapter_model.safetensors"))]
    said = [
        json.loads(path.read_bytes()) for path in sorted((tmp_path / "stopped/run").glob("chain/*/adapter_config.json"))
    ]
    assert [each["fan_in_fan_out"] for each in said] == [True] * 3
    again = [load_file(path) for path in sorted((tmp_path / "stopped/run").glob("chain/*/adapter_model.safetensors"))]
    assert all(torch.equal(link[key], other[key]) for link, other in zip(links, again, strict=True) for key in link)
    base = load_file(odd[0] / "model.safetensors")
    seen = [row for row in rows(run / "links.jsonl") if row["link"] == 3]
    assert len(seen) == 4
    for row in seen:
        A, B = (f"base_model.model.{name}" for name in lora_names(row["layer"]))
        change = sum(
            each["lora_alpha"] / each["r"] * link[B].double() @ link[A].double()
            for each, link in zip(said, links, strict=True)
        )
        start = base[f"{row['layer']}.weight"].double().T
        assert row["sum_norm"] == pytest.approx(float(change.norm()), rel=1e-5)
        assert row["intruders"] == expected_intruders(start + change, start)
