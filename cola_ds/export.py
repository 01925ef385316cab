"""`cola-ds export`: a run's result in a form that others open."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from cola_ds.config import RunConfig
from cola_ds.errors import UserError, first_line
from cola_ds.lora import delta_weight
from cola_ds.rundir import RunFolder, write_adapter

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(run: str | Path, to: str, out: str | Path) -> Path:
    """Write what a finished run has learnt as the new folder `out`, which appears whole or not at all:

    hf: the merged model and its tokenizer. The base is loaded into this process's memory, and each link is tied to it as the run
    did: in order, in the run's dtype.
    peft: the whole chain as one PEFT adapter, whose LoRA rank is the sum of the links' ranks.
    links: each link as a PEFT adapter of its own, to be merged in order.

    Raises UserError when `out` exists, the run has not finished or left no adapters, or its base model is not where it was.
    """
    folder, target = RunFolder(run), Path(out)
    config = folder.config()
    if target.exists():
        raise UserError(f"--out {target} already exists; name a new folder")
    folder.result()
    if to != "hf" and not config.trains_lora:
        raise UserError(f"--to {to}: method {config.method} leaves no adapters; use --to hf")
    links = folder.tied_links()
    if to == "peft":
        _write_chain(config, folder, len(links), target)
        return target
    scratch = target.with_name(target.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    if config.method == "full":
        shutil.copytree(folder.path / "model", scratch)
    elif to == "links":
        for path in links:
            shutil.copytree(path, scratch / path.name)
    else:
        _merge(config, folder, len(links), scratch)
    scratch.rename(target)
    return target


def _write_chain(config: RunConfig, folder: RunFolder, length: int, out: Path) -> None:
    """sum of scaling_i B_i A_i = [scaling_1 B_1, scaling_2 B_2, ..] [A_1; A_2; ..], in fp32, with a scaling of 1."""
    links = [folder.read_link(link) for link in range(1, length + 1)]
    ranks = config.lora_ranks[:length]
    joined: dict[str, Tensor] = {}
    for name, last in links[-1].items():
        if name.endswith(".lora_A.weight"):
            joined[name] = torch.cat([link[name].float() for link in links])
        elif name.endswith(".lora_B.weight"):
            scaled = [link[name].float() * (config.lora.alpha / r) for link, r in zip(links, ranks, strict=True)]
            joined[name] = torch.cat(scaled, dim=1)
        else:
            joined[name] = last  # a trained bias
    layers = [name.removesuffix(".lora_A.weight") for name in joined if name.endswith(".lora_A.weight")]
    write_adapter(out, config, sum(ranks), sum(ranks), layers, joined)


def _merge(config: RunConfig, folder: RunFolder, length: int, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"revision": config.model.revision, "trust_remote_code": config.model.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model.path, **options)
        model = AutoModelForCausalLM.from_pretrained(
            config.model.path, dtype=_DTYPES[config.model.dtype], use_safetensors=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the run's base model {config.model.path} cannot be loaded: {first_line(error)}") from None
    tie_saved_links(model, config, [folder.read_link(link) for link in range(1, length + 1)])
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@torch.no_grad()
def tie_saved_links(model: torch.nn.Module, config: RunConfig, links: list[dict[str, Tensor]]) -> None:
    """W <- W + scaling * B A for each layer and link in order, rounded as the run rounded; trained biases are put in place."""
    layers = (
        [name.removesuffix(".lora_A.weight") for name in links[0] if name.endswith(".lora_A.weight")] if links else []
    )
    for layer in layers:
        weight = model.get_parameter(f"{layer}.weight")
        merged = weight.float()
        for tensors, lora_rank in zip(
            links, config.lora_ranks, strict=False
        ):  # eval.patience may have ended it earlier
            factors = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]
            merged = merged + delta_weight(*factors, config.lora.alpha / lora_rank)
            if config.chain.merge == "plain":
                merged = merged.to(weight.dtype).float()
        weight.copy_(merged)
        if f"{layer}.base_layer.bias" in links[-1]:
            model.get_parameter(f"{layer}.bias").copy_(links[-1][f"{layer}.base_layer.bias"])
