"""What becomes of an exception that nobody raised on purpose while a model is read and checked: one sentence."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gralora_runtime.errors import ConfigError, GraloraError, ModelUnsupportedError
from gralora_runtime.shortage import out_of_memory

MAX_CAUSE_CHARS = 240

logger = logging.getLogger(__name__)


@contextmanager
def refusing(model: str, config: Any, be: str) -> Iterator[None]:
    """`be`: what the model then cannot be, such as "read". Whatever its own code fails with, or ours that wants another
    build, it is not served; where that was is for developers, and goes to the log at debug level.

    Raises `ModelUnsupportedError`, or `ConfigError` if there is not enough memory.
    """
    try:
        yield
    except GraloraError:
        raise
    except Exception as cause:
        logger.debug("model %r cannot be %s", model, be, exc_info=True)
        if out_of_memory(cause):
            raise ConfigError(
                f"model {model!r} cannot be {be}: there is not enough memory ({_brief(cause)})"
            ) from cause
        raise ModelUnsupportedError(model, [f"{architecture(config)} cannot be {be} ({_brief(cause)})"]) from cause


def architecture(config: Any) -> str:
    """The name that a configuration gives it."""
    named = getattr(config, "architectures", None) or [getattr(config, "model_type", "")]
    return str(named[0])


def _brief(cause: Exception) -> str:
    first_line = str(cause).partition("\n")[0]
    shown = first_line if len(first_line) <= MAX_CAUSE_CHARS else first_line[: MAX_CAUSE_CHARS - 3] + "..."
    return f"{type(cause).__name__}: {shown}" if shown else type(cause).__name__
