"""Which adapter a request wants, as a hint to Serve where it is to go. Nothing but speed may depend on a hint."""

from __future__ import annotations

from typing import Any

from gralora_runtime.adapters.catalogue.names import parse_reference
from gralora_runtime.errors import InvalidRequestError

MODEL_KEY = "multiplexed_model_id"  # Serve's, in a call's metadata


def wanted(request: Any) -> str:
    """The adapter's name without a version, of several the first one's; "": none, or none that could be."""
    text = getattr(request, "adapter", "") or next((one.name for one in getattr(request, "adapters", ())), "")
    try:
        return parse_reference("adapter", text).name if isinstance(text, str) and text else ""
    except InvalidRequestError:
        return ""


def plain(reference: str) -> str:
    """The adapter's name without a version; what is no name as it is."""
    try:
        return parse_reference("name", reference).name if reference else ""
    except InvalidRequestError:
        return reference
