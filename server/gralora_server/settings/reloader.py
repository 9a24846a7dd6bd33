"""Putting another configuration in force while the server runs: all of it or nothing. Knows nothing of its parts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from gralora_runtime.errors import ConfigError
from gralora_server.errors import ConfigInvalidError
from gralora_server.settings.layers import Effective
from gralora_server.settings.sections import Settings
from gralora_server.settings.table import SETTINGS, sections

_log = logging.getLogger(__name__)


class Reloadable(Protocol):
    """A part of the server that takes new settings while it runs."""

    def prepare(self, settings: Settings) -> Callable[[], None]:
        """Check and read all that is needed, and change nothing. Called in another thread; may raise `ConfigError`.

        What it returns puts the settings in force. It is called on the event loop once every part has prepared, and
        may not fail. It is not called at all if another part refused.
        """


class Reloader:
    """`read` says what the configuration is now; what it said first is in force."""

    def __init__(self, read: Callable[[], Effective]) -> None:
        self._read = read
        self._in_force = read()
        self._parts: list[Reloadable] = []
        self._turn = asyncio.Lock()

    @property
    def settings(self) -> Settings:
        """What is in force."""
        return self._in_force.settings

    @property
    def has_file(self) -> bool:
        return self._in_force.document is not None

    def add(self, part: Reloadable) -> None:
        """The part has what is in force already."""
        self._parts.append(part)

    async def reload(self) -> tuple[str, ...]:
        """The tables of the file that changed. Raises `ConfigInvalidError`: then all is as it was."""
        async with self._turn:
            try:
                found, puts = await asyncio.to_thread(self._prepare)
            except ConfigInvalidError as error:
                for problem in error.problems:
                    _log.error("the configuration was not reloaded: %s", problem)
                raise
            changed = _changed(self.settings, found.settings)
            for put in puts:
                put()
            self._in_force = found
        _log.info("the configuration was reloaded; changed: %s", ", ".join(changed) or "nothing")
        return changed

    def _prepare(self) -> tuple[Effective, list[Callable[[], None]]]:
        found = self._read()
        problems = _fixed(self.settings, found)
        puts = []
        for part in self._parts:
            try:
                puts.append(part.prepare(found.settings))
            except ConfigInvalidError as error:
                problems += error.problems
            except ConfigError as error:
                problems.append(str(error))
        if problems:
            raise ConfigInvalidError(problems)
        return found, puts


def _fixed(old: Settings, new: Effective) -> list[str]:
    """What differs and cannot, while the server runs."""
    return [
        f"{one.key} cannot change while the server runs: restart it ({new.origins[one.key]})"
        for one in SETTINGS
        if not sections()[one.section].reloads and one.value(old) != one.value(new.settings)
    ]


def _changed(old: Settings, new: Settings) -> tuple[str, ...]:
    return tuple(name for name in Settings.model_fields if getattr(old, name) != getattr(new, name))
