"""Who shows what is whom: tokens, web tokens and certificates, without a server."""

from __future__ import annotations

import hashlib
import hmac
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.web_tokens import issuer, signed

from gralora_runtime.errors import ConfigError
from gralora_server.errors import UnauthenticatedError
from gralora_server.tenants import opaque_tokens
from gralora_server.tenants.caller import ANYBODY, Caller
from gralora_server.tenants.identities import Identities
from gralora_server.tenants.settings import (
    CertificateSettings,
    Role,
    TenancySettings,
    TenantSettings,
    TokenSettings,
)
from gralora_server.tenants.tenancy import Tenancy

NOON = datetime(2027, 1, 1, 12, tzinfo=UTC)
ACME = Caller("acme", Role.GENERATE, 3.0)


def token(secret: str, role: Role = Role.GENERATE, expires: datetime | None = None) -> TokenSettings:
    return TokenSettings(sha256=hashlib.sha256(secret.encode()).hexdigest(), role=role, expires=expires)


def tenancy(*tokens: TokenSettings, **settings: object) -> TenancySettings:
    """Two tenants: acme with these tokens, and another with one of its own."""
    other = TenantSettings(tokens=(token("bobs-secret"),))
    return TenancySettings(tenants={"acme": TenantSettings(weight=3.0, tokens=tokens), "bob": other}, **settings)


def bearer(identities: Identities, secret: str) -> Caller:
    return identities.by_authorization(f"Bearer {secret}")


IDENTITIES = Identities(tenancy(token("a-secret-of-many-characters")))


# --- bearer tokens


def test_each_of_a_tenants_tokens_is_it_with_the_tokens_role() -> None:
    identities = Identities(tenancy(token("one"), token("two", Role.MANAGE), token("three", Role.ADMIN)))

    assert bearer(identities, "one") == ACME
    assert bearer(identities, "two") == Caller("acme", Role.MANAGE, 3.0)
    assert bearer(identities, "three") == Caller("acme", Role.ADMIN, 3.0)
    assert bearer(identities, "bobs-secret") == Caller("bob", Role.GENERATE, 1.0)


def test_an_admins_token_is_nobodys_and_may_do_everything() -> None:
    settings = tenancy(admin_tokens=(token("root", Role.GENERATE),))

    assert bearer(Identities(settings), "root") == Caller("", Role.ADMIN)


@pytest.mark.parametrize("expires", [NOON, NOON.replace(tzinfo=None)], ids=["aware", "naive-is-UTC"])
def test_a_token_ends_when_it_expires(expires: datetime) -> None:
    now = NOON - timedelta(seconds=1)
    identities = Identities(tenancy(token("one", expires=expires)), now=lambda: now)

    assert bearer(identities, "one") == ACME
    now = NOON
    with pytest.raises(UnauthenticatedError):
        bearer(identities, "one")


def test_a_token_named_twice_has_the_higher_role_for_as_long_as_that_lasts() -> None:
    now = NOON - timedelta(seconds=1)
    settings = tenancy(token("one"), token("one", Role.MANAGE, NOON))
    identities = Identities(settings, now=lambda: now)

    assert bearer(identities, "one").role is Role.MANAGE
    now = NOON
    assert bearer(identities, "one").role is Role.GENERATE


def test_no_token_belongs_to_two_tenants() -> None:
    with pytest.raises(ConfigError, match="given to two tenants: 'acme' and 'bob'"):
        Identities(tenancy(token("bobs-secret")))


def test_every_hash_is_compared_whichever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else the time would tell how far down the list a token is, and whether there is such a token at all."""
    compared: list[bytes] = []

    def compare(known: bytes, given_one: bytes) -> bool:
        compared.append(known)
        return hmac.compare_digest(known, given_one)

    monkeypatch.setattr(opaque_tokens, "hmac", type("Counting", (), {"compare_digest": staticmethod(compare)}))
    identities = Identities(tenancy(token("one"), token("two")))
    for secret in ("one", "two", "none of them"):
        compared.clear()
        if secret == "none of them":
            with pytest.raises(UnauthenticatedError):
                bearer(identities, secret)
        else:
            bearer(identities, secret)

        assert len(compared) == 3


@given(st.text(max_size=40))
def test_no_other_text_is_a_token(text: str) -> None:
    """That none of these is one of the two secrets by chance, needs no saying."""
    for authorization in (text, f"Bearer {text}"):
        with pytest.raises(UnauthenticatedError):
            IDENTITIES.by_authorization(authorization)


def test_the_same_words_refuse_whatever_is_wrong(tmp_path: Path) -> None:
    settings = tenancy(token("one", expires=NOON), jwt=issuer(tmp_path))
    identities = Identities(settings, now=lambda: NOON)
    wrong = ["one", "nobody's", "", "a.b.c", signed(tenant="nobody"), signed(role="root"), signed(kid="unknown")]
    messages = set()
    for authorization in ["", "Basic one", *(f"Bearer {secret}" for secret in wrong)]:
        with pytest.raises(UnauthenticatedError) as caught:
            identities.by_authorization(authorization)
        messages.add((str(caught.value), caught.value.reason, tuple(caught.value.metadata())))

    assert len(messages) == 1


@pytest.mark.parametrize("spelling", ["Bearer one", "bearer one", "BEARER  one "])
def test_the_scheme_has_no_case(spelling: str) -> None:
    assert Identities(tenancy(token("one"))).by_authorization(spelling) == ACME


# --- with and without


def test_where_nobody_is_named_anybody_may_call() -> None:
    identities = Identities(TenancySettings())

    assert identities.by_authorization("") == ANYBODY
    assert identities.by_authorization("Bearer whatever") == ANYBODY


def test_a_tenant_closes_the_server_and_so_does_each_kind_of_credential(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("operators-token-0123456789\n")
    for identities in (
        Identities(TenancySettings(tenants={"acme": TenantSettings()})),
        Identities(TenancySettings(admin_tokens=(token("root"),))),
        Identities(TenancySettings(jwt=issuer(tmp_path))),
        Identities(TenancySettings(), token_file=file),
    ):
        with pytest.raises(UnauthenticatedError):
            identities.by_authorization("")


def test_the_token_files_callers_are_operators_beside_the_tenants(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("operators-token-0123456789\nusers-token.with.dots-0123456789 generate\n")
    identities = Identities(tenancy(token("one"), jwt=issuer(tmp_path)), token_file=file)

    assert bearer(identities, "operators-token-0123456789") == Caller("", Role.ADMIN)
    assert bearer(identities, "users-token.with.dots-0123456789") == Caller("", Role.GENERATE)
    assert bearer(identities, "one") == ACME


# --- certificates


def certified(*subjects: tuple[str, str, Role]) -> Identities:
    tenants = {
        name: TenantSettings(
            certificates=tuple(CertificateSettings(subject=s, role=r) for n, s, r in subjects if n == name)
        )
        for name in {name for name, _, _ in subjects}
    }
    return Identities(TenancySettings(tenants=tenants))


@pytest.mark.parametrize("kind", ["x509_common_name", "peer_dns", "peer_uri"])
def test_a_certificate_is_known_by_any_of_its_names(kind: str) -> None:
    identities = certified(("acme", "client.acme", Role.MANAGE))
    peer = {"transport_security_type": [b"ssl"], kind: [b"something else", b"client.acme"]}

    assert identities.by_certificate(peer) == Caller("acme", Role.MANAGE)


@pytest.mark.parametrize(
    "peer",
    [
        {},
        {"x509_common_name": [b"client.bob"]},
        {"peer_email": [b"client.acme"], "x509_subject_alternative_name": [b"client.acme"]},
        {"peer_dns": [b"\xff\xfe"]},
        {"peer_dns": [b"client.acme", b"client.eve"]},
    ],
    ids=["none", "unknown", "only-an-email", "no-text", "two-tenants"],
)
def test_a_certificate_without_a_known_name_is_nobodys(peer: dict[str, list[bytes]]) -> None:
    identities = certified(("acme", "client.acme", Role.GENERATE), ("eve", "client.eve", Role.GENERATE))

    with pytest.raises(UnauthenticatedError):
        identities.by_certificate(peer)


def test_of_several_names_of_one_tenant_the_higher_role_counts() -> None:
    identities = certified(("acme", "ci.acme", Role.MANAGE), ("acme", "acme", Role.GENERATE))

    assert identities.by_certificate({"x509_common_name": [b"acme"], "peer_dns": [b"ci.acme"]}).role is Role.MANAGE


def test_a_subject_belongs_to_one_line() -> None:
    with pytest.raises(ConfigError, match="'client' is given twice"):
        certified(("acme", "client", Role.GENERATE), ("bob", "client", Role.GENERATE))


# --- exchanged while the server runs


def test_settings_are_exchanged_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    tenants = Tenancy(tenancy(token("one")))
    before = tenants.current
    web = issuer(tmp_path)
    web.jwks_file.write_text("{")
    for bad in (tenancy(token("two"), jwt=web), tenancy(token("bobs-secret"))):
        with pytest.raises(ConfigError):
            tenants.replace(bad)

    assert tenants.current is before
    tenants.replace(tenancy(token("two")))
    assert bearer(tenants.current.identities, "two") == ACME
    assert bearer(before.identities, "one") == ACME
    with pytest.raises(UnauthenticatedError):
        bearer(tenants.current.identities, "one")


def test_the_files_are_read_again_when_settings_are_exchanged(tmp_path: Path) -> None:
    file, settings = tmp_path / "tokens", tenancy()
    file.write_text("operators-token-0123456789\n")
    tenants = Tenancy(settings, token_file=file)
    file.write_text("another-token-0123456789\n")
    tenants.replace(settings)

    assert bearer(tenants.current.identities, "another-token-0123456789") == Caller("", Role.ADMIN)


def test_certificates_need_an_authority() -> None:
    settings = TenancySettings(tenants={"acme": TenantSettings(certificates=(CertificateSettings(subject="a"),))})

    with pytest.raises(ConfigError, match="no client authority"):
        Tenancy(settings)
    assert Tenancy(settings, asks_for_certificates=True).current.identities.reads_certificates
