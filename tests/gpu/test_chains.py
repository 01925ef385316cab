"""Chains in every dtype, at both stages, with and without offload: losses and weights are those of plain torch on the CPU."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.gpu.support import ALPHA, DTYPES, KNOTS, ON_CPU, RANKS, links_of, run, three_links
from tests.support.reference import chain_of_lora
from tests.support.toys import rows

CASES = [  # engine, dtype, tie, merge, activation checkpointing
    ("zero3", "fp32", "local", "exact", True),
    ("zero2", "fp32", "gathered", "exact", False),
    ("offload", "fp32", "gathered", "plain", True),
    ("zero3", "bf16", "local", "exact", False),
    ("zero2", "bf16", "local", "exact", True),
    ("offload", "bf16", "gathered", "plain", True),
    ("zero3", "fp16", "local", "exact", True),
    ("zero2", "fp16", "gathered", "plain", False),
    ("offload", "fp16", "gathered", "exact", False),
]
# How far losses around 5.7 may lie from the CPU's in fp32, in nats: the same arithmetic in another order (TF32 is off), or bf16's
# and fp16's roundings of 8 and 11 bits in every layer.
LOSS = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}
# And logits around 1 of the export, on the CPU in the same dtype, from the engine's.
LOGITS = {"fp32": 1e-4, "bf16": 4e-2, "fp16": 1e-2}


@pytest.fixture(scope="module")
def reference(toy, tmp_path_factory):
    """Losses and weights of plain torch on the CPU, in fp32."""
    _, config = three_links(toy, tmp_path_factory.mktemp("reference"), "zero3", "fp32")
    losses, model = chain_of_lora(config, KNOTS)
    return torch.tensor(losses), model.state_dict()


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case[:4]))
def ran(request, process, toy, tmp_path_factory):
    """What a run to its end has left, and what was in the engine."""
    from cola_ds.commands.export import export
    from cola_ds.distributed import accelerator
    from cola_ds.distributed.shards import local_shard
    from cola_ds.lora.layers import lora_layers
    from tests.training.test_chain import next_batch, outputs, whole_weights

    engine, dtype, tie, merge, checkpointing = request.param
    if dtype == "fp16" and ON_CPU:
        pytest.skip("DeepSpeed's CPU accelerator lacks fp16")
    folder = tmp_path_factory.mktemp("chain")
    model = {"dtype": dtype, "activation_checkpointing": checkpointing}
    path, _ = three_links(toy, folder, engine, dtype, model=model, chain={"length": 3, "tie": tie, "merge": merge})
    found = {"engine": engine, "dtype": dtype, "merge": merge, "folder": folder / "run"}
    with pytest.MonkeyPatch.context() as patch, run(process, path, patch) as (chain, _):
        chain.train.joined = False  # a padded batch, which plain Transformers takes too
        batch = next_batch(chain)
        found["logits"] = outputs(chain, batch)
        found["weights"] = whole_weights(chain)
        found["skipped"] = chain.state.skipped_steps
        found["remainders"] = chain.state.remainders
        layers = lora_layers(chain.engine.module)
        found["shards"] = {local_shard(layer.weight)[0].device.type for layer in layers.values()}
        states = chain.engine.optimizer.optimizer.state
        found["moments"] = {state["exp_avg"].device.type for state in states.values()}
        found["device"] = accelerator.device().type
        merged = export(folder / "run", "hf", folder / "merged")
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=DTYPES[dtype])
    with torch.no_grad():
        inputs = {"input_ids": batch.input_ids.cpu(), "attention_mask": batch.attention_mask.cpu()}
        found["exported logits"] = plain(**inputs).logits.float()
    found["exported"] = {name: value.float() for name, value in plain.state_dict().items()}
    return found


def merges(ran, toy):
    """By target weight in float64: the base plus all links, that sum rounded once, and rounded at each knot."""
    dtype = DTYPES[ran["dtype"]]
    base = AutoModelForCausalLM.from_pretrained(toy[0], dtype=dtype).state_dict()
    links = links_of(ran["folder"], 3)
    for layer in links[0]:
        total = often = base[f"{layer}.weight"].double()
        for (lora_A, lora_B), lora_rank in zip((link[layer] for link in links), RANKS, strict=True):
            delta = ALPHA / lora_rank * lora_B @ lora_A
            total, often = total + delta, (often + delta).to(dtype).double()
        yield layer, total, total.to(dtype).double(), often


def steps_apart(found, expected, dtype):
    """How many numbers of the dtype lie between two tensors of its values, element by element."""
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    return (found.to(dtype).view(bits).long() - expected.to(dtype).view(bits).long()).abs()


def test_losses_are_those_of_the_cpu(ran, reference):
    expected, _ = reference
    metrics = rows(ran["folder"] / "metrics.jsonl")
    found = torch.tensor([row["loss"] for row in metrics])
    assert expected[0] - expected[-1] > 0.1, "nothing was learnt"
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=LOSS[ran["dtype"]])
    assert ran["skipped"] == 0


def test_weights_follow_those_of_the_cpu(ran, reference, toy):
    _, expected = reference
    base = AutoModelForCausalLM.from_pretrained(toy[0]).state_dict()
    for name, value in expected.items():
        moved = float((value - base[name]).norm())
        off = float((ran["weights"][name] - value).norm())
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            rounding = float((value - value.to(DTYPES[ran["dtype"]]).float()).norm())
            assert off < {"fp32": 1e-2, "bf16": 0.2, "fp16": 0.1}[ran["dtype"]] * moved + 3 * rounding, name
        else:
            assert torch.equal(ran["weights"][name], base[name].to(DTYPES[ran["dtype"]]).float()), name


def test_weights_are_the_base_plus_the_links(ran, toy):
    dtype = DTYPES[ran["dtype"]]
    differ, apart, would_differ, elements = 0, 0, 0, 0
    for layer, total, once, often in merges(ran, toy):
        found = ran["weights"][f"{layer}.weight"]
        if dtype == torch.float32:
            torch.testing.assert_close(found.double(), total, rtol=1e-6, atol=1e-8)
            continue
        expected, other = (once, often) if ran["merge"] == "exact" else (often, once)
        steps = steps_apart(found, expected, dtype)
        differ, apart = differ + int((steps > 0).sum()), max(apart, int(steps.max()))
        would_differ, elements = would_differ + int((found != other).sum()), elements + found.numel()
    if elements:
        # Where a sum in fp32 is halfway between two neighbours; a plain merge rounds at each knot.
        assert apart <= (1 if ran["merge"] == "exact" else len(RANKS))
        assert differ <= 2e-3 * elements
        assert would_differ > 5e-3 * elements  # the other kind of merge would be seen


def test_remainders_are_what_rounding_has_kept_out(ran, toy):
    held = ran["remainders"]
    if ran["dtype"] == "fp32":
        assert not held
        return
    for layer, total, _, _ in merges(ran, toy):
        remainder = held[layer]
        small = ran["dtype"] == "bf16" and ran["merge"] == "exact"
        assert (remainder.kept.device.type, remainder.kept.dtype) == ("cpu", torch.int16 if small else torch.float32)
        assert remainder.kept.is_pinned() == (ran["device"] == "cuda")
        left = total.flatten() - ran["weights"][f"{layer}.weight"].double().flatten()
        assert float(left.abs().max()) > 0
        stored = ran["weights"][f"{layer}.weight"].to(DTYPES[ran["dtype"]]).flatten().to(ran["device"])
        found = remainder.read(0, stored, stored.device).double().cpu()
        torch.testing.assert_close(found, left, rtol=0, atol=3e-8)


def test_everything_is_where_it_belongs(ran):
    assert ran["shards"] == ({"cpu"} if ran["engine"] == "offload" else {ran["device"]})
    assert ran["moments"] == ({"cpu"} if ran["engine"] == "offload" else {ran["device"]})


def test_a_knot_changes_no_loss(ran):
    knots = rows(ran["folder"] / "knots.jsonl")
    assert [row["lora_rank"] for row in knots] == RANKS
    assert [row["rebuild_s"] is None for row in knots] == [False, False, True]
    for row in knots:
        assert row["loss_after"] == pytest.approx(row["loss_before"], abs=LOSS[ran["dtype"]])
        assert (row["rounding_error"] > 1e-3) == (ran["dtype"] != "fp32")
        assert row["peak_memory_bytes"] > 0


def test_an_export_has_the_engines_weights_and_logits(ran):
    dtype = DTYPES[ran["dtype"]]
    for name, value in ran["exported"].items():
        steps = steps_apart(ran["weights"][name], value, dtype)
        if not name.endswith(("q_proj.weight", "v_proj.weight")):
            assert not steps.any(), name
        elif dtype == torch.float32:
            torch.testing.assert_close(value, ran["weights"][name], rtol=1e-6, atol=1e-8)
        else:  # tied on the CPU, whose products may round the last bit of fp32 otherwise: a plain merge so at each knot
            most = 1 if ran["merge"] == "exact" else len(KNOTS)
            assert (int(steps.max()) <= most) and float((steps > 0).float().mean()) <= 2e-3, name
    torch.testing.assert_close(ran["exported logits"], ran["logits"], rtol=0, atol=LOGITS[ran["dtype"]])


def test_switches_of_a_chain(process, toy, tmp_path, monkeypatch):
    """A factor that is not trained stays what was drawn, links are tied with their factors, the optimizer counts on, and what the
    links have learnt is in the rows."""
    from cola_ds.distributed.engine_state import optimizer_scalars
    from cola_ds.lora.layers import draw_lora_A
    from tests.training.test_chain import whole_weights

    factors, lora_rank = (0.5, 1.0, 0.25), 8
    chain = {"merge_weight": list(factors), "optimizer_at_knot": "keep", "diagnostics": True}
    path, _ = three_links(toy, tmp_path, "zero3", "bf16", lora={"rank": lora_rank, "train": "B"}, chain=chain)
    with run(process, path, monkeypatch) as (ended, _):
        assert optimizer_scalars(ended.engine)["step"] == KNOTS[-1]
        weights = whole_weights(ended)
    links, differ, elements = links_of(tmp_path / "run", 3), 0, 0
    base = AutoModelForCausalLM.from_pretrained(toy[0], dtype=torch.bfloat16).state_dict()
    for layer in links[0]:
        total = base[f"{layer}.weight"].double()
        for number, (link, factor) in enumerate(zip(links, factors, strict=True), start=1):
            lora_A, lora_B = link[layer]
            assert torch.equal(lora_A, draw_lora_A(0, number, layer, lora_A.shape).bfloat16().double())
            assert lora_B.abs().max() > 0
            total = total + factor * ALPHA / lora_rank * lora_B @ lora_A
        steps = steps_apart(weights[f"{layer}.weight"], total, torch.bfloat16)
        assert int(steps.max()) <= 1  # where a sum in fp32 is halfway between two neighbours
        differ, elements = differ + int((steps > 0).sum()), elements + steps.numel()
    assert differ <= 2e-3 * elements
    knots, layers = rows(tmp_path / "run/knots.jsonl"), rows(tmp_path / "run/links.jsonl")
    for knot in knots:
        norms = [row["norm"] for row in layers if row["link"] == knot["link"]]
        assert len(norms) == len(links[0])
        assert knot["delta_norm"] == pytest.approx(sum(norm**2 for norm in norms) ** 0.5, rel=1e-5)
    assert knots[-1]["intruder_layers"] == len(links[0])


@pytest.mark.skipif(ON_CPU, reason="DeepSpeed's CPU accelerator lacks fp16")
def test_fp16_finds_its_loss_scale(process, toy, tmp_path, monkeypatch):
    import json

    path, _ = three_links(toy, tmp_path, "zero3", "fp16", chain={"length": 1}, lora={"rank": 8})
    engine = {"zero_optimization": json.loads((tmp_path / "engine.json").read_text())["zero_optimization"]}
    (tmp_path / "engine.json").write_text(json.dumps({**engine, "fp16": {"initial_scale_power": 24}}))
    with run(process, path, monkeypatch) as (chain, _):
        assert 0 < chain.state.skipped_steps < 12
        assert chain.engine.optimizer.loss_scale < 2**24
        assert chain.state.skipped_in_a_row == 0  # an overflow of the scale is no failure
    events = [row for row in rows(tmp_path / "run/events.jsonl") if row["event"] == "skipped"]
    assert len(events) == json.loads((tmp_path / "run/result.json").read_text())["skipped_steps"]
