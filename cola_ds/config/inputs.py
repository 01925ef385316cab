"""Which local files a config names: its DeepSpeed JSON, its own task's YAML, its data, its model."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from cola_ds.config.schema import RunConfig, is_task_file
from cola_ds.errors import UserError, cut, first_line, some_of

_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
_PACKAGE = Path(__file__).resolve().parents[1]


# The DeepSpeed JSON, and a task's YAML


def ready_configs() -> dict[str, Path]:
    """The DeepSpeed JSONs that come with the package, by name: beside it in the repository, within it where it is installed."""
    folder = next((f for f in (_PACKAGE / "ds_configs", _PACKAGE.parent / "ds_configs") if f.is_dir()), _PACKAGE)
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def engine_file(name: str) -> str:
    """The path of the DeepSpeed JSON that `deepspeed` names: a file, or a ready one. Raises UserError for a name of neither."""
    if os.path.isfile(name):
        return name
    ready = ready_configs()
    if name in ready:
        return str(ready[name])
    if "/" in name or name.endswith(".json") or os.path.exists(name):
        return name
    raise UserError(
        f"cannot read the DeepSpeed JSON {cut(name)}: there is no such file; ready ones are {', '.join(ready) or 'none'}"
    )


def named_file(key: str, value: str | None) -> Path | None:
    """The file that a key's value is, if keys.names_file says that it may be one; None for what is no file: a ready-made task."""
    if key == "deepspeed" and value is not None:
        return Path(engine_file(value))
    return Path(value) if value is not None and is_task_file(value) else None


def files_of(config: RunConfig) -> Iterator[Path]:
    """The local files that a run of this config is made from, as far as they are there."""
    data, links = config.data, Path(config.model.links or "")
    for key, value in (("deepspeed", config.deepspeed), ("data.task", data.task)):
        with contextlib.suppress(UserError):  # what cannot be read is said by the run
            if (path := named_file(key, value)) and path.is_file():
                yield path
    for name in data.local_names:
        with contextlib.suppress(UserError):
            yield from find_files(name)
    yield from Path(config.model.path).glob("*.json")
    yield from Path(config.model.path).glob("*.safetensors")
    if data.dir and data.task:
        for folder in (Path(data.dir), Path(data.dir, Path(data.task).stem)):
            yield from folder.glob("*.jsonl")
    if config.model.links:
        yield links / "result.json"
    if config.model.adapter:
        yield from Path(config.model.adapter).glob("adapter_*")


# Data


def find_files(name: str) -> list[Path]:
    """The files that a name of data means: itself, those of a folder or of a saved `datasets.Dataset`, or a glob's, sorted."""
    if os.path.isdir(name):
        return _of_folder(Path(name))
    if os.path.isfile(name):
        return [Path(name)]
    if glob.has_magic(name):
        found = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
        if not found:
            raise UserError(f"{name} is not a file, and matches none")
        return [Path(path) for path in found]
    raise UserError(f"{shown(name)} is not a file, a folder or a glob, nor can it be a name on the hub, OWNER/NAME")


def is_hub_name(name: str) -> bool:
    """Whether a name of data is one on the hub, owner/name: nothing is there by that name, and it has no ending of a file of
    data."""
    if os.path.exists(name) or glob.has_magic(name) or kind_of(Path(name)) in _KINDS:
        return False
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None and len(name) <= 96


def _of_folder(folder: Path) -> list[Path]:
    try:
        there = sorted(path for path in folder.iterdir() if not path.name.startswith((".", "_")))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror or error}") from None
    names = {path.name for path in there}
    if "dataset_dict.json" in names:
        splits = [path.name for path in there if path.is_dir()]
        raise UserError(
            f"{folder} holds the splits {shown_names(splits)} of a saved dataset: name the folder of one of them"
        )
    if {"state.json", "dataset_info.json"} <= names:
        return _of_saved(folder)
    found = [path for path in there if path.suffix.lower() != ".md"]
    strange = [path.name for path in found if path.is_dir() or kind_of(path) not in _KINDS]
    if strange:
        raise UserError(
            f"{folder} holds {shown_names(strange)} beside or instead of data: name the files by a glob, or list them"
        )
    if not found:
        raise UserError(f"{folder} is empty: it needs at least one file of data")
    kinds = {kind_of(path) for path in found}
    if len(kinds) > 1:
        raise UserError(f"{folder} holds files of several kinds, {', '.join(sorted(kinds))}: name one kind by a glob")
    return found


def _of_saved(folder: Path) -> list[Path]:
    """The files of Dataset.save_to_disk: beside them may lie what later work with it has cached."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
        return [folder / Path(each["filename"]).name for each in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{folder / 'state.json'} does not name the files of a saved dataset: {first_line(error)}"
        ) from None


def kind_of(path: Path) -> str:
    """The ending that says how a file is read, in lower case, without that of a packed file."""
    name = path.name.lower()
    return os.path.splitext(name.removesuffix(".gz").removesuffix(".zst"))[1]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as held:
        while block := held.read(2**20):
            digest.update(block)
    return digest.hexdigest()


# Names in messages


def shown(name: str) -> str:
    """A name of others, such as a column's, for a message."""
    return name if name.isprintable() and len(name) <= 60 else cut_name(repr(name))


def cut_name(text: str) -> str:
    return text if len(text) <= 120 else text[:80] + "..."


def shown_names(names: Iterable[str]) -> str:
    return some_of([shown(name) for name in names]) or "none"
