"""`gralora tokens`: secrets for callers, and the lines of the configuration that know them by their hashes alone."""

from __future__ import annotations

import secrets
import sys
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from gralora_server.cli.options import Json
from gralora_server.cli.output import CommandError, ExitCode, print_json

PREFIX = "gra_"  # so that scanners for leaked secrets, and people, see what it is
SECRET_BYTES = 32

app = typer.Typer(no_args_is_help=True, help="Make bearer tokens, and their hashes for the configuration.")


@app.command("new")
def new(
    *,
    tenant: Annotated[str | None, typer.Option(help="Whose it is. Default: the operator's, who may do all.")] = None,
    role: Annotated[
        str | None, typer.Option(help="generate, manage or admin. Default: generate; admin without a tenant.")
    ] = None,
    expires: Annotated[
        str | None,
        typer.Option(metavar="DAYS|DATE", help="90d, 2027-01-31 or 2027-01-31T12:00+01:00 (else UTC). Default: never."),
    ] = None,
    json: Json = False,
) -> None:
    """Print a new token, which is kept nowhere, and what the configuration says of it."""
    if tenant is None and role not in (None, "admin"):
        raise CommandError(ExitCode.USAGE, f"--role {role} needs --tenant: a token of no tenant is an admin's")
    secret = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
    toml = _toml(secret, tenant, role or "generate", None if expires is None else _moment(expires))
    if json:
        print_json({"token": secret, "toml": toml})
    else:
        typer.echo(f"{secret}\n\n{toml}", nl=False)


@app.command("hash")
def hash_of(json: Json = False) -> None:
    """Read a token from standard input and print its SHA-256, as the configuration has it."""
    from gralora_server.tenants.opaque_tokens import MIN_SECRET_CHARS, digest_of

    secret = sys.stdin.read().strip()
    if len(secret) < MIN_SECRET_CHARS or len(secret.split()) != 1:
        problem = f"a token has at least {MIN_SECRET_CHARS} characters and no spaces, got {len(secret)} characters"
        raise CommandError(ExitCode.USAGE, problem)
    digest = digest_of(secret).hex()
    if json:
        print_json({"sha256": digest})
    else:
        typer.echo(digest)


def _toml(secret: str, tenant: str | None, role: str, expires: datetime | None) -> str:
    """Checked by those who will read it."""
    from pydantic import ValidationError

    from gralora_server.tenants.opaque_tokens import digest_of
    from gralora_server.tenants.settings import TenancySettings

    token = {"sha256": digest_of(secret).hex(), "role": role, "expires": expires}
    try:
        TenancySettings.model_validate(
            {"admin_tokens": [token]} if tenant is None else {"tenants": {tenant: {"tokens": [token]}}}
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise CommandError(ExitCode.USAGE, f"{field}: {first['msg']} (got {first['input']!r})") from error
    lines = ["[[admin_tokens]]" if tenant is None else f'[[tenants."{tenant}".tokens]]']
    lines += [f'sha256 = "{token["sha256"]}"']
    lines += [] if tenant is None else [f'role = "{role}"']
    lines += [] if expires is None else [f"expires = {expires.isoformat()}"]
    return "\n".join(lines) + "\n"


def _moment(text: str) -> datetime:
    if text.endswith("d") and text[:-1].isdecimal() and len(text) < 7:
        return datetime.now(UTC).replace(microsecond=0) + timedelta(days=int(text[:-1]))
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise CommandError(
            ExitCode.USAGE, f"--expires {text!r} is not DAYS or DATE (examples: 90d, 2027-01-31)"
        ) from error
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
