"""The base of every model of parameters: what counts as a number, and how large one may be.

Pydantic takes ``true`` and text for numbers, infinity for a float and any integer; the arrays that
the numbers end in do not. What is refused here cannot be forgotten in a field.
"""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

#: Largest magnitude of a number; integers of this size fit the 32 bits that seeds and tensors have.
LARGEST = 2**31 - 1

Seed = Annotated[int, Field(ge=0, le=LARGEST)]


class Params(BaseModel):
    """Parameters that cannot be changed, have no unknown names and hold moderate numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        kind = _number(cls.model_fields[str(info.field_name)].annotation)
        if kind is None:
            return value
        wanted = "an integer" if kind is int else "a number"
        for part in value if isinstance(value, list | tuple) else (value,):
            if isinstance(part, bool | str):
                raise ValueError(f"{wanted} is needed")
            # Written so that NaN, which no comparison holds for, is refused.
            if isinstance(part, int | float) and not -LARGEST <= part <= LARGEST:
                raise ValueError(f"{wanted} from {-LARGEST} to {LARGEST} is needed")
        return value


def _number(annotation: Any) -> type | None:
    """What a field counts in: int of ``int | None``, float of ``tuple[float, ...]``; or None."""
    if annotation in (int, float):
        return annotation
    return next(filter(None, map(_number, get_args(annotation))), None)
