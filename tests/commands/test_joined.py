"""A chain as one adapter: its links side by side, cut after a link, or the nearest one of a lower rank."""

import json

import pytest
import torch

from cola_ds.commands import export as exporting
from cola_ds.commands.joined import compress, join, served, truncated
from cola_ds.errors import UserError
from cola_ds.run.adapters import open_adapter
from cola_ds.run.fingerprint import model_fingerprint
from cola_ds.run.peft_files import lora_names, read_link
from tests.commands.test_export import learnt_from
from tests.support.toys import save_model


def link(layers, lora_rank, seed, **sizes):
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for layer, (rows, columns) in layers.items():
        A, B = lora_names(layer)
        found |= {A: torch.randn(lora_rank, columns, generator=draw), B: torch.randn(rows, lora_rank, generator=draw)}
    return found


def dense(held, layer, scaling=1.0):
    A, B = lora_names(layer)
    return scaling * held[B].double() @ held[A].double()


def test_links_of_other_layers_and_ranks_side_by_side():
    """The sum of all, layer by layer; biases as the last link that has them left them."""
    one, two = link({"a": (5, 7), "b": (4, 7)}, 3, 1), link({"b": (4, 7), "c": (6, 2)}, 2, 2)
    one |= {"a.base_layer.bias": torch.ones(5), "b.base_layer.bias": torch.ones(4)}
    two |= {"b.base_layer.bias": torch.zeros(4)}
    joined = join([one, two], [0.5, 2.0])
    for layer, wanted in (
        ("a", dense(one, "a", 0.5)),
        ("b", dense(one, "b", 0.5) + dense(two, "b", 2.0)),
        ("c", dense(two, "c", 2.0)),
    ):
        torch.testing.assert_close(dense(joined, layer), wanted, rtol=1e-6, atol=1e-6)
        assert [
            len(joined[name]) if name.endswith("A.weight") else joined[name].shape[1] for name in lora_names(layer)
        ] == [5, 5]
    assert joined["a.base_layer.bias"].tolist() == [1] * 5
    assert joined["b.base_layer.bias"].tolist() == [0] * 4


@pytest.mark.parametrize("shape", [(40, 30), (6, 30), (40, 4)])
def test_the_nearest_of_a_lower_rank_is_that_of_the_dense_matrix(shape):
    """By torch's own SVD of it, to fp32; layers that are smaller than the chain's rank, or the one wanted, too."""
    held = link({"a": shape}, 10, 3)
    whole = dense(held, "a")
    U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
    for r in (1, 3, 8):
        A, B, lost, square = truncated(*(held[name] for name in lora_names("a")), r)
        assert (A.shape, B.shape) == ((r, shape[1]), (shape[0], r))
        wanted = U[:, :r] * S[:r] @ Vh[:r]
        torch.testing.assert_close(B.double() @ A.double(), wanted, rtol=1e-5, atol=1e-5)
        assert lost == pytest.approx(float((whole - wanted).square().sum()), rel=1e-6, abs=1e-9)
        assert square == pytest.approx(float(whole.square().sum()))


def test_no_matrix_of_a_weights_size_is_made(monkeypatch):
    """Layers of 2^18 inputs and outputs, whose product would have 512 GiB."""
    held = link({"a": (2**18, 2**18)}, 4, 0)
    A, B, *_ = truncated(*(held[name] for name in lora_names("a")), 2)
    assert (A.shape, B.shape) == ((2, 2**18), (2**18, 2))


def test_the_error_by_layer_and_of_all():
    layers = {"a": (20, 16), "b": (16, 24)}
    joined = link(layers, 6, 1)
    before = {layer: dense(joined, layer) for layer in layers}
    found = compress(joined, 2)
    lost = {layer: float((before[layer] - dense(joined, layer)).norm()) for layer in layers}
    for layer, error in lost.items():
        norm = float(before[layer].norm())
        assert found["layers"][layer] == pytest.approx(
            {"norm": norm, "error": error, "relative_error": error / norm}, rel=1e-5
        )
    of_all = sum(error**2 for error in lost.values()) ** 0.5
    assert found["total"]["error"] == pytest.approx(of_all, rel=1e-5)
    assert found["total"]["relative_error"] == pytest.approx(
        of_all / sum(float(held.square().sum()) for held in before.values()) ** 0.5, rel=1e-5
    )
    assert (found["lora_rank"], found["lora_rank_before"]) == (2, 6)


@pytest.fixture
def learnt(tmp_path, monkeypatch):
    """What a finished run of three links of rank 3 has learnt."""
    found = learnt_from(tmp_path, save_model(tmp_path / "base"), dtype="fp32", links=3)
    monkeypatch.setattr(exporting, "read_learnt", lambda run: found)
    return found


def test_the_rank_of_an_export(learnt, tmp_path):
    said = []
    exporting.export("run", "peft", tmp_path / "small", svd_rank=2, say=said.append)
    report = json.loads((tmp_path / "small/svd.json").read_bytes())
    assert (report["lora_rank"], report["lora_rank_before"], len(report["layers"])) == (2, 9, 4)
    assert said[-1].startswith("LoRA rank 9 -> 2: error ")
    assert f"({report['total']['relative_error']:.2%})" in said[-1]
    assert len(said) == 5
    adapter = open_adapter(tmp_path / "small")
    assert (adapter.lora_rank, adapter.scaling, adapter.base) == (2, 1.0, model_fingerprint(learnt.config.model))
    whole = exporting.export("run", "peft", tmp_path / "whole")
    full, small = (read_link(folder / "adapter_model.safetensors") for folder in (whole, tmp_path / "small"))
    for layer, error in report["layers"].items():
        apart = (dense(full, layer) - dense(small, layer)).norm()
        assert float(apart) == pytest.approx(error["error"], rel=1e-4)
    # A rank that the chain has anyway cuts nothing off, and says so.
    for lora_rank in (9, 64):
        said.clear()
        same = exporting.export("run", "peft", tmp_path / str(lora_rank), svd_rank=lora_rank, say=said.append)
        assert said == ["the chain's LoRA rank is 9, which is not above --svd-rank: nothing was cut off"]
        assert (same / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
        assert json.loads((same / "svd.json").read_bytes())["total"]["error"] == 0
    norms = [json.loads((tmp_path / name / "svd.json").read_bytes())["total"]["norm"] for name in ("small", "64")]
    assert norms[0] == pytest.approx(norms[1])


@pytest.mark.parametrize(
    ("ranks", "bias", "expected"),
    [
        ([8, 8], "none", []),
        ([12, 5], "none", ["to serve it: vLLM takes LoRA rank 17 with --max-lora-rank 32, and 16 without"]),
        ([250, 100], "none", ["to serve it: vLLM takes LoRA rank 350 with --max-lora-rank 512, and 16 without"]),
        (
            [512, 1],
            "none",
            ["to serve it: vLLM takes no LoRA rank above 512, and this has 513; see --svd-rank or hf"],
        ),
        ([4], "lora_only", ["to serve it: vLLM takes no adapter with trained biases, as this has; use --to hf"]),
    ],
)
def test_what_vllm_must_be_told(tmp_path, ranks, bias, expected):
    """Of the chain as one adapter, whose rank is the sum; of its links the largest rank counts."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": sum(ranks), "bias": bias}))
    assert list(served(tmp_path)) == expected
    for number, lora_rank in enumerate(ranks):
        (tmp_path / f"links/link-{number:04d}").mkdir(parents=True)
        (tmp_path / f"links/link-{number:04d}/adapter_config.json").write_text(
            json.dumps({"r": lora_rank, "bias": bias})
        )
    said = list(served(tmp_path / "links"))
    assert bool(said) == (max(ranks) > 16 or bias != "none")
    assert not said or "rank 512 with --max-lora-rank 512" in said[0] or max(ranks) != 512


def test_cut_after_a_link(learnt, tmp_path):
    """In every form."""
    for link in (1, 2, 3):
        adapter = exporting.export("run", "peft", tmp_path / f"peft-{link}", upto=link)
        assert open_adapter(adapter).lora_rank == 3 * link
        links = exporting.export("run", "links", tmp_path / f"links-{link}", upto=link)
        assert [path.name for path in sorted(links.iterdir())] == [f"link-{n:04d}" for n in range(1, link + 1)]
        merged = exporting.export("run", "hf", tmp_path / f"hf-{link}", upto=link)
        by_hand = weights_of(learnt.config.model.path)
        for each in learnt.links[:link]:
            held = read_link(each.file)
            for layer in each.layers:
                by_hand[f"{layer}.weight"] = by_hand[f"{layer}.weight"].double() + dense(held, layer, each.scaling)
        for name, tensor in weights_of(merged).items():
            torch.testing.assert_close(tensor.double(), by_hand[name].double(), rtol=1e-6, atol=1e-7)


def weights_of(folder):
    from pathlib import Path

    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "hf", "upto": 0}, r"--upto 0: the chain in .* has 3; give a link from 1 to 3"),
        ({"to": "links", "upto": 4}, r"--upto 4: the chain in .* has 3"),
        ({"to": "hf", "svd_rank": 2}, r"--svd-rank 2: --svd-rank is for --to peft, and this is --to hf"),
        ({"to": "peft", "svd_rank": 0}, r"--svd-rank 0: it must be at least 1"),
    ],
)
def test_refused(learnt, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        exporting.export("run", options.pop("to"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
