"""Chain of LoRA (COLA, arXiv 2401.04151) under DeepSpeed ZeRO-3.

    config = cola_ds.load_config("run.yaml", ["optim.lr=1e-4"])
    result = cola_ds.train(config)

What the names below stand for is imported when it is asked for: torch and deepspeed take seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cola_ds.commands.evaluate import evaluate
    from cola_ds.commands.export import export
    from cola_ds.config.loading import load_config
    from cola_ds.config.schema import RunConfig
    from cola_ds.errors import StoppedError, TrainingFailedError, UserError
    from cola_ds.training.api import RunResult, train
    from cola_ds.training.prepare import prepare

_WHERE = {
    "RunConfig": "config.schema", "load_config": "config.loading", "prepare": "training.prepare", "train": "training.api",
    "RunResult": "training.api", "evaluate": "commands.evaluate", "export": "commands.export",
    "UserError": "errors", "TrainingFailedError": "errors", "StoppedError": "errors",
}  # fmt: skip

__all__ = [
    "RunConfig", "RunResult", "StoppedError", "TrainingFailedError", "UserError", "evaluate", "export", "load_config", "prepare",
    "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
