"""The base of every model of parameters: what counts as a number, and how large one may be.

Pydantic takes ``true`` and text for numbers, infinity for a float and any integer; the arrays that
the numbers end in do not. What is refused here cannot be forgotten in a field.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

if TYPE_CHECKING:
    from pydantic import GetJsonSchemaHandler
    from pydantic_core import CoreSchema

#: Largest magnitude of a number; integers of this size fit the 32 bits that seeds and tensors have.
LARGEST = 2**31 - 1

LEAP_YEAR = r"(?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
#: Days of the calendar; forms and servers know patterns, and take a format as a remark.
DATE = (
    r"^(?!0000)(?:\d{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])"
    r"|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|02-(?:0[1-9]|1\d|2[0-8]))"
    rf"|{LEAP_YEAR}-02-29)$"
)

Seed = Annotated[int, Field(ge=0, le=LARGEST)]


class Params(BaseModel):
    """Parameters that cannot be changed, have no unknown names and hold moderate numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """As the model has it, with what is refused below, so that a form refuses it too."""
        made = handler(schema)
        for field in handler.resolve_ref_schema(made).get("properties", {}).values():
            _say_what_is_refused(field)
        return made

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


def _say_what_is_refused(field: dict[str, Any]) -> None:
    """Complete the JSON schema of a field, in place."""
    for part in (*field.get("anyOf", ()), *field.get("prefixItems", ()), field.get("items")):
        if isinstance(part, dict):
            _say_what_is_refused(part)
    if field.get("type") in ("integer", "number"):
        if "exclusiveMinimum" not in field:
            field.setdefault("minimum", -LARGEST)
        if "exclusiveMaximum" not in field:
            field.setdefault("maximum", LARGEST)
    elif field.get("format") == "date":
        field.setdefault("pattern", DATE)


def _number(annotation: Any) -> type | None:
    """What a field counts in: int of ``int | None``, float of ``tuple[float, ...]``; or None."""
    if annotation in (int, float):
        return annotation
    return next(filter(None, map(_number, get_args(annotation))), None)
