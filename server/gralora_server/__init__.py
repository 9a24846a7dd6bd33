"""The gRPC server, its Python client and its command line.

`from gralora_server import Client, AsyncClient` is the client's public name; it is imported on first use, so that
`gralora --help` does not wait for gRPC.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gralora_server.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gralora_server import client

    return getattr(client, name)
