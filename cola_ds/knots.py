"""Where knots fall."""

from __future__ import annotations

from typing import Any

from cola_ds.errors import UserError


def place_knots(knots: Any, length: int, total_steps: int, steps_per_epoch: int) -> tuple[int, ...]:
    """The step after which each of `length` links ends; the last is `total_steps`.

    `knots` is "even" (links differ by at most one step, the earlier ones longer), {"epochs": [...]} or {"steps": [...]}
    with the length - 1 knots before the end of the run. Raises UserError for a knot at or past the end.
    """
    if knots == "even":
        if total_steps < length:
            raise UserError(
                f"chain.length {length} needs at least one step per link, but the run has {total_steps} steps"
            )
        short, longer = divmod(total_steps, length)
        return tuple(link * short + min(link, longer) for link in range(1, length + 1))
    (unit, at), *_ = knots.items()
    inner = [k * steps_per_epoch if unit == "epochs" else k for k in at]
    if inner and inner[-1] >= total_steps:
        where = f"epoch {at[-1]} (step {inner[-1]})" if unit == "epochs" else f"step {at[-1]}"
        raise UserError(f"chain.knots: {where} is at or past the end of the run, which has {total_steps} steps")
    return (*inner, total_steps)
