"""What the base model is called where clients name models."""

from __future__ import annotations

from pathlib import PurePath

from gralora_runtime.info import EngineInfo


def base_name(info: EngineInfo) -> str:
    """The name of its directory."""
    return PurePath(info.model).name
