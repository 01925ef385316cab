"""The DeepSpeed JSON: read, checked against the run's YAML, and completed with what follows from it.

The JSON holds engine facts only. DeepSpeed itself accepts a misspelt top-level key in silence (and trains at stage 0), so
keys are checked here, before DeepSpeed sees them.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from cola_ds.config import RunConfig, Timetable
from cola_ds.errors import UserError

MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")
_PRECISIONS = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16"}
_ENGINE_FACTS = (
    "zero_optimization", *_PRECISIONS, *MONITORS, "aio", "checkpoint", "comms_logger", "communication_data_type",
    "data_types", "disable_allgather", "dump_state", "flops_profiler", "gradient_predivide_factor", "log_level",
    "memory_breakdown", "prescale_gradients", "steps_per_print", "timers", "wall_clock_breakdown",
)  # fmt: skip
_SAID_BY_THE_YAML = {
    "optimizer": "optim.name and optim.lr",
    "scheduler": "optim.schedule",
    "activation_checkpointing": "model.activation_checkpointing",
}
_UNSUPPORTED_ZERO = {
    "zero_hpz_partition_size": 1,
    "mics_shard_size": -1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False,
    "zenflow": None,
    "super_offload": False,
}


def read_engine_config(config: RunConfig) -> dict[str, Any]:
    """Read the JSON that the run names, and refuse what contradicts the run or cannot carry a chain.

    Values of "auto" (as Hugging Face's integration uses them) are dropped: the run's YAML or DeepSpeed's default stands in.
    Raises UserError.
    """
    path = Path(config.deepspeed)
    try:
        engine = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the DeepSpeed JSON {path}: {getattr(error, 'strerror', None) or error}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(engine, dict):
        raise UserError(f"{path} must hold a JSON object")
    engine = _without_auto(engine)
    for key in ("zero_optimization", *_PRECISIONS, *MONITORS):
        if not isinstance(engine.get(key, {}), dict):
            raise UserError(f"{path}: {key} must be an object like {{...}}; it is {json.dumps(engine[key])}")
    _check_keys(engine, config, path)
    _check_zero(engine.get("zero_optimization"), path)
    _check_precision(engine, config, path)
    return engine


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        raise ValueError(f"a key is given twice among {', '.join(key for key, _ in pairs)}")
    return seen


def _without_auto(value: dict[str, Any]) -> dict[str, Any]:
    return {k: _without_auto(v) if isinstance(v, dict) else v for k, v in value.items() if v != "auto"}


def _derived(config: RunConfig) -> dict[str, Any]:
    return {
        "train_batch_size": config.optim.global_batch_size,
        "train_micro_batch_size_per_gpu": config.optim.micro_batch_size,
        "gradient_clipping": config.optim.max_grad_norm or 0.0,
    }


def _check_keys(engine: dict[str, Any], config: RunConfig, path: Path) -> None:
    derived = _derived(config)
    for key, value in engine.items():
        if key in _SAID_BY_THE_YAML:
            raise UserError(f"{path}: remove {key}; the run's YAML says it ({_SAID_BY_THE_YAML[key]})")
        if key in derived and value != derived[key]:
            yaml_key = {"gradient_clipping": "optim.max_grad_norm", "train_batch_size": "optim.global_batch_size"}.get(
                key, "optim.micro_batch_size"
            )
            raise UserError(f"{path}: {key} {value} contradicts {yaml_key} {derived[key]}; remove it from the JSON")
        # gradient_accumulation_steps depends on the number of processes: compared when it is known, in complete().
        if key not in (*derived, "gradient_accumulation_steps", *_ENGINE_FACTS):
            nearest = difflib.get_close_matches(key, _ENGINE_FACTS, n=1)
            raise UserError(
                f"{path}: unknown or unsupported key {key}" + (f"; did you mean {nearest[0]}?" if nearest else "")
            )


def _check_zero(zero: Any, path: Path) -> None:
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (2, 3):
        raise UserError(f"{path}: zero_optimization.stage is {stage}; a chain runs at stage 2 or 3")
    for key, harmless in _UNSUPPORTED_ZERO.items():
        if zero.get(key, harmless) != harmless:
            raise UserError(f"{path}: zero_optimization.{key} {zero[key]} is not supported; remove it")
    for key in ("offload_param", "offload_optimizer"):
        section = zero.get(key) or {}
        if not isinstance(section, dict):
            raise UserError(
                f"{path}: zero_optimization.{key} must be an object like {{...}}; it is {json.dumps(section)}"
            )
        device = section.get("device", "none")
        if device not in ("none", "cpu"):
            raise UserError(f"{path}: zero_optimization.{key}.device {device} is not supported; use cpu or none")
        if key == "offload_param" and device == "cpu" and stage != 3:
            raise UserError(f"{path}: zero_optimization.offload_param needs stage 3; the stage is {stage}")


def _check_precision(engine: dict[str, Any], config: RunConfig, path: Path) -> None:
    for key, dtype in _PRECISIONS.items():
        section = engine.get(key, {})
        enabled = section.get("enabled", config.model.dtype == dtype)
        if enabled != (config.model.dtype == dtype):
            raise UserError(
                f"{path}: {key}.enabled {str(enabled).lower()} contradicts model.dtype {config.model.dtype}; "
                "use a DeepSpeed JSON for that dtype, or change model.dtype"
            )


def complete(engine: dict[str, Any], config: RunConfig, timetable: Timetable) -> dict[str, Any]:
    """The config that DeepSpeed's engine gets: the JSON plus batch sizes, clipping and precision.

    Monitors are left out: the engine's own counters restart at every knot, so the run writes to the monitors itself.
    Raises UserError for a gradient_accumulation_steps in the JSON that differs from the derived one.
    """
    said = engine.get("gradient_accumulation_steps", timetable.micro_steps)
    if said != timetable.micro_steps:
        raise UserError(
            f"{config.deepspeed}: gradient_accumulation_steps {said} contradicts the {timetable.micro_steps} that follow "
            "from optim.global_batch_size, optim.micro_batch_size and the number of processes; remove it from the JSON"
        )
    complete = {key: value for key, value in engine.items() if key not in MONITORS}
    complete |= _derived(config) | {"gradient_accumulation_steps": timetable.micro_steps}
    if config.model.dtype != "fp32":
        complete[config.model.dtype] = {**engine.get(config.model.dtype, {}), "enabled": True}
    # The optimizers are torch's own: AdaGrad and SGD are unknown to DeepSpeed's list, but are as element-wise as Adam.
    complete |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    complete.setdefault("steps_per_print", 2**31)
    return complete
