"""What the sections of a run's YAML are made of: the section itself, marks of keys, counts and paths."""

from __future__ import annotations

import enum
import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

LIMIT = 2**31  # nothing is counted as far
Count = Annotated[int, Field(ge=1, lt=LIMIT)]


class Mark(enum.Enum):
    """What a key means where a run is resumed, read or swept; keys.py answers by it. A mark of a section is one of all its keys.

    A key without a mark is compared: a run goes on with another value only by --allow-change.
    """

    FREE = "cannot change a result: where things lie, what is logged and saved"
    FIXED = (
        "what tied links and the optimizer's state were made with: not even --allow-change lets another value through"
    )
    CONTENT = "what it names is compared when a run goes on, and not the name"
    PLACE = "where something lies that was fingerprinted: whoever reads a run may find it elsewhere"
    FILE = "names a file, or something ready-made; a sweep is frozen with a copy, and compared by what it says"
    PER_RUN = "a sweep gives each of its runs its own"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


def check_path(value: str) -> str:
    if "\0" in value or len(os.fsencode(value)) > 3000:
        raise ValueError("is no path")
    if longest := [part for part in value.split("/") if len(os.fsencode(part)) > 255]:
        raise ValueError(f"has a name of {len(longest[0])} letters, and file systems take 255")
    return value


Path = Annotated[str, Field(min_length=1), AfterValidator(check_path)]
