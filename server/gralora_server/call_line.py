"""What the log says of a call: its fields, for people as text. A leaf file, for whoever writes it down."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

Fields = Mapping[str, object]

_word = re.compile(r"[!-~]+")


class CallLine:
    """For people as text by `str`, for programs its fields."""

    __slots__ = ("fields",)

    def __init__(self, fields: Fields) -> None:
        self.fields = fields

    def __str__(self) -> str:
        return " ".join(f"{name}={_said(value)}" for name, value in self.fields.items())


def _said(value: object) -> str:
    """ "" and what is more than one word in quotes, as JSON has them."""
    text = str(value)
    return text if _word.fullmatch(text) and '"' not in text else json.dumps(text)
