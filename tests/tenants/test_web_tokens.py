"""Which web tokens are believed: those that one of the issuer's keys has signed, for us, for now, of somebody known."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from support.web_tokens import KINDS, claims, issuer, jwk, private_key, signed, write_jwks

from gralora_runtime.errors import ConfigError
from gralora_server.tenants.caller import Caller
from gralora_server.tenants.settings import JwtSettings, Role
from gralora_server.tenants.web_tokens import WebTokens


def caller_of(tenant: str, role: Role) -> Caller | None:
    return Caller(tenant, role) if tenant in ("", "acme") else None


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> WebTokens:
    return WebTokens(issuer(tmp_path_factory.mktemp("issuer")), caller_of)


def believed(settings: JwtSettings, token: str) -> Caller | None:
    return WebTokens(settings, caller_of).caller(token)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_of_every_asymmetric_kind_is_believed(kind: str, tmp_path: Path) -> None:
    assert believed(issuer(tmp_path, *KINDS), signed(kind)) == Caller("acme", Role.MANAGE)


@pytest.mark.parametrize(
    "token",
    [
        {"exp": time.time() - 31},
        {"exp": None},
        {"exp": "soon"},
        {"exp": 1e400},
        {"nbf": time.time() + 86_400},
        {"iss": "https://another.example"},
        {"iss": None},
        {"aud": "another"},
        {"aud": None},
        {"tenant": "bob"},
        {"tenant": ""},
        {"tenant": None},
        {"tenant": ["acme"]},
        {"role": "root"},
        {"role": None},
        {"role": ["admin"]},
        {"role": ""},
        {"kid": "unknown"},
        {"kid": None},
        {"key": ec.generate_private_key(ec.SECP256R1())},
    ],
    ids=lambda changes: "-".join(f"{name}-{type(value).__name__}" for name, value in changes.items()),
)
def test_a_token_that_lacks_anything_is_not_believed(token: dict[str, object], tmp_path: Path) -> None:
    settings = issuer(tmp_path)

    assert believed(settings, signed(**token)) is None  # type: ignore[arg-type]
    assert believed(settings, signed()) is not None


def test_a_token_that_has_just_expired_is_believed_within_the_leeway(tmp_path: Path) -> None:
    token = signed(exp=time.time() - 10)

    assert believed(issuer(tmp_path, leeway_s=30.0), token) is not None
    assert believed(issuer(tmp_path, leeway_s=0.0), token) is None


def test_the_claims_may_have_other_names(tmp_path: Path) -> None:
    settings = issuer(tmp_path, tenant_claim="org", role_claim="https://gralora.dev/role")
    token = signed(tenant="bob", role="generate", org="acme", **{"https://gralora.dev/role": "generate"})

    assert believed(settings, token) == Caller("acme", Role.GENERATE)


def test_an_admin_may_be_of_no_tenant_and_nobody_else(tmp_path: Path) -> None:
    settings = issuer(tmp_path)

    assert believed(settings, signed(tenant=None, role="admin")) == Caller("", Role.ADMIN)
    assert believed(settings, signed(tenant="acme", role="admin")) == Caller("acme", Role.ADMIN)
    assert believed(settings, signed(tenant=None, role="manage")) is None


# --- forgeries


def part(document: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(document).encode()).rstrip(b"=").decode()


def test_nobody_signs_with_a_public_key(tmp_path: Path) -> None:
    """As if it were a secret that both sides share: everybody has it."""
    settings = issuer(tmp_path, "RS256")
    public = private_key("RS256").public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    hmac_key = jwt.get_algorithm_by_name("HS256")
    signing_input = f"{part({'alg': 'HS256', 'kid': 'RS256'})}.{part(claims())}".encode()
    signature = base64.urlsafe_b64encode(hmac_key.sign(signing_input, public)).rstrip(b"=")

    assert believed(settings, (signing_input + b"." + signature).decode()) is None


@pytest.mark.parametrize("algorithm", ["none", "None", "", None, [], "HS256", "ES384"])
def test_an_algorithm_of_the_senders_choice_is_not_believed(algorithm: object, tmp_path: Path) -> None:
    header, _, rest = signed().partition(".")
    body, _, signature = rest.partition(".")
    forged = part({"alg": algorithm, "kid": "ES256"})

    for signed_by in ("", signature):
        assert believed(issuer(tmp_path), f"{forged}.{body}.{signed_by}") is None
    assert believed(issuer(tmp_path), f"{header}.{body}.{signature}") is not None


def test_a_changed_claim_breaks_the_signature(tmp_path: Path) -> None:
    header, _, signature = signed(role="generate").split(".")

    assert believed(issuer(tmp_path), f"{header}.{part(claims(role='admin'))}.{signature}") is None


def test_a_key_signs_only_what_its_file_says(tmp_path: Path) -> None:
    """One RSA key could make six kinds of signatures."""
    settings = issuer(tmp_path, "RS256")
    key = private_key("RS256")
    other = jwt.encode(claims(), key, algorithm="PS256", headers={"kid": "RS256"})

    assert believed(settings, other) is not None
    write_jwks(settings.jwks_file, jwk("RS256", alg="RS256"))
    assert believed(settings, other) is None
    assert believed(settings, signed("RS256")) is not None


@given(st.text(alphabet=st.characters(max_codepoint=255), max_size=60), st.integers(0, 2))
def test_no_text_in_place_of_a_part_is_believed_or_breaks_anything(tokens: WebTokens, text: str, position: int) -> None:
    parts = signed().split(".")
    parts[position] = text

    assert tokens.caller(".".join(parts)) is None


# --- the file of keys


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ([], "has no key for signatures"),
        ([jwk("ES256", use="enc")], "has no key for signatures"),
        ([jwk("ES256", kid=None)], "needs a 'kid' of its own"),
        ([jwk("ES256"), jwk("ES384", kid="ES256")], "needs a 'kid' of its own"),
        ([{"kty": "oct", "kid": "a", "k": "c2VjcmV0"}], "not a shared secret"),
        ([{"kty": "EC", "crv": "secp256k1", "kid": "a", "x": "", "y": ""}], "of no kind that is believed"),
        ([{"kty": ["EC"], "kid": "a"}], "of no kind that is believed"),
        ([jwk("ES256", alg="HS256")], "of no kind that is believed"),
        ([jwk("ES256", alg="ES384")], "of no kind that is believed"),
        ([jwk("ES256", x="AAAA")], "cannot be read"),
        ([jwk("ES256", d="AAAA")], "is a private one"),
        ([jwk("small", kid="weak")], "has 1024 bits"),
        (["ES256"], "list of objects"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_keys_that_cannot_be_meant_are_refused(keys: list[object], problem: str, tmp_path: Path) -> None:
    settings = issuer(tmp_path)
    write_jwks(settings.jwks_file, *keys)

    with pytest.raises(ConfigError, match=problem):
        WebTokens(settings, caller_of)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"keys": {}}', "[" * 10_000], ids=["empty", "list", "no", "object", "deep"]
)
def test_a_file_that_is_no_list_of_keys_is_refused(content: str, tmp_path: Path) -> None:
    settings = issuer(tmp_path)
    settings.jwks_file.write_text(content)

    with pytest.raises(ConfigError, match="JWKS file"):
        WebTokens(settings, caller_of)


def test_a_key_for_something_else_may_lie_beside(tmp_path: Path) -> None:
    settings = issuer(tmp_path)
    write_jwks(settings.jwks_file, jwk("RS256", use="enc"), jwk("ES256", use="sig"))

    assert believed(settings, signed()) is not None
    assert believed(settings, signed("RS256")) is None
