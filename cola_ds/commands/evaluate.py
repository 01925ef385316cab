"""`cola-ds evaluate`: the run that scores a model, or what a run has learnt, on a task."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cola_ds.config.loading import check_config
from cola_ds.config.schema import RunConfig
from cola_ds.errors import UserError
from cola_ds.run.atomic import file_name
from cola_ds.run.folder import ENGINE
from cola_ds.run.learnt import Learnt, is_run, read_learnt

if TYPE_CHECKING:
    from cola_ds.training.api import RunResult

_DRAWN_BY = ("num_train", "num_dev", "num_test", "max_length", "demonstrations")
"""Keys of data that a run's examples and their ids follow from, with its seed."""


def evaluate(
    target: str | Path, task: str, *, method: str = "zero-shot", dir: str | Path | None = None, out: str | Path | None = None,
    overrides: Sequence[str] = (), fresh: bool = False,
) -> RunResult:  # fmt: skip
    """Score a model (its folder or hub name), or what a finished run has learnt, on a task: what `cola-ds evaluate` does, in this
    process. Collective under a launcher, as `cola_ds.train` is, and raises what that raises."""
    from cola_ds.checkpoint.decide import ResumeOptions  # torch takes seconds to import: not for a mistake in the call
    from cola_ds.distributed.session import joined
    from cola_ds.training.api import run_config

    with joined() as (process, end):
        config = evaluation_config(
            str(target), method, task, None if dir is None else str(dir), None if out is None else str(out),
            process.world_size, list(overrides),
        )  # fmt: skip
        return run_config(config, process, ResumeOptions(fresh=fresh), end, frees=True)


def evaluation_config(
    target: str, method: str, task: str, data_dir: str | None, out: str | None, world_size: int, overrides: list[str]
) -> RunConfig:
    """The config of a run that evaluates `target`: a model's folder or hub name, or a finished run's folder. Raises UserError."""
    model: dict[str, Any] = {"path": target}
    data: dict[str, Any] = {}
    section: dict[str, Any] = {}
    raw: dict[str, Any] = {}
    if is_run(Path(target)) or os.path.isfile(os.path.join(target, "run.yaml")):
        learnt = read_learnt(target)
        config = learnt.config
        model, raw["deepspeed"] = config.model.model_dump(), _engine_of(learnt)
        if config.method == "full":
            model["path"] = str(learnt.folder / "model")
        elif config.trains_lora:
            model["links"] = str(learnt.folder.resolve())  # the evaluation's own folder is read from elsewhere, too
            model["adapter"] = None  # the run has a copy
        if wrong := next((word for word in overrides if word.startswith("model.links=")), None):
            raise UserError(
                f"override {wrong} contradicts the run {target}, whose own links are evaluated; leave it out"
            )
        section["seed"] = config.run.seed
        if config.data.task is not None:  # drawn as it drew: its dev must not hold what it has learnt from
            its_own = {"revision"} if task == config.data.task and data_dir is None else set()
            data = config.data.model_dump(include={*_DRAWN_BY, *its_own}, exclude_unset=True)
    data |= {"task": task, "dir": data_dir}
    section["dir"] = out or f"runs/evaluate/{_words(target)}/{Path(task).stem}-{method}"
    raw |= {
        "model": model,
        "method": method,
        "data": data,
        "optim": {"lr": 1.0, "epochs": 1, "global_batch_size": world_size, "micro_batch_size": 1},  # not used
        "eval": {"batch_size": 8},
        "run": section,
    }
    config = check_config(raw, overrides, "cola-ds evaluate")
    if config.trains:
        raise UserError(f"method {config.method} trains: an evaluation's is zero-shot or icl")
    return config


def _engine_of(run: Learnt) -> str:
    """The run's own copy of its DeepSpeed JSON: the path in its config is relative to where it was started."""
    kept = run.folder.resolve() / ENGINE
    return str(kept) if kept.is_file() else run.config.deepspeed


def _words(target: str) -> str:
    """A folder's path, or a name on the hub, as one name: the last part of it alone may be seed=0."""
    path, here = Path(target).resolve() if os.path.isdir(target) else Path(target), Path.cwd()
    return file_name(str(path.relative_to(here) if here in path.parents else path))
