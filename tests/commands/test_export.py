"""Exports of merged models: from the base's files into others of the same names, a weight at a time."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from cola_ds.commands import export as exporting
from cola_ds.commands import merge
from cola_ds.config.dtypes import DTYPES
from cola_ds.config.loading import check_config
from cola_ds.errors import UserError
from cola_ds.lora.targets import sizes_of
from cola_ds.run.fingerprint import model_fingerprint
from cola_ds.run.learnt import Learnt, SavedLink
from cola_ds.run.peft_files import adapter_files, bias_name, lora_names
from cola_ds.run.tensor_files import write_tensors
from tests.support.toys import REPOSITORY, run_config, save_model, save_tokenizer

TARGETS = ("q_proj", "v_proj", "attn.c_attn", "attn.c_proj")
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}


def learnt_from(folder, base, dtype="bf16", merge="exact", bias="none", links=2):
    """What a finished run of that base has learnt: links of random values on q_proj and v_proj, or GPT-2's c_attn and c_proj."""
    from transformers import AutoModelForCausalLM

    config = run_config(base, "t.jsonl", folder / "run", model={"dtype": dtype}, lora={"rank": 3, "bias": bias})
    config["chain"] = {"length": links, "merge": merge}
    config = check_config(config, [], "test")
    draw, saved = torch.Generator().manual_seed(3), []
    model = AutoModelForCausalLM.from_pretrained(base)
    modules = {name: module for name, module in model.named_modules() if name.endswith(TARGETS)}
    for link in range(1, links + 1):
        tensors = {}
        for name, module in modules.items():
            A, B = lora_names(name)
            in_features, out_features = sizes_of(module)
            tensors[A] = torch.randn(3, in_features, generator=draw)
            tensors[B] = 1e-3 * torch.randn(out_features, 3, generator=draw)
            if bias != "none":
                tensors[bias_name(name)] = torch.randn(out_features, generator=draw)
        tensors = {name: tensor.to(getattr(torch, DTYPES[dtype].torch_name)) for name, tensor in tensors.items()}
        path = folder / f"run/chain/link-{link:04d}"
        path.mkdir(parents=True)
        for name, content in adapter_files(config, 3, 8, list(modules), tensors).items():
            (path / name).write_bytes(content)
        saved.append(SavedLink(path=path, lora_rank=3, alpha=8, layers=list(modules)))
    fingerprint = model_fingerprint(config.model)
    return Learnt(folder=folder, config=config, result={}, base=fingerprint, links=saved, facts={"chat_template": None})


@pytest.fixture
def export(monkeypatch, tmp_path):
    """Exports what a run has learnt, also as it was done before: with the whole base in memory."""

    def one(learnt, name, whole=False):
        monkeypatch.setattr(exporting, "read_learnt", lambda run: learnt)
        with monkeypatch.context() as patched:
            if whole:
                patched.setattr(exporting, "lying_weights", lambda base, files: None)
            return exporting.export("run", "hf", tmp_path / name)

    return one


def opened(folder):
    """Bits of every parameter and buffer of the model as Transformers opens it, and what it is configured as."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return {name: (tensor.dtype, tensor.contiguous().view(torch.uint8)) for name, tensor in model.state_dict().items()}


def others(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if "model" not in path.name}


CASES = {
    "llama": ("llama", {}, {}, "50GB"),
    "llama of several files": ("llama", {}, {}, "30KB"),
    "llama tied, fp32": ("llama-tied", {}, {"dtype": "fp32"}, "30KB"),
    "llama, plain merges, fp16": ("llama", {}, {"dtype": "fp16", "merge": "plain"}, "50GB"),
    "opt with biases": ("opt", {}, {"bias": "lora_only"}, "30KB"),
    "qwen2": ("qwen2", {}, {"links": 3}, "50GB"),
    "gpt2, whose c_proj is square": ("gpt2", {}, {"bias": "lora_only"}, "30KB"),
    "mixtral": ("llama", MIXTRAL, {}, "30KB"),
}


@pytest.mark.parametrize("case", CASES)
def test_file_by_file_is_as_a_whole(tmp_path, export, monkeypatch, case):
    """To the bit, and beside the weights to the byte. Mixtral's experts, which Transformers fuses, take the model whole."""
    from transformers import AutoModelForCausalLM

    kind, sizes, options, shards = CASES[case]
    base = save_model(tmp_path / "base", kind, **sizes)
    model = AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size=shards)
    learnt = learnt_from(tmp_path, base, **options)
    written, inner = [], merge.write_tensors
    monkeypatch.setattr(merge, "write_tensors", lambda path, *rest: written.append(path.name) or inner(path, *rest))
    parts = export(learnt, "parts")
    assert sorted(written) == ([] if case == "mixtral" else sorted(path.name for path in base.glob("*.safetensors")))
    whole = export(learnt, "whole", whole=True)
    found, expected, before = opened(parts), opened(whole), opened(base)
    assert found.keys() == expected.keys() == before.keys()
    changed = 0
    for name, (dtype, bits) in expected.items():
        assert found[name][0] == dtype == getattr(torch, DTYPES[options.get("dtype", "bf16")].torch_name)
        assert torch.equal(found[name][1], bits), name
        old = before[name][1].view(torch.float32).to(dtype).view(torch.uint8)
        changed += not torch.equal(bits, old)
    assert changed == 4 * (2 if "bias" in options else 1)  # q_proj and v_proj in two layers
    assert others(parts) == others(whole)
    assert (parts / "config.json").read_bytes() == (whole / "config.json").read_bytes()
    if case != "mixtral":
        assert {path.name for path in parts.iterdir()} == {path.name for path in base.iterdir()} | {"README.md"}


def test_what_transformers_keeps_in_fp32(tmp_path, export, monkeypatch):
    """It knows which: such a model is loaded whole."""
    from safetensors.torch import load_file
    from transformers import LlamaPreTrainedModel

    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules_strict", ["norm"])
    learnt = learnt_from(tmp_path, save_model(tmp_path / "base"))
    found = load_file(export(learnt, "out") / "model.safetensors")
    assert found["model.norm.weight"].dtype == torch.float32
    assert found["lm_head.weight"].dtype == torch.bfloat16


def test_a_base_without_the_models_prefix(tmp_path, export):
    """As of a model without its head: Transformers puts it in front. And a weight that the model does not use is left out."""
    from safetensors.torch import load_file, save_file

    base = save_model(tmp_path / "base", "llama-tied")
    tensors = {name.removeprefix("model."): value for name, value in load_file(base / "model.safetensors").items()}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    learnt = learnt_from(tmp_path, base)
    parts = export(learnt, "parts")
    written = load_file(parts / "model.safetensors")
    assert written.keys() == tensors.keys() - {"layers.0.self_attn.rotary_emb.inv_freq"}
    found, expected = opened(parts), opened(export(learnt, "whole", whole=True))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name][1], bits) for name, (_, bits) in expected.items())


@pytest.fixture
def with_vision(tmp_path):
    """A small Llama 4 as a whole: of it Transformers opens the language model alone."""
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    text = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "intermediate_size_mlp": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1,
        "attention_chunk_size": 64, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
        "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
    }  # fmt: skip
    model = Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision))
    model.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    save_tokenizer(tmp_path / "base")
    return tmp_path / "base"


def test_what_lies_beside_the_language_model_goes_along(tmp_path, export, with_vision):
    from transformers import AutoModelForImageTextToText

    models = [
        AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
        for folder in (with_vision, export(learnt_from(tmp_path, with_vision), "out"))
    ]
    for _, said in models:
        assert not said["missing_keys"] and not said["unexpected_keys"]
    (before, _), (after, _) = models
    changed = {
        name
        for name, weight in after.state_dict().items()
        if not torch.equal(weight, before.state_dict()[name].to(torch.bfloat16))
    }
    assert len(changed) == 4 and all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in changed)
    assert not any("vision" in name for name in changed)


def test_what_cannot_go_along_is_not_left_behind(tmp_path, export, with_vision):
    with pytest.raises(UserError, match=r"is more than the Llama4ForCausalLM that was trained, .* use --to peft"):
        export(learnt_from(tmp_path, with_vision), "out", whole=True)
    assert not (tmp_path / "out").exists()


def test_a_target_that_is_not_among_the_files(tmp_path, export):
    """Never a model without a part of what was learnt: such a base is loaded whole, and has it or does not."""
    base = save_model(tmp_path / "base")
    learnt = learnt_from(tmp_path, base)
    weights = merge.lying_weights(learnt.config.model, [base / "model.safetensors"])
    links = [SavedKeys(lora_names("model.layers.9.self_attn.q_proj"))]
    assert not merge.Merged(links, [1.0], True).fits(weights)
    links = [SavedKeys(lora_names("model.layers.1.self_attn.q_proj"))]
    assert merge.Merged(links, [1.0], True).fits(weights)


class SavedKeys:
    """The names in a link's file."""

    def __init__(self, names):
        self.names = [merge.PREFIX + name for name in names]

    def keys(self):
        return self.names


@pytest.mark.parametrize("fault", ["full", "changed"])
def test_nothing_half_written_is_left(tmp_path, export, monkeypatch, fault):
    from transformers import AutoModelForCausalLM

    base = save_model(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="30KB")
    (base / "model.safetensors").unlink()
    learnt = learnt_from(tmp_path, base)
    there = sorted(path.name for path in tmp_path.iterdir())
    inner, written = merge.write_tensors, []

    def no_room(path, *rest):
        if written:
            path.write_bytes(b"a part")
            raise OSError(28, "No space left on device", str(path))
        written.append(path)
        return inner(path, *rest)

    if fault == "full":
        monkeypatch.setattr(merge, "write_tensors", no_room)
    else:
        (base / "config.json").write_text((base / "config.json").read_text() + " ")
    with pytest.raises(UserError, match="No space left" if fault == "full" else "is not the base model of"):
        export(learnt, "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == there


def test_all_of_it_is_on_the_disk_before_it_appears(tmp_path, export, monkeypatch):
    import cola_ds.run.atomic as atomic

    learnt = learnt_from(tmp_path, save_model(tmp_path / "base"))
    inner, synced, out = os.fsync, set(), tmp_path / "out"

    def sync(handle):
        if not out.exists():
            synced.add(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        inner(handle)

    monkeypatch.setattr(atomic.os, "fsync", sync)
    export(learnt, "out")
    assert {path.name for path in out.rglob("*")} <= synced


def test_a_terminated_export_leaves_nothing(tmp_path, monkeypatch):
    """As a scheduler ends one. The signal means afterwards what it meant before."""
    from cola_ds.cli import main

    before, seen = signal.getsignal(signal.SIGTERM), []

    def copy(links, scratch):
        (scratch / "half").write_bytes(b"x")
        seen.append(scratch)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    monkeypatch.setattr(
        exporting, "read_learnt", lambda run: learnt_from(tmp_path / "a", save_model(tmp_path / "base"))
    )
    monkeypatch.setattr(exporting, "_copy_links", copy)
    with pytest.raises(SystemExit) as ended:
        main(["export", "run", "--to", "links", "--out", str(tmp_path / "out")])
    assert ended.value.code == 128 + signal.SIGTERM
    assert seen and not seen[0].exists() and not (tmp_path / "out").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_disk_that_is_full_for_links(tmp_path, monkeypatch):
    """It is the copy that finds no room, which the error names second."""

    def no_room(source, target):
        raise OSError(28, "No space left on device", str(source), None, str(target))

    learnt = learnt_from(tmp_path, save_model(tmp_path / "base"))
    monkeypatch.setattr(exporting, "read_learnt", lambda run: learnt)
    monkeypatch.setattr(exporting.shutil, "copyfile", no_room)
    with pytest.raises(
        UserError, match=r"cannot be written: \S*/link-0001/adapter_config\.json: No space left"
    ) as caught:
        exporting.export("run", "links", tmp_path / "out")
    assert "run/chain" not in str(caught.value)


def test_a_file_is_what_safetensors_writes(tmp_path):
    """Read back by it: dtypes of several sizes, empty tensors, scalars, names of other letters."""
    from safetensors.torch import load_file

    tensors = {
        "A": torch.randn(3, 5).bfloat16(),
        "ß": torch.ones(1),
        "b": torch.randn(4),
        "empty": torch.ones(0, 2),
        "c": torch.tensor(2.0),
    }
    kinds = {name: ("BF16" if t.dtype == torch.bfloat16 else "F32", list(t.shape)) for name, t in tensors.items()}
    assert write_tensors(tmp_path / "x.safetensors", kinds, tensors.__getitem__) == 30 + 4 + 16 + 4
    content = (tmp_path / "x.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert size % 8 == 0
    assert all(header[name]["data_offsets"][0] % tensor.itemsize == 0 for name, tensor in tensors.items())
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())


# -- memory ------------------------------------------------------------------------------------------------------------


def own_bytes():
    """Memory of this process alone: pages of mapped files, which the kernel drops at will, are not among it."""
    with open("/proc/self/status", encoding="ascii") as status:
        return int(re.search(r"RssAnon:\s+(\d+)", status.read())[1]) * 1024


def peak_of_an_export(folder, way):
    """Runs in a process of its own: the most that it has held above what it held before."""
    learnt = learnt_from(folder / way, folder / "base")
    exporting.read_learnt = lambda run: learnt
    if way == "whole":
        exporting.lying_weights = lambda base, files: None
    before, peak, done = own_bytes(), [0], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], own_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    exporting.export("run", "hf", folder / way / "out")
    done.set()
    watcher.join()
    print(json.dumps({"peak": peak[0] - before}), flush=True)
    os._exit(0)


def test_an_export_holds_a_weight_at_a_time(tmp_path):
    """Whatever the model's size: 330 MB in files of 30 MB, whose largest weight has 16."""
    from transformers import AutoModelForCausalLM

    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 5, "num_key_value_heads": 4}
    base = save_model(tmp_path / "base", **sizes)
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="30MB")
    (base / "model.safetensors").unlink()
    whole = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    found = {}
    for way in ("parts", "whole"):
        words = [sys.executable, "-m", "tests.commands.test_export", str(tmp_path), way]
        done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found[way] = json.loads(done.stdout.splitlines()[-1])["peak"]
        shutil.rmtree(tmp_path / way)
    assert found["parts"] < 2 * 30e6 + 40e6 < whole / 2 < found["whole"], (found, whole)


if __name__ == "__main__":
    peak_of_an_export(Path(sys.argv[1]), sys.argv[2])
