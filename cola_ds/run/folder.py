"""RunDir: the run's folder, what a run leaves. Process 0 alone writes.

RUN_DIR/
  run.yaml           the config, as load_config reads it
  environment.json   versions, git revision, hosts, world size
  deepspeed.json     the DeepSpeed JSON, without what is only logged
  metrics.jsonl      a row a logged step
  evals.jsonl        a row an evaluation on held-out data
  knots.jsonl        a row a knot
  links.jsonl        a row a link and layer: what it has learnt, with chain.diagnostics
  watch.jsonl        a row for each look at data.watch
  log.txt            what the run said at each of its starts, without bars: see log.py
  events.jsonl       what happened to the run: started, resumed, how fast its model loaded, checkpoints, skipped updates, stopped
  checkpoints/       step-00000123/ and so on: see checkpoint/format.py
  chain/link-0001/   each tied link as a PEFT adapter
  earlier/link-0001/ likewise those that were tied before, of model.links or model.adapter
  model/             method full alone: the trained model as a Hugging Face folder
  result.json        written last
  lock.json          while a run goes on: which process holds it (see lock.py)
  run.json           whose folder this is, and what the run wrote there (see marker.py)
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cola_ds import notices
from cola_ds.config.inputs import sha256_of
from cola_ds.config.loading import dump_config
from cola_ds.config.schema import TRAINING, RunConfig
from cola_ds.errors import UserError
from cola_ds.run.atomic import publish, sync_path, write_atomically, write_folder
from cola_ds.run.earlier import Earlier, EarlierLink
from cola_ds.run.marker import LOG, Marker
from cola_ds.run.peft_files import adapter_files, read_link
from cola_ds.run.rows import read_row

ENGINE = "deepspeed.json"
ROWS = ("metrics.jsonl", "evals.jsonl", "knots.jsonl", "links.jsonl", "watch.jsonl")
_FILES = ("run.yaml", *ROWS, "events.jsonl", "result.json", ENGINE, "environment.json", LOG)
_FOLDERS = ("chain", "earlier", "model", "checkpoints")
_EARLIER = "earlier/link-{:04d}"
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


class RunDir:
    """A run's folder, to write or to read."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.marker = Marker.read(self.path)
        """run.json; None where there is none."""
        self._unwritten: dict[str, list[str]] = {}
        self._whole: set[str] = set()
        """Files whose last row is known to be whole."""

    def check_inputs(self, inputs: list[str]) -> None:
        """Raise UserError for a folder that cannot be written, or that holds one of the run's inputs (paths)."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run.dir {self.path} is not a folder")
        for path in inputs:
            read = Path(path).resolve()
            if self.path.resolve() in (read, *read.parents):
                holds = "is" if self.path.resolve() == read else "holds"
                raise UserError(f"run.dir {self.path} {holds} {path}, which the run reads; name a folder of its own")
        parent = next(p for p in (self.path.absolute(), *self.path.absolute().parents) if p.exists())
        if not os.access(parent, os.W_OK):
            raise UserError(f"run.dir {self.path} cannot be written: no permission to write in {parent}")

    @property
    def mine(self) -> Marker:
        """run.json of a folder that is a run's."""
        assert self.marker is not None
        return self.marker

    def check_is_free(self, config: RunConfig, fresh: bool) -> None:
        """Raise UserError when the folder already holds a run, unless `fresh`: then `create` removes what that run wrote."""
        if self.holds_a_run() and not fresh:
            raise UserError(f"run.dir {self.path} already holds a run; name another, or start it anew with --fresh")
        if self.holds_a_run() and not config.trains and self.mine.facts["config"].get("method") in TRAINING:
            raise UserError(
                f"run.dir {self.path} holds a run that has trained, which no evaluation takes the place of; name another "
                "(cola-ds evaluate: --out)"
            )
        self.check_is_ours(config)

    def check_is_ours(self, config: RunConfig) -> None:
        """Raise UserError where a run of this config would write what is there, and no run wrote."""
        if self.marker is None:
            there = [name for name in (*_FILES, *_FOLDERS) if name != LOG and os.path.lexists(self.path / name)]
        else:  # beside a run's own files others may lie, but not in their places
            links = range(1, config.chain.length + 1)
            places = [*_FILES, *(f"chain/link-{link:04d}/{name}" for link in links for name in _ADAPTER)]
            places += [str(path.relative_to(self.path)) for path in self.path.glob("earlier/link-*/adapter_*")]
            if config.method == "full":
                places += [f"model/{path.name}" for path in (self.path / "model").glob("*") if path.is_file()]
            wrote = self.mine.wrote
            there = [name for name in _FOLDERS if _is_no_folder(self.path / name)]
            there += [
                name for name in places
                if name != LOG  # which is only kept: where it is somebody else's, the run goes on without
                and os.path.lexists(self.path / name) and (name not in wrote or os.path.isdir(self.path / name))
            ]  # fmt: skip
        if there:
            raise UserError(f"run.dir {self.path} holds {there[0]}, but no run left it there; name another folder")

    def check_space(self, needed: int) -> None:
        """Raise UserError when the file system has not so many bytes left, beside what the run's links and checkpoints take
        already. The folder must exist."""
        taken = [
            path
            for name in ("chain", "earlier", "checkpoints")
            for path in (self.path / name).rglob("*")
            if path.is_file()
        ]
        free = shutil.disk_usage(self.path).free
        if free < needed - sum(path.stat().st_size for path in taken):
            raise UserError(
                f"run.dir {self.path}: {free / 2**20:,.0f} MiB are free there, and the run's links and checkpoints take up to "
                f"{needed / 2**20:,.0f} MiB; make room, name another run.dir, or lower checkpoint.keep"
            )

    def create(
        self, config: RunConfig, environment: dict[str, Any], facts: Mapping[str, Any], keep_log: bool = False
    ) -> None:
        """Make the folder anew, with run.json, run.yaml and environment.json; an earlier run's files in it are removed, and
        nothing else; with `keep_log` not its log. Raises UserError when it cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            kept = set()
            if self.marker is not None:
                self.marker.begun = False  # a run that is half removed must not be gone on with
                self.marker.write()
                kept = self.marker.wrote & {LOG} if keep_log else set()
                self.marker.wrote -= kept
                self.marker.remove()
                self.marker.clear_scratch()
            self.marker = Marker(self.path)
            self.marker.wrote |= kept
            self.marker.write()
        except OSError as error:
            raise UserError(f"run.dir {self.path} cannot be written: {error.filename}: {error.strerror}") from None
        self.describe(config, environment, facts)

    def add_to_environment(self, facts: Mapping[str, Any]) -> None:
        """Add to environment.json what the run has found out."""
        path = self.path / "environment.json"
        self.write_json(path.name, {**json.loads(path.read_bytes()), **facts})

    def describe(self, config: RunConfig, environment: dict[str, Any], facts: Mapping[str, Any]) -> None:
        """Write run.yaml, environment.json, and what the run is. Raises UserError when they cannot be written."""
        marker = self.mine
        try:
            marker.clear_scratch()
            marker.begun = True
            marker.facts = {"links": [], **marker.facts, **facts, "config": config.model_dump(mode="json")}
            marker.write()
            self.write_json("environment.json", environment)
            self._write("run.yaml", dump_config(config).encode())
        except OSError as error:
            raise UserError(f"run.dir {self.path} cannot be written: {error.filename}: {error.strerror}") from None

    def holds_a_run(self) -> bool:
        """Whether a run has begun here."""
        return self.marker is not None and self.marker.begun

    def rows(self, name: str, skip_damaged: bool = False) -> list[dict[str, Any]]:
        """The rows of a .jsonl file, those included that wait for room on the disk; none if the run wrote none. What a killed run
        left of its last row is no row.

        Raises UserError naming the file and the row that is damaged, unless such rows are to be left out.
        """
        path, rows = self.path / name, []
        waiting = [line.encode() for line in self._unwritten.get(name, ())]
        for number, line in enumerate([*self._lines(name), *waiting], 1):
            try:
                rows.append(read_row(name, line))
            except ValueError as error:
                if not skip_damaged:
                    raise UserError(f"{path}, row {number}: {error}; the row is damaged") from None
        return rows

    def _lines(self, name: str) -> list[bytes]:
        """Without what follows the last line's end."""
        path = self.path / name
        return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []

    def keep_engine(self, engine_json: Mapping[str, Any]) -> None:
        """Keep the DeepSpeed JSON, without what is only logged: what reads the run later may not find it where it was. Raises
        UserError when it cannot be written."""
        try:
            self.write_json(ENGINE, engine_json)
        except OSError as error:
            raise UserError(f"run.dir {self.path} cannot be written: {error.strerror}") from None

    def row_counts(self) -> dict[str, int]:
        """How many rows there are in each of the files that a resumed run goes on with."""
        return {name.removesuffix(".jsonl"): len(self._lines(name)) for name in ROWS}

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Add a row to a .jsonl file. A number that is not finite becomes null: JSON has no other word for it.

        Where the disk is full, the row waits for the next one, and the first time a line says so.
        """
        waiting = self._unwritten.setdefault(name, [])
        waiting.append(json.dumps(_as_json_has_it(row), allow_nan=False) + "\n")
        try:
            self._write_waiting(name)
        except OSError as error:
            if len(waiting) == 1:
                notices.warning(f"{self.path / name} cannot be written ({error.strerror}); its rows wait")

    def _write_waiting(self, name: str) -> None:
        path, waiting = self.path / name, self._unwritten[name]
        self.mine.own([name])
        with open(path, "ab") as out:
            if name not in self._whole:  # what a process that was killed left of its last row
                os.truncate(path, sum(len(line) + 1 for line in self._lines(name)))
                self._whole.add(name)
            size = path.stat().st_size
            try:
                out.write("".join(waiting).encode())
                out.flush()
            except OSError:
                os.truncate(path, size)
                raise
        waiting.clear()

    def flush_rows(self) -> None:
        """Have all rows on the disk before this returns. OSError where they do not fit."""
        for name in self._unwritten:
            self._write_waiting(name)
            with open(self.path / name, "rb") as held:
                os.fsync(held.fileno())

    def event(self, what: str, **facts: Any) -> None:
        """Add a row to events.jsonl: what happened to the run, and when."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.append("events.jsonl", {"time": now, "event": what, **facts})

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file, whole or not at all."""
        self._write(name, _json(value))

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write result.json: the run has finished."""
        content = _json({"run": self.mine.id, **result})
        before = self.mine.facts.get("result", [])[-1:]  # it stands until the new one takes its place
        self.mine.own(["result.json"], {"result": [*before, hashlib.sha256(content).hexdigest()]})
        self._write("result.json", content)

    def _write(self, name: str, content: bytes) -> None:
        self.mine.own([name])
        write_atomically(self.path / name, content, self.mine.id)

    def link_path(self, link: int) -> Path:
        """Where a tied link lies."""
        return self.path / "chain" / f"link-{link:04d}"

    def read_link(self, link: int) -> dict[str, Tensor]:
        """A tied link's tensors, under the names that `write_link` was given."""
        return read_link(self.link_path(link) / "adapter_model.safetensors")

    def write_link(
        self, config: RunConfig, link: int, layers: list[str], tensors: dict[str, Tensor], transposed: bool = False
    ) -> str:
        """Write a link of the named layers as a PEFT adapter (`adapter_files`), and into run.json what it is: its folder appears
        whole or not at all. Returns its SHA-256."""
        lora_rank, alpha, target = config.tied_rank(link), config.tied_alpha(link), self.link_path(link)
        files = adapter_files(config, lora_rank, alpha, layers, tensors, transposed)
        tied = _record(link, lora_rank, alpha, layers, files)
        links = [*self.mine.facts["links"][: link - 1], tied]
        self.mine.own((f"chain/{target.name}/{name}" for name in files), {"links": links})
        write_folder(target, files, self.mine.id)
        return str(tied["sha256"])

    def forget_earlier(self) -> None:
        """The links that were tied before the run's own are not those any more."""
        self.mine.remove("earlier/")
        self.mine.facts["earlier"] = []
        self.mine.write()

    def keeps(self, earlier: Earlier) -> bool:
        """Whether the run has a copy of the links that were tied before its own, and as it made it."""
        kept = self.mine.facts["earlier"]
        return len(kept) == len(earlier.links) and all(self._holds_earlier(row) for row in kept)

    def write_earlier(self, links: Iterable[tuple[EarlierLink, dict[str, bytes]]]) -> None:
        """Write a copy of the links that were tied before the run's own, each with its files. Raises UserError."""
        for number, (link, files) in enumerate(links, start=1):
            row = _record(number, link.lora_rank, link.alpha, list(link.shapes), files) | {
                "stands_for": link.stands_for
            }
            rows = [*self.mine.facts["earlier"][: number - 1], row]
            try:
                self.mine.own((f"{_EARLIER.format(number)}/{name}" for name in files), {"earlier": rows})
                write_folder(self.path / _EARLIER.format(number), files, self.mine.id)
            except OSError as error:
                raise UserError(f"run.dir {self.path} cannot be written: {error.filename}: {error.strerror}") from None

    def _holds_earlier(self, row: dict[str, Any]) -> bool:
        folder = self.path / _EARLIER.format(row["link"])
        names = {"adapter_model.safetensors": row["sha256"], "adapter_config.json": row["config_sha256"]}
        return all((folder / name).is_file() and sha256_of(folder / name) == digest for name, digest in names.items())

    def write_model(self, write: Callable[[Path], Any]) -> None:
        """Have `write` write the trained model (method full) into a folder; it becomes the run's model/, whole or not at all."""
        marker, target = self.mine, self.path / "model"
        scratch = marker.scratch(self.path)
        scratch.mkdir()
        write(scratch)
        files = [path for path in sorted(scratch.rglob("*")) if path.is_file()]
        names = {path: str(Path("model") / path.relative_to(scratch)) for path in files}
        marker.remove("model/")
        marker.own(names.values(), {"model": {names[path]: sha256_of(path) for path in files}})
        publish(scratch, target)

    def forget_result(self) -> None:
        """The run is no longer finished: the first thing to be written down when it goes back."""
        if (self.path / "result.json").exists():
            self.mine.remove("result.json")
            sync_path(self.path)
            self.mine.facts.pop("result", None)
            self.mine.write()

    def go_back(self, counts: Mapping[str, int]) -> None:
        """Forget the rows after the first so many of each file, and all tied links: a run that was stopped had gone further than
        its checkpoint, which holds the links that stand."""
        for name in ROWS:
            lines = self._lines(name)
            if (self.path / name).exists():
                kept = lines[: counts[name.removesuffix(".jsonl")]]
                self._write(name, b"".join(line + b"\n" for line in kept))
        for below in ("chain/", "model/"):
            self.mine.remove(below)
        self.mine.facts |= {"links": [], "model": {}}
        self.mine.write()


def _record(link: int, lora_rank: int, alpha: float, layers: list[str], files: Mapping[str, bytes]) -> dict[str, Any]:
    """What run.json says of a link."""
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return {
        "link": link, "lora_rank": lora_rank, "lora_alpha": alpha, "layers": layers,
        "sha256": hashes["adapter_model.safetensors"], "config_sha256": hashes["adapter_config.json"],
    }  # fmt: skip


def _is_no_folder(path: Path) -> bool:
    """Whether something else stands in its place, such as a link, which leads to what is not this run's."""
    return os.path.islink(path) or (os.path.exists(path) and not os.path.isdir(path))


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(_as_json_has_it(value), indent=2, allow_nan=False) + "\n").encode()


def _as_json_has_it(value: Any) -> Any:
    """The value with null for each number that is not finite: JSON has no other word for it. Nor for half a character, as in a
    path of other bytes."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, Mapping):
        return {key: _as_json_has_it(inner) for key, inner in value.items()}
    return [_as_json_has_it(inner) for inner in value] if isinstance(value, (list, tuple)) else value
