"""The JSON that a run leaves, whatever others have made of it since: read as what it must be, or refused in a few words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

_Count = Annotated[int, Field(ge=0, le=2**53)]


class _Checked(BaseModel):
    """Keys that are not named here may be there, and say anything."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Metrics(_Checked):
    step: _Count
    link: _Count = 1
    loss: float | None = None


class _Evaluation(_Checked):
    step: _Count
    loss: float | None = None
    perplexity: float | None = None
    split: str | None = None
    metric: str = ""
    score: float = 0.0


class _Knot(_Checked):
    step: _Count
    link: _Count
    lora_rank: _Count
    delta_norm: float
    rounding_error: float | None = None


class _Event(_Checked):
    event: str
    step: _Count | None = None
    time: str = ""
    signal: str = ""


_KINDS: dict[str, type[_Checked]] = {
    "metrics.jsonl": _Metrics,
    "evals.jsonl": _Evaluation,
    "knots.jsonl": _Knot,
    "events.jsonl": _Event,
}


def read_row(name: str, line: bytes) -> dict[str, Any]:
    """A row of a run's .jsonl file of that name. Raises ValueError for one that is not what the run wrote, in a few words."""
    return _read(_KINDS[name], line).model_dump(exclude_unset=True)


class _Group(_Checked):
    task: str
    name: str
    points: Annotated[list[str], Field(min_length=1)]
    seeds: list[_Count]
    search_seeds: list[_Count]
    paths: list[tuple[str, _Count, str]]


class _Sweep(_Checked):
    groups: list[_Group]


def read_sweep(path: Path) -> list[dict[str, Any]]:
    """The groups of a sweep.json, whose runs all lie below its folder. Raises ValueError, in a few words."""
    groups = _read(_Sweep, path.read_bytes()).groups
    for group in groups:
        places = {(point, seed) for point, seed, _ in group.paths}
        if lacking := {(p, s) for p in group.points for s in {*group.seeds, *group.search_seeds}} - places:
            raise ValueError(f"groups: no path for {min(lacking)}")
        for _, _, place in group.paths:
            if Path(place).is_absolute() or ".." in Path(place).parts or "\0" in place:
                raise ValueError(f"groups: {place[:80]!r} is not below the sweep's folder")
    return [group.model_dump() for group in groups]


def _read(kind: type[Any], content: bytes) -> Any:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:80]
        raise ValueError(f"{where}: {first['msg'][:120]}" if where else first["msg"][:120]) from None
