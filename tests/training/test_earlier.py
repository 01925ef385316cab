"""Chains that go on from a finished run's links (model.links) or from a PEFT adapter (model.adapter)."""

import json
import shutil
import signal

import pytest
import torch

from cola_ds.commands.export import export
from cola_ds.commands.inspect import inspect
from cola_ds.config.loading import load_config
from cola_ds.errors import UserError
from cola_ds.run.earlier import find_earlier
from cola_ds.run.learnt import read_learnt
from cola_ds.run.marker import Marker
from tests.commands.test_cli import cola_ds, under_two_processes
from tests.support.distributed import run_distributed
from tests.support.jobs import at_heartbeat, run_job
from tests.support.runs import _keep_the_chain, record, run_once, train_in
from tests.support.toys import REPOSITORY, run_config, save_model, save_run, save_sums, thorough

IDS = torch.tensor([[1, 70, 80, 90, 100], [1, 5, 6, 7, 8]])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model whose layers have biases, training data, other data; and finished runs of two links of unequal ranks, by dtype. The
    order of their layers is not that of the names."""
    folder = tmp_path_factory.mktemp("earlier")
    model = save_model(folder / "model", "qwen2")
    save_sums(folder / "a.jsonl", 40)
    save_sums(folder / "b.jsonl", 40, seed=5)
    for dtype in ("fp32", "bf16"):
        config = run_config(
            model, folder / "a.jsonl", "unused", model={"dtype": dtype},
            lora={"rank": [4, 2], "bias": "lora_only", "targets": ["q_proj", "k_proj", "v_proj"]},
            optim={"lr": 2e-2, "max_steps": 4},
        )  # fmt: skip
        train_in(folder / dtype, config)
    return folder


def more(place, dtype="fp32", **sections):
    """A run that goes on from there, of one link on other data."""
    options = {
        "model": {"dtype": dtype, "links": str(place / dtype / "run")},
        "lora": {"rank": 3},
        "chain": {"length": 1},
        "optim": {"lr": 2e-2, "max_steps": 3},
    }
    for name, values in sections.items():
        options[name] = {**options.get(name, {}), **values} if isinstance(values, dict) else values
    return run_config(place / "model", place / "b.jsonl", "unused", **options)


def train_and_look(process, path, out):
    """Train as the command does; then process 0 saves all weights, whole, and the logits of some ids."""
    from safetensors.torch import save_file

    from cola_ds.distributed.engine import evaluating
    from cola_ds.distributed.shards import gathered

    kept = _keep_the_chain()
    run_once(process, path)
    model, found = kept[0].engine.module, {}
    with evaluating(kept[0].engine), torch.no_grad():
        found["logits"] = model(input_ids=IDS).logits.clone()
    for name, param in model.named_parameters():
        with gathered([param]):
            found[name] = param.detach().clone()
    if process.rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, out)


def look(folder, config, world_size=2):
    from safetensors.torch import load_file

    folder.mkdir(exist_ok=True)
    path = save_run(folder / "run.yaml", {**config, "run": {**config["run"], "dir": str(folder / "run")}})
    run_distributed(train_and_look, world_size, path, folder / "looked.safetensors")
    return load_file(folder / "looked.safetensors")


def opened(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def close(found, expected, tolerance=1e-5):
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def with_adapter(base, adapter, dtype=torch.float32):
    """PEFT's own reading of an adapter, and its merge."""
    from peft import PeftModel

    return PeftModel.from_pretrained(opened(base, dtype), adapter).eval()


def one_by_one(base, folder):
    """The links of an export, tied in fp32 by hand."""
    from safetensors.torch import load_file

    model = opened(base)
    for link in sorted(folder.iterdir()):
        said = json.loads((link / "adapter_config.json").read_bytes())
        held = load_file(link / "adapter_model.safetensors")
        for layer in said["target_modules"]:
            A, B = (held[f"base_model.model.{layer}.lora_{half}.weight"].float() for half in "AB")
            module = model.get_submodule(layer)
            module.weight.data += said["lora_alpha"] / said["r"] * (B @ A)
            bias = held.get(f"base_model.model.{layer}.base_layer.bias")
            if bias is not None:
                module.bias.data.copy_(bias)
    return model


@pytest.mark.parametrize(("dtype", "bias"), thorough([("fp32", "lora_only"), ("bf16", "none")], [("fp32", "none")]))
def test_a_chain_goes_on_from_a_run(place, tmp_path, dtype, bias):
    """The old run is gone once the new one has ended; what that leaves is the whole chain: the engine, the merged model, the
    adapter in PEFT and the links tied one by one agree."""
    source = shutil.copytree(place / dtype / "run", tmp_path / "old")
    before = opened(
        export(source, "hf", tmp_path / "before"), getattr(torch, {"fp32": "float32"}.get(dtype, "bfloat16"))
    )
    config = more(place, dtype, model={"links": str(source)}, lora={"rank": [3, 5], "bias": bias}, chain={"length": 2})
    engine = look(tmp_path / "new", config)
    source.rename(tmp_path / "gone")
    run = tmp_path / "new/run"
    learnt = read_learnt(run)
    assert [link.lora_rank for link in learnt.chain] == [4, 2, 3, 5]
    assert json.loads((run / "run.json").read_bytes())["facts"]["base_links"] == [
        json.loads((tmp_path / "gone/run.json").read_bytes())["facts"]["links"][i]["sha256"] for i in (0, 1)
    ]
    merged = opened(export(run, "hf", tmp_path / "hf"), before.dtype)
    assert sorted(path.name for path in export(run, "links", tmp_path / "links").iterdir()) == [
        f"link-000{number}" for number in (1, 2, 3, 4)
    ]
    adapter = export(run, "peft", tmp_path / "peft")
    assert json.loads((adapter / "adapter_config.json").read_bytes())["r"] == 14
    for name, parameter in merged.named_parameters():
        assert torch.equal(parameter, engine[name]), name  # to the bit, in bf16 with the old run's remainders
    assert not torch.equal(
        merged.model.layers[0].self_attn.q_proj.weight, before.model.layers[0].self_attn.q_proj.weight
    )
    assert close(engine["logits"], logits(merged), 1e-5 if dtype == "fp32" else 1e-2)
    by_hand, by_peft = one_by_one(place / "model", tmp_path / "links"), with_adapter(place / "model", adapter)
    if dtype == "fp32":
        assert close(logits(by_hand), logits(merged))
        assert close(logits(by_peft), logits(merged))
    whole = by_peft.merge_and_unload()
    start = opened(place / "model", before.dtype).float()  # as the run had it: the base in its dtype
    for name, parameter in merged.named_parameters():
        change = whole.get_parameter(name) - opened_once(place / "model").get_parameter(name)
        wanted = start.get_parameter(name) + change if not name.endswith("bias") else whole.get_parameter(name)
        apart = (parameter.float() - wanted).abs()
        assert (apart <= (2**-8 if dtype == "bf16" else 1e-5) * wanted.abs() + 1e-6).all(), name
    cut = opened(export(run, "hf", tmp_path / "cut", upto=2), before.dtype)
    for name, parameter in cut.named_parameters():
        assert torch.equal(parameter, before.get_parameter(name)), name


_OPENED = {}


def opened_once(folder):
    if folder not in _OPENED:
        _OPENED[folder] = opened(folder)
    return _OPENED[folder]


@pytest.mark.parametrize("engine", thorough(["zero3"], ["zero2"]))
def test_stopped_and_started_again(place, tmp_path, engine):
    """In bf16, whose remainders go on from the old run's; the old run is moved away in between. The same bits."""
    source = shutil.copytree(place / "bf16/run", tmp_path / "old")
    config = more(
        place, "bf16", model={"links": str(source)}, lora={"rank": [3, 2]}, chain={"length": 2}, optim={"max_steps": 6},
        checkpoint={"every_steps": 1},
        **({"deepspeed": str(REPOSITORY / "ds_configs/zero2.json")} if engine == "zero2" else {}),
    )  # fmt: skip
    straight = train_in(tmp_path / "straight", config)
    train_in(tmp_path / "stopped", config, stops=[("step", 1)], end=False)
    source.rename(tmp_path / "gone")
    again = train_in(tmp_path / "stopped", config, stops=[("step", 3)])
    assert again == straight
    assert record(tmp_path / "stopped/run") == record(tmp_path / "straight/run")
    assert len(read_learnt(tmp_path / "stopped/run").chain) == 4
    assert train_in(tmp_path / "stopped", config) == "finished"  # which needs the old run no more than the rest


def test_one_process_follows_two(place, tmp_path):
    found = [look(tmp_path / str(size), more(place, "fp32"), size) for size in (1, 2)]
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert close(tensor, found[1][name]), name


def test_a_link_is_drawn_as_none_before(place, tmp_path):
    """Under the same seed, too: else a continued chain would search where it has searched."""
    from safetensors.torch import load_file

    config = more(place, optim={"lr": 1e-9})
    config["lora"]["rank"] = 4
    train_in(tmp_path / "new", config, 1)
    path = "link-0001/adapter_model.safetensors"
    new, old = load_file(tmp_path / "new/run/chain" / path), load_file(place / "fp32/run/chain" / path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    similar = torch.nn.functional.cosine_similarity(new[name].flatten(), old[name].flatten(), dim=0)
    assert abs(similar) < 0.5


# -- adapters ----------------------------------------------------------------------------------------------------------


def peft_adapter(base, folder, **options):
    """An adapter as PEFT saves it, of random values."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    said = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(opened(base), LoraConfig(**said))
    for name, parameter in model.named_parameters():
        if "lora_" in name or (parameter.requires_grad and name.endswith("bias")):
            parameter.data = 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model.eval()


ADAPTERS = {
    "plain": {},
    "patterns": {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "by root, other layers": {"use_rslora": True, "target_modules": ["o_proj", "up_proj", "v_proj"]},
    "biases": {"bias": "lora_only"},
}


@pytest.mark.parametrize("case", thorough(["patterns", "biases"], ["plain", "by root, other layers"]))
def test_an_adapter_is_the_first_link(place, tmp_path, case):
    """As PEFT itself reads it; and it may be of other layers than those that are trained."""
    theirs = peft_adapter(place / "model", tmp_path / "adapter", **ADAPTERS[case])
    expected = logits(with_adapter(place / "model", tmp_path / "adapter"))
    config = more(place, model={"links": None, "adapter": str(tmp_path / "adapter")})
    engine = look(tmp_path / "new", config, 1 if case == "plain" else 2)
    shutil.rmtree(tmp_path / "adapter")
    run = tmp_path / "new/run"
    first = opened(export(run, "hf", tmp_path / "first", upto=1))
    assert close(logits(theirs), expected)
    assert close(logits(first), expected)
    merged = opened(export(run, "hf", tmp_path / "hf"))
    assert close(engine["logits"], logits(merged))
    assert not close(logits(merged), logits(first), 1e-3)
    adapter = export(run, "peft", tmp_path / "peft")
    assert close(logits(with_adapter(place / "model", adapter)), logits(merged))
    assert close(logits(one_by_one(place / "model", export(run, "links", tmp_path / "links"))), logits(merged))
    again = look(tmp_path / "again", more(place, model={"links": None, "adapter": str(adapter)}, optim={"lr": 1e-9}))
    assert close(again["logits"], logits(merged), 1e-4)  # an export of a chain is an adapter, too


def test_an_adapter_of_layers_whose_weights_lie_the_other_way(place, tmp_path):
    """GPT-2's, the square one among them; with the links that follow, and these cut off again."""
    model = save_model(tmp_path / "model", "gpt2", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    layers = {"target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True}
    theirs = peft_adapter(model, tmp_path / "adapter", **layers)
    config = run_config(
        model, place / "b.jsonl", "unused", model={"adapter": str(tmp_path / "adapter")}, chain={"length": 1},
        lora={"rank": 3, "targets": ["c_attn", "attn.c_proj"]}, optim={"lr": 2e-2, "max_steps": 3},
    )  # fmt: skip
    engine = look(tmp_path / "new", config)
    run = tmp_path / "new/run"
    assert close(logits(opened(export(run, "hf", tmp_path / "first", upto=1))), logits(theirs))
    assert close(logits(opened(export(run, "hf", tmp_path / "hf"))), engine["logits"])
    assert close(logits(with_adapter(model, export(run, "peft", tmp_path / "peft"))), engine["logits"])
    assert not close(engine["logits"], logits(theirs), 1e-3)


def test_an_adapter_in_fp32_for_a_model_in_bf16(place, tmp_path):
    """Its A and B are not rounded: what is rounded is the sum, once."""
    from safetensors.torch import load_file

    peft_adapter(place / "model", tmp_path / "adapter")
    sections = {"model": {"links": None, "adapter": str(tmp_path / "adapter")}, "optim": {"max_steps": 1}}
    engine = look(tmp_path / "new", more(place, "bf16", **sections), 1)
    for name, tensor in load_file(export(tmp_path / "new/run", "hf", tmp_path / "hf") / "model.safetensors").items():
        assert torch.equal(engine[name], tensor), name
    first = load_file(export(tmp_path / "new/run", "hf", tmp_path / "first", upto=1) / "model.safetensors")
    base = load_file(place / "model/model.safetensors")
    held = load_file(tmp_path / "adapter/adapter_model.safetensors")
    for layer in (f"model.layers.{number}.self_attn.{name}_proj" for number in (0, 1) for name in "qv"):
        A, B = (held[f"base_model.model.{layer}.lora_{half}.weight"] for half in "AB")
        wanted = base[f"{layer}.weight"].bfloat16().float() + 8 / 4 * (B @ A)
        assert (first[f"{layer}.weight"] != wanted.bfloat16()).float().mean() < 1e-3  # the last bit of an fp32 product


def test_in_shards_of_each_node(place, tmp_path):
    """The same bits as in shards over all processes."""
    found = [
        train_in(tmp_path / shards, more(place, "bf16", model={"shards": shards}), hosts=[["a", "b"]])
        for shards in ("world", "node")
    ]
    assert found[0] == found[1]
    assert record(tmp_path / "world/run") == record(tmp_path / "node/run")


def test_plan_and_dry_run(place, tmp_path):
    config = more(place, "bf16")
    path = save_run(tmp_path / "run.yaml", {**config, "run": {**config["run"], "dir": str(tmp_path / "run")}})
    done = cola_ds("train", path, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert f"links       those of {place / 'bf16/run'}" in done.stdout
    assert "MiB of host memory for remainders" in done.stdout  # of one link, because others were tied before
    done = cola_ds("plan", path)
    assert done.returncode == 0, done.stderr


# -- refusals ----------------------------------------------------------------------------------------------------------


def refused(*words):
    done = cola_ds(*words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), (done.returncode, done.stderr)
    return done.stderr


def test_what_one_process_alone_reads_is_refused_by_all(place, tmp_path):
    """A value that is not finite: one line, and nobody waits for process 0."""
    from safetensors.torch import load_file, save_file

    peft_adapter(place / "model", tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, file)
    config = more(
        place, model={"links": None, "adapter": str(tmp_path / "adapter")}, run={"dir": str(tmp_path / "run")}
    )
    done, seconds = under_two_processes(save_run(tmp_path / "run.yaml", config))
    assert (done.returncode, done.stderr.count("has values that are not finite")) == (2, 1), done.stderr
    assert "ended with status" not in done.stderr and seconds < 60


def test_a_link_on_top_of_others_is_no_adapter(place):
    run = place / "fp32/run"
    config = load_config(
        save_run(place / "one.yaml", more(place, model={"links": None, "adapter": str(run / "chain/link-0001")}))
    )
    assert find_earlier(config).base is not None
    config = load_config(
        save_run(place / "two.yaml", more(place, model={"links": None, "adapter": str(run / "chain/link-0002")}))
    )
    with pytest.raises(
        UserError, match=r"link-0002 is a link on top of others, .*: name the run by model\.links, or export"
    ):
        find_earlier(config)


def test_an_adapter_of_a_whole_chain_counts_as_its_links(place, tmp_path):
    """Whatever was cut off: what goes on from it draws none of them again."""
    adapter = export(place / "fp32/run", "peft", tmp_path / "cut", upto=1)
    config = load_config(save_run(tmp_path / "run.yaml", more(place, model={"links": None, "adapter": str(adapter)})))
    (link,) = find_earlier(config).links
    assert link.stands_for == 2


def test_an_adapter_that_has_lost_what_it_counts_as_is_another(place, tmp_path):
    """Under the same seed its links would be drawn again."""
    adapter = export(place / "fp32/run", "peft", tmp_path / "adapter")
    config = load_config(save_run(tmp_path / "run.yaml", more(place, model={"links": None, "adapter": str(adapter)})))
    before = find_earlier(config).hashes()
    (adapter / "cola_ds.json").unlink()
    assert find_earlier(config).hashes() != before


def test_half_a_copy_is_none(place, tmp_path):
    """A run that has died between two links of the copy, and whose source is gone, does not go on with the first alone."""
    config = more(place, run={"dir": str(tmp_path / "run")})
    source = shutil.copytree(place / "fp32/run", tmp_path / "source")
    config["model"]["links"] = str(source)
    train_in(tmp_path, config, 1)
    config = load_config(tmp_path / "run.yaml")
    shutil.rmtree(source)
    assert len(find_earlier(config, verified=True).links) == 2
    marker = Marker.read(tmp_path / "run")
    both = marker.facts["earlier"]
    marker.facts["earlier"] = both[:1]
    marker.write()
    with pytest.raises(UserError, match="source"):
        find_earlier(config)
    marker.facts["earlier"] = both
    marker.write()
    (tmp_path / "run/earlier/link-0002/adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"link-0002/adapter_config\.json has changed, and model\.links"):
        find_earlier(config, verified=True)


def test_links_of_another_base_and_other_ways_to_tie(place, tmp_path):
    other = save_model(tmp_path / "other", "qwen2", hidden_size=48)
    for sections, message in (
        ({"model": {"path": str(other)}}, "its model.layers.0.self_attn.q_proj is (48, 48), the link's (32, 32)"),
        (
            {"model": {"path": str(save_model(tmp_path / "alike", "qwen2", vocab_size=310))}},
            "belongs to another base model",
        ),
        ({"model": {"dtype": "bf16"}}, "was tied in fp32, and model.dtype is bf16; set model.dtype=fp32"),
        ({"model": {"links": str(tmp_path)}}, "is no run's folder"),
        ({"lora": {"init": "orthogonal"}}, "lora.init orthogonal knows this run's own links alone"),
        ({"model": {"adapter": "x"}}, "model.links contradicts model.adapter"),
        ({"method": "full"}, "method full contradicts model.links"),
        ({"run": {"dir": str(place / "fp32/run")}}, "which the run reads; name a folder of its own"),
    ):
        config = more(place, **{"run": {"dir": str(tmp_path / "run")}, **sections})
        assert message in refused("train", save_run(tmp_path / "run.yaml", config)), message
        assert not (tmp_path / "run").exists()
    config = more(place, "bf16", chain={"merge": "plain"}, run={"dir": str(tmp_path / "run")})
    assert "was tied with exact merges, and chain.merge is plain" in refused(
        "train", save_run(tmp_path / "run.yaml", config)
    )


def test_what_is_checked_when_a_run_goes_on(place, tmp_path):
    """The links that it began with, wherever they lie; not others, nor none."""
    source = shutil.copytree(place / "fp32/run", tmp_path / "old")
    config = more(place, model={"links": str(source)}, checkpoint={"every_steps": 1})
    train_in(tmp_path / "new", config, 1, stops=[("step", 1)], end=False)
    path, run = tmp_path / "new/run.yaml", tmp_path / "new/run"
    assert "are not set, and when" in refused("train", path, "model.links=null")
    chain = train_in(tmp_path / "longer", more(place), 1)
    assert chain
    assert "has other links than when" in refused("train", path, f"model.links={tmp_path / 'longer/run'}")
    source.rename(tmp_path / "moved")
    assert "old is no run's folder" not in str(find_earlier(load_config(path)).named)
    copy = run / "earlier/link-0002/adapter_model.safetensors"
    kept = copy.read_bytes()
    copy.write_bytes(kept[:-4] + b"\0\0\0\1")
    assert "it was copied from, is not there: put one of them back" in refused("train", path).replace("which ", "")
    assert cola_ds("train", path, f"model.links={tmp_path / 'moved'}").returncode == 0  # which also mends the copy
    assert copy.read_bytes() == kept
    copy.write_bytes(kept[:-4] + b"\0\0\0\1")
    with pytest.raises(
        UserError, match=r"earlier/link-0002/adapter_model\.safetensors is not the link that the run tied"
    ):
        export(run, "hf", tmp_path / "hf")
    copy.unlink()
    with pytest.raises(UserError, match=r"lacks earlier/link-0002"):
        export(run, "peft", tmp_path / "peft")


def test_resumed_from_a_run_on_top_of_other_links(place, tmp_path):
    """In a folder of a run that died before its first checkpoint: what it began with is not the chain's any more, nor are its
    copies."""
    other = train_in(tmp_path / "other", more(place, chain={"length": 3}, optim={"max_steps": 6}), 1)
    assert other
    config = more(place, checkpoint={"every_steps": 1})
    straight = train_in(tmp_path / "straight", config, 1)
    on_others = more(place, model={"links": str(tmp_path / "other/run")}, run={"dir": str(tmp_path / "new/run")})
    words = ["train", save_run(tmp_path / "new.yaml", on_others)]
    (tmp_path / "new").mkdir()
    statuses, said = run_job(tmp_path / "new", words, sabotage=at_heartbeat, arguments=((0,), 2, signal.SIGKILL))
    assert statuses[0] == -signal.SIGKILL, said
    assert len(list((tmp_path / "new/run/earlier").iterdir())) == 5
    taken = {"resume": str(tmp_path / "straight/run/checkpoints/step-00000002")}
    assert train_in(tmp_path / "new", config, 1, words=taken) == straight
    assert sorted(path.name for path in (tmp_path / "new/run/earlier").iterdir()) == ["link-0001", "link-0002"]
    merged, chain = (export(tmp_path / name / "run", "hf", tmp_path / f"{name}-hf") for name in ("new", "straight"))
    assert (merged / "model.safetensors").read_bytes() == (chain / "model.safetensors").read_bytes()


def test_started_anew_after_the_source_is_gone(place, tmp_path):
    """--fresh reads the run's own copies before it removes them."""
    source = shutil.copytree(place / "fp32/run", tmp_path / "old")
    first = train_in(tmp_path / "new", more(place, model={"links": str(source)}), 1)
    source.rename(tmp_path / "moved")
    second = train_in(tmp_path / "new", more(place, model={"links": str(source)}), 1, words={"fresh": True})
    assert first == second
    assert len(read_learnt(tmp_path / "new/run").chain) == 3
    assert f"1 of 1 tied, after 2 of {source}" in inspect(str(tmp_path / "new/run"))
    path = save_run(tmp_path / "x.yaml", more(place, model={"links": str(source)}, run={"dir": str(tmp_path / "x")}))
    assert f"{source} is no run's folder" in refused("train", path)
