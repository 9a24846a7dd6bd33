"""`gralora health`: whether a server takes requests, for probes of containers and balancers. Needs no token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gralora_server.cli.output import CommandError, ExitCode
from gralora_server.cli.remote import connected, needs_connection

if TYPE_CHECKING:
    from gralora_server.client.connection import Connection


@needs_connection
def health(
    settings: Connection,
    *,
    within_s: Annotated[float, typer.Option(min=0.1, help="How long the server may take to answer.")] = 2.0,
) -> None:
    """End with 0 if the server takes requests, with 3 if it does not: it starts, drains, or is not there."""
    from gralora_server.client import DeadlineError

    with connected(settings, 0.0) as client:
        try:
            client.wait_ready(within_s)
        except DeadlineError as cause:
            raise CommandError(ExitCode.UNREACHABLE, f"{settings.target}: {cause.message}") from cause
