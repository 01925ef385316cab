"""`cola-ds evaluate`: the run that scores a model, or what a run has learnt, on a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cola_ds.config import RunConfig, check_config
from cola_ds.rundir import RunFolder


def evaluation_config(
    target: str, method: str, task: str, data_dir: str | None, out: str | None, world_size: int, overrides: list[str]
) -> RunConfig:
    """The config of a run that evaluates `target`: a model's folder or hub name, or a finished run's folder. Raises UserError."""
    model: dict[str, Any] = {"path": target}
    raw: dict[str, Any] = {}
    if (Path(target) / "run.yaml").is_file():
        run = RunFolder(target)
        run.result()
        config = run.config()
        model, raw["deepspeed"] = config.model.model_dump(), config.deepspeed
        if config.method == "full":
            model["path"] = str(run.path / "model")
        elif config.trains_lora:
            model["links"] = str(run.path)
    raw |= {
        "model": model,
        "method": method,
        "data": {"task": task, "dir": data_dir},
        "optim": {"lr": 1.0, "epochs": 1, "global_batch_size": world_size, "micro_batch_size": 1},  # not used
        "eval": {"batch_size": 8},
        "run": {"dir": out or f"runs/evaluate/{Path(target).name}/{Path(task).stem}-{method}"},
    }
    return check_config(raw, overrides, "cola-ds evaluate")
