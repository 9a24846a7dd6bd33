"""Commands that talk to a server: their connection options, stated once, and how a failed call ends a command."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gralora_server.cli.environment import bearer_token
from gralora_server.cli.output import CommandError, ExitCode
from gralora_server.settings.sections import DEFAULT_ADDRESS

if TYPE_CHECKING:  # grpc takes a while to import, and `--help` does without it
    from gralora_server.client import Client, GraloraClientError
    from gralora_server.client.connection import Connection

GROUP = "Connection"


def connection(
    *,
    address: Annotated[
        str, typer.Option(envvar="GRALORA_ADDRESS", help="HOST:PORT of the server.", rich_help_panel=GROUP)
    ] = DEFAULT_ADDRESS,
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with the bearer token. Default: $GRALORA_TOKEN.", rich_help_panel=GROUP),
    ] = None,
    tls: Annotated[bool, typer.Option("--tls", help="Use TLS.", rich_help_panel=GROUP)] = False,
    tls_ca: Annotated[
        Path | None,
        typer.Option(help="PEM file of the authorities to trust, instead of the system's.", rich_help_panel=GROUP),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="PEM file of this client's certificate.", rich_help_panel=GROUP)
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="PEM file of this client's private key.", rich_help_panel=GROUP)
    ] = None,
) -> Connection:
    """What the options say; nothing is opened yet."""
    from gralora_server.client import ClientTls
    from gralora_server.client.connection import Connection

    secured: ClientTls | None = None
    if tls or tls_ca or tls_cert or tls_key:
        secured = ClientTls(root_certificates=tls_ca, certificate=tls_cert, private_key=tls_key)
    try:
        token = bearer_token() if token_file is None else token_file.read_text(encoding="utf-8").strip()
        settings = Connection(target=address, tls=secured, token=token)
        settings.credentials()  # reads the PEM files
    except OSError as cause:
        raise CommandError(ExitCode.USAGE, f"cannot read {cause.filename}: {cause.strerror}") from cause
    return settings


@contextmanager
def failures_of(address: str) -> Iterator[None]:
    """What the client raises becomes the end of a command."""
    from gralora_server.client import GraloraClientError

    try:
        yield
    except GraloraClientError as cause:
        raise _command_error(address, cause) from cause


@contextmanager
def connected(settings: Connection, wait_s: float) -> Iterator[Client]:
    """A client, whose failures become the command's."""
    from gralora_server.client import Client

    client = Client(settings.target, tls=settings.tls, token=settings.token)
    with client, failures_of(settings.target):
        if wait_s:
            _wait_ready(client, settings.target, wait_s)
        yield client


WaitS = Annotated[
    float, typer.Option(min=0, help="Wait so long for the server to become ready.", rich_help_panel=GROUP)
]


def needs_connection(command: Callable[..., None]) -> Callable[..., None]:
    """Gives the command, as its first argument, what reaches a server; and its command line the options for it."""
    own = list(inspect.signature(command).parameters.values())[1:]
    shared = list(inspect.signature(connection).parameters.values())
    hints = _hints(command) | _hints(connection)

    def run(**arguments: Any) -> None:
        settings = connection(**{parameter.name: arguments.pop(parameter.name) for parameter in shared})
        command(settings, **arguments)

    run.__name__, run.__doc__, run.__annotations__ = command.__name__, command.__doc__, hints
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # functions do not declare it
        [parameter.replace(annotation=hints[parameter.name]) for parameter in (*own, *shared)]
    )
    return run


def needs_server(command: Callable[..., None]) -> Callable[..., None]:
    """Gives the command a client of the server as its first argument."""
    client_parameter, *own = inspect.signature(command).parameters.values()
    wait = inspect.Parameter("wait_s", inspect.Parameter.KEYWORD_ONLY, default=0.0, annotation=WaitS)

    def run(settings: Connection, *, wait_s: float, **arguments: Any) -> None:
        with connected(settings, wait_s) as client:
            command(client, **arguments)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = _hints(command) | {"wait_s": WaitS}
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # functions do not declare it
        [client_parameter.replace(name="settings"), *own, wait]
    )
    return needs_connection(run)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Evaluated annotations but for those of the client and of the result, whose types are not imported here."""
    raw = {
        name: hint for name, hint in function.__annotations__.items() if name not in ("client", "settings", "return")
    }
    return {name: eval(hint, function.__globals__) if isinstance(hint, str) else hint for name, hint in raw.items()}  # noqa: S307 -- our own source


def _wait_ready(client: Client, address: str, wait_s: float) -> None:
    from gralora_server.client import DeadlineError

    try:
        client.wait_ready(wait_s)
    except DeadlineError as cause:
        raise CommandError(ExitCode.UNREACHABLE, f"{address}: {cause.message}") from cause


def _command_error(address: str, cause: GraloraClientError) -> CommandError:
    from gralora_server.client import UnavailableError

    if isinstance(cause, UnavailableError) and not cause.reason:  # not the server's own answer
        return CommandError(ExitCode.UNREACHABLE, f"cannot reach a server at {address}: {cause.message}")
    if cause.reason in ("ADAPTER_REJECTED", "ADAPTER_CAPACITY"):
        return CommandError(ExitCode.UNFIT_ADAPTER, str(cause))
    return CommandError(ExitCode.FAILED, str(cause))
