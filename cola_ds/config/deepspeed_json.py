"""The DeepSpeed JSON: read, checked against the run's YAML, and completed with what follows from it.

The JSON holds engine facts only. DeepSpeed itself accepts a misspelt top-level key in silence (and trains at stage 0), so
keys are checked here, before DeepSpeed sees them.
"""

from __future__ import annotations

import difflib
import json
from typing import Any

from cola_ds.config.dtypes import DTYPES
from cola_ds.config.inputs import engine_file
from cola_ds.config.parsing import parse_json, read_text
from cola_ds.config.schema import RunConfig
from cola_ds.config.steps import StepPlan, rows_per_step
from cola_ds.errors import UserError, cut, quoted

MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")
_PRECISIONS = {section: name for name, dtype in DTYPES.items() for section in dtype.engine_sections}
_OBJECTS = (
    "zero_optimization", *_PRECISIONS, *MONITORS, "aio", "checkpoint", "comms_logger", "data_types", "flops_profiler", "timers",
)  # fmt: skip
_FLAGS = ("disable_allgather", "dump_state", "memory_breakdown", "prescale_gradients", "wall_clock_breakdown")
_ENGINE_FACTS = (
    *_OBJECTS, *_FLAGS, "communication_data_type", "gradient_predivide_factor", "log_level", "steps_per_print",
)  # fmt: skip
_SAID_BY_THE_YAML = {
    "optimizer": "optim.name and optim.lr",
    "scheduler": "optim.schedule",
    "activation_checkpointing": "model.activation_checkpointing",
}
# The optimizers are torch's own: AdaGrad and SGD are unknown to DeepSpeed's list, but are as element-wise as Adam.
_SET_HERE = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
_SET_ANYWAY = {**_SET_HERE, "amp": {"enabled": False}, "sparse_gradients": False}
"""Keys that JSONs made for other trainers hold: those of which these values, and no others, change nothing."""
_UNSUPPORTED_ZERO = {
    "zero_hpz_partition_size": 1,
    "mics_shard_size": -1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False,
    "zenflow": None,
    "super_offload": False,
}
_INSTEAD = dict.fromkeys(
    ("zero_hpz_partition_size", "mics_shard_size"), "remove it, and set model.shards=node in the run's YAML"
)
"""hpZ's second copy of the weights does not see a knot; MiCS is gone from DeepSpeed."""


def read_engine_config(config: RunConfig) -> dict[str, Any]:
    """Read the JSON that the run names, and refuse what contradicts the run or cannot carry a chain.

    Values of "auto" (as Hugging Face's integration uses them) are dropped: the run's YAML stands in, or what follows from the
    model's shapes (engine_sizes.py), or DeepSpeed's default. That of zero_optimization.stage stays: the stage is chosen once
    memory is known. Raises UserError.
    """
    path = cut(config.deepspeed)
    engine = parse_json(read_text(engine_file(config.deepspeed), "the DeepSpeed JSON"), path, by_hand=True)
    if not isinstance(engine, dict):
        raise UserError(f"{path} must hold a JSON object; it is {_shown(engine)}")
    engine = _without_auto(engine)
    _check_numbers(engine, path)
    for key in _OBJECTS:
        if not isinstance(engine.get(key, {}), dict):
            raise UserError(f"{path}: {key} must be an object like {{...}}; it is {_shown(engine[key])}")
    flags = {key: engine[key] for key in _FLAGS if key in engine}
    flags |= {f"{key}.enabled": engine[key]["enabled"] for key in _OBJECTS if "enabled" in engine.get(key, {})}
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise UserError(f"{path}: {key} must be true or false; it is {_shown(value)}")
    for key in ("gradient_predivide_factor", "steps_per_print"):
        value = engine.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0):
            raise UserError(f"{path}: {key} must be a positive number; it is {_shown(value)}")
    _check_keys(engine, config, path)
    _check_zero(engine.get("zero_optimization"), path)
    check_compilable(config, engine["zero_optimization"]["stage"])
    _check_precision(engine, config, path)
    return engine


def _check_numbers(section: dict[str, Any], path: str) -> None:
    for key, value in section.items():
        if isinstance(value, dict):
            _check_numbers(value, path)
        elif isinstance(value, (int, float)) and abs(value) >= 2**63:  # as counts they do not fit
            raise UserError(f"{path}: {key} must be below 2^63; it is {_shown(value)}")


def _shown(value: Any) -> str:
    """A value as JSON writes it, cut."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = quoted(value)
    return f'"{text[1:-1]}"' if isinstance(value, str) else text


def _without_auto(value: dict[str, Any]) -> dict[str, Any]:
    """Without what is "auto" (but a stage), and without objects that hold nothing else."""
    kept = {k: _without_auto(v) if isinstance(v, dict) else v for k, v in value.items() if v != "auto" or k == "stage"}
    return {k: v for k, v in kept.items() if v != {} or value[k] == {}}


def _is(value: Any, wanted: Any) -> bool:
    """Equal, and true is not 1."""
    return bool(value == wanted) and isinstance(value, bool) == isinstance(wanted, bool)


def _derived(config: RunConfig) -> dict[str, Any]:
    return {
        "train_batch_size": rows_per_step(config),
        "train_micro_batch_size_per_gpu": config.optim.micro_batch_size,
        "gradient_clipping": config.optim.max_grad_norm or 0.0,
    }


def _size_key(config: RunConfig) -> str:
    return "optim.global_batch_size" if config.optim.global_batch_tokens is None else "optim.global_batch_tokens"


def _check_keys(engine: dict[str, Any], config: RunConfig, path: str) -> None:
    derived = _derived(config)
    for key, value in engine.items():
        if key in _SAID_BY_THE_YAML:
            raise UserError(f"{path}: remove {key}; the run's YAML says it ({_SAID_BY_THE_YAML[key]})")
        if key in derived and not _is(value, derived[key]):
            yaml_key = {"gradient_clipping": "optim.max_grad_norm", "train_batch_size": _size_key(config)}.get(
                key, "optim.micro_batch_size"
            )
            raise UserError(
                f"{path}: {key} {_shown(value)} contradicts {yaml_key} {derived[key]}; remove it from the JSON"
            )
        if key in _SET_ANYWAY and not _is(value, _SET_ANYWAY[key]):
            raise UserError(f"{path}: {key} {_shown(value)} is not supported; remove it")
        if key == "compile":
            raise UserError(
                f"{path}: compile is not supported; remove it (model.compile=true in the run's YAML compiles the blocks)"
            )
        # gradient_accumulation_steps depends on the number of processes: compared when it is known, in complete().
        if key not in (*derived, "gradient_accumulation_steps", *_SET_ANYWAY, *_ENGINE_FACTS):
            key = cut(key, 80)
            nearest = difflib.get_close_matches(key, _ENGINE_FACTS, n=1)
            raise UserError(
                f"{path}: unknown or unsupported key {key}" + (f"; did you mean {nearest[0]}?" if nearest else "")
            )


def check_compilable(config: RunConfig, stage: int | str) -> None:
    """Raise UserError for model.compile at ZeRO stage 3, whose hooks gather weights inside the blocks."""
    if config.model.compile and config.trains and stage == 3:
        raise UserError(
            f"model.compile needs ZeRO stage 2, and {cut(config.deepspeed)} means stage 3 here; set deepspeed=zero2 if every "
            "process can hold the model, or model.compile=false"
        )


def _check_zero(zero: Any, path: str) -> None:
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage != "auto" and (type(stage) is not int or stage not in (2, 3)):
        shown = None if stage is None else _shown(stage)
        raise UserError(f"{path}: zero_optimization.stage is {shown}; a chain runs at stage 2 or 3, or auto")
    for key, harmless in _UNSUPPORTED_ZERO.items():
        if not _is(zero.get(key, harmless), harmless):
            instead = _INSTEAD.get(key, "remove it")
            raise UserError(f"{path}: zero_optimization.{key} {_shown(zero[key])} is not supported; {instead}")
    for key in ("offload_param", "offload_optimizer"):
        section = {} if zero.get(key) is None else zero[key]
        if not isinstance(section, dict):
            raise UserError(f"{path}: zero_optimization.{key} must be an object like {{...}}; it is {_shown(section)}")
        device = section.get("device", "none")
        if device not in ("none", "cpu"):
            raise UserError(
                f"{path}: zero_optimization.{key}.device {_shown(device)} is not supported; use cpu or none"
            )
        if device == "cpu" and stage == "auto":
            raise UserError(f"{path}: zero_optimization.{key} leaves nothing to choose; set the stage to 3")
        if key == "offload_param" and device == "cpu" and stage != 3:
            raise UserError(f"{path}: zero_optimization.offload_param needs stage 3; the stage is {stage}")


def _check_precision(engine: dict[str, Any], config: RunConfig, path: str) -> None:
    for key, dtype in _PRECISIONS.items():
        section = engine.get(key, {})
        enabled = section.get("enabled", config.model.dtype == dtype)
        if enabled != (config.model.dtype == dtype):
            raise UserError(
                f"{path}: {key}.enabled {str(enabled).lower()} contradicts model.dtype {config.model.dtype}; "
                "use a DeepSpeed JSON for that dtype, or change model.dtype"
            )


def complete(engine: dict[str, Any], config: RunConfig, step_plan: StepPlan) -> dict[str, Any]:
    """The config that DeepSpeed's engine gets: the JSON plus batch sizes, clipping and precision.

    Monitors are left out: the engine's own counters restart at every knot, so the run writes to the monitors itself.
    Raises UserError for a gradient_accumulation_steps in the JSON that differs from the derived one.
    """
    said = engine.get("gradient_accumulation_steps", step_plan.micro_steps)
    if not _is(said, step_plan.micro_steps):
        raise UserError(
            f"{cut(config.deepspeed)}: gradient_accumulation_steps {_shown(said)} contradicts the {step_plan.micro_steps} "
            f"that follow from {_size_key(config)}, optim.micro_batch_size and the number of processes; remove it"
        )
    complete = {key: value for key, value in engine.items() if key not in (*MONITORS, *_SET_ANYWAY)}
    complete |= _derived(config) | {"gradient_accumulation_steps": step_plan.micro_steps}
    if config.model.dtype != "fp32":
        complete[config.model.dtype] = {**engine.get(config.model.dtype, {}), "enabled": True}
    complete |= _SET_HERE
    complete.setdefault("steps_per_print", 2**31)
    # DeepSpeed's own clock of a step, which it then never tells, waits for the device before and after each.
    complete.setdefault("timers", {"throughput": {"enabled": False}})
    return complete
