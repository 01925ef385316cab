"""`cola-ds export`: a run's result in a form that others open."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from cola_ds.commands.merge import Merged, lying_weights, tie_saved_links, write_merged
from cola_ds.config.dtypes import DTYPES
from cola_ds.config.loading import check_config
from cola_ds.config.schema import ModelConfig, RunConfig
from cola_ds.errors import UserError, cut, first_line
from cola_ds.run.atomic import scratch_beside, sync_folder
from cola_ds.run.fingerprint import model_fingerprint
from cola_ds.run.learnt import Learnt, read_learnt
from cola_ds.run.model_files import weight_files
from cola_ds.run.model_folder import (
    check_is_there,
    check_no_adapter,
    copy_description,
    model_folder,
    write_model_folder,
)
from cola_ds.run.peft_files import adapter_files, layers_of, lora_names, read_link

_OF_BASE = ("model.path=", "model.revision=")


def export(run: str | Path, to: str, out: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Write what a finished run has learnt as the new folder `out`, which appears whole or not at all:

    hf: the merged model, and all else as the base has it, but for a chat template that the run was given (data.chat_template).
    Each link is tied to the base as the run did: in order, in the run's dtype; a layer at a time, from the base's files into
    files of the same names. A base that Transformers converts as it loads is loaded whole into this process's memory.
    peft: the whole chain as one PEFT adapter, whose LoRA rank is the sum of the links' ranks.
    links: each link as a PEFT adapter of its own, to be merged in order.

    `overrides` say where the base lies now: model.path, model.revision. Raises UserError when `out` exists, the run has not
    finished, is not what it recorded (learnt.py) or has trained nothing, or its base model is not there or is another.
    """
    with _readable(str(run)):
        return _export(run, to, out, overrides)


def _export(run: str | Path, to: str, out: str | Path, overrides: Sequence[str]) -> Path:
    if to not in ("hf", "peft", "links"):
        raise UserError(f"--to {cut(str(to))}: an export is hf, peft or links")
    target, learnt = Path(out), read_learnt(run)
    if target.exists() or target.is_symlink():
        raise UserError(f"--out {target} already exists; name a new folder")
    config = _with_base(learnt, overrides)
    if not config.trains:
        where = (
            config.model.path
            if config.model.links is None
            else f"what the run in {config.model.links} learnt: export that"
        )
        raise UserError(f"{run} only evaluated {where} (method {config.method}): there is nothing of its own to export")
    if to != "hf" and not config.trains_lora:
        raise UserError(f"--to {to}: method {config.method} leaves no adapters; use --to hf")
    if to != "hf" and (overrides or Path(config.model.path).is_dir()):  # the adapters name it
        learnt.check_base(config.model.path, model_fingerprint(config.model))
    scratch = scratch_beside(target)
    try:
        scratch.mkdir(parents=True)
        if to == "peft":
            _write_chain(config, learnt, scratch)
        elif to == "links":
            for link in learnt.links:
                (scratch / link.path.name).mkdir()
                for name in ("adapter_config.json", "adapter_model.safetensors"):
                    shutil.copyfile(link.path / name, scratch / link.path.name / name)
        elif config.method == "full":
            for name in learnt.facts["model"]:
                there = scratch / Path(name).relative_to("model")
                there.parent.mkdir(exist_ok=True)
                shutil.copyfile(learnt.folder / name, there)
        else:
            _merge(config, learnt, scratch)
        if to == "hf" and learnt.facts["chat_template"] is not None:  # instead of the base's
            (scratch / "chat_template.jinja").write_text(learnt.facts["chat_template"], encoding="utf-8")
        scratch.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise UserError(f"--out {target} already exists: another export was quicker; name a new folder") from None
        raise UserError(
            f"--out {target} cannot be written: {error.filename or target}: {error.strerror or error}"
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """Turn what damaged files of a run raise into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, SafetensorError) as error:
        raise UserError(f"{what}: {type(error).__name__}: {first_line(error)}") from None


def _with_base(learnt: Learnt, overrides: Sequence[str]) -> RunConfig:
    for override in overrides:
        if not override.startswith(_OF_BASE):
            raise UserError(
                f"override {override}: an export takes model.path and model.revision, of where the base lies now"
            )
    return check_config(learnt.config.model_dump(exclude_unset=True), list(overrides), "cola-ds export")


def _write_chain(config: RunConfig, learnt: Learnt, out: Path) -> None:
    """sum of scaling_i B_i A_i = [scaling_1 B_1, scaling_2 B_2, ..] [A_1; A_2; ..], in fp32, with a scaling of 1."""
    links = [read_link(link.file) for link in learnt.links]
    joined = dict(links[-1])  # with its trained biases: the last ones are the chain's
    layers = layers_of(joined)
    for layer in layers:
        A, B = lora_names(layer)
        scaled = [link[B].float() * tied.scaling for link, tied in zip(links, learnt.links, strict=True)]
        joined |= {A: torch.cat([link[A].float() for link in links]), B: torch.cat(scaled, dim=1)}
    lora_rank = sum(tied.lora_rank for tied in learnt.links)
    for name, content in adapter_files(config, lora_rank, lora_rank, layers, joined).items():
        (out / name).write_bytes(content)


def _merge(config: RunConfig, learnt: Learnt, out: Path) -> None:
    check_is_there(config.model, f"the base model of {learnt.folder}")
    check_no_adapter(config.model)
    files = _files_here(config.model)
    weights = lying_weights(config.model, files) if files else None
    with ExitStack() as opened:
        links = [opened.enter_context(safe_open(link.file, framework="pt")) for link in learnt.links]
        merged = Merged(links, [link.scaling for link in learnt.links], config.chain.merge == "exact")
        if weights is None or not merged.fits(weights):
            _merge_whole(config, learnt, out)
            return
        learnt.check_base(config.model.path, model_fingerprint(config.model))
        write_merged(files, weights, DTYPES[config.model.dtype].torch_name, merged, out)
    copy_description(config.model, out)


def _files_here(base: ModelConfig) -> list[Path]:
    """The base's weights, as far as they are all here; else Transformers fetches them, or says what is wrong with them."""
    try:
        return weight_files(model_folder(base))
    except (UserError, OSError):
        return []


def _merge_whole(config: RunConfig, learnt: Learnt, out: Path) -> None:
    model = _load_base(config.model)
    learnt.check_base(config.model.path, model_fingerprint(config.model))
    links = [read_link(link.file) for link in learnt.links]
    tie_saved_links(model, links, [link.scaling for link in learnt.links], exact=config.chain.merge == "exact")
    write_model_folder(model, config.model, out)


def _load_base(base: ModelConfig) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    options = {"revision": base.revision, "trust_remote_code": base.trust_remote_code}
    try:
        return AutoModelForCausalLM.from_pretrained(
            base.path, dtype=getattr(torch, DTYPES[base.dtype].torch_name), use_safetensors=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the run's base model {base.path} cannot be loaded: {first_line(error)}") from None
