"""What strangers wrote as JSON, by pydantic's rules: strict, and a million mistakes cost no more than one: lists end at
the first, and unknown fields are looked at afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Self, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, ValidationError

from gralora_runtime.errors import InvalidRequestError

T = TypeVar("T")
MAX_NAME_CHARS = 80
MAX_SHOWN_CHARS = 100
TYPES = ("str", "int", "float", "bool", "list", "dict")


class _AtTheFirst(FailFast):
    """One that unions may hold."""

    def __hash__(self) -> int:
        return hash(self.fail_fast)


List = Annotated[list[T], _AtTheFirst()]


class Part(BaseModel):
    """Of something that clients send back as they got it: unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class Whole(BaseModel):
    """Of which whoever sent it expects something: unknown fields are refused by `checked`."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    def checked(self, place: str = "") -> Self:
        """`place`: of this in what was sent. Raises InvalidRequestError if there are fields that nothing knows."""
        refuse_unknown(self.model_extra or {}, place)
        return self


def refuse_unknown(fields: Mapping[str, object], place: str = "") -> None:
    """Raises InvalidRequestError if there are any."""
    for name, value in fields.items():
        field = _joined(place, name[:MAX_NAME_CHARS])
        raise InvalidRequestError(field, type(value).__name__, "is a field that this server does not know")


def misfit(error: ValidationError, place: str = "") -> InvalidRequestError:
    """Of the first field that is wrong. Where a value may be of several kinds, of the one that fits it furthest."""
    wrong = error.errors(include_url=False, include_context=False)
    of_field = [one for one in wrong if one["loc"][:1] == wrong[0]["loc"][:1]]
    furthest = max(of_field, key=lambda one: len(one["loc"]))
    found = _place(furthest["loc"])
    problems = dict.fromkeys(one["msg"] for one in of_field if _place(one["loc"]) == found)
    return InvalidRequestError(_joined(place, found) or "body", shown(furthest["input"]), "; ".join(problems))


def shown(value: object) -> object:
    """Of a value that may be of any size."""
    if isinstance(value, str | bytes):
        return value[:MAX_SHOWN_CHARS]
    return value if value is None or isinstance(value, int | float) else type(value).__name__


def _place(parts: Sequence[str | int]) -> str:
    """As one would write it. Among pydantic's parts are types, too, which have no place in a body."""
    found = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}"
        for part in parts
        if isinstance(part, int) or (part.isidentifier() and part not in TYPES)
    )
    return found.lstrip(".")


def _joined(place: str, name: str) -> str:
    if not place or not name:
        return place or name
    return f"{place}{name}" if name.startswith("[") else f"{place}.{name}"
