"""Schemas of ours, of which no two are the same."""

from __future__ import annotations

import json


def schema(number: int) -> str:
    """Of a list that is longer than any answer of ours."""
    properties = {
        f"name_{number}": {"type": "string", "maxLength": 20},
        f"count_{number}": {"type": "integer", "minimum": 0, "maximum": 1000 + number},
        "colour": {"enum": ["red", "green", "blue"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
    }
    item = {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip
    return json.dumps({"type": "array", "items": item, "minItems": 100})
