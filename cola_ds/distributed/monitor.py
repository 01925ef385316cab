"""Monitors (TensorBoard, W&B, ...) that the DeepSpeed JSON asks for."""

from __future__ import annotations

from typing import Any

from deepspeed import comm as dist
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from pydantic import ValidationError

from cola_ds import notices
from cola_ds.errors import UserError, first_line


class Monitor:
    """The monitors that the DeepSpeed JSON asks for (TensorBoard, W&B, ...), fed with the chain's own step counts."""

    def __init__(self, engine_json: dict[str, Any]):
        """Raises UserError when a monitor's package is not installed."""
        self._master: Any = None
        try:
            self._master = MonitorMaster(get_monitor_config(engine_json))
        except ImportError as error:
            raise UserError(f"the DeepSpeed JSON asks for a monitor whose package is missing: {error}") from None
        except (ValidationError, AssertionError) as error:  # of the JSON itself
            raise UserError(f"the DeepSpeed JSON asks for a monitor that cannot be: {first_line(error)}") from None
        except Exception as error:  # no room in its folder, no network, no account
            self._turn_off(error)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write named numbers at a step; process 0 alone does so. A monitor that fails is turned off, with one line that says so:
        its disk or its network must not cost the run."""
        if self._master is None or not self._master.enabled:
            return
        try:
            self._master.write_events([(name, value, step) for name, value in values.items()])
        except Exception as error:  # whatever their packages raise
            self._turn_off(error)

    def _turn_off(self, error: Exception) -> None:
        self._master = None
        if not dist.is_initialized() or dist.get_rank() == 0:
            notices.warning(f"the monitors are off from here on: {first_line(error)}")
