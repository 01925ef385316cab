"""What happens inside a chain: properties of tune, tie and extend on real ZeRO engines."""

import ctypes
import gc
import os
import re
import time

import pytest
import torch
from safetensors.torch import load_file

from cola_ds.config.loading import load_config
from cola_ds.distributed.launcher import Process
from tests.support.distributed import process_group, run_distributed
from tests.support.toys import ARCHITECTURES, REPOSITORY, TOP_RUNG, run_config, save_model, save_run, save_sums

ENGINES = {
    "zero3": str(REPOSITORY / "tests/support/zero3_sharded.json"),
    "zero2": str(REPOSITORY / "ds_configs/zero2.json"),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    return save_model(folder / "model"), save_sums(folder / "train.jsonl", 50)


def make_chain(process: Process, config_path):
    """A chain at its first step, its folder kept by process 0."""
    from cola_ds.run.folder import RunDir
    from cola_ds.training.build import build_chain
    from cola_ds.training.prepare import prepare

    config = load_config(config_path)
    process_group(process)
    folder = RunDir(config.run.dir) if process.rank == 0 else None
    chain = build_chain(prepare(config, process.world_size), process, folder)
    if folder:
        folder.create(config, {}, {"base": chain.base, "base_links": None})
    return chain


def next_batch(chain):
    """A padded micro batch of this process, on its device."""
    from cola_ds.distributed import accelerator

    optim, train = chain.config.optim, chain.train
    chosen = train.step(0, 99, optim.global_batch_size, optim.micro_batch_size).indices
    return train.data.collate(chosen[train.rank :: train.world_size][: optim.micro_batch_size]).to(accelerator.device())


def outputs(chain, batch):
    """Logits in fp32, without dropout."""
    from cola_ds.distributed.engine import evaluating

    with evaluating(chain.engine):
        logits = chain.engine(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return logits.float().cpu().clone()


def whole_weights(chain):
    """Every parameter by name, whole, on every process."""
    from cola_ds.distributed.shards import gathered

    found = {}
    for name, param in chain.engine.module.named_parameters():
        with gathered([param]):
            found[name] = param.detach().float().cpu().clone()
    return found


def optimizer_state(chain):
    """The optimizer's state tensors and step counts, of this process's shards."""
    inner = getattr(chain.engine.optimizer, "optimizer", chain.engine.optimizer)
    return [value for state in inner.state.values() for value in state.values()]


# -- injection, tuning, a knot -----------------------------------------------------------------------------------------


def through_a_knot(process, path):
    from transformers import AutoModelForCausalLM

    from cola_ds.training.knot import batch_loss, extend_chain, last_batch, tie_knot
    from cola_ds.training.loop import train_step, tune_lora

    chain = make_chain(process, path)
    found = {}
    batch = next_batch(chain)
    plain = AutoModelForCausalLM.from_pretrained(chain.config.model.path, dtype=torch.float32)
    with torch.no_grad():
        expected = plain(input_ids=batch.input_ids.cpu(), attention_mask=batch.attention_mask.cpu()).logits
    found["injected"], found["expected"] = outputs(chain, batch), expected

    found["weights before"] = whole_weights(chain)
    tune_lora(chain)
    last = last_batch(chain)
    found["weights tuned"] = whole_weights(chain)
    found["moments tuned"] = sum(float(v.abs().sum()) for v in optimizer_state(chain))
    found["tuned"] = outputs(chain, batch)
    losses = [batch_loss(chain, last)]
    found["knot"] = tie_knot(chain)
    found["losses"] = [*losses, batch_loss(chain, last)]
    found["tied"] = outputs(chain, batch)
    found["weights tied"] = whole_weights(chain)
    chain.folder = None
    tie_knot(chain)  # B is zero: a second tie adds nothing
    found["tied twice"] = outputs(chain, batch)

    extend_chain(chain)
    chain.state.link = 2
    found["state after extend"] = sum(float(v.abs().sum()) for v in optimizer_state(chain))
    found["extended"] = outputs(chain, batch)
    found["weights extended"] = whole_weights(chain)

    optim = chain.config.optim
    examples = chain.train.step(chain.state.step, 0, optim.global_batch_size, optim.micro_batch_size)
    train_step(chain.engine, examples, optim.lr, process.world_size)
    found["steps after one"] = {float(v) for v in optimizer_state(chain) if v.numel() == 1}
    found["weights one step on"] = whole_weights(chain)
    return found


@pytest.fixture(
    scope="module",
    params=[
        (1, 4, {}), pytest.param((2, 3, {}), marks=pytest.mark.core), (2, 4, {}), (4, 3, {}),
        (2, 3, TOP_RUNG), (2, 4, TOP_RUNG),
    ],
    ids=lambda param: f"{param[0]}-4to{param[1]}{'-top' if param[2] else ''}",
)  # fmt: skip
def knot(request, toy, tmp_path_factory):
    """What each process found; the second link has another LoRA rank, or the same one and starts in place."""
    world_size, next_rank, sections = request.param
    folder = tmp_path_factory.mktemp("knot")
    config = run_config(*toy, folder / "run", **sections, lora={"rank": [4, next_rank]}, optim={"micro_batch_size": 2})
    return run_distributed(through_a_knot, world_size, save_run(folder / "run.yaml", config))


def test_injection_changes_no_output(knot):
    for found in knot:
        torch.testing.assert_close(found["injected"], found["expected"], rtol=1e-5, atol=1e-6)


def test_training_moves_adapters_only(knot):
    before, after = knot[0]["weights before"], knot[0]["weights tuned"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith(("lora_A", "lora_B"))}
    assert len(moved) == 8  # two layers, q_proj and v_proj


def test_knot_keeps_outputs(knot):
    for found in knot:
        assert not torch.allclose(found["tuned"], found["injected"], rtol=1e-3)  # the link had learnt something to lose
        for after in ("tied", "tied twice", "extended"):
            torch.testing.assert_close(found[after], found["tuned"], rtol=1e-5, atol=1e-5)
        before, after = found["losses"]
        assert before == pytest.approx(after, rel=1e-5)


def test_tie_adds_the_link_to_the_base(knot):
    before, tuned, tied = (knot[0][f"weights {name}"] for name in ("before", "tuned", "tied"))
    layers = [name.removesuffix(".lora_A") for name in before if name.endswith("lora_A")]
    change = 0.0
    for layer in layers:
        delta = 8 / 4 * tuned[f"{layer}.lora_B"].double() @ tuned[f"{layer}.lora_A"].double()
        expected = before[f"{layer}.weight"].double() + delta
        torch.testing.assert_close(tied[f"{layer}.weight"].double(), expected, rtol=0, atol=1e-7)
        assert not tied[f"{layer}.lora_B"].any()
        change += float(delta.square().sum())
    assert knot[0]["knot"]["delta_norm"] == pytest.approx(change**0.5, rel=1e-5)


def test_extend_starts_anew_and_alike(knot):
    from cola_ds.lora.layers import draw_lora_A

    first = knot[0]["weights extended"]
    for name in [name for name in first if name.endswith("lora_A")]:
        expected = draw_lora_A(0, 2, name.removesuffix(".lora_A"), tuple(first[name].shape))
        assert torch.equal(first[name], expected)
    assert knot[0]["moments tuned"] > 0
    for found in knot:
        assert found["state after extend"] == 0  # no moment and no step count is left
        assert found["steps after one"] <= {1.0}  # Adam counts from the first step again
        for name, value in found["weights extended"].items():
            assert torch.equal(value, first[name])
            if name.endswith("lora_B"):
                assert not value.any()
            if name.endswith("lora_A"):
                assert value.std() > 0
                assert not torch.equal(value, found["weights tied"][name])


def test_b_moves_at_the_first_step_after_a_knot(knot):
    extended, stepped = knot[0]["weights extended"], knot[0]["weights one step on"]
    for name in extended:
        if name.endswith("lora_B"):
            assert (stepped[name] != 0).any()  # its gradient is not zero
        else:
            assert torch.equal(stepped[name], extended[name])  # A's first gradient is zero while B is


# -- in place, or rebuilt ----------------------------------------------------------------------------------------------


def extend_by_a_rebuild(chain):
    """What extend_chain does where the LoRA rank changes."""
    from functools import partial

    from cola_ds.distributed import accelerator
    from cola_ds.distributed.engine import rebuild_engine
    from cola_ds.lora.layers import start_link
    from cola_ds.training.optim import make_optimizer

    config, link = chain.config, chain.state.link + 1
    start_link(
        chain.engine.module, link, config.lora_ranks[0], config.lora.alpha, config.run.seed, accelerator.device()
    )
    chain.engine = rebuild_engine(chain.engine, chain.engine_config, partial(make_optimizer, config.optim))
    chain.engine.train()


def three_links(process, path, in_place):
    from cola_ds.training.knot import batch_loss, extend_chain, last_batch, tie_knot
    from cola_ds.training.loop import tune_lora

    chain = make_chain(process, path)
    norms = []
    for link in (1, 2, 3):
        tune_lora(chain)
        batch_loss(chain, last_batch(chain))
        norms.append(float(chain.engine.get_global_grad_norm()))
        tie_knot(chain)
        if link < 3:
            extend_chain(chain) if in_place else extend_by_a_rebuild(chain)
            chain.state.link, chain.state.step_in_link = link + 1, 0
    return whole_weights(chain), norms


@pytest.mark.parametrize(
    ("engine", "dtype", "optimizer"),
    [
        ("tests/support/zero3_sharded", "fp32", "adamw"),
        ("tests/support/zero3_sharded", "bf16", "adagrad"),
        ("ds_configs/zero3_offload_cpu", "bf16", "adamw"),
        ("ds_configs/zero2", "bf16", "adamw"),
        ("ds_configs/zero2", "fp32", "sgd"),
    ],
)
def test_extending_in_place_is_a_rebuild_bit_for_bit(toy, tmp_path, engine, dtype, optimizer):
    found = []
    for in_place in (True, False):
        config = run_config(
            *toy, tmp_path / f"run-{in_place}", model={"dtype": dtype}, chain={"length": 3}, lora={"rank": 11},
            optim={"name": optimizer, "lr": 1e-2, "weight_decay": 0.1, "max_steps": 9},
            deepspeed=str(REPOSITORY / f"{engine}.json"),
        )  # fmt: skip
        path = save_run(tmp_path / f"{in_place}.yaml", config)
        found.append(run_distributed(three_links, 2, path, in_place)[0])
    (weights, norms), (rebuilt_weights, rebuilt_norms) = found
    assert norms == rebuilt_norms
    assert len(set(norms)) == 3
    for name in weights:
        assert torch.equal(weights[name], rebuilt_weights[name]), name


# -- half precision ----------------------------------------------------------------------------------------------------


def bf16_knot_and_a_step(process, path):
    from cola_ds.training.knot import batch_loss, extend_chain, last_batch, tie_knot
    from cola_ds.training.loop import train_step, tune_lora

    chain = make_chain(process, path)
    before = whole_weights(chain)
    tune_lora(chain)
    last = last_batch(chain)
    tuned, batch = whole_weights(chain), next_batch(chain)
    batch_loss(chain, last)
    row = tie_knot(chain)
    tied = whole_weights(chain)
    extend_chain(chain)
    chain.state.link = 2
    extended = outputs(chain, batch)
    optim = chain.config.optim
    examples = chain.train.step(chain.state.step, 0, optim.global_batch_size, optim.micro_batch_size)
    train_step(chain.engine, examples, 1e-9, process.world_size)  # a step too small to show in the outputs
    return before, tuned, tied, whole_weights(chain), extended, outputs(chain, batch), row


@pytest.mark.parametrize("next_rank", [3, 4])
@pytest.mark.parametrize("engine", ["zero3", "zero2"])
def test_bf16_knot_is_one_rounding_and_the_old_adapter_stays_away(toy, tmp_path, engine, next_rank):
    config = run_config(
        *toy, tmp_path / "run", model={"dtype": "bf16"}, optim={"lr": 1e-2, "max_steps": 6},
        lora={"rank": [4, next_rank]}, deepspeed=ENGINES[engine],
    )  # fmt: skip
    path = save_run(tmp_path / "run.yaml", config)
    before, tuned, tied, stepped, extended, one_step_on, row = run_distributed(bf16_knot_and_a_step, 2, path)[0]
    for name in [name for name in before if name.endswith("lora_B")]:
        layer = name.removesuffix(".lora_B")
        exact = before[f"{layer}.weight"] + 2 * tuned[name] @ tuned[f"{layer}.lora_A"]
        assert torch.equal(tied[f"{layer}.weight"], exact.bfloat16().float())  # the base, rounded once
        assert tuned[name].abs().max() > 1e-3
        assert stepped[name].abs().max() < 1e-6  # the fp32 master of the old link would bring it back here
        assert torch.equal(stepped[f"{layer}.weight"], tied[f"{layer}.weight"])
    torch.testing.assert_close(one_step_on, extended, rtol=0, atol=1e-6)
    assert 0 < row["rounding_error"] < 1


# -- many knots --------------------------------------------------------------------------------------------------------


def count_tensors():
    return sum(
        issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()
    )  # no list of objects outlives the count


def count_through_knots(process, path):
    from cola_ds.training.knot import batch_loss, extend_chain, last_batch, tie_knot
    from cola_ds.training.loop import tune_lora

    chain = make_chain(process, path)
    # Blocks above 128 KiB come from the kernel and go back to it, so that resident memory is memory in use.
    ctypes.CDLL(None).mallopt(-3, 128 * 1024)
    counts = []
    while True:
        tune_lora(chain)
        batch_loss(chain, last_batch(chain))
        tie_knot(chain)
        if chain.state.link == chain.config.chain.length:
            return counts
        extend_chain(chain)
        chain.state.link, chain.state.step_in_link = chain.state.link + 1, 0
        if chain.state.link not in (6, 7, 16, 17, 26, 27):  # two of each LoRA rank
            continue
        gc.collect()
        with open("/proc/self/status", encoding="ascii") as status:
            resident_kib = int(re.search(r"RssAnon:\s+(\d+)", status.read())[1])
        # Tied links' A and B stay, on one process or another, for the figure of the chain's rounding error alone.
        kept = sum(half.nbytes for links in chain.state.earlier.values() for half in links)
        resident_kib -= kept // 1024
        tensors = count_tensors()
        while tensors != (tensors := count_tensors()):  # the thread that reads ahead is at work
            time.sleep(0.1)
        engines = sum(type(thing).__name__ in ("DeepSpeedEngine", "DeepSpeedZeRoOffload") for thing in gc.get_objects())
        modules = list(chain.engine.module.modules())
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules)
        counts.append((tensors, hooks, engines, resident_kib))


@pytest.mark.parametrize(
    ("engine", "dtype", "ranks"),
    [
        ("zero3", "bf16", 512), ("zero3", "fp32", [512, 256] * 13 + [512]), ("zero2", "fp32", 512),
        ("top", "fp32", [512, 256] * 13 + [512]),
    ],
)  # fmt: skip
def test_nothing_grows_over_many_knots(toy, tmp_path, engine, dtype, ranks):
    sections = TOP_RUNG if engine == "top" else {"deepspeed": ENGINES[engine], "model": {}}
    config = run_config(
        *toy, tmp_path / "run", **{**sections, "model": {**sections["model"], "dtype": dtype}}, chain={"length": 27},
        lora={"rank": ranks}, optim={"max_steps": 27, "global_batch_size": 2, "micro_batch_size": 1},
    )  # fmt: skip
    path = save_run(tmp_path / "run.yaml", config)
    for counts in run_distributed(count_through_knots, 2, path, timeout_s=300):
        assert len(counts) == 6
        for alike in (counts[::2], counts[1::2]):
            assert {found[:-1] for found in alike} == {alike[0][:-1]}
        # From the 7th to the 26th knot. A link that stays behind at each would be 9 MiB in fp32. In bf16 that is little beside
        # the code that torch generates for each new shape of a batch, some 45 MiB: there the counts above must tell.
        growth_kib = counts[-1][-1] - counts[1][-1]
        assert growth_kib < {"fp32": 6, "bf16": 80}[dtype] * 1024, counts


# -- every process the same, every engine file, every architecture -----------------------------------------------------


def export_and_compare(process, path, out):
    """Run the chain and export it. Returns the engine's logits before and after, its weights, and the export's logits."""
    from transformers import AutoModelForCausalLM

    from cola_ds.commands.export import export
    from cola_ds.training.loop import run_chain

    chain = make_chain(process, path)
    batch = next_batch(chain)
    before = outputs(chain, batch)
    run_chain(chain)
    logits, weights = outputs(chain, batch), whole_weights(chain)
    if process.rank:
        return None
    chain.logger.folder.write_result({})
    export(chain.config.run.dir, "hf", out)
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        exported = model(input_ids=batch.input_ids.cpu(), attention_mask=batch.attention_mask.cpu()).logits.float()
    return before, logits, weights, exported


def check_export(found, out):
    """The export has the engine's weights to the last bit, and its logits."""
    from transformers import AutoModelForCausalLM

    before, logits, weights, exported = found
    state = AutoModelForCausalLM.from_pretrained(out).state_dict()
    compared = [name for name in weights if "lora_" not in name]
    assert set(compared) <= set(state)
    for name in compared:
        assert torch.equal(weights[name], state[name].float()), name
    half = state[compared[0]].dtype == torch.bfloat16
    assert not torch.allclose(before, logits, atol=1e-2)
    torch.testing.assert_close(exported, logits, rtol=1e-5, atol=1e-2 if half else 1e-5)


@pytest.mark.parametrize(
    ("architecture", "is_top"), [(name, is_top) for name in ARCHITECTURES for is_top in (False, True)]
)
def test_export_gives_the_engines_logits(tmp_path, architecture, is_top):
    sizes = {"attn_pdrop": 0.0} if architecture == "gpt2" else {}  # varlen has no dropout in attention
    model = save_model(tmp_path / "model", architecture, **sizes)
    targets = "all-linear" if architecture != "llama" else ["q_proj", "v_proj"]
    bias = "lora_only" if architecture in ("opt", "qwen2") else "none"
    config = run_config(
        model, save_sums(tmp_path / "train.jsonl", 20), tmp_path / "run", lora={"targets": targets, "bias": bias},
        chain={"length": 3}, optim={"lr": 1e-2}, **(TOP_RUNG if is_top else {}),
    )  # fmt: skip
    path = save_run(tmp_path / "run.yaml", config)
    check_export(run_distributed(export_and_compare, 2, path, tmp_path / "merged")[0], tmp_path / "merged")

    from transformers import AutoTokenizer

    assert (
        AutoTokenizer.from_pretrained(tmp_path / "merged")("12").input_ids
        == AutoTokenizer.from_pretrained(model)("12").input_ids
    )
    if bias == "lora_only":
        base, merged = load_file(model / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
        moved = [name for name in base if name.endswith("q_proj.bias") and not torch.equal(base[name], merged[name])]
        assert len(moved) == 2


@pytest.mark.parametrize("engine", sorted(path.stem for path in (REPOSITORY / "ds_configs").glob("*.json")))
def test_every_engine_file_runs_a_chain(toy, tmp_path, engine):
    dtype = "bf16" if "bf16" in engine else "fp32"
    config = run_config(
        *toy, tmp_path / "run", model={"dtype": dtype, "activation_checkpointing": True}, optim={"lr": 1e-2},
        deepspeed=str(REPOSITORY / f"ds_configs/{engine}.json"),
    )  # fmt: skip
    path = save_run(tmp_path / "run.yaml", config)
    check_export(run_distributed(export_and_compare, 2, path, tmp_path / "merged")[0], tmp_path / "merged")


def full_fine_tuning(process, path):
    from cola_ds.checkpoint.decide import ResumeOptions
    from cola_ds.training.prepare import prepare
    from cola_ds.training.run import run_prepared as train

    process_group(process)
    train(prepare(load_config(path), process.world_size), process, ResumeOptions())
    return os.listdir(load_config(path).run.dir)


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_full_fine_tuning_moves_everything_and_exports(tmp_path, architecture):
    from transformers import AutoModelForCausalLM

    from cola_ds.commands.export import export

    model = save_model(tmp_path / "model", architecture)
    config = run_config(
        model, save_sums(tmp_path / "train.jsonl", 20), tmp_path / "run", chain={"length": 1}, method="full"
    )
    files = run_distributed(full_fine_tuning, 2, save_run(tmp_path / "run.yaml", config))[0]
    assert {"run.yaml", "environment.json", "metrics.jsonl", "result.json", "model"} <= set(files)
    assert "knots.jsonl" not in files
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(export(tmp_path / "run", "hf", tmp_path / "out")).state_dict()
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
