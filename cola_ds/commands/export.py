"""`cola-ds export`: a run's result in a form that others open."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cola_ds import notices
from cola_ds.commands.card import write_card
from cola_ds.commands.joined import compress, describe, join, served
from cola_ds.commands.merge import Merged, is_whole, lying_weights, tie_saved_links, transposed_layers, write_merged
from cola_ds.config.dtypes import DTYPES
from cola_ds.config.loading import check_config
from cola_ds.config.schema import ModelConfig, RunConfig
from cola_ds.errors import UserError, cut, first_line, quoted
from cola_ds.run.atomic import scratch_beside, sync_all, sync_path
from cola_ds.run.fingerprint import model_fingerprint
from cola_ds.run.learnt import Learnt, SavedLink, read_learnt
from cola_ds.run.model_files import weight_files
from cola_ds.run.model_folder import (
    check_is_there,
    check_no_adapter,
    copy_description,
    model_folder,
    write_model_folder,
)
from cola_ds.run.peft_files import BASE, adapter_files, is_bias, layers_of, lora_names, read_link

_OF_BASE = ("model.path=", "model.revision=")


def export(
    run: str | Path, to: str, out: str | Path, overrides: Sequence[str] = (), *, upto: int | None = None,
    svd_rank: int | None = None, say: Callable[[str], None] = notices.result,
) -> Path:  # fmt: skip
    """Write what a finished run has learnt as the new folder `out`, which appears whole or not at all:

    hf: the merged model, and all else as the base has it, but for a chat template that the run was given (data.chat_template).
    Each link is tied to the base as the run did: in order, in the run's dtype; a layer at a time, from the base's files into
    files of the same names. A base that Transformers converts as it loads is loaded whole into this process's memory.
    peft: the whole chain as one PEFT adapter, whose LoRA rank is the sum of the links' ranks.
    links: each link as a PEFT adapter of its own, to be merged in order.

    Links that were tied before the run's own (model.links, model.adapter) are a part of the chain. `upto` cuts it after so many,
    these included. `svd_rank`, with peft, puts the nearest adapter of that LoRA rank in its place: the error, by layer and of all
    (Frobenius), is given to `say` and written to svd.json in `out`. A model and an adapter have a model card, README.md.

    `overrides` say where the base lies now: model.path, model.revision. Raises UserError when `out` exists, the run has not
    finished, is not what it recorded (learnt.py) or has trained nothing, or its base model is not there or is another.
    """
    with _readable(str(run)):
        return _export(run, to, out, overrides, upto, svd_rank, say)


def _export(
    run: str | Path, to: str, out: str | Path, overrides: Sequence[str], upto: int | None, svd_rank: int | None,
    say: Callable[[str], None],
) -> Path:  # fmt: skip
    if svd_rank is not None and (to != "peft" or svd_rank < 1):
        why = (
            f"--svd-rank is for --to peft, and this is --to {cut(str(to))}" if to != "peft" else "it must be at least 1"
        )
        raise UserError(f"--svd-rank {quoted(svd_rank)}: {why}")
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
    links, found = _up_to(learnt, upto), None
    scratch = scratch_beside(target)
    try:
        scratch.mkdir(parents=True)
        if to == "peft":
            found = _write_chain(config, learnt, links, svd_rank, scratch)
        elif to == "links":
            _copy_links(links, scratch)
        elif config.method == "full":
            _copy_model(learnt, scratch)
        else:
            _merge(config, learnt, links, scratch)
        if to != "links":
            write_card(learnt, config, links, to, _folder_here(config.model), scratch, found)
        if to == "hf" and learnt.facts["chat_template"] is not None:  # instead of the base's
            (scratch / "chat_template.jinja").write_text(learnt.facts["chat_template"], encoding="utf-8")
        sync_all(scratch)
        scratch.rename(target)
        sync_path(target.parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise UserError(f"--out {target} already exists: another export was quicker; name a new folder") from None
        raise UserError(
            f"--out {target} cannot be written: {error.filename2 or error.filename or target}: {error.strerror or error}"
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if upto is not None and learnt.earlier:
        say(f"up to link {upto} of {len(learnt.chain)}, of which {len(learnt.earlier)} were tied before the run's own")
    for line in (*(describe(found) if found else ()), *served(target)):
        say(line)
    return target


def _copy_links(links: list[SavedLink], out: Path) -> None:
    for number, link in enumerate(links, start=1):
        there = out / f"link-{number:04d}"
        there.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(link.path / name, there / name)


def _copy_model(learnt: Learnt, out: Path) -> None:
    names = list(learnt.facts["model"])
    with notices.Progress("exporting", "file", len(names)) as progress:
        for done, name in enumerate(names):
            progress.at(done)
            there = out / Path(name).relative_to("model")
            there.parent.mkdir(exist_ok=True)
            shutil.copyfile(learnt.folder / name, there)


def _up_to(learnt: Learnt, upto: int | None) -> list[SavedLink]:
    """The links of a chain that are exported. Raises UserError for a link that it has not got."""
    chain = learnt.chain
    if upto is None:
        return chain
    if not chain:
        raise UserError(
            f"--upto {quoted(upto)}: the run in {learnt.folder} has no links: its method is {learnt.config.method}"
        )
    if not 1 <= upto <= len(chain):
        raise UserError(
            f"--upto {quoted(upto)}: the chain in {learnt.folder} has {len(chain)}; give a link from 1 to {len(chain)}"
        )
    return chain[:upto]


def _folder_here(base: ModelConfig) -> Path | None:
    """The base's folder, where it is on this machine already."""
    if Path(base.path).is_dir():
        return Path(base.path)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(base.path, "config.json", revision=base.revision)
    except HFValidationError:  # no name of the hub: the path of a folder that is gone
        return None
    return Path(found).parent if isinstance(found, str) else None


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


def _write_chain(
    config: RunConfig, learnt: Learnt, links: list[SavedLink], svd_rank: int | None, out: Path
) -> dict[str, Any] | None:
    """The links as one adapter. Returns what --svd-rank has found."""
    joined = join([read_link(link.file) for link in links], [link.scaling for link in links])
    found = None if svd_rank is None else compress(joined, svd_rank)
    if found:
        (out / "svd.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    layers = layers_of(joined)
    lora_rank = max(len(joined[lora_names(layer)[0]]) for layer in layers)
    bias = "lora_only" if any(map(is_bias, joined)) else "none"
    transposed = links[-1].transposed
    files = adapter_files(config, lora_rank, lora_rank, layers, joined, transposed, bias=bias)  # a scaling of 1
    # Of the whole chain, whatever is cut off here: one that goes on from this draws none of its links again.
    drawn = len(learnt.links) + sum(row.get("stands_for", 1) for row in learnt.facts.get("earlier", ()))
    files[BASE] = (json.dumps({"base": learnt.base, "links": drawn}) + "\n").encode()
    for name, content in files.items():
        (out / name).write_bytes(content)
    return found


def _merge(config: RunConfig, learnt: Learnt, chain: list[SavedLink], out: Path) -> None:
    check_is_there(config.model, f"the base model of {learnt.folder}")
    check_no_adapter(config.model)
    files = _files_here(config.model)
    weights = lying_weights(config.model, files) if files else None
    with ExitStack() as opened:
        links = [opened.enter_context(safe_open(link.file, framework="pt")) for link in chain]
        transposed = transposed_layers(config.model) if weights else ()
        merged = Merged(links, [link.scaling for link in chain], config.chain.merge == "exact", transposed)
        if weights is None or not merged.fits(weights):
            _merge_whole(config, learnt, chain, out)
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


def _merge_whole(config: RunConfig, learnt: Learnt, chain: list[SavedLink], out: Path) -> None:
    model = _load_base(config.model)
    if not is_whole(model, config.model):
        raise UserError(
            f"model.path {config.model.path} is more than the {type(model).__name__} that was trained, and the rest can only go "
            "along where the weights lie in its files as the model has them: use --to peft, which leaves that base as it is"
        )
    learnt.check_base(config.model.path, model_fingerprint(config.model))
    links = [read_link(link.file) for link in chain]
    tie_saved_links(model, links, [link.scaling for link in chain], exact=config.chain.merge == "exact")
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
