"""The application for Ray Serve: `serve run gralora_server.ray_app:build config=...`, or `import_path` in its file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray import serve


def build(arguments: Mapping[str, Any]) -> serve.Application:
    """`arguments`: see `gralora_server.ray.plan`. Raises `ConfigInvalidError`."""
    from gralora_server.ray.deployment import application
    from gralora_server.ray.plan import plan_of

    return application(plan_of(arguments))
