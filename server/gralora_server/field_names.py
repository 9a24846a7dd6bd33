"""Errors about a field of ours, for clients of protocols in which it has another name."""

from __future__ import annotations

from collections.abc import Sequence

from gralora_runtime.errors import InvalidRequestError

Names = Sequence[tuple[str, str]]  # ours and theirs, each for all fields that begin so; the first that fits counts


def renamed(error: InvalidRequestError, names: Names) -> InvalidRequestError:
    """The same, with the field as they have it."""
    for ours, theirs in names:
        if error.field.startswith(ours):
            return error.renamed(theirs + error.field.removeprefix(ours))
    return error
