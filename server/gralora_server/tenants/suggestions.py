"""Which name somebody may have meant who names an adapter that there is not: one that is there for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from gralora_runtime.adapters.catalogue.changes import any_name
from gralora_runtime.errors import AdapterNotFoundError, AdapterVersionNotFoundError
from gralora_server.ports import Adapters


@asynccontextmanager
async def suggesting(adapters: Adapters, sees: Callable[[str], bool]) -> AsyncIterator[None]:
    """What the engine suggests may be anybody's, and is what it told others a moment ago; so it is found anew.

    Also where it suggests nothing: or else the time would tell.
    """
    try:
        yield
    except AdapterNotFoundError as error:
        if sees is any_name or isinstance(error, AdapterVersionNotFoundError):
            raise
        similar = await asyncio.to_thread(adapters.similar, error.name, sees)
        raise AdapterNotFoundError(error.name, similar) from None
