"""`gralora tokens`: what it prints is what the configuration takes, and the server then knows the token."""

from __future__ import annotations

import hashlib
import io
import json
import tomllib
from datetime import UTC, datetime, timedelta

import pytest

from gralora_runtime.errors import GraloraError
from gralora_server.cli.app import run
from gralora_server.cli.output import ExitCode
from gralora_server.tenants.caller import Caller
from gralora_server.tenants.identities import Identities
from gralora_server.tenants.settings import Role, TenancySettings


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, TenancySettings]:
    """The secret, and the settings that the lines behind it make."""
    assert run(["tokens", "new", *arguments]) == ExitCode.OK
    secret, _, toml = capsys.readouterr().out.partition("\n\n")
    return secret, TenancySettings.model_validate(tomllib.loads(toml))


@pytest.mark.parametrize(
    ("arguments", "caller"),
    [
        ((), Caller("", Role.ADMIN)),
        (("--role", "admin"), Caller("", Role.ADMIN)),
        (("--tenant", "acme"), Caller("acme", Role.GENERATE)),
        (("--tenant", "a.b-c_d", "--role", "manage"), Caller("a.b-c_d", Role.MANAGE)),
    ],
    ids=["operator", "admin", "tenant", "manager"],
)
def test_the_lines_make_a_server_know_the_token(arguments: tuple[str, ...], caller: Caller, capsys) -> None:
    secret, settings = printed(capsys, *arguments)

    assert Identities(settings).by_authorization(f"Bearer {secret}") == caller
    assert secret not in settings.model_dump_json()


def test_no_two_tokens_are_alike(capsys) -> None:
    assert len({printed(capsys)[0] for _ in range(10)}) == 10


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2027-01-31", datetime(2027, 1, 31, tzinfo=UTC)),
        ("2027-01-31T12:00+02:00", datetime(2027, 1, 31, 10, tzinfo=UTC)),
    ],
)
def test_a_token_may_expire_at_a_date(text: str, moment: datetime, capsys) -> None:
    _, settings = printed(capsys, "--tenant", "acme", "--expires", text)

    assert settings.tenants["acme"].tokens[0].expires == moment


def test_a_token_may_expire_after_some_days(capsys) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    secret, settings = printed(capsys, "--expires", "90d")
    after = datetime.now(UTC)

    assert before <= settings.admin_tokens[0].expires - timedelta(days=90) <= after
    Identities(settings).by_authorization(f"Bearer {secret}")
    with pytest.raises(GraloraError):
        Identities(settings, now=lambda: after + timedelta(days=90)).by_authorization(f"Bearer {secret}")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--tenant", "a b"], "tenants.a b"),
        (["--tenant", "acme", "--role", "root"], "root"),
        (["--role", "manage"], "needs --tenant"),
        (["--expires", "soon"], "is not DAYS or DATE"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: list[str], problem: str, capsys) -> None:
    code = run(["tokens", "new", *arguments])
    out, err = capsys.readouterr()

    assert code == ExitCode.USAGE
    assert problem in err
    assert out == ""


def test_json_has_the_same(capsys) -> None:
    run(["tokens", "new", "--tenant", "acme", "--json"])
    document = json.loads(capsys.readouterr().out)

    (token,) = TenancySettings.model_validate(tomllib.loads(document["toml"])).tenants["acme"].tokens
    assert token.sha256 == hashlib.sha256(document["token"].encode()).hexdigest()


def test_a_token_of_ones_own_is_hashed_without_the_end_of_its_line(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a-secret-of-my-own-0123\n"))
    code = run(["tokens", "hash"])

    assert code == ExitCode.OK
    assert capsys.readouterr().out == hashlib.sha256(b"a-secret-of-my-own-0123").hexdigest() + "\n"


@pytest.mark.parametrize("text", ["", "short\n", "two words that are long enough"])
def test_what_is_no_token_is_not_hashed(text: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    code = run(["tokens", "hash"])

    assert code == ExitCode.USAGE
    assert capsys.readouterr().out == ""
