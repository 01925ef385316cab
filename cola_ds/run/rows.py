"""Validation of the JSON that a run leaves, whatever others have made of it since: read as what it must be, or refused in a few
words."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Count = Annotated[int, Field(ge=0, le=2**53)]
T = TypeVar("T", bound=BaseModel)


class CheckedJson(BaseModel):
    """The schema of a JSON document. Keys that are not named in it may be there, and say anything."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Metrics(CheckedJson):
    step: Count
    link: Count = 1
    loss: float | None = None


class _Evaluation(CheckedJson):
    step: Count
    loss: float | None = None
    perplexity: float | None = None
    split: str | None = None
    metric: str = ""
    score: float = 0.0


class _Knot(CheckedJson):
    step: Count
    link: Count
    lora_rank: Count
    delta_norm: float
    rounding_error: float | None = None
    effective_rank: float | None = None
    sum_effective_rank: float | None = None
    row_overlap: float | None = None
    column_overlap: float | None = None
    intruders: Count | None = None
    intruder_layers: Count | None = None


class _Layer(CheckedJson):
    """A layer of a link, in links.jsonl."""

    step: Count
    link: Count
    lora_rank: Count
    layer: str
    norm: float | None
    effective_rank: float | None
    sum_norm: float | None
    sum_effective_rank: float | None
    row_overlap: float | None
    column_overlap: float | None
    singular_values: list[float | None]
    sum_singular_values: list[float | None]
    row_overlaps: list[float | None]
    column_overlaps: list[float | None]
    intruders: Count | None = None


class _Watch(CheckedJson):
    step: Count
    link: Count = 1
    loss: float | None = None
    data: str | None = None


class _Event(CheckedJson):
    event: str
    step: Count | None = None
    time: str = ""
    signal: str = ""


_KINDS: dict[str, type[CheckedJson]] = {
    "metrics.jsonl": _Metrics,
    "evals.jsonl": _Evaluation,
    "knots.jsonl": _Knot,
    "links.jsonl": _Layer,
    "watch.jsonl": _Watch,
    "events.jsonl": _Event,
}


def read_row(name: str, line: bytes) -> dict[str, Any]:
    """A row of a run's .jsonl file of that name. Raises ValueError for one that is not what the run wrote, in a few words."""
    return read_json(_KINDS[name], line).model_dump(exclude_unset=True)


def read_json(kind: type[T], content: bytes) -> T:
    """Validate a JSON document as that kind. Raises ValueError, in a few words that name the key."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:80]
        raise ValueError(f"{where}: {first['msg'][:120]}" if where else first["msg"][:120]) from None
